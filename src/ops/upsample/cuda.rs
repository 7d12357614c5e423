use candle_core::{Result, Tensor};

use crate::ops::cuda::{Kernel, unset};

pub(super) fn upsample_fwd(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (batch, h, w, channels) = x.dims4()?;
    let y = unset(x, (batch, height, width, channels), x.dtype())?;
    let mut kernel = Kernel::of("elementwise", "upsample_fwd", x)?;
    kernel.tensor(&y)?.tensor(x)?.int(batch).int(h).int(w).int(height).int(width).int(channels);
    kernel.launch_rows(y.elem_count(), &[channels], &[&y, x])?;
    Ok(y)
}

pub(super) fn upsample_bwd(cotangent: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (batch, height, width, channels) = cotangent.dims4()?;
    let dx = unset(cotangent, (batch, h, w, channels), cotangent.dtype())?;
    let mut kernel = Kernel::of("elementwise", "upsample_bwd", cotangent)?;
    kernel.tensor(&dx)?.tensor(cotangent)?.int(batch).int(h).int(w).int(height).int(width).int(channels);
    kernel.launch_rows(dx.elem_count(), &[channels], &[&dx, cotangent])?;
    Ok(dx)
}
