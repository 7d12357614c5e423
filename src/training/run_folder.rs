//! A run on disk: `config.toml`, `metrics.jsonl`, `samples/`, `checkpoints/`.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value as Json};

use super::checkpoint::{Checkpoint, folder_name};

/// A folder that holds one run.
pub struct RunFolder {
    dir: PathBuf,
}

impl RunFolder {
    /// Makes the folder of a new run and saves its resolved config.
    ///
    /// # Errors
    /// The folder holds a run already.
    pub fn create(dir: &Path, config_toml: &str) -> Result<Self> {
        Self::check_free(dir)?;
        let run = Self { dir: dir.to_owned() };
        fs::create_dir_all(dir).with_context(|| format!("making the run folder {}", dir.display()))?;
        run.save_config(config_toml)?;
        Ok(run)
    }

    /// # Errors
    /// The folder holds a run, or cannot be one.
    pub fn check_free(dir: &Path) -> Result<()> {
        let run = Self { dir: dir.to_owned() };
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
        let run = Self { dir: dir.to_owned() };
        if !run.config().is_file() {
            bail!("{} is no run folder: it has no config.toml", dir.display());
        }
        Ok(run)
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

    /// Adds a line to `metrics.jsonl`.
    pub fn log(&self, line: &Map<String, Json>) -> Result<()> {
        let path = self.metrics();
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        let write = || OpenOptions::new().create(true).append(true).open(&path)?.write_all(text.as_bytes());
        write().with_context(|| format!("writing {}", path.display()))
    }

    /// Drops the metrics of the steps after `step`: they will be made again.
    pub fn rewind_metrics(&self, step: usize) -> Result<()> {
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
        let text = self.metrics_text()?;
        let rows = text.lines().filter_map(|line| serde_json::from_str::<Map<String, Json>>(line).ok());
        Ok(rows.filter_map(|row| Some((row.get("step")?.as_u64()? as usize, row.get(metric)?.as_f64()?))).collect())
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
