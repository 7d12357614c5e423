use candle_core::{Result, Tensor};

use crate::ops::cuda::{Kernel, unset};

pub(super) fn concat_last_fwd(a: &Tensor, b: &Tensor, left: usize, right: usize) -> Result<Tensor> {
    let mut dims = a.dims().to_vec();
    dims.pop();
    dims.push(left + right);
    let y = unset(a, dims, a.dtype())?;
    let mut kernel = Kernel::of("elementwise", "concat_fwd", a)?;
    kernel.tensor(&y)?.tensor(a)?.tensor(b)?.int(y.elem_count() / (left + right).max(1)).int(left).int(right);
    kernel.launch_rows(y.elem_count(), &[left, right], &[&y, a, b])?;
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
    let mut kernel = Kernel::of("elementwise", "concat_bwd", cotangent)?;
    kernel.tensor(&a)?.tensor(&b)?.tensor(cotangent)?.int(cotangent.elem_count() / (left + right).max(1));
    kernel.int(left).int(right);
    kernel.launch_rows(cotangent.elem_count(), &[left, right], &[&a, &b, cotangent])?;
    Ok((a, b))
}
