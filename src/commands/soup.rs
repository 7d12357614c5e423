//! `alignprop soup`: several adapters averaged into one, or mixed with the base model.

use std::collections::HashMap;

use anyhow::{Result, bail};

use crate::cli::{self, SoupArgs};
use crate::config::shown;
use crate::lora::soup::{Average, mix, relative_error};
use crate::lora::{Adapters, formats};

/// How far from 1 a sum of weights may be: what typed decimals lose.
const TOLERANCE: f64 = 1e-6;

pub fn run(args: &SoupArgs) -> Result<()> {
    let total: f64 = args.parts.iter().map(|(_, weight)| weight).sum();
    if !args.with_base && (total - 1.0).abs() > TOLERANCE {
        bail!("the weights sum to {total}, not to 1; for a rest of base model add --with-base");
    }
    if args.with_base && !(0.0..=1.0 + TOLERANCE).contains(&total) {
        bail!("the weights sum to {total}: with --with-base they sum to 0 to 1, and the rest is the base model");
    }
    if args.rank.is_some() && args.average == cli::Average::Factors {
        bail!("--rank cuts a product average; the average of factors keeps their rank: leave --rank out");
    }
    let mut parts = Vec::with_capacity(args.parts.len() + 1);
    let mut base_models = Vec::new();
    for (path, weight) in &args.parts {
        let loaded = formats::load(path)?;
        loaded.warn(path);
        base_models.extend(loaded.metadata.get("base_model").cloned());
        parts.push((loaded.adapters, *weight));
    }
    base_models.sort();
    base_models.dedup();
    if base_models.len() > 1 {
        note!("warning: these adapters were trained on different models: {}", shown(base_models.join(", ")));
    }
    let average = match args.average {
        cli::Average::Factors => Average::Factors,
        cli::Average::Product => Average::Product { rank: args.rank },
    };
    let mixed = match (average, args.with_base) {
        // scaling the product by what is left is the mixture with the base model
        (Average::Factors, true) => mix(&normalised(&parts, total)?, Average::Factors)?.scaled(total),
        (Average::Factors, false) => mix(&parts, average)?,
        (Average::Product { .. }, with_base) => {
            if with_base {
                parts.push((Adapters::default(), 1.0 - total));
            }
            mix(&parts, average)?
        }
    };
    if args.rank.is_some() {
        let exact = mix(&parts, Average::Product { rank: None })?;
        note!(
            "truncation to rank {}: relative error {:.2e} of the exact average",
            args.rank.unwrap_or(0),
            relative_error(&exact, &mixed)?
        );
    }
    let recipe: Vec<String> = args.parts.iter().map(|(path, weight)| format!("{}={weight}", path.display())).collect();
    let mut metadata = HashMap::from([
        ("soup".to_owned(), recipe.join(" ")),
        ("average".to_owned(), format!("{:?}", args.average).to_lowercase()),
    ]);
    if let [base_model] = base_models.as_slice() {
        metadata.insert("base_model".into(), base_model.clone());
    }
    formats::save(&mixed, &metadata, &args.output)?;
    say!("{}: {} layers of rank {}", args.output.display(), mixed.factors().len(), mixed.ranks());
    Ok(())
}

/// Weights that sum to one.
fn normalised(parts: &[(Adapters, f64)], total: f64) -> Result<Vec<(Adapters, f64)>> {
    if total.abs() < TOLERANCE {
        bail!("the weights sum to 0: nothing but the base model is left");
    }
    Ok(parts.iter().map(|(adapters, weight)| (adapters.clone(), weight / total)).collect())
}
