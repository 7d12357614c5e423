//! The commands: recipes, read from top to bottom.

pub mod bench;
pub mod eval;
pub mod export;
pub mod fit;
pub mod manual;
pub mod presets;
pub mod runs;
pub mod sample;
pub mod score;
pub mod soup;
pub mod train;
pub mod verify;

mod base_model;
mod experiment;

use anyhow::Result;

use crate::cli::{Cli, Command};

/// Runs the command; the exit code of the process is 0 for `Ok(true)`, 1 for `Ok(false)` and for errors.
pub fn run(cli: Cli) -> Result<bool> {
    match cli.command {
        Command::Train(args) => train::run(&args).map(|()| true),
        Command::Eval(args) => eval::run(&args).map(|()| true),
        Command::Fit(args) => fit::run(&args).map(|()| true),
        Command::Score(args) => score::run(&args).map(|()| true),
        Command::Soup(args) => soup::run(&args).map(|()| true),
        Command::Export(args) => export::run(&args).map(|()| true),
        Command::Sample(args) => sample::run(&args).map(|()| true),
        Command::Config(args) => presets::run(&args).map(|()| true),
        Command::Runs(args) => runs::run(&args).map(|()| true),
        Command::Verify(args) => verify::run(&args),
        Command::Bench(args) => bench::run(&args).map(|()| true),
        Command::Completions(args) => manual::completions(args.shell).map(|()| true),
        Command::Man(args) => manual::man(&args.dir).map(|()| true),
    }
}
