//! What all methods share, and the choice of one.

use anyhow::Result;

use super::checkpoint::Checkpoint;
use super::step::Update;
use super::{AlignProp, RunPlan, adjoint_matching, ddpo, health, rwr};
use crate::config::{Config, Method, Prompt};
use crate::diffusion::{Noise, Stream};
use crate::optim::moving_average;
use crate::rewards::Rewards;
use crate::sampling::Sampler;

/// What every step needs and none changes.
pub struct Setup<'a> {
    pub config: &'a Config,
    pub plan: &'a RunPlan,
    pub sampler: &'a Sampler,
    pub rewards: &'a Rewards,
    pub prompts: &'a [Prompt],
    pub noise: Noise,
}

impl Setup<'_> {
    /// One step of the run, by its method. `state` becomes the next one, or stays as it is where this fails; `tick` is told after
    /// each micro-batch how many of [`micro_batches`] are done.
    ///
    /// # Errors
    /// A number that is not finite, a factor that no gradient reached, a first update that moves nothing.
    pub fn step(&self, state: &mut Checkpoint, lr: f64, tick: impl Fn(usize)) -> Result<StepResult> {
        let method = &self.config.method;
        if let Some(policy) = method.policy() {
            return ddpo::step(self, &policy, state, lr, tick);
        }
        if let Some(regression) = method.regression() {
            return rwr::step(self, &regression, state, lr, tick);
        }
        if let Method::AdjointMatching(matching) = method {
            return adjoint_matching::step(self, matching, state, lr, tick);
        }
        AlignProp(self).step(state, lr, tick)
    }

    /// The prompt of a sample of step `step`: each is drawn by itself.
    pub fn prompt(&self, step: u64, sample: u64) -> &Prompt {
        &self.prompts[self.noise.below(Stream::Prompts, step, sample, self.prompts.len())]
    }

    /// Makes the update the run's state.
    ///
    /// # Errors
    /// The first update moves no factor B.
    pub fn accept(&self, state: &mut Checkpoint, update: Update, grad_norm: f64) -> Result<()> {
        if update.optimizer.step == 1 {
            health::ensure_moved(&state.adapters, &update.adapters, grad_norm)?;
        }
        if let Some(ema) = &mut state.ema {
            let decay = self.config.regularization.ema_decay;
            *ema = ema.with_tensors(moving_average(&ema.tensors(), &update.adapters.tensors(), decay)?)?;
        }
        state.adapters = update.adapters;
        state.optimizer = update.optimizer;
        Ok(())
    }
}

/// The micro-batches of one step of a run.
pub fn micro_batches(config: &Config, plan: &RunPlan) -> usize {
    plan.gradient_accumulation_steps * (1 + config.method.inner_epochs())
}

/// What a step found of one image.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageResult {
    /// One for each reward.
    pub scores: Vec<f64>,
    /// Without `optimizer.loss_coeff`.
    pub loss: f64,
    /// The KL term without its weight, where the loss has one: a mean over the steps that were differentiated.
    pub distance: Option<f64>,
    /// How much its loss rises where it is moved against the rewards, where the loss is that of the moved image (RSA-FT).
    pub sharpness: Option<f64>,
}

impl ImageResult {
    pub(super) fn add(&mut self, other: Self) {
        self.scores.iter_mut().zip(other.scores).for_each(|(sum, score)| *sum += score);
        self.loss += other.loss;
        let add = |(sum, value): (f64, f64)| sum + value;
        self.distance = self.distance.zip(other.distance).map(add);
        self.sharpness = self.sharpness.zip(other.sharpness).map(add);
    }

    pub(super) fn divide(&mut self, count: f64) {
        let values =
            self.scores.iter_mut().chain([&mut self.loss]).chain(&mut self.distance).chain(&mut self.sharpness);
        values.for_each(|value| *value /= count);
    }
}

/// What a step found.
#[derive(Debug, PartialEq)]
pub struct StepResult {
    /// Of the global batch, in order.
    pub images: Vec<ImageResult>,
    /// Before clipping, a mean over the step's updates; 0 where there was nothing to learn.
    pub grad_norm: f64,
    /// Differentiated denoising steps an image.
    pub kept_steps: f64,
    /// Metrics of the method's own, by their names.
    pub more: Vec<(&'static str, f64)>,
}
