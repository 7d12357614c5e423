//! What a run can go on from: adapters, optimizer state and step, written whole or not at all.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::adjoint_matching::Threshold;
use super::advantages::PromptStatistics;
use super::loss_scale::LossScale;
use crate::config::OptimizerConfig;
use crate::files::{UNFINISHED, sync_folder};
use crate::lora::{Adapters, formats};
use crate::optim::AdamW;

const LORA: &str = "pytorch_lora_weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
/// The moving average of the adapters, a LoRA file too; only where the run keeps one.
pub const EMA: &str = "pytorch_lora_weights_ema.safetensors";
const STATE: &str = "state.json";
/// The prompts' latest rewards, and Adjoint Matching's threshold, of runs that keep them.
const STATISTICS: &str = "statistics.safetensors";
const THRESHOLD: &str = "matching.threshold";

/// The state of a run between two optimizer steps.
#[derive(Clone)]
pub struct Checkpoint {
    /// Optimizer steps taken.
    pub step: usize,
    pub adapters: Adapters,
    pub optimizer: AdamW,
    /// The moving average of the adapters, if the run keeps one.
    pub ema: Option<Adapters>,
    /// Of runs in f16.
    pub loss_scale: Option<LossScale>,
    /// The prompts' latest rewards: empty but for DDPO.
    pub statistics: PromptStatistics,
    /// Of Adjoint Matching.
    pub matching: Option<Threshold>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    step: usize,
    optimizer_step: u64,
    /// Where activations are f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    loss_scale: Option<LossScale>,
}

/// `checkpoints/step-000025`.
pub fn folder_name(step: usize) -> String {
    format!("step-{step:06}")
}

impl Checkpoint {
    /// The same state on another device.
    pub fn to_device(mut self, device: &Device) -> Result<Self> {
        self.adapters = self.adapters.to_device(device)?;
        self.ema = self.ema.map(|ema| ema.to_device(device)).transpose()?;
        for (m, v) in &mut self.optimizer.moments {
            (*m, *v) = (m.to_device(device)?, v.to_device(device)?);
        }
        Ok(self)
    }

    /// Writes `parent/step-NNNNNN/`: into a folder of another name first, which is renamed when all of it is on disk.
    pub fn save(&self, parent: &Path, metadata: &HashMap<String, String>) -> Result<PathBuf> {
        let target = parent.join(folder_name(self.step));
        self.write(parent, &target, metadata)
            .with_context(|| format!("writing the checkpoint {}", target.display()))?;
        Ok(target)
    }

    fn write(&self, parent: &Path, target: &Path, metadata: &HashMap<String, String>) -> Result<()> {
        match fs::create_dir(parent) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(error).context("the run's folder is gone, or cannot be written to");
            }
            _ => {}
        }
        let unfinished = parent.join(format!("{UNFINISHED}{}", folder_name(self.step)));
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished)?;
        }
        fs::create_dir(&unfinished)?;
        formats::save(&self.adapters, metadata, &unfinished.join(LORA))?;
        if let Some(ema) = &self.ema {
            formats::save(ema, metadata, &unfinished.join(EMA))?;
        }
        let mut moments = HashMap::new();
        for ((name, _), (m, v)) in self.adapters.named_tensors().into_iter().zip(&self.optimizer.moments) {
            moments.insert(format!("exp_avg.{name}"), m.clone());
            moments.insert(format!("exp_avg_sq.{name}"), v.clone());
        }
        candle_core::safetensors::save(&moments, unfinished.join(OPTIMIZER))?;
        let state = State { step: self.step, optimizer_step: self.optimizer.step, loss_scale: self.loss_scale };
        fs::write(unfinished.join(STATE), serde_json::to_string_pretty(&state)?)?;
        let mut statistics = self.statistics.tensors()?;
        if let Some(Threshold { steps, value }) = self.matching {
            statistics.insert(THRESHOLD.to_owned(), Tensor::new(&[steps, value], &Device::Cpu)?);
        }
        if !statistics.is_empty() {
            candle_core::safetensors::save(&statistics, unfinished.join(STATISTICS))?;
            File::open(unfinished.join(STATISTICS))?.sync_all()?;
        }
        for name in [OPTIMIZER, STATE] {
            File::open(unfinished.join(name))?.sync_all()?;
        }
        sync_folder(&unfinished)?;
        let replaced = parent.join(format!(".replaced-{}", folder_name(self.step)));
        if target.exists() {
            fs::rename(target, &replaced)?;
        }
        fs::rename(&unfinished, target)?;
        if replaced.exists() {
            fs::remove_dir_all(&replaced)?;
        }
        sync_folder(parent)
    }

    /// Tidies up after a process that was killed while it wrote under `parent`: a checkpoint that was about to be
    /// replaced is put back, and what was not finished goes.
    pub fn recover(parent: &Path) -> Result<()> {
        let recover = || -> std::io::Result<()> {
            let entries = match fs::read_dir(parent) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                entries => entries?,
            };
            for entry in entries {
                let path = entry?.path();
                let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
                if let Some(step) = name.strip_prefix(".replaced-")
                    && !parent.join(step).exists()
                {
                    fs::rename(&path, parent.join(step))?;
                } else if [UNFINISHED, ".replaced-", ".removed"].iter().any(|start| name.starts_with(start)) {
                    if path.is_dir() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
                }
            }
            Ok(())
        };
        recover().with_context(|| format!("tidying up {}", parent.display()))
    }

    /// Reads a checkpoint folder; the optimizer's hyperparameters come from the config.
    pub fn load(folder: &Path, config: &OptimizerConfig) -> Result<Self> {
        Self::read(folder, config).with_context(|| {
            format!("reading the checkpoint {}; remove it to go on from the one before", folder.display())
        })
    }

    fn read(folder: &Path, config: &OptimizerConfig) -> Result<Self> {
        let text = fs::read_to_string(folder.join(STATE)).with_context(|| format!("{STATE} is missing"))?;
        let state: State = serde_json::from_str(&text).with_context(|| format!("{STATE} is damaged"))?;
        let adapters = formats::load(&folder.join(LORA))?.adapters;
        let moments = candle_core::safetensors::load(folder.join(OPTIMIZER), &Device::Cpu)
            .with_context(|| format!("{OPTIMIZER} is damaged"))?;
        let moment = |kind: &str, name: &str, like: &Tensor| -> Result<Tensor> {
            let tensor = moments
                .get(&format!("{kind}.{name}"))
                .with_context(|| format!("{OPTIMIZER} has no `{kind}.{name}`"))?;
            ensure!(
                tensor.dims() == like.dims(),
                "`{kind}.{name}` in {OPTIMIZER} is {:?}, the adapter {:?}",
                tensor.dims(),
                like.dims()
            );
            Ok(tensor.clone())
        };
        let pairs = adapters
            .named_tensors()
            .iter()
            .map(|(name, tensor)| Ok((moment("exp_avg", name, tensor)?, moment("exp_avg_sq", name, tensor)?)))
            .collect::<Result<Vec<_>>>()?;
        let optimizer = AdamW {
            betas: config.betas,
            eps: config.eps,
            weight_decay: config.weight_decay,
            step: state.optimizer_step,
            moments: pairs,
        };
        let ema = folder.join(EMA);
        let ema = if ema.is_file() { Some(formats::load(&ema)?.adapters) } else { None };
        let (mut statistics, mut matching) = (PromptStatistics::default(), None);
        let file = folder.join(STATISTICS);
        if file.is_file() {
            let read = || -> Result<_> {
                let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu)?;
                let threshold = tensors.remove(THRESHOLD).map(|numbers| numbers.to_vec1::<f64>()).transpose()?;
                Ok((PromptStatistics::from_tensors(tensors)?, threshold))
            };
            let threshold;
            (statistics, threshold) = read().with_context(|| format!("{STATISTICS} is damaged"))?;
            matching = match threshold.as_deref() {
                None => None,
                Some([steps, value]) => Some(Threshold { steps: *steps, value: *value }),
                Some(_) => bail!("{STATISTICS} is damaged: `{THRESHOLD}` has two numbers"),
            };
        }
        let State { step, loss_scale, .. } = state;
        Ok(Self { step, adapters, optimizer, ema, loss_scale, statistics, matching })
    }

    /// The checkpoints under `parent`, oldest first.
    pub fn list(parent: &Path) -> Result<Vec<PathBuf>> {
        Ok(Self::steps(parent)?.into_iter().map(|step| parent.join(folder_name(step))).collect())
    }

    /// The steps that have a checkpoint under `parent`, in order.
    pub fn steps(parent: &Path) -> Result<Vec<usize>> {
        let mut found = Vec::new();
        let entries = match fs::read_dir(parent) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("reading {}", parent.display())),
        };
        for entry in entries {
            let path = entry?.path();
            let step = path.file_name().and_then(|name| name.to_str()?.strip_prefix("step-")?.parse::<usize>().ok());
            // not a name that only looks like one: `step-7`
            found.extend(step.filter(|step| path.ends_with(folder_name(*step))));
        }
        found.sort();
        Ok(found)
    }

    /// Removes all but the last `keep` checkpoints and that of the step `best`; a `keep` of 0 keeps all.
    pub fn prune(parent: &Path, keep: usize, best: Option<usize>) -> Result<()> {
        let steps = Self::steps(parent)?;
        if keep == 0 {
            return Ok(());
        }
        for step in steps.iter().take(steps.len().saturating_sub(keep)).filter(|step| Some(**step) != best) {
            let old = parent.join(folder_name(*step));
            // renamed first: a folder that is half removed must not look like a checkpoint
            let removed = parent.join(".removed");
            let remove = || -> std::io::Result<()> {
                if removed.exists() {
                    fs::remove_dir_all(&removed)?;
                }
                fs::rename(&old, &removed)?;
                fs::remove_dir_all(&removed)
            };
            remove().with_context(|| format!("removing the old checkpoint {}", old.display()))?;
        }
        Ok(())
    }
}
