//! The models, loaded from the files that people have: Stable Diffusion pipelines and CLIP towers.

pub mod clip;
pub mod hub;
pub mod image_reward;
pub mod merge;
mod model_index;
mod numbers;
mod parameters;
pub mod pipeline;
pub mod sentence_pieces;
mod single_file;
mod staged;
pub mod text_encoder;
pub mod tokenizer;
mod transformer;
pub mod unet;
pub mod vae;
pub mod weights;
pub mod word_pieces;
pub mod yolos;

pub use hub::Source;
pub use pipeline::Pipeline;
pub use weights::Weights;
