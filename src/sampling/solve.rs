//! A denoising chain that is only run forward.

use anyhow::Result;
use candle_core::Tensor;

use super::denoiser::check_step;
use crate::diffusion::SolverStep;
use crate::ops::Ledger;

/// The end of the chain of `steps` from `x_t` (B, C, h, w). `predict(i, x_t)` is what the UNet gives at step `i`; `noise(i)` is
/// asked for where the step adds some.
///
/// # Errors
/// A latent that is not finite, here or when the ledger is read: names the step.
pub(super) fn solve(
    steps: &[SolverStep],
    mut x_t: Tensor,
    mut predict: impl FnMut(usize, &Tensor) -> Result<Tensor>,
    noise: impl Fn(usize) -> Result<Tensor>,
    ledger: &mut Ledger,
) -> Result<Tensor> {
    let mut original = None;
    for (i, step) in steps.iter().enumerate() {
        let out = predict(i, &x_t)?;
        let z = if step.ddim.noise != 0.0 { Some(noise(i)?) } else { None };
        let next = step.apply(&x_t, &out, original.as_ref(), z.as_ref())?;
        check_step(&next, i, step.ddim.timestep, ledger)?;
        let is_read = steps.get(i + 1).is_some_and(|step| step.previous != 0.0);
        original = is_read.then(|| step.predicted_original(&x_t, &out)).transpose()?;
        x_t = next;
    }
    Ok(x_t)
}
