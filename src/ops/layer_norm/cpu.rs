use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::LayerNorm;
use crate::ops::{Host, Real, tensor_from};

/// Rows that one task takes.
const ROWS: usize = 64;

/// Sum over a row in eight interleaved partial sums: it vectorises, and rounds less than one running sum.
fn row_sum<T: Real>(values: impl ExactSizeIterator<Item = T>) -> T {
    let mut partial = [T::zero(); 8];
    for (i, value) in values.enumerate() {
        partial[i % 8] += value;
    }
    partial.into_iter().sum()
}

fn mean_rstd<T: Real>(x: &[T], eps: f64) -> (T, T) {
    let n = T::lit(x.len() as f64);
    let mean = row_sum(x.iter().copied()) / n;
    let var = row_sum(x.iter().map(|x| (*x - mean) * (*x - mean))) / n;
    (mean, T::one() / (var + T::lit(eps)).sqrt())
}

pub(super) fn layer_norm_fwd<T: Real>(x: &Tensor, norm: &LayerNorm) -> Result<Tensor> {
    let dims = x.dims();
    let x = Host::<T>::read(x)?;
    let (weight, bias) = (Host::<T>::read(&norm.weight)?, Host::<T>::read(&norm.bias)?);
    let c = weight.len();
    let mut y = vec![T::zero(); x.len()];
    y.par_chunks_mut(ROWS * c).zip(x.par_chunks(ROWS * c)).for_each(|(y, x)| {
        for (y, x) in y.chunks_mut(c).zip(x.chunks(c)) {
            let (mean, rstd) = mean_rstd(x, norm.eps);
            for ((y, x), (w, b)) in y.iter_mut().zip(x).zip(weight.iter().zip(bias.iter())) {
                *y = (*x - mean) * rstd * *w + *b;
            }
        }
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
    let mut dx = vec![T::zero(); x.len()];
    dx.par_chunks_mut(ROWS * c).zip(x.par_chunks(ROWS * c)).zip(dy.par_chunks(ROWS * c)).for_each(|((dx, x), dy)| {
        for ((dx, x), dy) in dx.chunks_mut(c).zip(x.chunks(c)).zip(dy.chunks(c)) {
            let (mean, rstd) = mean_rstd(x, norm.eps);
            let g_mean = row_sum(dy.iter().zip(weight).map(|(dy, w)| *dy * *w)) / n;
            let gx_mean = row_sum((0..c).map(|i| dy[i] * weight[i] * (x[i] - mean) * rstd)) / n;
            for i in 0..c {
                let x_hat = (x[i] - mean) * rstd;
                dx[i] = rstd * (dy[i] * weight[i] - g_mean - x_hat * gx_mean);
            }
        }
    });
    tensor_from(dx, dims)
}
