//! Configs and checkpoints that the command line names.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cli::ConfigArgs;
use crate::config::{Config, RunConfig};
use crate::files::located;
use crate::ops::device::Compute;
use crate::training::run_folder::RunFolder;

/// What a run computes on.
///
/// # Errors
/// The device or a precision is not available in this build or on this machine.
pub(super) fn compute_of(run: &RunConfig) -> Result<Compute> {
    Ok(Compute::open(&run.device, run.precision, run.allow_tf32)?.with_graphs(run.cuda_graphs))
}

/// A LoRA with the config that it was trained with, where that is known.
pub(super) struct Checkpointed {
    pub config: Config,
    /// The LoRA file or its folder.
    pub adapters: PathBuf,
    /// The run folder that was given.
    pub run: Option<PathBuf>,
    /// Whether the config comes from a file and is not the defaults.
    pub has_config: bool,
}

/// A run folder (its last checkpoint, its config), a checkpoint in one, or a LoRA from elsewhere.
/// `settings` change its config.
pub(super) fn checkpoint_of(checkpoint: &Path, args: &ConfigArgs, settings: &[String]) -> Result<Checkpointed> {
    let is_run = checkpoint.join("config.toml").is_file();
    if is_run {
        let run = RunFolder::open(checkpoint)?;
        let config = match &args.config {
            Some(path) => Config::load(path, settings)?,
            None => run.read_config(settings)?,
        };
        let adapters = run.last_checkpoint()?;
        return Ok(Checkpointed { config, adapters, run: Some(checkpoint.to_owned()), has_config: true });
    }
    // RUN/checkpoints/step-NNNNNN, or the adapter in it: the run's config is known
    let in_run = checkpoint.ancestors().find(|folder| folder.file_name().is_some_and(|name| name == "checkpoints"));
    let run = in_run.and_then(Path::parent).and_then(|run| RunFolder::open(run).ok());
    let config = match (&args.config, &run) {
        (None, Some(run)) => run.read_config(settings)?,
        (path, _) => config_of(path.as_deref(), settings, DEFAULTS)?,
    };
    let has_config = args.config.is_some() || run.is_some();
    Ok(Checkpointed { config, adapters: checkpoint.to_owned(), run: None, has_config })
}

/// The config of `--config`, or `fallback` (its text and its name), with `settings` applied.
pub(super) fn config_of(path: Option<&Path>, settings: &[String], fallback: (&str, &str)) -> Result<Config> {
    match path {
        Some(path) => Config::load(&located(path)?, settings),
        None => Config::parse(fallback.0, fallback.1, settings),
    }
}

/// Every key at its default.
pub(super) const DEFAULTS: (&str, &str) = ("", "the defaults");

/// The experiment that trains without a config: the small model that the repository carries.
pub(super) const EMBEDDED: (&str, &str) = (include_str!("../../configs/emoji.toml"), "configs/emoji.toml, the default");
