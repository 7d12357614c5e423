//! A run on disk: `config.toml`, `metrics.jsonl`, `samples/`, `checkpoints/`, `tensorboard/`, `report.html`.

use std::cell::{Cell, RefCell};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value as Json};

use super::checkpoint::{Checkpoint, folder_name};
use super::events::EventFile;

/// A folder that holds one run.
pub struct RunFolder {
    dir: PathBuf,
    /// TensorBoard's file of this session, from its first line of metrics on.
    events: RefCell<Option<EventFile>>,
    /// The step from which on this session replaces what earlier ones wrote there.
    events_from: Cell<Option<usize>>,
}

impl RunFolder {
    /// The folder, whatever is in it.
    pub(crate) fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), events: RefCell::default(), events_from: Cell::default() }
    }

    /// Makes the folder of a new run and saves its resolved config.
    ///
    /// # Errors
    /// The folder holds a run already.
    pub fn create(dir: &Path, config_toml: &str) -> Result<Self> {
        Self::check_free(dir)?;
        let run = Self::at(dir);
        fs::create_dir_all(dir).with_context(|| format!("making the run folder {}", dir.display()))?;
        run.save_config(config_toml)?;
        Ok(run)
    }

    /// # Errors
    /// The folder holds a run, or cannot be one.
    pub fn check_free(dir: &Path) -> Result<()> {
        let run = Self::at(dir);
        if run.config().exists() || run.metrics().exists() {
            bail!(
                "{} already holds a run; go on with it by `--resume {}`, or choose another folder by `--set run.dir=DIR`",
                dir.display(),
                dir.display()
            );
        }
        if dir.exists() && !dir.is_dir() {
            bail!("{} is a file; choose a folder for the run by `--set run.dir=DIR`", dir.display());
        }
        Ok(())
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

    pub fn dir(&self) -> &Path {
        &self.dir
    }
    pub fn config(&self) -> PathBuf {
        self.dir.join("config.toml")
    }
    pub fn metrics(&self) -> PathBuf {
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
        let dir = self.dir.display().to_string();
        let plain = dir.chars().all(|c| c.is_alphanumeric() || "/._-+=:,@\\".contains(c));
        format!("alignprop train --resume {}", if plain { dir } else { format!("'{}'", dir.replace('\'', r"'\''")) })
    }
    /// The sample grid of a step.
    pub fn samples(&self, step: usize) -> PathBuf {
        self.dir.join("samples").join(format!("step-{step:06}.png"))
    }

    pub fn save_config(&self, config_toml: &str) -> Result<()> {
        write_whole(&self.config(), config_toml)
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
        Ok(Checkpoint::list(&self.checkpoints())?.is_empty() && self.metrics_text()?.is_empty())
    }

    /// Tidies up what a killed process may have left: files that were being written under another name.
    pub fn recover(&self) -> Result<()> {
        let folders = [self.dir.clone(), self.dir.join("samples")];
        let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten();
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if [".run-", ".lora-", ".picture-"].iter().any(|start| name.starts_with(start)) && path.is_file() {
                fs::remove_file(&path).with_context(|| format!("removing the unfinished {}", path.display()))?;
            }
        }
        Checkpoint::recover(&self.checkpoints())
    }

    /// Adds a line to `metrics.jsonl`, and its numbers to TensorBoard's file.
    pub fn log(&self, line: &Map<String, Json>) -> Result<()> {
        let path = self.metrics();
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        let write = || OpenOptions::new().create(true).append(true).open(&path)?.write_all(text.as_bytes());
        write().with_context(|| format!("writing {}", path.display()))?;
        let Some(step) = line.get("step").and_then(Json::as_u64) else { return Ok(()) };
        let numbers = line.iter().filter(|(key, _)| *key != "step");
        let numbers = numbers.filter_map(|(key, value)| Some((key.as_str(), value.as_f64()?)));
        self.with_events(|events| events.scalars(step as usize, numbers))
    }

    /// Adds the sample grid of a step, which is on disk, to TensorBoard's file.
    pub fn log_samples(&self, step: usize) -> Result<()> {
        let path = self.samples(step);
        let read = || -> Result<_> { Ok((image::image_dimensions(&path)?, fs::read(&path)?)) };
        let (size, png) = read().with_context(|| format!("reading {}", path.display()))?;
        self.with_events(|events| events.image(step, "samples", size, &png))
    }

    fn with_events(&self, write: impl FnOnce(&mut EventFile) -> Result<()>) -> Result<()> {
        let mut events = self.events.borrow_mut();
        if events.is_none() {
            *events = Some(EventFile::create(&self.dir.join("tensorboard"), self.events_from.get())?);
        }
        events.as_mut().map_or(Ok(()), write)
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

    /// Drops the metrics of the steps after `step`: they will be made again.
    pub fn rewind_metrics(&self, step: usize) -> Result<()> {
        self.events_from.set(Some(step + 1));
        let kept: String = self
            .metrics_text()?
            .lines()
            .filter(|line| step_of(line).is_some_and(|at| at <= step))
            .flat_map(|line| [line, "\n"])
            .collect();
        write_whole(&self.metrics(), &kept)
    }

    fn metrics_text(&self) -> Result<String> {
        match fs::read_to_string(self.metrics()) {
            Ok(text) => Ok(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            Err(error) => Err(error).with_context(|| format!("reading {}", self.metrics().display())),
        }
    }

    /// Every step's value of one metric, as far as it was logged.
    pub fn history(&self, metric: &str) -> Result<Vec<(usize, f64)>> {
        let rows = self.rows()?;
        Ok(rows.iter().filter_map(|(step, row)| Some((*step, row.get(metric)?.as_f64()?))).collect())
    }

    /// The lines of `metrics.jsonl` with their steps; a line that was cut off is left out.
    pub fn rows(&self) -> Result<Vec<(usize, Map<String, Json>)>> {
        let text = self.metrics_text()?;
        let rows = text.lines().filter_map(|line| serde_json::from_str::<Map<String, Json>>(line).ok());
        Ok(rows.filter_map(|row| Some((row.get("step")?.as_u64()? as usize, row))).collect())
    }
}

/// The step of a metrics line; `None` where a line was cut off.
fn step_of(line: &str) -> Option<usize> {
    let row: Map<String, Json> = serde_json::from_str(line).ok()?;
    Some(row.get("step")?.as_u64()? as usize)
}

/// Writes or replaces a text file whole.
pub fn write_whole(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let write = || -> Result<()> {
        let mut file = tempfile::Builder::new().prefix(".run-").make_in(folder, |path| fs::File::create(path))?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("writing {}", path.display()))
}
