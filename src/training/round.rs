//! Rounds: the images of a global batch are sampled and scored, and then learned from in several updates.

use std::ops::Range;

use anyhow::Result;
use candle_core::{Device, Tensor};
use rand_chacha::ChaCha12Rng;

use super::checkpoint::Checkpoint;
use super::loss_scale::LossScale;
use super::method::Setup;
use super::step::{Tally, update};
use crate::config::Prompt;
use crate::diffusion::noise::below;
use crate::diffusion::{DdimStep, Stream, place};
use crate::lora::Adapters;
use crate::ops::device::upload;
use crate::ops::{Ledger, Readings};
use crate::sampling::{Denoiser, Trajectory};

/// Images that were sampled and scored.
#[derive(Default)]
pub struct Round {
    pub prompts: Vec<Prompt>,
    /// Of each image, one for each reward.
    pub scores: Vec<Vec<f64>>,
    /// What is maximised: minus the weighted loss of the scores.
    pub rewards: Vec<f64>,
}

/// Images in a row that have one prompt.
#[derive(Clone, Copy)]
pub struct Groups {
    pub size: usize,
    /// They begin with one x_T too.
    pub shared_noise: bool,
}

impl Round {
    /// Samples by the chain of `steps`, one micro-batch at a time. `note` notes what is wanted of a chain, and `keep` takes it, with
    /// the chain, once it is known.
    ///
    /// # Errors
    /// A number that is not finite.
    pub fn sample<T>(
        setup: &Setup,
        state: &Checkpoint,
        steps: &[DdimStep],
        groups: Groups,
        note: impl Fn(&Trajectory, &mut Ledger) -> Result<T>,
        mut keep: impl FnMut(Trajectory, T, &Readings) -> Result<()>,
        tick: impl Fn(usize),
    ) -> Result<Self> {
        let (step, size, mut round) = (state.step as u64, setup.plan.batch_size as u64, Self::default());
        for number in 1..=setup.plan.gradient_accumulation_steps {
            let samples = (number as u64 - 1) * size..number as u64 * size;
            let prompts = prompts(setup, groups, step, samples.clone());
            let noise = setup.sampler.training_noise(&setup.noise, step, samples);
            let x_t = match groups.shared_noise {
                true => noise.shared_latents(groups.size as u64)?,
                false => noise.initial_latents()?,
            };
            let mut ledger = Ledger::default();
            let conditioning = setup.sampler.conditioning(&prompts, &mut ledger)?;
            let denoiser = setup.sampler.denoiser(&state.adapters, conditioning, setup.plan.checkpointing);
            let of_step = |i| noise.of_step(i);
            let trajectory = denoiser.rollout(steps, x_t, of_step, |_| false, &mut ledger)?;
            let noted = note(&trajectory, &mut ledger)?;
            let readings = ledger.read()?;
            let images = setup.sampler.decode(trajectory.latents())?;
            round.scores.extend(setup.rewards.scores(&images, &prompts)?);
            round.prompts.extend(prompts);
            keep(trajectory, noted, &readings)?;
            tick(number);
        }
        round.rewards = round.scores.iter().map(|scores| -setup.rewards.loss(scores)).collect();
        Ok(round)
    }

    /// The denoiser of these images, adapted and guided as the one that sampled them.
    pub fn denoiser<'a>(
        &self,
        setup: &'a Setup,
        rows: &[usize],
        adapters: &'a Adapters,
        ledger: &mut Ledger,
    ) -> Result<Denoiser<'a>> {
        let prompts: Vec<Prompt> = rows.iter().map(|row| self.prompts[*row].clone()).collect();
        let conditioning = setup.sampler.conditioning(&prompts, ledger)?;
        Ok(setup.sampler.denoiser(adapters, conditioning, setup.plan.checkpointing))
    }
}

/// The prompts of some samples: one for each, or for each group.
fn prompts(setup: &Setup, groups: Groups, step: u64, samples: Range<u64>) -> Vec<Prompt> {
    samples.map(|sample| setup.prompt(step, sample - sample % groups.size as u64).clone()).collect()
}

/// These rows of a tensor that lies in the host's memory, on the device of the run.
pub fn take(setup: &Setup, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let numbers = Tensor::new(rows.iter().map(|row| *row as u32).collect::<Vec<_>>(), &Device::Cpu)?;
    Ok(upload(&x.index_select(&numbers, 0)?, setup.sampler.compute().device())?)
}

/// How a round is learned from.
pub struct Updates<'a> {
    pub setup: &'a Setup<'a>,
    /// Of the run.
    pub step: usize,
    pub lr: f64,
    /// In each inner epoch, on equal shares of the images.
    pub updates: usize,
    pub inner_epochs: usize,
}

/// What one backward pass is about.
pub struct Pass<'a> {
    pub epoch: usize,
    /// The images, by their numbers in the round.
    pub rows: &'a [usize],
    /// Images that the update learns from, these among them.
    pub share: usize,
    pub adapters: &'a Adapters,
}

impl Updates<'_> {
    /// Learns from these images of the round: `back` adds the gradient of a micro-batch to a tally and notes what it saw, if there is
    /// something to learn; `seen` takes what was noted once it is known. Gives the mean norm of the updates' gradients.
    ///
    /// # Errors
    /// A number that is not finite, a factor that no gradient reached, a first update that moves nothing.
    pub fn learn<T>(
        &self,
        state: &mut Checkpoint,
        images: &[usize],
        mut back: impl FnMut(&Pass, &mut Option<LossScale>, &mut Tally) -> Result<Option<T>>,
        mut seen: impl FnMut(T, &Readings),
        tick: impl Fn(usize),
    ) -> Result<f64> {
        let Setup { config, plan, .. } = self.setup;
        let (mut done, mut norms) = (plan.gradient_accumulation_steps, Vec::new());
        for epoch in 0..self.inner_epochs {
            // drawn as by a sample that does not exist
            let order = shuffled(images.to_vec(), &mut self.generator(epoch, u64::MAX));
            for share in order.chunks(images.len().div_ceil(self.updates).max(1)) {
                let (mut tally, mut noted) = (Tally::new(&state.adapters), Vec::new());
                for rows in share.chunks(plan.batch_size) {
                    let pass = Pass { epoch, rows, share: share.len(), adapters: &state.adapters };
                    noted.extend(back(&pass, &mut state.loss_scale, &mut tally)?);
                    done += 1;
                    tick(done);
                }
                // where nothing is to be learned, nothing changes
                if tally.gradients.is_empty() {
                    continue;
                }
                let max_grad_norm = config.optimizer.max_grad_norm;
                let update = update(&mut tally, &state.adapters, &state.optimizer, max_grad_norm, self.lr)?;
                let readings = tally.ledger.read()?;
                let grad_norm = readings.get(update.grad_norm);
                self.setup.accept(state, update, grad_norm)?;
                norms.push(grad_norm);
                noted.into_iter().for_each(|noted| seen(noted, &readings));
            }
        }
        state.loss_scale.iter_mut().for_each(LossScale::grow);
        Ok(norms.iter().sum::<f64>() / norms.len().max(1) as f64)
    }

    /// Of what chance decides of an image in an inner epoch.
    pub fn generator(&self, epoch: usize, image: u64) -> ChaCha12Rng {
        self.setup.noise.generator(Stream::Shuffle, place(self.step as u64, epoch), image)
    }
}

/// Fisher and Yates.
pub fn shuffled(mut items: Vec<usize>, rng: &mut ChaCha12Rng) -> Vec<usize> {
    for last in (1..items.len()).rev() {
        items.swap(last, below(rng, last + 1));
    }
    items
}
