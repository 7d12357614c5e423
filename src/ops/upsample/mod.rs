//! Nearest-neighbour upsampling to a given size, channels-last.
//!
//! ```text
//! y[b, i, j, c] = x[b, floor(i h / H), floor(j w / W), c]       (h, w) -> (H, W)
//! d_x           = the sum of d_y over the pixels that copied it
//! ```

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{Host, Real, buffer, per_dtype, tensor_from};

/// x (B, h, w, C) -> (B, height, width, C); not smaller than x.
pub fn upsample_nearest_fwd(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (_, h, w, _) = x.dims4()?;
    if height < h || width < w {
        bail!("upsampling {h}x{w} pixels to {height}x{width}");
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::upsample_fwd(x, height, width);
    }
    per_dtype!(x, upsample_fwd_cpu(x, height, width))
}

/// cotangent (B, height, width, C) -> (B, h, w, C).
pub fn upsample_nearest_bwd(cotangent: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cotangent.device().is_cuda() {
        return cuda::upsample_bwd(cotangent, h, w);
    }
    per_dtype!(cotangent, upsample_bwd_cpu(cotangent, h, w))
}

fn upsample_fwd_cpu<T: Real>(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (batch, h, w, c) = x.dims4()?;
    let data = Host::<T>::read(x)?;
    let mut y = buffer(batch * height * width * c);
    y.par_chunks_mut(width * c).enumerate().for_each(|(line, y)| {
        let source = ((line / height) * h + (line % height) * h / height) * w;
        for (j, pixel) in y.chunks_mut(c).enumerate() {
            pixel.copy_from_slice(&data[(source + j * w / width) * c..][..c]);
        }
    });
    tensor_from(y, (batch, height, width, c))
}

fn upsample_bwd_cpu<T: Real>(cotangent: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (batch, height, width, c) = cotangent.dims4()?;
    let dy = Host::<T>::read(cotangent)?;
    let mut dx = buffer(batch * h * w * c);
    dx.par_chunks_mut(w * c).enumerate().for_each(|(line, dx)| {
        let (b, k) = (line / h, line % h);
        dx.fill(T::zero());
        // the output lines i with floor(i h / height) = k
        for i in (k * height).div_ceil(h)..((k + 1) * height).div_ceil(h) {
            let row = &dy[(b * height + i) * width * c..][..width * c];
            for (j, pixel) in row.chunks(c).enumerate() {
                let target = &mut dx[j * w / width * c..][..c];
                target.iter_mut().zip(pixel).for_each(|(d, p)| *d += *p);
            }
        }
    });
    tensor_from(dx, (batch, h, w, c))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check};

    #[test]
    fn agrees_with_autograd_and_finite_differences() {
        for (h, w, height, width) in [(1, 1, 2, 2), (3, 5, 6, 10), (3, 5, 5, 9), (4, 2, 7, 3), (3, 3, 3, 3)] {
            check(
                &[Case::normal(&[2, h, w, 3], 1)],
                |x| upsample_nearest_fwd(&x[0], height, width),
                |_, dy| Ok(vec![upsample_nearest_bwd(dy, h, w)?]),
                |x| {
                    let rows: Vec<u32> = (0..height).map(|i| (i * h / height) as u32).collect();
                    let cols: Vec<u32> = (0..width).map(|j| (j * w / width) as u32).collect();
                    let device = x[0].device();
                    x[0].index_select(&Tensor::new(rows, device)?, 1)?.index_select(&Tensor::new(cols, device)?, 2)
                },
            );
        }
    }
}
