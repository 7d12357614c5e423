//! Heads fitted on embeddings: the optimum of each problem, which no solver may miss.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::Report;
use crate::fit::{Choice, Matrix, Problem};

#[derive(Deserialize)]
struct Reference {
    heads: BTreeMap<String, Recorded>,
}

#[derive(Deserialize)]
struct Recorded {
    kind: String,
    lambda: f64,
    loss: f64,
}

/// Weights and biases are stored in f32.
const WEIGHTS: f64 = 1e-4;
/// Of scores, absolute.
const SCORES: f64 = 1e-5;

pub(super) fn compare(dir: &Path, text: &str) -> Result<Report> {
    let Reference { heads } = serde_json::from_str(text)?;
    ensure!(!heads.is_empty(), "there are no heads in it");
    let data = Tensors::read(dir, "data")?;
    let (x, held_out) = (data.matrix("embeddings")?, data.matrix("held_out")?);
    let mut report = Report::default();
    for (name, recorded) in &heads {
        let problem = match &*recorded.kind {
            "ridge" => Problem::ridge(x.clone(), data.numbers("scores")?)?,
            "logistic" => {
                let labels: Vec<bool> = data.numbers("labels")?.into_iter().map(|label| label == 1.0).collect();
                Problem::logistic(x.clone(), &labels)?
            }
            "choices" => {
                let rows = data.numbers("better")?.into_iter().zip(data.numbers("worse")?).zip(data.numbers("draw")?);
                let choice = |((better, worse), draw)| Choice {
                    better: better as usize,
                    worse: worse as usize,
                    draw: draw == 1.0,
                };
                Problem::choices(&x, &rows.map(choice).collect::<Vec<_>>())?
            }
            other => bail!("{name} is of an unknown kind, `{other}`"),
        };
        let head = problem.solve(recorded.lambda, None)?;
        let expected = Tensors::read(dir, name)?;
        let weight = Tensor::new(&*head.weight, &Device::Cpu)?;
        report.compare(name, "weight", &weight, expected.get("weight")?, WEIGHTS)?;
        let bias = expected.numbers("bias")?[0];
        report.push(name, "bias", (head.bias - bias).abs() / bias.abs().max(1.0), WEIGHTS);
        let scores = expected.numbers("held_out_scores")?;
        ensure!(scores.len() == held_out.rows(), "{name} has {} scores of {} vectors", scores.len(), held_out.rows());
        let errors = scores.iter().enumerate().map(|(i, score)| (head.score(held_out.row(i)) - score).abs());
        report.push(name, "scores of held-out vectors, absolute", errors.fold(0.0, f64::max), SCORES);
        report.push(name, "loss", (problem.value(&head, recorded.lambda) / recorded.loss - 1.0).abs(), WEIGHTS);
    }
    Ok(report)
}

/// The tensors of one file.
struct Tensors {
    file: String,
    tensors: HashMap<String, Tensor>,
}

impl Tensors {
    fn read(dir: &Path, name: &str) -> Result<Self> {
        let path = dir.join(format!("{name}.safetensors"));
        let file = path.display().to_string();
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu).with_context(|| format!("reading {file}"))?;
        Ok(Self { file, tensors })
    }

    fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).with_context(|| format!("{} has no `{name}`", self.file))
    }

    fn numbers(&self, name: &str) -> Result<Vec<f64>> {
        let numbers = self.get(name)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
        ensure!(!numbers.is_empty(), "`{name}` in {} is empty", self.file);
        Ok(numbers)
    }

    fn matrix(&self, name: &str) -> Result<Matrix> {
        Matrix::new(self.numbers(name)?, self.get(name)?.dims2()?.1)
    }
}
