//! Layers out of named weights, their shapes checked.

use anyhow::Result;
use candle_core::{DType, Tensor};

use super::Weights;
use crate::nn::{Conv2d, GroupNorm, LayerNorm, Linear};
use crate::ops;
use crate::ops::device::Compute;

/// `weight` (out, in), stored so or as a 1x1 convolution (out, in, 1, 1), and `bias` (out).
pub(super) fn linear(w: &Weights, inputs: usize, outputs: usize, bias: bool) -> Result<Linear> {
    let as_convolution = w.shape("weight").is_some_and(|shape| shape.len() == 4);
    let weight = if as_convolution {
        w.get("weight", &[outputs, inputs, 1, 1])?.reshape((outputs, inputs))?
    } else {
        w.get("weight", &[outputs, inputs])?
    };
    Ok(Linear::new(&weight, bias.then(|| w.get("bias", &[outputs])).transpose()?)?)
}

/// `weight` (out, in, k, k) and `bias` (out), if there is one.
pub(super) fn conv2d(
    w: &Weights,
    inputs: usize,
    outputs: usize,
    k: usize,
    stride: usize,
    padding: usize,
) -> Result<Conv2d> {
    let weight = w.get("weight", &[outputs, inputs, k, k])?;
    let bias = w.contains("bias").then(|| w.get("bias", &[outputs])).transpose()?;
    Ok(Conv2d(ops::conv2d::Kernel::for_images(&weight, bias, stride, padding, w.images())?))
}

pub(super) fn group_norm(w: &Weights, channels: usize, groups: usize, eps: f64, silu: bool) -> Result<GroupNorm> {
    if groups == 0 || !channels.is_multiple_of(groups) {
        anyhow::bail!(
            "`{}` in {}: {channels} channels do not divide into {groups} groups (norm_num_groups)",
            w.prefix(),
            w.file()
        );
    }
    let (weight, bias) = (w.get("weight", &[channels])?, w.get("bias", &[channels])?);
    Ok(GroupNorm(ops::group_norm::GroupNorm { weight, bias, groups, eps, silu }))
}

pub(super) fn layer_norm(w: &Weights, channels: usize, eps: f64) -> Result<LayerNorm> {
    Ok(LayerNorm(ops::layer_norm::LayerNorm {
        weight: w.get("weight", &[channels])?,
        bias: w.get("bias", &[channels])?,
        eps,
    }))
}

/// (B, C, H, W) in f32 -> (B, H, W, C), contiguous, in the number format of activations: what comes in at a network's border.
pub(super) fn to_inside(x: &Tensor, compute: &Compute) -> candle_core::Result<Tensor> {
    channels_last(x)?.to_dtype(compute.dtype())
}

/// (B, H, W, C) -> (B, C, H, W) in f32, contiguous: what goes out.
pub(super) fn from_inside(x: &Tensor) -> candle_core::Result<Tensor> {
    channels_first(x)?.to_dtype(DType::F32)
}

/// (B, C, H, W) -> (B, H, W, C), contiguous.
pub(crate) fn channels_last(x: &Tensor) -> candle_core::Result<Tensor> {
    x.permute((0, 2, 3, 1))?.contiguous()
}

/// (B, H, W, C) -> (B, C, H, W), contiguous.
pub(crate) fn channels_first(x: &Tensor) -> candle_core::Result<Tensor> {
    x.permute((0, 3, 1, 2))?.contiguous()
}
