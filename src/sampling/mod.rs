//! Images of prompts: the UNet with its adapters and prompts, the denoising chain, and a pipeline that is ready to draw.

mod conditioning;
mod denoiser;
mod noise;
mod sampler;
mod solve;
mod trajectory;

pub use conditioning::Conditioning;
pub use denoiser::{Denoiser, Recording};
pub use noise::ChainNoise;
pub use sampler::{Drawn, Sampler};
pub use trajectory::Trajectory;
