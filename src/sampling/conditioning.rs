//! What the UNet is told, and classifier-free guidance (Ho & Salimans 2022) as evaluations of the UNet.

use anyhow::Result;
use candle_core::Tensor;

use crate::diffusion::guidance::{guide, guide_bwd, rescale, rescale_bwd};
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
        let guidance = Guidance { scale, rescale: None, one_batch: scale.is_some() && compute.batches_guidance() };
        Self { prompt_embeds, negative_prompt_embeds, guidance }
    }

    /// The same with the guided prediction rescaled by this much, from 0 (not) to 1. Without guidance there is nothing to
    /// rescale.
    pub fn rescaled(self, amount: f64) -> Self {
        Self { guidance: Guidance { rescale: (amount > 0.0).then_some(amount), ..self.guidance }, ..self }
    }

    /// The same without guidance: the prompts alone.
    pub fn unguided(self) -> Self {
        Self { guidance: Guidance { scale: None, rescale: None, one_batch: false }, ..self }
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
    /// How much of the guided prediction's standard deviation becomes that of the prompt's; nothing without a `scale`.
    rescale: Option<f64>,
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
        let Some(scale) = self.scale else { return Ok(branches[0].clone()) };
        let guided = guide(&branches[0], &branches[1], scale)?;
        Ok(match self.rescale {
            Some(amount) => rescale(&guided, &branches[1], amount)?,
            None => guided,
        })
    }

    /// The cotangent of each evaluation's prediction from that of the guided one, and from what the evaluations gave.
    pub(super) fn combine_bwd(self, cotangent: &Tensor, predictions: Vec<Tensor>) -> Result<Vec<Tensor>> {
        self.stack(match (self.scale, self.rescale) {
            (Some(scale), Some(amount)) => {
                let branches = self.unstack(predictions)?;
                let guided = guide(&branches[0], &branches[1], scale)?;
                let [d_guided, d_rescaled_to] = rescale_bwd(cotangent, &guided, &branches[1], amount)?;
                let [d_uncond, d_cond] = guide_bwd(&d_guided, scale)?;
                vec![d_uncond, (d_cond + d_rescaled_to)?]
            }
            (Some(scale), None) => guide_bwd(cotangent, scale)?.to_vec(),
            (None, _) => vec![cotangent.clone()],
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

#[cfg(test)]
mod tests {
    use candle_core::{Device, safetensors};

    use super::*;
    use crate::ops::testing::relative_error;

    /// Against PyTorch's autograd through diffusers' own function, in f64 (`tools/make_fixtures.py`).
    #[test]
    fn rescaling_agrees_with_diffusers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/guidance_rescale.safetensors");
        let recorded = safetensors::load(path, &Device::Cpu).unwrap();
        let [uncond, cond, d] = ["uncond", "cond", "cotangent"].map(|name| recorded[name].clone());
        for amount in ["0.0", "0.7", "1.0"] {
            let rescale = amount.parse().ok().filter(|amount| *amount > 0.0);
            for one_batch in [false, true] {
                let guidance = Guidance { scale: Some(7.5), rescale, one_batch };
                let evaluations = guidance.stack(vec![uncond.clone(), cond.clone()]).unwrap();
                let y = guidance.combine(evaluations.clone()).unwrap();
                let back = guidance.unstack(guidance.combine_bwd(&d, evaluations).unwrap()).unwrap();
                for (name, found) in [("guided", &y), ("d_uncond", &back[0]), ("d_cond", &back[1])] {
                    let error = relative_error(found, &recorded[&format!("{amount}.{name}")]);
                    assert!(error < 1e-13, "{name} with {amount}: relative error {error:.2e}");
                }
            }
        }
    }
}
