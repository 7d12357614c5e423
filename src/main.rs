use std::process::ExitCode;

use alignprop::allocator::{Allocator, keep_pages};
use alignprop::config::shown_lines;
use alignprop::training::signals::Interrupted;
use clap::Parser;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() -> ExitCode {
    keep_pages();
    let cli = alignprop::cli::Cli::parse();
    match alignprop::commands::run(cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            if let Some(interrupted) = error.downcast_ref::<Interrupted>() {
                eprintln!("{interrupted}");
                return ExitCode::from(interrupted.exit_code());
            }
            eprintln!("error: {}", shown_lines(error.to_string()));
            error.chain().skip(1).for_each(|cause| eprintln!("  caused by: {}", shown_lines(cause.to_string())));
            ExitCode::FAILURE
        }
    }
}
