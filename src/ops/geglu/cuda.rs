use candle_core::{Result, Tensor};

use super::half;
use crate::ops::cuda::{Kernel, unset};

pub(super) fn geglu_fwd(x: &Tensor) -> Result<Tensor> {
    let features = half(x)?;
    let rows = x.elem_count() / (2 * features);
    let mut dims = x.dims().to_vec();
    dims.pop();
    dims.push(features);
    let y = unset(x, dims, x.dtype())?;
    let mut kernel = Kernel::of("elementwise", "geglu_fwd", x)?;
    kernel.tensor(&y)?.tensor(x)?.int(rows).int(features);
    kernel.launch_rows(rows * features, &[features], &[&y, x])?;
    Ok(y)
}

pub(super) fn geglu_bwd(cotangent: &Tensor, x: &Tensor) -> Result<Tensor> {
    let features = half(x)?;
    let rows = x.elem_count() / (2 * features);
    let dx = unset(x, x.shape(), x.dtype())?;
    let mut kernel = Kernel::of("elementwise", "geglu_bwd", x)?;
    kernel.tensor(&dx)?.tensor(cotangent)?.tensor(x)?.int(rows).int(features);
    kernel.launch_rows(rows * features, &[features], &[&dx, cotangent, x])?;
    Ok(dx)
}
