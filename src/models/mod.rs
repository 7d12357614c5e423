//! The models, loaded from the files that people have: Stable Diffusion pipelines and CLIP towers.

mod borrowed;
pub mod captioner;
pub mod clip;
pub mod hub;
pub mod image_reward;
pub mod merge;
mod model_index;
mod numbers;
mod parameters;
pub mod pipeline;
mod prompt_embeds;
pub mod sentence_pieces;
mod single_file;
mod staged;
pub mod text_encoder;
pub mod text_model;
pub mod tokenizer;
mod transformer;
pub mod unet;
pub mod vae;
pub mod weights;
pub mod word_pieces;
pub mod yolos;

pub use hub::Source;
pub use pipeline::Pipeline;
pub use prompt_embeds::{PromptEmbeds, SizeConditioning};
pub use weights::Weights;
