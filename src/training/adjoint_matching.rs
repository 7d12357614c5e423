//! Adjoint Matching (Domingo-Enrich et al. 2024, arXiv 2409.08861): the reward's gradient is taken back along the chain through the base
//! model, and the adapted steps are drawn towards what it says, each by itself.
//!
//! ```text
//! sample        x_T .. x_0 with the adapters, guided, with noise
//! a_0 = λ d loss / d x_0                         for a reward that is maximised -λ d reward / d x_0
//! a_t = (d μ_base / d x_t)ᵀ a_{t-1}              lean adjoints: no adapters, no guidance, each at the x_t that was sampled
//! loss = mean over images and some steps of | (μ_θ(x_t) - μ_base(x_t)) / σ + σ a_t |²       without guidance, summed over elements
//! ```
//!
//! The fixed point has a meaning: where the chain's noise lets it forget x_T (eta = 1), and up to the length of its steps, it is the base
//! model's distribution times exp(λ reward). Memory is that of one UNet evaluation, however long the chain.

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};

use super::Plan;
use super::checkpoint::Checkpoint;
use super::loss_scale::LossScale;
use super::method::{ImageResult, Setup, StepResult};
use super::rwr::percentile;
use super::step::{Critic, Tally, credit, differentiate, sample, scaled, update};
use super::terms::{KeptStep, StepTerm};
use crate::config::{AdjointMatchingConfig, Prompt};
use crate::diffusion::noise::below;
use crate::diffusion::{DdimStep, Stream};
use crate::lora::Adapters;
use crate::nn::lora::LoraGradients;
use crate::ops::{Ledger, Number, Readings};
use crate::report::names;
use crate::rewards::ImageScores;
use crate::sampling::{Denoiser, Trajectory};

/// Half of the steps of the loss are among this share of the chain, from the noisiest on; the other half behind it. As in the paper's code.
const EARLY: f64 = 0.6;

/// One optimizer step. `state` becomes the next one, or stays as it is where this fails; `tick` is told after each micro-batch how
/// many are done.
///
/// # Errors
/// A number that is not finite, a factor that no gradient reached, a first update that moves nothing.
pub fn step(
    setup: &Setup,
    matching: &AdjointMatchingConfig,
    state: &mut Checkpoint,
    lr: f64,
    tick: impl Fn(usize),
) -> Result<StepResult> {
    let Setup { config, plan, sampler, .. } = setup;
    let (step, size, mut next) = (state.step as u64, plan.batch_size as u64, state.clone());
    let (mut tally, mut noted) = (Tally::new(&state.adapters), Vec::new());
    let chosen = chosen_steps(setup, matching, step);
    for number in 1..=plan.gradient_accumulation_steps as u64 {
        let samples = (number - 1) * size..number * size;
        let prompts: Vec<Prompt> = samples.clone().map(|sample| setup.prompt(step, sample).clone()).collect();
        let conditioning = sampler.conditioning(&prompts, &mut tally.ledger)?;
        let guided = sampler.denoiser(&state.adapters, conditioning, plan.checkpointing);
        let noise = sampler.training_noise(&setup.noise, step, samples);
        let keep: Vec<bool> = (0..sampler.schedule.len()).map(|i| chosen.contains(&i)).collect();
        let chain = Plan::with_mask(&sampler.schedule, &keep, prompts.len());
        let (x_t, of_step) = (noise.initial_latents()?, |i| noise.of_step(i));
        let mut trajectory = sample(&guided, &chain, x_t, of_step, 0, &mut tally.ledger)?;
        let unguided = guided.unguided();
        let back = |tally: &mut Tally| -> Result<_> {
            let critic =
                Critic { vae: &sampler.pipeline.vae, rewards: setup.rewards, checkpointing: plan.checkpointing };
            let credit = credit(&critic, trajectory.latents(), &prompts, matching.lambda, tally)?;
            let adjoints = lean_adjoints(&unguided, &chain.steps, &trajectory, credit.d_latents, &chosen, tally)?;
            let mut term = MatchingTerm {
                scale: config.optimizer.loss_coeff / (plan.global_batch() * chosen.len()) as f64,
                below: state.matching.map(|threshold| threshold.value),
                targets: adjoints,
                losses: Vec::new(),
            };
            differentiate(&unguided, &chain, &mut trajectory, None, &mut [&mut term], tally)?;
            Ok((credit.scores, term.losses))
        };
        let ((scores, losses), readings) = scaled(&mut next.loss_scale, &state.adapters, &mut tally, back)?;
        noted.push(Noted { scores, losses, readings });
        tick(number as usize);
    }
    let update = update(&mut tally, &state.adapters, &state.optimizer, config.optimizer.max_grad_norm, lr)?;
    let readings = tally.ledger.read()?;
    let grad_norm = readings.get(update.grad_norm);
    setup.accept(&mut next, update, grad_norm)?;

    let of_batch = |noted: &Noted| -> Vec<f64> {
        let readings = noted.readings.as_ref().unwrap_or(&readings);
        noted.losses.iter().map(|loss| readings.get(loss.value)).collect()
    };
    let losses: Vec<f64> = noted.iter().flat_map(of_batch).collect();
    let roots: Vec<f64> = losses.iter().map(|loss| loss.sqrt()).collect();
    let counts = |root: f64| state.matching.is_none_or(|threshold| root < threshold.value);
    let kept: Vec<f64> = losses.iter().zip(&roots).filter(|(_, root)| counts(**root)).map(|(loss, _)| *loss).collect();
    if matching.quantile < 1.0 {
        next.matching = Some(Threshold::after(state.matching, percentile(&roots, 100.0 * matching.quantile)));
    }
    next.loss_scale.iter_mut().for_each(LossScale::grow);
    next.step += 1;
    *state = next;
    let of_images = |noted: &Noted| -> Vec<ImageResult> {
        let readings = noted.readings.as_ref().unwrap_or(&readings);
        let of = |scores: &ImageScores| ImageResult {
            scores: scores.get(readings),
            loss: scores.loss(setup.rewards, readings),
            distance: None,
            sharpness: None,
        };
        noted.scores.iter().map(of).collect()
    };
    let more = vec![
        (names::MATCHING_LOSS, kept.iter().sum::<f64>() / losses.len() as f64),
        (names::MATCHING_KEPT, kept.len() as f64 / losses.len() as f64),
    ];
    Ok(StepResult {
        images: noted.iter().flat_map(of_images).collect(),
        grad_norm,
        kept_steps: chosen.len() as f64,
        more,
    })
}

struct Noted {
    scores: Vec<ImageScores>,
    losses: Vec<MatchingLoss>,
    /// Of a ledger of its own.
    readings: Option<Readings>,
}

/// The steps of the loss, drawn once for the whole batch: half of them early, half late, of those that have noise.
fn chosen_steps(setup: &Setup, matching: &AdjointMatchingConfig, step: u64) -> Vec<usize> {
    let steps = setup.sampler.schedule.steps();
    let middle = (EARLY * steps.len() as f64).round() as usize;
    let mut rng = setup.noise.generator(Stream::Truncation, step, u64::MAX);
    let mut draw = |range: std::ops::Range<usize>, count: usize| {
        let mut left: Vec<usize> = range.filter(|i| steps[*i].noise > 0.0).collect();
        let count = count.min(left.len());
        (0..count).map(|_| left.swap_remove(below(&mut rng, left.len()))).collect::<Vec<_>>()
    };
    let mut chosen = draw(0..middle, matching.steps / 2);
    chosen.extend(draw(middle..steps.len(), matching.steps - matching.steps / 2));
    chosen.sort_unstable();
    chosen
}

/// From which root of a loss on a step of an image is left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threshold {
    /// Optimizer steps that it is made of.
    pub steps: f64,
    /// A moving average of a quantile of the roots.
    pub value: f64,
}

impl Threshold {
    /// With the quantile of one more step. As the paper's code averages: the first two plainly, then with a decay of 0.9. There a batch's own
    /// quantile counts for it already; here its successors' alone, so that a batch may come in several parts.
    fn after(before: Option<Self>, quantile: f64) -> Self {
        let Self { steps, value } = before.unwrap_or(Self { steps: 0.0, value: 0.0 });
        let new = match steps {
            0.0 => 1.0,
            1.0 => 0.5,
            _ => 0.1,
        };
        Self { steps: steps + 1.0, value: (1.0 - new) * value + new * quantile }
    }
}

/// What a step of the loss is matched with.
pub struct Target {
    /// The denoising step.
    pub index: usize,
    /// The base model's prediction, (B, C, h, w).
    pub prediction: Tensor,
    /// a_t, (B, C, h, w).
    pub adjoint: Tensor,
}

/// The lean adjoints at the steps `wanted`, and the base model's predictions there, from `d_latents`, which is a_0 times the tally's loss
/// scale, (B, C, h, w). The denoiser is without guidance; its adapters are left aside.
///
/// # Errors
/// A gradient that is not finite, here or when the ledger is read: names the step.
pub fn lean_adjoints(
    denoiser: &Denoiser,
    steps: &[DdimStep],
    trajectory: &Trajectory,
    d_latents: Tensor,
    wanted: &[usize],
    tally: &mut Tally,
) -> Result<Vec<Target>> {
    let none = Adapters::default();
    let (base, mut gradients) = (denoiser.with_adapters(&none), LoraGradients::new(&none));
    let (mut d_x, mut targets) = (d_latents, Vec::new());
    let first = wanted.iter().copied().min().unwrap_or(steps.len());
    for i in (first..steps.len()).rev() {
        let (step, timestep) = (&steps[i], steps[i].timestep);
        let recording = base.record(trajectory.input(i), timestep)?;
        let prediction = recording.prediction().clone();
        let d_unet = recording
            .pull(&(&d_x * step.model_output)?, &mut gradients)
            .with_context(|| format!("in the lean adjoint of denoising step {i}"))?;
        d_x = ((d_x * step.sample)? + d_unet)?;
        tally.ledger.finite(&d_x, move |_| {
            format!("the lean adjoint of denoising step {i} (timestep {timestep}) is not finite")
        })?;
        if wanted.contains(&i) {
            targets.push(Target { index: i, prediction, adjoint: (&d_x * (1.0 / tally.loss_scale))? });
        }
    }
    Ok(targets)
}

/// The loss of steps that every image of the batch keeps, without guidance:
///
/// ```text
/// term = scale · sum over images, where its root is below the threshold, of | d |²        d = c_out (ε_θ - ε_base) / σ + σ a_t
/// d term / d ε_θ = 2 scale c_out / σ · d
/// ```
///
/// c_out (ε_θ - ε_base) is μ_θ - μ_base without the rounding of the means.
pub struct MatchingTerm {
    pub scale: f64,
    /// The threshold; `None` keeps all.
    pub below: Option<f64>,
    pub targets: Vec<Target>,
    /// As far as the backward pass has come.
    pub losses: Vec<MatchingLoss>,
}

/// | d |² of a step of an image, whether or not it counts.
pub struct MatchingLoss {
    /// The denoising step.
    pub index: usize,
    /// The image's row in the batch.
    pub row: usize,
    pub value: Number,
}

impl StepTerm for MatchingTerm {
    fn cotangent(&mut self, at: &KeptStep, ledger: &mut Ledger) -> Result<Tensor> {
        let target = self.targets.iter().find(|target| target.index == at.index);
        let Target { prediction, adjoint, .. } = target.context("a step without a target")?;
        let (wide, weight) = (|x: &Tensor| x.to_dtype(DType::F64), at.step.model_output / at.step.noise);
        let apart = ((wide(at.prediction)? - wide(prediction)?)? * weight)?;
        let difference = (apart + (wide(adjoint)? * at.step.noise)?)?;
        let squares = difference.sqr()?.flatten_from(1)?.sum(1)?;
        for (row, value) in ledger.numbers(&squares)?.into_iter().enumerate() {
            self.losses.push(MatchingLoss { index: at.index, row, value });
        }
        let mut factors = squares.ones_like()?;
        if let Some(below) = self.below {
            factors = squares.sqrt()?.lt(below)?.to_dtype(DType::F64)?;
        }
        let factors = (factors * (2.0 * self.scale * weight))?.reshape((at.rows.len(), 1, 1, 1))?;
        Ok(difference.broadcast_mul(&factors)?.to_dtype(at.prediction.dtype())?)
    }
}
