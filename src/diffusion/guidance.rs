//! Classifier-free guidance (Ho & Salimans 2022), and its rescaling (Lin et al. 2023, section 3.4).

use candle_core::{Result, Tensor, bail};

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

/// The guided prediction g (B, C, h, w) with the standard deviation of the prompt's, c, as far as `amount` (0 to 1) says:
/// diffusers' `rescale_noise_cfg`.
///
/// ```text
/// y = m g      m = amount σ(c) / σ(g) + 1 - amount      σ: of each image's numbers, with n - 1 as torch's `std`
/// ```
pub fn rescale(guided: &Tensor, cond: &Tensor, amount: f64) -> Result<Tensor> {
    let ratio = (Deviation::of(cond)?.sigma / Deviation::of(guided)?.sigma)?;
    guided.broadcast_mul(&ratio.affine(amount, 1.0 - amount)?)
}

/// The cotangents of [`rescale`]'s inputs, [guided, cond].
///
/// ```text
/// p = amount <d, g> σ(c) / (σ(g) (n - 1))      d_g = m d - p (g - mean g) / σ(g)²      d_c = p (c - mean c) / σ(c)²
/// ```
pub fn rescale_bwd(cotangent: &Tensor, guided: &Tensor, cond: &Tensor, amount: f64) -> Result<[Tensor; 2]> {
    let (of_guided, of_cond) = (Deviation::of(guided)?, Deviation::of(cond)?);
    let ratio = (&of_cond.sigma / &of_guided.sigma)?;
    let along = (cotangent * guided)?.sum_keepdim(IMAGE)?;
    let p = (&along * &ratio)?.affine(amount / of_guided.freedom, 0.0)?;
    let direct = cotangent.broadcast_mul(&ratio.affine(amount, 1.0 - amount)?)?;
    Ok([(direct - of_guided.pull(&p)?)?, of_cond.pull(&p)?])
}

/// The dimensions of one image.
const IMAGE: [usize; 3] = [1, 2, 3];

/// How far the numbers of each image are from their mean.
struct Deviation {
    centred: Tensor,
    /// (B, 1, 1, 1)
    sigma: Tensor,
    /// n - 1
    freedom: f64,
}

impl Deviation {
    fn of(x: &Tensor) -> Result<Self> {
        let (_, channels, h, w) = x.dims4()?;
        let n = (channels * h * w) as f64;
        if n < 2.0 {
            bail!("one number has no standard deviation");
        }
        let centred = x.broadcast_sub(&x.sum_keepdim(IMAGE)?.affine(1.0 / n, 0.0)?)?;
        let sigma = centred.sqr()?.sum_keepdim(IMAGE)?.affine(1.0 / (n - 1.0), 0.0)?.sqrt()?;
        Ok(Self { centred, sigma, freedom: n - 1.0 })
    }

    /// p (x - mean x) / σ²
    fn pull(&self, p: &Tensor) -> Result<Tensor> {
        self.centred.broadcast_mul(&(p / self.sigma.sqr()?)?)
    }
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
    #[test]
    fn rescaling_agrees_with_autograd_and_finite_differences() {
        let shape = [2, 4, 3, 5];
        let cond = (Case::normal(&shape, 2) * 0.7).unwrap();
        let deviation = |x: &Tensor| -> Result<Tensor> {
            let rows = x.flatten_from(1)?;
            rows.broadcast_sub(&rows.mean_keepdim(1)?)?.sqr()?.sum_keepdim(1)? / 59.0
        };
        for amount in [0.3, 0.7, 1.0] {
            check(
                &[(Case::normal(&shape, 1) + 0.4).unwrap(), cond.clone()],
                |x| rescale(&x[0], &x[1], amount),
                |x, d| Ok(rescale_bwd(d, &x[0], &x[1], amount)?.to_vec()),
                |x| {
                    let ratio = (deviation(&x[1])? / deviation(&x[0])?)?.sqrt()?;
                    let rescaled = x[0].flatten_from(1)?.broadcast_mul(&ratio)?.reshape(x[0].shape())?;
                    (rescaled * amount)? + (&x[0] * (1.0 - amount))?
                },
            );
        }
    }
}
