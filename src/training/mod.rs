//! The parts of the loop: rollout, reward, backprop, and what a run keeps on disk.

pub mod backprop;
pub mod checkpoint;
pub mod events;
pub mod rollout;
pub mod run_folder;
pub mod truncation;

pub use backprop::{Credit, backprop, reward_cotangent};
pub use rollout::{Prompting, Trajectory, rollout};
pub use truncation::Plan;
