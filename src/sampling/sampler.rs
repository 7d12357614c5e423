//! A pipeline with its schedule, image size and guidance: images of prompts.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;

use super::solve::solve;
use super::{ChainNoise, Conditioning, Denoiser};
use crate::config::{Checkpointing, ModelConfig, Prompt, SamplerConfig, SamplerKind};
use crate::diffusion::{DdimSchedule, Noise, Solver, Stream};
use crate::lora::Adapters;
use crate::lora::formats::{self, LoadedLora};
use crate::models::Pipeline;
use crate::ops::device::Compute;
use crate::ops::{Ledger, is_finite, not_a_number};

/// A pipeline as an experiment uses it.
pub struct Sampler {
    pub pipeline: Pipeline,
    /// Of the chains that are differentiated.
    pub schedule: DdimSchedule,
    /// Of images that are only drawn.
    solver: Solver,
    /// (channels, h, w) of one sample's latents.
    pub latent_shape: (usize, usize, usize),
    guidance_scale: f64,
    guidance_rescale: f64,
    /// (1, tokens, D)
    negative_prompt_embeds: Tensor,
}

/// Images with what they were made from.
pub struct Drawn {
    /// x_T (B, C, h, w).
    pub initial_latents: Tensor,
    pub conditioning: Conditioning,
    /// x_0 (B, C, h, w), in the UNet's scale.
    pub latents: Tensor,
    /// (B, 3, H, W), about [-1, 1].
    pub images: Tensor,
}

impl Sampler {
    /// Loads the pipeline of `[model]` for images as `[sampler]` says.
    ///
    /// # Errors
    /// A part that cannot be loaded, a size or a number of steps that the model does not have.
    pub fn load(model: &ModelConfig, sampler: &SamplerConfig, compute: &Compute) -> Result<Self> {
        let pipeline = Pipeline::load_on(model, compute)?;
        let schedule = DdimSchedule::load(&pipeline.source, sampler.num_inference_steps, sampler.eta)?;
        let solver = match sampler.kind {
            SamplerKind::Ddim => Solver::from(&schedule),
            kind => Solver::load(&pipeline.source, kind, sampler.karras, sampler.num_inference_steps)?,
        };
        let (height, width) = pipeline.default_size();
        let latent_shape = pipeline.latent_shape(sampler.height.unwrap_or(height), sampler.width.unwrap_or(width))?;
        let (negative_prompt, guidance_scale) = (&sampler.negative_prompt, sampler.guidance_scale);
        let negative_prompt_embeds = pipeline.encode_prompts(std::slice::from_ref(negative_prompt))?;
        ensure!(is_finite(&negative_prompt_embeds)?, "not a number: the text encoder's output is not finite");
        let SamplerConfig { guidance_rescale, kind, eta, .. } = *sampler;
        if kind != SamplerKind::Ddim && eta > 0.0 {
            note!("warning: sampler.eta = {eta} does nothing: it goes with sampler.kind = \"ddim\"");
        }
        if guidance_rescale > 0.0 && guidance_scale <= 1.0 {
            note!(
                "warning: sampler.guidance_rescale = {guidance_rescale} does nothing: there is no guidance with \
                 sampler.guidance_scale = {guidance_scale}"
            );
        }
        let sampler =
            Self { pipeline, schedule, solver, latent_shape, guidance_scale, guidance_rescale, negative_prompt_embeds };
        // without guidance nobody reads it
        if guidance_scale > 1.0 {
            sampler.warn_of_cut("sampler.negative_prompt", std::slice::from_ref(negative_prompt))?;
        }
        Ok(sampler)
    }

    /// What it computes on.
    pub fn compute(&self) -> &Compute {
        self.pipeline.unet.compute()
    }

    /// Height and width of the images.
    pub fn image_size(&self) -> (usize, usize) {
        let (_, h, w) = self.latent_shape;
        (h * self.pipeline.vae.factor(), w * self.pipeline.vae.factor())
    }

    /// The embeddings of prompts, beside those of the negative prompt.
    ///
    /// # Errors
    /// An embedding that is not finite, here or when the ledger is read.
    pub fn conditioning(&self, prompts: &[Prompt], ledger: &mut Ledger) -> Result<Conditioning> {
        let prompt_embeds = self.pipeline.encode_prompts(prompts)?;
        let of = quoted(prompts);
        ledger.finite(&prompt_embeds, move |_| format!("the text encoder's output for {of} is not finite"))?;
        let negative_prompt_embeds = self.negative_prompt_embeds.repeat((prompts.len(), 1, 1))?;
        let conditioning =
            Conditioning::new(prompt_embeds, negative_prompt_embeds, self.guidance_scale, self.compute());
        Ok(conditioning.rescaled(self.guidance_rescale))
    }

    /// The UNet with these adapters and prompts.
    pub fn denoiser<'a>(
        &'a self,
        adapters: &'a Adapters,
        conditioning: Conditioning,
        checkpointing: Checkpointing,
    ) -> Denoiser<'a> {
        Denoiser { unet: &self.pipeline.unet, adapters, conditioning, checkpointing }
    }

    /// The noise of training chains: samples of the global batch of optimizer step `step`.
    pub fn training_noise(&self, noise: &Noise, step: u64, samples: Range<u64>) -> ChainNoise {
        self.noise(*noise, [Stream::Latents, Stream::Variance], step, samples)
    }

    /// The noise of sample grids and evaluations: the same for the same `seed` and numbers of prompts.
    pub fn evaluation_noise(&self, seed: u64, prompts: Range<u64>) -> ChainNoise {
        self.noise(Noise::new(seed), [Stream::Evaluation, Stream::EvaluationVariance], 0, prompts)
    }

    /// The noise of the guard's images: others than those that [`Self::evaluation_noise`] gives.
    pub fn guard_noise(&self, seed: u64, prompts: Range<u64>) -> ChainNoise {
        self.noise(Noise::new(seed), [Stream::Guard, Stream::GuardVariance], 0, prompts)
    }

    fn noise(&self, noise: Noise, streams: [Stream; 2], step: u64, samples: Range<u64>) -> ChainNoise {
        let device = self.compute().device().clone();
        ChainNoise { noise, streams, step, samples, shape: self.latent_shape, device }
    }

    /// Images of the prompts. With `lora_start` the base model takes the noisy timesteps and the adapted one those below
    /// that timestep: what is in the picture is then the base model's, how it looks the adapters'.
    ///
    /// # Errors
    /// Latents or an image that are not finite: names the step or the prompt.
    pub fn draw(
        &self,
        prompts: &[Prompt],
        noise: &ChainNoise,
        adapters: &Adapters,
        lora_start: Option<usize>,
    ) -> Result<Drawn> {
        let initial_latents = noise.initial_latents()?;
        let mut ledger = Ledger::default();
        let conditioning = self.conditioning(prompts, &mut ledger)?;
        let denoiser = self.denoiser(adapters, conditioning, Checkpointing::Step);
        let Solver { start, steps } = &self.solver;
        // timesteps fall along the chain
        let early = steps.partition_point(|step| lora_start.is_some_and(|t| step.ddim.timestep >= t as f64));
        let base = Adapters::default();
        let mut of_base = denoiser.with_adapters(&base).predictor(early);
        let mut adapted = denoiser.predictor(steps.len() - early);
        let predict = |i: usize, x_t: &Tensor| {
            let predictor = if i < early { &mut of_base } else { &mut adapted };
            predictor.predict(x_t, steps[i].ddim.timestep)
        };
        let x_t = if *start == 1.0 { initial_latents.clone() } else { (&initial_latents * *start)? };
        let latents = solve(steps, x_t, predict, |i| noise.of_step(i), &mut ledger)?;
        ledger.read()?;
        let images = self.decode(&latents).with_context(|| format!("drawing {}", quoted(prompts)))?;
        Ok(Drawn { initial_latents, conditioning: denoiser.conditioning, latents, images })
    }

    /// Images (B, 3, H, W) of latents (B, C, h, w), decoded one at a time.
    ///
    /// # Errors
    /// An image that is not finite.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let images = (0..latents.dims4()?.0)
            .map(|row| self.pipeline.vae.decode(&latents.narrow(0, row, 1)?.contiguous()?))
            .collect::<Result<Vec<_>>>()?;
        let images = Tensor::cat(&images, 0)?;
        if !is_finite(&images)? {
            return not_a_number("the VAE's image is not finite");
        }
        Ok(images)
    }

    /// Warns, once for a setting, of its texts that the text encoder does not read to their end.
    ///
    /// # Errors
    /// A text cannot be tokenized.
    pub fn warn_of_cut(&self, setting: &str, texts: &[impl AsRef<str>]) -> Result<()> {
        if let Some(cut) = self.pipeline.describe_cut(texts)? {
            note!("warning: {setting}: {cut}");
        }
        Ok(())
    }

    /// Reads a LoRA and checks that it belongs to this UNet.
    pub fn load_lora(&self, path: &Path) -> Result<LoadedLora> {
        self.fit_lora(formats::load(path)?, path)
    }

    /// Checks that a LoRA, which was read from `path`, belongs to this UNet.
    pub fn fit_lora(&self, mut loaded: LoadedLora, path: &Path) -> Result<LoadedLora> {
        loaded.adapters = loaded
            .adapters
            .fitted(&self.pipeline.unet.targets())
            .with_context(|| format!("{} does not fit {}", path.display(), self.pipeline.source.label()))?
            .to_device(self.compute().device())?;
        loaded.warn(path);
        Ok(loaded)
    }
}

/// Prompts for a message.
fn quoted(prompts: &[Prompt]) -> String {
    prompts.iter().map(|prompt| format!("`{prompt}`")).collect::<Vec<_>>().join(", ")
}
