//! `alignprop eval`: a checkpoint beside the base model, on the same prompts and noise.

use std::path::PathBuf;

use anyhow::Result;
use comfy_table::{Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::experiment::{Checkpointed, Model, checkpoint_of};
use super::{check_device, pictures};
use crate::cli::EvalArgs;
use crate::config::PromptsConfig;
use crate::lora::Adapters;
use crate::rewards::Rewards;
use crate::training::run_folder::write_whole;

/// Pairs in one row of the grid.
const COLUMNS: usize = 8;
/// Pairs that the grid shows.
const PICTURES: usize = 32;

/// A mean with its standard error.
#[derive(Clone, Copy, Debug, Serialize)]
struct Estimate {
    mean: f64,
    /// NaN (null in JSON) for a single image.
    stderr: f64,
}

impl Estimate {
    fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0);
        Self { mean, stderr: (variance / n).sqrt() }
    }
}

impl std::fmt::Display for Estimate {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        if self.stderr.is_nan() {
            write!(f, "{:.4}", self.mean)
        } else {
            write!(f, "{:.4} ± {:.4}", self.mean, self.stderr)
        }
    }
}

/// Base and tuned scores of the same images.
#[derive(Serialize)]
struct Comparison {
    base: Estimate,
    tuned: Estimate,
    /// Of the differences image by image: the noise that both share cancels.
    difference: Estimate,
}

impl Comparison {
    fn of(base: &[f64], tuned: &[f64]) -> Self {
        let differences: Vec<f64> = base.iter().zip(tuned).map(|(b, t)| t - b).collect();
        Self { base: Estimate::of(base), tuned: Estimate::of(tuned), difference: Estimate::of(&differences) }
    }
}

#[derive(Serialize)]
struct RewardReport {
    reward: String,
    preprocess: String,
    overall: Comparison,
    per_prompt: Vec<PromptReport>,
}

#[derive(Serialize)]
struct PromptReport {
    prompt: String,
    #[serde(flatten)]
    comparison: Comparison,
}

#[derive(Serialize)]
struct Report {
    checkpoint: PathBuf,
    lora_scale: f64,
    model: String,
    seeds: usize,
    prompts: usize,
    rewards: Vec<RewardReport>,
}

pub fn run(args: &EvalArgs) -> Result<()> {
    let Checkpointed { config, adapters: adapters_path, run, .. } = checkpoint_of(&args.checkpoint, &args.config)?;
    check_device(args.device.as_deref().unwrap_or(&config.run.device), config.run.precision)?;
    let prompts = match &args.prompts {
        Some(file) => PromptsConfig { file: Some(file.clone()), ..Default::default() }.load()?,
        None => config.prompts.load()?,
    };
    let reward_config = if args.reward.is_empty() { config.reward.clone() } else { config.reward.select(&args.reward) };
    let model = Model::load(&config)?;
    let tuned = model.load_lora(&adapters_path)?.adapters.scaled(args.lora_scale);
    let rewards = Rewards::load(&reward_config, &model.pipeline.tokenizer)?;
    let base = Adapters::default();

    // [reward][prompt][seed]
    let empty = || vec![vec![Vec::with_capacity(args.seeds); prompts.len()]; rewards.names().len()];
    let (mut base_scores, mut tuned_scores) = (empty(), empty());
    let mut shown = Vec::new();
    let bar = ProgressBar::with_draw_target(Some((prompts.len() * args.seeds) as u64), ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template("{pos}/{len} {wide_bar} {elapsed} (left {eta})")?);
    for seed in 0..args.seeds {
        for (number, prompt) in prompts.iter().enumerate() {
            let mut pair = Vec::with_capacity(2);
            for (adapters, scores) in [(&base, &mut base_scores), (&tuned, &mut tuned_scores)] {
                let image = model.images(std::slice::from_ref(prompt), number as u64, seed as u64, adapters)?;
                for (reward, score) in rewards.scores(&image, prompt)?.into_iter().enumerate() {
                    scores[reward][number].push(score);
                }
                if shown.len() < PICTURES {
                    pair.push(pictures::enlarge(pictures::to_rgb(&image.get(0)?)?, 128));
                }
            }
            if pair.len() == 2 {
                shown.push((pair.swap_remove(0), pair.swap_remove(0)));
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();

    let settings = toml::Value::try_from(&reward_config)?;
    let reports = rewards.names().into_iter().enumerate().map(|(r, name)| RewardReport {
        reward: name.to_owned(),
        preprocess: settings
            .get(name)
            .and_then(|table| table.get("preprocess")?.as_str())
            .unwrap_or_default()
            .to_owned(),
        overall: Comparison::of(&base_scores[r].concat(), &tuned_scores[r].concat()),
        per_prompt: prompts
            .iter()
            .enumerate()
            .map(|(p, prompt)| PromptReport {
                prompt: prompt.clone(),
                comparison: Comparison::of(&base_scores[r][p], &tuned_scores[r][p]),
            })
            .collect(),
    });
    let report = Report {
        checkpoint: adapters_path,
        lora_scale: args.lora_scale,
        model: config.model.path.clone(),
        seeds: args.seeds,
        prompts: prompts.len(),
        rewards: reports.collect(),
    };
    let out = args.out.clone().unwrap_or_else(|| run.map_or("eval".into(), |run| run.join("eval")));
    pictures::save_png(&pairs(shown)?, &out.join("grid.png"))?;
    let json = out.join("eval.json");
    write_whole(&json, &serde_json::to_string_pretty(&report)?)?;

    print_tables(&report);
    println!(
        "{} images each of the base model and the checkpoint; base above, tuned below: {}",
        prompts.len() * args.seeds,
        out.join("grid.png").display()
    );
    println!("all scores: {}", json.display());
    Ok(())
}

/// Rows of base images, each with the tuned ones under it.
fn pairs(shown: Vec<(image::RgbImage, image::RgbImage)>) -> Result<image::RgbImage> {
    let columns = shown.len().min(COLUMNS);
    let blank =
        shown.first().map(|(base, _)| image::RgbImage::from_pixel(base.width(), base.height(), image::Rgb([255; 3])));
    let mut cells = Vec::new();
    for row in shown.chunks(columns) {
        let padded = |pick: &dyn Fn(&(image::RgbImage, image::RgbImage)) -> image::RgbImage| {
            let mut cells: Vec<_> = row.iter().map(pick).collect();
            cells.resize(columns, blank.clone().unwrap_or_default());
            cells
        };
        cells.extend(padded(&|pair| pair.0.clone()));
        cells.extend(padded(&|pair| pair.1.clone()));
    }
    pictures::grid(&cells, columns)
}

fn print_tables(report: &Report) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["reward", "prompt", "base", "tuned", "difference"]);
    for reward in &report.rewards {
        if report.prompts > 1 {
            for row in &reward.per_prompt {
                let c = &row.comparison;
                table.add_row([
                    reward.reward.clone(),
                    row.prompt.clone(),
                    c.base.to_string(),
                    c.tuned.to_string(),
                    c.difference.to_string(),
                ]);
            }
        }
        let c = &reward.overall;
        table.add_row([
            reward.reward.clone(),
            "all".into(),
            c.base.to_string(),
            c.tuned.to_string(),
            c.difference.to_string(),
        ]);
    }
    println!("{table}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_have_the_standard_error_of_the_mean() {
        let estimate = Estimate::of(&[1.0, 2.0, 3.0, 4.0]);
        assert_eq!(estimate.mean, 2.5);
        assert!((estimate.stderr - (5.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-12);
        assert_eq!(Estimate::of(&[1.0]).to_string(), "1.0000");
    }

    #[test]
    fn differences_are_paired() {
        let comparison = Comparison::of(&[1.0, 5.0, 9.0], &[2.0, 6.0, 10.0]);
        assert_eq!((comparison.difference.mean, comparison.difference.stderr), (1.0, 0.0));
    }
}
