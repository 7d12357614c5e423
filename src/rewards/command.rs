//! Scores, and gradients, of a program of the user's: `[reward.command]`.
//!
//! The program gets a line of JSON for each batch of pictures and answers with one; docs/rewards.md has both, and an example.
//! What a chain needs of a reward is d score / d image: so any model is a differentiable reward, in whatever language it is
//! written.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::derivative::{self, Verdict};
use super::images::png_bytes;
use super::program::{Limits, Program};
use super::{Differentiable, Judge, Objective, Score, TapedImages};
use crate::config::{CommandConfig, Prompt, shown};
use crate::models::Weights;
use crate::nn::Value;
use crate::nn::layers::activation;
use crate::ops::activation::{Activation, activation_fwd};
use crate::ops::{Ledger, Number};

struct Command {
    program: Program,
    /// Where pictures and gradients lie while they are asked about.
    folder: tempfile::TempDir,
    asked: AtomicU64,
    /// Pictures go as f32 tensors, not as PNG.
    tensors: bool,
    /// Whether a gradient is still to be compared with a difference of scores.
    unchecked: AtomicBool,
    objective: Objective,
}

/// A line to the program.
#[derive(Serialize)]
struct Question<'a> {
    /// The paths of PNGs, one for each picture; or that of a safetensors file with a tensor `images` (B, 3, H, W), f32 in [0, 1].
    images: Json,
    prompts: Vec<&'a str>,
    /// What the prompts' file says beside their texts.
    fields: Vec<&'a Map<String, Json>>,
    /// Where a safetensors file is wanted with a tensor `gradients`, of the shape of `images`: d scores[i] / d images[i].
    gradients: Option<&'a Path>,
}

/// A line from the program.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    /// One for each picture; null is not a number.
    scores: Option<Vec<Option<f64>>>,
    /// Why there are none.
    error: Option<String>,
}

/// The reward that the config describes.
pub(super) fn command(config: &CommandConfig) -> Result<Judge> {
    ensure!(
        config.program.first().is_some_and(|word| !word.is_empty()),
        "reward.command.program is not set: name the program and its arguments, such as [\"python\", \"reward.py\"]"
    );
    let seconds = Duration::from_secs_f64;
    let limits = Limits {
        answer: seconds(config.timeout),
        first_answer: seconds(config.start_timeout),
        restarts: config.restarts,
    };
    let command = Command {
        folder: tempfile::Builder::new().prefix("alignprop-").tempdir().context("making a folder for pictures")?,
        program: Program::start(&config.program, limits)?,
        asked: AtomicU64::new(0),
        tensors: config.gradient,
        unchecked: AtomicBool::new(config.check_gradient),
        objective: Objective::of(config.target),
    };
    Ok(if config.gradient { Judge::differentiable(command) } else { Judge::Score(Box::new(command)) })
}

impl Score for Command {
    fn scores(&self, images: &TapedImages, prompts: &[Prompt], _: &mut Ledger) -> Result<Vec<Number>> {
        let scores = match self.tensors {
            true => self.judge(&activation_fwd(images.tensor()?, Activation::UnitRange)?, prompts, false)?.0,
            false => self.judge_pictures(images, prompts)?,
        };
        Ok(scores.into_iter().map(Number::from).collect())
    }

    fn is_elsewhere(&self) -> bool {
        true
    }
}

impl Differentiable for Command {
    fn on_tape(&self, images: &TapedImages, prompts: &[Prompt]) -> Result<Value> {
        let pictures = activation(images.value()?, Activation::UnitRange)?;
        self.check_once(pictures.tensor(), prompts)?;
        let (scores, gradients) = self.judge(pictures.tensor(), prompts, true)?;
        let gradients = gradients.context("no gradients")?;
        let scores: Vec<f32> = scores.into_iter().map(|score| score as f32).collect();
        let scores = Tensor::from_vec(scores, prompts.len(), pictures.tensor().device())?;
        Ok(Value::step([&pictures], scores, move |d| {
            Ok([Some(gradients.broadcast_mul(&d.reshape((d.elem_count(), 1, 1, 1))?)?)])
        }))
    }

    fn objective(&self) -> Objective {
        self.objective
    }
}

impl Command {
    /// Scores of images, which go as PNG.
    fn judge_pictures(&self, images: &TapedImages, prompts: &[Prompt]) -> Result<Vec<f64>> {
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        let files = (0..prompts.len()).map(|row| self.file(format!("{number}-{row}.png"))).collect::<Vec<_>>();
        let write = |(row, file): (usize, &File)| -> Result<()> {
            fs::write(&file.0, png_bytes(&images.image(row)?)?).with_context(|| file.writing())
        };
        files.iter().enumerate().try_for_each(write)?;
        let paths = files.iter().map(|file| serde_json::to_value(&file.0)).collect::<serde_json::Result<_>>()?;
        self.ask(Json::Array(paths), prompts, None)
    }

    /// Scores of pictures (B, 3, H, W) in [0, 1], which go as they are, and the scores' gradients where they are wanted.
    fn judge(&self, pictures: &Tensor, prompts: &[Prompt], wanted: bool) -> Result<(Vec<f64>, Option<Tensor>)> {
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        let images = self.file(format!("{number}.safetensors"));
        let gradients = self.file(format!("{number}-gradients.safetensors"));
        let tensors = HashMap::from([("images", pictures.to_device(&Device::Cpu)?.to_dtype(DType::F32)?)]);
        candle_core::safetensors::save(&tensors, &images.0).with_context(|| images.writing())?;
        let scores = self.ask(serde_json::to_value(&images.0)?, prompts, wanted.then_some(&gradients.0))?;
        if !wanted {
            return Ok((scores, None));
        }
        let read = || -> Result<Tensor> {
            ensure!(gradients.0.is_file(), "there is no file {}", gradients.0.display());
            let weights = Weights::open_file(&gradients.0)?;
            Ok(weights.get("gradients", pictures.dims())?.to_device(pictures.device())?)
        };
        let read = read().with_context(|| {
            format!("{} answered and left no gradients of its scores: a safetensors file is wanted at the place `gradients`, with a tensor `gradients` of the shape of `images`", self.program.name())
        })?;
        Ok((scores, Some(read)))
    }

    fn ask(&self, images: Json, prompts: &[Prompt], gradients: Option<&Path>) -> Result<Vec<f64>> {
        let (fields, texts) = (prompts.iter().map(|p| &p.fields).collect(), prompts.iter().map(|p| &*p.text).collect());
        let question = serde_json::to_string(&Question { images, prompts: texts, fields, gradients })?;
        let answer = self.program.ask(&question)?;
        scores_of(&answer, prompts.len()).with_context(|| self.program.name())
    }

    /// Compares a gradient with a difference of two scores, at the first picture that has one.
    ///
    /// # Errors
    /// They are not the same: says both.
    fn check_once(&self, pictures: &Tensor, prompts: &[Prompt]) -> Result<()> {
        if !self.unchecked.load(Ordering::Relaxed) {
            return Ok(());
        }
        let prompts = &prompts[..1];
        let picture = derivative::inside(&pictures.narrow(0, 0, 1)?)?;
        let (scores, gradient) = self.judge(&picture, prompts, true)?;
        let score = |picture: &Tensor| Ok(self.judge(picture, prompts, false)?.0[0]);
        let verdict = derivative::check(&picture, scores[0], &gradient.context("no gradients")?, score)?;
        match verdict {
            Verdict::Agrees => self.unchecked.store(false, Ordering::Relaxed),
            Verdict::NothingToCheck => {}
            Verdict::Differs(how) => {
                anyhow::bail!(
                    "{} returns gradients that are not those of its scores: {how}. Was the model's forward interrupted by \
                     `no_grad`, `detach` or a conversion to bytes? `reward.command.check_gradient = false` leaves this check out",
                    self.program.name()
                )
            }
        }
        Ok(())
    }

    fn file(&self, name: String) -> File {
        File(self.folder.path().join(name))
    }
}

/// A file that is there as long as it is asked about.
struct File(PathBuf);

impl File {
    fn writing(&self) -> String {
        format!("writing {}", self.0.display())
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The scores of an answer for so many pictures; NaN where one is null, or Python's `NaN` or `Infinity`.
///
/// # Errors
/// It is no answer: shows it.
pub(super) fn scores_of(answer: &str, pictures: usize) -> Result<Vec<f64>> {
    let start: String = answer.chars().take(200).collect();
    let parse = |text: &str| serde_json::from_str::<Answer>(text);
    let python = || parse(&answer.replace("-Infinity", "null").replace("Infinity", "null").replace("NaN", "null"));
    let Answer { scores, error } = parse(answer)
        .or_else(|_| python())
        .with_context(|| format!("it answered `{}`, where {{\"scores\": [..]}} was expected", shown(&start)))?;
    ensure!(error.is_none(), "it answered with an error: {}", shown(error.unwrap_or_default()));
    let scores = scores.with_context(|| format!("its answer `{}` has no \"scores\"", shown(&start)))?;
    ensure!(scores.len() == pictures, "it gave {} scores for {pictures} pictures", scores.len());
    Ok(scores.into_iter().map(|score| score.unwrap_or(f64::NAN)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_a_score_for_each_picture() {
        assert_eq!(scores_of(r#"{"scores": [1, -2.5e-3]}"#, 2).unwrap(), [1.0, -2.5e-3]);
        let odd = scores_of(r#"{"scores": [NaN, null, Infinity, -Infinity, 4]}"#, 5).unwrap();
        assert!(odd[..4].iter().all(|score| score.is_nan()) && odd[4] == 4.0);
        for (answer, expected) in [
            ("Loading checkpoint", "it answered `Loading checkpoint`, where {\"scores\": [..]} was expected"),
            ("{\"scores\": [0.5", "it answered `{\"scores\": [0.5`"),
            ("{\"scores\": [\"x\\u001b\"]}", "expected f64"),
            ("{\"score\": [1]}", "unknown field `score`"),
            ("{}", "its answer `{}` has no \"scores\""),
            ("{\"scores\": [1]}", "it gave 1 scores for 2 pictures"),
            ("{\"scores\": [1, 2, 3]}", "it gave 3 scores for 2 pictures"),
            ("{\"error\": \"no such file\"}", "it answered with an error: no such file"),
        ] {
            let error = format!("{:#}", scores_of(answer, 2).unwrap_err());
            assert!(error.contains(expected), "{answer}: {error}");
        }
    }
}
