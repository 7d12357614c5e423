//! The UNet as one chain uses it: with adapters, for the prompts of a batch, guided.

use anyhow::Result;
use candle_core::Tensor;

use super::conditioning::Guidance;
use super::{Conditioning, Trajectory};
use crate::config::Checkpointing;
use crate::diffusion::DdimStep;
use crate::lora::Adapters;
use crate::models::unet::{Text, Unet, UnetTrace};
use crate::nn::lora::LoraGradients;
use crate::ops::Ledger;

/// Predicts the noise (or v) of a batch of latents.
#[derive(Clone)]
pub struct Denoiser<'a> {
    pub unet: &'a Unet,
    pub adapters: &'a Adapters,
    pub conditioning: Conditioning,
    /// What a recorded evaluation keeps.
    pub checkpointing: Checkpointing,
}

impl<'a> Denoiser<'a> {
    /// The same with other adapters.
    pub fn with_adapters<'b>(&self, adapters: &'b Adapters) -> Denoiser<'b>
    where
        'a: 'b,
    {
        Denoiser { adapters, ..self.clone() }
    }

    /// The same without guidance.
    pub fn unguided(&self) -> Self {
        Self { conditioning: self.conditioning.clone().unguided(), ..self.clone() }
    }

    /// The same for these rows of the batch only.
    pub fn select(&self, rows: &Tensor) -> Result<Self> {
        Ok(Self { conditioning: self.conditioning.select(rows)?, ..self.clone() })
    }

    /// The guided prediction at x_t, (B, C, h, w).
    pub fn predict(&self, x_t: &Tensor, timestep: f64) -> Result<Tensor> {
        self.project()?.predict(x_t, timestep)
    }

    /// [`Self::predict`], keeping what its backward pass needs.
    pub fn record(&self, x_t: &Tensor, timestep: f64) -> Result<Recording<'a>> {
        let Self { unet, adapters, checkpointing, .. } = *self;
        let guidance = self.conditioning.guidance;
        let x_t = guidance.latents(x_t)?;
        let evaluate = |embeds: Tensor| unet.trace(&x_t, timestep, &embeds, adapters, checkpointing);
        let traces = side_by_side(self.conditioning.evaluations()?, evaluate)?;
        let prediction = guidance.combine(traces.iter().map(|trace| trace.prediction().clone()).collect())?;
        Ok(Recording { traces, prediction, guidance, adapters })
    }

    /// Runs the chain of `steps` from x_T (B, C, h, w). `noise(i)` is the noise of step `i`, asked for where its σ is not
    /// zero. The steps that `record` names are recorded, so that their backward pass need not evaluate them again.
    ///
    /// # Errors
    /// A latent that is not finite, here or when the ledger is read: names the step.
    pub fn rollout(
        &self,
        steps: &[DdimStep],
        x_t: Tensor,
        noise: impl Fn(usize) -> Result<Tensor>,
        record: impl Fn(usize) -> bool,
        ledger: &mut Ledger,
    ) -> Result<Trajectory<'a>> {
        let mut trajectory = Trajectory::at(x_t);
        let mut predictor = self.predictor((0..steps.len()).filter(|i| !record(*i)).count());
        for (i, step) in steps.iter().enumerate() {
            let (x, timestep) = (trajectory.latents(), step.timestep);
            let (prediction, recording) = if record(i) {
                let recording = self.record(x, timestep)?;
                (recording.prediction.clone(), Some(recording))
            } else {
                (predictor.predict(x, timestep)?, None)
            };
            let noise = if step.noise != 0.0 { Some(noise(i)?) } else { None };
            let next = step.apply(x, &prediction, noise.as_ref())?;
            check_step(&next, i, timestep, ledger)?;
            trajectory.push(prediction, recording, next);
        }
        Ok(trajectory)
    }

    /// For `evaluations` of one chain that are not recorded: they share the keys and values of the text.
    pub(super) fn predictor(&self, evaluations: usize) -> Predictor<'a> {
        let graph_pays = self.unet.compute().graphs() && evaluations > GRAPH_PAYS;
        Predictor { denoiser: self.clone(), projected: None, evaluated: 0, graph_pays }
    }

    /// The keys and values that the UNet's cross-attentions make of the text: the same for all steps of a chain.
    fn project(&self) -> Result<Projected<'a>> {
        let (unet, adapters) = (self.unet, self.adapters);
        let embeds = self.conditioning.evaluations()?;
        let texts = embeds.iter().map(|embeds| unet.project_text(embeds, adapters)).collect::<Result<_>>()?;
        Ok(Projected { unet, adapters, texts, guidance: self.conditioning.guidance })
    }
}

/// Notes that the latents `next`, which step `i` gave, must be finite.
pub(super) fn check_step(next: &Tensor, i: usize, timestep: f64, ledger: &mut Ledger) -> Result<()> {
    ledger.finite(next, move |_| {
        format!("the UNet's prediction at denoising step {i} (timestep {timestep}) is not finite")
    })
}

/// A denoiser in the course of a chain.
pub(super) struct Predictor<'a> {
    denoiser: Denoiser<'a>,
    projected: Option<Projected<'a>>,
    evaluated: usize,
    graph_pays: bool,
}

impl Predictor<'_> {
    /// The guided prediction at x_t, (B, C, h, w).
    pub fn predict(&mut self, x_t: &Tensor, timestep: f64) -> Result<Tensor> {
        let mut shared = match self.projected.take() {
            Some(shared) => shared,
            None => self.denoiser.project()?,
        };
        // the first step runs without a graph: it loads kernels and workspaces, which a capture may not
        if self.graph_pays && self.evaluated == 1 {
            shared.capture(x_t, timestep)?;
        }
        self.evaluated += 1;
        self.projected.insert(shared).predict(x_t, timestep)
    }
}

/// A graph is captured for more steps than these: the first is evaluated as it is, and the capture takes the host as long.
const GRAPH_PAYS: usize = 2;

/// A denoiser with its text projected, for evaluations without a gradient.
struct Projected<'a> {
    unet: &'a Unet,
    adapters: &'a Adapters,
    /// One for each evaluation.
    texts: Vec<Text>,
    guidance: Guidance,
}

impl Projected<'_> {
    fn predict(&self, x_t: &Tensor, timestep: f64) -> Result<Tensor> {
        let x_t = self.guidance.latents(x_t)?;
        let evaluate = |text: &Text| self.unet.forward_with(&x_t, timestep, text, self.adapters);
        self.guidance.combine(side_by_side(self.texts.iter().collect(), evaluate)?)
    }

    /// Captures the evaluation of latents like x_t, which must have run before, as one launch of a GPU.
    fn capture(&mut self, x_t: &Tensor, timestep: f64) -> Result<()> {
        let x_t = self.guidance.latents(x_t)?;
        for text in &mut self.texts {
            *text = self.unet.capture(&x_t, timestep, text, self.adapters)?;
        }
        Ok(())
    }
}

/// A guided prediction whose backward pass can be run once.
pub struct Recording<'a> {
    /// One for each evaluation.
    traces: Vec<UnetTrace<'a>>,
    prediction: Tensor,
    guidance: Guidance,
    adapters: &'a Adapters,
}

impl Recording<'_> {
    /// The guided prediction, (B, C, h, w).
    pub fn prediction(&self) -> &Tensor {
        &self.prediction
    }

    /// The gradient with respect to x_t of <cotangent, prediction>; those of the adapters are added to `gradients`.
    pub fn pull(self, cotangent: &Tensor, gradients: &mut LoraGradients) -> Result<Tensor> {
        let predictions = self.traces.iter().map(|trace| trace.prediction().clone()).collect();
        let evaluations = self.traces.into_iter().zip(self.guidance.combine_bwd(cotangent, predictions)?);
        let pull = |(trace, cotangent): (UnetTrace, Tensor)| {
            let mut own = LoraGradients::new(self.adapters);
            Ok((trace.pull(&cotangent, &mut own)?, own))
        };
        let mut d_latents = Vec::with_capacity(2);
        // always in this order: the sums do not depend on which evaluation was faster
        for (d_x, own) in side_by_side(evaluations.collect(), pull)? {
            gradients.merge(own)?;
            d_latents.push(d_x);
        }
        self.guidance.latents_bwd(d_latents)
    }
}

/// `work` on each item in order; two of them at the same time, each a task of its own.
fn side_by_side<T: Send, U: Send>(mut items: Vec<T>, work: impl Fn(T) -> Result<U> + Sync) -> Result<Vec<U>> {
    if items.len() == 2
        && let (Some(second), Some(first)) = (items.pop(), items.pop())
    {
        let (first, second) = rayon::join(|| work(first), || work(second));
        return Ok(vec![first?, second?]);
    }
    items.into_iter().map(work).collect()
}
