use std::process::ExitCode;

use alignprop::allocator::{Allocator, keep_pages};
use alignprop::files::Bundle;
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
    match alignprop::commands::run(cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            if let Some(interrupted) = error.downcast_ref::<Interrupted>() {
                eprintln!("{interrupted}");
                return ExitCode::from(interrupted.exit_code());
            }
            eprintln!("error: {error}");
            error.chain().skip(1).for_each(|cause| eprintln!("  caused by: {cause}"));
            ExitCode::FAILURE
        }
    }
}
