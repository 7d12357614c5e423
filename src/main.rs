use std::process::ExitCode;

use alignprop::allocator::{Allocator, keep_pages};
use alignprop::cli::Command;
use alignprop::config::shown_lines;
use alignprop::files::Bundle;
use alignprop::terminal::{lost, note};
use alignprop::training::signals::Interrupted;
use clap::Parser;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// `assets/` and `configs/`, which build.rs lists.
static BUNDLE: Bundle = include!(concat!(env!("OUT_DIR"), "/bundle.rs"));

fn main() -> ExitCode {
    keep_pages();
    BUNDLE.provide();
    let cli = alignprop::cli::Cli::parse();
    // what a training made is in its files: words that were lost do not make it a failure
    let in_files = matches!(cli.command, Command::Train(_));
    let code = match alignprop::commands::run(cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            if let Some(interrupted) = error.downcast_ref::<Interrupted>() {
                note(format_args!("{interrupted}"));
                return ExitCode::from(interrupted.exit_code());
            }
            note(format_args!("error: {}", shown_lines(error.to_string())));
            error
                .chain()
                .skip(1)
                .for_each(|cause| note(format_args!("  caused by: {}", shown_lines(cause.to_string()))));
            return ExitCode::FAILURE;
        }
    };
    match lost() {
        None => code,
        Some(cause) if in_files => {
            note(format_args!("warning: the run is whole, but not what it says on stdout ({cause})"));
            code
        }
        Some(cause) => {
            note(format_args!(
                "error: what was printed is not whole; free the disk that stdout goes to, or send it elsewhere"
            ));
            note(format_args!("  caused by: writing to stdout: {cause}"));
            ExitCode::FAILURE
        }
    }
}
