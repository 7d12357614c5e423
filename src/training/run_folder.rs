//! A run on disk: `config.toml`, `prompts.jsonl`, `sources.json`, `metrics.jsonl`, `samples/`, `checkpoints/`, `tensorboard/`, `report.html`.

use std::collections::HashMap;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value as Json};

use super::checkpoint::{Checkpoint, folder_name};
use super::lock::{RunLock, Taken};
use super::memory;
use super::prompts::take_kept;
use crate::config::{Config, shell_word};
use crate::files::{UNFINISHED, write_bytes};
use crate::report::events::EventFile;
use crate::report::html::{self, Status};
use crate::report::metrics::{Metrics, names};
use crate::report::{Best, Pairs, best};

/// How the names of files that were not finished begin: here, and in earlier versions.
const UNFINISHED_FILES: [&str; 4] = [UNFINISHED, ".run-", ".lora-", ".picture-"];

/// Where the parts of a run are, for whoever reads them.
pub struct RunFolder {
    dir: PathBuf,
}

impl RunFolder {
    /// The folder, whatever is in it.
    pub(crate) fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// # Errors
    /// The folder holds a run, or cannot be one.
    pub fn check_free(dir: &Path) -> Result<()> {
        let run = Self::at(dir);
        if run.config().exists() || run.metrics_file().exists() {
            RunLock::check_free(dir)?;
            bail!(Taken(format!(
                "{} already holds a run; go on with it by `--resume {}`, or choose another folder by `--set run.dir=DIR`",
                dir.display(),
                dir.display()
            )));
        }
        if dir.exists() && !dir.is_dir() {
            bail!("{} is a file; choose a folder for the run by `--set run.dir=DIR`", dir.display());
        }
        Ok(())
    }

    /// The first of DIR, DIR-2, DIR-3 and so on that no run has, with what `take` makes of it.
    ///
    /// # Errors
    /// `take` fails for another reason.
    pub fn numbered<T>(dir: &Path, take: impl Fn(&Path) -> Result<T>) -> Result<(PathBuf, T)> {
        let (mut folder, mut number) = (dir.to_owned(), 1);
        loop {
            match take(&folder) {
                Err(error) if error.is::<Taken>() => number += 1,
                taken => return Ok((folder, taken?)),
            }
            let mut name = dir.as_os_str().to_owned();
            name.push(format!("-{number}"));
            folder = name.into();
        }
    }

    /// An existing run.
    ///
    /// # Errors
    /// No run is there.
    pub fn open(dir: &Path) -> Result<Self> {
        let run = Self::at(dir);
        if !run.config().is_file() {
            bail!("{} is no run folder: it has no config.toml", dir.display());
        }
        Ok(run)
    }

    /// The run's config, changed by `settings`. Its prompts are those that it began with, unless a setting is about them.
    ///
    /// # Errors
    /// It cannot be read or is not valid.
    pub fn read_config(&self, settings: &[String]) -> Result<Config> {
        let mut config = Config::load(&self.config(), settings)?;
        take_kept(&mut config, &self.dir, settings);
        Ok(config)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
    pub fn config(&self) -> PathBuf {
        self.dir.join("config.toml")
    }
    pub fn metrics_file(&self) -> PathBuf {
        self.dir.join("metrics.jsonl")
    }
    pub fn checkpoints(&self) -> PathBuf {
        self.dir.join("checkpoints")
    }
    /// The folder of a step's checkpoint.
    pub fn checkpoint(&self, step: usize) -> PathBuf {
        self.checkpoints().join(folder_name(step))
    }
    /// The command that goes on with this run.
    pub fn resume_command(&self) -> String {
        format!("alignprop train --resume {}", shell_word(&self.dir.display().to_string()))
    }
    /// The first samples of the run and the last ones.
    pub fn pairs(&self) -> Result<Pairs> {
        Pairs::of(&self.dir.join("samples"), &self.sample_steps())
    }
    /// The sample grid of a step.
    pub fn samples(&self, step: usize) -> PathBuf {
        self.dir.join("samples").join(format!("step-{step:06}.png"))
    }

    /// The newest checkpoint.
    ///
    /// # Errors
    /// The run has none.
    pub fn last_checkpoint(&self) -> Result<PathBuf> {
        let last = Checkpoint::list(&self.checkpoints())?.pop();
        last.with_context(|| {
            format!("{} has no checkpoint yet; start it again with another run.dir", self.dir.display())
        })
    }

    /// Whether nothing has come of the run yet: it was killed before its first checkpoint.
    pub fn has_not_begun(&self) -> Result<bool> {
        let measured = fs::metadata(self.metrics_file()).is_ok_and(|file| file.len() > 0);
        Ok(!measured && Checkpoint::list(&self.checkpoints())?.is_empty())
    }

    /// The steps that have a sample grid, in order.
    pub fn sample_steps(&self) -> Vec<usize> {
        let names = fs::read_dir(self.dir.join("samples"))
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut steps: Vec<usize> =
            names.filter_map(|name| name.strip_prefix("step-")?.strip_suffix(".png")?.parse().ok()).collect();
        steps.sort_unstable();
        steps
    }

    /// Removes what a killed process may have left: what it was writing under another name. Only for who holds the lock.
    fn recover(&self) -> Result<()> {
        let folders = [self.dir.clone(), self.dir.join("samples")];
        let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten();
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let is_folder = path.is_dir() && !path.is_symlink();
            let removed = if is_folder && name.starts_with(UNFINISHED) {
                fs::remove_dir_all(&path)
            } else if !is_folder && UNFINISHED_FILES.iter().any(|start| name.starts_with(start)) {
                fs::remove_file(&path)
            } else {
                continue;
            };
            removed.with_context(|| format!("removing the unfinished {}", path.display()))?;
        }
        Checkpoint::recover(&self.checkpoints())
    }
}

/// A run that this process trains, and no other one: it holds the folder's lock. What is measured is kept beside the file
/// that it is written to.
pub struct Run {
    folder: RunFolder,
    metrics: Metrics,
    /// TensorBoard's file of this session, from its first line of metrics on.
    events: Option<EventFile>,
    /// The step from which on this session replaces what earlier ones wrote there.
    events_from: Option<usize>,
    /// When the page was written, and how long that took.
    page_written: Option<(Instant, Duration)>,
    _lock: RunLock,
}

impl Deref for Run {
    type Target = RunFolder;
    fn deref(&self) -> &RunFolder {
        &self.folder
    }
}

impl Run {
    /// Takes a folder for a new run; it is made if it is absent, and goes again if nothing is written there.
    ///
    /// # Errors
    /// The folder holds a run, or another process trains one there.
    pub fn start(dir: &Path) -> Result<Self> {
        RunFolder::check_free(dir)?;
        let lock = RunLock::take_new(dir)?;
        RunFolder::check_free(dir)?; // another process may have been faster, and have ended
        Self::held(RunFolder::at(dir), lock)
    }

    /// Takes an existing run, and tidies up what a killed process may have left there.
    ///
    /// # Errors
    /// No run is there, another process trains it, or its metrics cannot be read.
    pub fn resume(dir: &Path) -> Result<Self> {
        let folder = RunFolder::open(dir)?;
        let lock = RunLock::take(dir)?;
        folder.recover()?;
        Self::held(folder, lock)
    }

    fn held(folder: RunFolder, lock: RunLock) -> Result<Self> {
        let metrics = Metrics::read(&folder.metrics_file())?;
        Ok(Self { folder, metrics, events: None, events_from: None, page_written: None, _lock: lock })
    }

    /// What was measured so far.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Saves the resolved config.
    pub fn save_config(&self, config_toml: &str) -> Result<()> {
        write_bytes(&self.config(), config_toml.as_bytes())
    }

    /// Saves a checkpoint, unless its step has one. The metrics that a resumed run decides from are on disk before it.
    pub fn save(&self, state: &Checkpoint, metadata: &HashMap<String, String>) -> Result<()> {
        if !self.checkpoint(state.step).exists() {
            self.metrics.sync()?;
            state.save(&self.checkpoints(), metadata)?;
        }
        Ok(())
    }

    /// The best of the checkpoints that are there.
    pub fn best_checkpoint(&self) -> Result<Option<Best>> {
        let saved = Checkpoint::steps(&self.checkpoints())?;
        Ok(best(&self.metrics, |step| saved.contains(&step)))
    }

    /// Adds a line to `metrics.jsonl`, and its numbers to TensorBoard's file.
    pub fn log(&mut self, line: &Map<String, Json>) -> Result<()> {
        self.metrics.append(line)?;
        let Some(step) = line.get(names::STEP).and_then(Json::as_u64) else { return Ok(()) };
        let numbers = line.iter().filter(|(key, _)| *key != names::STEP);
        let numbers = numbers.filter_map(|(key, value)| Some((key.as_str(), value.as_f64()?)));
        self.events()?.scalars(step as usize, numbers)
    }

    /// Adds the sample grid of a step, which is on disk, to TensorBoard's file.
    pub fn log_samples(&mut self, step: usize) -> Result<()> {
        let path = self.samples(step);
        let read = || -> Result<_> { Ok((image::image_dimensions(&path)?, fs::read(&path)?)) };
        let (size, png) = read().with_context(|| format!("reading {}", path.display()))?;
        self.events()?.image(step, "samples", size, &png)
    }

    fn events(&mut self) -> Result<&mut EventFile> {
        let events = match self.events.take() {
            Some(events) => events,
            None => EventFile::create(&self.dir.join("tensorboard"), self.events_from)?,
        };
        Ok(self.events.insert(events))
    }

    /// Drops the metrics of the steps after `step`: they will be made again.
    pub fn rewind_metrics(&mut self, step: usize) -> Result<()> {
        self.events_from = Some(step + 1);
        self.metrics.rewind(step)
    }

    /// Whether `report.html` is old enough to be written again: five seconds, or more where that took more than 50 ms.
    pub fn report_is_due(&self) -> bool {
        self.page_written.is_none_or(|(at, took)| at.elapsed() > Duration::from_secs(5).max(100 * took))
    }

    /// Writes `report.html` anew; `config` is the run's.
    pub fn write_report(&mut self, config: &Config, status: &Status) -> Result<()> {
        let started = Instant::now();
        let page = html::page(&html::Contents {
            dir: &self.dir,
            config,
            config_file: &self.config(),
            metrics: &self.metrics,
            status,
            pairs: &self.pairs()?,
            resident_peak: memory::resident_peak(),
        })?;
        write_bytes(&self.dir.join("report.html"), page.as_bytes())?;
        self.page_written = Some((Instant::now(), started.elapsed()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::{Adapters, Factor};
    use crate::optim::AdamW;
    use candle_core::{DType, Device, Tensor};
    use serde_json::json;

    fn state(step: usize) -> Checkpoint {
        let zeros = |shape| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let adapters = Adapters::new(vec![Factor::new("to_q", zeros((1, 2)), zeros((2, 1)), 1.0).unwrap()]).unwrap();
        let config = Config::parse("prompts.list = ['a']", "test", &[]).unwrap();
        let optimizer = AdamW::new(&config.optimizer, &adapters.tensors()).unwrap();
        Checkpoint {
            step,
            optimizer,
            adapters,
            ema: None,
            loss_scale: None,
            statistics: Default::default(),
            matching: None,
        }
    }

    #[test]
    fn a_folder_that_was_taken_for_a_run_and_not_used_is_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("runs/one");
        let run = Run::start(&dir).unwrap();
        assert!(Run::start(&dir).is_err() && Run::resume(&dir).is_err());
        drop(run);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

        let run = Run::start(&dir).unwrap();
        run.save_config("").unwrap();
        drop(run);
        assert!(Run::start(&dir).err().unwrap().to_string().contains("already holds a run"));
        Run::resume(&dir).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn a_checkpoint_is_not_saved_where_its_metrics_cannot_be() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = Run::start(&folder.path().join("run")).unwrap();
        run.save_config("").unwrap();
        run.save(&state(0), &HashMap::new()).unwrap();
        run.log(json!({ "step": 1, "loss": 1.0 }).as_object().unwrap()).unwrap();
        run.save(&state(1), &HashMap::new()).unwrap();
        fs::remove_file(run.metrics_file()).unwrap();
        let error = run.save(&state(2), &HashMap::new()).unwrap_err();
        assert!(format!("{error:#}").contains("metrics.jsonl"), "{error:#}");
        assert_eq!(Checkpoint::steps(&run.checkpoints()).unwrap(), [0, 1]);
    }

    #[test]
    fn the_best_checkpoint_is_one_that_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = Run::start(&folder.path().join("run")).unwrap();
        for (step, loss) in [(0, 3.0), (1, 1.0), (2, 2.0)] {
            run.log(json!({ "step": step, "sample/loss": loss }).as_object().unwrap()).unwrap();
        }
        assert_eq!(run.best_checkpoint().unwrap(), None);
        run.save(&state(0), &HashMap::new()).unwrap();
        run.save(&state(2), &HashMap::new()).unwrap();
        assert_eq!(run.best_checkpoint().unwrap().map(|best| best.step), Some(2));
    }
}
