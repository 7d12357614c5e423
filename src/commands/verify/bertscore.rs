//! BERTScore beside the bert-score package's numbers: `bert/`, `deberta/` and their tensors.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use serde::Deserialize;

use super::{Bounds, Report, unequal};
use crate::models::Source;
use crate::rewards::BertScore;

/// `reference.json`.
#[derive(Deserialize)]
struct Reference {
    pairs: Vec<Pair>,
    num_layers: usize,
}

#[derive(Deserialize)]
struct Pair {
    candidate: String,
    reference: String,
}

/// Compares both models' ids, hidden states and scores.
pub(super) fn compare(dir: &Path, text: &str, bounds: &Bounds) -> Result<Report> {
    let reference: Reference =
        serde_json::from_str(text).with_context(|| format!("reading {}/reference.json", dir.display()))?;
    let mut report = Report::default();
    for name in ["bert", "deberta"] {
        let path = dir.join(format!("{name}.safetensors"));
        let expected = candle_core::safetensors::load(&path, &Device::Cpu)
            .with_context(|| format!("reading {}", path.display()))?;
        let tensor = |name: &str| expected.get(name).with_context(|| format!("{} has no `{name}`", path.display()));
        let scorer = BertScore::of(&Source::open(&dir.join(name).to_string_lossy())?, reference.num_layers)?;
        let (mut wrong_ids, mut scores) = (0.0, Vec::new());
        for (n, Pair { candidate, reference }) in reference.pairs.iter().enumerate() {
            for (side, text) in [("candidate", candidate), ("reference", reference)] {
                let (ids, hidden) = scorer.embed(text)?;
                let ids: Vec<f64> = ids.into_iter().map(f64::from).collect();
                wrong_ids += unequal(&ids, tensor(&format!("{side}_ids_{n}"))?)?;
                if let Some(expected) = expected.get(&format!("{side}_embeds_{n}")) {
                    report.compare(name, &format!("hidden states of {side} {n}"), &hidden, expected, bounds.parts)?;
                }
            }
            let found = scorer.compare(candidate, reference)?;
            scores.extend([found.precision, found.recall, found.f1]);
        }
        report.push(name, "token ids", wrong_ids, 0.0);
        let expected = tensor("precision_recall_f1")?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        ensure!(expected.len() == scores.len(), "{} scores for {}", expected.len(), scores.len());
        let largest = expected.iter().fold(0.0f64, |most, score| most.max(score.abs()));
        let apart = scores.iter().zip(&expected).map(|(x, y)| (x - y).abs());
        // a NaN stays one
        let worst = apart.fold(0.0, |worst: f64, error| if error > worst || error.is_nan() { error } else { worst });
        report.push(name, "precision, recall, F1, absolute", worst / largest, bounds.scores);
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_that_is_not_whole_is_named() {
        let text = r#"{"kind": "bertscore", "pairs": [], "num_layers": 1}"#;
        let error = format!("{:#}", compare(Path::new("no/such"), text, &super::super::CPU).err().unwrap());
        assert!(error.contains("no/such/bert.safetensors"), "{error}");
    }
}
