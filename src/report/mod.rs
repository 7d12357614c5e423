//! What is measured of a run and how it is shown: metrics, the best of them, what came of it in words, charts, the report's page,
//! pictures and pairs of them, TensorBoard's event files.

pub mod best;
pub mod change;
pub mod chart;
pub mod events;
pub mod html;
pub mod metrics;
pub mod pictures;
pub mod samples;
mod summary;

pub use best::{Best, best, best_to_show};
pub use change::Change;
pub use metrics::{Metrics, names};
pub use samples::{Pairs, Sample};
pub use summary::{Summary, summary};
