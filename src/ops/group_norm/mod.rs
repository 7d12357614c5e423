//! Group normalisation (Wu & He 2018) over frozen scale and shift, channels-last, with an optional SiLU behind it.
//!
//! ```text
//! x̂ = (x - mean) / sqrt(var + eps)        mean, var over H, W and the C / G channels of a group
//! z = x̂ gamma + beta,  y = z  or  y = silu(z) = z σ(z)
//!
//! d_z = d_y  or  d_y σ(z) (1 + z (1 - σ(z)))
//! d_x = rstd (g - mean(g) - x̂ mean(g x̂))   with g = d_z gamma, the means over the group
//! ```

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor, bail};

use super::per_dtype;
use cpu::{group_norm_bwd as group_norm_bwd_cpu, group_norm_fwd as group_norm_fwd_cpu};

/// Frozen parameters: weight (C), bias (C).
#[derive(Clone, Debug)]
pub struct GroupNorm {
    pub weight: Tensor,
    pub bias: Tensor,
    pub groups: usize,
    pub eps: f64,
    /// Whether SiLU follows.
    pub silu: bool,
}

impl GroupNorm {
    fn check(&self, x: &Tensor) -> Result<()> {
        let channels = *x.dims().last().unwrap_or(&0);
        if self.groups == 0
            || !channels.is_multiple_of(self.groups)
            || self.weight.dims() != [channels]
            || self.bias.dims() != [channels]
        {
            bail!(
                "group norm: {channels} channels in {} groups with a weight of shape {:?}",
                self.groups,
                self.weight.dims()
            );
        }
        Ok(())
    }
}

/// x (B, H, W, C) or (B, N, C) -> the same shape.
pub fn group_norm_fwd(x: &Tensor, norm: &GroupNorm) -> Result<Tensor> {
    norm.check(x)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::group_norm_fwd(x, norm);
    }
    per_dtype!(x, group_norm_fwd_cpu(x, norm))
}

/// The gradient of the input, from the cotangent and the forward's input; the statistics are computed again.
pub fn group_norm_bwd(cotangent: &Tensor, x: &Tensor, norm: &GroupNorm) -> Result<Tensor> {
    norm.check(x)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::group_norm_bwd(cotangent, x, norm);
    }
    per_dtype!(x, group_norm_bwd_cpu(cotangent, x, norm))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check, relative_error};
    use candle_core::{D, DType};

    fn cast(norm: &GroupNorm, dtype: DType) -> GroupNorm {
        GroupNorm { weight: norm.weight.to_dtype(dtype).unwrap(), bias: norm.bias.to_dtype(dtype).unwrap(), ..*norm }
    }

    fn composed(x: &Tensor, norm: &GroupNorm) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let grouped = x.reshape((b, h * w, norm.groups, c / norm.groups))?.transpose(1, 2)?.contiguous()?.reshape((
            b,
            norm.groups,
            (),
        ))?;
        let centred = grouped.broadcast_sub(&grouped.mean_keepdim(D::Minus1)?)?;
        let var = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normed = centred.broadcast_div(&(var + norm.eps)?.sqrt()?)?;
        let normed = normed
            .reshape((b, norm.groups, h * w, c / norm.groups))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((b, h, w, c))?;
        let z = normed.broadcast_mul(&norm.weight)?.broadcast_add(&norm.bias)?;
        if norm.silu { z.silu() } else { Ok(z) }
    }

    #[test]
    fn agrees_with_autograd_and_finite_differences() {
        for (h, w, c, groups) in [(1, 1, 10, 2), (3, 5, 6, 3), (7, 4, 8, 8), (33, 40, 6, 2), (2, 3, 5, 1)] {
            for silu in [false, true] {
                let norm =
                    GroupNorm { weight: Case::normal(&[c], 1), bias: Case::normal(&[c], 2), groups, eps: 1e-5, silu };
                check(
                    &[Case::normal(&[2, h, w, c], 3)],
                    |x| group_norm_fwd(&x[0], &cast(&norm, x[0].dtype())),
                    |x, dy| Ok(vec![group_norm_bwd(dy, &x[0], &cast(&norm, x[0].dtype()))?]),
                    |x| composed(&x[0], &cast(&norm, x[0].dtype())),
                );
            }
        }
    }

    #[test]
    fn a_large_mean_does_not_swallow_the_variance() {
        let norm = GroupNorm {
            weight: Tensor::ones(4, DType::F32, &candle_core::Device::Cpu).unwrap(),
            bias: Tensor::zeros(4, DType::F32, &candle_core::Device::Cpu).unwrap(),
            groups: 2,
            eps: 1e-5,
            silu: false,
        };
        let x = (Case::normal(&[1, 16, 16, 4], 5) + 1000.0).unwrap();
        let x = x.to_dtype(DType::F32).unwrap();
        let expected = composed(&x.to_dtype(DType::F64).unwrap(), &cast(&norm, DType::F64)).unwrap();
        let y = group_norm_fwd(&x, &norm).unwrap();
        // 1000 carries 24 bits: 3e-5 of the unit variance is lost in x itself only where it is subtracted in f32
        assert!(relative_error(&y, &expected) < 1e-4);
    }
}
