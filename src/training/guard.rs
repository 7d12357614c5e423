//! The guard against over-optimisation: evaluations on prompts and noise of their own, and what follows from them.
//!
//! Everything is decided from the run's metrics, so a resumed run decides as the uninterrupted one.

use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::Tensor;
use serde_json::{Map, Value as Json, json};

use crate::config::{Config, GuardConfig, Prompt};
use crate::models::tokenizer::ClipTokenizer;
use crate::ops::device::Compute;
use crate::report::{Metrics, names};
use crate::rewards::Rewards;

/// Why a run should stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Objection {
    pub reason: String,
    /// With this a run goes on all the same.
    pub overrule: &'static str,
}

/// The RSA-FT paper's.
const USUAL_RHO: f64 = 0.01;

/// What a run is watched with.
pub struct Guard {
    every: usize,
    patience: usize,
    max_sharpness: Option<f64>,
    /// How far images are moved to see how sharp the rewards are, if that is looked at.
    rho: Option<f64>,
    seeds: u64,
    prompts: Vec<Prompt>,
    held_out: Option<Rewards>,
}

impl Guard {
    /// The guard of a config, if it has one, for the first of these prompts.
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
        let prompts: Vec<Prompt> = prompts.iter().take(guard.num_prompts).cloned().collect();
        let held_out = match guard.reward.weights().is_empty() {
            true => None,
            false => Some(Rewards::load_on(&guard.reward, tokenizer, compute).context("the guard's held-out rewards")?),
        };
        held_out.as_ref().map_or(Ok(()), |rewards| rewards.check(&prompts).context("the guard's held-out rewards"))?;
        let seeds = guard.seeds as u64;
        let GuardConfig { every, patience, max_sharpness, .. } = *guard;
        let rho = match config.method.rho() {
            0.0 => max_sharpness.map(|_| USUAL_RHO),
            rho => Some(rho),
        };
        Ok(Some(Self { every, patience, max_sharpness, rho, seeds, prompts, held_out }))
    }

    /// With these held-out scores, which need no gradient, in place of the config's.
    pub fn with_held_out(self, held_out: Rewards) -> Self {
        Self { held_out: Some(held_out), ..self }
    }

    /// Whether an evaluation belongs to this step.
    pub fn due(&self, step: usize, last: usize) -> bool {
        step.is_multiple_of(self.every) || step == last
    }

    /// Whether the step's evaluation is in the metrics.
    pub fn has_evaluated(metrics: &Metrics, step: usize) -> bool {
        metrics.has(names::GUARD_REWARD, step)
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
        let mut sums = Sums::default();
        for (number, prompt) in (0..).zip(&self.prompts) {
            let mut embeddings = Vec::new();
            for seed in 0..self.seeds {
                let (image, distance) = image(prompt, number, seed)?;
                for (key, rewards) in
                    [(names::GUARD_REWARD, Some(training)), (names::GUARD_HELD_OUT, self.held_out.as_ref())]
                {
                    let Some(rewards) = rewards else { continue };
                    let scores = rewards.scores(&image, std::slice::from_ref(prompt))?.swap_remove(0);
                    sums.add(key, rewards.total(&scores) / images);
                    for (name, score) in rewards.names().iter().zip(&scores) {
                        sums.add(&names::part(key, name), score / images);
                    }
                }
                if let Some(rho) = self.rho {
                    sums.add(names::GUARD_SHARPNESS, training.sharpness(&image, prompt, rho)? / images);
                }
                sums.add(names::GUARD_DISTANCE, distance / images);
                let held_out = self.held_out.as_ref().map(|rewards| rewards.embedding(&image)).transpose()?.flatten();
                let embedding = if held_out.is_some() { held_out } else { training.embedding(&image)? };
                embeddings.extend(embedding.map(|e| e.flatten_all()?.to_vec1::<f32>()).transpose()?);
            }
            if let Some(diversity) = mean_pairwise_distance(&embeddings) {
                sums.add(names::GUARD_DIVERSITY, diversity / self.prompts.len() as f64);
            }
        }
        Ok(sums.0.into_iter().map(|(name, sum)| (name, json!(sum))).collect())
    }

    /// Why the run should stop, if it should.
    pub fn objection(&self, metrics: &Metrics) -> Option<Objection> {
        let values = |name| metrics.history(name).iter().map(|(_, value)| *value).collect::<Vec<_>>();
        let sharpness = metrics.history(names::GUARD_SHARPNESS).last().map(|(_, sharpness)| *sharpness);
        if let (Some(sharpness), Some(most)) = (sharpness, self.max_sharpness)
            && sharpness > most
        {
            let reason = format!(
                "the training reward has become sharp: a small change of the images costs {sharpness:.4} of it (guard.max_sharpness = \
                 {most})"
            );
            return Some(Objection { reason, overrule: "guard.max_sharpness=inf" });
        }
        let in_a_row = drifting(&values(names::GUARD_REWARD), &values(names::GUARD_HELD_OUT));
        (self.patience > 0 && in_a_row >= self.patience).then(|| Objection {
            reason: format!(
                "the training reward rose while the held-out one fell, {in_a_row} evaluations in a row (guard.patience = {})",
                self.patience
            ),
            overrule: "guard.patience=0",
        })
    }
}

/// Sums under their names, in the order in which the names come.
#[derive(Default)]
struct Sums(Vec<(String, f64)>);

impl Sums {
    fn add(&mut self, name: &str, value: f64) {
        match self.0.iter_mut().find(|(of, _)| of == name) {
            Some((_, sum)) => *sum += value,
            None => self.0.push((name.to_owned(), value)),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_of_numbers_and_a_bad_one_stays() {
        let mut sums = Sums::default();
        for value in [0.1, 0.2, 0.3] {
            sums.add("one", value);
            sums.add("bad", if value == 0.1 { f64::NAN } else { value });
        }
        assert_eq!(sums.0[0], ("one".to_owned(), 0.1 + 0.2 + 0.3));
        assert!(sums.0[1].1.is_nan(), "not the sum of the others");
    }
}
