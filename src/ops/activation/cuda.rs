use candle_core::{Result, Tensor};

use super::Activation;
use crate::ops::cuda::{Kernel, unset};

pub(super) fn activation_fwd(x: &Tensor, function: Activation) -> Result<Tensor> {
    let y = unset(x, x.shape(), x.dtype())?;
    let n = x.elem_count();
    let kernel = Kernel::of("elementwise", "activation_fwd", x)?;
    kernel.output("y", &y).input("x", x).int("n", n).int("function", function as usize).launch_map(n)?;
    Ok(y)
}

pub(super) fn activation_bwd(cotangent: &Tensor, x: &Tensor, function: Activation) -> Result<Tensor> {
    let dx = unset(x, x.shape(), x.dtype())?;
    let n = x.elem_count();
    let kernel = Kernel::of("elementwise", "activation_bwd", x)?.output("dx", &dx).input("dy", cotangent).input("x", x);
    kernel.int("n", n).int("function", function as usize).launch_map(n)?;
    Ok(dx)
}
