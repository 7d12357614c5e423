//! A set of kind `yolos`: a detector (`model/`), what it sees in images of several sizes, and the distribution of counts of
//! given logits (`count.safetensors`).

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::{Bounds, Report, farthest, numbers, tensors};
use crate::nn::layers::detections;
use crate::nn::{Tape, Value};
use crate::ops::detections::{Asked, Question, count_log_probs};
use crate::ops::device::Compute;
use crate::rewards::Detector;

/// Absolute error of the gradients of given logits, which are computed in f64: PyTorch's f32 is at 3e-6.
const OF_LOGITS: f64 = 1e-5;

/// `reference.json`.
#[derive(Deserialize)]
struct Reference {
    labels: Vec<String>,
    detection_tokens: usize,
    cases: Vec<Case>,
    /// The class that count.safetensors is about.
    count_label: usize,
}

/// One question about one image.
#[derive(Deserialize)]
struct Case {
    image: usize,
    label: usize,
    n: usize,
    reward: f64,
    expected: f64,
}

pub(super) fn compare(dir: &Path, text: &str, compute: &Compute, bounds: &Bounds) -> Result<Report> {
    let reference: Reference = serde_json::from_str(text)?;
    let compute = &compute.for_rewards();
    let detector = Detector::load(&dir.join("model").to_string_lossy(), None, compute)?;
    let model = &detector.model;
    let mut report = Report::default();
    report.push("detector", "labels", differing(model.labels(), &reference.labels), 0.0);
    ensure!(
        model.detections() == reference.detection_tokens,
        "{} detection tokens instead of {}",
        model.detections(),
        reference.detection_tokens
    );

    let parts = tensors(dir, "parts.safetensors", compute)?;
    let part = |name: String| parts.get(&name).with_context(|| format!("parts.safetensors has no `{name}`"));
    let images: BTreeSet<usize> = reference.cases.iter().map(|case| case.image).collect();
    for n in images {
        let case = format!("image {n}");
        let image = part(format!("image_{n}"))?;
        let pixels = detector.pixels(&Value::constant(image))?;
        if let Some(expected) = parts.get(&format!("pixels_{n}")) {
            report.compare(&case, "pixels", pixels.tensor(), expected, bounds.parts)?;
        }
        let tokens = model.tokens(&pixels)?;
        let logits = model.logits(&tokens)?.into_tensor().squeeze(0)?;
        report.compare(&case, "logits", &logits, part(format!("logits_{n}"))?, bounds.parts)?;
        let boxes = model.boxes(&tokens)?.into_tensor().squeeze(0)?;
        report.compare(&case, "boxes", &boxes, part(format!("boxes_{n}"))?, bounds.parts)?;

        let of_image = || reference.cases.iter().filter(|case| case.image == n);
        let classes: BTreeSet<usize> = of_image().map(|case| case.label).collect();
        for class in classes {
            let name = format!("class{class}");
            let found = Tensor::new(count_log_probs(&logits, class)?, &Device::Cpu)?;
            let expected = part(format!("log_probs_{n}_{name}"))?;
            report.compare(&case, &format!("log P(N), {name}"), &found, expected, bounds.parts)?;
            let asked = of_image().filter(|case| case.label == class);
            let counts = asked
                .clone()
                .map(|case| (Asked::Exactly(case.n), case.reward, format!("reward_{n}_{name}_n{}", case.n)));
            let expected = asked.take(1).map(|case| (Asked::Expected, case.expected, format!("expected_{n}_{name}")));
            for (asked, value, tensor) in counts.chain(expected) {
                let tape = Tape::new();
                let leaf = tape.leaf(image);
                let answer = detections(&detector.logits(&leaf)?, &[Question { class, asked }])?;
                let found = answer.tensor().to_dtype(DType::F64)?.to_vec1::<f64>()?[0];
                report.push(&case, format!("{name}, {asked:?}"), (found / value - 1.0).abs(), bounds.parts);
                let mut gradients = tape.backward(&[(&answer, &answer.tensor().ones_like()?)])?;
                let gradient = gradients.take(&leaf, "the image")?;
                let what = format!("{name}, {asked:?}, gradient");
                report.compare(&case, &what, &gradient, part(format!("d{tensor}"))?, bounds.image_gradients)?;
            }
        }
    }
    given_logits(&tensors(dir, "count.safetensors", compute)?, reference.count_label, bounds, &mut report)?;
    Ok(report)
}

/// The distribution alone.
fn given_logits(of: &HashMap<String, Tensor>, class: usize, bounds: &Bounds, report: &mut Report) -> Result<()> {
    let part = |name: String| of.get(&name).with_context(|| format!("count.safetensors has no `{name}`"));
    let names: BTreeSet<&str> = of.keys().filter_map(|name| name.strip_suffix("_logits")).collect();
    for name in names {
        let logits = part(format!("{name}_logits"))?;
        let found = Tensor::new(count_log_probs(logits, class)?, &Device::Cpu)?;
        report.compare(name, "log P(N)", &found, part(format!("{name}_log_probs"))?, bounds.parts)?;
        let leaf = logits.unsqueeze(0)?;
        let gradient = |asked| -> Result<(Tensor, Tensor)> {
            let tape = Tape::new();
            let leaf = tape.leaf(&leaf);
            let answer = detections(&leaf, &[Question { class, asked }])?;
            let mut gradients = tape.backward(&[(&answer, &answer.tensor().ones_like()?)])?;
            Ok((answer.into_tensor(), gradients.take(&leaf, "the logits")?.squeeze(0)?))
        };
        let (expected, d_expected) = gradient(Asked::Expected)?;
        report.compare(name, "expected count", &expected, part(format!("{name}_expected"))?, bounds.parts)?;
        let far =
            |found: &Tensor, expected: &Tensor| -> Result<f64> { Ok(farthest(&numbers(found)?, &numbers(expected)?)) };
        let error = far(&d_expected, part(format!("{name}_dexpected"))?)?;
        report.push(name, "gradient of the expected count, absolute", error, OF_LOGITS);
        let counts = of.keys().filter_map(|key| key.strip_prefix(&format!("{name}_dlogits_n"))?.parse().ok());
        for n in counts.collect::<BTreeSet<usize>>() {
            let error = far(&gradient(Asked::Exactly(n))?.1, part(format!("{name}_dlogits_n{n}"))?)?;
            report.push(name, format!("gradient of log P(N = {n}), absolute"), error, OF_LOGITS);
        }
    }
    Ok(())
}

/// How many entries of two lists differ.
fn differing(found: &[String], expected: &[String]) -> f64 {
    let unequal = found.iter().zip(expected).filter(|(x, y)| x != y).count();
    (unequal + found.len().abs_diff(expected.len())) as f64
}
