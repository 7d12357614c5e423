//! `alignprop train`: the loop.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candle_core::Tensor;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value as Json, json};

use super::experiment::{EMBEDDED, Model, config_of, counter};
use super::report::write_report;
use super::{check_device, pictures};
use crate::cli::TrainArgs;
use crate::config::Config;
use crate::diffusion::{Noise, Stream};
use crate::lora::{Adapters, formats};
use crate::nn::lora::LoraGradients;
use crate::ops::is_finite;
use crate::optim::{AdamW, clip_grad_norm, learning_rate};
use crate::rewards::Rewards;
use crate::training::checkpoint::Checkpoint;
use crate::training::run_folder::RunFolder;
use crate::training::{Credit, Plan, Prompting, Trajectory, backprop, reward_cotangent, rollout};

pub fn run(args: &TrainArgs) -> Result<()> {
    let config = resolve_config(args)?;
    check_device(&config.run.device, config.run.precision)?;
    config.require_trained()?;
    let prompts = config.prompts.load()?;
    if args.resume.is_none() {
        RunFolder::check_free(&config.run.dir)?; // before gigabytes are read
    }
    let model = Model::load(&config)?;
    let rewards = Rewards::load(&config.reward, &model.pipeline.tokenizer)?;
    let noise = Noise::new(config.run.seed);
    let mut state = match &args.resume {
        Some(dir) => resume(dir, &config, &model)?,
        None => start(&config, &model, &noise)?,
    };
    describe(&config, &model, &rewards, &prompts, &state)?;
    if args.dry_run {
        println!("dry run: nothing was trained and nothing was written");
        return Ok(());
    }
    let run = match &args.resume {
        Some(dir) => {
            let run = RunFolder::open(dir)?;
            run.save_config(&config.to_toml()?)?;
            run.rewind_metrics(state.step)?;
            run
        }
        None => RunFolder::create(&config.run.dir, &config.to_toml()?)?,
    };
    let trainer = Trainer { config: &config, model: &model, rewards: &rewards, prompts: &prompts, noise: &noise };
    let save = |state: &Checkpoint| state.save(&run.checkpoints(), &metadata(&config, &rewards, state.step));
    let progress = progress_bar(&config, state.step);
    if args.resume.is_none() {
        save(&state)?; // so that a run can be resumed from its first moment on
    }
    if trainer.samples_due(state.step) && !trainer.has_samples(&run, state.step)? {
        trainer.draw_samples(&run, &state)?;
    }

    let end = args.stop_at.map_or(config.train.steps, |step| step.min(config.train.steps));
    while state.step < end {
        let started = Instant::now();
        let lr = learning_rate(&config.optimizer, state.step, config.train.steps);
        let outcome = trainer.step(&mut state, lr, &progress).with_context(|| {
            format!(
                "in optimizer step {}; the checkpoints in {} are intact",
                state.step + 1,
                run.checkpoints().display()
            )
        })?;
        // only now: the last checkpoint has made a finite step
        Checkpoint::prune(&run.checkpoints(), config.run.keep_checkpoints)?;
        run.log(&outcome.metrics(&rewards, &state, lr, started.elapsed()))?;
        progress.set_message(summary(&run, &rewards, &outcome.mean_scores)?);
        let due = |every: usize| every > 0 && state.step.is_multiple_of(every);
        if due(config.run.save_every) || state.step == end {
            save(&state)?;
            write_report(&run, &config)?;
        }
        if trainer.samples_due(state.step) {
            trainer.draw_samples(&run, &state)?;
        }
    }
    progress.finish_and_clear();
    Checkpoint::prune(&run.checkpoints(), config.run.keep_checkpoints)?;
    if state.step < config.train.steps {
        println!(
            "stopped after step {} of {}; go on with `alignprop train --resume {}`",
            state.step,
            config.train.steps,
            config.run.dir.display()
        );
        return Ok(());
    }
    let adapters = config.run.dir.join("pytorch_lora_weights.safetensors");
    formats::save(&state.adapters, &metadata(&config, &rewards, state.step), &adapters)?;
    report(&config, &run, &rewards, &adapters)
}

/// What every optimizer step needs and none changes.
struct Trainer<'a> {
    config: &'a Config,
    model: &'a Model,
    rewards: &'a Rewards,
    prompts: &'a [String],
    noise: &'a Noise,
}

/// What one optimizer step found.
struct Outcome {
    /// Mean and standard deviation over the global batch, one each for every reward.
    mean_scores: Vec<f64>,
    std_scores: Vec<f64>,
    loss: f64,
    grad_norm: f64,
    /// Differentiated denoising steps an image.
    kept_steps: f64,
}

impl Trainer<'_> {
    /// One optimizer step: micro-batches of rollout, reward and backprop, then clipping and AdamW.
    fn step(&self, state: &mut Checkpoint, lr: f64, progress: &ProgressBar) -> Result<Outcome> {
        let Config { train, optimizer, truncation, .. } = self.config;
        let Self { model, noise, .. } = self;
        let step = state.step as u64;
        let global_batch = train.batch_size * train.gradient_accumulation_steps;
        let mut sum = LoraGradients::new(&state.adapters);
        let (mut scores, mut losses, mut kept_steps) = (Vec::new(), Vec::new(), 0);

        for micro_batch in 0..train.gradient_accumulation_steps as u64 {
            let size = train.batch_size as u64;
            let samples = micro_batch * size..(micro_batch + 1) * size;
            let prompts: Vec<String> = samples
                .clone()
                .map(|sample| self.prompts[noise.below(Stream::Prompts, step, sample, self.prompts.len())].clone())
                .collect();
            let plan = Plan::new(truncation, &model.schedule, noise, step, samples.clone())?;
            let prompting = model.prompting(&prompts)?;
            let x_t = noise.normal_batch(Stream::Latents, step, samples.clone(), model.latent_shape)?;
            let variance = |i| model.variance_noise(noise, step, i, samples.clone());

            let trajectory = rollout(&model.pipeline.unet, &plan.steps, x_t, &prompting, &state.adapters, variance)?;
            let credit = if plan.renoise > 0 {
                self.renoised(&plan, &trajectory, &prompting, &prompts, samples, step, &state.adapters, &mut sum)?
            } else {
                let credit = self.credit(&trajectory.latents, &prompts, 1)?;
                backprop(
                    &model.pipeline.unet,
                    &state.adapters,
                    &trajectory,
                    &plan,
                    &prompting,
                    &credit.d_latents,
                    train.checkpointing,
                    &mut sum,
                )?;
                credit
            };
            scores.extend(credit.scores);
            losses.extend(credit.losses);
            kept_steps += plan.kept_count();
            progress.inc(1);
        }

        let mut grad_norm = 0.0;
        if sum.is_empty() {
            // a random rule may detach every step of a batch: there is nothing to learn from it
            state.step += 1;
        } else {
            let mut gradients = sum.finish(&state.adapters)?;
            grad_norm = clip_grad_norm(&mut gradients, optimizer.max_grad_norm)?;
            ensure!(grad_norm.is_finite(), "not a number: the norm of the LoRA gradients is {grad_norm}");
            let mut optimizer = state.optimizer.clone();
            let updated = optimizer.update(&state.adapters.tensors(), &gradients, lr)?;
            for ((name, _), tensor) in state.adapters.named_tensors().iter().zip(&updated) {
                ensure!(
                    is_finite(tensor)?,
                    "not a number: AdamW's update of `{name}` is not finite (optimizer.lr = {lr}?)"
                );
            }
            state.adapters = state.adapters.with_tensors(updated)?;
            state.optimizer = optimizer;
            state.step += 1;
        }
        let column = |r: usize| scores.iter().map(move |row: &Vec<f64>| row[r]);
        let statistics = (0..self.rewards.names().len()).map(|r| mean_std(&column(r).collect::<Vec<_>>()));
        let (mean_scores, std_scores) = statistics.unzip();
        Ok(Outcome {
            mean_scores,
            std_scores,
            loss: optimizer.loss_coeff * mean_std(&losses).0,
            grad_norm,
            kept_steps: kept_steps as f64 / global_batch as f64,
        })
    }

    /// The rewards of some latents, and the gradient of their part of the loss: a mean over the global batch and over
    /// `repetitions` of each image.
    fn credit(&self, latents: &Tensor, prompts: &[String], repetitions: usize) -> Result<Credit> {
        let train = &self.config.train;
        let images = train.batch_size * train.gradient_accumulation_steps * repetitions;
        let scale = self.config.optimizer.loss_coeff / images as f64;
        reward_cotangent(&self.model.pipeline.vae, self.rewards, latents, prompts, scale, train.checkpointing)
    }

    /// After DRaFT-LV (Clark et al. 2024): the images are noised to the last step's level and denoised again, several
    /// times; the gradients of those last steps are averaged. Scores and losses are averages too. The paper adds the
    /// gradient of the chain's own last step; here each of the averaged steps is a noised one.
    #[allow(clippy::too_many_arguments)]
    fn renoised(
        &self,
        plan: &Plan,
        trajectory: &Trajectory,
        prompting: &Prompting,
        prompts: &[String],
        samples: std::ops::Range<u64>,
        step: u64,
        adapters: &Adapters,
        sum: &mut LoraGradients,
    ) -> Result<Credit> {
        let Model { pipeline, schedule, latent_shape, .. } = self.model;
        let last = schedule.len() - 1;
        let (signal, spread) = schedule.add_noise(last);
        let only_last = Plan {
            steps: vec![plan.steps[last]],
            keep: vec![vec![true; prompts.len()]],
            detach_input: false,
            renoise: 0,
        };
        let mut total: Option<Credit> = None;
        for repetition in 0..plan.renoise {
            let z =
                self.noise.normal_batch(Stream::Renoise, counter(step, repetition), samples.clone(), *latent_shape)?;
            let x_1 = ((&trajectory.latents * signal)? + (z * spread)?)?;
            // places after the chain's own
            let variance = |_| self.model.variance_noise(self.noise, step, last + 1 + repetition, samples.clone());
            let again = rollout(&pipeline.unet, &only_last.steps, x_1, prompting, adapters, variance)?;
            let credit = self.credit(&again.latents, prompts, plan.renoise)?;
            backprop(
                &pipeline.unet,
                adapters,
                &again,
                &only_last,
                prompting,
                &credit.d_latents,
                self.config.train.checkpointing,
                sum,
            )?;
            match &mut total {
                None => total = Some(credit),
                Some(total) => {
                    let pairs = total.scores.iter_mut().flatten().zip(credit.scores.iter().flatten());
                    pairs.for_each(|(sum, score)| *sum += score);
                    total.losses.iter_mut().zip(&credit.losses).for_each(|(sum, loss)| *sum += loss);
                }
            }
        }
        let mut credit = total.context("truncation.n = 0: DRaFT-LV needs at least one repetition")?;
        let n = plan.renoise as f64;
        credit.scores.iter_mut().flatten().for_each(|score| *score /= n);
        credit.losses.iter_mut().for_each(|loss| *loss /= n);
        Ok(credit)
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
        let prompts: Vec<String> = self.prompts.iter().cycle().take(run_config.num_samples).cloned().collect();
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
        line.insert("lr".into(), json!(lr));
        line.insert("backprop_steps".into(), json!(self.kept_steps));
        line.insert("seconds".into(), json!((elapsed.as_secs_f64() * 1e3).round() / 1e3));
        line
    }
}

/// The config of the command line: a file, or a run's own where it is resumed.
fn resolve_config(args: &TrainArgs) -> Result<Config> {
    let set = &args.config.set;
    let mut config = match (&args.resume, &args.config.config) {
        (Some(_), Some(_)) => {
            bail!("--resume goes on with the run's own config: leave --config out and change settings with --set")
        }
        (Some(dir), None) => {
            let mut config = Config::load(&RunFolder::open(dir)?.config(), set)?;
            config.run.dir.clone_from(dir); // the folder may have been moved
            config
        }
        (None, path) => config_of(path.as_deref(), set, EMBEDDED)?,
    };
    if let Some(device) = &args.device {
        config.run.device.clone_from(device);
    }
    config.run.precision = args.precision.unwrap_or(config.run.precision);
    Ok(config)
}

fn start(config: &Config, model: &Model, noise: &Noise) -> Result<Checkpoint> {
    let lora = &config.lora;
    let normal = |i: usize, n: usize| noise.normal(Stream::LoraInit, 0, i as u64, n);
    let adapters =
        Adapters::init(&model.pipeline.unet.targets(), &lora.target_modules, lora.rank, lora.alpha_or_rank(), normal)?;
    Ok(Checkpoint { step: 0, optimizer: AdamW::new(&config.optimizer, &adapters.tensors())?, adapters })
}

fn resume(dir: &Path, config: &Config, model: &Model) -> Result<Checkpoint> {
    let folder = RunFolder::open(dir)?.last_checkpoint()?;
    let checkpoint = Checkpoint::load(&folder, &config.optimizer)?;
    checkpoint.adapters.check_fits(&model.pipeline.unet.targets())?;
    // the settings must be those of the adapters: a run keeps its shape
    let fresh = start(config, model, &Noise::new(config.run.seed))?.adapters;
    let shape = |adapters: &Adapters| {
        adapters.factors().iter().map(|f| (f.module.clone(), f.rank(), f.alpha)).collect::<Vec<_>>()
    };
    ensure!(
        shape(&fresh) == shape(&checkpoint.adapters),
        "lora.rank, lora.alpha or lora.target_modules differ from those of {}: a run keeps its adapters; start another one for others",
        folder.display()
    );
    Ok(checkpoint)
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
        config.lora.rank,
        state.adapters.factors().len(),
        state.adapters.parameter_count()
    );
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
    println!("adapter: {}", adapters.display());
    println!("run: {}", config.run.dir.display());
    Ok(())
}

fn mean_std(values: &[f64]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
    (mean, variance.sqrt())
}
