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
use candle_core::{DType, Tensor};

use super::rollout::{Prompting, Trajectory};
use super::truncation::Plan;
use crate::diffusion::DdimStep;
use crate::lora::Adapters;
use crate::models::unet::Unet;
use crate::ops::{Ledger, Number, Readings};

/// The KL term of one backward pass.
pub struct Anchor {
    /// Factor of each image's mean distance in the loss that is differentiated.
    pub scale: f64,
    /// For each image: of each kept step, as far as the backward pass has come, its share in the mean and its distance.
    terms: Vec<Vec<(f64, Distance)>>,
}

/// A mean of squares, once its ledger is read.
#[derive(Clone, Copy)]
struct Distance {
    squares: Number,
    elements: usize,
}

impl Distance {
    fn get(self, readings: &Readings) -> f64 {
        readings.get(self.squares) / self.elements as f64
    }
}

impl Anchor {
    pub fn new(scale: f64, images: usize) -> Self {
        Self { scale, terms: vec![Vec::new(); images] }
    }

    /// The mean distance of each image over its kept steps, once the ledger of the backward pass is read.
    pub fn distances(&self, readings: &Readings) -> Vec<f64> {
        let mean = |terms: &Vec<(f64, Distance)>| {
            terms.iter().fold(0.0, |sum, (share, distance)| sum + share * distance.get(readings))
        };
        self.terms.iter().map(mean).collect()
    }

    /// d (scale · distance) / d prediction of step `i`, (B, C, h, w), zero for the images that do not keep the step.
    pub(super) fn cotangent(
        &mut self,
        unet: &Unet,
        trajectory: &Trajectory,
        plan: &Plan,
        i: usize,
        prompting: &Prompting,
        ledger: &mut Ledger,
    ) -> Result<Tensor> {
        let (difference, distances) = difference(unet, &plan.steps[i], trajectory, i, prompting, ledger)?;
        let elements = difference.elem_count() / distances.len();
        let mut factors = Vec::with_capacity(distances.len());
        for (row, distance) in distances.into_iter().enumerate() {
            let kept = plan.keep.iter().filter(|kept| kept[row]).count();
            let share = if plan.keep[i][row] { 1.0 / kept as f64 } else { 0.0 };
            self.terms[row].push((share, distance));
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
    ledger: &mut Ledger,
) -> Result<(Tensor, Vec<Distance>)> {
    let base = prompting.predict(unet, &trajectory.inputs[i], step.timestep, &Adapters::default())?;
    let difference = (&trajectory.predictions[i] - base)?;
    let squares = difference.flatten_from(1)?.to_dtype(DType::F64)?.sqr()?;
    let (images, elements) = squares.dims2()?;
    let squares = squares.sum(1)?;
    let distance = |image| Ok(Distance { squares: ledger.number(&squares.get(image)?)?, elements });
    Ok((difference, (0..images).map(distance).collect::<Result<_>>()?))
}

/// The mean distance of each image over all steps of a trajectory. It costs one more evaluation of every step, and waits
/// for a GPU at the end.
pub fn distances(unet: &Unet, steps: &[DdimStep], trajectory: &Trajectory, prompting: &Prompting) -> Result<Vec<f64>> {
    let distances = |ledger: &mut Ledger| -> Result<Vec<_>> {
        let of_step = |(i, step)| Ok(difference(unet, step, trajectory, i, prompting, ledger)?.1);
        steps.iter().enumerate().map(of_step).collect()
    };
    let (distances, readings) = Ledger::around(distances)?;
    let mut sums = vec![0.0; trajectory.latents.dims4()?.0];
    for distance in distances {
        let values = distance.into_iter().map(|distance| distance.get(&readings) / steps.len() as f64);
        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
    Ok(sums)
}
