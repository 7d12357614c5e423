//! What train, eval and sample share: a pipeline with its schedule and image size, ready to make images.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;

use crate::cli::ConfigArgs;
use crate::config::{Config, Prompt};
use crate::diffusion::{DdimSchedule, Noise, Stream};
use crate::lora::Adapters;
use crate::lora::formats::{self, LoadedLora};
use crate::models::Pipeline;
use crate::ops::device::{Compute, upload};
use crate::ops::{Ledger, is_finite, not_a_number};
use crate::training::run_folder::RunFolder;
use crate::training::{Prompting, anchor, rollout};

/// A pipeline as an experiment uses it.
pub(super) struct Model {
    pub pipeline: Pipeline,
    pub schedule: DdimSchedule,
    /// (channels, h, w) of one sample's latents.
    pub latent_shape: (usize, usize, usize),
    guidance_scale: f64,
    /// (1, tokens, D)
    negative_prompt_embeds: Tensor,
}

/// Images with what they were made from.
pub(super) struct Drawn {
    /// x_T (B, C, h, w).
    pub initial_latents: Tensor,
    pub prompting: Prompting,
    /// x_0 (B, C, h, w), in the UNet's scale.
    pub latents: Tensor,
    /// (B, 3, H, W), about [-1, 1].
    pub images: Tensor,
}

impl Model {
    pub fn load(config: &Config, compute: &Compute) -> Result<Self> {
        let pipeline = Pipeline::load_on(&config.model, compute)?;
        let sampler = &config.sampler;
        let schedule = DdimSchedule::load(&pipeline.source, sampler.num_inference_steps, sampler.eta)?;
        let (height, width) = pipeline.default_size();
        let latent_shape = pipeline.latent_shape(sampler.height.unwrap_or(height), sampler.width.unwrap_or(width))?;
        let negative_prompt_embeds = pipeline.encode_prompts(std::slice::from_ref(&sampler.negative_prompt))?;
        ensure!(is_finite(&negative_prompt_embeds)?, "not a number: the text encoder's output is not finite");
        Ok(Self { pipeline, schedule, latent_shape, guidance_scale: sampler.guidance_scale, negative_prompt_embeds })
    }

    /// What it computes on.
    pub fn compute(&self) -> &Compute {
        self.pipeline.unet.compute()
    }

    /// Noise (B, C, h, w) for some samples, on the model's device.
    pub fn noise(&self, noise: &Noise, stream: Stream, step: u64, samples: Range<u64>) -> Result<Tensor> {
        Ok(upload(&noise.normal_batch(stream, step, samples, self.latent_shape)?, self.compute().device())?)
    }

    /// Height and width of its images.
    pub fn image_size(&self) -> (usize, usize) {
        let (_, h, w) = self.latent_shape;
        (h * self.pipeline.vae.factor(), w * self.pipeline.vae.factor())
    }

    /// The embeddings of prompts, beside those of the negative prompt.
    pub fn prompting(&self, prompts: &[Prompt], ledger: &mut Ledger) -> Result<Prompting> {
        let prompt_embeds = self.pipeline.encode_prompts(prompts)?;
        let of = joined(prompts);
        ledger.finite(&prompt_embeds, move |_| format!("the text encoder's output for `{of}` is not finite"))?;
        let negative_prompt_embeds = self.negative_prompt_embeds.repeat((prompts.len(), 1, 1))?;
        Ok(Prompting { prompt_embeds, negative_prompt_embeds, guidance_scale: self.guidance_scale })
    }

    /// The noise of DDIM step `i` (where eta is not zero) for some samples of optimizer step `step`.
    pub fn variance_noise(&self, noise: &Noise, step: u64, i: usize, samples: Range<u64>) -> Result<Tensor> {
        self.noise(noise, Stream::Variance, counter(step, i), samples)
    }

    /// Images (B, 3, H, W) of the prompts, from the evaluation noise of `seed`; `first` is the first prompt's number.
    pub fn images(&self, prompts: &[Prompt], first: u64, seed: u64, adapters: &Adapters) -> Result<Tensor> {
        self.gated_images(prompts, first, seed, adapters, None)
    }

    /// [`Self::images`] of the base model at the noisy timesteps and of the adapted one below timestep `lora_start`:
    /// what is in the picture is then the base model's, how it looks the adapters'. `None`: adapted throughout.
    pub fn gated_images(
        &self,
        prompts: &[Prompt],
        first: u64,
        seed: u64,
        adapters: &Adapters,
        lora_start: Option<usize>,
    ) -> Result<Tensor> {
        Ok(self.draw(prompts, first, seed, adapters, lora_start)?.images)
    }

    /// As [`Self::gated_images`], with what they were made from.
    pub fn draw(
        &self,
        prompts: &[Prompt],
        first: u64,
        seed: u64,
        adapters: &Adapters,
        lora_start: Option<usize>,
    ) -> Result<Drawn> {
        let noise = Noise::new(seed);
        let samples = first..first + prompts.len() as u64;
        let x_t = self.noise(&noise, Stream::Evaluation, 0, samples.clone())?;
        let mut ledger = Ledger::default();
        let prompting = self.prompting(prompts, &mut ledger)?;
        let variance = |i| self.noise(&noise, Stream::EvaluationVariance, i as u64, samples.clone());
        let (unet, steps) = (&self.pipeline.unet, self.schedule.steps());
        // timesteps fall along the chain
        let (early, late) =
            steps.split_at(steps.partition_point(|step| lora_start.is_some_and(|t| step.timestep >= t)));
        let base = Adapters::default();
        let middle = rollout(unet, early, x_t.clone(), &prompting, &base, variance, &mut ledger)?.latents;
        let variance = |i| variance(early.len() + i);
        let latents = rollout(unet, late, middle, &prompting, adapters, variance, &mut ledger)?.latents;
        ledger.read()?;
        let images = self.decode(&latents, prompts)?;
        Ok(Drawn { initial_latents: x_t, prompting, latents, images })
    }

    /// An image (1, 3, H, W) on the guard's noise, and the mean distance of its noise predictions from the base model's.
    pub fn watched_image(&self, prompt: &Prompt, number: u64, seed: u64, adapters: &Adapters) -> Result<(Tensor, f64)> {
        let (noise, sample, prompts) = (Noise::new(seed), number..number + 1, [prompt.clone()]);
        let x_t = self.noise(&noise, Stream::Guard, 0, sample.clone())?;
        let mut ledger = Ledger::default();
        let prompting = self.prompting(&prompts, &mut ledger)?;
        let variance = |i| self.noise(&noise, Stream::GuardVariance, i as u64, sample.clone());
        let (unet, steps) = (&self.pipeline.unet, self.schedule.steps());
        let trajectory = rollout(unet, steps, x_t, &prompting, adapters, variance, &mut ledger)?;
        ledger.read()?;
        let distances = anchor::distances(unet, steps, &trajectory, &prompting)?;
        Ok((self.decode(&trajectory.latents, &prompts)?, distances[0]))
    }

    /// Images (B, 3, H, W) of latents, decoded one at a time.
    pub fn decode(&self, latents: &Tensor, prompts: &[Prompt]) -> Result<Tensor> {
        let images = (0..prompts.len())
            .map(|row| self.pipeline.vae.decode(&latents.narrow(0, row, 1)?.contiguous()?))
            .collect::<Result<Vec<_>>>()?;
        let images = Tensor::cat(&images, 0)?;
        if !is_finite(&images)? {
            return not_a_number(format!("the VAE's image of `{}` is not finite", joined(prompts)));
        }
        Ok(images)
    }

    /// Prompts that the text encoder will not read to their end, with the number of their tokens.
    pub fn truncated_prompts<'a>(&self, prompts: &'a [Prompt]) -> Result<Vec<(&'a str, usize)>> {
        let tokenizer = &self.pipeline.tokenizer;
        let mut long = Vec::new();
        for prompt in prompts {
            let count = tokenizer.token_count(&prompt.text)?;
            if count > tokenizer.max_length() {
                long.push((prompt.text.as_str(), count));
            }
        }
        Ok(long)
    }

    /// Reads a LoRA and checks that it belongs to this UNet.
    pub fn load_lora(&self, path: &Path) -> Result<LoadedLora> {
        let mut loaded = formats::load(path)?;
        loaded.adapters = loaded
            .adapters
            .fitted(&self.pipeline.unet.targets())
            .with_context(|| format!("{} does not fit {}", path.display(), self.pipeline.source.label()))?
            .to_device(self.compute().device())?;
        loaded.warn(path);
        Ok(loaded)
    }
}

/// The texts of prompts, for a message that puts them between backquotes.
fn joined(prompts: &[Prompt]) -> String {
    prompts.iter().map(AsRef::as_ref).collect::<Vec<_>>().join("`, `")
}

/// One counter of (optimizer step, place within it): a chain has fewer than 2¹⁶ steps.
pub(super) fn counter(step: u64, place: usize) -> u64 {
    step << 16 | place as u64
}

/// A LoRA with the config that it was trained with, where that is known.
pub(super) struct Checkpointed {
    pub config: Config,
    /// The LoRA file or its folder.
    pub adapters: PathBuf,
    /// The run folder that was given.
    pub run: Option<PathBuf>,
    /// Whether the config comes from a file and is not the defaults.
    pub has_config: bool,
}

/// A run folder (its last checkpoint, its config), a checkpoint in one, or a LoRA from elsewhere.
pub(super) fn checkpoint_of(checkpoint: &Path, args: &ConfigArgs) -> Result<Checkpointed> {
    let is_run = checkpoint.join("config.toml").is_file();
    if is_run {
        let run = RunFolder::open(checkpoint)?;
        let config = match &args.config {
            Some(path) => Config::load(path, &args.set)?,
            None => Config::load(&run.config(), &args.set)?,
        };
        let adapters = run.last_checkpoint()?;
        return Ok(Checkpointed { config, adapters, run: Some(checkpoint.to_owned()), has_config: true });
    }
    // RUN/checkpoints/step-NNNNNN, or the adapter in it: the run's config is known
    let in_run = checkpoint.ancestors().find(|folder| folder.file_name().is_some_and(|name| name == "checkpoints"));
    let run_config = in_run.and_then(Path::parent).map(|run| run.join("config.toml")).filter(|path| path.is_file());
    let path: Option<&Path> = args.config.as_deref().or(run_config.as_deref());
    let config = config_of(path, &args.set, DEFAULTS)?;
    Ok(Checkpointed { config, adapters: checkpoint.to_owned(), run: None, has_config: path.is_some() })
}

/// The config of `--config`, or `fallback` (its text and its name), with `--set` applied.
pub(super) fn config_of(path: Option<&Path>, overrides: &[String], fallback: (&str, &str)) -> Result<Config> {
    match path {
        Some(path) => Config::load(path, overrides),
        None => Config::parse(fallback.0, fallback.1, overrides),
    }
}

/// Every key at its default.
pub(super) const DEFAULTS: (&str, &str) = ("", "the defaults");

/// The experiment that trains without a config: the small model that the repository carries.
pub(super) const EMBEDDED: (&str, &str) = (include_str!("../../configs/emoji.toml"), "configs/emoji.toml, the default");
