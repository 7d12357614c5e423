//! `alignprop train`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Error, Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::experiment::{EMBEDDED, compute_of, config_of};
use crate::cli::TrainArgs;
use crate::config::{AdjointMatchingConfig, Config, Method, Prompt, shown, shown_lines};
use crate::diffusion::Noise;
use crate::report::chart::short;
use crate::report::{Change, Summary, summary};
use crate::rewards::Rewards;
use crate::sampling::Sampler;
use crate::training::checkpoint::Checkpoint;
use crate::training::ddpo::Chain;
use crate::training::guard::{Guard, Objection};
use crate::training::memory::{self, Meter};
use crate::training::method::micro_batches;
use crate::training::run_folder::{Run, RunFolder};
use crate::training::signals::{Interrupt, Interrupted};
use crate::training::trainer::{End, Trainer, Watch, begin, go_on};
use crate::training::{MemoryPlan, PromptLists, RunPlan, Setup, Sources};

pub fn run(args: &TrainArgs) -> Result<()> {
    let mut config = read_config(args)?;
    let compute = compute_of(&config.run)?.with_rewards_in(config.run.reward_precision)?;
    config.require_trained()?;
    let prompts = &PromptLists::load(&config)?;
    // before gigabytes are read
    let run = take_folder(args, &mut config)?;
    let config = &config;
    let sources = Sources::of(config, args.resume.as_deref())?;
    let sampler = Sampler::load(&config.model, &config.sampler, &compute)?;
    let tokenizer = &sampler.pipeline.tokenizer;
    let rewards = Rewards::load_on(&config.reward, tokenizer, &compute)?.with_caps(&config.regularization.reward_cap);
    prompts.check(&rewards)?;
    let guard = Guard::load(config, prompts.guard(), tokenizer, &compute)?;
    let noise = Noise::new(config.run.seed);
    let state = match &args.resume {
        Some(dir) => go_on(dir, config, &sampler, &noise)?,
        None => begin(config, &sampler, &noise)?,
    };
    describe(config, &sampler, &rewards, &prompts.training, &state)?;
    prompts.warn_of_cut(&sampler)?;
    let plan = &RunPlan::resolve(config, &sampler, &rewards, &prompts.training[0], &state.adapters)?;
    if let Some(memory) = &plan.memory {
        note!("memory      {}", plan.describe_memory(memory));
        if !memory.fits {
            note!("warning: the run may need more memory than is free");
        }
    }
    let Some(mut run) = run else {
        say!("dry run: nothing was trained and nothing was written");
        return Ok(());
    };

    let interrupt = Interrupt::listen()?;
    // before the config, which makes the folder a run
    prompts.save(run.dir())?;
    sources.save(run.dir())?;
    run.save_config(&plan.as_config(config).to_toml()?)?;
    if args.resume.is_some() {
        run.rewind_metrics(state.step)?;
    }
    let progress = progress_bar(micro_batches(config, plan), config.train.steps, state.step);
    let meter = Meter::of(&compute);
    meter.reset_peak()?;
    let setup = Setup { config, plan, sampler: &sampler, rewards: &rewards, prompts: &prompts.training, noise };
    let mut trainer = Trainer { setup, guard: guard.as_ref(), sample_prompts: prompts.samples(), run, state };
    let steps = config.train.steps;
    let end = trainer.train(args.stop_at.unwrap_or(steps), &interrupt, &progress)?;
    progress.finish_and_clear();

    let (step, resume) = (trainer.state.step, trainer.run.resume_command());
    match end {
        End::Finished => {}
        End::Paused => {
            say!("stopped after step {step} of {steps}; go on with `{resume}`");
            return Ok(());
        }
        End::Guard(Objection { reason, overrule }) => {
            say!("stopped after step {step} of {steps} by the guard: {reason}");
            say!("to go on all the same: `{resume} --set {overrule}`");
        }
        End::Signal(signal) => return Err(Interrupted { signal, step, steps, resume }.into()),
    }
    let adapters = trainer.export()?;
    report(config, &trainer.run, &adapters)?;
    plan.memory.as_ref().map_or(Ok(()), |memory| report_memory(memory, meter))
}

/// The config of the command line: a file, or a run's own where it is resumed.
fn read_config(args: &TrainArgs) -> Result<Config> {
    let config = match (&args.resume, &args.config.config) {
        (Some(_), Some(_)) => {
            bail!("--resume goes on with the run's own config: leave --config out and change settings with --set")
        }
        (Some(dir), None) => RunFolder::open(dir)?.read_config(&args.settings()),
        (None, path) => config_of(path.as_deref(), &args.settings(), EMBEDDED),
    };
    config?.with_whole_paths() // the run may be resumed from another folder
}

/// The run's folder, which no other process trains in from here on; what it is called goes into the config. A dry run takes
/// none and writes nothing there.
fn take_folder(args: &TrainArgs, config: &mut Config) -> Result<Option<Run>> {
    let take = |dir: &Path| match (&args.resume, args.dry_run) {
        (Some(dir), false) => Run::resume(dir).map(Some),
        (None, false) => Run::start(dir).map(Some),
        (None, true) => RunFolder::check_free(dir).map(|()| None),
        (Some(_), true) => Ok(None),
    };
    if let Some(dir) = &config.run.dir {
        return take(dir);
    }
    let stem = args.config.config.as_deref().and_then(Path::file_stem);
    let wanted = Path::new("runs").join(stem.unwrap_or("emoji".as_ref()));
    let (dir, run) = RunFolder::numbered(&wanted, take)?;
    if dir != wanted {
        let resume = RunFolder::at(&wanted).resume_command();
        note!("run         {}, as {} holds another; `{resume}` goes on with that one", dir.display(), wanted.display());
    }
    config.run.dir = Some(dir);
    Ok(run)
}

/// The run's head, on stderr.
fn describe(
    config: &Config,
    sampler: &Sampler,
    rewards: &Rewards,
    prompts: &[Prompt],
    state: &Checkpoint,
) -> Result<()> {
    let (height, width) = sampler.image_size();
    let Config { train, sampler: sampling, .. } = config;
    let batch = train.batch_size * train.gradient_accumulation_steps;
    note!(
        "model       {} ({height}x{width}, {} DDIM steps, guidance {})",
        shown(&config.model.path),
        sampling.num_inference_steps,
        sampling.guidance_scale
    );
    note!(
        "adapters    rank {} on {} layers, {} parameters",
        state.adapters.ranks(),
        state.adapters.factors().len(),
        state.adapters.parameter_count()
    );
    let (compute, for_rewards) = (sampler.compute(), sampler.compute().for_rewards());
    let apart = for_rewards.dtype() != compute.dtype();
    let towers = if apart { format!(" (rewards in {})", for_rewards.precision_name()) } else { String::new() };
    note!("device      {}, {}{towers}", compute.describe(), compute.precision_name());
    let names: Vec<String> = rewards
        .iter()
        .map(|r| if r.weight == 1.0 { r.name.to_owned() } else { format!("{} x {}", r.weight, r.name) })
        .collect();
    note!("reward      {} on {} prompts", names.join(" + "), prompts.len());
    describe_method(config, sampler)?;
    note!("steps       {} of {batch} images, from step {}", train.steps, state.step);
    Ok(())
}

/// What is done with the rewards.
fn describe_method(config: &Config, sampler: &Sampler) -> Result<()> {
    let name = config.method.name();
    if let Some(regression) = config.method.regression() {
        note!("method      {name}, {} a step", counted(regression.updates * regression.inner_epochs, "update"));
        return Ok(());
    }
    if let Method::AdjointMatching(AdjointMatchingConfig { lambda, steps, .. }) = &config.method {
        note!("method      {name}, {steps} of {} denoising steps matched, lambda {lambda}", sampler.schedule.len());
        return Ok(());
    }
    let Some(policy) = config.method.policy() else {
        note!("truncation  {}", toml::to_string(&config.truncation)?.trim().replace('\n', ", "));
        return Ok(());
    };
    // of the last round too: a window moves
    Chain::of(&policy, &sampler.schedule, config.train.steps)?;
    let chain = Chain::of(&policy, &sampler.schedule, 0)?;
    let silent = sampler.schedule.steps().iter().filter(|step| step.noise == 0.0).count();
    let silent = if silent > 0 { format!("; {silent} without noise, which have no density") } else { String::new() };
    note!(
        "method      {name}, {} of {} denoising steps trained, {} a step{silent}",
        chain.trained.len(),
        chain.steps.len(),
        counted(policy.updates * policy.inner_epochs, "update")
    );
    Ok(())
}

/// `1 update`, `4 updates`.
fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// A progress bar with one tick a micro-batch, so that the time left is smooth; drawn on a terminal only.
fn progress_bar(per_step: usize, steps: usize, done: usize) -> ProgressBar {
    let per_step = per_step as u64;
    let bar = ProgressBar::with_draw_target(Some(steps as u64 * per_step), ProgressDrawTarget::stderr());
    bar.set_position(done as u64 * per_step);
    bar.reset_eta();
    let style = ProgressStyle::with_template("{percent:>3}% {wide_bar} {elapsed} (left {eta})  {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

impl Watch for ProgressBar {
    fn micro_batches(&self, done: usize) {
        self.set_position(done as u64);
    }

    /// `aesthetic 5.310, rising: +0.42 ± 0.05`: the batch's mean, and the change from the first batches to the last.
    fn step(&self, means: &[(&str, f64, Option<Change>)]) {
        let part = |(name, now, change): &(&str, f64, Option<Change>)| match change {
            Some(change) => format!("{name} {}, {}: {}", short(*now), change.trend(), change.by()),
            None => format!("{name} {}", short(*now)),
        };
        self.set_message(means.iter().map(part).collect::<Vec<_>>().join("  "));
    }

    fn skipped(&self, step: usize, cause: &Error) {
        self.suspend(|| note!("warning: optimizer step {step} is skipped: {}", shown_lines(format!("{cause:#}"))));
    }
}

/// What the run came to, on stdout.
fn report(config: &Config, run: &Run, adapters: &Path) -> Result<()> {
    let Summary { findings, next } = summary(config, run.metrics(), &run.pairs()?, &run.dir().display().to_string());
    for finding in findings {
        say!("{finding}");
    }
    if let Some(best) = run.best_checkpoint()?.filter(|_| config.run.keep_best) {
        say!("best checkpoint: {} ({} {:.4})", run.checkpoint(best.step).display(), best.by(), best.score);
    }
    say!("adapter: {}", adapters.display());
    say!("run: {}", run.dir().display());
    say!("pictures and curves: {}", run.dir().join("report.html").display());
    say!("next: {}: `{}`", next.0, next.1);
    Ok(())
}

/// The measured peak beside its estimate, on stderr.
fn report_memory(plan: &MemoryPlan, meter: Meter) -> Result<()> {
    let (peak, estimate) = (meter.peak()? as f64, plan.estimate.total());
    let resident = meter.held().map(|bytes| format!("; resident at most {}", memory::size(bytes)));
    note!(
        "memory      {} at the peak, {} estimated (ratio {:.2}){}",
        memory::size(peak),
        memory::size(estimate),
        estimate / peak,
        resident.unwrap_or_default()
    );
    Ok(())
}
