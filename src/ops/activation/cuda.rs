use candle_core::{Result, Tensor};

use super::Activation;
use crate::ops::cuda::{Kernel, unset};

pub(super) fn activation_fwd(x: &Tensor, function: Activation) -> Result<Tensor> {
    let y = unset(x, x.shape(), x.dtype())?;
    let mut kernel = Kernel::of("elementwise", "activation_fwd", x)?;
    kernel.tensor(&y)?.tensor(x)?.int(x.elem_count()).int(function as usize);
    kernel.launch_map(x.elem_count(), &[&y, x])?;
    Ok(y)
}

pub(super) fn activation_bwd(cotangent: &Tensor, x: &Tensor, function: Activation) -> Result<Tensor> {
    let dx = unset(x, x.shape(), x.dtype())?;
    let mut kernel = Kernel::of("elementwise", "activation_bwd", x)?;
    kernel.tensor(&dx)?.tensor(cotangent)?.tensor(x)?.int(x.elem_count()).int(function as usize);
    kernel.launch_map(x.elem_count(), &[&dx, cotangent, x])?;
    Ok(dx)
}
