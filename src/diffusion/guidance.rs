//! Classifier-free guidance (Ho & Salimans 2022).

use candle_core::{Result, Tensor};

/// `uncond + scale (cond - uncond)` of a prediction whose batch is [uncond; cond]: (2 B, ...) -> (B, ...).
pub fn guide(noise_pred: &Tensor, guidance_scale: f64) -> Result<Tensor> {
    let [uncond, cond] = halves(noise_pred)?;
    &uncond + ((cond - &uncond)? * guidance_scale)?
}

/// The cotangent of both branches, (2 B, ...), from the guided prediction's, (B, ...).
///
/// ```text
/// d_uncond = (1 - scale) d      d_cond = scale d
/// ```
pub fn guide_bwd(cotangent: &Tensor, guidance_scale: f64) -> Result<Tensor> {
    Tensor::cat(&[(cotangent * (1.0 - guidance_scale))?, (cotangent * guidance_scale)?], 0)
}

/// Both halves of a batch.
pub fn halves(batch: &Tensor) -> Result<[Tensor; 2]> {
    let half = batch.dims()[0] / 2;
    Ok([batch.narrow(0, 0, half)?.contiguous()?, batch.narrow(0, half, half)?.contiguous()?])
}
