//! The numbers of a run: `metrics.jsonl`, read once and kept in memory. Every line has a step.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value as Json};

use crate::files::{sync_folder, write_bytes};

/// The names of a run's metrics, all of them.
pub mod names {
    /// Optimizer steps done when the line was written; in every line.
    pub const STEP: &str = "step";
    /// Mean loss of the step's batch.
    pub const LOSS: &str = "loss";
    /// Norm of the gradients before they were clipped.
    pub const GRAD_NORM: &str = "grad_norm";
    /// Mean distance of the batch's noise predictions from the base model's.
    pub const DISTANCE: &str = "distance";
    /// Mean rise of the loss where the images are moved against the rewards (RSA-FT's S1).
    pub const SHARPNESS: &str = "sharpness";
    /// Of policy gradients: root mean square of the distance from 1 of the ratios of new to old density.
    pub const RATIO_SPREAD: &str = "policy/ratio_spread";
    /// Of policy gradients: the share of these ratios outside of the clip range.
    pub const OUTSIDE_CLIP: &str = "policy/outside_clip";
    /// Of reward-weighted regression: the weighted mean of its loss.
    pub const REGRESSION_LOSS: &str = "regression/loss";
    /// Of reward-weighted regression: the share of images that is learned from.
    pub const REGRESSION_KEPT: &str = "regression/kept";
    /// Of Adjoint Matching: its loss, of the steps below the threshold.
    pub const MATCHING_LOSS: &str = "matching/loss";
    /// Of Adjoint Matching: the share of the steps below the threshold.
    pub const MATCHING_KEPT: &str = "matching/kept";
    /// The step's learning rate.
    pub const LR: &str = "lr";
    /// Differentiated denoising steps an image.
    pub const BACKPROP_STEPS: &str = "backprop_steps";
    /// What the step took.
    pub const SECONDS: &str = "seconds";
    /// 1 where a step was skipped.
    pub const SKIPPED: &str = "skipped";
    /// Why it was skipped: a text.
    pub const CAUSE: &str = "cause";
    /// Mean loss of a sample grid.
    pub const SAMPLE_LOSS: &str = "sample/loss";
    /// The weighted rewards of training, on the guard's images.
    pub const GUARD_REWARD: &str = "guard/reward";
    /// The weighted held-out rewards, on the guard's images.
    pub const GUARD_HELD_OUT: &str = "guard/held_out";
    /// Mean distance of the noise predictions from the base model's, on the guard's images.
    pub const GUARD_DISTANCE: &str = "guard/distance";
    /// The same of the training rewards on the guard's images, where the guard looks at it.
    pub const GUARD_SHARPNESS: &str = "guard/sharpness";
    /// Mean distance of the images of one prompt from each other.
    pub const GUARD_DIVERSITY: &str = "guard/diversity";

    /// How the names of rewards in training batches begin.
    pub const REWARDS: &str = "reward/";
    /// How the names of rewards of sample grids begin.
    pub const SAMPLES: &str = "sample/";
    /// How the names of spreads end.
    const STD: &str = "_std";

    /// A reward's mean over the step's batch.
    pub fn reward(name: &str) -> String {
        format!("{REWARDS}{name}")
    }

    /// A reward's standard deviation over the step's batch.
    pub fn reward_std(name: &str) -> String {
        format!("{REWARDS}{name}{STD}")
    }

    /// A reward's mean over a sample grid.
    pub fn sample(name: &str) -> String {
        format!("{SAMPLES}{name}")
    }

    /// One reward's part of [`GUARD_REWARD`] or [`GUARD_HELD_OUT`], without its weight.
    pub fn part(of: &str, name: &str) -> String {
        format!("{of}/{name}")
    }

    /// `reward` of `reward/aesthetic`; empty for `loss`.
    pub fn group(name: &str) -> &str {
        name.rsplit_once('/').map_or("", |(group, _)| group)
    }

    /// `aesthetic` of `reward/aesthetic`.
    pub fn base(name: &str) -> &str {
        name.rsplit('/').next().unwrap_or(name)
    }

    /// Whether it is a standard deviation.
    pub fn is_spread(name: &str) -> bool {
        name.ends_with(STD)
    }

    /// Whether it is measured on training batches.
    pub fn is_of_batches(name: &str) -> bool {
        matches!(group(name), "" | "reward")
    }
}

/// The metrics of one run. The file is read when a value of this type is made; lines are added to both.
pub struct Metrics {
    path: PathBuf,
    /// The file's lines with their steps.
    lines: Vec<(usize, String)>,
    /// The values of each name, in the order in which the names appear.
    series: Vec<(String, Vec<(usize, f64)>)>,
}

impl Metrics {
    /// Reads a file, which may be absent; lines that were cut off are left out.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            text => text.with_context(|| format!("reading {}", path.display()))?,
        };
        let mut metrics = Self { path: path.to_owned(), lines: Vec::new(), series: Vec::new() };
        text.lines().for_each(|line| metrics.keep(line));
        Ok(metrics)
    }

    /// Adds a line to the file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn append(&mut self, line: &Map<String, Json>) -> Result<()> {
        let text = serde_json::to_string(line)?;
        let write = || {
            let mut file = OpenOptions::new().create(true).append(true).open(&self.path)?;
            file.write_all(format!("{text}\n").as_bytes())
        };
        write().with_context(|| format!("writing {}", self.path.display()))?;
        // as reading the file would give it, to the last bit: a resumed run decides as the uninterrupted one
        self.keep(&text);
        Ok(())
    }

    /// Waits until all lines are on disk.
    ///
    /// # Errors
    /// The file is gone, or the disk fails.
    pub fn sync(&self) -> Result<()> {
        if self.lines.is_empty() {
            return Ok(());
        }
        let sync = || -> Result<()> {
            File::options().append(true).open(&self.path)?.sync_data()?;
            sync_folder(self.path.parent().unwrap_or(Path::new(".")))
        };
        sync().with_context(|| format!("writing {}", self.path.display()))
    }

    /// Drops the lines of the steps after `step`, which will be made again, and what was cut off.
    ///
    /// # Errors
    /// The file cannot be replaced.
    pub fn rewind(&mut self, step: usize) -> Result<()> {
        self.lines.retain(|(at, _)| *at <= step);
        self.series.iter_mut().for_each(|(_, points)| points.retain(|(at, _)| *at <= step));
        self.series.retain(|(_, points)| !points.is_empty());
        let text: String = self.lines.iter().flat_map(|(_, line)| [line, "\n"]).collect();
        write_bytes(&self.path, text.as_bytes())
    }

    /// Every value of one metric with its step, as far as it was logged.
    pub fn history(&self, name: &str) -> &[(usize, f64)] {
        self.series.iter().find(|(of, _)| of == name).map_or(&[], |(_, points)| points)
    }

    /// Whether a metric has a value of this step.
    pub fn has(&self, name: &str, step: usize) -> bool {
        self.history(name).iter().rev().any(|(at, _)| *at == step)
    }

    /// All metrics with their values, in the order in which their names appear; steps and texts are not among them.
    pub fn all(&self) -> impl Iterator<Item = (&str, &[(usize, f64)])> {
        self.series.iter().map(|(name, points)| (name.as_str(), points.as_slice()))
    }

    /// The last step that has a line; 0 without lines.
    pub fn last_step(&self) -> usize {
        self.lines.iter().map(|(step, _)| *step).max().unwrap_or(0)
    }

    fn keep(&mut self, line: &str) {
        let Ok(row) = serde_json::from_str::<Map<String, Json>>(line) else { return };
        let Some(step) = row.get(names::STEP).and_then(Json::as_u64) else { return };
        let step = step as usize;
        self.lines.push((step, line.to_owned()));
        for (name, value) in row {
            let Some(value) = value.as_f64().filter(|_| name != names::STEP) else { continue };
            match self.series.iter_mut().find(|(of, _)| *of == name) {
                Some((_, points)) => points.push((step, value)),
                None => self.series.push((name, vec![(step, value)])),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn line(value: Json) -> Map<String, Json> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_file_is_read_once_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let text: String = (1..=2000).map(|step| format!("{{\"step\":{step},\"loss\":{}}}\n", step * 2)).collect();
        fs::write(&path, text).unwrap();
        let mut metrics = Metrics::read(&path).unwrap();
        // whatever happens to the file from here on, what was measured is known
        fs::remove_file(&path).unwrap();
        metrics.append(&line(json!({ "step": 2001, "loss": 0.5 }))).unwrap();
        let history = metrics.history(names::LOSS);
        assert_eq!(
            (history.len(), history[0], history[1999], history[2000]),
            (2001, (1, 2.0), (2000, 4e3), (2001, 0.5))
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":2001,\"loss\":0.5}\n");
        assert!(metrics.has(names::LOSS, 7) && !metrics.has(names::LOSS, 2002) && metrics.history("other").is_empty());
        metrics.rewind(1999).unwrap();
        assert_eq!((metrics.history(names::LOSS).len(), metrics.last_step()), (1999, 1999));
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 1999);
    }

    #[test]
    fn what_is_kept_is_what_the_file_gives() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = Metrics::read(&path).unwrap();
        // reading a number may be off in its last bit
        let mut value = 0.1f64;
        for step in 1..500 {
            value = (value * 7.3).fract() + 1e-9;
            let name = names::reward("hps");
            metrics.append(&line(json!({ "step": step, name: value, "cause": "text", "none": f64::NAN }))).unwrap();
        }
        let again = Metrics::read(&path).unwrap();
        assert!(metrics.all().eq(again.all()));
        assert_eq!(metrics.all().map(|(name, _)| name).collect::<Vec<_>>(), ["reward/hps"]);
    }

    #[test]
    fn rewinding_drops_later_steps_and_what_was_cut_off_and_keeps_lines_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let kept = "{ \"step\": 1, \"loss\": 1.50 }\n{\"step\":2,\"skipped\":1,\"cause\":\"x\"}\n";
        fs::write(&path, format!("{kept}{{\"step\":3,\"lr\":1}}\n{{\"step\":2,\"lo")).unwrap();
        let mut metrics = Metrics::read(&path).unwrap();
        assert_eq!((metrics.last_step(), metrics.history(names::LR).len()), (3, 1));
        metrics.rewind(2).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), kept);
        assert_eq!(metrics.all().map(|(name, _)| name).collect::<Vec<_>>(), ["loss", "skipped"]);
    }
}
