//! The way back: from scores to images to latents to adapters.

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;

use super::anchor::Anchor;
use super::rollout::{Prompting, Trajectory};
use super::truncation::Plan;
use crate::config::Checkpointing;
use crate::diffusion::DdimStep;
use crate::lora::Adapters;
use crate::models::unet::Unet;
use crate::models::vae::Vae;
use crate::nn::lora::LoraGradients;
use crate::ops::{first_not_finite, is_finite, not_a_number};
use crate::rewards::Rewards;

/// What the rewards say of a batch, and which way the latents should move.
pub struct Credit {
    /// One row an image, one score a reward.
    pub scores: Vec<Vec<f64>>,
    /// The weighted loss of each image.
    pub losses: Vec<f64>,
    /// d (scale · sum of losses) / d x_0, (B, C, h, w).
    pub d_latents: Tensor,
    /// Where the loss has the KL term: each image's mean distance from the base model's noise predictions.
    pub distances: Vec<f64>,
}

/// Decodes and scores the latents one image at a time, so that memory does not grow with the batch, and pulls each
/// image's loss back to its latents.
///
/// # Errors
/// An image, score or gradient that is not finite: names the room.
pub fn reward_cotangent(
    vae: &Vae,
    rewards: &Rewards,
    latents: &Tensor,
    prompts: &[String],
    scale: f64,
    checkpointing: Checkpointing,
) -> Result<Credit> {
    let batch = latents.dims4()?.0;
    ensure!(prompts.len() == batch, "{batch} latents with {} prompts", prompts.len());
    let mut credit =
        Credit { scores: Vec::new(), losses: Vec::new(), d_latents: latents.clone(), distances: Vec::new() };
    let mut rows = Vec::with_capacity(batch);
    for (row, prompt) in prompts.iter().enumerate() {
        let decoded = vae.trace(&latents.narrow(0, row, 1)?.contiguous()?, checkpointing)?;
        if !is_finite(decoded.image())? {
            return not_a_number(format!("the VAE's image of `{prompt}` is not finite"));
        }
        let reward = rewards
            .scores_and_gradient(decoded.image(), prompt, scale)
            .with_context(|| format!("scoring the image of `{prompt}`"))?;
        let d_latents = decoded.pull(&reward.d_image)?;
        if !is_finite(&d_latents)? {
            let room = if is_finite(&reward.d_image)? { "VAE" } else { "reward" };
            return not_a_number(format!("the gradient that comes back from the {room} for `{prompt}` is not finite"));
        }
        credit.scores.push(reward.scores);
        credit.losses.push(reward.loss);
        rows.push(d_latents);
    }
    credit.d_latents = Tensor::cat(&rows, 0)?;
    Ok(credit)
}

/// Walks the chain backwards from d loss / d x_0, newest step first; adds the adapters' gradients to `sum`.
///
/// ```text
/// x_{t-1} = c_x x_t + c_out UNet(x_t) + σ z
/// d_x_t   = c_x d_{x_{t-1}} + (dUNet/dx)ᵀ c_out d_{x_{t-1}}          the second term where the step is kept
/// ```
///
/// A step that is not kept loses its noise prediction's gradient only: the linear path carries the cotangent on.
/// Memory is one UNet evaluation, whatever the number of steps.
#[allow(clippy::too_many_arguments)]
pub fn backprop(
    unet: &Unet,
    adapters: &Adapters,
    trajectory: &Trajectory,
    plan: &Plan,
    prompting: &Prompting,
    d_latents: &Tensor,
    checkpointing: Checkpointing,
    sum: &mut LoraGradients,
) -> Result<()> {
    anchored_backprop(unet, adapters, trajectory, plan, prompting, d_latents, checkpointing, None, sum)
}

/// [`backprop`] of the loss with the anchor's term in it: the pull towards the base model enters at the noise
/// prediction of each kept step. The anchor notes the distances it finds.
#[allow(clippy::too_many_arguments)]
pub fn anchored_backprop(
    unet: &Unet,
    adapters: &Adapters,
    trajectory: &Trajectory,
    plan: &Plan,
    prompting: &Prompting,
    d_latents: &Tensor,
    checkpointing: Checkpointing,
    mut anchor: Option<&mut Anchor>,
    sum: &mut LoraGradients,
) -> Result<()> {
    let Some(first) = plan.first_kept() else { return Ok(()) };
    let mut d_x = d_latents.clone();
    let mut unchecked = Vec::new();
    for i in (first..plan.steps.len()).rev() {
        let step = plan.steps[i];
        let mut d_previous = (&d_x * step.sample)?;
        let rows: Vec<u32> = (0u32..).zip(&plan.keep[i]).filter(|(_, kept)| **kept).map(|(row, _)| row).collect();
        if !rows.is_empty() {
            let all = rows.len() == plan.keep[i].len();
            let rows = Tensor::new(rows, d_x.device())?;
            let x_t = &trajectory.inputs[i];
            let mut d_prediction = (&d_x * step.model_output)?;
            if let Some(anchor) = anchor.as_deref_mut() {
                d_prediction = (d_prediction + anchor.cotangent(unet, trajectory, plan, i, prompting)?)?;
            }
            let d_unet = if all {
                prompting.vjp(unet, x_t, step.timestep, adapters, &d_prediction, checkpointing, sum)
            } else {
                let (x_t, d_prediction) = (x_t.index_select(&rows, 0)?, d_prediction.index_select(&rows, 0)?);
                prompting.select(&rows)?.vjp(unet, &x_t, step.timestep, adapters, &d_prediction, checkpointing, sum)
            };
            let d_unet = d_unet.with_context(|| format!("in the backward of denoising step {i}"))?;
            if d_unet.device().is_cpu() && !is_finite(&d_unet)? {
                return not_finite(i, &step);
            }
            if !plan.detach_input {
                d_previous = if all { (d_previous + &d_unet)? } else { d_previous.index_add(&rows, &d_unet, 0)? };
            }
            if !d_unet.device().is_cpu() {
                unchecked.push((i, d_unet));
            }
        }
        d_x = d_previous;
    }
    // a GPU is not kept waiting at every step
    let (steps, gradients): (Vec<usize>, Vec<&Tensor>) = unchecked.iter().map(|(i, d)| (*i, d)).unzip();
    if let Some(first) = first_not_finite(&gradients)? {
        return not_finite(steps[first], &plan.steps[steps[first]]);
    }
    Ok(())
}

fn not_finite<T>(i: usize, step: &DdimStep) -> Result<T> {
    not_a_number(format!(
        "the gradient that comes back from the UNet at denoising step {i} (timestep {}) is not finite",
        step.timestep
    ))
}
