use candle_core::{Result, Tensor};

use crate::ops::cuda::{Kernel, unset};

pub(super) fn concat_last_fwd(a: &Tensor, b: &Tensor, left: usize, right: usize) -> Result<Tensor> {
    let mut dims = a.dims().to_vec();
    dims.pop();
    dims.push(left + right);
    let y = unset(a, dims, a.dtype())?;
    let n = y.elem_count();
    let kernel = Kernel::of("elementwise", "concat_fwd", a)?.output("y", &y).input("a", a).input("b", b);
    let kernel = kernel.int("rows", n / (left + right).max(1)).int("left", left).int("right", right);
    kernel.launch_rows(n, &[left, right])?;
    Ok(y)
}

pub(super) fn concat_last_bwd(cotangent: &Tensor, left: usize, right: usize) -> Result<(Tensor, Tensor)> {
    let part = |width: usize| {
        let mut dims = cotangent.dims().to_vec();
        dims.pop();
        dims.push(width);
        unset(cotangent, dims, cotangent.dtype())
    };
    let (a, b) = (part(left)?, part(right)?);
    let n = cotangent.elem_count();
    let kernel = Kernel::of("elementwise", "concat_bwd", cotangent)?;
    let kernel = kernel.output("a", &a).output("b", &b).input("y", cotangent);
    let kernel = kernel.int("rows", n / (left + right).max(1)).int("left", left).int("right", right);
    kernel.launch_rows(n, &[left, right])?;
    Ok((a, b))
}
