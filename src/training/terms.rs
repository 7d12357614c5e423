//! Parts of the loss that are functions of one denoising step's prediction.

use anyhow::Result;
use candle_core::{DType, Tensor};

use super::Plan;
use crate::diffusion::DdimStep;
use crate::lora::Adapters;
use crate::ops::{Ledger, Number, Readings};
use crate::sampling::{Denoiser, Trajectory};

/// One denoising step as a term sees it: the samples of the batch that keep its gradient.
pub struct KeptStep<'a> {
    /// Its place in the chain.
    pub index: usize,
    pub step: &'a DdimStep,
    /// The rows of the batch that keep it, B' of them, in order.
    pub rows: &'a [usize],
    /// For these rows.
    pub denoiser: &'a Denoiser<'a>,
    /// x_t, (B', C, h, w).
    pub input: &'a Tensor,
    /// x_{t-1} as it was sampled, (B', C, h, w).
    pub output: &'a Tensor,
    /// The guided prediction that is differentiated, (B', C, h, w).
    pub prediction: &'a Tensor,
}

/// A part of the loss that is a function of each kept step's prediction.
pub trait StepTerm {
    /// d term / d prediction, (B', C, h, w).
    ///
    /// # Errors
    /// The term's own.
    fn cotangent(&mut self, at: &KeptStep, ledger: &mut Ledger) -> Result<Tensor>;
}

/// The KL term of DRaFT+: how far the adapted model's predictions are from the base model's.
///
/// The KL divergence of two Gaussians with one variance is proportional to the squared distance of their means, so with ε
/// the guided predictions of a DDIM step at the same x_t
///
/// ```text
/// D_i = mean over the elements of (ε_θ(x_i) - ε_base(x_i))²
/// term of an image = scale · mean of D_i over its kept steps
/// d D_i / d ε_θ = 2 (ε_θ - ε_base) / elements
/// ```
///
/// As in NVIDIA NeMo-Aligner's DRaFT+, ε_base is a constant: no gradient goes through it into x_i. In a model that predicts
/// v or x_0, the distance is that of these predictions.
///
/// [`Self::of_densities`] is the divergence itself, where the steps have noise (Flow-GRPO), as a mean over the elements:
///
/// ```text
/// D_i = mean over the elements of (μ_θ(x_i) - μ_base(x_i))² / 2 σ_i² = c_out² / 2 σ_i² · mean of (ε_θ - ε_base)²
/// ```
pub struct KlTerm {
    scale: f64,
    of_densities: bool,
    /// How many steps each image keeps.
    kept: Vec<usize>,
    /// Each image's distance at each of its kept steps, as far as the backward pass has come.
    distances: Vec<Vec<Distance>>,
}

impl KlTerm {
    /// `scale` is the factor of each image's mean distance in the loss.
    pub fn new(scale: f64, plan: &Plan) -> Self {
        let kept = plan.kept_by_sample();
        Self { scale, of_densities: false, distances: vec![Vec::new(); kept.len()], kept }
    }

    /// The same of the densities of steps with noise.
    pub fn of_densities(scale: f64, plan: &Plan) -> Self {
        Self { of_densities: true, ..Self::new(scale, plan) }
    }

    /// The mean distance of each image over its kept steps; 0 for an image that keeps none.
    pub fn distances(&self, readings: &Readings) -> Vec<f64> {
        let mean = |(distances, kept): (&Vec<Distance>, &usize)| {
            let share = 1.0 / *kept as f64;
            distances.iter().fold(0.0, |sum, distance| sum + share * distance.get(readings))
        };
        self.distances.iter().zip(&self.kept).map(mean).collect()
    }
}

impl StepTerm for KlTerm {
    fn cotangent(&mut self, at: &KeptStep, ledger: &mut Ledger) -> Result<Tensor> {
        let difference = from_base(at.denoiser, at.input, at.step.timestep, at.prediction)?;
        let elements = difference.elem_count() / at.rows.len();
        let weight = if self.of_densities { (at.step.model_output / at.step.noise).powi(2) / 2.0 } else { 1.0 };
        let mut factors = Vec::with_capacity(at.rows.len());
        for (row, distance) in at.rows.iter().zip(Distance::of(&difference, ledger)?) {
            let share = 1.0 / self.kept[*row] as f64;
            self.distances[*row].push(Distance { weight, ..distance });
            factors.push((2.0 * self.scale * weight * share / elements as f64) as f32);
        }
        let factors = Tensor::from_vec(factors, (at.rows.len(), 1, 1, 1), difference.device())?;
        Ok(difference.broadcast_mul(&factors)?)
    }
}

/// DDPO's objective (Black et al. 2023, section 4.3) with PPO's clip, of steps whose densities were noted when x_{t-1} was sampled:
///
/// ```text
/// ratio = exp(log p_θ(x_{t-1} | x_t) - log p_old)            log p: a mean over the elements, `DdimStep::log_prob`
/// term of an image = scale · sum over its kept steps of max(-A ratio, -A clamp(ratio, 1 - c, 1 + c))
/// d term / d out = -scale A ratio z c_out / (σ elements),    z = (x_{t-1} - μ) / σ; 0 where the clamp cuts it
/// ```
pub struct ClippedObjective<'a> {
    pub scale: f64,
    /// c
    pub clip_range: f64,
    /// A of each image of the batch.
    pub advantages: &'a [f64],
    /// log p_old of each denoising step and image.
    pub log_probs: &'a [Vec<f64>],
    /// Of the kept steps, as far as the backward pass has come.
    pub ratios: Vec<Ratio>,
}

/// The ratio of new to old density.
pub struct Ratio {
    /// The denoising step.
    pub index: usize,
    /// The image's row in the batch.
    pub row: usize,
    pub value: Number,
}

impl Ratio {
    /// What the objective makes of it for an advantage, and whether the clamp cuts its gradient.
    pub fn loss(ratio: f64, advantage: f64, clip_range: f64) -> (f64, bool) {
        let loss = (-advantage * ratio).max(-advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range));
        (loss, advantage.signum() * (ratio - 1.0) > clip_range)
    }
}

impl StepTerm for ClippedObjective<'_> {
    fn cotangent(&mut self, at: &KeptStep, ledger: &mut Ledger) -> Result<Tensor> {
        let z = at.step.noise_of(at.input, at.prediction, at.output)?;
        let (rows, elements) = (at.rows.len(), z.elem_count() / at.rows.len());
        let of_rows = |value: &dyn Fn(usize) -> f64| {
            let values: Vec<f64> = at.rows.iter().map(|row| value(*row)).collect();
            Tensor::from_vec(values, rows, z.device())
        };
        let old = of_rows(&|row| self.log_probs[at.index][row])?;
        let ratio = (at.step.log_prob(&z)? - old)?.exp()?;
        for (row, value) in at.rows.iter().zip(ledger.numbers(&ratio)?) {
            self.ratios.push(Ratio { index: at.index, row: *row, value });
        }
        // as `Ratio::loss` has it
        let counts = ((&ratio - 1.0)? * of_rows(&|row| self.advantages[row].signum())?)?.le(self.clip_range)?;
        let scale = -self.scale * at.step.model_output / (at.step.noise * elements as f64);
        let factor = (ratio * of_rows(&|row| scale * self.advantages[row])?)?.mul(&counts.to_dtype(DType::F64)?)?;
        Ok(z.broadcast_mul(&factor.reshape((rows, 1, 1, 1))?)?.to_dtype(at.prediction.dtype())?)
    }
}

/// Regression of each kept step's prediction on a target, for plans in which each image keeps one step:
///
/// ```text
/// term of an image = factor · mean over the elements of (prediction - target)²
/// d term / d prediction = 2 factor (prediction - target) / elements
/// ```
pub struct RegressionTerm {
    factors: Vec<f64>,
    targets: Tensor,
    /// Of the images, as far as the backward pass has come.
    distances: Vec<(usize, Distance)>,
}

impl RegressionTerm {
    /// A factor for each image of the batch, and targets (B, C, h, w).
    pub fn new(factors: Vec<f64>, targets: Tensor) -> Self {
        Self { factors, targets, distances: Vec::new() }
    }

    /// The images' rows with their mean squares, without the factors, in the order of the rows.
    pub fn losses(&self, readings: &Readings) -> Vec<(usize, f64)> {
        let mut losses: Vec<_> = self.distances.iter().map(|(row, distance)| (*row, distance.get(readings))).collect();
        losses.sort_by_key(|(row, _)| *row);
        losses
    }
}

impl StepTerm for RegressionTerm {
    fn cotangent(&mut self, at: &KeptStep, ledger: &mut Ledger) -> Result<Tensor> {
        let rows: Vec<u32> = at.rows.iter().map(|row| *row as u32).collect();
        let targets = self.targets.index_select(&Tensor::new(rows, self.targets.device())?, 0)?;
        let difference = (at.prediction - targets)?;
        let elements = (difference.elem_count() / at.rows.len()) as f64;
        self.distances.extend(at.rows.iter().copied().zip(Distance::of(&difference, ledger)?));
        let factors: Vec<f32> = at.rows.iter().map(|row| (2.0 * self.factors[*row] / elements) as f32).collect();
        let factors = Tensor::from_vec(factors, (at.rows.len(), 1, 1, 1), difference.device())?;
        Ok(difference.broadcast_mul(&factors)?)
    }
}

/// The mean squared distance of each image's predictions from the base model's, over all steps of a chain. Evaluates the
/// base model at every step, and waits for a GPU at the end.
pub fn distances_from_base(denoiser: &Denoiser, steps: &[DdimStep], trajectory: &Trajectory) -> Result<Vec<f64>> {
    let distances = |ledger: &mut Ledger| -> Result<Vec<_>> {
        let of_step = |(i, step): (usize, &DdimStep)| {
            let difference = from_base(denoiser, trajectory.input(i), step.timestep, trajectory.prediction(i))?;
            Distance::of(&difference, ledger)
        };
        steps.iter().enumerate().map(of_step).collect()
    };
    let (distances, readings) = Ledger::around(distances)?;
    let mut sums = vec![0.0; trajectory.latents().dims4()?.0];
    for distance in distances {
        let values = distance.into_iter().map(|distance| distance.get(&readings) / steps.len() as f64);
        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
    Ok(sums)
}

/// ε_θ - ε_base at x_t, (B, C, h, w).
fn from_base(denoiser: &Denoiser, x_t: &Tensor, timestep: f64, prediction: &Tensor) -> Result<Tensor> {
    let base = Adapters::default();
    Ok((prediction - denoiser.with_adapters(&base).predict(x_t, timestep)?)?)
}

/// A mean of squares, once its ledger is read.
#[derive(Clone, Copy)]
struct Distance {
    squares: Number,
    elements: usize,
    /// A factor.
    weight: f64,
}

impl Distance {
    /// Of each image of a difference (B, C, h, w).
    fn of(difference: &Tensor, ledger: &mut Ledger) -> Result<Vec<Self>> {
        let squares = difference.flatten_from(1)?.to_dtype(DType::F64)?.sqr()?;
        let (images, elements) = squares.dims2()?;
        let squares = squares.sum(1)?;
        (0..images)
            .map(|image| Ok(Self { squares: ledger.number(&squares.get(image)?)?, elements, weight: 1.0 }))
            .collect()
    }

    fn get(self, readings: &Readings) -> f64 {
        self.weight * readings.get(self.squares) / self.elements as f64
    }
}
