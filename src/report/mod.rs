//! What is measured of a run and how it is shown: metrics, the best of them, charts, the report's page, pictures,
//! TensorBoard's event files.

pub mod best;
pub mod chart;
pub mod events;
pub mod html;
pub mod metrics;
pub mod pictures;

pub use best::{Best, best, best_to_show};
pub use metrics::{Metrics, names};
