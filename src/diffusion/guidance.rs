//! Classifier-free guidance (Ho & Salimans 2022).

use candle_core::{Result, Tensor};

/// `uncond + scale (cond - uncond)`.
pub fn guide(uncond: &Tensor, cond: &Tensor, guidance_scale: f64) -> Result<Tensor> {
    uncond + ((cond - uncond)? * guidance_scale)?
}

/// The cotangents of both branches, [uncond, cond], from the guided prediction's.
///
/// ```text
/// d_uncond = (1 - scale) d      d_cond = scale d
/// ```
pub fn guide_bwd(cotangent: &Tensor, guidance_scale: f64) -> Result<[Tensor; 2]> {
    Ok([(cotangent * (1.0 - guidance_scale))?, (cotangent * guidance_scale)?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check};

    #[test]
    fn agrees_with_autograd_and_finite_differences() {
        check(
            &[Case::normal(&[2, 3], 1), Case::normal(&[2, 3], 2)],
            |x| guide(&x[0], &x[1], 7.5),
            |_, d| Ok(guide_bwd(d, 7.5)?.to_vec()),
            |x| x[0].affine(-6.5, 0.0)? + x[1].affine(7.5, 0.0)?,
        );
    }
}
