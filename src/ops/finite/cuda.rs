use candle_core::{DType, Result, Tensor};

use crate::ops::cuda::{Kernel, read};

/// Blocks of the check; each thread goes on in strides.
const BLOCKS: usize = 528;

/// Makes `slots[index]` (f64) NaN where `x` has a number that is none, and leaves it otherwise. Does not wait.
pub(super) fn mark(slots: &Tensor, index: usize, x: &Tensor) -> Result<()> {
    let x = x.contiguous()?;
    let (slot, n) = (slots.narrow(0, index, 1)?, x.elem_count());
    let kernel = Kernel::of("elementwise", "not_finite", &x)?.output("slot", &slot).input("x", &x).int("n", n);
    kernel.launch([n.div_ceil(256).min(BLOCKS), 1, 1], 256, 0)
}

pub(super) fn is_finite(x: &Tensor) -> Result<bool> {
    let slot = Tensor::zeros(1, DType::F64, x.device())?;
    mark(&slot, 0, x)?;
    Ok(read(&slot)?[0].is_finite())
}
