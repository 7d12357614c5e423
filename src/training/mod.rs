//! Training: the optimizer step and its parts, the run around it, and what it keeps on disk.

pub mod adjoint_matching;
pub mod advantages;
pub mod alignprop;
mod backprop;
pub mod checkpoint;
pub mod ddpo;
pub mod guard;
pub mod health;
mod limits;
pub mod lock;
pub mod loss_scale;
pub mod memory;
pub mod method;
pub mod plan;
mod prompts;
pub mod round;
pub mod run_folder;
pub mod rwr;
pub mod signals;
mod sources;
pub mod step;
pub mod terms;
pub mod trainer;
pub mod truncation;

pub use alignprop::AlignProp;
pub use method::{Setup, StepResult};
pub use plan::{MemoryPlan, RunPlan};
pub use prompts::PromptLists;
pub use sources::Sources;
pub use truncation::Plan;
