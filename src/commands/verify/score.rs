//! Pictures of all kinds and sizes: the pixels that the towers get, and the scores that the original packages give.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::{Bounds, Report};
use crate::config::{AestheticConfig, ClipScoreConfig, HpsConfig, Preprocess, Prompt, RewardsConfig};
use crate::models::Source;
use crate::models::clip::PixelStatistics;
use crate::models::tokenizer::ClipTokenizer;
use crate::ops::device::Compute;
use crate::pictures::{self, Picture};
use crate::rewards::{Preprocessor, Rewards, TapedImages};

#[derive(Deserialize)]
struct Reference {
    pictures: BTreeMap<String, Recorded>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Recorded {
    prompt: String,
    clip_score: f64,
    aesthetic: f64,
    hps: f64,
}

/// Pixels that differ by less have the same bytes behind them.
const SAME_BYTES: f64 = 1e-6;

pub(super) fn compare(
    dir: &Path,
    text: &str,
    head: Option<&Path>,
    compute: &Compute,
    bounds: &Bounds,
) -> Result<Report> {
    let reference: Reference = serde_json::from_str(text)?;
    ensure!(!reference.pictures.is_empty(), "there are no pictures in it");
    let (path, mut report) = (|name: &str| dir.join(name).to_string_lossy().into_owned(), Report::default());
    let listed: Vec<Picture> = reference
        .pictures
        .keys()
        .map(|name| dir.join("pictures").join(name))
        .map(|file| Picture { file, prompt: None })
        .collect();
    let images = listed.iter().map(|picture| pictures::read(&picture.file)).collect::<Result<Vec<_>>>()?;

    let file = dir.join("pixels.safetensors");
    let expected = match file.is_file() {
        false => None,
        true => Some(
            candle_core::safetensors::load(&file, compute.device())
                .with_context(|| format!("reading {}", file.display()))?,
        ),
    };
    let (clip, hps) = (Source::open(&path("clip"))?, Source::open(&path("hps"))?);
    for (kind, method, statistics) in [
        ("clip", Preprocess::ClipOfficial, PixelStatistics::of_transformers(&clip)?),
        ("hps", Preprocess::Hpsv2Official, PixelStatistics::of_open_clip(&hps)?),
    ] {
        let Some(expected) = &expected else { continue };
        for (i, (name, image)) in reference.pictures.keys().zip(&images).enumerate() {
            let part = format!("{kind}_{i}");
            let expected = expected.get(&part).with_context(|| format!("pixels.safetensors has no `{part}`"))?;
            let preprocessor = Preprocessor::new(method, expected.dims4()?.2, &statistics, compute.device())?;
            let found = preprocessor.of_pictures(std::slice::from_ref(image))?;
            report.compare("pixels", &format!("{kind}: {name}"), &found, expected, SAME_BYTES)?;
        }
    }

    let mut config = RewardsConfig {
        clip_score: Some(ClipScoreConfig { model: path("clip"), ..Default::default() }),
        hps: Some(HpsConfig { model: path("hps"), file: "model.safetensors".into(), ..Default::default() }),
        ..Default::default()
    };
    match head {
        None => report
            .skipped
            .push(format!("aesthetic: no head in {} or above it; give one with --head FILE", dir.display())),
        Some(head) => {
            let head = head.to_string_lossy().into_owned();
            config.aesthetic = Some(AestheticConfig { clip: path("clip"), head, ..Default::default() });
        }
    }
    let tokenizer = Arc::new(ClipTokenizer::load(&clip)?);
    let rewards = Rewards::load_on(&config.as_published(), &tokenizer, compute)?;
    for (picture, recorded) in listed.iter().zip(reference.pictures.values()) {
        let beside = pictures::prompt_of(picture)?;
        report.push(
            "prompt",
            picture.file.display().to_string(),
            f64::from(u8::from(beside.as_ref() != Some(&recorded.prompt))),
            0.0,
        );
    }
    let prompts: Vec<Prompt> = reference.pictures.values().map(|picture| picture.prompt.as_str().into()).collect();
    let scores = rewards.scores_of(&TapedImages::of_pictures(images, compute.device()), &prompts)?;
    for ((name, recorded), scores) in reference.pictures.iter().zip(scores) {
        for (kind, score) in rewards.names().into_iter().zip(scores) {
            // absolute: cosines of random towers are near 0, and the head's scores near 5
            let (expected, bound) = match kind {
                "aesthetic" => (recorded.aesthetic, 10.0 * bounds.scores),
                "hps" => (recorded.hps, bounds.scores),
                _ => (recorded.clip_score, bounds.scores),
            };
            report.push(kind, format!("{name}, absolute"), (score - expected).abs(), bound);
        }
    }
    Ok(report)
}
