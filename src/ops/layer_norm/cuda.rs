use candle_core::{Result, Tensor};

use super::LayerNorm;
use crate::ops::cuda::{Kernel, unset};

/// Rows of a block, one to a warp.
const ROWS: usize = 8;

/// Launches with the sizes and eps, which both directions end with.
fn launch(kernel: Kernel, x: &Tensor, norm: &LayerNorm) -> Result<()> {
    let channels = norm.weight.elem_count();
    let rows = x.elem_count() / channels.max(1);
    let vector = channels.is_multiple_of(8) && kernel.aligned()?;
    let kernel = kernel.int("rows", rows).int("channels", channels).float("eps", norm.eps).flag("vector", vector);
    kernel.launch([rows.div_ceil(ROWS), 1, 1], 32 * ROWS, 0)
}

pub(super) fn layer_norm_fwd(x: &Tensor, norm: &LayerNorm) -> Result<Tensor> {
    let y = unset(x, x.shape(), x.dtype())?;
    let kernel = Kernel::of("norm", "layer_norm_fwd", x)?.output("y", &y).input("x", x);
    launch(kernel.input("weight", &norm.weight).input("bias", &norm.bias), x, norm)?;
    Ok(y)
}

pub(super) fn layer_norm_bwd(cotangent: &Tensor, x: &Tensor, norm: &LayerNorm) -> Result<Tensor> {
    let dx = unset(x, x.shape(), x.dtype())?;
    let kernel = Kernel::of("norm", "layer_norm_bwd", x)?.output("dx", &dx).input("dy", cotangent).input("x", x);
    launch(kernel.input("weight", &norm.weight), x, norm)?;
    Ok(dx)
}
