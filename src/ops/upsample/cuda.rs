use candle_core::{Result, Tensor};

use crate::ops::cuda::{Kernel, unset};

pub(super) fn upsample_fwd(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (batch, h, w, channels) = x.dims4()?;
    let y = unset(x, (batch, height, width, channels), x.dtype())?;
    let kernel = Kernel::of("elementwise", "upsample_fwd", x)?.output("y", &y).input("x", x).int("batch", batch);
    let kernel = kernel.int("h", h).int("w", w).int("height", height).int("width", width).int("channels", channels);
    kernel.launch_rows(y.elem_count(), &[channels])?;
    Ok(y)
}

pub(super) fn upsample_bwd(cotangent: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (batch, height, width, channels) = cotangent.dims4()?;
    let dx = unset(cotangent, (batch, h, w, channels), cotangent.dtype())?;
    let kernel = Kernel::of("elementwise", "upsample_bwd", cotangent)?;
    let kernel = kernel.output("dx", &dx).input("dy", cotangent).int("batch", batch);
    let kernel = kernel.int("h", h).int("w", w).int("height", height).int("width", width).int("channels", channels);
    kernel.launch_rows(dx.elem_count(), &[channels])?;
    Ok(dx)
}
