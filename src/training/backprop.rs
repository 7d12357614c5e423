//! The backward pass of the denoising chain.

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;

use super::step::Tally;
use super::terms::{KeptStep, StepTerm};
use super::truncation::Plan;
use crate::sampling::{Denoiser, Trajectory};

/// Differentiates the loss of a micro-batch: adds d (`tally.loss_scale` · loss) / d factors to the tally.
///
/// The loss has two kinds of parts. `d_latents` is its gradient with respect to the chain's result x_0, (B, C, h, w), which
/// walks the chain backwards, newest step first:
///
/// ```text
/// x_{t-1} = c_x x_t + c_out UNet(x_t) + σ z
/// d_x_t   = c_x d_{x_{t-1}} + (dUNet/dx)ᵀ (c_out d_{x_{t-1}} + d terms / d UNet)      the second term where the step is kept
/// ```
///
/// A step that is not kept loses its prediction's gradient only: the linear path carries the cotangent on. The `terms` are
/// functions of each kept step's prediction. Without `d_latents` the chain is not walked: each kept step is differentiated
/// at the x_t that was sampled, by its terms alone.
///
/// A kept step that was recorded in the rollout is not evaluated again and its recording is used up; another one is recorded
/// here, so that memory is that of one UNet evaluation beside what was recorded.
///
/// # Errors
/// A gradient that is not finite, here or when the ledger is read: names the step. A recorded step that not every sample
/// keeps.
pub fn differentiate(
    denoiser: &Denoiser,
    plan: &Plan,
    trajectory: &mut Trajectory,
    d_latents: Option<&Tensor>,
    terms: &mut [&mut dyn StepTerm],
    tally: &mut Tally,
) -> Result<()> {
    let Some(first) = plan.first_kept() else { return Ok(()) };
    let mut d_x = d_latents.cloned();
    for i in (first..plan.steps.len()).rev() {
        let step = &plan.steps[i];
        let mut d_previous = d_x.as_ref().map(|d_x| d_x * step.sample).transpose()?;
        let kept = plan.kept_rows(i);
        let recording = trajectory.take_recording(i);
        ensure!(
            recording.is_none() || kept.len() == plan.keep[i].len(),
            "denoising step {i} was recorded for the whole batch, and only {} of its {} samples keep it",
            kept.len(),
            plan.keep[i].len()
        );
        if !kept.is_empty() {
            let rows = Rows::of(&kept, trajectory.latents())?;
            let of_rows = rows.denoiser(denoiser)?;
            let (input, output) = (rows.take(trajectory.input(i))?, rows.take(trajectory.output(i))?);
            let recording = match recording {
                Some(recording) => recording,
                None => of_rows.record(&input, step.timestep)?,
            };
            let mut d_prediction = match &d_x {
                Some(d_x) => Some(rows.take(&(d_x * step.model_output)?)?),
                None => None,
            };
            for term in terms.iter_mut() {
                let at = KeptStep {
                    index: i,
                    step,
                    rows: &kept,
                    denoiser: &of_rows,
                    input: &input,
                    output: &output,
                    prediction: recording.prediction(),
                };
                let d_term = (term.cotangent(&at, &mut tally.ledger)? * tally.loss_scale)?;
                d_prediction = Some(match d_prediction {
                    Some(sum) => (sum + d_term)?,
                    None => d_term,
                });
            }
            let d_prediction = d_prediction.context("a loss without a gradient of the latents and without terms")?;
            let d_unet = recording
                .pull(&d_prediction, &mut tally.gradients)
                .with_context(|| format!("in the backward of denoising step {i}"))?;
            let timestep = step.timestep;
            tally.ledger.finite(&d_unet, move |_| {
                format!(
                    "the gradient that comes back from the UNet at denoising step {i} (timestep {timestep}) is not finite"
                )
            })?;
            if let Some(d) = d_previous.take_if(|_| !plan.detach_input) {
                d_previous = Some(rows.add(d, &d_unet)?);
            }
        }
        d_x = d_previous;
    }
    Ok(())
}

/// The rows of a batch that keep a step: all of them, or some.
enum Rows {
    All,
    Some(Tensor),
}

impl Rows {
    fn of(kept: &[usize], batch: &Tensor) -> Result<Self> {
        if kept.len() == batch.dims()[0] {
            return Ok(Self::All);
        }
        let rows: Vec<u32> = kept.iter().map(|row| *row as u32).collect();
        Ok(Self::Some(Tensor::new(rows, batch.device())?))
    }

    /// The denoiser of these rows.
    fn denoiser<'a>(&self, denoiser: &Denoiser<'a>) -> Result<Denoiser<'a>> {
        match self {
            Self::All => Ok(denoiser.clone()),
            Self::Some(rows) => denoiser.select(rows),
        }
    }

    /// These rows of x (B, ...).
    fn take(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::All => x.clone(),
            Self::Some(rows) => x.index_select(rows, 0)?,
        })
    }

    /// `sum` (B, ...) with `summand` (B', ...) added to these rows.
    fn add(&self, sum: Tensor, summand: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::All => (sum + summand)?,
            Self::Some(rows) => sum.index_add(rows, summand, 0)?,
        })
    }
}
