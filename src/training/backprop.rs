//! The way back: from scores to images to latents to adapters.

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;

use super::anchor::Anchor;
use super::rollout::{Prompting, Trajectory};
use super::truncation::Plan;
use crate::config::{Checkpointing, Prompt};
use crate::lora::Adapters;
use crate::models::unet::Unet;
use crate::models::vae::Vae;
use crate::nn::lora::LoraGradients;
use crate::ops::Ledger;
use crate::rewards::{ImageScores, Rewards};

/// What the rewards say of a batch, and which way the latents should move.
pub struct Credit {
    /// Of each image; known when the ledger is read.
    pub scores: Vec<ImageScores>,
    /// d (scale · sum of losses) / d x_0, (B, C, h, w).
    pub d_latents: Tensor,
}

/// Decodes and scores the latents one image at a time, so that memory does not grow with the batch, and pulls each
/// image's loss back to its latents.
///
/// # Errors
/// An image, score or gradient that is not finite, here or when the ledger is read: names the room.
pub fn reward_cotangent(
    vae: &Vae,
    rewards: &Rewards,
    latents: &Tensor,
    prompts: &[Prompt],
    scale: f64,
    checkpointing: Checkpointing,
    ledger: &mut Ledger,
) -> Result<Credit> {
    let batch = latents.dims4()?.0;
    ensure!(prompts.len() == batch, "{batch} latents with {} prompts", prompts.len());
    let (mut scores, mut rows) = (Vec::with_capacity(batch), Vec::with_capacity(batch));
    for (row, prompt) in prompts.iter().enumerate() {
        let decoded = vae.trace(&latents.narrow(0, row, 1)?.contiguous()?, checkpointing)?;
        let of = prompt.clone();
        ledger.finite(decoded.image(), move |_| format!("the VAE's image of `{of}` is not finite"))?;
        let judged = rewards
            .judge(decoded.image(), std::slice::from_ref(prompt), ledger)
            .with_context(|| format!("scoring the image of `{prompt}`"))?;
        scores.extend(judged.scores().iter().cloned());
        let d_image = judged.pull(scale)?;
        let d_latents = decoded.pull(&d_image)?;
        for (room, gradient) in [("reward", &d_image), ("VAE", &d_latents)] {
            let of = prompt.clone();
            ledger.finite(gradient, move |_| {
                format!("the gradient that comes back from the {room} for `{of}` is not finite")
            })?;
        }
        rows.push(d_latents);
    }
    Ok(Credit { scores, d_latents: Tensor::cat(&rows, 0)? })
}

/// Walks the chain backwards from d loss / d x_0, newest step first; adds the adapters' gradients to `sum`.
///
/// ```text
/// x_{t-1} = c_x x_t + c_out UNet(x_t) + σ z
/// d_x_t   = c_x d_{x_{t-1}} + (dUNet/dx)ᵀ c_out d_{x_{t-1}}          the second term where the step is kept
/// ```
///
/// A step that is not kept loses its noise prediction's gradient only: the linear path carries the cotangent on.
/// A kept step that was recorded is pulled back and its recording given up; another is evaluated again, so that memory is
/// that of one UNet evaluation beside what was recorded.
///
/// # Errors
/// A gradient that is not finite, here or when the ledger is read: names the step.
#[allow(clippy::too_many_arguments)]
pub fn backprop(
    unet: &Unet,
    adapters: &Adapters,
    trajectory: &mut Trajectory,
    plan: &Plan,
    prompting: &Prompting,
    d_latents: &Tensor,
    checkpointing: Checkpointing,
    sum: &mut LoraGradients,
    ledger: &mut Ledger,
) -> Result<()> {
    anchored_backprop(unet, adapters, trajectory, plan, prompting, d_latents, checkpointing, None, sum, ledger)
}

/// [`backprop`] of the loss with the anchor's term in it: the pull towards the base model enters at the noise
/// prediction of each kept step. The anchor notes the distances it finds.
#[allow(clippy::too_many_arguments)]
pub fn anchored_backprop(
    unet: &Unet,
    adapters: &Adapters,
    trajectory: &mut Trajectory,
    plan: &Plan,
    prompting: &Prompting,
    d_latents: &Tensor,
    checkpointing: Checkpointing,
    mut anchor: Option<&mut Anchor>,
    sum: &mut LoraGradients,
    ledger: &mut Ledger,
) -> Result<()> {
    let Some(first) = plan.first_kept() else { return Ok(()) };
    let mut d_x = d_latents.clone();
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
                d_prediction = (d_prediction + anchor.cotangent(unet, trajectory, plan, i, prompting, ledger)?)?;
            }
            let recording = trajectory.recordings[i].take().filter(|_| all);
            let d_unet = if let Some(recording) = recording {
                recording.pull(&d_prediction, sum)
            } else if all {
                prompting.vjp(unet, x_t, step.timestep, adapters, &d_prediction, checkpointing, sum)
            } else {
                let (x_t, d_prediction) = (x_t.index_select(&rows, 0)?, d_prediction.index_select(&rows, 0)?);
                prompting.select(&rows)?.vjp(unet, &x_t, step.timestep, adapters, &d_prediction, checkpointing, sum)
            };
            let d_unet = d_unet.with_context(|| format!("in the backward of denoising step {i}"))?;
            ledger.finite(&d_unet, move |_| {
                format!(
                    "the gradient that comes back from the UNet at denoising step {i} (timestep {}) is not finite",
                    step.timestep
                )
            })?;
            if !plan.detach_input {
                d_previous = if all { (d_previous + &d_unet)? } else { d_previous.index_add(&rows, &d_unet, 0)? };
            }
        }
        d_x = d_previous;
    }
    Ok(())
}
