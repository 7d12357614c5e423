//! A training run: the loop over optimizer steps, and what belongs between them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Error, Result, ensure};
use serde_json::{Map, Value as Json, json};

use super::advantages::PromptStatistics;
use super::checkpoint::{Checkpoint, EMA};
use super::guard::{Guard, Objection};
use super::health;
use super::loss_scale::LossScale;
use super::method::{Setup, StepResult, micro_batches};
use super::run_folder::{Run, RunFolder};
use super::signals::Interrupt;
use super::terms::distances_from_base;
use crate::config::{Checkpointing, Config, Method, Prompt, RunConfig};
use crate::diffusion::{Noise, Stream};
use crate::lora::{Adapters, formats, take_over};
use crate::ops::Ledger;
use crate::optim::{AdamW, learning_rate};
use crate::report::html::Status;
use crate::report::{Change, Sample, names, pictures, samples};
use crate::rewards::Rewards;
use crate::sampling::Sampler;

/// A run that goes on from a state, in a folder of its own.
pub struct Trainer<'a> {
    pub setup: Setup<'a>,
    pub guard: Option<&'a Guard>,
    /// What the sample grids show.
    pub sample_prompts: &'a [Prompt],
    pub run: Run,
    pub state: Checkpoint,
}

/// Why a run's loop ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// All of `train.steps` are done.
    Finished,
    /// The step that was asked for is done, and there are more.
    Paused,
    /// The guard objects: says why.
    Guard(Objection),
    /// A signal arrived, and the state is saved.
    Signal(i32),
}

/// What a run tells whoever watches it.
pub trait Watch {
    /// So many micro-batches of the whole run are done.
    fn micro_batches(&self, done: usize);
    /// An optimizer step is done: the means of the batch's scores, each with its name and its change since the first batches.
    fn step(&self, means: &[(&str, f64, Option<Change>)]);
    /// An optimizer step was passed over.
    fn skipped(&self, step: usize, cause: &Error);
}

impl Trainer<'_> {
    /// Trains until step `until` of `train.steps` is done, the guard objects or a signal arrives.
    ///
    /// # Errors
    /// A step failed: the checkpoints are as they were. Something could not be written: names the last good checkpoint.
    pub fn train(&mut self, until: usize, interrupt: &Interrupt, watch: &impl Watch) -> Result<End> {
        let steps = self.config().train.steps;
        self.save()?; // so that a run can be resumed from its first moment on
        let end = loop {
            // the samples and the guard's evaluation of the last step, also where a run that is resumed was killed before them
            let mut objection = None;
            if interrupt.received().is_none() {
                self.draw_samples_if_due()?;
                objection = self.ask_guard(interrupt)?;
            }
            if let Some(signal) = interrupt.received() {
                self.save()?;
                break End::Signal(signal);
            }
            if self.state.step >= until.min(steps) || objection.is_some() {
                self.save()?;
                self.prune()?;
                break match objection {
                    Some(objection) => End::Guard(objection),
                    None if self.state.step < steps => End::Paused,
                    None => End::Finished,
                };
            }
            self.step(watch)?;
            let due = |every: usize| every > 0 && self.state.step.is_multiple_of(every);
            let Config { run, guard, .. } = self.config();
            if due(run.save_every) || due(guard.every) || self.state.step == until.min(steps) {
                self.save()?;
            }
            if self.run.report_is_due() {
                self.write_report(Status::Training)?;
            }
        };
        self.write_report(match &end {
            End::Finished => Status::Finished,
            End::Paused => Status::Stopped("as it was told".to_owned()),
            End::Guard(objection) => Status::Stopped(format!("by the guard, as {}", objection.reason)),
            End::Signal(_) => Status::Stopped("by a signal".to_owned()),
        })?;
        Ok(end)
    }

    /// Writes the adapters of this state, and their moving average if the run keeps one, into the run's folder.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn export(&self) -> Result<PathBuf> {
        let file = self.run.dir().join("pytorch_lora_weights.safetensors");
        let metadata = self.metadata(self.state.step);
        formats::save(&self.state.adapters, &metadata, &file).with_context(|| self.going_on())?;
        if let Some(ema) = &self.state.ema {
            formats::save(ema, &metadata, &self.run.dir().join(EMA)).with_context(|| self.going_on())?;
        }
        Ok(file)
    }

    fn config(&self) -> &Config {
        self.setup.config
    }

    /// One optimizer step, with its line in the metrics.
    fn step(&mut self, watch: &impl Watch) -> Result<()> {
        let started = Instant::now();
        let (before, config) = (self.state.step, self.config());
        let lr = learning_rate(&config.optimizer, before, config.train.steps);
        let earlier = before * micro_batches(config, self.setup.plan);
        match self.setup.step(&mut self.state, lr, |done| watch.micro_batches(earlier + done)) {
            Ok(result) => {
                let mut line = result.metrics(self.setup.config, self.setup.rewards, before + 1, lr);
                let seconds = (started.elapsed().as_secs_f64() * 1e3).round() / 1e3;
                line.insert(names::SECONDS.to_owned(), json!(seconds));
                self.run.log(&line).with_context(|| self.going_on())?;
                watch.step(&self.means(&result));
                // only now: the last checkpoint has made a finite step
                self.prune()
            }
            Err(error) if health::is_not_a_number(&error) => self.skip(error, watch),
            Err(error) => Err(error.context(self.in_step(before + 1))),
        }
    }

    /// Passes over a step that met a number which is not finite: adapters and moments stay, the metrics say so.
    ///
    /// # Errors
    /// It was one too many in a row: the last good state is saved.
    fn skip(&mut self, error: Error, watch: &impl Watch) -> Result<()> {
        let step = self.state.step + 1;
        let before = health::skipped_in_a_row(self.run.metrics(), self.state.step);
        if before >= self.config().train.max_skipped_steps {
            self.state.step -= before;
            self.save()?;
            let skipped = if before > 0 { format!(" (the {before} before it were skipped)") } else { String::new() };
            return Err(error.context(format!("{}{skipped}", self.in_step(step))));
        }
        watch.skipped(step, &error);
        watch.micro_batches(step * micro_batches(self.config(), self.setup.plan));
        self.state.step = step;
        let entries =
            [(names::STEP, json!(step)), (names::SKIPPED, json!(1)), (names::CAUSE, json!(format!("{error:#}")))];
        self.run.log(&entries.map(|(key, value)| (key.to_owned(), value)).into_iter().collect())
    }

    /// Saves a checkpoint of this state, unless there is one.
    fn save(&self) -> Result<()> {
        self.run.save(&self.state, &self.metadata(self.state.step)).with_context(|| self.going_on())
    }

    /// Removes old checkpoints, but not the best one.
    fn prune(&self) -> Result<()> {
        let RunConfig { keep_checkpoints, keep_best, .. } = self.config().run;
        let best = if keep_best { self.run.best_checkpoint()? } else { None };
        Checkpoint::prune(&self.run.checkpoints(), keep_checkpoints, best.map(|best| best.step))
    }

    fn write_report(&mut self, status: Status) -> Result<()> {
        let config = self.setup.plan.as_config(self.config());
        self.run.write_report(&config, &status).with_context(|| self.going_on())
    }

    /// The guard's evaluation where one belongs to this step, and its objection.
    fn ask_guard(&mut self, interrupt: &Interrupt) -> Result<Option<Objection>> {
        let Some(guard) = self.guard else { return Ok(None) };
        let step = self.state.step;
        let due = guard.due(step, self.config().train.steps) && !Guard::has_evaluated(self.run.metrics(), step);
        if due && interrupt.received().is_none() {
            let mut line = Map::from_iter([(names::STEP.to_owned(), json!(step))]);
            let Trainer { setup, state, .. } = self;
            line.extend(guard.evaluate(setup.rewards, |prompt, number, seed| {
                let (sampler, prompts) = (setup.sampler, std::slice::from_ref(prompt));
                let noise = sampler.guard_noise(seed, number..number + 1);
                let (conditioning, _) = Ledger::around(|ledger| sampler.conditioning(prompts, ledger))?;
                let denoiser = sampler.denoiser(&state.adapters, conditioning, Checkpointing::Step);
                let (steps, x_t) = (sampler.schedule.steps(), noise.initial_latents()?);
                let of_step = |i| noise.of_step(i);
                let (trajectory, _) =
                    Ledger::around(|ledger| denoiser.rollout(steps, x_t, of_step, |_| false, ledger))?;
                let distance = distances_from_base(&denoiser, steps, &trajectory)?[0];
                Ok((sampler.decode(trajectory.latents())?, distance))
            })?);
            self.run.log(&line)?;
        }
        Ok(guard.objection(self.run.metrics()))
    }

    /// Where one belongs to this step and is not there: a grid of images on fixed prompts and noise, and their scores.
    fn draw_samples_if_due(&mut self) -> Result<()> {
        let Trainer { setup: Setup { sampler, rewards, config, .. }, state, .. } = self;
        let step = state.step;
        let every = config.run.sample_every;
        if every == 0 || !(step.is_multiple_of(every) || step == config.train.steps) {
            return Ok(());
        }
        let names = rewards.names();
        let is_scored = names.first().is_some_and(|name| self.run.metrics().has(&names::sample(name), step));
        if is_scored && self.run.samples(step).is_file() {
            return Ok(());
        }
        let prompts: Vec<&Prompt> = self.sample_prompts.iter().cycle().take(config.run.num_samples).collect();
        let (mut images, mut scores, mut samples) = (Vec::new(), Vec::new(), Vec::new());
        for (number, prompt) in (0..).zip(prompts) {
            let (prompts, noise) = ([prompt.clone()], sampler.evaluation_noise(config.run.seed, number..number + 1));
            let image = sampler.draw(&prompts, &noise, &state.adapters, None)?.images;
            let of_image = rewards.scores(&image, &prompts)?.swap_remove(0);
            let by_name = names.iter().map(|name| name.to_string()).zip(of_image.iter().copied()).collect();
            samples.push(Sample { prompt: prompt.text.clone(), scores: by_name, picture: PathBuf::new() });
            scores.push(of_image);
            images.push(pictures::to_rgb(&image.get(0)?)?);
        }
        let grid = self.run.samples(step);
        samples::save(grid.parent().unwrap_or(Path::new("")), step, &samples, &images)?;
        let captions: Vec<String> = samples
            .iter()
            .zip(&scores)
            .map(|(sample, scores)| pictures::caption(&sample.prompt, &names, scores))
            .collect();
        let images = images.into_iter().map(|image| pictures::enlarge(image, 128)).collect();
        pictures::save(&pictures::grid(&pictures::captioned(images, &captions), 4)?, &grid)?;
        self.run.log_samples(step)?;
        let mean = |value: &dyn Fn(&Vec<f64>) -> f64| scores.iter().map(value).sum::<f64>() / scores.len() as f64;
        let mut line = Map::from_iter([(names::STEP.to_owned(), json!(step))]);
        for (r, name) in names.iter().enumerate() {
            line.insert(names::sample(name), json!(mean(&|row| row[r])));
        }
        line.insert(names::SAMPLE_LOSS.to_owned(), json!(mean(&|row| rewards.loss(row))));
        self.run.log(&line)?;
        self.write_report(Status::Training)
    }

    /// The batch's mean of each reward, and what became of the batches' means since the first ones.
    fn means(&self, result: &StepResult) -> Vec<(&'static str, f64, Option<Change>)> {
        let names = self.setup.rewards.names().into_iter().enumerate();
        let since = |name| Change::of_batches(self.run.metrics().history(&names::reward(name)));
        names.map(|(r, name)| (name, result.score(r).0, since(name))).collect()
    }

    /// What the adapter's file says of its making.
    fn metadata(&self, step: usize) -> HashMap<String, String> {
        let config = self.config();
        let keys = |table: Result<String, toml::ser::Error>| table.unwrap_or_default().trim().replace('\n', ", ");
        let rewards = self.setup.rewards.iter().map(|r| format!("{}={}", r.name, r.weight)).collect::<Vec<_>>();
        let mut metadata = HashMap::from(
            [
                ("software", format!("alignprop {}", env!("CARGO_PKG_VERSION"))),
                ("base_model", config.model.path.clone()),
                ("reward", rewards.join(" ")),
                ("method", keys(toml::to_string(&config.method))),
                ("seed", config.run.seed.to_string()),
                ("step", step.to_string()),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        if let Method::Alignprop(_) = config.method {
            metadata.insert("truncation".to_owned(), keys(toml::to_string(&config.truncation)));
        }
        metadata
    }

    /// Where an error came from, and that nothing is lost.
    fn in_step(&self, step: usize) -> String {
        format!("in optimizer step {step}; the checkpoints in {} are intact", self.run.checkpoints().display())
    }

    /// What to do when the disk is full, or the folder gone.
    fn going_on(&self) -> String {
        match self.run.last_checkpoint() {
            Ok(last) => format!(
                "saving failed; the last good checkpoint is {}; go on with `{}`",
                last.display(),
                self.run.resume_command()
            ),
            Err(_) => "saving failed, and no checkpoint is to be found".to_owned(),
        }
    }
}

impl StepResult {
    /// Mean and standard deviation of a reward's scores over the batch.
    fn score(&self, reward: usize) -> (f64, f64) {
        mean_std(self.images.iter().map(|image| image.scores[reward]))
    }

    /// The step's line of the metrics, without its time.
    fn metrics(&self, config: &Config, rewards: &Rewards, step: usize, lr: f64) -> Map<String, Json> {
        let loss = config.optimizer.loss_coeff * mean_std(self.images.iter().map(|image| image.loss)).0;
        let mut line = Map::from_iter([(names::STEP.to_owned(), json!(step)), (names::LOSS.to_owned(), json!(loss))]);
        for (r, name) in rewards.names().iter().enumerate() {
            let (mean, std) = self.score(r);
            line.insert(names::reward(name), json!(mean));
            line.insert(names::reward_std(name), json!(std));
        }
        line.insert(names::GRAD_NORM.to_owned(), json!(self.grad_norm));
        if config.regularization.kl_weight > 0.0 {
            let distances = self.images.iter().map(|image| image.distance.unwrap_or(0.0));
            line.insert(names::DISTANCE.to_owned(), json!(mean_std(distances).0));
        }
        if config.method.rho() > 0.0 {
            let sharpness = self.images.iter().map(|image| image.sharpness.unwrap_or(0.0));
            line.insert(names::SHARPNESS.to_owned(), json!(mean_std(sharpness).0));
        }
        line.extend(self.more.iter().map(|(name, value)| ((*name).to_owned(), json!(value))));
        line.insert(names::LR.to_owned(), json!(lr));
        line.insert(names::BACKPROP_STEPS.to_owned(), json!(self.kept_steps));
        line
    }
}

/// Mean and standard deviation (of the population).
fn mean_std(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count().max(1) as f64;
    let mean = values.clone().sum::<f64>() / n;
    let variance = values.map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

/// The state that a run begins with: fresh adapters, or those of `lora.init_from`.
///
/// # Errors
/// The file cannot be read or belongs to another model.
pub fn begin(config: &Config, sampler: &Sampler, noise: &Noise) -> Result<Checkpoint> {
    let adapters = match &config.lora.init_from {
        Some(file) => sampler.load_lora(file).context("lora.init_from")?.adapters,
        None => fresh(config, sampler, noise)?,
    };
    let ema = (config.regularization.ema_decay > 0.0).then(|| adapters.clone());
    let optimizer = AdamW::new(&config.optimizer, &adapters.tensors())?;
    let loss_scale = LossScale::new(sampler.compute().dtype());
    let statistics = PromptStatistics::default();
    Checkpoint { step: 0, optimizer, adapters, ema, loss_scale, statistics, matching: None }
        .to_device(sampler.compute().device())
}

/// Adapters whose product is zero.
fn fresh(config: &Config, sampler: &Sampler, noise: &Noise) -> Result<Adapters> {
    let lora = &config.lora;
    let normal = |i: usize, n: usize| noise.normal(Stream::LoraInit, 0, i as u64, n);
    let targets = sampler.pipeline.unet.targets();
    Adapters::init(&targets, &lora.target_modules_or_default(), lora.rank_or_default(), lora.alpha_or_rank(), normal)
}

/// The state that a run goes on from: its last checkpoint, or [`begin`] where it was stopped before its first one.
///
/// # Errors
/// The checkpoint is damaged or belongs to another model, or `config` asks for adapters of another shape.
pub fn go_on(dir: &Path, config: &Config, sampler: &Sampler, noise: &Noise) -> Result<Checkpoint> {
    let run = RunFolder::open(dir)?;
    if run.has_not_begun()? {
        return begin(config, sampler, noise);
    }
    let folder = run.last_checkpoint()?;
    let mut checkpoint = Checkpoint::load(&folder, &config.optimizer)?;
    let targets = sampler.pipeline.unet.targets();
    checkpoint.adapters.check_fits(&targets)?;
    // the settings must be those of the adapters: a run keeps its shape
    let same_shape = match &config.lora.init_from {
        Some(_) => take_over(&config.lora, &checkpoint.adapters, &targets, &folder).map(|_| true)?,
        None => fresh(config, sampler, noise)?.same_shape(&checkpoint.adapters),
    };
    ensure!(
        same_shape,
        "lora.rank, lora.alpha or lora.target_modules differ from those of {}: a run keeps its adapters; start another one for others",
        folder.display()
    );
    // an average that is asked for from here on starts here
    let averaged = config.regularization.ema_decay > 0.0;
    checkpoint.ema = averaged.then(|| checkpoint.ema.unwrap_or_else(|| checkpoint.adapters.clone()));
    // and so does a loss scale, if the run goes on in another precision
    let scale = LossScale::new(sampler.compute().dtype());
    checkpoint.loss_scale = scale.map(|start| checkpoint.loss_scale.unwrap_or(start));
    checkpoint.to_device(sampler.compute().device())
}
