//! Fits a run into memory before it starts.

use anyhow::{Result, bail};

use super::experiment::Model;
use crate::config::{Checkpointing, CheckpointingChoice, Config, Prompt};
use crate::lora::Adapters;
use crate::ops::Ledger;
use crate::rewards::Rewards;
use crate::training::Plan;
use crate::training::memory::{Budget, Estimate, Meter, Parts, Split, fitting, size};

/// The share of a GPU's free memory that stored steps may fill, which the run has for itself.
const STORING_ON_GPU: f64 = 0.9;
/// And of a machine's, which others use too.
const STORING_ON_HOST: f64 = 0.5;

/// Estimates the run's memory, makes the choice that `checkpointing = "auto"` leaves open (in `config`, so that the run
/// keeps it), and says both on stderr. `None` where the program's allocator does not count.
///
/// # Errors
/// The run does not fit `train.memory_budget`.
pub(super) fn plan(
    config: &mut Config,
    model: &Model,
    rewards: &Rewards,
    adapters: &Adapters,
) -> Result<Option<Estimate>> {
    let meter = Meter::of(model.compute());
    if meter.live()? == 0 {
        config.train.checkpointing = explicit(config.train.checkpointing.into());
        return Ok(None);
    }
    let pipeline = &model.pipeline;
    let (prompting, _) = Ledger::around(|ledger| model.prompting(&[Prompt::default()], ledger))?;
    let parts = Parts {
        unet: &pipeline.unet,
        vae: &pipeline.vae,
        rewards,
        adapters,
        prompting: &prompting,
        timestep: model.schedule.steps()[0].timestep,
        latent_shape: model.latent_shape,
        steps: model.schedule.len(),
    };
    let train = &mut config.train;
    let given = train.memory_budget.map(|gib| gib * f64::from(1 << 30));
    // what the process holds already is not to be found again
    let live = meter.live()? as f64;
    let free = meter.available();
    let budget = given.or_else(|| free.map(|free| free + live));
    let share = if model.compute().device().is_cpu() { STORING_ON_HOST } else { STORING_ON_GPU };
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
    let (stored_steps, batch_size) = (train.stored_steps, train.batch_size);
    let asked = Split { checkpointing: train.checkpointing.into(), stored_steps, batch_size };
    let (split, fits) = match train.checkpointing {
        CheckpointingChoice::Auto => {
            let most = Plan::most_kept(&config.truncation, model.schedule.len());
            let budget = Budget { all: budget.unwrap_or(f64::INFINITY), storing };
            fitting(batch_size, most, budget, |split| estimate(split).total())
        }
        _ => (asked, budget.is_none_or(|budget| estimate(asked).total() <= budget)),
    };
    let estimate = estimate(split);
    train.checkpointing = explicit(split.checkpointing);
    train.stored_steps = split.stored_steps;
    train.gradient_accumulation_steps *= train.batch_size / split.batch_size;
    train.batch_size = split.batch_size;

    let mut name = format!("checkpointing `{:?}`", split.checkpointing).to_lowercase();
    match split.stored_steps {
        0 => {}
        1 => name += ", 1 step stored",
        n => name += &format!(", {n} steps stored"),
    }
    let limit = match (given, budget) {
        (Some(given), _) => format!("of {} allowed (train.memory_budget)", size(given)),
        (None, Some(free)) => format!("of {} available", size(free)),
        (None, None) => "available memory unknown".to_owned(),
    };
    eprintln!(
        "memory      {estimate}, {limit}; {name}, micro-batches of {} x {}",
        split.batch_size, train.gradient_accumulation_steps
    );
    if !fits && given.is_some() {
        bail!(
            "the run needs {} by its estimate, more than train.memory_budget = {} GiB; choose train.checkpointing = \"auto\", a smaller train.batch_size with more gradient_accumulation_steps, or a smaller sampler.height and sampler.width",
            size(estimate.total()),
            train.memory_budget.unwrap_or_default()
        );
    }
    if !fits {
        eprintln!("warning: the run may need more memory than is free");
    }
    Ok(Some(estimate))
}

fn explicit(checkpointing: Checkpointing) -> CheckpointingChoice {
    match checkpointing {
        Checkpointing::Step => CheckpointingChoice::Step,
        Checkpointing::Block => CheckpointingChoice::Block,
    }
}
