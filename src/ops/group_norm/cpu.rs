use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::GroupNorm;
use crate::ops::vector::{sigmoid, vectorised};
use crate::ops::{Host, Real, buffer, tensor_from};

/// Pixels summed in the element type before the sum goes on in f64.
const ROWS: usize = 128;

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
    /// Elements of a block of pixels.
    fn block(&self) -> usize {
        ROWS * self.channels
    }
    /// Blocks of one image; the last one may be shorter.
    fn blocks(&self) -> usize {
        self.pixels.div_ceil(ROWS)
    }
    /// The elements of block `block` of image `image`.
    fn range(&self, image: usize, block: usize) -> std::ops::Range<usize> {
        let start = image * self.image() + block * self.block();
        start..(start + self.block()).min((image + 1) * self.image())
    }

    /// Sums `N` quantities over the pixels of each image and the channels of each group, divided by their number.
    /// `add(image, range, sums)` adds the parts of a block of pixels, per channel. Returned per channel: the means of
    /// its group, `[quantity][image * channels + channel]`.
    fn group_means<T: Real, const N: usize>(
        &self,
        add: impl Fn(usize, std::ops::Range<usize>, &mut [Vec<T>; N]) + Sync,
    ) -> [Vec<T>; N] {
        let (channels, per_group) = (self.channels, self.channels / self.groups);
        let blocks = self.blocks();
        let partial: Vec<[Vec<f64>; N]> = (0..self.batch * blocks)
            .into_par_iter()
            .map(|task| {
                let (image, block) = (task / blocks, task % blocks);
                let mut sums: [Vec<T>; N] = std::array::from_fn(|_| vec![T::zero(); channels]);
                add(image, self.range(image, block), &mut sums);
                sums.map(|sums| sums.chunks(per_group).map(|group| group.iter().map(|s| s.f64()).sum()).collect())
            })
            .collect();
        let count = (self.pixels * per_group) as f64;
        std::array::from_fn(|n| {
            let mut means = Vec::with_capacity(self.batch * channels);
            for image in partial.chunks(blocks) {
                for group in 0..self.groups {
                    // blocks in order: the sum does not depend on the number of threads
                    let sum: f64 = image.iter().map(|block| block[n][group]).sum();
                    means.extend(std::iter::repeat_n(T::lit(sum / count), per_group));
                }
            }
            means
        })
    }

    /// Mean and 1 / sqrt(var + eps) for every (image, channel), in two passes: a large mean must not swallow the variance.
    fn statistics<T: Real>(&self, x: &[T], eps: f64) -> (Vec<T>, Vec<T>) {
        let channels = self.channels;
        let [mean] = self.group_means::<T, 1>(|_, range, [sums]| {
            vectorised(
                #[inline(always)]
                || {
                    for row in x[range].chunks(channels) {
                        for (sum, x) in sums.iter_mut().zip(row) {
                            *sum += *x;
                        }
                    }
                },
            );
        });
        let [var] = self.group_means::<T, 1>(|image, range, [sums]| {
            let mean = &mean[image * channels..][..channels];
            vectorised(
                #[inline(always)]
                || {
                    for row in x[range].chunks(channels) {
                        for ((sum, x), mean) in sums.iter_mut().zip(row).zip(mean) {
                            *sum += (*x - *mean) * (*x - *mean);
                        }
                    }
                },
            );
        });
        let rstd = var.into_iter().map(|var| T::lit(1.0 / (var.f64() + eps).sqrt())).collect();
        (mean, rstd)
    }

    /// Fills an output of x's shape, block by block.
    fn map_blocks<T: Real>(&self, fill: impl Fn(usize, std::ops::Range<usize>, &mut [T]) + Sync) -> Vec<T> {
        let mut y = buffer(self.batch * self.image());
        y.par_chunks_mut(self.image()).enumerate().for_each(|(image, y)| {
            y.par_chunks_mut(self.block()).enumerate().for_each(|(block, y)| fill(image, self.range(image, block), y));
        });
        y
    }
}

pub(super) fn group_norm_fwd<T: Real>(x: &Tensor, norm: &GroupNorm) -> Result<Tensor> {
    let shape = Shape::of(x, norm);
    let dims = x.dims();
    let x = Host::<T>::read(x)?;
    let (weight, bias) = (Host::<T>::read(&norm.weight)?, Host::<T>::read(&norm.bias)?);
    let (x, weight, bias): (&[T], &[T], &[T]) = (&x, &weight, &bias);
    let channels = shape.channels;
    let (mean, rstd) = shape.statistics(x, norm.eps);
    let y = shape.map_blocks(|image, range, y| {
        let mean = &mean[image * channels..][..channels];
        // z = (x - mean) scale + shift: the mean goes first, so that a large one costs no digits
        let scale: Vec<T> =
            rstd[image * channels..][..channels].iter().zip(weight).map(|(rstd, w)| *rstd * *w).collect();
        vectorised(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_mut(channels).zip(x[range].chunks(channels)) {
                    for ((y, x), ((mean, scale), shift)) in y.iter_mut().zip(x).zip(mean.iter().zip(&scale).zip(bias)) {
                        *y = (*x - *mean) * *scale + *shift;
                    }
                    if norm.silu {
                        for y in y.iter_mut() {
                            *y *= sigmoid(*y);
                        }
                    }
                }
            },
        );
    });
    tensor_from(y, dims)
}

pub(super) fn group_norm_bwd<T: Real>(cotangent: &Tensor, x: &Tensor, norm: &GroupNorm) -> Result<Tensor> {
    let shape = Shape::of(x, norm);
    let dims = x.dims();
    let (dy, x) = (Host::<T>::read(cotangent)?, Host::<T>::read(x)?);
    let (weight, bias) = (Host::<T>::read(&norm.weight)?, Host::<T>::read(&norm.bias)?);
    let (x, dy, weight, bias): (&[T], &[T], &[T], &[T]) = (&x, &dy, &weight, &bias);
    let channels = shape.channels;
    let (mean, rstd) = shape.statistics(x, norm.eps);

    // g = d_z gamma, once: the two means need it, and d_x after them
    let g = shape.map_blocks(|image, range, g: &mut [T]| {
        let (mean, rstd) = (&mean[image * channels..][..channels], &rstd[image * channels..][..channels]);
        vectorised(
            #[inline(always)]
            || {
                for (g, (x, dy)) in
                    g.chunks_mut(channels).zip(x[range.clone()].chunks(channels).zip(dy[range].chunks(channels)))
                {
                    if norm.silu {
                        for ((g, (x, dy)), ((mean, rstd), (w, b))) in
                            g.iter_mut().zip(x.iter().zip(dy)).zip(mean.iter().zip(rstd).zip(weight.iter().zip(bias)))
                        {
                            let z = (*x - *mean) * *rstd * *w + *b;
                            let s = sigmoid(z);
                            *g = *dy * s * (T::one() + z * (T::one() - s)) * *w;
                        }
                    } else {
                        for ((g, dy), w) in g.iter_mut().zip(dy).zip(weight) {
                            *g = *dy * *w;
                        }
                    }
                }
            },
        );
    });
    let [g_mean, gx_mean] = shape.group_means::<T, 2>(|image, range, [g_sum, gx_sum]| {
        let (mean, rstd) = (&mean[image * channels..][..channels], &rstd[image * channels..][..channels]);
        vectorised(
            #[inline(always)]
            || {
                for (g, x) in g[range.clone()].chunks(channels).zip(x[range].chunks(channels)) {
                    for (((g_sum, gx_sum), (g, x)), (mean, rstd)) in
                        g_sum.iter_mut().zip(gx_sum.iter_mut()).zip(g.iter().zip(x)).zip(mean.iter().zip(rstd))
                    {
                        *g_sum += *g;
                        *gx_sum += *g * (*x - *mean) * *rstd;
                    }
                }
            },
        );
    });
    let dx = shape.map_blocks(|image, range, dx| {
        let at = |values: &'_ [T]| -> Vec<T> { values[image * channels..][..channels].to_vec() };
        let (mean, rstd, g_mean, gx_mean) = (at(&mean), at(&rstd), at(&g_mean), at(&gx_mean));
        vectorised(
            #[inline(always)]
            || {
                for (dx, (x, g)) in
                    dx.chunks_mut(channels).zip(x[range.clone()].chunks(channels).zip(g[range].chunks(channels)))
                {
                    for ((dx, (x, g)), ((mean, rstd), (g_mean, gx_mean))) in
                        dx.iter_mut().zip(x.iter().zip(g)).zip(mean.iter().zip(&rstd).zip(g_mean.iter().zip(&gx_mean)))
                    {
                        let x_hat = (*x - *mean) * *rstd;
                        *dx = *rstd * (*g - *g_mean - x_hat * *gx_mean);
                    }
                }
            },
        );
    });
    tensor_from(dx, dims)
}
