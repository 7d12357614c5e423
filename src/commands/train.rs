//! `alignprop train`: the loop. Its step is in `train/step.rs`.

mod step;

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, json};

use super::experiment::{EMBEDDED, Model, config_of};
use super::report::write_report;
use super::{budget, open_for_rewards, pictures};
use crate::cli::TrainArgs;
use crate::config::{Config, Prompt, RunConfig};
use crate::diffusion::{Noise, Stream};
use crate::lora::{Adapters, formats, take_over};
use crate::optim::{AdamW, learning_rate};
use crate::rewards::Rewards;
use crate::training::checkpoint::{Checkpoint, EMA};
use crate::training::guard::{Guard, best_checkpoint};
use crate::training::health;
use crate::training::loss_scale::LossScale;
use crate::training::memory::{self, Estimate, Meter};
use crate::training::run_folder::RunFolder;
use crate::training::signals::{Interrupt, Interrupted};

pub fn run(args: &TrainArgs) -> Result<()> {
    let mut config = resolve_config(args)?;
    let compute = open_for_rewards(&mut config, args.device.as_deref(), args.precision, args.reward_precision)?;
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
    prompts: &'a [Prompt],
    sample_prompts: &'a [Prompt],
    noise: &'a Noise,
}

impl Trainer<'_> {
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
        let image = |prompt: &Prompt, number, seed| self.model.watched_image(prompt, number, seed, &state.adapters);
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
        let prompts: Vec<Prompt> = self.sample_prompts.iter().cycle().take(run_config.num_samples).cloned().collect();
        let (mut images, mut scores) = (Vec::new(), Vec::new());
        for (number, prompt) in (0..).zip(&prompts) {
            let prompt_alone = std::slice::from_ref(prompt);
            let image = self.model.images(prompt_alone, number, run_config.seed, &state.adapters)?;
            scores.extend(self.rewards.scores(&image, prompt_alone)?);
            images.push(pictures::enlarge(pictures::to_rgb(&image.get(0)?)?, 128));
        }
        let names = self.rewards.names();
        let captions: Vec<String> =
            prompts.iter().zip(&scores).map(|(prompt, row)| pictures::caption(&prompt.text, &names, row)).collect();
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
fn describe(config: &Config, model: &Model, rewards: &Rewards, prompts: &[Prompt], state: &Checkpoint) -> Result<()> {
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
    let (compute, for_rewards) = (model.compute(), model.compute().for_rewards());
    let apart = for_rewards.dtype() != compute.dtype();
    let towers = if apart { format!(" (rewards in {})", for_rewards.precision_name()) } else { String::new() };
    eprintln!("device      {}, {}{towers}", compute.describe(), compute.precision_name());
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
