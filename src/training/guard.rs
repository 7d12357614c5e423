//! The guard against over-optimisation: evaluations on prompts and noise of their own, and what follows from them.
//!
//! Everything is decided from the run's metrics, so a resumed run decides as the uninterrupted one.

use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::Tensor;
use serde_json::{Map, Value as Json, json};

use super::checkpoint::Checkpoint;
use super::run_folder::RunFolder;
use crate::config::{Config, Prompt};
use crate::models::tokenizer::ClipTokenizer;
use crate::ops::device::Compute;
use crate::rewards::Rewards;

/// The metrics that decisions are made from.
const REWARD: &str = "guard/reward";
const HELD_OUT: &str = "guard/held_out";

/// What a run is watched with.
pub struct Guard {
    every: usize,
    patience: usize,
    seeds: u64,
    prompts: Vec<Prompt>,
    held_out: Option<Rewards>,
}

impl Guard {
    /// The guard of a config, if it has one.
    pub fn load(
        config: &Config,
        prompts: &[Prompt],
        tokenizer: &Arc<ClipTokenizer>,
        compute: &Compute,
    ) -> Result<Option<Self>> {
        let guard = &config.guard;
        if guard.every == 0 {
            return Ok(None);
        }
        let mut prompts = match &guard.prompts {
            Some(own) => own.load().context("the guard's prompts")?,
            None => prompts.to_vec(),
        };
        prompts.truncate(guard.num_prompts);
        let held_out = match guard.reward.weights().is_empty() {
            true => None,
            false => Some(Rewards::load_on(&guard.reward, tokenizer, compute).context("the guard's held-out rewards")?),
        };
        let seeds = guard.seeds as u64;
        Ok(Some(Self { every: guard.every, patience: guard.patience, seeds, prompts, held_out }))
    }

    /// Whether an evaluation belongs to this step.
    pub fn due(&self, step: usize, last: usize) -> bool {
        step.is_multiple_of(self.every) || step == last
    }

    /// Whether the step's evaluation is in the metrics.
    pub fn has_evaluated(run: &RunFolder, step: usize) -> Result<bool> {
        Ok(run.history(REWARD)?.iter().any(|(at, _)| *at == step))
    }

    /// Scores the images of every prompt and seed, for a line of the metrics.
    ///
    /// `image(prompt, number of the prompt, seed)` gives an image (1, 3, H, W) and the distance of its noise
    /// predictions from the base model's.
    pub fn evaluate(
        &self,
        training: &Rewards,
        image: impl Fn(&Prompt, u64, u64) -> Result<(Tensor, f64)>,
    ) -> Result<Map<String, Json>> {
        let images = self.prompts.len() as f64 * self.seeds as f64;
        let mut line = Map::new();
        let mut add = |key: String, value: f64| {
            let sum = line.get(&key).and_then(Json::as_f64).unwrap_or(0.0);
            line.insert(key, json!(sum + value));
        };
        for (number, prompt) in (0..).zip(&self.prompts) {
            let mut embeddings = Vec::new();
            for seed in 0..self.seeds {
                let (image, distance) = image(prompt, number, seed)?;
                for (key, rewards) in [(REWARD, Some(training)), (HELD_OUT, self.held_out.as_ref())] {
                    let Some(rewards) = rewards else { continue };
                    let scores = &rewards.scores(&image, std::slice::from_ref(prompt))?[0];
                    add(key.to_owned(), rewards.total(scores) / images);
                    for (name, score) in rewards.names().iter().zip(scores) {
                        add(format!("{key}/{name}"), score / images);
                    }
                }
                add("guard/distance".to_owned(), distance / images);
                let held_out = self.held_out.as_ref().map(|rewards| rewards.embedding(&image)).transpose()?.flatten();
                let embedding = if held_out.is_some() { held_out } else { training.embedding(&image)? };
                embeddings.extend(embedding.map(|e| e.flatten_all()?.to_vec1::<f32>()).transpose()?);
            }
            if let Some(diversity) = mean_pairwise_distance(&embeddings) {
                add("guard/diversity".to_owned(), diversity / self.prompts.len() as f64);
            }
        }
        Ok(line)
    }

    /// Why the run should stop, if it should.
    pub fn objection(&self, run: &RunFolder) -> Result<Option<String>> {
        let values = |metric| -> Result<Vec<f64>> { Ok(run.history(metric)?.into_iter().map(|(_, x)| x).collect()) };
        let in_a_row = drifting(&values(REWARD)?, &values(HELD_OUT)?);
        if self.patience == 0 || in_a_row < self.patience {
            return Ok(None);
        }
        Ok(Some(format!(
            "the training reward rose while the held-out one fell, {in_a_row} evaluations in a row (guard.patience = {})",
            self.patience
        )))
    }
}

/// How many evaluations at the end raised the reward and lowered the held-out score, each compared with the one before.
fn drifting(reward: &[f64], held_out: &[f64]) -> usize {
    let changes = |values: &[f64]| values.windows(2).rev().map(|pair| pair[1] - pair[0]).collect::<Vec<_>>();
    changes(reward)
        .iter()
        .zip(changes(held_out))
        .take_while(|(reward, held_out)| **reward > 0.0 && *held_out < 0.0)
        .count()
}

/// The mean of 1 - cosine over all pairs of unit vectors; `None` for fewer than two.
fn mean_pairwise_distance(embeddings: &[Vec<f32>]) -> Option<f64> {
    let mut distances = Vec::new();
    for (i, x) in embeddings.iter().enumerate() {
        for y in &embeddings[..i] {
            distances.push(1.0 - x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>());
        }
    }
    (!distances.is_empty()).then(|| distances.iter().sum::<f64>() / distances.len() as f64)
}

/// The best of the checkpoints that are there, with its score: by the held-out score, or without one by the loss of the
/// sample grids. `None` where neither was measured.
pub fn best_checkpoint(run: &RunFolder) -> Result<Option<Best>> {
    let held_out = run.history(HELD_OUT)?;
    let (by, sign, scores) = match held_out.is_empty() {
        false => ("held-out score", 1.0, held_out),
        true => ("loss of the samples", -1.0, run.history("sample/loss")?),
    };
    let saved = Checkpoint::steps(&run.checkpoints())?;
    let scores = scores.into_iter().filter(|(step, _)| saved.contains(step)).rev();
    // the earliest of equals, which is the nearest to the base model: `max_by` gives the last one
    let best = scores.max_by(|(_, x), (_, y)| (sign * x).total_cmp(&(sign * y)));
    Ok(best.map(|(step, score)| Best { step, score, by }))
}

/// A checkpoint, and why it is the best.
pub struct Best {
    pub step: usize,
    pub score: f64,
    /// What the score is.
    pub by: &'static str,
}
