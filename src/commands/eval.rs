//! `alignprop eval`: a checkpoint beside the base model, on the same prompts and noise.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use comfy_table::{Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::base_model;
use super::experiment::{Checkpointed, checkpoint_of, compute_of};
use crate::cli::EvalArgs;
use crate::config::{PromptsConfig, SamplerKind, shown};
use crate::files::{check_writable, write_bytes};
use crate::lora::{Adapters, formats};
use crate::report::pictures;
use crate::rewards::Rewards;
use crate::sampling::Sampler;
use crate::training::checkpoint::EMA;

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
    /// The last scale, which `rewards` is about.
    lora_scale: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    lora_start: Option<usize>,
    model: String,
    sampler: SamplerKind,
    seeds: usize,
    prompts: usize,
    rewards: Vec<RewardReport>,
    /// Every scale, where there are several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    sweep: Vec<ScaleReport>,
}

#[derive(Serialize)]
struct ScaleReport {
    lora_scale: f64,
    reward: String,
    #[serde(flatten)]
    overall: Comparison,
}

pub fn run(args: &EvalArgs) -> Result<()> {
    let settings = args.settings();
    let Checkpointed { mut config, adapters: adapters_path, run, has_config } =
        checkpoint_of(&args.checkpoint, &args.config, &settings)?;
    let adapters_path = if args.ema { average(&adapters_path)? } else { adapters_path };
    let out = args.out.clone().unwrap_or_else(|| run.map_or("eval".into(), |run| run.join("eval")));
    let (grid, json) = (out.join("grid.png"), out.join("eval.json"));
    [&grid, &json].into_iter().try_for_each(|file| check_writable(file))?; // before there is work to lose
    let lora = formats::load(&adapters_path)?;
    base_model::take(&mut config, has_config, &settings, &lora, &adapters_path);
    let compute = compute_of(&config.run)?.with_rewards_in(config.run.reward_precision)?;
    let prompts = match &args.prompts {
        Some(file) => PromptsConfig { file: Some(file.clone()), ..Default::default() }.load()?,
        None => config.prompts.load()?,
    };
    let reward_config = if args.reward.is_empty() { config.reward.clone() } else { config.reward.select(&args.reward) };
    let setting = if args.prompts.is_some() { "--prompts" } else { "prompts" };
    let sampler = Sampler::load(&config.model, &config.sampler, &compute)?;
    sampler.warn_of_cut(setting, &prompts)?;
    let tuned = sampler.fit_lora(lora, &adapters_path)?.adapters;
    let rewards = Rewards::load_on(&reward_config, &sampler.pipeline.tokenizer, &compute)?;
    rewards.check(&prompts).with_context(|| format!("in {setting}"))?;
    // the base model, then each scale of the LoRA
    let mut variants = vec![Adapters::default()];
    variants.extend(args.lora_scale.iter().map(|scale| tuned.scaled(*scale)));

    // [variant][reward][prompt][seed]
    let empty = vec![vec![Vec::with_capacity(args.seeds); prompts.len()]; rewards.names().len()];
    let mut all_scores = vec![empty; variants.len()];
    let mut shown = Vec::new();
    let bar = ProgressBar::with_draw_target(Some((prompts.len() * args.seeds) as u64), ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template("{pos}/{len} {wide_bar} {elapsed} (left {eta})")?);
    for seed in 0..args.seeds {
        for (number, prompt) in prompts.iter().enumerate() {
            let mut column = Vec::with_capacity(variants.len());
            for (adapters, scores) in variants.iter().zip(&mut all_scores) {
                let prompt = std::slice::from_ref(prompt);
                let noise = sampler.evaluation_noise(seed as u64, number as u64..number as u64 + 1);
                let image = sampler.draw(prompt, &noise, adapters, args.lora_start)?.images;
                for (reward, score) in rewards.scores(&image, prompt)?.swap_remove(0).into_iter().enumerate() {
                    scores[reward][number].push(score);
                }
                if shown.len() < PICTURES {
                    column.push(pictures::enlarge(pictures::to_rgb(&image.get(0)?)?, 128));
                }
            }
            if !column.is_empty() {
                shown.push(column);
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();

    let (base_scores, tuned_scores) = (&all_scores[0], &all_scores[variants.len() - 1]);
    let sweep = args.lora_scale.iter().zip(&all_scores[1..]).flat_map(|(scale, scores)| {
        let names = rewards.names().into_iter().enumerate();
        names.map(move |(r, name)| ScaleReport {
            lora_scale: *scale,
            reward: name.to_owned(),
            overall: Comparison::of(&base_scores[r].concat(), &scores[r].concat()),
        })
    });
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
                prompt: prompt.text.clone(),
                comparison: Comparison::of(&base_scores[r][p], &tuned_scores[r][p]),
            })
            .collect(),
    });
    let report = Report {
        checkpoint: adapters_path,
        lora_scale: args.lora_scale[args.lora_scale.len() - 1],
        lora_start: args.lora_start,
        model: config.model.path.clone(),
        sampler: config.sampler.kind,
        seeds: args.seeds,
        prompts: prompts.len(),
        rewards: reports.collect(),
        sweep: if args.lora_scale.len() > 1 { sweep.collect() } else { Vec::new() },
    };
    pictures::save(&columns(&shown)?, &grid)?;
    write_bytes(&json, serde_json::to_string_pretty(&report)?.as_bytes())?;

    print_tables(&report);
    say!(
        "{} images each of the base model and the checkpoint; base above, tuned below, scale by scale: {}",
        prompts.len() * args.seeds,
        grid.display()
    );
    say!("all scores: {}", json.display());
    Ok(())
}

/// The moving average of a checkpoint.
fn average(checkpoint: &Path) -> Result<PathBuf> {
    let average = checkpoint.join(EMA);
    ensure!(
        average.is_file(),
        "--ema: {} has no {EMA}; a run keeps one where its regularization.ema_decay is more than 0",
        checkpoint.display()
    );
    Ok(average)
}

/// Rows of columns, each of which has the base image above and the tuned ones under it.
fn columns(shown: &[Vec<image::RgbImage>]) -> Result<image::RgbImage> {
    let width = shown.len().min(COLUMNS);
    let variants = shown.first().map_or(0, Vec::len);
    let blank = shown.first().and_then(|column| column.first());
    let blank = blank.map(|image| image::RgbImage::from_pixel(image.width(), image.height(), image::Rgb([255; 3])));
    let mut cells = Vec::new();
    for row in shown.chunks(width.max(1)) {
        for variant in 0..variants {
            cells.extend(row.iter().map(|column| column[variant].clone()));
            cells.extend(std::iter::repeat_n(blank.clone().unwrap_or_default(), width - row.len()));
        }
    }
    pictures::grid(&cells, width)
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
                    shown(&row.prompt),
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
    say!("{table}");
    if report.sweep.is_empty() {
        return;
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["reward", "LoRA scale", "base", "tuned", "difference"]);
    for row in &report.sweep {
        let ScaleReport { lora_scale, reward, overall } = row;
        table.add_row([
            reward.clone(),
            lora_scale.to_string(),
            overall.base.to_string(),
            overall.tuned.to_string(),
            overall.difference.to_string(),
        ]);
    }
    say!("{table}");
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
