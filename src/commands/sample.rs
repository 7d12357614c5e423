//! `alignprop sample`: images of prompts, with or without a LoRA.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};

use super::experiment::{DEFAULTS, Drawn, Model, config_of};
use super::{open_device, pictures};
use crate::cli::SampleArgs;
use crate::config::Prompt;
use crate::files;
use crate::lora::Adapters;

pub fn run(args: &SampleArgs) -> Result<()> {
    let mut config = config_of(args.config.config.as_deref(), &args.config.set, DEFAULTS)?;
    if let Some(model) = &args.model {
        config.model.path.clone_from(model);
    }
    let sampler = &mut config.sampler;
    if let Some(negative_prompt) = &args.negative_prompt {
        sampler.negative_prompt.clone_from(negative_prompt);
    }
    sampler.num_inference_steps = args.steps.unwrap_or(sampler.num_inference_steps);
    sampler.guidance_scale = args.guidance_scale.unwrap_or(sampler.guidance_scale);
    sampler.eta = args.eta.unwrap_or(sampler.eta);
    sampler.height = args.height.or(sampler.height);
    sampler.width = args.width.or(sampler.width);
    config.validate()?;
    let compute = open_device(&mut config, args.device.as_deref(), args.precision)?;

    let model = Model::load(&config, &compute)?;
    let adapters = match &args.lora {
        Some(path) => model.load_lora(path)?.adapters.scaled(args.lora_scale),
        None => Adapters::default(),
    };
    let prompts: Vec<Prompt> = args.prompt.iter().cloned().map(Prompt::from).collect();
    for (prompt, tokens) in model.truncated_prompts(&prompts)? {
        eprintln!(
            "warning: `{prompt}` has {tokens} tokens; the text encoder reads the first {}",
            model.pipeline.tokenizer.max_length()
        );
    }
    let (mut images, mut drawn) = (Vec::with_capacity(args.prompt.len()), Vec::new());
    for (number, prompt) in (0..).zip(&prompts) {
        let one = model.draw(std::slice::from_ref(prompt), number, args.seed, &adapters, args.lora_start)?;
        images.push(pictures::to_rgb(&one.images.get(0)?)?);
        drawn.push(one);
    }
    if let Some(path) = &args.save_tensors {
        save_tensors(&drawn, path)?;
    }
    let columns = (images.len() as f64).sqrt().ceil() as usize;
    pictures::save_png(&pictures::grid(&images, columns)?, &args.output)?;
    println!("{}", args.output.display());
    Ok(())
}

/// What the pictures were made from, and they themselves before rounding: for comparing with other programs.
fn save_tensors(drawn: &[Drawn], path: &Path) -> Result<()> {
    let all = |pick: &dyn Fn(&Drawn) -> Tensor| Tensor::cat(&drawn.iter().map(pick).collect::<Vec<_>>(), 0);
    let tensors = [
        ("images".to_owned(), all(&|one| one.images.clone())?),
        ("initial_latents".to_owned(), all(&|one| one.initial_latents.clone())?),
        ("latents".to_owned(), all(&|one| one.latents.clone())?),
        ("negative_prompt_embeds".to_owned(), all(&|one| one.prompting.negative_prompt_embeds.clone())?),
        ("prompt_embeds".to_owned(), all(&|one| one.prompting.prompt_embeds.clone())?),
    ];
    files::save_tensors(path, &BTreeMap::new(), &tensors, DType::F32)
        .with_context(|| format!("writing the tensors {}", path.display()))
}
