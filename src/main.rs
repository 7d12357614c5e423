use std::process::ExitCode;

use alignprop::training::memory::Counting;
use alignprop::training::signals::Interrupted;
use clap::Parser;

#[global_allocator]
static ALLOCATOR: Counting<mimalloc::MiMalloc> = Counting(mimalloc::MiMalloc);

/// `mi_option_purge_delay`, which the crate has no name for.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// In milliseconds.
const A_WEEK: std::ffi::c_long = 604_800_000;

fn main() -> ExitCode {
    if std::env::var_os("MIMALLOC_PURGE_DELAY").is_none() {
        // Freed pages stay until `memory::release` gives them back.
        // SAFETY: the option is a plain number that the allocator reads; no thread but this one runs yet.
        unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, A_WEEK) };
    }
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
