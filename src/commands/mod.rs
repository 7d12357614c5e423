//! The commands: recipes, read from top to bottom.

pub mod bench;
pub mod eval;
pub mod export;
pub mod runs;
pub mod sample;
pub mod soup;
pub mod train;
pub mod verify;

mod budget;
mod experiment;

use anyhow::Result;

use crate::cli::{Cli, Command};
use crate::config::{Config, Precision};
use crate::ops::device::Compute;

/// Runs the command; the exit code of the process is 0 for `Ok(true)`, 1 for `Ok(false)` and for errors.
pub fn run(cli: Cli) -> Result<bool> {
    match cli.command {
        Command::Train(args) => train::run(&args).map(|()| true),
        Command::Eval(args) => eval::run(&args).map(|()| true),
        Command::Soup(args) => soup::run(&args).map(|()| true),
        Command::Export(args) => export::run(&args).map(|()| true),
        Command::Sample(args) => sample::run(&args).map(|()| true),
        Command::Runs(args) => runs::run(&args).map(|()| true),
        Command::Verify(args) => verify::run(&args),
        Command::Bench(args) => bench::run(&args).map(|()| true),
    }
}

/// What the config's run computes on, as `--device` and `--precision` change it. Both become the config's own.
///
/// # Errors
/// A device or a number format that this build or this machine has not.
fn open_device(config: &mut Config, device: Option<&str>, precision: Option<Precision>) -> Result<Compute> {
    let run = &mut config.run;
    if let Some(device) = device {
        device.clone_into(&mut run.device);
    }
    let compute = Compute::open(&run.device, precision.or(run.precision), run.allow_tf32)?.with_graphs(run.cuda_graphs);
    run.precision = Some(compute.precision());
    Ok(compute)
}

/// As [`open_device`], for a command that scores: `--reward-precision` becomes the config's own too.
///
/// # Errors
/// As there.
fn open_for_rewards(
    config: &mut Config,
    device: Option<&str>,
    precision: Option<Precision>,
    reward_precision: Option<Precision>,
) -> Result<Compute> {
    let compute = open_device(config, device, precision)?;
    let run = &mut config.run;
    run.reward_precision = reward_precision.or(run.reward_precision);
    compute.with_rewards_in(run.reward_precision)
}
