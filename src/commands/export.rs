//! `alignprop export`: a LoRA in the format of another program, or a whole model with the LoRA folded in.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value as Json;

use super::base_model;
use super::experiment::{Checkpointed, checkpoint_of};
use crate::cli::{ExportArgs, ExportFormat};
use crate::config::{ModelConfig, Precision, concerns};
use crate::lora::Adapters;
use crate::lora::formats::{self, Generation, KohyaHeader};
use crate::models::Source;
use crate::models::merge::save_merged;

pub fn run(args: &ExportArgs) -> Result<()> {
    let found = checkpoint_of(&args.checkpoint, &args.config, &args.config.set)?;
    let loaded = formats::load(&found.adapters)?;
    loaded.warn(&found.adapters);
    let adapters = loaded.adapters.scaled(args.lora_scale);
    let mut metadata = loaded.metadata;
    let named = base_model::named_by(&metadata, &found.adapters);
    let model = model_of(args, &found, named.clone());
    metadata.retain(|key, value| !is_of_another_program(key) && !has_folders(key, value));
    if let Some(name) = named.as_ref().or(model.as_ref().map(|model| &model.path)) {
        metadata.insert("base_model".into(), base_model::public_name(name));
    }
    let title = title(&args.checkpoint);
    let out = match &args.out {
        Some(out) => out.clone(),
        None => found.run.as_deref().unwrap_or(Path::new("")).join("export"),
    };
    let precision = args.precision.unwrap_or(Precision::F32);

    let written = match args.format {
        ExportFormat::Diffusers => {
            let file = inside(&out, args.out.is_none(), "pytorch_lora_weights.safetensors")?;
            formats::save_diffusers(&adapters, &metadata, precision, &file)?;
            file
        }
        ExportFormat::Kohya => {
            let file = inside(&out, args.out.is_none(), &format!("{title}.safetensors"))?;
            let header = kohya_header(&adapters, model.as_ref(), title)?;
            formats::save_kohya(&adapters, &metadata, &header, precision, &file)?;
            file
        }
        ExportFormat::Peft => {
            let folder = if args.out.is_none() { out.join("peft") } else { out };
            formats::save_peft(&adapters, &metadata, precision, &folder)?;
            folder
        }
        ExportFormat::Merged => {
            let folder = if args.out.is_none() { out.join("merged") } else { out };
            let Some(model) = model else {
                bail!(
                    "{} does not say which model it is for: give the pipeline with --model, to fold the LoRA into it",
                    found.adapters.display()
                );
            };
            let source = Source::pipeline(&model)?;
            save_merged(&source, model.variant.as_deref(), &adapters, args.precision, &folder)?;
            folder
        }
    };
    say!("{}", written.display());
    Ok(())
}

/// Whether a key of the header is one that kohya's scripts write for themselves.
fn is_of_another_program(key: &str) -> bool {
    ["ss_", "modelspec.", "sshs_"].iter().any(|start| key.starts_with(start))
}

/// Whether a string of the header names folders of this machine, which are nothing for others.
fn has_folders(key: &str, value: &str) -> bool {
    Path::new(value).is_absolute() || (key == "soup" && value.contains(['/', '\\']))
}

/// The model of the command line, of the run, of the config, or the one that the file names; the defaults' is no answer.
fn model_of(args: &ExportArgs, found: &Checkpointed, named: Option<String>) -> Option<ModelConfig> {
    let config = &found.config.model;
    let is_said = found.has_config || args.config.set.iter().any(|setting| concerns(setting, "model.path"));
    let path = match &args.model {
        Some(model) => model.clone(),
        None if is_said => config.path.clone(),
        None => named?,
    };
    Some(ModelConfig { path, ..config.clone() })
}

/// A file of this name in a folder, or the file itself; the folder for results is made.
fn inside(out: &Path, is_folder: bool, name: &str) -> Result<PathBuf> {
    if is_folder {
        fs::create_dir_all(out).with_context(|| format!("making the folder {}", out.display()))?;
    }
    Ok(if out.is_dir() { out.join(name) } else { out.to_owned() })
}

/// What the adapter is called: by its file, or by its folder where the file has the name that all have.
fn title(checkpoint: &Path) -> String {
    let stem = |path: &Path| path.file_stem().map(|name| name.to_string_lossy().into_owned());
    let whole = checkpoint.canonicalize().unwrap_or_else(|_| checkpoint.to_owned());
    let name =
        if whole.is_dir() { whole.file_name().map(|name| name.to_string_lossy().into_owned()) } else { stem(&whole) };
    let common = ["pytorch_lora_weights", "adapter_model"];
    let name = match name {
        Some(name) if common.contains(&name.as_str()) => whole.parent().and_then(stem),
        name => name,
    };
    name.unwrap_or_else(|| "lora".into())
}

/// What kohya's header says of the base model: read from its configs, else from the width of the text that is attended to.
fn kohya_header(adapters: &Adapters, model: Option<&ModelConfig>, title: String) -> Result<KohyaHeader> {
    let described = model.map(|model| -> Result<KohyaHeader> {
        let source = Source::pipeline(model)?;
        let unet: Json = source.sub("unet").read_json("config.json")?;
        let scheduler: Json = source.sub("scheduler").read_json("scheduler_config.json")?;
        let generation = match (unet["addition_embed_type"] == "text_time", unet["use_linear_projection"] == true) {
            (true, _) => Generation::Xl,
            (false, true) => Generation::V2,
            (false, false) => Generation::V1,
        };
        Ok(KohyaHeader {
            title: title.clone(),
            generation: Some(generation),
            v_prediction: Some(scheduler["prediction_type"] == "v_prediction"),
            resolution: unet["sample_size"].as_u64().map(|side| (8 * side as usize, 8 * side as usize)),
            clip_skip: model.clip_skip,
        })
    });
    match described {
        Some(Ok(header)) => return Ok(header),
        Some(Err(error)) => {
            note!("warning: the base model's configs cannot be read ({error:#}); the header says less")
        }
        None => {}
    }
    let text = adapters.factors().iter().find(|factor| factor.module.ends_with("attn2.to_k"));
    let generation = text.and_then(|factor| match factor.in_features() {
        768 => Some(Generation::V1),
        1024 => Some(Generation::V2),
        2048 => Some(Generation::Xl),
        _ => None,
    });
    let v_prediction = (generation == Some(Generation::V1)).then_some(false);
    Ok(KohyaHeader { title, generation, v_prediction, ..Default::default() })
}
