use candle_core::{DType, Device, Result, Tensor};

use crate::ops::cuda::{Kernel, read};

/// Blocks of the check; each thread goes on in strides.
const BLOCKS: usize = 528;

/// Sets `flags[index]` where `x` has a number that is none, and leaves it otherwise. Does not wait.
pub(super) fn mark(flags: &Tensor, index: usize, x: &Tensor) -> Result<()> {
    let x = x.contiguous()?;
    let mut kernel = Kernel::of("elementwise", "not_finite", &x)?;
    kernel.typed(&flags.narrow(0, index, 1)?, DType::F32)?.tensor(&x)?.int(x.elem_count());
    kernel.launch([x.elem_count().div_ceil(256).min(BLOCKS), 1, 1], 256, 0)
}

/// Flags that no check has set.
pub(super) fn flags(count: usize, device: &Device) -> Result<Tensor> {
    Tensor::zeros(count, DType::F32, device)
}

/// Which flags are set. Waits.
pub(super) fn set(flags: &Tensor) -> Result<Vec<bool>> {
    Ok(read(flags)?.into_iter().map(|flag| flag != 0.0).collect())
}

pub(super) fn is_finite(x: &Tensor) -> Result<bool> {
    let flags = flags(1, x.device())?;
    mark(&flags, 0, x)?;
    Ok(!set(&flags)?[0])
}
