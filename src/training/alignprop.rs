//! AlignProp (Prabhudesai et al. 2023): the gradient of the reward goes back through the denoising chain. Which of its steps
//! keep their gradient is the plan's matter (`training/truncation.rs`): so this is also DRaFT, ReFL and DRTune.

use std::ops::{Deref, Range};

use anyhow::Result;

use super::Plan;
use super::checkpoint::Checkpoint;
use super::loss_scale::LossScale;
use super::method::{ImageResult, Setup, StepResult};
use super::step::{Critic, Tally, credit_moved, differentiate, sample, scaled, update};
use super::terms::{KlTerm, StepTerm};
use crate::config::Prompt;
use crate::ops::{Ledger, Readings};
use crate::rewards::ImageScores;
use crate::sampling::{ChainNoise, Denoiser, Trajectory};

/// The method of `kind = "alignprop"`.
pub struct AlignProp<'a>(pub &'a Setup<'a>);

impl<'a> Deref for AlignProp<'a> {
    type Target = Setup<'a>;
    fn deref(&self) -> &Setup<'a> {
        self.0
    }
}

/// The samples of one rollout.
#[derive(Clone)]
struct MicroBatch {
    prompts: Vec<Prompt>,
    plan: Plan,
    noise: ChainNoise,
}

impl AlignProp<'_> {
    /// One optimizer step. `state` becomes the next one, or stays as it is where this fails; `tick` is told after each
    /// micro-batch how many are done.
    ///
    /// # Errors
    /// A number that is not finite, a factor that no gradient reached, a first update that moves nothing.
    pub fn step(&self, state: &mut Checkpoint, lr: f64, tick: impl Fn(usize)) -> Result<StepResult> {
        self.step_noting(state, lr, tick, Ledger::default())
    }

    /// [`Self::step`]. What it wants to know of its numbers is in the ledger, which is read when the update is computed and
    /// nothing has become the run's state.
    fn step_noting(&self, state: &mut Checkpoint, lr: f64, tick: impl Fn(usize), ledger: Ledger) -> Result<StepResult> {
        let (step, size) = (state.step as u64, self.plan.batch_size as u64);
        let mut tally = Tally { ledger, ..Tally::new(&state.adapters) };
        let (mut loss_scale, mut images, mut kept_steps) = (state.loss_scale, Vec::new(), 0);
        for number in 1..=self.plan.gradient_accumulation_steps {
            let end = number as u64 * size;
            let batch = self.micro_batch(step, end - size..end)?;
            let conditioning = self.sampler.conditioning(&batch.prompts, &mut tally.ledger)?;
            let denoiser = self.sampler.denoiser(&state.adapters, conditioning, self.plan.checkpointing);
            let (x_t, noise, stored) =
                (batch.noise.initial_latents()?, |i| batch.noise.of_step(i), self.plan.stored_steps);
            let mut trajectory = sample(&denoiser, &batch.plan, x_t, noise, stored, &mut tally.ledger)?;
            // the trajectory does not depend on the loss scale; steps that were stored are evaluated again where it changes
            let back = |tally: &mut Tally| self.back(&batch, &denoiser, &mut trajectory, tally);
            images.push(scaled(&mut loss_scale, &state.adapters, &mut tally, back)?);
            kept_steps += batch.plan.kept_count();
            tick(number);
        }

        // a random rule may detach every step of a batch: there is nothing to learn from it
        let optimizer = &self.config.optimizer;
        let update = match tally.gradients.is_empty() {
            true => None,
            false => Some(update(&mut tally, &state.adapters, &state.optimizer, optimizer.max_grad_norm, lr)?),
        };
        // a step's one wait for a GPU: all of it is checked before any of it becomes the run's state
        let readings = tally.ledger.read()?;
        let mut grad_norm = 0.0;
        if let Some(update) = update {
            grad_norm = readings.get(update.grad_norm);
            self.accept(state, update, grad_norm)?;
        }
        loss_scale.iter_mut().for_each(LossScale::grow);
        state.loss_scale = loss_scale;
        state.step += 1;

        let of = |(noted, own): &(Vec<Noted>, Option<Readings>)| self.results(noted, own.as_ref().unwrap_or(&readings));
        let images: Vec<ImageResult> = images.iter().flat_map(of).collect();
        let kept_steps = kept_steps as f64 / images.len() as f64;
        Ok(StepResult { kept_steps, images, grad_norm, more: Vec::new() })
    }

    /// The samples of a micro-batch, from their numbers in the global batch of optimizer step `step`.
    fn micro_batch(&self, step: u64, samples: Range<u64>) -> Result<MicroBatch> {
        Ok(MicroBatch {
            prompts: samples.clone().map(|sample| self.prompt(step, sample).clone()).collect(),
            plan: Plan::new(&self.config.truncation, &self.sampler.schedule, &self.noise, step, samples.clone())?,
            noise: self.sampler.training_noise(&self.noise, step, samples),
        })
    }

    /// The backward pass of a micro-batch: through rewards and decoder, then through the chain. The loss is a mean over the
    /// global batch, so that the gradients of micro-batches add up.
    fn back(
        &self,
        batch: &MicroBatch,
        denoiser: &Denoiser,
        trajectory: &mut Trajectory,
        tally: &mut Tally,
    ) -> Result<Vec<Noted>> {
        if batch.plan.renoise > 0 {
            return self.back_renoised(batch, denoiser, trajectory, tally);
        }
        Ok(vec![self.back_once(batch, denoiser, trajectory, 1, tally)?])
    }

    /// One of `averaged` backward passes.
    fn back_once(
        &self,
        MicroBatch { prompts, plan, .. }: &MicroBatch,
        denoiser: &Denoiser,
        trajectory: &mut Trajectory,
        averaged: usize,
        tally: &mut Tally,
    ) -> Result<Noted> {
        let (loss_coeff, kl_weight) = (self.config.optimizer.loss_coeff, self.config.regularization.kl_weight);
        // what the loss is a mean over
        let images = (self.plan.global_batch() * averaged) as f64;
        let vae = &self.sampler.pipeline.vae;
        let critic = Critic { vae, rewards: self.rewards, checkpointing: self.plan.checkpointing };
        let rho = self.config.method.rho();
        let credit = credit_moved(&critic, trajectory.latents(), prompts, rho, loss_coeff / images, tally)?;
        let mut kl = (kl_weight > 0.0).then(|| KlTerm::new(loss_coeff * kl_weight / images, plan));
        let mut terms: Vec<&mut dyn StepTerm> = kl.iter_mut().map(|term| term as &mut dyn StepTerm).collect();
        differentiate(denoiser, plan, trajectory, Some(&credit.d_latents), &mut terms, tally)?;
        Ok(Noted { scores: credit.scores, moved: (rho > 0.0).then_some(credit.moved), kl })
    }

    /// The backward pass of DRaFT-LV (Clark et al. 2024): the images are noised to the last step's level and denoised again,
    /// several times; the gradients of those last steps are averaged. Scores and losses are averages too. The paper adds the
    /// gradient of the chain's own last step; here each of the averaged steps is a noised one.
    fn back_renoised(
        &self,
        batch: &MicroBatch,
        denoiser: &Denoiser,
        trajectory: &Trajectory,
        tally: &mut Tally,
    ) -> Result<Vec<Noted>> {
        let schedule = &self.sampler.schedule;
        let last = schedule.len() - 1;
        let (signal, spread) = schedule.add_noise(last);
        let repetitions = batch.plan.renoise;
        let batch = MicroBatch { plan: batch.plan.last_step_alone(), ..batch.clone() };
        let mut noted = Vec::with_capacity(repetitions);
        for repetition in 0..repetitions {
            let z = batch.noise.of_repetition(repetition)?;
            let x_t = ((trajectory.latents() * signal)? + (z * spread)?)?;
            // their variance noise has places behind the chain's own
            let noise = |_| batch.noise.of_step(last + 1 + repetition);
            let mut again = sample(denoiser, &batch.plan, x_t, noise, self.plan.stored_steps, &mut tally.ledger)?;
            noted.push(self.back_once(&batch, denoiser, &mut again, repetitions, tally)?);
        }
        Ok(noted)
    }

    /// What was found of each image of a micro-batch: a mean, where it was judged several times.
    fn results(&self, repetitions: &[Noted], readings: &Readings) -> Vec<ImageResult> {
        let kl_weight = self.config.regularization.kl_weight;
        let mut mean: Vec<ImageResult> = Vec::new();
        for noted in repetitions {
            let distances = noted.kl.as_ref().map(|kl| kl.distances(readings));
            for (image, scores) in noted.scores.iter().enumerate() {
                let distance = distances.as_ref().map(|distances| distances[image]);
                let of_scores = scores.loss(self.rewards, readings);
                let loss = of_scores + kl_weight * distance.unwrap_or(0.0);
                let moved = noted.moved.as_ref().map(|moved| moved[image].loss(self.rewards, readings));
                let sharpness = moved.map(|moved| moved - of_scores);
                let result = ImageResult { scores: scores.get(readings), loss, distance, sharpness };
                match mean.get_mut(image) {
                    Some(sum) => sum.add(result),
                    None => mean.push(result),
                }
            }
        }
        mean.iter_mut().for_each(|sum| sum.divide(repetitions.len() as f64));
        mean
    }
}

/// What a backward pass notes of its images, known when the ledger is read.
struct Noted {
    scores: Vec<ImageScores>,
    /// Of the images moved against the rewards, where the loss is theirs.
    moved: Option<Vec<ImageScores>>,
    /// Where the loss has the KL term.
    kl: Option<KlTerm>,
}

#[cfg(test)]
mod tests {
    use super::super::trainer::begin;
    use super::super::{RunPlan, health};
    use super::*;
    use crate::config::{Checkpointing, Config, Precision};
    use crate::diffusion::Noise;
    use crate::ops::device::Compute;
    use crate::ops::testing::relative_error;
    use crate::rewards::Rewards;
    use crate::sampling::Sampler;
    use candle_core::Tensor;

    /// An experiment with all that is read of a step: two micro-batches, several rewards, one of them with a stand-in and a
    /// cap, the pull towards the base model.
    const SETTINGS: [&str; 9] = [
        "sampler.num_inference_steps=3",
        "sampler.eta=1",
        "truncation.k=2",
        "train.batch_size=2",
        "train.gradient_accumulation_steps=2",
        "reward.compressibility.weight=0.1",
        "reward.incompressibility.weight=0",
        "regularization.kl_weight=0.1",
        "regularization.ema_decay=0.9",
    ];

    /// One step from the start with this ledger, and the state before and after it.
    fn step(settings: &[&str], lr: f64, first: f32, ledger: Ledger) -> (Result<StepResult>, Checkpoint, Checkpoint) {
        step_on(&Compute::cpu(), settings, lr, |state| move_first(state, first), ledger)
    }

    /// Adds a number to the first factor B.
    fn move_first(state: &mut Checkpoint, by: f32) {
        let mut tensors = state.adapters.tensors();
        tensors[1] = (&tensors[1] + f64::from(by)).unwrap();
        state.adapters = state.adapters.with_tensors(tensors).unwrap();
    }

    fn step_on(
        compute: &Compute,
        settings: &[&str],
        lr: f64,
        prepare: impl FnOnce(&mut Checkpoint),
        ledger: Ledger,
    ) -> (Result<StepResult>, Checkpoint, Checkpoint) {
        let settings: Vec<String> = SETTINGS.iter().chain(settings).map(|set| (*set).to_owned()).collect();
        let config = &Config::parse(include_str!("../../configs/emoji.toml"), "emoji.toml", &settings).unwrap();
        let noise = Noise::new(1);
        let sampler = &Sampler::load(&config.model, &config.sampler, compute).unwrap();
        let rewards = Rewards::load_on(&config.reward, &sampler.pipeline.tokenizer, compute).unwrap();
        let rewards = &rewards.with_caps(&config.regularization.reward_cap);
        let prompts = &config.prompts.load().unwrap();
        let mut before = begin(config, sampler, &noise).unwrap();
        prepare(&mut before);
        let plan = &RunPlan {
            precision: compute.precision(),
            lora: config.lora.clone(),
            batch_size: config.train.batch_size,
            gradient_accumulation_steps: config.train.gradient_accumulation_steps,
            checkpointing: Checkpointing::Step,
            stored_steps: 0,
            memory: None,
        };
        let setup = Setup { config, plan, sampler, rewards, prompts, noise };
        let mut state = before.clone();
        let result = AlignProp(&setup).step_noting(&mut state, lr, |_| (), ledger);
        (result, before, state)
    }

    /// Every number of a state, bit by bit.
    fn bits(state: &Checkpoint) -> Vec<u32> {
        let moments = state.optimizer.moments.iter().flat_map(|(m, v)| [m.clone(), v.clone()]);
        let ema = state.ema.iter().flat_map(|ema| ema.tensors());
        let tensors = state.adapters.tensors().into_iter().chain(moments).chain(ema);
        tensors.flat_map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap()).map(f32::to_bits).collect()
    }

    #[test]
    fn a_step_that_looks_only_at_its_end_is_the_same_step() {
        for settings in [
            &["regularization.reward_cap.compressibility=-2.2"][..],
            &["truncation={ rule = \"draft-lv\", n = 2 }", "regularization.reward_cap.clip-score=0.76"],
        ] {
            let run = |ledger| {
                let (result, before, after) = step(settings, 1e-3, 0.0, ledger);
                let result = result.unwrap();
                assert!(bits(&before) != bits(&after) && result.grad_norm > 0.0 && after.step == 1);
                assert_eq!((result.images.len(), result.images[0].scores.len()), (4, 3));
                assert!(result.images.iter().all(|image| image.distance.is_some()));
                (result, bits(&after))
            };
            assert_eq!(run(Ledger::default()), run(Ledger::always_later()));
        }
    }

    /// The loss scale of f16 goes in with the scores' cotangents and comes out of the adapters' gradients.
    #[test]
    fn a_step_in_half_precision_is_near_that_in_f32() {
        let run = |precision| {
            let compute = Compute::open_any("cpu", Some(precision), false).unwrap();
            // a loss whose gradients f16 would lose without a scale
            let (result, before, after) =
                step_on(&compute, &["optimizer.loss_coeff=1e-5"], 1e-3, |_| (), Ledger::default());
            assert_eq!(before.loss_scale.is_some(), precision == Precision::F16);
            let result = result.unwrap();
            (result.images[0].scores[0], result.grad_norm, after.optimizer.moments)
        };
        let (score, norm, moments) = run(Precision::F32);
        for (precision, bound) in [(Precision::Bf16, 1e-1), (Precision::F16, 2e-2)] {
            let (found, found_norm, found_moments) = run(precision);
            assert!((found / score - 1.0).abs() < bound / 10.0, "{precision:?}: score {found} for {score}");
            assert!((found_norm / norm - 1.0).abs() < bound, "{precision:?}: norm {found_norm:e} for {norm:e}");
            let flat = |moments: &[(Tensor, Tensor)]| {
                Tensor::cat(&moments.iter().map(|(m, _)| m.flatten_all().unwrap()).collect::<Vec<_>>(), 0).unwrap()
            };
            let error = relative_error(&flat(&found_moments), &flat(&moments));
            assert!(error > 0.0 && error < 2.0 * bound, "{precision:?}: {error}");
        }
    }

    #[test]
    fn what_is_wrong_is_found_at_the_end_too_and_changes_nothing() {
        for (settings, lr, first, message) in [
            (&[][..], 1e-3, f32::INFINITY, "the UNet's prediction at denoising step 0"),
            (&["optimizer.loss_coeff=1e41"], 1e-3, 0.0, "the gradient that comes back from the reward"),
            (&["regularization.kl_weight=1e45"], 1e-3, 0.0, "the gradient that comes back from the UNet"),
            (&[], 1e39, 0.0, "AdamW's update"),
        ] {
            let run = |ledger| {
                let (result, before, after) = step(settings, lr, first, ledger);
                let error = result.err().unwrap();
                assert!(health::is_not_a_number(&error));
                assert!(bits(&before) == bits(&after) && (after.step, after.optimizer.step) == (0, 0));
                format!("{error:#}")
            };
            let now = run(Ledger::default());
            assert!(now.contains(message), "{now}");
            assert_eq!(run(Ledger::always_later()), now);
        }
    }

    /// In f16 a step that begins with a loss scale that is too large is the step that begins with the one it ends with.
    #[test]
    fn an_overflow_changes_no_number() {
        let compute = Compute::open_any("cpu", Some(Precision::F16), false).unwrap();
        let run = |scale: Option<f64>| {
            let prepare = |state: &mut Checkpoint| {
                if let Some(scale) = scale {
                    state.loss_scale = Some(LossScale::starting_at(scale));
                }
            };
            // one micro-batch: an earlier one would keep the roundings of the larger scale
            let settings = ["optimizer.loss_coeff=300", "train.gradient_accumulation_steps=1"];
            let (result, before, after) = step_on(&compute, &settings, 1e-3, prepare, Ledger::default());
            (result.unwrap(), before.loss_scale.unwrap().get(), after)
        };
        let (result, before, after) = run(None);
        let found = after.loss_scale.unwrap().get();
        assert!(found < before, "{before} does not overflow: nothing is tested");
        let (again, _, from_there) = run(Some(found));
        assert_eq!(from_there.loss_scale.unwrap().get(), found);
        assert_eq!(again, result);
        assert!(bits(&from_there) == bits(&after));
    }
}
