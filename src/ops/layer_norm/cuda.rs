use candle_core::{Result, Tensor};

use super::LayerNorm;
use crate::ops::cuda::{Kernel, aligned, unset};

/// Rows of a block, one to a warp.
const ROWS: usize = 8;

/// Launches with the sizes and eps, which both directions end with.
fn launch(kernel: &mut Kernel, x: &Tensor, norm: &LayerNorm, tensors: &[&Tensor]) -> Result<()> {
    let channels = norm.weight.elem_count();
    let rows = x.elem_count() / channels.max(1);
    let vector = channels.is_multiple_of(8) && aligned(tensors)?;
    kernel.int(rows).int(channels).float(norm.eps).int(vector.into());
    kernel.launch([rows.div_ceil(ROWS), 1, 1], 32 * ROWS, 0)
}

pub(super) fn layer_norm_fwd(x: &Tensor, norm: &LayerNorm) -> Result<Tensor> {
    let y = unset(x, x.shape(), x.dtype())?;
    let mut kernel = Kernel::of("norm", "layer_norm_fwd", x)?;
    kernel.tensor(&y)?.tensor(x)?.tensor(&norm.weight)?.tensor(&norm.bias)?;
    launch(&mut kernel, x, norm, &[&y, x, &norm.weight, &norm.bias])?;
    Ok(y)
}

pub(super) fn layer_norm_bwd(cotangent: &Tensor, x: &Tensor, norm: &LayerNorm) -> Result<Tensor> {
    let dx = unset(x, x.shape(), x.dtype())?;
    let mut kernel = Kernel::of("norm", "layer_norm_bwd", x)?;
    kernel.tensor(&dx)?.tensor(cotangent)?.tensor(x)?.tensor(&norm.weight)?;
    launch(&mut kernel, x, norm, &[&dx, cotangent, x, &norm.weight])?;
    Ok(dx)
}
