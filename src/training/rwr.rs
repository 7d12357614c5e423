//! Reward-weighted regression (RWR and RWR-sparse in Black et al. 2023, arXiv 2305.13301, section 4.2): the model is trained on its own
//! images as on any data, the better ones with more weight. A step of the run is a round:
//!
//! ```text
//! sample N images, score them; w = N softmax(r / temperature), or the best images of each prompt alone, all with w = 1
//! for each inner epoch, for each share of the images, shuffled:
//!     loss = mean over its images of w (guided prediction at x_t - noise)²      x_t: x_0 noised to a random timestep
//!     clip the gradient, AdamW
//! ```
//!
//! As in the official code the optimizer begins anew in each round, and guidance is trained, with gradient through both branches. There
//! x_0 is what the VAE encodes of the finished image; here it is what the chain gave, without the encoder's noise.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{Device, Tensor};

use super::Plan;
use super::checkpoint::Checkpoint;
use super::loss_scale::LossScale;
use super::method::{ImageResult, Setup, StepResult};
use super::round::{Groups, Pass, Round, Updates, take};
use super::step::{Tally, differentiate, scaled};
use super::terms::{KlTerm, RegressionTerm, StepTerm};
use crate::config::{Regression, Selection};
use crate::diffusion::{DdimStep, Stream, place};
use crate::ops::device::upload;
use crate::ops::{Ledger, Readings};
use crate::optim::AdamW;
use crate::report::names;
use crate::sampling::Trajectory;

/// One round. `state` becomes the next one, or stays as it is where this fails; `tick` is told after each micro-batch how many are
/// done.
///
/// # Errors
/// A number that is not finite, a factor that no gradient reached, a first update that moves nothing.
pub fn step(
    setup: &Setup,
    regression: &Regression,
    state: &mut Checkpoint,
    lr: f64,
    tick: impl Fn(usize),
) -> Result<StepResult> {
    let mut next = state.clone();
    next.optimizer = AdamW::new(&setup.config.optimizer, &next.adapters.tensors())?;
    let size = match regression.selection {
        Selection::Best { group_size, .. } => group_size,
        Selection::Weighted { .. } => 1,
    };
    let (groups, mut images) = (Groups { size, shared_noise: false }, Vec::new());
    let note = |_: &Trajectory, _: &mut Ledger| Ok(());
    let keep = |trajectory: Trajectory, (), _: &Readings| {
        images.push(trajectory.latents().to_device(&Device::Cpu)?);
        Ok(())
    };
    let steps = setup.sampler.schedule.steps();
    let round = Round::sample(setup, state, steps, groups, note, keep, &tick)?;
    let images = Tensor::cat(&images, 0)?;
    let weights = of_selection(&regression.selection, &round);
    let kept: Vec<usize> = (0..weights.len()).filter(|image| weights[*image] > 0.0).collect();

    let Regression { updates, inner_epochs, .. } = *regression;
    let updates = Updates { setup, step: state.step, lr, updates, inner_epochs };
    let learning = Learning { setup, step: state.step as u64, round: &round, images: &images, weights: &weights };
    let (mut losses, mut divergences) = (Vec::new(), vec![Vec::new(); weights.len()]);
    let back =
        |pass: &Pass, loss_scale: &mut Option<LossScale>, tally: &mut Tally| learning.back(pass, loss_scale, tally);
    let seen = |noted: Noted, readings: &Readings| {
        let readings = noted.readings.as_ref().unwrap_or(readings);
        let of_rows = noted.regression.losses(readings).into_iter().zip(&noted.rows);
        losses.extend(of_rows.map(|((_, loss), row)| weights[*row] * loss));
        let found = noted.kl.iter().flat_map(|kl| kl.distances(readings));
        noted.rows.iter().zip(found).for_each(|(row, divergence)| divergences[*row].push(divergence));
    };
    let grad_norm = updates.learn(&mut next, &kept, back, seen, &tick)?;
    next.step += 1;
    *state = next;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let more = vec![
        (names::REGRESSION_LOSS, mean(&losses)),
        (names::REGRESSION_KEPT, kept.len() as f64 / weights.len() as f64),
    ];
    let kl_weight = setup.config.regularization.kl_weight;
    let of = |(scores, divergences): (Vec<f64>, &Vec<f64>)| {
        let distance = (kl_weight > 0.0).then(|| mean(divergences));
        ImageResult {
            loss: setup.rewards.loss(&scores) + kl_weight * distance.unwrap_or(0.0),
            scores,
            distance,
            sharpness: None,
        }
    };
    let images = round.scores.into_iter().zip(&divergences).map(of).collect();
    Ok(StepResult { images, grad_norm, kept_steps: 1.0, more })
}

fn of_selection(selection: &Selection, Round { prompts, rewards, .. }: &Round) -> Vec<f64> {
    match selection {
        Selection::Weighted { inverse_temperature, per_prompt: false } => weights(rewards, &[()], *inverse_temperature),
        Selection::Weighted { inverse_temperature, per_prompt: true } => {
            let prompts: Vec<&str> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
            weights(rewards, &prompts, *inverse_temperature)
        }
        Selection::Best { group_size, percentile } => {
            let of_group = |rewards: &[f64]| best(rewards, *percentile);
            rewards.chunks(*group_size).flat_map(of_group).map(|kept| f64::from(u8::from(kept))).collect()
        }
    }
}

/// softmax(inverse temperature · r) within the rewards of equal keys, times their number: 1 in the mean. One key alone is that of all.
pub fn weights<K: Ord>(rewards: &[f64], keys: &[K], inverse_temperature: f64) -> Vec<f64> {
    let key = |image: usize| keys.get(if keys.len() == 1 { 0 } else { image });
    let mut groups: BTreeMap<Option<&K>, Vec<usize>> = BTreeMap::new();
    (0..rewards.len()).for_each(|image| groups.entry(key(image)).or_default().push(image));
    let mut weights = vec![0.0; rewards.len()];
    for images in groups.values() {
        let largest = images.iter().map(|image| rewards[*image]).fold(f64::NEG_INFINITY, f64::max);
        let exp = |image: &usize| (inverse_temperature * (rewards[*image] - largest)).exp();
        let sum: f64 = images.iter().map(exp).sum();
        images.iter().for_each(|image| weights[*image] = exp(image) / sum * images.len() as f64);
    }
    weights
}

/// Which rewards are at least the percentile (0 to 100) of all of them.
pub fn best(rewards: &[f64], percentile: f64) -> Vec<bool> {
    let threshold = self::percentile(rewards, percentile);
    rewards.iter().map(|reward| *reward >= threshold).collect()
}

/// As numpy's `percentile`, which interpolates; of one value or more.
pub fn percentile(values: &[f64], percentile: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = (percentile / 100.0) * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    let share = place - place.floor();
    if share < 0.5 { low + (high - low) * share } else { high - (high - low) * (1.0 - share) }
}

/// What the updates learn from.
struct Learning<'a> {
    setup: &'a Setup<'a>,
    step: u64,
    round: &'a Round,
    /// x_0 of each image, (N, C, h, w), in the host's memory.
    images: &'a Tensor,
    weights: &'a [f64],
}

/// What the backward pass of a micro-batch notes, known when a ledger is read.
struct Noted {
    /// The round's images.
    rows: Vec<usize>,
    regression: RegressionTerm,
    kl: Option<KlTerm>,
    /// Of a ledger of its own.
    readings: Option<Readings>,
}

impl Learning<'_> {
    fn back(&self, pass: &Pass, loss_scale: &mut Option<LossScale>, tally: &mut Tally) -> Result<Option<Noted>> {
        let Self { setup, round, .. } = self;
        let (schedule, place) = (&setup.sampler.schedule, place(self.step, pass.epoch));
        let draw = |row: &usize| {
            let total = schedule.train_timesteps();
            setup.noise.below(Stream::RegressionTimestep, place, *row as u64, total)
        };
        let timesteps: Vec<usize> = pass.rows.iter().map(draw).collect();
        let noise = |row: &usize| {
            let sample = *row as u64;
            setup.noise.normal_batch(Stream::RegressionNoise, place, sample..sample + 1, setup.sampler.latent_shape)
        };
        let noise = Tensor::cat(&pass.rows.iter().map(noise).collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        let noise = upload(&noise, setup.sampler.compute().device())?;
        let (x_t, targets) = schedule.noised(&timesteps, &take(setup, self.images, pass.rows)?, &noise)?;
        let denoiser = round.denoiser(setup, pass.rows, pass.adapters, &mut tally.ledger)?;
        let plan = one_step_each(&timesteps);
        let mut trajectory = Trajectory::of_latents(vec![x_t; timesteps.len() + 1]);

        let (loss_coeff, kl_weight) = (setup.config.optimizer.loss_coeff, setup.config.regularization.kl_weight);
        let scale = loss_coeff / pass.share as f64;
        let back = |tally: &mut Tally| -> Result<_> {
            let factors = pass.rows.iter().map(|row| scale * self.weights[*row]).collect();
            let mut regression = RegressionTerm::new(factors, targets.clone());
            let mut kl = (kl_weight > 0.0).then(|| KlTerm::new(scale * kl_weight, &plan));
            let mut terms: Vec<&mut dyn StepTerm> = vec![&mut regression];
            terms.extend(kl.as_mut().map(|term| term as &mut dyn StepTerm));
            differentiate(&denoiser, &plan, &mut trajectory, None, &mut terms, tally)?;
            Ok((regression, kl))
        };
        let ((regression, kl), readings) = scaled(loss_scale, pass.adapters, tally, back)?;
        Ok(Some(Noted { rows: pass.rows.to_vec(), regression, kl, readings }))
    }
}

/// A plan in which step i is that of image i alone, at a timestep of its own.
pub fn one_step_each(timesteps: &[usize]) -> Plan {
    let step = |timestep: &usize| DdimStep { timestep: *timestep as f64, sample: 1.0, model_output: 0.0, noise: 0.0 };
    let own = |i: usize| (0..timesteps.len()).map(|image| image == i).collect();
    Plan {
        steps: timesteps.iter().map(step).collect(),
        keep: (0..timesteps.len()).map(own).collect(),
        detach_input: false,
        renoise: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_one_in_the_mean_of_their_group() {
        let rewards = [1.0, 3.0, 2.0, 2.0];
        let all = weights(&rewards, &[()], 0.5);
        let sum: f64 = rewards.iter().map(|r| (0.5 * r).exp()).sum();
        for (weight, reward) in all.iter().zip(rewards) {
            assert!((weight - 4.0 * (0.5 * reward).exp() / sum).abs() < 1e-12);
        }
        let of_groups = weights(&rewards, &["a", "a", "b", "b"], 0.5);
        let e = 1f64.exp();
        for (weight, expected) in of_groups.iter().zip([2.0 / (1.0 + e), 2.0 * e / (1.0 + e), 1.0, 1.0]) {
            assert!((weight - expected).abs() < 1e-12, "{of_groups:?}");
        }
        // large rewards do not overflow
        assert_eq!(weights(&[1e5, 1e5], &[()], 1.0), [1.0, 1.0]);
    }

    #[test]
    fn percentiles_are_numpys() {
        let values = [4.0, 1.0, 3.0, 2.0];
        for (percentile, expected) in [(0.0, 1.0), (50.0, 2.5), (90.0, 3.7), (100.0, 4.0)] {
            assert!((self::percentile(&values, percentile) - expected).abs() < 1e-12);
        }
        assert_eq!(best(&values, 50.0), [true, false, true, false]);
        assert_eq!(best(&[1.5; 4], 90.0), [true; 4]);
        assert_eq!(best(&[0.25], 90.0), [true]);
    }
}
