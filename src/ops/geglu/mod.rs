//! GEGLU (Shazeer 2020): one half of the features gates the other through the exact gelu.
//!
//! ```text
//! x = [u, v] along the last axis (..., 2 F)     y = u gelu(v)   (..., F)
//! d_u = d_y gelu(v)      d_v = d_y u (Φ(v) + v φ(v))
//! ```

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::vector::vectorised;
use super::{Host, Real, buffer, per_dtype, tensor_from};

/// x (..., 2 F) -> (..., F).
pub fn geglu_fwd(x: &Tensor) -> Result<Tensor> {
    half(x)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::geglu_fwd(x);
    }
    per_dtype!(x, geglu_fwd_cpu(x))
}

/// cotangent (..., F), x (..., 2 F) -> (..., 2 F).
pub fn geglu_bwd(cotangent: &Tensor, x: &Tensor) -> Result<Tensor> {
    half(x)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::geglu_bwd(cotangent, x);
    }
    per_dtype!(x, geglu_bwd_cpu(cotangent, x))
}

fn half(x: &Tensor) -> Result<usize> {
    match x.dims().last() {
        Some(last) if last % 2 == 0 && *last > 0 => Ok(last / 2),
        _ => bail!("geglu: the last axis of {:?} cannot be halved", x.dims()),
    }
}

const ROWS: usize = 16;

fn geglu_fwd_cpu<T: Real>(x: &Tensor) -> Result<Tensor> {
    let f = half(x)?;
    let data = Host::<T>::read(x)?;
    let mut y = buffer(data.len() / 2);
    y.par_chunks_mut(ROWS * f).zip(data.par_chunks(ROWS * 2 * f)).for_each(|(y, x)| {
        vectorised(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_mut(f).zip(x.chunks(2 * f)) {
                    let (u, v) = x.split_at(f);
                    for ((y, u), v) in y.iter_mut().zip(u).zip(v) {
                        *y = *u * *v * v.normal().0;
                    }
                }
            },
        );
    });
    let mut dims = x.dims().to_vec();
    dims.pop();
    dims.push(f);
    tensor_from(y, dims)
}

fn geglu_bwd_cpu<T: Real>(cotangent: &Tensor, x: &Tensor) -> Result<Tensor> {
    let f = half(x)?;
    let (dy, data) = (Host::<T>::read(cotangent)?, Host::<T>::read(x)?);
    let mut dx = buffer(data.len());
    dx.par_chunks_mut(ROWS * 2 * f).zip(data.par_chunks(ROWS * 2 * f)).zip(dy.par_chunks(ROWS * f)).for_each(
        |((dx, x), dy)| {
            vectorised(
                #[inline(always)]
                || {
                    for ((dx, x), dy) in dx.chunks_mut(2 * f).zip(x.chunks(2 * f)).zip(dy.chunks(f)) {
                        let ((du, dv), (u, v)) = (dx.split_at_mut(f), x.split_at(f));
                        for ((du, dv), ((u, v), dy)) in du.iter_mut().zip(dv).zip(u.iter().zip(v).zip(dy)) {
                            let (cdf, density) = v.normal();
                            *du = *dy * *v * cdf;
                            *dv = *dy * *u * (cdf + *v * density);
                        }
                    }
                },
            );
        },
    );
    tensor_from(dx, x.dims())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check, gelu};
    use candle_core::D;

    #[test]
    fn agrees_with_autograd_and_finite_differences() {
        for (rows, f) in [(1, 1), (5, 7), (40, 16)] {
            check(
                &[Case::normal(&[2, rows, 2 * f], 1)],
                |x| geglu_fwd(&x[0]),
                |x, dy| Ok(vec![geglu_bwd(dy, &x[0])?]),
                |x| x[0].narrow(D::Minus1, 0, f)? * gelu(&x[0].narrow(D::Minus1, f, f)?)?,
            );
        }
    }
}
