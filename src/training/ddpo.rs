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

use std::ops::Range;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use rand_chacha::ChaCha12Rng;

use super::advantages::{PromptStatistics, of_groups, of_round};
use super::checkpoint::Checkpoint;
use super::loss_scale::LossScale;
use super::method::{ImageResult, PolicyResult, Setup, StepResult};
use super::step::{Tally, differentiate, scaled, update};
use super::terms::{ClippedObjective, KlTerm, Ratio, StepTerm};
use super::{Plan, RunPlan};
use crate::config::{Baseline, Policy, Prompt};
use crate::diffusion::noise::below;
use crate::diffusion::{DdimSchedule, DdimStep, Stream, place};
use crate::lora::Adapters;
use crate::ops::device::upload;
use crate::ops::{Ledger, Number, Readings};
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
    let optimizer = &setup.config.optimizer;
    let (chain, mut next) = (Chain::of(policy, &setup.sampler.schedule, state.step)?, state.clone());
    let round = Round::sample(setup, policy, &chain, state, &tick)?;
    let advantages = round.advantages(policy, &mut next.statistics);
    let learning = Learning { setup, policy, chain: &chain, round: &round, advantages: &advantages };

    let (images, mut seen, mut norms) = (round.prompts.len(), Seen::new(round.prompts.len()), Vec::new());
    let mut done = setup.plan.gradient_accumulation_steps;
    for epoch in 0..policy.inner_epochs {
        let draws = Draws { setup, step: state.step as u64, epoch };
        let kept = draws.kept_steps(&chain, policy.timestep_fraction, images);
        for share in draws.order(images).chunks(images / policy.updates) {
            let (mut tally, mut noted) = (Tally::new(&next.adapters), Vec::new());
            for rows in share.chunks(setup.plan.batch_size) {
                noted.extend(learning.back(
                    rows,
                    &kept,
                    share.len(),
                    &next.adapters,
                    &mut next.loss_scale,
                    &mut tally,
                )?);
                done += 1;
                tick(done);
            }
            // where every advantage is 0 there is nothing to learn
            if tally.gradients.is_empty() {
                continue;
            }
            let update = update(&mut tally, &next.adapters, &next.optimizer, optimizer.max_grad_norm, lr)?;
            let readings = tally.ledger.read()?;
            let grad_norm = readings.get(update.grad_norm);
            setup.accept(&mut next, update, grad_norm)?;
            norms.push(grad_norm);
            noted.iter().for_each(|noted| seen.add(noted, &readings));
        }
    }
    next.loss_scale.iter_mut().for_each(LossScale::grow);
    next.step += 1;
    *state = next;
    Ok(StepResult {
        images: seen.images(setup, round.scores),
        grad_norm: norms.iter().sum::<f64>() / norms.len().max(1) as f64,
        kept_steps: chain.kept_count(policy.timestep_fraction) as f64,
        policy: Some(seen.policy(policy.clip_range)),
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

/// What was sampled. It lies in the host's memory until it is trained on.
struct Round {
    prompts: Vec<Prompt>,
    /// x_T, .., x_0, each (N, C, h, w).
    latents: Vec<Tensor>,
    /// Of each denoising step and image; of those that are trained.
    log_probs: Vec<Vec<f64>>,
    /// Of each image, one for each reward.
    scores: Vec<Vec<f64>>,
    /// What is maximised: minus the weighted loss of the scores.
    rewards: Vec<f64>,
}

impl Round {
    fn sample(setup: &Setup, policy: &Policy, chain: &Chain, state: &Checkpoint, tick: impl Fn(usize)) -> Result<Self> {
        let (step, RunPlan { batch_size, gradient_accumulation_steps, checkpointing, .. }) =
            (state.step as u64, setup.plan);
        let size = *batch_size as u64;
        let (mut prompts, mut scores, mut chains) = (Vec::new(), Vec::new(), Vec::new());
        let mut log_probs = vec![Vec::new(); chain.steps.len()];
        for number in 0..*gradient_accumulation_steps {
            let samples = number as u64 * size..(number as u64 + 1) * size;
            let batch = batch_prompts(setup, policy, step, samples.clone());
            let noise = setup.sampler.training_noise(&setup.noise, step, samples);
            let x_t = match policy.baseline {
                Baseline::Group { size, shared_noise: true, .. } => noise.shared_latents(size as u64)?,
                _ => noise.initial_latents()?,
            };
            let mut ledger = Ledger::default();
            let conditioning = setup.sampler.conditioning(&batch, &mut ledger)?;
            let denoiser = setup.sampler.denoiser(&state.adapters, conditioning, *checkpointing);
            let of_step = |i| noise.of_step(i);
            let trajectory = denoiser.rollout(&chain.steps, x_t, of_step, |_| false, &mut ledger)?;
            let densities = densities(chain, &trajectory, &mut ledger)?;
            let readings = ledger.read()?;
            for (of_step, found) in log_probs.iter_mut().zip(densities) {
                of_step.extend(found.into_iter().map(|number| readings.get(number)));
            }
            scores.extend(setup.rewards.scores(&setup.sampler.decode(trajectory.latents())?, &batch)?);
            prompts.extend(batch);
            let latents = trajectory.into_latents().into_iter().map(|x| x.to_device(&Device::Cpu));
            chains.push(latents.collect::<candle_core::Result<Vec<_>>>()?.into_iter());
            tick(number + 1);
        }
        // each level of noise becomes one tensor, and the parts of it go
        let level = |_| Ok(Tensor::cat(&chains.iter_mut().filter_map(Iterator::next).collect::<Vec<_>>(), 0)?);
        let latents = (0..=chain.steps.len()).map(level).collect::<Result<_>>()?;
        let rewards = scores.iter().map(|scores| -setup.rewards.loss(scores)).collect();
        Ok(Self { prompts, latents, log_probs, scores, rewards })
    }

    fn advantages(&self, policy: &Policy, statistics: &mut PromptStatistics) -> Vec<f64> {
        let of_each = match policy.baseline {
            Baseline::Round => of_round(&self.rewards),
            Baseline::Prompt { buffer_size, min_count } => {
                let prompts: Vec<&str> = self.prompts.iter().map(|prompt| prompt.text.as_str()).collect();
                statistics.advantages(&prompts, &self.rewards, buffer_size, min_count)
            }
            Baseline::Group { size, deviation, .. } => {
                let groups: Vec<usize> = (0..self.rewards.len()).map(|image| image / size).collect();
                of_groups(&groups, &self.rewards, deviation)
            }
        };
        let most = policy.advantage_clip;
        of_each.into_iter().map(|advantage| advantage.clamp(-most, most)).collect()
    }
}

/// The prompts of some samples of a round: one for each, or for each group.
fn batch_prompts(setup: &Setup, policy: &Policy, step: u64, samples: Range<u64>) -> Vec<Prompt> {
    let first = |sample: u64| match policy.baseline {
        Baseline::Group { size, .. } => sample - sample % size as u64,
        _ => sample,
    };
    samples.map(|sample| setup.prompt(step, first(sample)).clone()).collect()
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

/// What chance decides of an inner epoch.
struct Draws<'a> {
    setup: &'a Setup<'a>,
    step: u64,
    epoch: usize,
}

impl Draws<'_> {
    fn generator(&self, sample: u64) -> ChaCha12Rng {
        self.setup.noise.generator(Stream::Shuffle, place(self.step, self.epoch), sample)
    }

    /// The order in which the images are trained on.
    fn order(&self, images: usize) -> Vec<usize> {
        // drawn as by a sample that does not exist
        shuffled((0..images).collect(), &mut self.generator(u64::MAX))
    }

    /// The steps of each image that are trained.
    fn kept_steps(&self, chain: &Chain, timestep_fraction: f64, images: usize) -> Vec<Vec<usize>> {
        let count = chain.kept_count(timestep_fraction);
        let of = |image: usize| {
            let mut steps = shuffled(chain.trained.clone(), &mut self.generator(image as u64));
            steps.truncate(count);
            steps
        };
        (0..images).map(of).collect()
    }
}

/// Fisher and Yates.
fn shuffled(mut items: Vec<usize>, rng: &mut ChaCha12Rng) -> Vec<usize> {
    for last in (1..items.len()).rev() {
        items.swap(last, below(rng, last + 1));
    }
    items
}

/// What an update learns from.
struct Learning<'a> {
    setup: &'a Setup<'a>,
    policy: &'a Policy,
    chain: &'a Chain,
    round: &'a Round,
    advantages: &'a [f64],
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
    /// Adds the gradient of these images' part of an update on `images` of them; `kept` has the steps of each image of the round.
    /// Images that have nothing to teach are left out.
    fn back(
        &self,
        rows: &[usize],
        kept: &[Vec<usize>],
        images: usize,
        adapters: &Adapters,
        loss_scale: &mut Option<LossScale>,
        tally: &mut Tally,
    ) -> Result<Option<Noted>> {
        let Self { setup, policy, chain, round, advantages } = self;
        let (loss_coeff, kl_weight) = (setup.config.optimizer.loss_coeff, setup.config.regularization.kl_weight);
        let rows: Vec<usize> = rows.iter().copied().filter(|row| kl_weight > 0.0 || advantages[*row] != 0.0).collect();
        if rows.is_empty() {
            return Ok(None);
        }
        let prompts: Vec<Prompt> = rows.iter().map(|row| round.prompts[*row].clone()).collect();
        let conditioning = setup.sampler.conditioning(&prompts, &mut tally.ledger)?;
        let denoiser = setup.sampler.denoiser(adapters, conditioning, setup.plan.checkpointing);
        let numbers = Tensor::new(rows.iter().map(|row| *row as u32).collect::<Vec<_>>(), &Device::Cpu)?;
        let of_rows = |x: &Tensor| upload(&x.index_select(&numbers, 0)?, setup.sampler.compute().device());
        let latents = round.latents.iter().map(of_rows).collect::<candle_core::Result<_>>()?;
        let mut trajectory = Trajectory::of_latents(latents);
        let keep = |i: usize| rows.iter().map(|row| kept[*row].contains(&i)).collect();
        let keep = (0..chain.steps.len()).map(keep).collect();
        let plan = Plan { steps: chain.steps.clone(), keep, detach_input: false, renoise: 0 };
        let of_step = |of_step: &Vec<f64>| rows.iter().filter_map(|row| of_step.get(*row).copied()).collect();
        let log_probs: Vec<Vec<f64>> = round.log_probs.iter().map(of_step).collect();
        let of_rows: Vec<f64> = rows.iter().map(|row| advantages[*row]).collect();

        let back = |tally: &mut Tally| -> Result<_> {
            let mut objective = ClippedObjective {
                scale: loss_coeff / (images * chain.kept_count(policy.timestep_fraction)) as f64,
                clip_range: policy.clip_range,
                advantages: &of_rows,
                log_probs: &log_probs,
                ratios: Vec::new(),
            };
            let scale = loss_coeff * kl_weight / images as f64;
            let mut kl = (kl_weight > 0.0).then(|| KlTerm::of_densities(scale, &plan));
            let mut terms: Vec<&mut dyn StepTerm> = vec![&mut objective];
            terms.extend(kl.as_mut().map(|term| term as &mut dyn StepTerm));
            differentiate(&denoiser, &plan, &mut trajectory, None, &mut terms, tally)?;
            Ok((objective.ratios, kl))
        };
        let ((ratios, kl), readings) = scaled(loss_scale, adapters, tally, back)?;
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
    fn new(images: usize) -> Self {
        Self { ratios: Vec::new(), divergences: vec![Vec::new(); images] }
    }

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
            ImageResult { loss: setup.rewards.loss(&scores) + kl_weight * mean, scores, distance }
        };
        scores.into_iter().zip(&self.divergences).map(of).collect()
    }

    fn policy(&self, clip_range: f64) -> PolicyResult {
        let n = self.ratios.len().max(1) as f64;
        let squares = self.ratios.iter().map(|ratio| (ratio - 1.0).powi(2)).sum::<f64>();
        let outside = self.ratios.iter().filter(|ratio| (*ratio - 1.0).abs() > clip_range).count();
        PolicyResult { ratio_spread: (squares / n).sqrt(), outside_clip: outside as f64 / n }
    }
}
