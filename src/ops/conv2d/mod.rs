//! Two-dimensional convolution over frozen kernels, channels-last.
//!
//! ```text
//! y[b, i, j, o]    = bias[o] + sum_{u, v, c} x[b, s i + u - p, s j + v - p, c] K[u, v, c, o]
//! d_x[b, k, l, c]  = sum_{u, v, o} d_y[b, (k + p - u) / s, (l + p - v) / s, o] K[u, v, c, o]   where s divides
//! ```
//!
//! Both are products over taps (`ops::frozen`): an output pixel meets, for each tap, the channels of the source pixel that
//! the tap reads. There is no whole-image im2col, and the kernel is frozen: it has no gradient. 3x3 kernels of stride 1
//! need fewer products by Winograd's algorithm (`winograd`), in f32 on a CPU with AVX-512.

mod cpu;
#[cfg(feature = "cuda")]
mod cudnn;
#[cfg(target_arch = "x86_64")]
mod winograd;

#[cfg(target_arch = "x86_64")]
use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::frozen::Frozen;
use super::sum::add;
use super::{per_dtype, widened};
use cpu::{conv2d_bwd as conv2d_bwd_cpu, conv2d_fwd as conv2d_fwd_cpu};
#[cfg(target_arch = "x86_64")]
use winograd::Winograd;

#[derive(Clone, Debug)]
enum Weight {
    /// (out, kh kw, in)
    Taps(Frozen),
    #[cfg(target_arch = "x86_64")]
    Winograd(Arc<Winograd>),
    /// (out, kh, kw, in), on a GPU
    Device(Tensor),
}

/// What is known of the images that a kernel will meet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Images {
    #[default]
    Any,
    /// A few hundred pixels: reading a large kernel costs as much as the products with it.
    Small,
}

impl Weight {
    fn new(weight: &Tensor, stride: usize, padding: usize, images: Images) -> Result<Self> {
        if !weight.device().is_cpu() {
            return Ok(Self::Device(weight.permute((0, 2, 3, 1))?.contiguous()?));
        }
        let weight = &widened(weight)?;
        #[cfg(target_arch = "x86_64")]
        if let Some(winograd) = Winograd::new(weight, stride, padding, images)? {
            return Ok(Self::Winograd(Arc::new(winograd)));
        }
        let (out, inputs, kh, kw) = weight.dims4()?;
        Ok(Self::Taps(Frozen::new(&weight.permute((0, 2, 3, 1))?.reshape((out, kh * kw, inputs))?)?))
    }
}

/// A frozen kernel with its geometry.
#[derive(Clone, Debug)]
pub struct Kernel {
    weight: Weight,
    /// (kh, kw)
    sides: (usize, usize),
    inputs: usize,
    outputs: usize,
    bias: Option<Tensor>,
    stride: usize,
    padding: usize,
}

impl Kernel {
    /// From PyTorch's layout: weight (out, in, kh, kw), bias (out). `padding` is symmetric.
    pub fn new(weight: &Tensor, bias: Option<Tensor>, stride: usize, padding: usize) -> Result<Self> {
        Self::for_images(weight, bias, stride, padding, Images::Any)
    }

    /// As [`Self::new`], in the form that suits these images best; the numbers are the same but for rounding.
    pub fn for_images(
        weight: &Tensor,
        bias: Option<Tensor>,
        stride: usize,
        padding: usize,
        images: Images,
    ) -> Result<Self> {
        let (out, inputs, kh, kw) = weight.dims4()?;
        if stride == 0 {
            bail!("conv2d: the stride must be at least 1");
        }
        if let Some(bias) = &bias
            && bias.dims() != [out]
        {
            bail!("conv2d: a bias of shape {:?} for {out} output channels", bias.dims());
        }
        let weight = Weight::new(weight, stride, padding, images)?;
        Ok(Self { weight, sides: (kh, kw), inputs, outputs: out, bias, stride, padding })
    }
    pub fn in_channels(&self) -> usize {
        self.inputs
    }
    pub fn out_channels(&self) -> usize {
        self.outputs
    }
    /// Side of the output along an axis of `n` pixels whose kernel side is `k`.
    fn out_side(&self, n: usize, k: usize) -> Result<usize> {
        if n + 2 * self.padding < k {
            bail!("conv2d: an image side of {n} pixels is smaller than the kernel's {k}");
        }
        Ok((n + 2 * self.padding - k) / self.stride + 1)
    }
}

/// x (B, H, W, in) -> (B, H', W', out).
pub fn conv2d_fwd(x: &Tensor, kernel: &Kernel) -> Result<Tensor> {
    let channels = x.dims4()?.3;
    if channels != kernel.in_channels() {
        bail!("conv2d: {channels} channels for a kernel of {}", kernel.in_channels());
    }
    #[cfg(feature = "cuda")]
    if let Weight::Device(weight) = &kernel.weight {
        return cudnn::conv2d_fwd(x, kernel, weight, None);
    }
    per_dtype!(x, conv2d_fwd_cpu(x, kernel))
}

/// [`conv2d_fwd`] plus a residual (B, H', W', out), from which the convolution starts on a GPU.
pub fn conv2d_onto_fwd(x: &Tensor, kernel: &Kernel, residual: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Weight::Device(weight) = &kernel.weight {
        return cudnn::conv2d_fwd(x, kernel, weight, Some(residual));
    }
    add(&conv2d_fwd(x, kernel)?, residual)
}

/// The gradient of the input, which had `height` x `width` pixels: cotangent (B, H', W', out) -> (B, H, W, in).
pub fn conv2d_bwd(cotangent: &Tensor, kernel: &Kernel, height: usize, width: usize) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Weight::Device(weight) = &kernel.weight {
        return cudnn::conv2d_bwd(cotangent, kernel, weight, height, width);
    }
    per_dtype!(cotangent, conv2d_bwd_cpu(cotangent, kernel, height, width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check};

    #[test]
    fn agrees_with_autograd_and_finite_differences() {
        // (h, w, in, out, k, stride, padding): odd sides, one pixel, even by odd at stride 2
        for (h, w, i, o, k, s, p) in [
            (5, 7, 3, 4, 3, 1, 1),
            (1, 1, 2, 3, 3, 1, 1),
            (6, 5, 3, 2, 3, 2, 1),
            (7, 8, 2, 5, 3, 2, 1),
            (4, 4, 3, 3, 1, 1, 0),
            (9, 6, 2, 2, 5, 1, 2),
            (40, 33, 5, 6, 3, 1, 1),
            (12, 9, 20, 50, 3, 1, 1),
            (8, 8, 35, 17, 3, 2, 1),
            (1, 1, 16, 16, 3, 1, 1),
            (13, 11, 37, 70, 3, 1, 1),
            (16, 30, 50, 16, 3, 1, 1),
        ] {
            let weight = Case::normal(&[o, i, k, k], 1);
            let bias = Case::normal(&[o], 2);
            let kernel =
                |like: &Tensor| Kernel::new(&weight.to_dtype(like.dtype())?, Some(bias.to_dtype(like.dtype())?), s, p);
            check(
                &[Case::normal(&[2, h, w, i], 3)],
                |x| conv2d_fwd(&x[0], &kernel(&x[0])?),
                |_, dy| Ok(vec![conv2d_bwd(dy, &kernel(dy)?, h, w)?]),
                |x| reference(&x[0], &weight.to_dtype(x[0].dtype())?, &bias.to_dtype(x[0].dtype())?, s, p),
            );
        }
    }

    /// The convolution as a sum over taps of shifted, strided slices times matrices: candle's own conv2d has no
    /// backward for an even by odd input at stride 2.
    fn reference(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize, padding: usize) -> Result<Tensor> {
        let (o, _, kh, kw) = weight.dims4()?;
        let (b, h, w, _) = x.dims4()?;
        let (oh, ow) = ((h + 2 * padding - kh) / stride + 1, (w + 2 * padding - kw) / stride + 1);
        // enough zeros behind, so that every strided slice can be cut as whole groups of `stride`
        let x =
            x.pad_with_zeros(1, padding, padding + stride * oh)?.pad_with_zeros(2, padding, padding + stride * ow)?;
        let mut y = bias.broadcast_as((b, oh, ow, o))?.contiguous()?;
        for u in 0..kh {
            for v in 0..kw {
                let taps = x.narrow(1, u, oh * stride)?.narrow(2, v, ow * stride)?;
                let channels = taps.dims()[3];
                let taps = taps
                    .contiguous()?
                    .reshape((b, oh, stride, ow, stride, channels))?
                    .narrow(2, 0, 1)?
                    .narrow(4, 0, 1)?;
                let taps = taps.contiguous()?.reshape((b * oh * ow, channels))?;
                let matrix = weight.narrow(2, u, 1)?.narrow(3, v, 1)?.squeeze(3)?.squeeze(2)?.t()?;
                y = (y + taps.matmul(&matrix)?.reshape((b, oh, ow, o))?)?;
            }
        }
        Ok(y)
    }

    #[test]
    fn agrees_with_candle_in_the_forward_pass() {
        let weight = Case::normal(&[6, 5, 3, 3], 1);
        let kernel = Kernel::new(&weight, None, 2, 1).unwrap();
        let x = Case::normal(&[2, 5, 9, 7], 2);
        let expected = x.conv2d(&weight, 1, 2, 1, 1).unwrap().permute((0, 2, 3, 1)).unwrap();
        let y = conv2d_fwd(&x.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap(), &kernel).unwrap();
        assert!(crate::ops::testing::relative_error(&y, &expected) < 1e-12);
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_gpu_agrees_with_the_cpu() {
        use crate::ops::testing::{gpu_tolerance, gpus, relative_error};
        for compute in gpus() {
            for (h, w, i, o, k, s, p) in [
                (5, 7, 3, 4, 3, 1, 1),
                (1, 1, 2, 3, 3, 1, 1),
                (6, 5, 3, 2, 3, 2, 1),
                (7, 8, 2, 5, 3, 2, 1),
                (9, 6, 2, 2, 5, 1, 2),
                (32, 48, 4, 320, 3, 1, 1),
                (16, 16, 320, 640, 3, 1, 1),
                (33, 31, 64, 64, 3, 2, 1),
                (64, 64, 128, 3, 3, 1, 1),
            ] {
                let case = |dims: &[usize], seed| Case::normal(dims, seed).to_dtype(compute.dtype()).unwrap();
                let (weight, bias, x) = (case(&[o, i, k, k], 1), case(&[o], 2), case(&[2, h, w, i], 3));
                let there = |t: &Tensor| t.to_device(compute.device()).unwrap();
                let here = Kernel::new(&weight, Some(bias.clone()), s, p).unwrap();
                let gpu = Kernel::new(&there(&weight), Some(there(&bias)), s, p).unwrap();
                let y = conv2d_fwd(&x, &here).unwrap();
                let (dy, residual) = (case(y.dims(), 4), case(y.dims(), 5));
                let sum = conv2d_onto_fwd(&x, &here, &residual).unwrap();
                let pairs = [
                    (conv2d_onto_fwd(&there(&x), &gpu, &there(&residual)), sum),
                    (conv2d_fwd(&there(&x), &gpu), y),
                    (conv2d_bwd(&there(&dy), &gpu, h, w), conv2d_bwd(&dy, &here, h, w).unwrap()),
                ];
                for (found, expected) in pairs {
                    let error =
                        relative_error(&found.unwrap().to_device(&candle_core::Device::Cpu).unwrap(), &expected);
                    assert!(error < gpu_tolerance(&compute), "{h}x{w} {i}->{o} {k}/{s}, {compute:?}: {error}");
                }
            }
        }
    }

    #[test]
    fn an_image_smaller_than_the_kernel_is_an_error() {
        let kernel = Kernel::new(&Case::normal(&[1, 1, 3, 3], 1), None, 1, 0).unwrap();
        let message = conv2d_fwd(&Case::normal(&[1, 2, 2, 1], 1), &kernel).unwrap_err().to_string();
        assert!(message.contains("smaller than the kernel"), "{message}");
    }
}
