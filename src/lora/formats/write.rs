//! Writing LoRA files. The same input gives the same bytes, and a file appears whole or not at all.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor};
use serde_json::{Map, Value, json};

use super::{CONFIG_KEY, keys};
use crate::config::Precision;
use crate::files::{new_folder, save_tensors};
use crate::lora::{Adapters, Factor};

/// Writes the diffusers format in f32: what `load_lora_weights` and [`super::load`] read with the same alpha.
///
/// `metadata` goes into the header beside the config.
///
/// # Errors
/// There is no adapter, an alpha is not finite, or the file cannot be written.
pub fn save(adapters: &Adapters, metadata: &HashMap<String, String>, path: &Path) -> Result<()> {
    save_diffusers(adapters, metadata, Precision::F32, path)
}

/// As [`save`], in another precision.
pub fn save_diffusers(
    adapters: &Adapters,
    metadata: &HashMap<String, String>,
    precision: Precision,
    path: &Path,
) -> Result<()> {
    let write = || -> Result<()> {
        let config = config(adapters)?.into_iter().map(|(key, value)| (format!("unet.{key}"), value)).collect();
        let mut header: BTreeMap<String, String> = metadata.clone().into_iter().collect();
        header.insert("format".into(), "pt".into());
        header.insert(CONFIG_KEY.into(), Value::Object(config).to_string());
        save_tensors(path, &header, &named(adapters, "unet.")?, dtype(precision))
    };
    write().with_context(|| format!("writing the LoRA file {}", path.display()))
}

/// Makes a folder that `PeftModel.from_pretrained` reads: `adapter_model.safetensors` and `adapter_config.json`.
///
/// # Errors
/// As [`save`], and when `folder` holds something already.
pub fn save_peft(
    adapters: &Adapters,
    metadata: &HashMap<String, String>,
    precision: Precision,
    folder: &Path,
) -> Result<()> {
    let write = || -> Result<()> {
        // what peft 0.5 to 0.17 need; the rest has defaults
        let Value::Object(mut json) = json!({
            "peft_type": "LORA",
            "auto_mapping": null,
            "base_model_name_or_path": metadata.get("base_model"),
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_dropout": 0.0,
            "modules_to_save": null,
            "revision": null,
            "task_type": null,
            "use_dora": false,
            "use_rslora": false,
        }) else {
            bail!("the config is no object");
        };
        json.extend(config(adapters)?);
        let mut header: BTreeMap<String, String> = metadata.clone().into_iter().collect();
        header.insert("format".into(), "pt".into());
        let tensors = named(adapters, "base_model.model.")?;
        new_folder(folder, |folder| {
            fs::write(folder.join("adapter_config.json"), serde_json::to_string_pretty(&json)?)?;
            save_tensors(&folder.join("adapter_model.safetensors"), &header, &tensors, dtype(precision))
        })
    };
    write().with_context(|| format!("writing the adapter folder {}", folder.display()))
}

/// A generation of Stable Diffusion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    V1,
    V2,
    Xl,
}

/// What the header of a kohya file says of the base model and of its making.
#[derive(Clone, Debug, Default)]
pub struct KohyaHeader {
    /// What users call the adapter.
    pub title: String,
    /// Absent: not known.
    pub generation: Option<Generation>,
    /// v-prediction and not epsilon; absent: not known.
    pub v_prediction: Option<bool>,
    /// Height and width in pixels.
    pub resolution: Option<(usize, usize)>,
    /// As diffusers counts; kohya's scripts count one more.
    pub clip_skip: Option<usize>,
}

/// Writes what kohya's scripts, AUTOMATIC1111 and ComfyUI read, with the `ss_*` and `modelspec.*` strings that sd-scripts
/// writes (`train_network.py`, `sai_model_spec.py`), as far as they are known.
///
/// # Errors
/// As [`save`].
pub fn save_kohya(
    adapters: &Adapters,
    metadata: &HashMap<String, String>,
    about: &KohyaHeader,
    precision: Precision,
    path: &Path,
) -> Result<()> {
    let write = || -> Result<()> {
        let usual = config(adapters)?;
        let mut header: BTreeMap<String, String> = metadata.clone().into_iter().collect();
        let mut set = |key: &str, value: String| header.insert(key.to_owned(), value);
        set("ss_network_module", "networks.lora".into());
        set("ss_network_dim", usual["r"].to_string());
        set("ss_network_alpha", format!("{:?}", usual["lora_alpha"].as_f64().unwrap_or_default())); // 8.0, as Python prints
        set("ss_output_name", about.title.clone());
        if let Some(base_model) = metadata.get("base_model") {
            set("ss_sd_model_name", base_model.clone());
        }
        if let Some(seed) = metadata.get("seed") {
            set("ss_seed", seed.clone());
        }
        set("modelspec.sai_model_spec", "1.0.0".into());
        // sd-scripts' words for LoRAs
        set(
            "modelspec.implementation",
            match about.generation {
                Some(Generation::Xl) => "https://github.com/Stability-AI/generative-models".into(),
                _ => "diffusers".into(),
            },
        );
        if let Some(skipped) = about.clip_skip {
            set("ss_clip_skip", (skipped + 1).to_string());
        }
        set("modelspec.title", about.title.clone());
        if let Some(generation) = about.generation {
            set("ss_v2", if generation == Generation::V2 { "True" } else { "False" }.into());
            let v = if about.v_prediction == Some(true) { "_v" } else { "" };
            let version = match generation {
                Generation::V1 => format!("sd_v1{v}"),
                Generation::V2 => format!("sd_v2{v}"),
                Generation::Xl => "sdxl_base_v1-0".into(),
            };
            set("ss_base_model_version", version);
            let architecture = match (generation, about.v_prediction) {
                (Generation::V1, _) => Some("stable-diffusion-v1/lora"),
                (Generation::V2, Some(true)) => Some("stable-diffusion-v2-768-v/lora"),
                (Generation::V2, Some(false)) => Some("stable-diffusion-v2-512/lora"),
                (Generation::V2, None) => None,
                (Generation::Xl, _) => Some("stable-diffusion-xl-v1-base/lora"),
            };
            architecture.map(|architecture| set("modelspec.architecture", architecture.into()));
        }
        if let Some(v) = about.v_prediction {
            set("modelspec.prediction_type", if v { "v" } else { "epsilon" }.into());
        }
        if let Some((height, width)) = about.resolution {
            set("ss_resolution", format!("({width}, {height})"));
            set("modelspec.resolution", format!("{width}x{height}"));
        }
        let mut tensors = Vec::with_capacity(3 * adapters.factors().len());
        for factor in adapters.factors() {
            let name = keys::kohya_name(&factor.module, about.generation == Some(Generation::Xl));
            let (a, b) = stored(factor)?;
            tensors.push((format!("{name}.alpha"), Tensor::new(factor.alpha as f32, a.device())?));
            tensors.push((format!("{name}.lora_down.weight"), a));
            tensors.push((format!("{name}.lora_up.weight"), b));
        }
        save_tensors(path, &header, &tensors, dtype(precision))
    };
    write().with_context(|| format!("writing the LoRA file {}", path.display()))
}

/// A and B as files hold them: matrices, or the kernels of 1x1 convolutions.
fn stored(factor: &Factor) -> Result<(Tensor, Tensor)> {
    if !factor.convolution {
        return Ok((factor.a.clone(), factor.b.clone()));
    }
    let kernel = |matrix: &Tensor| matrix.unsqueeze(2)?.unsqueeze(3);
    Ok((kernel(&factor.a)?, kernel(&factor.b)?))
}

/// peft's names behind a prefix.
fn named(adapters: &Adapters, prefix: &str) -> Result<Vec<(String, Tensor)>> {
    let mut tensors = Vec::with_capacity(2 * adapters.factors().len());
    for factor in adapters.factors() {
        let (a, b) = stored(factor)?;
        tensors.push((format!("{prefix}{}.lora_A.weight", factor.module), a));
        tensors.push((format!("{prefix}{}.lora_B.weight", factor.module), b));
    }
    Ok(tensors)
}

/// The part of peft's `LoraConfig` that makes the adapters: the usual rank and alpha, and the layers that differ.
fn config(adapters: &Adapters) -> Result<Map<String, Value>> {
    let factors = adapters.factors();
    if factors.is_empty() {
        bail!("there is no adapter to write");
    }
    if let Some(factor) = factors.iter().find(|factor| !factor.alpha.is_finite()) {
        bail!("the alpha of `{}` is {}", factor.module, factor.alpha);
    }
    let rank = most_common(factors.iter().map(Factor::rank));
    let alpha = most_common(factors.iter().map(|factor| factor.alpha));
    let exceptions = |differs: &dyn Fn(&Factor) -> Option<Value>| -> Map<String, Value> {
        factors.iter().filter_map(|factor| Some((format!("^{}", factor.module), differs(factor)?))).collect()
    };
    Ok(Map::from_iter([
        ("r".to_owned(), json!(rank)),
        ("lora_alpha".into(), json!(alpha)),
        ("rank_pattern".into(), json!(exceptions(&|f| (Some(f.rank()) != rank).then(|| f.rank().into())))),
        ("alpha_pattern".into(), json!(exceptions(&|f| (Some(f.alpha) != alpha).then(|| f.alpha.into())))),
        ("target_modules".into(), json!(factors.iter().map(|factor| factor.module.as_str()).collect::<Vec<_>>())),
    ]))
}

/// The first of the values that occur most often.
fn most_common<T: PartialEq>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: Vec<(T, usize)> = Vec::new();
    for value in values {
        match counts.iter_mut().find(|(known, _)| *known == value) {
            Some((_, count)) => *count += 1,
            None => counts.push((value, 1)),
        }
    }
    counts.into_iter().rev().max_by_key(|&(_, count)| count).map(|(value, _)| value)
}

fn dtype(precision: Precision) -> DType {
    match precision {
        Precision::F32 => DType::F32,
        Precision::F16 => DType::F16,
        Precision::Bf16 => DType::BF16,
    }
}
