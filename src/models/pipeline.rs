//! A Stable Diffusion pipeline, in the diffusers layout or in a single file.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;

use super::text_encoder::TextEncoder;
use super::tokenizer::ClipTokenizer;
use super::unet::{PerBlock, Unet};
use super::vae::Vae;
use super::{Source, model_index};
use crate::config::{ModelConfig, shown};
use crate::ops::device::Compute;

/// The frozen parts of a text-to-image model.
pub struct Pipeline {
    pub source: Source,
    /// Shared with the rewards that have none of their own.
    pub tokenizer: Arc<ClipTokenizer>,
    pub text_encoder: TextEncoder,
    pub unet: Unet,
    pub vae: Vae,
}

impl Pipeline {
    /// Loads the pipeline of `[model]`, a folder, a hub id or a single file, for the CPU.
    ///
    /// # Errors
    /// Says which part could not be loaded, from where and why.
    pub fn load(model: &ModelConfig) -> Result<Self> {
        Self::load_on(model, &Compute::cpu())
    }

    /// As [`Self::load`], for another device or number format.
    ///
    /// # Errors
    /// As there.
    pub fn load_on(model: &ModelConfig, compute: &Compute) -> Result<Self> {
        let source = Source::pipeline(model)?;
        let variant = model.variant.as_deref();
        model_index::check(&source)?;
        let part = |name: &str| format!("loading the {name} of {}", source.label());
        let tokenizer = ClipTokenizer::load(&source.sub("tokenizer")).with_context(|| part("tokenizer"))?;
        let text_encoder =
            TextEncoder::load(&source.sub("text_encoder"), variant, compute).with_context(|| part("text encoder"))?;
        if tokenizer.vocab_size() > text_encoder.vocab_size() {
            bail!(
                "{}: the tokenizer has {} ids and the text encoder {}: they belong to different models",
                source.label(),
                tokenizer.vocab_size(),
                text_encoder.vocab_size()
            );
        }
        let unet = Unet::load(&source.sub("unet"), variant, compute).with_context(|| part("UNet"))?;
        let vae = Vae::load(&source.sub("vae"), variant, compute).with_context(|| part("VAE"))?;
        if unet.config().in_channels != vae.config().latent_channels {
            bail!(
                "{}: the UNet takes {} channels and the VAE has {}: an inpainting or upscaling model cannot be trained here",
                source.label(),
                unet.config().in_channels,
                vae.config().latent_channels
            );
        }
        Ok(Self { source, tokenizer: Arc::new(tokenizer), text_encoder, unet, vae })
    }

    /// Prompt embeddings (B, 77, D).
    pub fn encode_prompts(&self, prompts: &[impl AsRef<str>]) -> Result<Tensor> {
        let ids = prompts.iter().map(|prompt| self.tokenizer.encode(prompt.as_ref())).collect::<Result<Vec<_>>>()?;
        self.text_encoder.forward(&ids)
    }

    /// Says how many of the texts are longer than the text encoder reads, and where the first of them is cut.
    pub fn describe_cut(&self, texts: &[impl AsRef<str>]) -> Result<Option<String>> {
        let limit = self.tokenizer.max_length();
        let mut cut = 0;
        let mut first = None;
        for text in texts.iter().map(AsRef::as_ref) {
            let Some(lost) = self.tokenizer.first_lost(text)? else { continue };
            cut += 1;
            first.get_or_insert((text, lost));
        }
        let Some((text, lost)) = first else { return Ok(None) };
        let tokens = self.tokenizer.token_count(text)?;
        let of = if texts.len() > 1 { format!("{cut} of {} texts are cut; ", texts.len()) } else { String::new() };
        let start: String = text.chars().take(40).collect();
        let dots = if start.len() < text.len() { "..." } else { "" };
        Ok(Some(format!(
            "{of}`{}{dots}` has {tokens} tokens, and the text encoder reads the first {limit} (as in diffusers): `{}` and what \
             follows is lost",
            shown(start),
            shown(lost)
        )))
    }

    /// Height and width of the images that the model was made for.
    pub fn default_size(&self) -> (usize, usize) {
        let factor = self.vae.factor();
        let side = |axis| match &self.unet.config().sample_size {
            Some(PerBlock::One(n)) => n * factor,
            Some(PerBlock::Each(sides)) => sides.get(axis).map_or(64 * factor, |n| n * factor),
            None => 64 * factor,
        };
        (side(0), side(1))
    }

    /// (channels, h, w) of the latents of a `height` x `width` image.
    ///
    /// # Errors
    /// A side that is not a positive multiple of the VAE's factor.
    pub fn latent_shape(&self, height: usize, width: usize) -> Result<(usize, usize, usize)> {
        let factor = self.vae.factor();
        for (name, side) in [("height", height), ("width", width)] {
            if side == 0 || side % factor != 0 {
                let nearest = (side + factor / 2).max(factor) / factor * factor;
                bail!(
                    "sampler.{name} = {side}: this model makes images whose sides are multiples of {factor}; the nearest is {nearest}"
                );
            }
        }
        Ok((self.unet.config().in_channels, height / factor, width / factor))
    }
}
