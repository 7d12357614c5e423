//! What the UNet is told, and classifier-free guidance (Ho & Salimans 2022) as evaluations of the UNet.

use anyhow::Result;
use candle_core::Tensor;

use crate::diffusion::guidance::{guide, guide_bwd};
use crate::ops::device::Compute;

/// Embeddings of the prompts of a batch, and how they guide.
#[derive(Clone)]
pub struct Conditioning {
    /// (B, tokens, D)
    pub prompt_embeds: Tensor,
    /// Of what guidance moves away from, (B, tokens, D).
    pub negative_prompt_embeds: Tensor,
    pub(super) guidance: Guidance,
}

impl Conditioning {
    /// A `guidance_scale` of 1 or less means no guidance: only the prompts are evaluated.
    pub fn new(prompt_embeds: Tensor, negative_prompt_embeds: Tensor, guidance_scale: f64, compute: &Compute) -> Self {
        let scale = (guidance_scale > 1.0).then_some(guidance_scale);
        let guidance = Guidance { scale, one_batch: scale.is_some() && compute.batches_guidance() };
        Self { prompt_embeds, negative_prompt_embeds, guidance }
    }

    /// These rows of the batch only.
    pub fn select(&self, rows: &Tensor) -> Result<Self> {
        Ok(Self {
            prompt_embeds: self.prompt_embeds.index_select(rows, 0)?,
            negative_prompt_embeds: self.negative_prompt_embeds.index_select(rows, 0)?,
            guidance: self.guidance,
        })
    }

    /// Branches of one guided prediction: 2, or 1 without guidance.
    pub fn branches(&self) -> usize {
        self.guidance.branches()
    }

    /// The embeddings that each evaluation of the UNet is given.
    pub(super) fn evaluations(&self) -> Result<Vec<Tensor>> {
        let prompts = self.prompt_embeds.clone();
        self.guidance.stack(match self.guidance.scale {
            Some(_) => vec![self.negative_prompt_embeds.clone(), prompts],
            None => vec![prompts],
        })
    }
}

/// How one prediction is made of evaluations of the UNet. Its branches are [negative prompts, prompts], or the prompts
/// alone; they are evaluated one by one, or as one batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guidance {
    scale: Option<f64>,
    one_batch: bool,
}

impl Guidance {
    fn branches(self) -> usize {
        if self.scale.is_some() { 2 } else { 1 }
    }

    /// What the evaluations take, from what each branch takes.
    fn stack(self, branches: Vec<Tensor>) -> Result<Vec<Tensor>> {
        Ok(if self.one_batch { vec![Tensor::cat(&branches, 0)?] } else { branches })
    }

    /// What each branch gave, from what the evaluations gave.
    fn unstack(self, evaluations: Vec<Tensor>) -> Result<Vec<Tensor>> {
        Ok(if self.one_batch { evaluations[0].chunk(self.branches(), 0)? } else { evaluations })
    }

    /// The latents that each evaluation is given at x_t: the same for all of them.
    pub(super) fn latents(self, x_t: &Tensor) -> Result<Tensor> {
        Ok(if self.one_batch { Tensor::cat(&[x_t, x_t], 0)? } else { x_t.clone() })
    }

    /// The guided prediction (B, C, h, w) from those of the evaluations.
    pub(super) fn combine(self, predictions: Vec<Tensor>) -> Result<Tensor> {
        let branches = self.unstack(predictions)?;
        Ok(match self.scale {
            Some(scale) => guide(&branches[0], &branches[1], scale)?,
            None => branches[0].clone(),
        })
    }

    /// The cotangent of each evaluation's prediction from that of the guided one.
    pub(super) fn combine_bwd(self, cotangent: &Tensor) -> Result<Vec<Tensor>> {
        self.stack(match self.scale {
            Some(scale) => guide_bwd(cotangent, scale)?.to_vec(),
            None => vec![cotangent.clone()],
        })
    }

    /// The gradient of x_t from those of the evaluations' latents.
    pub(super) fn latents_bwd(self, d_latents: Vec<Tensor>) -> Result<Tensor> {
        let branches = self.unstack(d_latents)?;
        Ok(match &branches[..] {
            [d_uncond, d_cond] => (d_uncond + d_cond)?,
            _ => branches[0].clone(),
        })
    }
}
