//! The sampler as pure functions: schedule, guidance, noise.

pub mod ddim;
pub mod guidance;
pub mod noise;
mod scheduler;

pub use ddim::{DdimSchedule, DdimStep, SchedulerConfig};
pub use noise::{Noise, Stream, place};
