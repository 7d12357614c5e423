//! The denoising chain. Its latents are kept, and of some steps what their way back needs.

use anyhow::Result;
use candle_core::Tensor;

use crate::config::Checkpointing;
use crate::diffusion::DdimStep;
use crate::diffusion::guidance::{guide, guide_bwd};
use crate::lora::Adapters;
use crate::models::unet::{Text, Unet, UnetTrace};
use crate::nn::lora::LoraGradients;
use crate::ops::Ledger;

/// What the UNet is told: embeddings of the prompts and of what guidance moves away from.
#[derive(Clone)]
pub struct Prompting {
    /// (B, tokens, D)
    pub prompt_embeds: Tensor,
    /// (B, tokens, D)
    pub negative_prompt_embeds: Tensor,
    /// 1 or less: no guidance, and only the prompts are evaluated.
    pub guidance_scale: f64,
}

impl Prompting {
    /// For these rows of the batch only.
    pub fn select(&self, rows: &Tensor) -> Result<Self> {
        Ok(Self {
            prompt_embeds: self.prompt_embeds.index_select(rows, 0)?,
            negative_prompt_embeds: self.negative_prompt_embeds.index_select(rows, 0)?,
            guidance_scale: self.guidance_scale,
        })
    }
    fn guided(&self) -> bool {
        self.guidance_scale > 1.0
    }

    /// Evaluations of a prediction.
    pub(super) fn branches(&self) -> f64 {
        if self.guided() { 2.0 } else { 1.0 }
    }

    /// The embeddings of both branches, (2 B, tokens, D).
    fn both(&self) -> candle_core::Result<Tensor> {
        Tensor::cat(&[&self.negative_prompt_embeds, &self.prompt_embeds], 0)
    }

    /// The guided prediction at x_t, (B, C, h, w).
    pub fn predict(&self, unet: &Unet, x_t: &Tensor, timestep: usize, adapters: &Adapters) -> Result<Tensor> {
        self.project(unet, adapters)?.predict(unet, x_t, timestep, adapters)
    }

    /// What the UNet makes of the text under these adapters, the same for all steps of a chain.
    pub fn project(&self, unet: &Unet, adapters: &Adapters) -> Result<Projected> {
        let text = |embeds: &Tensor| unet.project_text(embeds, adapters);
        let branches = if !self.guided() {
            Branches::One(text(&self.prompt_embeds)?)
        } else if unet.compute().batches_guidance() {
            Branches::Together(text(&self.both()?)?)
        } else {
            Branches::Apart { negative: text(&self.negative_prompt_embeds)?, prompt: text(&self.prompt_embeds)? }
        };
        Ok(Projected { branches, guidance_scale: self.guidance_scale })
    }

    /// [`Self::predict`], keeping what the pullback needs.
    pub fn record<'a>(
        &self,
        unet: &'a Unet,
        x_t: &Tensor,
        timestep: usize,
        adapters: &'a Adapters,
    ) -> Result<Recording<'a>> {
        let branch = |x_t: &Tensor, embeds: &Tensor| unet.trace(x_t, timestep, embeds, adapters, Checkpointing::Step);
        let guide = |uncond: &Tensor, cond: &Tensor| guide(uncond, cond, self.guidance_scale);
        let (traces, prediction) = if !self.guided() {
            let trace = branch(x_t, &self.prompt_embeds)?;
            let prediction = trace.prediction().clone();
            (Traces::One(trace), prediction)
        } else if unet.compute().batches_guidance() {
            let trace = branch(&Tensor::cat(&[x_t, x_t], 0)?, &self.both()?)?;
            let [uncond, cond] = halves(trace.prediction())?;
            (Traces::Together(trace), guide(&uncond, &cond)?)
        } else {
            let (negative, prompt) =
                rayon::join(|| branch(x_t, &self.negative_prompt_embeds), || branch(x_t, &self.prompt_embeds));
            let (negative, prompt) = (negative?, prompt?);
            let prediction = guide(negative.prediction(), prompt.prediction())?;
            (Traces::Apart { negative, prompt }, prediction)
        };
        Ok(Recording { traces, prediction, guidance_scale: self.guidance_scale, adapters })
    }

    /// Pulls the guided prediction's cotangent back through both branches: the gradient with respect to x_t; those of
    /// the adapters are added to `sum`. The forward is computed here again.
    #[allow(clippy::too_many_arguments)]
    pub fn vjp(
        &self,
        unet: &Unet,
        x_t: &Tensor,
        timestep: usize,
        adapters: &Adapters,
        cotangent: &Tensor,
        checkpointing: Checkpointing,
        sum: &mut LoraGradients,
    ) -> Result<Tensor> {
        let branch = |embeds: &Tensor, cotangent: &Tensor| -> Result<(Tensor, LoraGradients)> {
            let mut sum = LoraGradients::new(adapters);
            let d_x = unet.vjp(x_t, timestep, embeds, adapters, cotangent, checkpointing, &mut sum)?;
            Ok((d_x, sum))
        };
        if !self.guided() {
            let (d_x, gradients) = branch(&self.prompt_embeds, cotangent)?;
            sum.merge(gradients)?;
            return Ok(d_x);
        }
        let [d_uncond, d_cond] = guide_bwd(cotangent, self.guidance_scale)?;
        if unet.compute().batches_guidance() {
            let (x_t, cotangent) = (Tensor::cat(&[x_t, x_t], 0)?, Tensor::cat(&[d_uncond, d_cond], 0)?);
            let d_x = unet.vjp(&x_t, timestep, &self.both()?, adapters, &cotangent, checkpointing, sum)?;
            let [d_uncond, d_cond] = halves(&d_x)?;
            return Ok((d_uncond + d_cond)?);
        }
        let (uncond, cond) =
            rayon::join(|| branch(&self.negative_prompt_embeds, &d_uncond), || branch(&self.prompt_embeds, &d_cond));
        let ((d_uncond, uncond), (d_cond, cond)) = (uncond?, cond?);
        // always in this order: the sums do not depend on which branch was faster
        sum.merge(uncond)?;
        sum.merge(cond)?;
        Ok((d_uncond + d_cond)?)
    }
}

/// A guided prediction that can be pulled back once.
pub struct Recording<'a> {
    traces: Traces<'a>,
    prediction: Tensor,
    guidance_scale: f64,
    adapters: &'a Adapters,
}

/// As in [`Branches`].
enum Traces<'a> {
    One(UnetTrace<'a>),
    Apart { negative: UnetTrace<'a>, prompt: UnetTrace<'a> },
    Together(UnetTrace<'a>),
}

impl Recording<'_> {
    /// As [`Prompting::vjp`], without a forward.
    pub fn pull(self, cotangent: &Tensor, sum: &mut LoraGradients) -> Result<Tensor> {
        if let Traces::One(trace) = self.traces {
            return trace.pull(cotangent, sum);
        }
        let [d_uncond, d_cond] = guide_bwd(cotangent, self.guidance_scale)?;
        let [d_uncond, d_cond] = match self.traces {
            Traces::Apart { negative, prompt } => {
                let branch = |trace: UnetTrace, cotangent: &Tensor| -> Result<(Tensor, LoraGradients)> {
                    let mut sum = LoraGradients::new(self.adapters);
                    Ok((trace.pull(cotangent, &mut sum)?, sum))
                };
                let (uncond, cond) = rayon::join(|| branch(negative, &d_uncond), || branch(prompt, &d_cond));
                let ((d_uncond, uncond), (d_cond, cond)) = (uncond?, cond?);
                // always in this order, as in a vjp
                sum.merge(uncond)?;
                sum.merge(cond)?;
                [d_uncond, d_cond]
            }
            Traces::One(trace) | Traces::Together(trace) => {
                halves(&trace.pull(&Tensor::cat(&[d_uncond, d_cond], 0)?, sum)?)?
            }
        };
        Ok((d_uncond + d_cond)?)
    }
}

/// The first and the second half of a batch.
fn halves(both: &Tensor) -> candle_core::Result<[Tensor; 2]> {
    let half = both.dims()[0] / 2;
    Ok([both.narrow(0, 0, half)?, both.narrow(0, half, half)?])
}

/// [`Prompting`] as the attentions of a UNet see it.
pub struct Projected {
    branches: Branches,
    guidance_scale: f64,
}

enum Branches {
    /// Without guidance.
    One(Text),
    /// Side by side.
    Apart { negative: Text, prompt: Text },
    /// As one batch, the negative prompts first.
    Together(Text),
}

impl Projected {
    /// Captures the evaluation of latents like x_t, which must have run before, as one launch of a GPU.
    fn capture(&mut self, unet: &Unet, x_t: &Tensor, timestep: usize, adapters: &Adapters) -> Result<()> {
        match &mut self.branches {
            Branches::One(text) => *text = unet.capture(x_t, timestep, text, adapters)?,
            Branches::Together(text) => {
                *text = unet.capture(&Tensor::cat(&[x_t, x_t], 0)?, timestep, text, adapters)?;
            }
            Branches::Apart { .. } => {} // a CPU's
        }
        Ok(())
    }

    /// The guided prediction at x_t, (B, C, h, w). Both branches run side by side; on a GPU as one batch.
    pub fn predict(&self, unet: &Unet, x_t: &Tensor, timestep: usize, adapters: &Adapters) -> Result<Tensor> {
        let branch = |text: &Text| unet.forward_with(x_t, timestep, text, adapters);
        let (uncond, cond) = match &self.branches {
            Branches::One(text) => return branch(text),
            Branches::Apart { negative, prompt } => {
                let (uncond, cond) = rayon::join(|| branch(negative), || branch(prompt));
                (uncond?, cond?)
            }
            Branches::Together(text) => {
                let [uncond, cond] =
                    halves(&unet.forward_with(&Tensor::cat(&[x_t, x_t], 0)?, timestep, text, adapters)?)?;
                (uncond, cond)
            }
        };
        Ok(guide(&uncond, &cond, self.guidance_scale)?)
    }
}

/// A graph is captured for more steps than these: the first is evaluated as it is, and the capture takes the host as long.
const GRAPH_PAYS: usize = 2;

/// The latents of a chain: what each step started from, and what the last one gave.
pub struct Trajectory<'a> {
    /// x_T, ..., one for each step, (B, C, h, w).
    pub inputs: Vec<Tensor>,
    /// The guided prediction of each step, (B, C, h, w).
    pub predictions: Vec<Tensor>,
    /// Of each step that was recorded.
    pub recordings: Vec<Option<Recording<'a>>>,
    /// x_0.
    pub latents: Tensor,
}

/// Runs the chain from `x_t` and records nothing. `noise(i)` is the noise of step i, asked for where its σ is not zero.
///
/// # Errors
/// A latent that is not finite, here or when the ledger is read: names the step.
pub fn rollout<'a>(
    unet: &'a Unet,
    steps: &[DdimStep],
    x_t: Tensor,
    prompting: &Prompting,
    adapters: &'a Adapters,
    noise: impl Fn(usize) -> Result<Tensor>,
    ledger: &mut Ledger,
) -> Result<Trajectory<'a>> {
    recorded_rollout(unet, steps, x_t, prompting, adapters, noise, |_| false, ledger)
}

/// [`rollout`], keeping what the way back needs of the steps that `record` names: they need not be evaluated again.
#[allow(clippy::too_many_arguments)]
pub fn recorded_rollout<'a>(
    unet: &'a Unet,
    steps: &[DdimStep],
    x_t: Tensor,
    prompting: &Prompting,
    adapters: &'a Adapters,
    noise: impl Fn(usize) -> Result<Tensor>,
    record: impl Fn(usize) -> bool,
    ledger: &mut Ledger,
) -> Result<Trajectory<'a>> {
    let mut inputs = Vec::with_capacity(steps.len());
    let mut predictions = Vec::with_capacity(steps.len());
    let mut recordings = Vec::with_capacity(steps.len());
    let mut x = x_t;
    // of the steps that are not recorded, which share what the UNet makes of the text
    let mut evaluated = 0;
    let mut projected = None;
    let graph_pays = unet.compute().graphs() && (0..steps.len()).filter(|i| !record(*i)).count() > GRAPH_PAYS;
    for (i, step) in steps.iter().enumerate() {
        let recording = if record(i) { Some(prompting.record(unet, &x, step.timestep, adapters)?) } else { None };
        let prediction = match &recording {
            Some(recording) => recording.prediction.clone(),
            None => {
                let mut shared = match projected.take() {
                    Some(shared) => shared,
                    None => prompting.project(unet, adapters)?,
                };
                // the first one as it is: it makes all that a capture may not make
                if graph_pays && evaluated == 1 {
                    shared.capture(unet, &x, step.timestep, adapters)?;
                }
                evaluated += 1;
                projected.insert(shared).predict(unet, &x, step.timestep, adapters)?
            }
        };
        let noise = if step.noise != 0.0 { Some(noise(i)?) } else { None };
        let next = step.apply(&x, &prediction, noise.as_ref())?;
        let timestep = step.timestep;
        ledger.finite(&next, move |_| {
            format!("the UNet's prediction at denoising step {i} (timestep {timestep}) is not finite")
        })?;
        inputs.push(std::mem::replace(&mut x, next));
        predictions.push(prediction);
        recordings.push(recording);
    }
    Ok(Trajectory { inputs, predictions, recordings, latents: x })
}
