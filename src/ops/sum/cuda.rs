use candle_core::{Result, Tensor};

use crate::ops::cuda::{Kernel, unset};

pub(super) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let y = unset(a, a.shape(), a.dtype())?;
    let mut kernel = Kernel::of("elementwise", "add", a)?;
    kernel.tensor(&y)?.tensor(a)?.tensor(b)?.int(a.elem_count());
    kernel.launch_map(a.elem_count(), &[&y, a, b])?;
    Ok(y)
}

pub(super) fn add_channels(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let (n, channels) = (x.elem_count(), shift.elem_count());
    let y = unset(x, x.shape(), x.dtype())?;
    let mut kernel = Kernel::of("elementwise", "add_channels", x)?;
    kernel.tensor(&y)?.tensor(x)?.tensor(shift)?.int(n / channels.max(1)).int(channels);
    kernel.launch_rows(n, &[channels], &[&y, x, shift])?;
    Ok(y)
}
