//! `alignprop completions` and `alignprop man`: the command line as shells and `man` read it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::{Shell, generate};

use crate::cli::Cli;

pub fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    generate(shell, &mut Cli::command(), "alignprop", &mut script);
    say!("{}", String::from_utf8(script)?.trim_end());
    Ok(())
}

/// One page for the program and one for each command: `alignprop.1`, `alignprop-train.1`.
pub fn man(dir: &Path) -> Result<()> {
    let write = || {
        fs::create_dir_all(dir)?;
        clap_mangen::generate_to(Cli::command(), dir)
    };
    write().with_context(|| format!("writing man pages to {}", dir.display()))
}
