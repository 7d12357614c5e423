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
    let kernel = Kernel::of("elementwise", "geglu_fwd", x)?.output("y", &y).input("x", x);
    kernel.int("rows", rows).int("features", features).launch_rows(rows * features, &[features])?;
    Ok(y)
}

pub(super) fn geglu_bwd(cotangent: &Tensor, x: &Tensor) -> Result<Tensor> {
    let features = half(x)?;
    let rows = x.elem_count() / (2 * features);
    let dx = unset(x, x.shape(), x.dtype())?;
    let kernel = Kernel::of("elementwise", "geglu_bwd", x)?.output("dx", &dx).input("dy", cotangent).input("x", x);
    kernel.int("rows", rows).int("features", features).launch_rows(rows * features, &[features])?;
    Ok(dx)
}
