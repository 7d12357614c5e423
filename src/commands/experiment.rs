//! Configs and checkpoints that the command line names.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::cli::ConfigArgs;
use crate::config::{Config, RunConfig, nearest};
use crate::files::{carried_in, located};
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
            Some(given) => Config::load(&config_file(given)?, settings)?,
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
        Some(given) => Config::load(&config_file(given)?, settings),
        None => Config::parse(fallback.0, fallback.1, settings),
    }
}

/// The file that `--config` means: a path, or the name of a preset.
///
/// # Errors
/// What can only be a name is none of them.
pub(super) fn config_file(given: &Path) -> Result<Cow<'_, Path>> {
    let file = located(given)?;
    let name = given.to_str().filter(|name| !file.is_file() && !name.contains(['/', '\\', '.']));
    let Some(name) = name else { return Ok(file) };
    let preset = PathBuf::from(format!("{PRESETS}/{name}.toml"));
    let file = located(&preset)?.into_owned();
    if !file.is_file() {
        let known = preset_names();
        let hint = nearest(name, &known).map(|name| format!("; did you mean `{name}`?")).unwrap_or_default();
        bail!("there is no file `{name}`, and no preset of this name (there are {}){hint}", known.join(", "));
    }
    Ok(Cow::Owned(file))
}

/// The names of the presets that the program carries.
pub(super) fn preset_names() -> Vec<String> {
    let names = carried_in(PRESETS).into_iter().filter_map(|file| Path::new(file).file_stem()?.to_str());
    names.map(str::to_owned).collect()
}

/// Where presets lie, in the repository and in the program.
const PRESETS: &str = "configs";

/// Every key at its default.
pub(super) const DEFAULTS: (&str, &str) = ("", "the defaults");

/// The experiment that trains without a config: the small model that the repository carries.
pub(super) const EMBEDDED: (&str, &str) = (include_str!("../../configs/emoji.toml"), "configs/emoji.toml, the default");
