//! How far the adapted model's noise predictions are from the base model's, and the pull back.
//!
//! The KL divergence of two Gaussians with one variance is proportional to the squared distance of their means, so
//! with ε the guided noise predictions of a DDIM step at the same x_t
//!
//! ```text
//! D_i = mean over the elements of (ε_θ(x_i) - ε_base(x_i))²
//! loss of an image += kl_weight · mean of D_i over its kept steps
//! d D_i / d ε_θ = 2 (ε_θ - ε_base) / elements
//! ```
//!
//! As in DRaFT+ (NVIDIA NeMo-Aligner), ε_base is a constant: no gradient goes through it into x_i. In a model that
//! predicts v or x_0, the distance is that of these predictions.

use anyhow::Result;
use candle_core::Tensor;

use super::rollout::{Prompting, Trajectory};
use super::truncation::Plan;
use crate::diffusion::DdimStep;
use crate::lora::Adapters;
use crate::models::unet::Unet;

/// The KL term of one backward pass.
pub struct Anchor {
    /// Factor of each image's mean distance in the loss that is differentiated.
    pub scale: f64,
    /// The mean distance of each image over its kept steps, as far as the backward pass has come.
    pub distances: Vec<f64>,
}

impl Anchor {
    pub fn new(scale: f64, images: usize) -> Self {
        Self { scale, distances: vec![0.0; images] }
    }

    /// d (scale · distance) / d prediction of step `i`, (B, C, h, w), zero for the images that do not keep the step.
    pub(super) fn cotangent(
        &mut self,
        unet: &Unet,
        trajectory: &Trajectory,
        plan: &Plan,
        i: usize,
        prompting: &Prompting,
    ) -> Result<Tensor> {
        let (difference, distances) = difference(unet, &plan.steps[i], trajectory, i, prompting)?;
        let elements = difference.elem_count() / distances.len();
        let mut factors = Vec::with_capacity(distances.len());
        for (row, distance) in distances.into_iter().enumerate() {
            let kept = plan.keep.iter().filter(|kept| kept[row]).count();
            let share = if plan.keep[i][row] { 1.0 / kept as f64 } else { 0.0 };
            self.distances[row] += share * distance;
            factors.push((2.0 * self.scale * share / elements as f64) as f32);
        }
        let images = factors.len();
        let factors = Tensor::from_vec(factors, (images, 1, 1, 1), difference.device())?;
        Ok(difference.broadcast_mul(&factors)?)
    }
}

/// ε_θ - ε_base at step `i`, and its mean square for each image.
fn difference(
    unet: &Unet,
    step: &DdimStep,
    trajectory: &Trajectory,
    i: usize,
    prompting: &Prompting,
) -> Result<(Tensor, Vec<f64>)> {
    let base = prompting.predict(unet, &trajectory.inputs[i], step.timestep, &Adapters::default())?;
    let difference = (&trajectory.predictions[i] - base)?;
    let rows: Vec<Vec<f32>> = difference.flatten_from(1)?.to_vec2()?;
    let mean_square = |row: &Vec<f32>| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / row.len() as f64;
    let distances = rows.iter().map(mean_square).collect();
    Ok((difference, distances))
}

/// The mean distance of each image over all steps of a trajectory. It costs one more evaluation of every step.
pub fn distances(unet: &Unet, steps: &[DdimStep], trajectory: &Trajectory, prompting: &Prompting) -> Result<Vec<f64>> {
    let mut sums = vec![0.0; trajectory.latents.dims4()?.0];
    for (i, step) in steps.iter().enumerate() {
        let (_, distances) = difference(unet, step, trajectory, i, prompting)?;
        sums.iter_mut().zip(distances).for_each(|(sum, distance)| *sum += distance / steps.len() as f64);
    }
    Ok(sums)
}
