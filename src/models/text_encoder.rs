//! `text_encoder/` and `text_encoder_2/`: a transformers CLIPTextModel, whose hidden states the UNet attends to.

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;

use super::clip::{TextConfig, TextTower};
use super::{Source, Weights};
use crate::ops::device::Compute;

/// A frozen text encoder.
pub struct TextEncoder {
    tower: TextTower,
    /// How many of the last layers give nothing to the hidden states.
    skipped: usize,
}

impl TextEncoder {
    /// Loads the encoder, whose last `skipped` layers are left out of what is attended to. `projected`: with the projection
    /// of a CLIPTextModelWithProjection.
    ///
    /// # Errors
    /// A missing or unreadable file, or no layer is left.
    pub fn load(
        source: &Source,
        variant: Option<&str>,
        compute: &Compute,
        skipped: usize,
        projected: bool,
    ) -> Result<Self> {
        let config: TextConfig = source.read_json("config.json")?;
        ensure!(
            skipped < config.num_hidden_layers,
            "{} has {} layers, of which model.clip_skip would leave none",
            source.label(),
            config.num_hidden_layers
        );
        let weights = Weights::open(source, "model", variant)?.on(compute);
        let tower = config.load_encoder(&weights, projected);
        let tower = tower.with_context(|| format!("loading the text encoder of {}", source.label()))?;
        Ok(Self { tower, skipped })
    }

    pub fn vocab_size(&self) -> usize {
        self.tower.vocab_size()
    }

    /// Hidden states behind the final norm, as Stable Diffusion 1.x and 2.x attend to: token ids, B lists of N -> (B, N, D).
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        self.tower.normed(&self.tower.unnormed(ids, self.skipped)?)
    }

    /// Hidden states without the final norm, as Stable Diffusion XL attends to, (B, N, D).
    pub fn unnormed(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        self.tower.unnormed(ids, self.skipped)
    }

    /// [`Self::unnormed`], and the projected embeddings of the whole texts, (B, P), to which all layers give.
    pub fn unnormed_and_pooled(&self, ids: &[Vec<u32>]) -> Result<(Tensor, Tensor)> {
        self.tower.unnormed_and_pooled(ids, self.skipped)
    }
}
