//! A whole pipeline in the diffusers layout, with adapters folded into its UNet: W + alpha / rank B A.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};
use safetensors::Dtype;
use serde_json::{Value as Json, json};

use super::{Source, Weights};
use crate::config::Precision;
use crate::files::{SafetensorsEntry, float_bytes, new_folder, replace_file, write_safetensors};
use crate::lora::{Adapters, Factor};
use crate::ops::is_finite;

/// What a tokenizer's folder may hold.
const TOKENIZER_FILES: [&str; 6] = [
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
];

/// Writes the pipeline of `source` into a new folder. The weights keep their types, or all floats get `precision`.
///
/// One tensor is in memory at a time, and the folder appears whole or not at all.
///
/// # Errors
/// `out` holds something already, a part of the pipeline is missing, an adapter is for another model, or a folded weight
/// does not fit into the precision.
pub fn save_merged(
    source: &Source,
    variant: Option<&str>,
    adapters: &Adapters,
    precision: Option<Precision>,
    out: &Path,
) -> Result<()> {
    new_folder(out, |folder| {
        let mut index: Json = serde_json::from_str(&source.read_text("model_index.json")?)?;
        copy_texts(source, "scheduler", &["scheduler_config.json"], folder)?;
        let second = source.sub("text_encoder_2").has_text("config.json")?;
        for tokenizer in ["tokenizer", "tokenizer_2"].iter().take(1 + usize::from(second)) {
            copy_texts(source, tokenizer, &TOKENIZER_FILES, folder)?;
            complete_tokenizer(&source.sub(tokenizer), &folder.join(tokenizer))?;
        }
        copy_texts(source, "feature_extractor", &["preprocessor_config.json"], folder)?;
        for (part, stem) in [
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
            ("text_encoder_2", "model"),
            ("safety_checker", "model"),
        ] {
            if part == "text_encoder_2" && !second {
                continue;
            }
            let from = source.sub(part);
            if part == "safety_checker" && (index[part][0].is_null() || from.find("config.json")?.is_none()) {
                index[part] = json!([null, null]);
                continue;
            }
            let write = || -> Result<()> {
                copy_texts(source, part, &["config.json"], folder)?;
                if let Some(precision) = precision {
                    set_type(&folder.join(part).join("config.json"), precision)?;
                }
                let weights = Weights::open(&from, stem, variant)?;
                let adapters = (part == "unet").then_some(adapters);
                write_weights(&weights, adapters, precision, &folder.join(part).join(format!("{stem}.safetensors")))
            };
            write().with_context(|| format!("the {part} of {}", source.label()))?;
        }
        if index["feature_extractor"][0].is_string() && !folder.join("feature_extractor").is_dir() {
            index["feature_extractor"] = json!([null, null]);
        }
        fs::write(folder.join("model_index.json"), serde_json::to_string_pretty(&index)?)?;
        Ok(())
    })
    .with_context(|| format!("writing the merged pipeline {}", out.display()))
}

/// Copies those of the files that the pipeline has.
fn copy_texts(source: &Source, part: &str, files: &[&str], folder: &Path) -> Result<()> {
    let from = source.sub(part);
    let to = folder.join(part);
    for file in files {
        if from.has_text(file)? {
            fs::create_dir_all(&to)?;
            fs::write(to.join(file), from.read_text(file)?)?;
        }
    }
    Ok(())
}

/// transformers reads weights as the type that the config names.
fn set_type(path: &Path, precision: Precision) -> Result<()> {
    let mut config: Json = serde_json::from_str(&fs::read_to_string(path)?)?;
    let name = match precision {
        Precision::F32 => "float32",
        Precision::F16 => "float16",
        Precision::Bf16 => "bfloat16",
    };
    for key in ["dtype", "torch_dtype"] {
        if let Some(named) = config.get_mut(key) {
            *named = name.into();
        }
    }
    fs::write(path, serde_json::to_string_pretty(&config)?)?;
    Ok(())
}

/// What transformers must be told of a tokenizer that came from elsewhere: its length, and 2.x's padding.
fn complete_tokenizer(source: &Source, folder: &Path) -> Result<()> {
    ensure!(folder.is_dir(), "{} has no tokenizer", source.label());
    let read = |name: &str| -> Result<Json> {
        let path = folder.join(name);
        Ok(if path.is_file() { serde_json::from_str(&fs::read_to_string(path)?)? } else { json!({}) })
    };
    let mut config = read("tokenizer_config.json")?;
    if config["model_max_length"].as_u64().is_none_or(|length| length > 1000) {
        config["model_max_length"] = 77.into();
        config["tokenizer_class"] = "CLIPTokenizer".into();
    }
    if let Some(pad) = source.pad_token() {
        config["pad_token"] = pad.into();
        let mut map = read("special_tokens_map.json")?;
        map["pad_token"] = pad.into();
        fs::write(folder.join("special_tokens_map.json"), serde_json::to_string_pretty(&map)?)?;
    }
    fs::write(folder.join("tokenizer_config.json"), serde_json::to_string_pretty(&config)?)?;
    Ok(())
}

fn candle_type(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        Dtype::F32 => Some(DType::F32),
        Dtype::F64 => Some(DType::F64),
        _ => None,
    }
}

fn write_weights(
    weights: &Weights,
    adapters: Option<&Adapters>,
    precision: Option<Precision>,
    path: &Path,
) -> Result<()> {
    let wanted = precision.map(|precision| match precision {
        Precision::F32 => Dtype::F32,
        Precision::F16 => Dtype::F16,
        Precision::Bf16 => Dtype::BF16,
    });
    let names = weights.names();
    check_layers(weights, &names, adapters)?;
    let entries = names.iter().map(|name| {
        let (dtype, shape) = weights.stored(name)?;
        let dtype = if candle_type(dtype).is_some() { wanted.unwrap_or(dtype) } else { dtype };
        Ok(SafetensorsEntry { name: name.clone(), dtype, shape })
    });
    let entries: Vec<SafetensorsEntry> = entries.collect::<Result<_>>()?;
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]); // diffusers and transformers demand it
    replace_file(path, |out| {
        write_safetensors(out, &metadata, &entries, |i| {
            let SafetensorsEntry { name, dtype, .. } = &entries[i];
            let factor = adapters.and_then(|adapters| adapters.get(name.strip_suffix(".weight")?));
            let (stored, _) = weights.stored(name)?;
            match (factor, candle_type(*dtype)) {
                (Some(factor), Some(to)) => {
                    let folded = fold(&weights.get_any(name)?, factor)?;
                    let finite = is_finite(&folded.to_dtype(to)?.to_dtype(DType::F32)?)?;
                    ensure!(finite, "`{name}` with the adapter does not fit into {dtype:?}; use --precision f32");
                    Ok(Cow::Owned(float_bytes(&folded, to)?))
                }
                (None, Some(to)) if stored != *dtype => Ok(Cow::Owned(float_bytes(&weights.get_any(name)?, to)?)),
                _ => weights.bytes(name),
            }
        })
    })
}

/// # Errors
/// Names the first adapted layer that the weights lack, or have in another shape.
fn check_layers(weights: &Weights, names: &[String], adapters: Option<&Adapters>) -> Result<()> {
    let known: HashSet<&str> = names.iter().map(String::as_str).collect();
    for factor in adapters.map_or(&[][..], Adapters::factors) {
        let name = format!("{}.weight", factor.module);
        if !known.contains(name.as_str()) {
            bail!("this LoRA is for another model: it adapts `{}`, which this UNet does not have", factor.module);
        }
        let shape = weights.shape(&name).unwrap_or_default();
        let (rows, columns) = (factor.out_features(), factor.in_features());
        ensure!(
            shape == [rows, columns] || shape == [rows, columns, 1, 1],
            "this LoRA is for another model: `{}` is a {columns} -> {rows} layer there and its weight {shape:?} in this UNet",
            factor.module
        );
    }
    Ok(())
}

/// W + alpha / rank B A, in f32 and in W's shape.
fn fold(weight: &Tensor, factor: &Factor) -> Result<Tensor> {
    let product = factor.b.matmul(&factor.a)?.affine(factor.scale(), 0.0)?;
    Ok((weight + product.reshape(weight.shape())?)?)
}
