//! `text_encoder/`: a transformers CLIPTextModel, whose normalised hidden states the UNet attends to.

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::clip::{TextConfig, TextTower};
use super::{Source, Weights};
use crate::ops::device::Compute;

/// A frozen text encoder.
pub struct TextEncoder(TextTower);

impl TextEncoder {
    pub fn load(source: &Source, variant: Option<&str>, compute: &Compute) -> Result<Self> {
        let config: TextConfig = source.read_json("config.json")?;
        let weights = Weights::open(source, "model", variant)?.on(compute);
        Ok(Self(
            config.load_encoder(&weights).with_context(|| format!("loading the text encoder of {}", source.label()))?,
        ))
    }

    pub fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    /// Token ids, B lists of N -> (B, N, D).
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        self.0.hidden(ids)
    }
}
