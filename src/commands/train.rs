//! `alignprop train`: the loop.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value as Json, json};

use super::experiment::{EMBEDDED, Model, config_of, counter};
use super::report::write_report;
use super::{budget, open_device, pictures};
use crate::cli::TrainArgs;
use crate::config::{Config, RunConfig};
use crate::diffusion::{Noise, Stream};
use crate::lora::{Adapters, formats, take_over};
use crate::nn::lora::LoraGradients;
use crate::ops::{Ledger, Number, Readings};
use crate::optim::{AdamW, clip_grad_norm, learning_rate, moving_average};
use crate::rewards::{Rewards, Scores};
use crate::training::checkpoint::{Checkpoint, EMA};
use crate::training::guard::{Guard, best_checkpoint};
use crate::training::health;
use crate::training::loss_scale::{LossScale, unscale};
use crate::training::memory::{self, Estimate, Meter};
use crate::training::run_folder::RunFolder;
use crate::training::signals::{Interrupt, Interrupted};
use crate::training::{Anchor, Plan, Prompting, Trajectory, anchored_backprop, reward_cotangent, rollout};

pub fn run(args: &TrainArgs) -> Result<()> {
    let mut config = resolve_config(args)?;
    let compute = open_device(&mut config, args.device.as_deref(), args.precision)?;
    config.require_trained()?;
    let prompts = config.prompts.load()?;
    if args.resume.is_none() {
        RunFolder::check_free(&config.run.dir)?; // before gigabytes are read
    }
    let model = Model::load(&config, &compute)?;
    let tokenizer = &model.pipeline.tokenizer;
    let rewards = Rewards::load_on(&config.reward, tokenizer, &compute)?.with_caps(&config.regularization.reward_cap);
    let guard = Guard::load(&config, &prompts, tokenizer, &compute)?;
    let noise = Noise::new(config.run.seed);
    let mut state = match &args.resume {
        Some(dir) => resume(dir, &mut config, &model, &noise)?,
        None => start(&mut config, &model, &noise)?,
    }
    .to_device(compute.device())?;
    describe(&config, &model, &rewards, &prompts, &state)?;
    let sample_prompts = match &config.run.sample_prompts {
        Some(sample_prompts) => sample_prompts.load().context("in run.sample_prompts")?,
        None => prompts.clone(),
    };
    let estimate = budget::plan(&mut config, &model, &rewards, &state.adapters)?;
    let config = config;
    if args.dry_run {
        println!("dry run: nothing was trained and nothing was written");
        return Ok(());
    }
    let interrupt = Interrupt::listen()?;
    let run = match &args.resume {
        Some(dir) => {
            let run = RunFolder::open(dir)?;
            run.recover()?;
            run.save_config(&config.to_toml()?)?;
            run.rewind_metrics(state.step)?;
            run
        }
        None => RunFolder::create(&config.run.dir, &config.to_toml()?)?,
    };
    let trainer = Trainer {
        config: &config,
        model: &model,
        rewards: &rewards,
        prompts: &prompts,
        sample_prompts: &sample_prompts,
        noise: &noise,
    };
    let metadata = |step| metadata(&config, &rewards, step);
    let save = |state: &Checkpoint| -> Result<()> {
        if !run.checkpoint(state.step).exists() {
            state.save(&run.checkpoints(), &metadata(state.step)).with_context(|| going_on(&run))?;
        }
        Ok(())
    };
    save(&state)?; // so that a run can be resumed from its first moment on
    let progress = progress_bar(&config, state.step);
    let meter = Meter::of(&compute);
    meter.reset_peak()?;

    let end = args.stop_at.map_or(config.train.steps, |step| step.min(config.train.steps));
    let mut objection = None;
    loop {
        // what belongs to the step that is done; a run that goes on may have been killed before it
        let asked_to_stop = interrupt.received().is_some();
        if !asked_to_stop && trainer.samples_due(state.step) && !trainer.has_samples(&run, state.step)? {
            trainer.draw_samples(&run, &state)?;
        }
        if let Some(guard) = guard.as_ref().filter(|_| !asked_to_stop) {
            if guard.due(state.step, config.train.steps) && !Guard::has_evaluated(&run, state.step)? {
                trainer.evaluate(guard, &run, &state)?;
            }
            objection = guard.objection(&run)?;
        }
        if let Some(signal) = interrupt.received() {
            save(&state)?;
            progress.finish_and_clear();
            let (step, steps, resume) = (state.step, config.train.steps, run.resume_command());
            return Err(Interrupted { signal, step, steps, resume }.into());
        }
        if state.step >= end || objection.is_some() {
            break;
        }

        let started = Instant::now();
        let lr = learning_rate(&config.optimizer, state.step, config.train.steps);
        match trainer.scaled_step(&mut state, lr, &progress) {
            Ok(outcome) => {
                run.log(&outcome.metrics(&rewards, &state, lr, started.elapsed())).with_context(|| going_on(&run))?;
                progress.set_message(summary(&run, &rewards, &outcome.mean_scores)?);
                // only now: the last checkpoint has made a finite step
                trainer.prune(&run)?;
            }
            Err(error) if health::is_not_a_number(&error) => trainer.skip(&run, &mut state, error, &progress)?,
            Err(error) => return Err(error.context(in_step(state.step + 1, &run))),
        }
        let due = |every: usize| every > 0 && state.step.is_multiple_of(every);
        if due(config.run.save_every) || due(config.guard.every) || state.step == end {
            save(&state)?;
            write_report(&run, &config).with_context(|| going_on(&run))?;
        }
    }
    progress.finish_and_clear();
    save(&state)?;
    trainer.prune(&run)?;
    if state.step < config.train.steps && objection.is_none() {
        println!("stopped after step {} of {}; go on with `{}`", state.step, config.train.steps, run.resume_command());
        return Ok(());
    }
    if let Some(objection) = objection {
        println!("stopped after step {} of {} by the guard: {objection}", state.step, config.train.steps);
        println!("to go on all the same: `{} --set guard.patience=0`", run.resume_command());
    }
    let adapters = config.run.dir.join("pytorch_lora_weights.safetensors");
    formats::save(&state.adapters, &metadata(state.step), &adapters).with_context(|| going_on(&run))?;
    if let Some(ema) = &state.ema {
        formats::save(ema, &metadata(state.step), &config.run.dir.join(EMA)).with_context(|| going_on(&run))?;
    }
    report(&config, &run, &rewards, &adapters)?;
    report_memory(estimate, meter)?;
    Ok(())
}

/// What every optimizer step needs and none changes.
struct Trainer<'a> {
    config: &'a Config,
    model: &'a Model,
    rewards: &'a Rewards,
    prompts: &'a [String],
    sample_prompts: &'a [String],
    noise: &'a Noise,
}

/// What a way back is given.
struct Batch<'a> {
    plan: &'a Plan,
    prompting: &'a Prompting,
    prompts: &'a [String],
    /// What the loss is a mean over.
    images: f64,
}

/// What a way back found of its images, known when the ledger is read.
struct Judged {
    scores: Vec<Scores>,
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
        let verdict = |(image, scores): (usize, &Scores)| {
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
struct Outcome {
    /// Mean and standard deviation over the global batch, one each for every reward.
    mean_scores: Vec<f64>,
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
    fn scaled_step(&self, state: &mut Checkpoint, lr: f64, progress: &ProgressBar) -> Result<Outcome> {
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
            let prompts: Vec<String> = samples
                .clone()
                .map(|sample| self.prompts[noise.below(Stream::Prompts, step, sample, self.prompts.len())].clone())
                .collect();
            let plan = Plan::new(truncation, &model.schedule, noise, step, samples.clone())?;
            let prompting = model.prompting(&prompts, &mut ledger)?;
            let x_t = model.noise(noise, Stream::Latents, step, samples.clone())?;
            let variance = |i| model.variance_noise(noise, step, i, samples.clone());

            let unet = &model.pipeline.unet;
            let trajectory = rollout(unet, &plan.steps, x_t, &prompting, &state.adapters, variance, &mut ledger)?;
            let batch = Batch { plan: &plan, prompting: &prompting, prompts: &prompts, images };
            judged.push(if plan.renoise > 0 {
                self.renoised(&batch, &trajectory, samples, step, &state.adapters, &mut sum, &mut ledger)?
            } else {
                vec![self.back(&batch, &trajectory, &state.adapters, &mut sum, &mut ledger)?]
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
        trajectory: &Trajectory,
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
            let again = rollout(&pipeline.unet, &only_last.steps, x_1, prompting, adapters, variance, ledger)?;
            judged.push(self.back(&batch, &again, adapters, sum, ledger)?);
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

    /// Passes over a step that met a number which is not finite: adapters and moments stay, the metrics say so.
    ///
    /// # Errors
    /// It was one too many in a row: the last good state is saved.
    fn skip(&self, run: &RunFolder, state: &mut Checkpoint, error: Error, progress: &ProgressBar) -> Result<()> {
        let (step, before) = (state.step + 1, health::skipped_in_a_row(run, state.step)?);
        if before >= self.config.train.max_skipped_steps {
            state.step -= before;
            if !run.checkpoint(state.step).exists() {
                state.save(&run.checkpoints(), &metadata(self.config, self.rewards, state.step))?;
            }
            let skipped = if before > 0 { format!(" (the {before} before it were skipped)") } else { String::new() };
            return Err(error.context(format!("{}{skipped}", in_step(step, run))));
        }
        progress.suspend(|| eprintln!("warning: optimizer step {step} is skipped: {error:#}"));
        progress.set_position((step * self.config.train.gradient_accumulation_steps) as u64);
        state.step = step;
        let entries = [("step", json!(step)), ("skipped", json!(1)), ("cause", json!(format!("{error:#}")))];
        run.log(&entries.map(|(key, value)| (key.to_owned(), value)).into_iter().collect())
    }

    /// Removes old checkpoints, but not the best one.
    fn prune(&self, run: &RunFolder) -> Result<()> {
        let RunConfig { keep_checkpoints, keep_best, .. } = self.config.run;
        let best = if keep_best { best_checkpoint(run)? } else { None };
        Checkpoint::prune(&run.checkpoints(), keep_checkpoints, best.map(|best| best.step))
    }

    /// The guard's images of this state, scored, in the metrics.
    fn evaluate(&self, guard: &Guard, run: &RunFolder, state: &Checkpoint) -> Result<()> {
        let image = |prompt: &str, number, seed| self.model.watched_image(prompt, number, seed, &state.adapters);
        let mut line = Map::from_iter([("step".to_owned(), json!(state.step))]);
        line.extend(guard.evaluate(self.rewards, image)?);
        run.log(&line)
    }

    /// Whether a sample grid belongs to this step.
    fn samples_due(&self, step: usize) -> bool {
        let every = self.config.run.sample_every;
        every > 0 && (step.is_multiple_of(every) || step == self.config.train.steps)
    }

    /// Whether the step's grid and scores are there: a run may have been killed before them.
    fn has_samples(&self, run: &RunFolder, step: usize) -> Result<bool> {
        let name = self.rewards.names().into_iter().next().unwrap_or_default();
        let scored = run.history(&format!("sample/{name}"))?.iter().any(|(at, _)| *at == step);
        Ok(scored && run.samples(step).is_file())
    }

    /// A grid of images on fixed prompts and noise, and their scores in the metrics.
    fn draw_samples(&self, run: &RunFolder, state: &Checkpoint) -> Result<()> {
        let run_config = &self.config.run;
        let prompts: Vec<String> = self.sample_prompts.iter().cycle().take(run_config.num_samples).cloned().collect();
        let (mut images, mut scores) = (Vec::new(), Vec::new());
        for (number, prompt) in (0..).zip(&prompts) {
            let image = self.model.images(std::slice::from_ref(prompt), number, run_config.seed, &state.adapters)?;
            scores.push(self.rewards.scores(&image, prompt)?);
            images.push(pictures::enlarge(pictures::to_rgb(&image.get(0)?)?, 128));
        }
        let names = self.rewards.names();
        let captions: Vec<String> =
            prompts.iter().zip(&scores).map(|(prompt, row)| pictures::caption(prompt, &names, row)).collect();
        let images = pictures::captioned(images, &captions);
        pictures::save_png(&pictures::grid(&images, 4)?, &run.samples(state.step))?;
        run.log_samples(state.step)?;
        let mut line = Map::from_iter([("step".to_owned(), json!(state.step))]);
        for (r, name) in self.rewards.names().iter().enumerate() {
            let mean = scores.iter().map(|row| row[r]).sum::<f64>() / scores.len() as f64;
            line.insert(format!("sample/{name}"), json!(mean));
        }
        let loss = scores.iter().map(|row| self.rewards.loss(row)).sum::<f64>() / scores.len() as f64;
        line.insert("sample/loss".to_owned(), json!(loss));
        run.log(&line)?;
        write_report(run, self.config)
    }
}

impl Outcome {
    fn metrics(&self, rewards: &Rewards, state: &Checkpoint, lr: f64, elapsed: Duration) -> Map<String, Json> {
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

/// The config of the command line: a file, or a run's own where it is resumed.
fn resolve_config(args: &TrainArgs) -> Result<Config> {
    let set = &args.config.set;
    match (&args.resume, &args.config.config) {
        (Some(_), Some(_)) => {
            bail!("--resume goes on with the run's own config: leave --config out and change settings with --set")
        }
        (Some(dir), None) => {
            let mut config = Config::load(&RunFolder::open(dir)?.config(), set)?;
            config.run.dir.clone_from(dir); // the folder may have been moved
            Ok(config)
        }
        (None, path) => config_of(path.as_deref(), set, EMBEDDED),
    }
}

/// Fresh adapters, or those of `lora.init_from`, whose rank, alpha and layers the config then has.
fn start(config: &mut Config, model: &Model, noise: &Noise) -> Result<Checkpoint> {
    let adapters = match &config.lora.init_from.clone() {
        Some(file) => {
            let adapters = model.load_lora(file).context("lora.init_from")?.adapters;
            take_over(&mut config.lora, &adapters, &model.pipeline.unet.targets(), file)?;
            adapters
        }
        None => fresh(config, model, noise)?,
    };
    let ema = (config.regularization.ema_decay > 0.0).then(|| adapters.clone());
    let optimizer = AdamW::new(&config.optimizer, &adapters.tensors())?;
    let loss_scale = LossScale::new(model.compute().dtype());
    Ok(Checkpoint { step: 0, optimizer, adapters, ema, loss_scale })
}

fn fresh(config: &Config, model: &Model, noise: &Noise) -> Result<Adapters> {
    let lora = &config.lora;
    let normal = |i: usize, n: usize| noise.normal(Stream::LoraInit, 0, i as u64, n);
    let targets = model.pipeline.unet.targets();
    Adapters::init(&targets, &lora.target_modules_or_default(), lora.rank_or_default(), lora.alpha_or_rank(), normal)
}

fn resume(dir: &Path, config: &mut Config, model: &Model, noise: &Noise) -> Result<Checkpoint> {
    let run = RunFolder::open(dir)?;
    if run.has_not_begun()? {
        return start(config, model, noise);
    }
    let folder = run.last_checkpoint()?;
    let mut checkpoint = Checkpoint::load(&folder, &config.optimizer)?;
    let targets = model.pipeline.unet.targets();
    checkpoint.adapters.check_fits(&targets)?;
    // the settings must be those of the adapters: a run keeps its shape
    let fresh = match &config.lora.init_from {
        Some(_) => {
            take_over(&mut config.lora.clone(), &checkpoint.adapters, &targets, &folder)?;
            checkpoint.adapters.clone()
        }
        None => fresh(config, model, noise)?,
    };
    let shape = |adapters: &Adapters| {
        adapters.factors().iter().map(|f| (f.module.clone(), f.rank(), f.alpha)).collect::<Vec<_>>()
    };
    ensure!(
        shape(&fresh) == shape(&checkpoint.adapters),
        "lora.rank, lora.alpha or lora.target_modules differ from those of {}: a run keeps its adapters; start another one for others",
        folder.display()
    );
    // an average that is asked for from here on starts here
    let averaged = config.regularization.ema_decay > 0.0;
    checkpoint.ema = averaged.then(|| checkpoint.ema.unwrap_or_else(|| checkpoint.adapters.clone()));
    // and so does a loss scale, if the run goes on in another precision
    let scale = LossScale::new(model.compute().dtype());
    checkpoint.loss_scale = scale.map(|start| checkpoint.loss_scale.unwrap_or(start));
    Ok(checkpoint)
}

/// Where an error came from, and that nothing is lost.
fn in_step(step: usize, run: &RunFolder) -> String {
    format!("in optimizer step {step}; the checkpoints in {} are intact", run.checkpoints().display())
}

/// What to do when the disk is full, or the folder gone.
fn going_on(run: &RunFolder) -> String {
    match run.last_checkpoint() {
        Ok(last) => {
            format!(
                "saving failed; the last good checkpoint is {}; go on with `{}`",
                last.display(),
                run.resume_command()
            )
        }
        Err(_) => "saving failed, and no checkpoint is to be found".to_owned(),
    }
}

/// What the adapter's file says of its making.
fn metadata(config: &Config, rewards: &Rewards, step: usize) -> HashMap<String, String> {
    let rule = toml::to_string(&config.truncation).unwrap_or_default().trim().replace('\n', ", ");
    let rewards: Vec<String> = rewards.iter().map(|r| format!("{}={}", r.name, r.weight)).collect();
    HashMap::from(
        [
            ("software", format!("alignprop {}", env!("CARGO_PKG_VERSION"))),
            ("base_model", config.model.path.clone()),
            ("reward", rewards.join(" ")),
            ("truncation", rule),
            ("seed", config.run.seed.to_string()),
            ("step", step.to_string()),
        ]
        .map(|(key, value)| (key.to_owned(), value)),
    )
}

/// The run's head, on stderr.
fn describe(config: &Config, model: &Model, rewards: &Rewards, prompts: &[String], state: &Checkpoint) -> Result<()> {
    let (height, width) = model.image_size();
    let Config { train, sampler, .. } = config;
    let batch = train.batch_size * train.gradient_accumulation_steps;
    let rule = toml::to_string(&config.truncation)?.trim().replace('\n', ", ");
    eprintln!(
        "model       {} ({height}x{width}, {} DDIM steps, guidance {})",
        config.model.path, sampler.num_inference_steps, sampler.guidance_scale
    );
    eprintln!(
        "adapters    rank {} on {} layers, {} parameters",
        state.adapters.ranks(),
        state.adapters.factors().len(),
        state.adapters.parameter_count()
    );
    eprintln!("device      {}, {}", model.compute().describe(), model.compute().precision_name());
    let names: Vec<String> = rewards
        .iter()
        .map(|r| if r.weight == 1.0 { r.name.to_owned() } else { format!("{} x {}", r.weight, r.name) })
        .collect();
    eprintln!("reward      {} on {} prompts", names.join(" + "), prompts.len());
    eprintln!("truncation  {rule}");
    eprintln!("steps       {} of {batch} images, from step {}", train.steps, state.step);
    for (prompt, tokens) in model.truncated_prompts(prompts)? {
        eprintln!(
            "warning: `{prompt}` has {tokens} tokens; the text encoder reads the first {}",
            model.pipeline.tokenizer.max_length()
        );
    }
    Ok(())
}

/// One tick a micro-batch, so that the time left is smooth; drawn on a terminal only.
fn progress_bar(config: &Config, done: usize) -> ProgressBar {
    let per_step = config.train.gradient_accumulation_steps as u64;
    let bar = ProgressBar::with_draw_target(Some(config.train.steps as u64 * per_step), ProgressDrawTarget::stderr());
    bar.set_position(done as u64 * per_step);
    bar.reset_eta();
    let style = ProgressStyle::with_template("{percent:>3}% {wide_bar} {elapsed} (left {eta})  {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// `aesthetic 5.31 (+0.42)`: the batch's mean and its distance from the first batch's.
fn summary(run: &RunFolder, rewards: &Rewards, now: &[f64]) -> Result<String> {
    let mut parts = Vec::with_capacity(now.len());
    for (name, now) in rewards.names().into_iter().zip(now) {
        let first = run.history(&format!("reward/{name}"))?.first().map_or(*now, |(_, first)| *first);
        parts.push(format!("{name} {now:.4} ({:+.4})", now - first));
    }
    Ok(parts.join("  "))
}

/// What the run came to, on stdout, from its metrics.
fn report(config: &Config, run: &RunFolder, rewards: &Rewards, adapters: &Path) -> Result<()> {
    for name in rewards.names() {
        let batches = run.history(&format!("reward/{name}"))?;
        if let (Some((_, first)), Some((step, last))) = (batches.first(), batches.last()) {
            println!("{name}: {first:.4} in the first batch, {last:.4} in that of step {step}");
        }
        let samples = run.history(&format!("sample/{name}"))?;
        if let [(_, before), .., (_, after)] = samples.as_slice() {
            println!(
                "{name}: {before:.4} before, {after:.4} after, on {} images of the same prompts and noise",
                config.run.num_samples
            );
        }
    }
    if let Some(best) = best_checkpoint(run)?.filter(|_| config.run.keep_best) {
        println!("best checkpoint: {} ({} {:.4})", run.checkpoint(best.step).display(), best.by, best.score);
    }
    println!("adapter: {}", adapters.display());
    println!("run: {}", config.run.dir.display());
    Ok(())
}

/// The measured peak beside its estimate, on stderr.
fn report_memory(estimate: Option<Estimate>, meter: Meter) -> Result<()> {
    let Some(estimate) = estimate else { return Ok(()) };
    let peak = meter.peak()? as f64;
    let resident = meter.held().map(|bytes| format!("; resident at most {}", memory::size(bytes)));
    eprintln!(
        "memory      {} at the peak, {} estimated (ratio {:.2}){}",
        memory::size(peak),
        memory::size(estimate.total()),
        estimate.total() / peak,
        resident.unwrap_or_default()
    );
    Ok(())
}

fn mean_std(values: &[f64]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::device::Compute;

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
        let settings: Vec<String> = SETTINGS.iter().chain(settings).map(|set| (*set).to_owned()).collect();
        let mut config = Config::parse(EMBEDDED.0, EMBEDDED.1, &settings).unwrap();
        let (compute, noise) = (Compute::cpu(), Noise::new(1));
        let model = Model::load(&config, &compute).unwrap();
        let rewards = Rewards::load(&config.reward, &model.pipeline.tokenizer).unwrap();
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
