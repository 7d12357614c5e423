//! DDPO (Black et al. 2023, arXiv 2305.13301) and GRPO for diffusion (DanceGRPO 2505.07818, Flow-GRPO 2505.05470, MixGRPO
//! 2507.21802). Each denoising step is an action and its density N(x_{t-1}; μ_θ(x_t), σ²) the policy, so nothing but a score is
//! asked of the finished image. A step of the run is a round:
//!
//! ```text
//! sample N images, score them; A = how much better than expected each is         training/advantages.rs
//! for each inner epoch, for each share of the images, shuffled:
//!     loss = mean over its images and their steps of max(-A ratio, -A clamp(ratio, 1 ± c))     terms::ClippedObjective
//!     clip the gradient, AdamW
//! ```

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};

use super::Plan;
use super::advantages::{PromptStatistics, of_groups, of_round};
use super::checkpoint::Checkpoint;
use super::loss_scale::LossScale;
use super::method::{ImageResult, Setup, StepResult};
use super::round::{Groups, Pass, Round, Updates, shuffled, take};
use super::step::{Tally, differentiate, scaled};
use super::terms::{ClippedObjective, KlTerm, Ratio, StepTerm};
use crate::config::{Baseline, Policy};
use crate::diffusion::{DdimSchedule, DdimStep};
use crate::ops::{Ledger, Number, Readings};
use crate::report::names;
use crate::sampling::Trajectory;

/// One round. `state` becomes the next one, or stays as it is where this fails; `tick` is told after each micro-batch how many are
/// done.
///
/// # Errors
/// A number that is not finite, a factor that no gradient reached, a first update that moves nothing. No step has a density.
pub fn step(
    setup: &Setup,
    policy: &Policy,
    state: &mut Checkpoint,
    lr: f64,
    tick: impl Fn(usize),
) -> Result<StepResult> {
    let (chain, mut next) = (Chain::of(policy, &setup.sampler.schedule, state.step)?, state.clone());
    let sampled = Sampled::of(setup, policy, &chain, state, &tick)?;
    let advantages = advantages(policy, &sampled.round, &mut next.statistics);

    let Policy { updates, inner_epochs, .. } = *policy;
    let updates = Updates { setup, step: state.step, lr, updates, inner_epochs };
    let learning =
        Learning { setup, policy, chain: &chain, sampled: &sampled, advantages: &advantages, draws: &updates };
    let images: Vec<usize> = (0..advantages.len()).collect();
    let mut seen = Seen { ratios: Vec::new(), divergences: vec![Vec::new(); images.len()] };
    let back =
        |pass: &Pass, loss_scale: &mut Option<LossScale>, tally: &mut Tally| learning.back(pass, loss_scale, tally);
    let grad_norm = updates.learn(&mut next, &images, back, |noted, readings| seen.add(&noted, readings), &tick)?;
    next.step += 1;
    *state = next;
    Ok(StepResult {
        more: seen.metrics(policy.clip_range),
        images: seen.images(setup, sampled.round.scores),
        grad_norm,
        kept_steps: chain.kept_count(policy.timestep_fraction) as f64,
    })
}

/// The denoising chain of a round.
pub struct Chain {
    pub steps: Vec<DdimStep>,
    /// Those that have a density and are trained.
    pub trained: Vec<usize>,
}

impl Chain {
    /// # Errors
    /// No step is left to train.
    pub fn of(policy: &Policy, schedule: &DdimSchedule, round: usize) -> Result<Self> {
        let mut steps = schedule.steps().to_vec();
        let window = policy.window.as_ref().map_or(0..steps.len(), |window| window.at(round, steps.len()));
        let deterministic = schedule.clone().with_eta(0.0);
        for i in (0..steps.len()).filter(|i| !window.contains(i)) {
            steps[i] = deterministic.steps()[i];
        }
        let last = steps.len() - 1;
        let trained = |i: &usize| steps[*i].noise > 0.0 && !(policy.drop_last && *i == last);
        let trained: Vec<usize> = (0..steps.len()).filter(trained).collect();
        ensure!(
            !trained.is_empty(),
            "no denoising step is left to train: those without noise have no density, and method.drop_last leaves out the last; \
             raise sampler.num_inference_steps"
        );
        Ok(Self { steps, trained })
    }

    /// Steps of each image that are trained in an inner epoch.
    fn kept_count(&self, timestep_fraction: f64) -> usize {
        ((self.trained.len() as f64 * timestep_fraction) as usize).max(1)
    }
}

/// What was sampled. The chains lie in the host's memory until they are trained on.
struct Sampled {
    round: Round,
    /// x_T, .., x_0, each (N, C, h, w).
    latents: Vec<Tensor>,
    /// Of each denoising step and image; of those that are trained.
    log_probs: Vec<Vec<f64>>,
}

impl Sampled {
    fn of(setup: &Setup, policy: &Policy, chain: &Chain, state: &Checkpoint, tick: impl Fn(usize)) -> Result<Self> {
        let groups = match policy.baseline {
            Baseline::Group { size, shared_noise, .. } => Groups { size, shared_noise },
            _ => Groups { size: 1, shared_noise: false },
        };
        let (mut chains, mut log_probs) = (Vec::new(), vec![Vec::new(); chain.steps.len()]);
        let note = |trajectory: &Trajectory, ledger: &mut Ledger| densities(chain, trajectory, ledger);
        let keep = |trajectory: Trajectory, densities: Vec<Vec<Number>>, readings: &Readings| {
            for (of_step, found) in log_probs.iter_mut().zip(densities) {
                of_step.extend(found.into_iter().map(|number| readings.get(number)));
            }
            let latents = trajectory.into_latents().into_iter().map(|x| x.to_device(&Device::Cpu));
            chains.push(latents.collect::<candle_core::Result<Vec<_>>>()?.into_iter());
            Ok(())
        };
        let round = Round::sample(setup, state, &chain.steps, groups, note, keep, tick)?;
        // each level of noise becomes one tensor, and the parts of it go
        let level = |_| Ok(Tensor::cat(&chains.iter_mut().filter_map(Iterator::next).collect::<Vec<_>>(), 0)?);
        let latents = (0..=chain.steps.len()).map(level).collect::<Result<_>>()?;
        Ok(Self { round, latents, log_probs })
    }
}

/// How much better than expected each image is.
fn advantages(policy: &Policy, Round { prompts, rewards, .. }: &Round, statistics: &mut PromptStatistics) -> Vec<f64> {
    let of_each = match policy.baseline {
        Baseline::Round => of_round(rewards),
        Baseline::Prompt { buffer_size, min_count } => {
            let prompts: Vec<&str> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
            statistics.advantages(&prompts, rewards, buffer_size, min_count)
        }
        Baseline::Group { size, deviation, .. } => {
            let groups: Vec<usize> = (0..rewards.len()).map(|image| image / size).collect();
            of_groups(&groups, rewards, deviation)
        }
    };
    let most = policy.advantage_clip;
    of_each.into_iter().map(|advantage| advantage.clamp(-most, most)).collect()
}

/// The log-density of what each trained step gave; nothing of the others.
pub fn densities(chain: &Chain, trajectory: &Trajectory, ledger: &mut Ledger) -> Result<Vec<Vec<Number>>> {
    let of_step = |i: usize| -> Result<_> {
        if !chain.trained.contains(&i) {
            return Ok(Vec::new());
        }
        let step = &chain.steps[i];
        let z = step.noise_of(trajectory.input(i), trajectory.prediction(i), trajectory.output(i))?;
        Ok(ledger.numbers(&step.log_prob(&z)?)?)
    };
    (0..chain.steps.len()).map(of_step).collect()
}

/// What the updates learn from.
struct Learning<'a> {
    setup: &'a Setup<'a>,
    policy: &'a Policy,
    chain: &'a Chain,
    sampled: &'a Sampled,
    advantages: &'a [f64],
    draws: &'a Updates<'a>,
}

/// What the backward pass of a micro-batch notes, known when a ledger is read.
struct Noted {
    /// The round's images.
    rows: Vec<usize>,
    ratios: Vec<Ratio>,
    kl: Option<KlTerm>,
    /// Of a ledger of its own.
    readings: Option<Readings>,
}

impl Learning<'_> {
    /// The steps of an image that are trained in an inner epoch.
    fn kept_steps(&self, epoch: usize, image: usize) -> Vec<usize> {
        let mut steps = shuffled(self.chain.trained.clone(), &mut self.draws.generator(epoch, image as u64));
        steps.truncate(self.chain.kept_count(self.policy.timestep_fraction));
        steps
    }

    /// The gradient of a micro-batch. Images that have nothing to teach are left out.
    fn back(&self, pass: &Pass, loss_scale: &mut Option<LossScale>, tally: &mut Tally) -> Result<Option<Noted>> {
        let Self { setup, policy, chain, sampled, advantages, .. } = self;
        let (loss_coeff, kl_weight) = (setup.config.optimizer.loss_coeff, setup.config.regularization.kl_weight);
        let teaches = |row: &usize| kl_weight > 0.0 || advantages[*row] != 0.0;
        let rows: Vec<usize> = pass.rows.iter().copied().filter(teaches).collect();
        if rows.is_empty() {
            return Ok(None);
        }
        let denoiser = sampled.round.denoiser(setup, &rows, pass.adapters, &mut tally.ledger)?;
        let latents = sampled.latents.iter().map(|x| take(setup, x, &rows)).collect::<Result<_>>()?;
        let mut trajectory = Trajectory::of_latents(latents);
        let kept: Vec<Vec<usize>> = rows.iter().map(|row| self.kept_steps(pass.epoch, *row)).collect();
        let keep = |i: usize| kept.iter().map(|steps| steps.contains(&i)).collect();
        let keep = (0..chain.steps.len()).map(keep).collect();
        let plan = Plan { steps: chain.steps.clone(), keep, detach_input: false, renoise: 0 };
        let of_step = |of_step: &Vec<f64>| rows.iter().filter_map(|row| of_step.get(*row).copied()).collect();
        let log_probs: Vec<Vec<f64>> = sampled.log_probs.iter().map(of_step).collect();
        let of_rows: Vec<f64> = rows.iter().map(|row| advantages[*row]).collect();

        let back = |tally: &mut Tally| -> Result<_> {
            let mut objective = ClippedObjective {
                scale: loss_coeff / (pass.share * chain.kept_count(policy.timestep_fraction)) as f64,
                clip_range: policy.clip_range,
                advantages: &of_rows,
                log_probs: &log_probs,
                ratios: Vec::new(),
            };
            let scale = loss_coeff * kl_weight / pass.share as f64;
            let mut kl = (kl_weight > 0.0).then(|| KlTerm::of_densities(scale, &plan));
            let mut terms: Vec<&mut dyn StepTerm> = vec![&mut objective];
            terms.extend(kl.as_mut().map(|term| term as &mut dyn StepTerm));
            differentiate(&denoiser, &plan, &mut trajectory, None, &mut terms, tally)?;
            Ok((objective.ratios, kl))
        };
        let ((ratios, kl), readings) = scaled(loss_scale, pass.adapters, tally, back)?;
        Ok(Some(Noted { rows, ratios, kl, readings }))
    }
}

/// What a round's updates saw.
struct Seen {
    ratios: Vec<f64>,
    /// The KL divergences of each image.
    divergences: Vec<Vec<f64>>,
}

impl Seen {
    fn add(&mut self, noted: &Noted, readings: &Readings) {
        let readings = noted.readings.as_ref().unwrap_or(readings);
        self.ratios.extend(noted.ratios.iter().map(|ratio| readings.get(ratio.value)));
        let divergences = noted.kl.iter().flat_map(|kl| kl.distances(readings));
        noted.rows.iter().zip(divergences).for_each(|(row, divergence)| self.divergences[*row].push(divergence));
    }

    fn images(&self, setup: &Setup, scores: Vec<Vec<f64>>) -> Vec<ImageResult> {
        let kl_weight = setup.config.regularization.kl_weight;
        let of = |(scores, divergences): (Vec<f64>, &Vec<f64>)| {
            let mean = divergences.iter().sum::<f64>() / divergences.len().max(1) as f64;
            let distance = (kl_weight > 0.0).then_some(mean);
            ImageResult { loss: setup.rewards.loss(&scores) + kl_weight * mean, scores, distance, sharpness: None }
        };
        scores.into_iter().zip(&self.divergences).map(of).collect()
    }

    /// How far the policy has moved from the one that sampled.
    fn metrics(&self, clip_range: f64) -> Vec<(&'static str, f64)> {
        let n = self.ratios.len().max(1) as f64;
        let squares = self.ratios.iter().map(|ratio| (ratio - 1.0).powi(2)).sum::<f64>();
        let outside = self.ratios.iter().filter(|ratio| (*ratio - 1.0).abs() > clip_range).count();
        vec![(names::RATIO_SPREAD, (squares / n).sqrt()), (names::OUTSIDE_CLIP, outside as f64 / n)]
    }
}
