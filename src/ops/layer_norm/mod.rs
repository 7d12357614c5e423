//! Layer normalisation (Ba et al. 2016) over the last axis, frozen scale and shift.
//!
//! ```text
//! x̂ = (x - mean) rstd,  y = x̂ gamma + beta
//! d_x = rstd (g - mean(g) - x̂ mean(g x̂))   with g = d_y gamma
//! ```

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor, bail};

use super::per_dtype;
use cpu::{layer_norm_bwd as layer_norm_bwd_cpu, layer_norm_fwd as layer_norm_fwd_cpu};

/// Frozen parameters: weight (C), bias (C).
#[derive(Clone, Debug)]
pub struct LayerNorm {
    pub weight: Tensor,
    pub bias: Tensor,
    pub eps: f64,
}

impl LayerNorm {
    fn check(&self, x: &Tensor) -> Result<()> {
        let channels = *x.dims().last().unwrap_or(&0);
        if self.weight.dims() != [channels] || self.bias.dims() != [channels] {
            bail!("layer norm: {channels} features with a weight of shape {:?}", self.weight.dims());
        }
        Ok(())
    }
}

/// x (..., C) -> (..., C).
pub fn layer_norm_fwd(x: &Tensor, norm: &LayerNorm) -> Result<Tensor> {
    norm.check(x)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::layer_norm_fwd(x, norm);
    }
    per_dtype!(x, layer_norm_fwd_cpu(x, norm))
}

/// The gradient of the input, from the cotangent and the forward's input.
pub fn layer_norm_bwd(cotangent: &Tensor, x: &Tensor, norm: &LayerNorm) -> Result<Tensor> {
    norm.check(x)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::layer_norm_bwd(cotangent, x, norm);
    }
    per_dtype!(x, layer_norm_bwd_cpu(cotangent, x, norm))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check};
    use candle_core::D;

    #[test]
    fn agrees_with_autograd_and_finite_differences() {
        for (rows, c) in [(1, 5), (5, 7), (130, 33)] {
            let norm = LayerNorm { weight: Case::normal(&[c], 1), bias: Case::normal(&[c], 2), eps: 1e-5 };
            let cast = |dtype| LayerNorm {
                weight: norm.weight.to_dtype(dtype).unwrap(),
                bias: norm.bias.to_dtype(dtype).unwrap(),
                eps: norm.eps,
            };
            check(
                &[Case::normal(&[2, rows, c], 3)],
                |x| layer_norm_fwd(&x[0], &cast(x[0].dtype())),
                |x, dy| Ok(vec![layer_norm_bwd(dy, &x[0], &cast(x[0].dtype()))?]),
                |x| {
                    let norm = cast(x[0].dtype());
                    let centred = x[0].broadcast_sub(&x[0].mean_keepdim(D::Minus1)?)?;
                    let var = centred.sqr()?.mean_keepdim(D::Minus1)?;
                    centred
                        .broadcast_div(&(var + norm.eps)?.sqrt()?)?
                        .broadcast_mul(&norm.weight)?
                        .broadcast_add(&norm.bias)
                },
            );
        }
    }
}
