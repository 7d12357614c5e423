//! What a run does: its config, together with what the machine, the model and the named files decide.

use anyhow::{Result, bail};

use super::memory::{Budget, Estimate, Meter, Parts, Split, fitting, size};
use super::truncation::Plan;
use crate::config::{Checkpointing, CheckpointingChoice, Config, LoraConfig, Method, Precision, Prompt};
use crate::lora::{Adapters, take_over};
use crate::ops::Ledger;
use crate::rewards::Rewards;
use crate::sampling::Sampler;

/// The share of a GPU's free memory that stored steps may fill, which the run has for itself.
const STORING_ON_GPU: f64 = 0.9;
/// And of a machine's, which others use too.
const STORING_ON_HOST: f64 = 0.5;

/// What a config leaves open, decided once when a run starts or goes on. The config itself stays as it was read.
#[derive(Clone, Debug)]
pub struct RunPlan {
    /// Of weights and activations.
    pub precision: Precision,
    /// With rank, alpha and layers of the file that training starts from.
    pub lora: LoraConfig,
    /// Images of one micro-batch.
    pub batch_size: usize,
    /// Micro-batches of one optimizer step.
    pub gradient_accumulation_steps: usize,
    pub checkpointing: Checkpointing,
    /// Kept steps whose activations stay in memory.
    pub stored_steps: usize,
    /// `None` where the program's allocator does not count.
    pub memory: Option<MemoryPlan>,
}

/// The memory that a run is expected to need.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    pub estimate: Estimate,
    /// What it is compared with, in words.
    pub limit: String,
    /// Whether it is within that limit.
    pub fits: bool,
}

impl RunPlan {
    /// Decides what `config` leaves open for a run with these parts, which trains these adapters. `prompt` is one of its
    /// prompts.
    ///
    /// # Errors
    /// `[lora]` says something else than the adapters of `lora.init_from`. The run does not fit `train.memory_budget`.
    pub fn resolve(
        config: &Config,
        sampler: &Sampler,
        rewards: &Rewards,
        prompt: &Prompt,
        adapters: &Adapters,
    ) -> Result<Self> {
        let lora = match &config.lora.init_from {
            Some(file) => take_over(&config.lora, adapters, &sampler.pipeline.unet.targets(), file)?,
            None => config.lora.clone(),
        };
        let (split, memory) = fit(config, sampler, rewards, prompt, adapters)?;
        let Split { checkpointing, stored_steps, batch_size } = split;
        let gradient_accumulation_steps =
            config.train.gradient_accumulation_steps * (config.train.batch_size / batch_size);
        let precision = sampler.compute().precision();
        Ok(Self { precision, lora, batch_size, gradient_accumulation_steps, checkpointing, stored_steps, memory })
    }

    /// Images of one optimizer step.
    pub fn global_batch(&self) -> usize {
        self.batch_size * self.gradient_accumulation_steps
    }

    /// The plan in the config's own keys, as the run's folder keeps it: a run that goes on from there decides nothing anew.
    pub fn as_config(&self, config: &Config) -> Config {
        let mut resolved = config.clone();
        resolved.run.precision = Some(self.precision);
        resolved.lora = self.lora.clone();
        let train = &mut resolved.train;
        train.batch_size = self.batch_size;
        train.gradient_accumulation_steps = self.gradient_accumulation_steps;
        train.stored_steps = self.stored_steps;
        train.checkpointing = match self.checkpointing {
            Checkpointing::Step => CheckpointingChoice::Step,
            Checkpointing::Block => CheckpointingChoice::Block,
        };
        resolved
    }

    /// The memory line of a run's head: `226 MiB (..), of 20 GiB available; checkpointing `step`, ..`.
    pub fn describe_memory(&self, memory: &MemoryPlan) -> String {
        let mut name = format!("checkpointing `{:?}`", self.checkpointing).to_lowercase();
        match self.stored_steps {
            0 => {}
            1 => name += ", 1 step stored",
            n => name += &format!(", {n} steps stored"),
        }
        format!(
            "{}, {}; {name}, micro-batches of {} x {}",
            memory.estimate, memory.limit, self.batch_size, self.gradient_accumulation_steps
        )
    }
}

/// Estimates the run's memory and makes the choice that `checkpointing = "auto"` leaves open.
///
/// # Errors
/// The run does not fit `train.memory_budget`.
fn fit(
    config: &Config,
    sampler: &Sampler,
    rewards: &Rewards,
    prompt: &Prompt,
    adapters: &Adapters,
) -> Result<(Split, Option<MemoryPlan>)> {
    let train = &config.train;
    let (stored_steps, batch_size) = (train.stored_steps, train.batch_size);
    let asked = Split { checkpointing: train.checkpointing.into(), stored_steps, batch_size };
    let meter = Meter::of(sampler.compute());
    if meter.live()? == 0 {
        return Ok((asked, None));
    }
    let (conditioning, _) = Ledger::around(|ledger| sampler.conditioning(std::slice::from_ref(prompt), ledger))?;
    let parts = Parts {
        denoiser: sampler.denoiser(adapters, conditioning, Checkpointing::Step),
        vae: &sampler.pipeline.vae,
        rewards,
        prompt,
        timestep: sampler.schedule.steps()[0].timestep,
        latent_shape: sampler.latent_shape,
        steps: sampler.schedule.len(),
        differentiates_rewards: config.method.differentiates_rewards(),
        // on a GPU a round waits in the host's memory
        kept_latents: match sampler.compute().device().is_cpu() {
            true => {
                train.batch_size
                    * train.gradient_accumulation_steps
                    * config.method.kept_latents(sampler.schedule.len())
            }
            false => 0,
        },
    };
    let given = train.memory_budget.map(|gib| gib * f64::from(1 << 30));
    // the estimate includes what the process holds already
    let live = meter.live()? as f64;
    let free = meter.available();
    let budget = given.or_else(|| free.map(|free| free + live));
    let share = if sampler.compute().device().is_cpu() { STORING_ON_HOST } else { STORING_ON_GPU };
    let storing = given.or_else(|| free.map(|free| share * free + live)).unwrap_or(0.0);
    let step = parts.measure(Checkpointing::Step)?;
    let block = match train.checkpointing {
        CheckpointingChoice::Step => None,
        _ => Some(parts.measure(Checkpointing::Block)?),
    };
    let estimate = |split: Split| {
        let costs = block.as_ref().filter(|_| split.checkpointing == Checkpointing::Block).unwrap_or(&step);
        parts.estimate(costs, split.batch_size, split.stored_steps)
    };
    let (split, fits) = match train.checkpointing {
        CheckpointingChoice::Auto => {
            let most = match config.method {
                Method::Alignprop(_) => Plan::most_kept(&config.truncation, sampler.schedule.len()),
                _ => 0,
            };
            let budget = Budget { all: budget.unwrap_or(f64::INFINITY), storing };
            fitting(batch_size, most, budget, |split| estimate(split).total())
        }
        _ => (asked, budget.is_none_or(|budget| estimate(asked).total() <= budget)),
    };
    let estimate = estimate(split);
    if let (false, Some(given)) = (fits, train.memory_budget) {
        bail!(
            "the run needs {} by its estimate, more than train.memory_budget = {given} GiB; choose train.checkpointing = \"auto\", a smaller train.batch_size with more gradient_accumulation_steps, or a smaller sampler.height and sampler.width",
            size(estimate.total())
        );
    }
    let limit = match (given, budget) {
        (Some(given), _) => format!("of {} allowed (train.memory_budget)", size(given)),
        (None, Some(free)) => format!("of {} available", size(free)),
        (None, None) => "available memory unknown".to_owned(),
    };
    Ok((split, Some(MemoryPlan { estimate, limit, fits })))
}
