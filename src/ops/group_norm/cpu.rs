use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::GroupNorm;
use crate::ops::{Host, Real, tensor_from};

/// Pixels summed in the element type before the sum goes on in f64.
const ROWS: usize = 256;

struct Shape {
    batch: usize,
    pixels: usize,
    channels: usize,
    groups: usize,
}

impl Shape {
    fn of(x: &Tensor, norm: &GroupNorm) -> Self {
        let dims = x.dims();
        let (batch, channels) = (dims[0], dims[dims.len() - 1]);
        Self { batch, pixels: x.elem_count() / (batch * channels).max(1), channels, groups: norm.groups }
    }
    fn image(&self) -> usize {
        self.pixels * self.channels
    }
    fn count(&self) -> f64 {
        (self.pixels * self.channels / self.groups) as f64
    }
}

/// For each image, sums `N` quantities over the pixels, per channel, then over the channels of each group:
/// (batch, groups, N) in f64. `add(image, channel, element, accumulators)` adds one element's part.
fn group_sums<T: Real, const N: usize>(
    shape: &Shape,
    x: &[T],
    add: impl Fn(usize, usize, usize, &mut [T; N]) + Sync,
) -> Vec<[f64; N]> {
    let (channels, per_group) = (shape.channels, shape.channels / shape.groups);
    let mut sums = vec![[0f64; N]; shape.batch * shape.groups];
    sums.par_chunks_mut(shape.groups).enumerate().for_each(|(image, sums)| {
        let rows_per_block = ROWS;
        let first = image * shape.image();
        let blocks: Vec<Vec<[f64; N]>> = x[first..first + shape.image()]
            .par_chunks(rows_per_block * channels)
            .enumerate()
            .map(|(block, rows)| {
                let mut per_channel = vec![[T::zero(); N]; channels];
                let start = first + block * rows_per_block * channels;
                for row in 0..rows.len() / channels {
                    for (channel, accumulators) in per_channel.iter_mut().enumerate() {
                        add(image, channel, start + row * channels + channel, accumulators);
                    }
                }
                let mut groups = vec![[0f64; N]; shape.groups];
                for (channel, values) in per_channel.iter().enumerate() {
                    for (sum, value) in groups[channel / per_group].iter_mut().zip(values) {
                        *sum += value.f64();
                    }
                }
                groups
            })
            .collect();
        for block in blocks {
            for (sum, part) in sums.iter_mut().zip(block) {
                for (sum, part) in sum.iter_mut().zip(part) {
                    *sum += part;
                }
            }
        }
    });
    sums
}

/// Mean and 1 / sqrt(var + eps) of every (image, group), in two passes: a large mean must not swallow the variance.
fn statistics<T: Real>(shape: &Shape, x: &[T], eps: f64) -> Vec<(T, T)> {
    let per_group = shape.channels / shape.groups;
    let means: Vec<T> = group_sums::<T, 1>(shape, x, |_, _, i, sum| sum[0] += x[i])
        .iter()
        .map(|s| T::lit(s[0] / shape.count()))
        .collect();
    let squares = group_sums::<T, 1>(shape, x, |image, channel, i, sum| {
        let centred = x[i] - means[image * shape.groups + channel / per_group];
        sum[0] += centred * centred;
    });
    means.iter().zip(squares).map(|(mean, s)| (*mean, T::lit(1.0 / (s[0] / shape.count() + eps).sqrt()))).collect()
}

/// Per (image, channel): (mean, rstd).
fn per_channel<T: Real>(shape: &Shape, image: usize, statistics: &[(T, T)]) -> Vec<(T, T)> {
    let per_group = shape.channels / shape.groups;
    (0..shape.channels).map(|c| statistics[image * shape.groups + c / per_group]).collect()
}

fn sigmoid<T: Real>(z: T) -> T {
    T::one() / (T::one() + (-z).exp())
}

pub(super) fn group_norm_fwd<T: Real>(x: &Tensor, norm: &GroupNorm) -> Result<Tensor> {
    let shape = Shape::of(x, norm);
    let dims = x.dims();
    let x = Host::<T>::read(x)?;
    let (weight, bias) = (Host::<T>::read(&norm.weight)?, Host::<T>::read(&norm.bias)?);
    let statistics = statistics(&shape, &x, norm.eps);
    let mut y = vec![T::zero(); x.len()];
    for image in 0..shape.batch {
        // z = (x - mean) scale + shift: the mean goes first, so that a large one costs no digits
        let affine: Vec<(T, T, T)> = per_channel(&shape, image, &statistics)
            .iter()
            .enumerate()
            .map(|(c, (mean, rstd))| (*mean, *rstd * weight[c], bias[c]))
            .collect();
        let range = image * shape.image()..(image + 1) * shape.image();
        let block = ROWS * shape.channels;
        y[range.clone()].par_chunks_mut(block).zip(x[range].par_chunks(block)).for_each(|(y, x)| {
            for (y, x) in y.chunks_mut(shape.channels).zip(x.chunks(shape.channels)) {
                for ((y, x), (mean, scale, shift)) in y.iter_mut().zip(x).zip(&affine) {
                    let z = (*x - *mean) * *scale + *shift;
                    *y = if norm.silu { z * sigmoid(z) } else { z };
                }
            }
        });
    }
    tensor_from(y, dims)
}

pub(super) fn group_norm_bwd<T: Real>(cotangent: &Tensor, x: &Tensor, norm: &GroupNorm) -> Result<Tensor> {
    let shape = Shape::of(x, norm);
    let dims = x.dims();
    let (dy, x) = (Host::<T>::read(cotangent)?, Host::<T>::read(x)?);
    let (weight, bias) = (Host::<T>::read(&norm.weight)?, Host::<T>::read(&norm.bias)?);
    let statistics = statistics(&shape, &x, norm.eps);
    let (weight, bias): (&[T], &[T]) = (&weight, &bias);
    let per_group = shape.channels / shape.groups;

    // (x̂, g = d_z gamma) of one element
    let normed = |x: T, dy: T, channel: usize, (mean, rstd): (T, T)| {
        let x_hat = (x - mean) * rstd;
        let d_z = if norm.silu {
            let z = x_hat * weight[channel] + bias[channel];
            let s = sigmoid(z);
            dy * s * (T::one() + z * (T::one() - s))
        } else {
            dy
        };
        (x_hat, d_z * weight[channel])
    };
    let sums = group_sums::<T, 2>(&shape, &x, |image, channel, i, sum| {
        let (x_hat, g) = normed(x[i], dy[i], channel, statistics[image * shape.groups + channel / per_group]);
        sum[0] += g;
        sum[1] += g * x_hat;
    });
    let mut dx = vec![T::zero(); x.len()];
    for image in 0..shape.batch {
        let channels = per_channel(&shape, image, &statistics);
        let means: Vec<(T, T)> = (0..shape.channels)
            .map(|c| {
                let [g, gx] = sums[image * shape.groups + c / per_group];
                (T::lit(g / shape.count()), T::lit(gx / shape.count()))
            })
            .collect();
        let range = image * shape.image()..(image + 1) * shape.image();
        let block = ROWS * shape.channels;
        dx[range.clone()]
            .par_chunks_mut(block)
            .zip(x[range.clone()].par_chunks(block))
            .zip(dy[range].par_chunks(block))
            .for_each(|((dx, x), dy)| {
                for (i, dx) in dx.iter_mut().enumerate() {
                    let c = i % shape.channels;
                    let (x_hat, g) = normed(x[i], dy[i], c, channels[c]);
                    *dx = channels[c].1 * (g - means[c].0 - x_hat * means[c].1);
                }
            });
    }
    tensor_from(dx, dims)
}
