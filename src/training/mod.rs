//! The parts of the loop: rollout, reward, backprop, and what a run keeps on disk.

pub mod anchor;
pub mod backprop;
pub mod checkpoint;
pub mod guard;
pub mod health;
pub mod lock;
pub mod loss_scale;
pub mod memory;
pub mod rollout;
pub mod run_folder;
pub mod signals;
pub mod truncation;

pub use anchor::Anchor;
pub use backprop::{Credit, anchored_backprop, backprop, reward_cotangent};
pub use rollout::{Prompting, Trajectory, recorded_rollout, rollout};
pub use truncation::Plan;
