use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::LayerNorm;
use crate::ops::vector::{sum_of, vectorised};
use crate::ops::{Host, Real, buffer, tensor_from};

/// Rows that one task takes.
const ROWS: usize = 64;

#[inline(always)]
fn mean_rstd<T: Real>(x: &[T], eps: f64) -> (T, T) {
    let n = T::lit(x.len() as f64);
    let mean = sum_of(x, |_, x| x) / n;
    let var = sum_of(x, |_, x| (x - mean) * (x - mean)) / n;
    (mean, T::one() / (var + T::lit(eps)).sqrt())
}

pub(super) fn layer_norm_fwd<T: Real>(x: &Tensor, norm: &LayerNorm) -> Result<Tensor> {
    let dims = x.dims();
    let x = Host::<T>::read(x)?;
    let (weight, bias) = (Host::<T>::read(&norm.weight)?, Host::<T>::read(&norm.bias)?);
    let c = weight.len();
    let mut y = buffer(x.len());
    let (weight, bias): (&[T], &[T]) = (&weight, &bias);
    y.par_chunks_mut(ROWS * c).zip(x.par_chunks(ROWS * c)).for_each(|(y, x)| {
        vectorised(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_mut(c).zip(x.chunks(c)) {
                    let (mean, rstd) = mean_rstd(x, norm.eps);
                    for ((y, x), (w, b)) in y.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
                        *y = (*x - mean) * rstd * *w + *b;
                    }
                }
            },
        );
    });
    tensor_from(y, dims)
}

pub(super) fn layer_norm_bwd<T: Real>(cotangent: &Tensor, x: &Tensor, norm: &LayerNorm) -> Result<Tensor> {
    let dims = x.dims();
    let (dy, x) = (Host::<T>::read(cotangent)?, Host::<T>::read(x)?);
    let weight = Host::<T>::read(&norm.weight)?;
    let weight: &[T] = &weight;
    let c = weight.len();
    let n = T::lit(c as f64);
    let mut dx = buffer(x.len());
    dx.par_chunks_mut(ROWS * c).zip(x.par_chunks(ROWS * c)).zip(dy.par_chunks(ROWS * c)).for_each(|((dx, x), dy)| {
        vectorised(
            #[inline(always)]
            || {
                for ((dx, x), dy) in dx.chunks_mut(c).zip(x.chunks(c)).zip(dy.chunks(c)) {
                    let (mean, rstd) = mean_rstd(x, norm.eps);
                    // slices of one length: the indices below need no checks
                    let (x, weight) = (&x[..dy.len()], &weight[..dy.len()]);
                    let g_mean = sum_of(dy, |i, dy| dy * weight[i]) / n;
                    let gx_mean = sum_of(dy, |i, dy| dy * weight[i] * (x[i] - mean)) * rstd / n;
                    for ((dx, x), (dy, w)) in dx.iter_mut().zip(x).zip(dy.iter().zip(weight)) {
                        let x_hat = (*x - mean) * rstd;
                        *dx = rstd * (*dy * *w - g_mean - x_hat * gx_mean);
                    }
                }
            },
        );
    });
    tensor_from(dx, dims)
}
