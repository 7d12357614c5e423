//! The sampler as pure functions: schedule, guidance, noise.

pub mod ddim;
pub mod guidance;
pub mod noise;
mod scheduler;
pub mod solver;

pub use ddim::{DdimSchedule, DdimStep, SchedulerConfig};
pub use noise::{Noise, Stream, place};
pub use solver::{Solver, SolverStep};
