//! A Stable Diffusion pipeline, 1.x, 2.x or XL, in the diffusers layout or in a single file.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;

use super::text_encoder::TextEncoder;
use super::tokenizer::ClipTokenizer;
use super::unet::{PerBlock, Unet};
use super::vae::Vae;
use super::{PromptEmbeds, SizeConditioning, Source, model_index};
use crate::config::{ModelConfig, shown};
use crate::ops::device::Compute;

/// The frozen parts of a text-to-image model.
pub struct Pipeline {
    pub source: Source,
    /// Shared with the rewards that have none of their own.
    pub tokenizer: Arc<ClipTokenizer>,
    pub text_encoder: TextEncoder,
    /// Stable Diffusion XL's second ones.
    pub second: Option<(ClipTokenizer, TextEncoder)>,
    pub unet: Unet,
    pub vae: Vae,
    /// Whether zeros stand for a negative prompt that is not given, instead of an empty text.
    zeros_for_no_prompt: bool,
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
        let index = model_index::check(&source)?;
        let part = |name: &str| format!("loading the {name} of {}", source.label());
        let skipped = model.clip_skip.unwrap_or(0);
        let text = |end: &str, skipped: usize, projected: bool| -> Result<(ClipTokenizer, TextEncoder)> {
            let folder = source.sub(&format!("tokenizer{end}"));
            let tokenizer = ClipTokenizer::load(&folder).with_context(|| part("tokenizer"))?;
            let folder = source.sub(&format!("text_encoder{end}"));
            let encoder = TextEncoder::load(&folder, variant, compute, skipped, projected);
            let encoder = encoder.with_context(|| part("text encoder"))?;
            if tokenizer.vocab_size() > encoder.vocab_size() {
                bail!(
                    "{}: the tokenizer{end} has {} ids and the text encoder {}: they belong to different models",
                    source.label(),
                    tokenizer.vocab_size(),
                    encoder.vocab_size()
                );
            }
            Ok((tokenizer, encoder))
        };
        // Stable Diffusion XL attends to the states before the last layer
        let (tokenizer, text_encoder) = text("", skipped + usize::from(index.xl), false)?;
        let second = if index.xl { Some(text("_2", skipped + 1, true)?) } else { None };
        let unet = Unet::load(&source.sub("unet"), variant, compute).with_context(|| part("UNet"))?;
        let of_vae = if index.xl { Vae::compute_of_xl(&source.sub("vae"), compute)? } else { compute.clone() };
        let vae = Vae::load(&source.sub("vae"), variant, &of_vae).with_context(|| part("VAE"))?;
        if unet.config().in_channels != vae.config().latent_channels {
            bail!(
                "{}: the UNet takes {} channels and the VAE has {}: an inpainting or upscaling model cannot be trained here",
                source.label(),
                unet.config().in_channels,
                vae.config().latent_channels
            );
        }
        let (tokenizer, zeros_for_no_prompt) = (Arc::new(tokenizer), index.zeros_for_no_prompt);
        Ok(Self { source, tokenizer, text_encoder, second, unet, vae, zeros_for_no_prompt })
    }

    /// Prompt embeddings, for images of the model's own size.
    pub fn encode_prompts(&self, prompts: &[impl AsRef<str>]) -> Result<PromptEmbeds> {
        let (height, width) = self.default_size();
        self.encode_prompts_for(prompts, &SizeConditioning::of(height, width))
    }

    /// Prompt embeddings, with the sizes that Stable Diffusion XL is told of.
    pub fn encode_prompts_for(&self, prompts: &[impl AsRef<str>], size: &SizeConditioning) -> Result<PromptEmbeds> {
        let (hidden, pooled) = self.encode_texts(prompts)?;
        self.embeds(hidden, pooled, size)
    }

    /// The embeddings of what guidance moves away from, for one image. `None`: zeros where the model was trained so, else
    /// those of an empty text.
    pub fn encode_negative_prompt(&self, prompt: Option<&str>, size: &SizeConditioning) -> Result<PromptEmbeds> {
        let (hidden, pooled) = self.encode_texts(&[prompt.unwrap_or_default()])?;
        if prompt.is_none() && self.zeros_for_no_prompt {
            let pooled = pooled.map(|pooled| pooled.zeros_like()).transpose()?;
            return self.embeds(hidden.zeros_like()?, pooled, size);
        }
        self.embeds(hidden, pooled, size)
    }

    fn embeds(&self, hidden: Tensor, pooled: Option<Tensor>, size: &SizeConditioning) -> Result<PromptEmbeds> {
        let Some(pooled) = pooled else { return Ok(PromptEmbeds { hidden, added: None }) };
        let added = self.unet.added(&pooled, &vec![size.time_ids(); pooled.dims()[0]])?;
        Ok(PromptEmbeds { hidden, added })
    }

    /// Hidden states (B, 77, D), and Stable Diffusion XL's pooled embeddings (B, P).
    fn encode_texts(&self, texts: &[impl AsRef<str>]) -> Result<(Tensor, Option<Tensor>)> {
        let ids = |tokenizer: &ClipTokenizer| -> Result<Vec<Vec<u32>>> {
            texts.iter().map(|text| tokenizer.encode(text.as_ref())).collect()
        };
        let first = ids(&self.tokenizer)?;
        let Some((tokenizer, encoder)) = &self.second else { return Ok((self.text_encoder.forward(&first)?, None)) };
        let (hidden, pooled) = encoder.unnormed_and_pooled(&ids(tokenizer)?)?;
        let hidden = Tensor::cat(&[&self.text_encoder.unnormed(&first)?, &hidden], 2)?;
        Ok((hidden, Some(pooled)))
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
