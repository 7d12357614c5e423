//! A set of kind `imagereward`: the model as the published pickle and as safetensors, ids of texts, scores of images for each
//! text, and their gradients.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use serde::Deserialize;

use super::{Bounds, Report, farthest, numbers, tensors, unequal};
use crate::config::ImageRewardConfig;
use crate::nn::{Tape, Value};
use crate::ops::device::Compute;
use crate::rewards::ImageJudge;

/// `reference.json`.
#[derive(Deserialize)]
struct Reference {
    prompts: Vec<String>,
    image_sizes: Vec<[usize; 2]>,
}

pub(super) fn compare(dir: &Path, text: &str, compute: &Compute, bounds: &Bounds) -> Result<Report> {
    let reference: Reference = serde_json::from_str(text)?;
    let compute = &compute.for_rewards();
    let load = |file: &str| {
        let model = dir.to_string_lossy().into_owned();
        ImageJudge::load(&ImageRewardConfig { model, file: file.to_owned(), ..Default::default() }, compute)
    };
    let (judge, pickled) = (load("model.safetensors")?, load("ImageReward.pt")?);
    let (parts, prompts) = (tensors(dir, "parts.safetensors", compute)?, &reference.prompts);
    let part = |name: &str| parts.get(name).with_context(|| format!("parts.safetensors has no `{name}`"));
    let mut report = Report::default();

    let ids = prompts.iter().map(|prompt| judge.ids(prompt)).collect::<Result<Vec<_>>>()?;
    let (expected, mask) = (part("input_ids")?, part("attention_mask")?);
    let (rows, length) = expected.dims2()?;
    ensure!(rows == prompts.len(), "parts.safetensors has ids of {rows} texts, reference.json {} texts", prompts.len());
    // the recorded ids are padded with 0, and what the mask says is not padding is what is computed here
    let padded = |ids: &[Vec<u32>]| -> Vec<f64> {
        let row = |ids: &Vec<u32>| (0..length).map(|i| ids.get(i).map_or(0.0, |id| f64::from(*id))).collect::<Vec<_>>();
        ids.iter().flat_map(row).collect()
    };
    report.push("tokenizer", "input_ids", unequal(&padded(&ids), expected)?, 0.0);
    let ones: Vec<Vec<u32>> = ids.iter().map(|ids| vec![1; ids.len()]).collect();
    report.push("tokenizer", "attention_mask", unequal(&padded(&ones), mask)?, 0.0);

    let scores = numbers(part("scores")?)?;
    let largest = scores.iter().fold(0.0, |most: f64, score| most.max(score.abs()));
    for n in 0..reference.image_sizes.len() {
        let (case, image) = (format!("image {n}"), part(&format!("image_{n}"))?);
        let pixels = judge.pixels(&Value::constant(image))?;
        report.compare(&case, "pixels", pixels.tensor(), part(&format!("pixels_{n}"))?, bounds.parts)?;
        if let (Some(visual), Some(hidden)) = (parts.get(&format!("visual_{n}")), parts.get(&format!("hidden_{n}"))) {
            let tokens = judge.model.image(&Value::from(pixels.tensor().to_dtype(compute.dtype())?))?;
            report.compare(&case, "tokens of the ViT", tokens.tensor(), visual, bounds.parts)?;
            for (row, ids) in ids.iter().enumerate().take(hidden.dims()[0]) {
                let found = judge.model.text(&tokens, ids)?;
                let expected = hidden.narrow(0, row, 1)?.narrow(1, 0, ids.len())?;
                report.compare(
                    &case,
                    &format!("hidden states, text {row}"),
                    found.tensor(),
                    &expected,
                    bounds.parts,
                )?;
            }
        }
        let of_image = &scores[n * rows..(n + 1) * rows];
        for (what, judge) in [("scores", &judge), ("scores, pickle", &pickled)] {
            let all = Tensor::cat(&vec![pixels.tensor(); rows], 0)?;
            let found = numbers(judge.model.scores(&all.into(), &ids)?.tensor())?;
            report.push(&case, format!("{what}, of the largest"), farthest(&found, of_image) / largest, bounds.scores);
        }
        for (text, name) in [(n, format!("dimage_{n}")), (1, format!("dimage_{n}_prompt1"))] {
            let tape = Tape::new();
            let leaf = tape.leaf(image);
            let score = judge.model.scores(&judge.pixels(&leaf)?, &ids[text..text + 1])?;
            let mut gradients = tape.backward(&[(&score, &score.tensor().ones_like()?)])?;
            let gradient = gradients.take(&leaf, "the image")?;
            report.compare(
                &case,
                &format!("gradient, text {text}"),
                &gradient,
                part(&name)?,
                bounds.image_gradients,
            )?;
        }
    }
    Ok(report)
}
