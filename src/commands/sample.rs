//! `alignprop sample`: images of prompts, with or without a LoRA.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Error, Result};
use candle_core::{DType, Tensor};

use super::base_model;
use super::experiment::{DEFAULTS, compute_of, config_of};
use crate::cli::SampleArgs;
use crate::config::Prompt;
use crate::files;
use crate::lora::{Adapters, formats};
use crate::report::pictures;
use crate::sampling::{Drawn, Sampler};

pub fn run(args: &SampleArgs) -> Result<()> {
    pictures::format_of(&args.output)?;
    for file in std::iter::once(&args.output).chain(&args.save_tensors) {
        files::check_writable(file)?; // before there is work to lose
    }
    let settings = args.settings();
    let mut config = config_of(args.config.config.as_deref(), &settings, DEFAULTS)?;
    let lora = args.lora.as_ref().map(|path| Ok::<_, Error>((path, formats::load(path)?))).transpose()?;
    if let Some((path, lora)) = &lora {
        base_model::take(&mut config, args.config.config.is_some(), &settings, lora, path);
    }
    let sampler = Sampler::load(&config.model, &config.sampler, &compute_of(&config.run)?)?;
    let prompts: Vec<Prompt> = args.prompt.iter().map(|text| Prompt::from(text.as_str())).collect();
    let adapters = match lora {
        Some((path, lora)) => sampler.fit_lora(lora, path)?.adapters.scaled(args.lora_scale),
        None => Adapters::default(),
    };
    sampler.warn_of_cut("--prompt", &prompts)?;
    let (mut images, mut drawn) = (Vec::with_capacity(prompts.len()), Vec::new());
    for (number, prompt) in (0..).zip(&prompts) {
        let noise = sampler.evaluation_noise(args.seed, number..number + 1);
        let one = sampler.draw(std::slice::from_ref(prompt), &noise, &adapters, args.lora_start)?;
        images.push(pictures::to_rgb(&one.images.get(0)?)?);
        drawn.push(one);
    }
    if let Some(path) = &args.save_tensors {
        save_tensors(&drawn, path)?;
    }
    let columns = (images.len() as f64).sqrt().ceil() as usize;
    pictures::save(&pictures::grid(&images, columns)?, &args.output)?;
    say!("{}", args.output.display());
    Ok(())
}

/// What the pictures were made from, and they themselves before rounding: for comparing with other programs.
fn save_tensors(drawn: &[Drawn], path: &Path) -> Result<()> {
    let all = |pick: &dyn Fn(&Drawn) -> Tensor| Tensor::cat(&drawn.iter().map(pick).collect::<Vec<_>>(), 0);
    let tensors = [
        ("images".to_owned(), all(&|one| one.images.clone())?),
        ("initial_latents".to_owned(), all(&|one| one.initial_latents.clone())?),
        ("latents".to_owned(), all(&|one| one.latents.clone())?),
        ("negative_prompt_embeds".to_owned(), all(&|one| one.conditioning.negative_prompt_embeds.hidden.clone())?),
        ("prompt_embeds".to_owned(), all(&|one| one.conditioning.prompt_embeds.hidden.clone())?),
    ];
    files::make_folder_of(path)?;
    files::save_tensors(path, &BTreeMap::new(), &tensors, DType::F32)
        .with_context(|| format!("writing the tensors {}", path.display()))
}
