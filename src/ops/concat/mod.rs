//! Two tensors side by side along the last axis: the UNet's skip connections.
//!
//! ```text
//! y = [a, b]  (..., n + m)       d_a, d_b = the columns of d_y
//! ```

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor, bail};

/// a (..., n), b (..., m) -> (..., n + m).
pub fn concat_last_fwd(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let Some(last) =
        a.rank().checked_sub(1).filter(|last| b.rank() == last + 1 && a.dims()[..*last] == b.dims()[..*last])
    else {
        bail!("tensors of shapes {:?} and {:?} side by side", a.dims(), b.dims());
    };
    #[cfg(feature = "cuda")]
    if a.device().is_cuda() {
        return cuda::concat_last_fwd(a, b, a.dims()[last], b.dims()[last]);
    }
    Tensor::cat(&[a, b], last)?.contiguous()
}

/// cotangent (..., left + right) -> the gradients (..., left) and (..., right).
pub fn concat_last_bwd(cotangent: &Tensor, left: usize, right: usize) -> Result<(Tensor, Tensor)> {
    if cotangent.dims().last() != Some(&(left + right)) {
        bail!("a cotangent of shape {:?} for {left} and {right} columns", cotangent.dims());
    }
    #[cfg(feature = "cuda")]
    if cotangent.device().is_cuda() {
        return cuda::concat_last_bwd(cotangent, left, right);
    }
    let last = cotangent.rank() - 1;
    Ok((cotangent.narrow(last, 0, left)?.contiguous()?, cotangent.narrow(last, left, right)?.contiguous()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check};

    #[test]
    fn agrees_with_autograd_and_finite_differences() {
        check(
            &[Case::normal(&[2, 5, 3], 1), Case::normal(&[2, 5, 4], 2)],
            |x| concat_last_fwd(&x[0], &x[1]),
            |_, d| concat_last_bwd(d, 3, 4).map(|(a, b)| vec![a, b]),
            |x| Tensor::cat(&[&x[0], &x[1]], 2),
        );
    }

    #[test]
    fn other_shapes_are_errors() {
        assert!(concat_last_fwd(&Case::normal(&[2, 3], 1), &Case::normal(&[3, 3], 1)).is_err());
        assert!(concat_last_bwd(&Case::normal(&[2, 3], 1), 1, 1).is_err());
    }
}
