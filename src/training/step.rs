//! An optimizer step in plain functions, for every method and every caller:
//!
//! ```text
//! sample          the denoising chain, from x_T to x_0
//! judge           an image decoded and scored
//! credit          d loss / d x_0 of each image, from its scores
//! differentiate   the backward pass of the chain, into the gradients of the LoRA factors
//! update          clipping and AdamW: the next factors
//! ```
//!
//! `training/alignprop.rs` and `training/ddpo.rs` put them together.

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;

use super::loss_scale::LossScale;
use super::{Plan, health};
use crate::config::{Checkpointing, Prompt};
use crate::lora::Adapters;
use crate::models::vae::{DecodeTrace, Vae};
use crate::nn::lora::LoraGradients;
use crate::ops::{Ledger, Number, Readings};
use crate::optim::{AdamW, clip_grad_norm};
use crate::rewards::{ImageScores, Judged, Rewards};
use crate::sampling::{Denoiser, Trajectory};

pub use super::backprop::differentiate;

/// What a step adds up: gradients, and numbers that are read at its end.
pub struct Tally {
    /// Of `loss_scale` times the loss.
    pub gradients: LoraGradients,
    pub ledger: Ledger,
    /// 1, but where activations are f16 (`training/loss_scale.rs`); a power of two.
    pub loss_scale: f64,
}

impl Tally {
    /// Nothing yet, for gradients of these adapters.
    pub fn new(adapters: &Adapters) -> Self {
        Self::scaled(adapters, 1.0)
    }

    /// As [`Self::new`], for a loss that is multiplied by `loss_scale` while it is differentiated.
    pub fn scaled(adapters: &Adapters, loss_scale: f64) -> Self {
        Self { gradients: LoraGradients::new(adapters), ledger: Ledger::default(), loss_scale }
    }

    /// The gradients of the loss, one for each tensor of the adapters; none are left.
    ///
    /// # Errors
    /// Names the first tensor that no gradient reached.
    pub fn take_gradients(&mut self, adapters: &Adapters) -> Result<Vec<Tensor>> {
        let gradients = std::mem::replace(&mut self.gradients, LoraGradients::new(adapters)).finish(adapters)?;
        if self.loss_scale == 1.0 {
            return Ok(gradients);
        }
        Ok(gradients.iter().map(|gradient| gradient * (1.0 / self.loss_scale)).collect::<candle_core::Result<_>>()?)
    }

    /// Adds the gradients of the loss to `sum` once they are known to be finite, and reads the ledger.
    ///
    /// # Errors
    /// A number that is not finite; `sum` is then as it was.
    pub fn settle(mut self, adapters: &Adapters, sum: &mut LoraGradients) -> Result<Readings> {
        if self.gradients.is_empty() {
            return self.ledger.read();
        }
        let gradients = self.take_gradients(adapters)?;
        health::ensure_finite("the LoRA gradient", adapters, &gradients, &mut self.ledger)?;
        let readings = self.ledger.read()?;
        sum.merge(gradients.into())?;
        Ok(readings)
    }
}

/// A backward pass into the tally; in f16, whose cotangents are scaled up, into one of its own that is added when it is finite. Where
/// something overflows there, it is done again with half the loss scale. What it notes is read with the tally's ledger,
/// or in f16 from the readings that come with it.
///
/// # Errors
/// Those of `back`; in f16 a number that is not finite with any scale.
pub fn scaled<T>(
    loss_scale: &mut Option<LossScale>,
    adapters: &Adapters,
    tally: &mut Tally,
    mut back: impl FnMut(&mut Tally) -> Result<T>,
) -> Result<(T, Option<Readings>)> {
    let Some(loss_scale) = loss_scale else { return Ok((back(tally)?, None)) };
    // what is wrong before it, a smaller scale does not mend
    tally.ledger.read_now()?;
    loop {
        let mut attempt = Tally::scaled(adapters, loss_scale.get());
        let noted = back(&mut attempt);
        let settled = noted.and_then(|noted| Ok((noted, Some(attempt.settle(adapters, &mut tally.gradients)?))));
        match (settled, loss_scale.smaller()) {
            (Err(error), Some(smaller)) if health::is_not_a_number(&error) => *loss_scale = smaller,
            (settled, _) => return settled,
        }
    }
}

/// The denoising chain of the plan from x_T (B, C, h, w). The newest `stored_steps` of the steps that all samples keep are
/// recorded. `noise(i)` is the noise of step `i`, asked for where its σ is not zero.
///
/// # Errors
/// A latent that is not finite, here or when the ledger is read: names the step.
pub fn sample<'a>(
    denoiser: &Denoiser<'a>,
    plan: &Plan,
    x_t: Tensor,
    noise: impl Fn(usize) -> Result<Tensor>,
    stored_steps: usize,
    ledger: &mut Ledger,
) -> Result<Trajectory<'a>> {
    let recorded = plan.recorded(stored_steps);
    denoiser.rollout(&plan.steps, x_t, noise, |i| recorded[i], ledger)
}

/// What turns latents into scores: the decoder and the rewards.
#[derive(Clone, Copy)]
pub struct Critic<'a> {
    pub vae: &'a Vae,
    pub rewards: &'a Rewards,
    /// What a decoded image keeps for its backward pass.
    pub checkpointing: Checkpointing,
}

/// An image with its scores, whose backward pass can be run once.
pub struct JudgedImage<'a> {
    decoded: DecodeTrace<'a>,
    /// Of the image, or of the one that it was moved to.
    judged: Judged,
    scores: ImageScores,
    /// For messages.
    prompt: String,
}

/// Decodes and scores one image from its latents (1, C, h, w). With a `rho` above 0 the loss is that of the image moved against the
/// rewards (`Judged::moved_against`), by a vector that has no gradient.
///
/// # Errors
/// An image or a score that is not finite, here or when the ledger is read.
pub fn judge<'a>(
    critic: &Critic<'a>,
    latents: &Tensor,
    prompt: &Prompt,
    rho: f64,
    ledger: &mut Ledger,
) -> Result<JudgedImage<'a>> {
    let decoded = critic.vae.trace(latents, critic.checkpointing)?;
    let of = prompt.text.clone();
    ledger.finite(decoded.image(), move |_| format!("the VAE's image of `{of}` is not finite"))?;
    let mut scored = |image: &Tensor| {
        let judged = critic.rewards.judge(image, std::slice::from_ref(prompt), ledger);
        judged.with_context(|| format!("scoring the image of `{}`", prompt.text))
    };
    let mut judged = scored(decoded.image())?;
    let scores = judged.scores()[0].clone();
    if rho > 0.0 {
        judged = scored(&judged.moved_against(rho)?)?;
    }
    Ok(JudgedImage { decoded, judged, scores, prompt: prompt.text.clone() })
}

impl JudgedImage<'_> {
    /// d (scale · loss) / d latents, (1, C, h, w), and the scores of the image and of what it was moved to.
    ///
    /// # Errors
    /// A gradient that is not finite, here or when the ledger is read: says where it comes from.
    pub fn pull(self, scale: f64, ledger: &mut Ledger) -> Result<(Tensor, ImageScores, ImageScores)> {
        let moved = self.judged.scores()[0].clone();
        let d_image = self.judged.pull(scale).with_context(|| format!("scoring the image of `{}`", self.prompt))?;
        let d_latents = self.decoded.pull(&d_image)?;
        for (part, gradient) in [("reward", &d_image), ("VAE", &d_latents)] {
            let of = self.prompt.clone();
            ledger.finite(gradient, move |_| {
                format!("the gradient that comes back from the {part} for `{of}` is not finite")
            })?;
        }
        Ok((d_latents, self.scores, moved))
    }
}

/// The images' scores, and which way their latents should move.
pub struct Credit {
    /// One for each image, known when the ledger is read.
    pub scores: Vec<ImageScores>,
    /// Those that the loss is made of: the same, or with a `rho` those of the moved images.
    pub moved: Vec<ImageScores>,
    /// d (`tally.loss_scale` · scale · sum of losses) / d x_0, (B, C, h, w).
    pub d_latents: Tensor,
}

/// Judges the images of the latents (B, C, h, w) and takes each one's loss back to its latents: one image at a time, so that
/// memory does not grow with the batch.
///
/// # Errors
/// An image, a score or a gradient that is not finite, here or when the ledger is read.
pub fn credit(critic: &Critic, latents: &Tensor, prompts: &[Prompt], scale: f64, tally: &mut Tally) -> Result<Credit> {
    credit_moved(critic, latents, prompts, 0.0, scale, tally)
}

/// As [`credit`], of the images moved against the rewards by `rho` (RSA-FT), or of themselves where it is 0.
///
/// # Errors
/// As there.
pub fn credit_moved(
    critic: &Critic,
    latents: &Tensor,
    prompts: &[Prompt],
    rho: f64,
    scale: f64,
    tally: &mut Tally,
) -> Result<Credit> {
    let batch = latents.dims4()?.0;
    ensure!(prompts.len() == batch, "{batch} latents with {} prompts", prompts.len());
    let (mut scores, mut moved, mut d_latents) = (Vec::new(), Vec::new(), Vec::with_capacity(batch));
    for (row, prompt) in prompts.iter().enumerate() {
        let image = judge(critic, &latents.narrow(0, row, 1)?.contiguous()?, prompt, rho, &mut tally.ledger)?;
        let (d, of_image, of_moved) = image.pull(tally.loss_scale * scale, &mut tally.ledger)?;
        d_latents.push(d);
        scores.push(of_image);
        moved.push(of_moved);
    }
    Ok(Credit { scores, moved, d_latents: Tensor::cat(&d_latents, 0)? })
}

/// The next adapters and moments, until the ledger says that they are finite.
pub struct Update {
    pub adapters: Adapters,
    pub optimizer: AdamW,
    /// Of the gradients, before they were clipped.
    pub grad_norm: Number,
}

/// Clips the tally's gradients to `max_grad_norm` and makes a step of AdamW. Changes neither the adapters nor the optimizer.
///
/// # Errors
/// A factor that no gradient reached; a gradient or an updated factor that is not finite, here or when the ledger is read.
pub fn update(
    tally: &mut Tally,
    adapters: &Adapters,
    optimizer: &AdamW,
    max_grad_norm: f64,
    lr: f64,
) -> Result<Update> {
    let mut gradients = tally.take_gradients(adapters)?;
    health::ensure_finite("the LoRA gradient", adapters, &gradients, &mut tally.ledger)?;
    let grad_norm = tally.ledger.number(&clip_grad_norm(&mut gradients, max_grad_norm)?)?;
    let mut optimizer = optimizer.clone();
    let updated = optimizer.update(&adapters.tensors(), &gradients, lr)?;
    let what = format!("AdamW's update (with a learning rate of {lr})");
    health::ensure_finite(&what, adapters, &updated, &mut tally.ledger)?;
    Ok(Update { adapters: adapters.with_tensors(updated)?, optimizer, grad_norm })
}
