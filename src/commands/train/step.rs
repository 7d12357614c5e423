//! One optimizer step: micro-batches of rollout, reward and backprop, then clipping and AdamW.

use std::time::Duration;

use anyhow::Result;
use indicatif::ProgressBar;
use serde_json::{Map, Value as Json, json};

use super::Trainer;
use crate::commands::experiment::{Model, counter};
use crate::config::{Config, Prompt};
use crate::diffusion::Stream;
use crate::lora::Adapters;
use crate::nn::lora::LoraGradients;
use crate::ops::{Ledger, Number, Readings};
use crate::optim::{AdamW, clip_grad_norm, moving_average};
use crate::rewards::{ImageScores, Rewards};
use crate::training::checkpoint::Checkpoint;
use crate::training::health;
use crate::training::loss_scale::{LossScale, unscale};
use crate::training::{Anchor, Plan, Prompting, Trajectory, anchored_backprop, recorded_rollout, reward_cotangent};

/// What a way back is given.
struct Batch<'a> {
    plan: &'a Plan,
    prompting: &'a Prompting,
    prompts: &'a [Prompt],
    /// What the loss is a mean over.
    images: f64,
}

/// What a way back found of its images, known when the ledger is read.
struct Judged {
    scores: Vec<ImageScores>,
    /// Where the loss has the KL term.
    anchor: Option<Anchor>,
}

/// What was found of one image.
struct Verdict {
    scores: Vec<f64>,
    loss: f64,
    /// Mean distance of the noise predictions from the base model's; 0 where the loss has no KL term.
    distance: f64,
}

impl Judged {
    fn verdicts(&self, trainer: &Trainer, readings: &Readings) -> Vec<Verdict> {
        let distances = self.anchor.as_ref().map(|anchor| anchor.distances(readings));
        let verdict = |(image, scores): (usize, &ImageScores)| {
            let distance = distances.as_ref().map_or(0.0, |distances| distances[image]);
            let mut loss = scores.loss(trainer.rewards, readings);
            if self.anchor.is_some() {
                loss += trainer.config.regularization.kl_weight * distance;
            }
            Verdict { scores: scores.get(readings), loss, distance }
        };
        self.scores.iter().enumerate().map(verdict).collect()
    }
}

/// The run's next state, until it is known to be finite.
struct Update {
    adapters: Adapters,
    optimizer: AdamW,
    /// Of the gradients, before they were clipped.
    norm: Number,
}

/// What one optimizer step found.
pub(super) struct Outcome {
    /// Mean and standard deviation over the global batch, one each for every reward.
    pub mean_scores: Vec<f64>,
    std_scores: Vec<f64>,
    loss: f64,
    grad_norm: f64,
    /// Mean distance of the noise predictions from the base model's, where the loss has the KL term.
    distance: Option<f64>,
    /// Differentiated denoising steps an image.
    kept_steps: f64,
}

impl Trainer<'_> {
    /// One optimizer step; in f16 again with a smaller loss scale where something overflowed.
    pub(super) fn scaled_step(&self, state: &mut Checkpoint, lr: f64, progress: &ProgressBar) -> Result<Outcome> {
        let before = state.loss_scale;
        loop {
            match self.step(state, lr, progress, Ledger::default()) {
                Err(error) if health::is_not_a_number(&error) => {
                    let Some(smaller) = state.loss_scale.and_then(|scale| scale.smaller()) else {
                        state.loss_scale = before; // it was not the scale
                        return Err(error);
                    };
                    state.loss_scale = Some(smaller);
                    progress.set_position((state.step * self.config.train.gradient_accumulation_steps) as u64);
                }
                outcome => {
                    state.loss_scale.iter_mut().for_each(LossScale::grow);
                    return outcome;
                }
            }
        }
    }

    /// One optimizer step: micro-batches of rollout, reward and backprop, then clipping and AdamW. What it wants to know of
    /// its numbers is in the ledger, which is read when the update is computed and nothing has become the run's state.
    fn step(&self, state: &mut Checkpoint, lr: f64, progress: &ProgressBar, mut ledger: Ledger) -> Result<Outcome> {
        let Config { train, optimizer, truncation, regularization, .. } = self.config;
        let Self { model, noise, .. } = self;
        let step = state.step as u64;
        let global_batch = train.batch_size * train.gradient_accumulation_steps;
        let loss_scale = state.loss_scale.map_or(1.0, |scale| scale.get());
        // the loss is a mean over the global batch
        let images = global_batch as f64 / loss_scale;
        let mut sum = LoraGradients::new(&state.adapters);
        let (mut judged, mut kept_steps) = (Vec::new(), 0);

        for micro_batch in 0..train.gradient_accumulation_steps as u64 {
            let size = train.batch_size as u64;
            let samples = micro_batch * size..(micro_batch + 1) * size;
            let prompts: Vec<Prompt> = samples
                .clone()
                .map(|sample| self.prompts[noise.below(Stream::Prompts, step, sample, self.prompts.len())].clone())
                .collect();
            let plan = Plan::new(truncation, &model.schedule, noise, step, samples.clone())?;
            let prompting = model.prompting(&prompts, &mut ledger)?;
            let x_t = model.noise(noise, Stream::Latents, step, samples.clone())?;
            let variance = |i| model.variance_noise(noise, step, i, samples.clone());

            let unet = &model.pipeline.unet;
            let recorded = plan.recorded(train.stored_steps);
            let record = |i: usize| recorded[i];
            let (steps, adapters) = (&plan.steps, &state.adapters);
            let mut trajectory =
                recorded_rollout(unet, steps, x_t, &prompting, adapters, variance, record, &mut ledger)?;
            let batch = Batch { plan: &plan, prompting: &prompting, prompts: &prompts, images };
            judged.push(if plan.renoise > 0 {
                self.renoised(&batch, &trajectory, samples, step, &state.adapters, &mut sum, &mut ledger)?
            } else {
                vec![self.back(&batch, &mut trajectory, &state.adapters, &mut sum, &mut ledger)?]
            });
            kept_steps += plan.kept_count();
            progress.inc(1);
        }

        // a random rule may detach every step of a batch: there is nothing to learn from it
        let update = match sum.is_empty() {
            true => None,
            false => Some(self.update(state, sum, loss_scale, lr, &mut ledger)?),
        };
        // a step's one wait for a GPU: all of it is checked before any of it becomes the run's state
        let readings = ledger.read()?;
        let mut grad_norm = 0.0;
        if let Some(Update { adapters, optimizer, norm }) = update {
            grad_norm = readings.get(norm);
            if optimizer.step == 1 {
                health::ensure_moved(&state.adapters, &adapters, grad_norm)?;
            }
            if let Some(ema) = &mut state.ema {
                let decay = regularization.ema_decay;
                *ema = ema.with_tensors(moving_average(&ema.tensors(), &adapters.tensors(), decay)?)?;
            }
            state.adapters = adapters;
            state.optimizer = optimizer;
        }
        state.step += 1;

        let (mut scores, mut losses, mut distances) = (Vec::new(), Vec::new(), Vec::new());
        for image in judged.iter().flat_map(|judged| self.verdicts(judged, &readings)) {
            scores.push(image.scores);
            losses.push(image.loss);
            distances.push(image.distance);
        }
        let column = |r: usize| scores.iter().map(move |row: &Vec<f64>| row[r]);
        let statistics = (0..self.rewards.names().len()).map(|r| mean_std(&column(r).collect::<Vec<_>>()));
        let (mean_scores, std_scores) = statistics.unzip();
        Ok(Outcome {
            mean_scores,
            std_scores,
            loss: optimizer.loss_coeff * mean_std(&losses).0,
            grad_norm,
            distance: (regularization.kl_weight > 0.0).then(|| mean_std(&distances).0),
            kept_steps: kept_steps as f64 / global_batch as f64,
        })
    }

    /// Back through rewards and decoder, and through the chain, with the pull towards the base model where the loss has one.
    /// The loss is a mean over `batch.images`, which a loss scale makes fewer.
    fn back(
        &self,
        batch: &Batch,
        trajectory: &mut Trajectory,
        adapters: &Adapters,
        sum: &mut LoraGradients,
        ledger: &mut Ledger,
    ) -> Result<Judged> {
        let Config { train, optimizer, regularization, .. } = self.config;
        let (Batch { plan, prompting, prompts, images }, pipeline) = (batch, &self.model.pipeline);
        let (scale, checkpointing) = (optimizer.loss_coeff / images, train.checkpointing.into());
        let latents = &trajectory.latents;
        let credit = reward_cotangent(&pipeline.vae, self.rewards, latents, prompts, scale, checkpointing, ledger)?;
        let kl_scale = optimizer.loss_coeff * regularization.kl_weight / images;
        let mut anchor = (regularization.kl_weight > 0.0).then(|| Anchor::new(kl_scale, prompts.len()));
        let (pull, d) = (anchor.as_mut(), &credit.d_latents);
        let unet = &pipeline.unet;
        anchored_backprop(unet, adapters, trajectory, plan, prompting, d, checkpointing, pull, sum, ledger)?;
        Ok(Judged { scores: credit.scores, anchor })
    }

    /// After DRaFT-LV (Clark et al. 2024): the images are noised to the last step's level and denoised again, several
    /// times; the gradients of those last steps are averaged. Scores and losses are averages too. The paper adds the
    /// gradient of the chain's own last step; here each of the averaged steps is a noised one.
    #[allow(clippy::too_many_arguments)]
    fn renoised(
        &self,
        batch: &Batch,
        trajectory: &Trajectory,
        samples: std::ops::Range<u64>,
        step: u64,
        adapters: &Adapters,
        sum: &mut LoraGradients,
        ledger: &mut Ledger,
    ) -> Result<Vec<Judged>> {
        let Batch { plan, prompting, prompts, images } = batch;
        let Model { pipeline, schedule, .. } = self.model;
        let last = schedule.len() - 1;
        let (signal, spread) = schedule.add_noise(last);
        let only_last = &Plan {
            steps: vec![plan.steps[last]],
            keep: vec![vec![true; prompts.len()]],
            detach_input: false,
            renoise: 0,
        };
        let batch = Batch { plan: only_last, prompting, prompts, images: images * plan.renoise as f64 };
        let mut judged = Vec::with_capacity(plan.renoise);
        for repetition in 0..plan.renoise {
            let z = self.model.noise(self.noise, Stream::Renoise, counter(step, repetition), samples.clone())?;
            let x_1 = ((&trajectory.latents * signal)? + (z * spread)?)?;
            // places after the chain's own
            let variance = |_| self.model.variance_noise(self.noise, step, last + 1 + repetition, samples.clone());
            let record = |_| self.config.train.stored_steps > 0;
            let (unet, steps) = (&pipeline.unet, &only_last.steps);
            let mut again = recorded_rollout(unet, steps, x_1, prompting, adapters, variance, record, ledger)?;
            judged.push(self.back(&batch, &mut again, adapters, sum, ledger)?);
        }
        Ok(judged)
    }

    /// Clipping and AdamW. Changes nothing of the run's state.
    fn update(
        &self,
        state: &Checkpoint,
        sum: LoraGradients,
        loss_scale: f64,
        lr: f64,
        ledger: &mut Ledger,
    ) -> Result<Update> {
        let mut gradients = sum.finish(&state.adapters)?;
        unscale(&mut gradients, loss_scale)?;
        health::ensure_finite("the LoRA gradient", &state.adapters, &gradients, ledger)?;
        let norm = ledger.number(&clip_grad_norm(&mut gradients, self.config.optimizer.max_grad_norm)?)?;
        let mut optimizer = state.optimizer.clone();
        let updated = optimizer.update(&state.adapters.tensors(), &gradients, lr)?;
        let of = format!("AdamW's update (with a learning rate of {lr})");
        health::ensure_finite(&of, &state.adapters, &updated, ledger)?;
        Ok(Update { adapters: state.adapters.with_tensors(updated)?, optimizer, norm })
    }

    /// What was found of each image of a batch: a mean, where it was judged several times.
    fn verdicts(&self, judged: &[Judged], readings: &Readings) -> Vec<Verdict> {
        let mut repetitions = judged.iter().map(|judged| judged.verdicts(self, readings));
        let mut mean = repetitions.next().unwrap_or_default();
        for (sum, verdict) in repetitions.flat_map(|r| r.into_iter().enumerate()) {
            let sum = &mut mean[sum];
            sum.scores.iter_mut().zip(verdict.scores).for_each(|(sum, score)| *sum += score);
            sum.loss += verdict.loss;
            sum.distance += verdict.distance;
        }
        for verdict in &mut mean {
            let values = verdict.scores.iter_mut().chain([&mut verdict.loss, &mut verdict.distance]);
            values.for_each(|value| *value /= judged.len() as f64);
        }
        mean
    }
}

impl Outcome {
    pub(super) fn metrics(
        &self,
        rewards: &Rewards,
        state: &Checkpoint,
        lr: f64,
        elapsed: Duration,
    ) -> Map<String, Json> {
        let mut line = Map::from_iter([("step".to_owned(), json!(state.step)), ("loss".to_owned(), json!(self.loss))]);
        for (r, name) in rewards.names().iter().enumerate() {
            line.insert(format!("reward/{name}"), json!(self.mean_scores[r]));
            line.insert(format!("reward/{name}_std"), json!(self.std_scores[r]));
        }
        line.insert("grad_norm".into(), json!(self.grad_norm));
        if let Some(distance) = self.distance {
            line.insert("distance".into(), json!(distance));
        }
        line.insert("lr".into(), json!(lr));
        line.insert("backprop_steps".into(), json!(self.kept_steps));
        line.insert("seconds".into(), json!((elapsed.as_secs_f64() * 1e3).round() / 1e3));
        line
    }
}

fn mean_std(values: &[f64]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

#[cfg(test)]
mod tests {
    use super::super::start;
    use super::*;
    use crate::commands::experiment::EMBEDDED;
    use crate::config::Precision;
    use crate::diffusion::Noise;
    use crate::ops::device::Compute;
    use crate::ops::testing::relative_error;
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

    /// One step from the start with this ledger, and the state after it.
    fn step(settings: &[&str], lr: f64, first: f32, ledger: Ledger) -> (Result<Outcome>, Checkpoint, Checkpoint) {
        step_on(&Compute::cpu(), settings, lr, first, ledger)
    }

    fn step_on(
        compute: &Compute,
        settings: &[&str],
        lr: f64,
        first: f32,
        ledger: Ledger,
    ) -> (Result<Outcome>, Checkpoint, Checkpoint) {
        let settings: Vec<String> = SETTINGS.iter().chain(settings).map(|set| (*set).to_owned()).collect();
        let mut config = Config::parse(EMBEDDED.0, EMBEDDED.1, &settings).unwrap();
        let noise = Noise::new(1);
        let model = Model::load(&config, compute).unwrap();
        let rewards = Rewards::load_on(&config.reward, &model.pipeline.tokenizer, compute).unwrap();
        let rewards = rewards.with_caps(&config.regularization.reward_cap);
        let prompts = config.prompts.load().unwrap();
        let mut before = start(&mut config, &model, &noise).unwrap();
        let mut tensors = before.adapters.tensors();
        tensors[1] = (&tensors[1] + f64::from(first)).unwrap();
        before.adapters = before.adapters.with_tensors(tensors).unwrap();
        let trainer = Trainer {
            config: &config,
            model: &model,
            rewards: &rewards,
            prompts: &prompts,
            sample_prompts: &prompts,
            noise: &noise,
        };
        let mut state = before.clone();
        let outcome = trainer.step(&mut state, lr, &ProgressBar::hidden(), ledger);
        (outcome, before, state)
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
                let (outcome, before, after) = step(settings, 1e-3, 0.0, ledger);
                let outcome = outcome.unwrap();
                assert!(bits(&before) != bits(&after) && outcome.grad_norm > 0.0 && after.step == 1);
                let Outcome { mean_scores, std_scores, loss, grad_norm, distance, kept_steps } = outcome;
                assert_eq!(mean_scores.len(), 3);
                ((mean_scores, std_scores), (loss, grad_norm, distance, kept_steps), bits(&after))
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
            let (outcome, before, after) =
                step_on(&compute, &["optimizer.loss_coeff=1e-5"], 1e-3, 0.0, Ledger::default());
            assert_eq!(before.loss_scale.is_some(), precision == Precision::F16);
            let outcome = outcome.unwrap();
            (outcome.mean_scores[0], outcome.grad_norm, after.optimizer.moments)
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
                let (outcome, before, after) = step(settings, lr, first, ledger);
                let error = outcome.err().unwrap();
                assert!(health::is_not_a_number(&error));
                assert!(bits(&before) == bits(&after) && (after.step, after.optimizer.step) == (0, 0));
                format!("{error:#}")
            };
            let now = run(Ledger::default());
            assert!(now.contains(message), "{now}");
            assert_eq!(run(Ledger::always_later()), now);
        }
    }
}
