//! `alignprop config`: the experiments that the program carries.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::experiment::{config_file, preset_names};
use crate::cli::PresetArgs;

pub fn run(args: &PresetArgs) -> Result<()> {
    if let Some(name) = &args.name {
        say!("{}", text_of(name)?.trim_end());
        return Ok(());
    }
    let names = preset_names();
    let width = names.iter().map(String::len).max().unwrap_or(0);
    for name in names {
        say!("{name:width$}  {}", first_sentence(&text_of(Path::new(&name))?));
    }
    Ok(())
}

fn text_of(name: &Path) -> Result<String> {
    let file = config_file(name)?;
    fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
}

/// What the comment at the head of a config begins with.
fn first_sentence(config: &str) -> String {
    let head = config.lines().map_while(|line| line.strip_prefix("# ")).collect::<Vec<_>>().join(" ");
    head.split_once(". ").map_or(head.as_str(), |(first, _)| first).trim_end_matches('.').to_owned()
}
