//! Differentiable layers over frozen weights, recorded on a tape.
//!
//! A [`Value`] is a tensor that may know the [`Tape`] it came from. A layer applied to values without a tape only
//! computes (the rollout, evaluation); applied to values of a tape it also records how the cotangent goes back. There
//! is no mode to switch: what has a gradient is what was put on the tape.

pub mod layers;
pub mod lora;
mod precision;
pub mod tape;

pub use layers::{Attention, Conv2d, FeedForward, GroupNorm, LayerNorm, Linear};
pub use lora::LoraValues;
pub use precision::computed_in;
pub use tape::{Gradients, Tape, Value};
