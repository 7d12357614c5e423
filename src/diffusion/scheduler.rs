//! `scheduler/scheduler_config.json` as diffusers' Stable Diffusion pipeline takes it: old settings repaired (not those of
//! Stable Diffusion XL, whose pipeline repairs none), and the class
//! of the scheduler judged by whether DDIM can stand in for it.

use anyhow::{Result, bail};
use serde::Deserialize;
use serde_json::Value as Json;

use super::SchedulerConfig;
use crate::models::Source;

const FILE: &str = "scheduler_config.json";

/// Schedulers of the same noising as DDIM's, which betas and prediction type describe: DDIM takes their configs.
const RELATIVES: [&str; 19] = [
    "DDIM",
    "DDIMInverse",
    "DDIMParallel",
    "DDPM",
    "DDPMParallel",
    "DEISMultistep",
    "DPMSolverMultistep",
    "DPMSolverMultistepInverse",
    "DPMSolverSDE",
    "DPMSolverSinglestep",
    "EulerAncestralDiscrete",
    "EulerDiscrete",
    "HeunDiscrete",
    "KDPM2AncestralDiscrete",
    "KDPM2Discrete",
    "LMSDiscrete",
    "PNDM",
    "SASolver",
    "UniPCMultistep",
];

/// Of the same noising, for models that were distilled to a few steps of another sampler.
const DISTILLED: [&str; 2] = ["LCM", "TCD"];

/// What decides how the rest is read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Judged {
    #[serde(rename = "_class_name")]
    class_name: Option<String>,
    steps_offset: Option<usize>,
    clip_sample: Option<bool>,
    use_flow_sigmas: bool,
}

/// The config of a pipeline's scheduler; says what of it is not taken as it stands.
///
/// # Errors
/// There is none, or it is that of a scheduler that noises otherwise than DDIM.
pub(super) fn load(pipeline: &Source) -> Result<SchedulerConfig> {
    let source = pipeline.sub("scheduler");
    let place = format!("{}: {FILE}", source.label());
    let judged: Judged = source.read_json(FILE)?;
    let mut config: SchedulerConfig = source.read_json(FILE)?;

    // diffusers makes the class of the index; a config may be one that another class wrote
    let index: Json =
        if pipeline.has_text("model_index.json")? { pipeline.read_json("model_index.json")? } else { Json::Null };
    let indexed = index["scheduler"][1].as_str().map(str::to_owned);
    if let Some(class) = &indexed {
        judge_class(&format!("{}: model_index.json", pipeline.label()), class)?;
    }
    if let Some(class) = judged.class_name.as_ref().filter(|class| Some(*class) != indexed.as_ref()) {
        judge_class(&place, class)?;
    }
    if judged.use_flow_sigmas {
        bail!(
            "{place}: use_flow_sigmas = true: this model was trained to predict a flow, which DDIM cannot sample; take a model that predicts epsilon or v"
        );
    }

    // Without the key diffusers' own DDIM is repaired too; other classes pass no default of theirs on to DDIM.
    let is_ddim = indexed.or(judged.class_name).is_none_or(|class| name_of(&class) == "DDIM");
    let repaired = !index["_class_name"].as_str().is_some_and(|class| class.starts_with("StableDiffusionXL"));
    let said = match judged.steps_offset {
        _ if !repaired => None,
        Some(1) => None,
        Some(offset) => Some(format!("says steps_offset = {offset}")),
        None => is_ddim.then(|| "has no steps_offset".to_owned()),
    };
    if let Some(said) = said {
        config.steps_offset = 1;
        note!("warning: {place} {said}; diffusers takes 1 for Stable Diffusion, and so does this program");
    }
    // clipping is meant for pixels
    if judged.clip_sample == Some(true) {
        config.clip_sample = Some(false);
        note!(
            "warning: {place} says clip_sample = true; diffusers turns it off for Stable Diffusion, and so does this program"
        );
    }
    Ok(config)
}

/// `PNDMScheduler`, `FlaxPNDMScheduler` -> `PNDM`.
fn name_of(class: &str) -> &str {
    let name = class.strip_prefix("Flax").unwrap_or(class);
    name.strip_suffix("Scheduler").unwrap_or(name)
}

/// # Errors
/// DDIM cannot stand in for the class, as far as is known.
fn judge_class(place: &str, class: &str) -> Result<()> {
    let name = name_of(class);
    if DISTILLED.contains(&name) {
        note!(
            "warning: {place} names the {class}, whose models are distilled to few steps of it; DDIM samples them otherwise"
        );
    } else if !RELATIVES.contains(&name) {
        bail!(
            "{place} names the {class}, for which DDIM cannot stand in: its models predict something else (a flow, a consistency function, ..); \
             take a model for DDIM, PNDM, Euler or the like, or, where its betas are DDIM's, write DDIMScheduler there"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// What is read of a scheduler of the class `index` with these keys.
    fn read(index: Option<&str>, config: &str) -> Result<SchedulerConfig> {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("scheduler")).unwrap();
        fs::write(folder.path().join("scheduler").join(FILE), config).unwrap();
        if let Some(class) = index {
            let index = format!(r#"{{"_class_name": "X", "scheduler": ["diffusers", "{class}"]}}"#);
            fs::write(folder.path().join("model_index.json"), index).unwrap();
        }
        load(&Source::open(folder.path().to_str().unwrap()).unwrap())
    }

    #[test]
    fn the_offset_is_what_diffusers_takes() {
        for (index, config, offset) in [
            (None, r#"{"_class_name": "DDIMScheduler", "steps_offset": 0}"#, 1),
            (None, r#"{"_class_name": "DDIMScheduler", "steps_offset": 2}"#, 1),
            (None, r#"{"_class_name": "DDIMScheduler", "steps_offset": 1}"#, 1),
            (None, r#"{"_class_name": "DDIMScheduler"}"#, 1),
            (None, "{}", 1),
            (Some("DDIMScheduler"), r#"{"_class_name": "PNDMScheduler"}"#, 1),
            (Some("PNDMScheduler"), r#"{"_class_name": "PNDMScheduler", "steps_offset": 0}"#, 1),
            (Some("PNDMScheduler"), r#"{"_class_name": "PNDMScheduler"}"#, 0),
            (Some("LMSDiscreteScheduler"), "{}", 0),
            (None, r#"{"_class_name": "EulerDiscreteScheduler", "steps_offset": 3}"#, 1),
        ] {
            assert_eq!(read(index, config).unwrap().steps_offset, offset, "{index:?} {config}");
        }
    }

    #[test]
    fn clipping_of_pixels_is_turned_off() {
        for class in ["DDIMScheduler", "PNDMScheduler"] {
            let config = read(Some(class), r#"{"clip_sample": true, "steps_offset": 1}"#).unwrap();
            assert_eq!(config.clip_sample, Some(false));
        }
    }

    #[test]
    fn classes_of_other_mathematics_are_refused_by_name() {
        let refused = |index: Option<&str>, config: &str, name: &str| {
            let message = format!("{:#}", read(index, config).unwrap_err());
            assert!(message.contains(name) && message.contains(".json"), "{message}");
        };
        for class in [
            "FlowMatchEulerDiscreteScheduler",
            "FlowMatchLCMScheduler",
            "CMStochasticIterativeScheduler",
            "EDMEulerScheduler",
            "ScoreSdeVeScheduler",
            "IPNDMScheduler",
        ] {
            refused(Some(class), "{}", class);
            refused(None, &format!(r#"{{"_class_name": "{class}"}}"#), class);
        }
        refused(None, r#"{"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": true}"#, "use_flow_sigmas");
        for class in ["PNDMScheduler", "FlaxDDIMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"] {
            read(Some(class), r#"{"steps_offset": 1}"#).unwrap();
        }
    }
}
