//! The models, loaded from the files that people have: Stable Diffusion pipelines and CLIP towers.

pub mod clip;
pub mod hub;
pub mod merge;
mod model_index;
mod numbers;
mod parameters;
pub mod pipeline;
mod prompt_embeds;
mod single_file;
mod staged;
pub mod text_encoder;
pub mod tokenizer;
pub mod unet;
pub mod vae;
pub mod weights;

pub use hub::Source;
pub use pipeline::Pipeline;
pub use prompt_embeds::{PromptEmbeds, SizeConditioning};
pub use weights::Weights;
