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
mod chart;
mod experiment;
mod pictures;
mod report;

use anyhow::{Result, bail};

use crate::cli::{Cli, Command};
use crate::config::Precision;

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

/// What this build can compute on.
///
/// # Errors
/// A device or a number format that it has no kernels for.
fn check_device(device: &str, precision: Precision) -> Result<()> {
    if device != "cpu" {
        bail!("device `{device}`: this build computes on the CPU only; use --device cpu (or run.device = \"cpu\")");
    }
    if precision != Precision::F32 {
        bail!(
            "precision {}: this build computes in f32 (half-precision weight files are read all the same); use --precision f32",
            format!("{precision:?}").to_lowercase()
        );
    }
    Ok(())
}
