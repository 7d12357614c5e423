//! Sums of tensors: the residual connections, their gradients, and shifts by channel.
//!
//! ```text
//! y = a + b                     d_a = d_b = d_y
//! y[b, ..., c] = x + s[c]       d_x = d_y           s: one number a channel, frozen (the time embedding); or s[b, c]
//! ```

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::vector::vectorised;
use super::{Host, Real, buffer, per_dtype, tensor_from};

const BLOCK: usize = 1 << 14;

/// Elementwise sum of two tensors of one shape.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.dims() != b.dims() {
        bail!("adding tensors of shapes {:?} and {:?}", a.dims(), b.dims());
    }
    #[cfg(feature = "cuda")]
    if a.device().is_cuda() {
        return cuda::add(a, b);
    }
    per_dtype!(a, add_cpu(a, b))
}

/// x (..., C) plus one number a channel, shift (C) or (1, C); or, for x (B, ..., C), one of each image's own, shift (B, C).
pub fn add_channels(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    if let (Some(&batch @ 2..), 2, true) = (x.dims().first(), shift.rank(), shift.dims()[0] > 1) {
        if shift.dims()[0] != batch {
            bail!("adding {:?} to the channels of {:?}", shift.dims(), x.dims());
        }
        let image = |i: usize| add_channels(&x.narrow(0, i, 1)?.contiguous()?, &shift.get(i)?.contiguous()?);
        return Tensor::cat(&(0..batch).map(image).collect::<Result<Vec<_>>>()?, 0);
    }
    if x.dims().last() != Some(&shift.elem_count()) {
        bail!("adding {:?} to the channels of {:?}", shift.dims(), x.dims());
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::add_channels(x, shift);
    }
    per_dtype!(x, add_channels_cpu(x, shift))
}

fn add_cpu<T: Real>(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a_data, b_data) = (Host::<T>::read(a)?, Host::<T>::read(b)?);
    let mut y = buffer(a_data.len());
    y.par_chunks_mut(BLOCK).zip(a_data.par_chunks(BLOCK).zip(b_data.par_chunks(BLOCK))).for_each(|(y, (a, b))| {
        vectorised(
            #[inline(always)]
            || {
                for (y, (a, b)) in y.iter_mut().zip(a.iter().zip(b)) {
                    *y = *a + *b;
                }
            },
        );
    });
    tensor_from(y, a.dims())
}

fn add_channels_cpu<T: Real>(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let (data, shift) = (Host::<T>::read(x)?, Host::<T>::read(shift)?);
    let shift: &[T] = &shift;
    let rows = (BLOCK / shift.len()).max(1) * shift.len();
    let mut y = buffer(data.len());
    y.par_chunks_mut(rows).zip(data.par_chunks(rows)).for_each(|(y, x)| {
        vectorised(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_mut(shift.len()).zip(x.chunks(shift.len())) {
                    for (y, (x, s)) in y.iter_mut().zip(x.iter().zip(shift)) {
                        *y = *x + *s;
                    }
                }
            },
        );
    });
    tensor_from(y, x.dims())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check};

    #[test]
    fn agree_with_autograd_and_finite_differences() {
        check(
            &[Case::normal(&[3, 41], 1), Case::normal(&[3, 41], 2)],
            |x| add(&x[0], &x[1]),
            |_, d| Ok(vec![d.clone(), d.clone()]),
            |x| &x[0] + &x[1],
        );
        let shifts = Case::normal(&[2, 7], 4);
        check(
            &[Case::normal(&[2, 5, 7], 1)],
            |x| add_channels(&x[0], &shifts.to_dtype(x[0].dtype())?),
            |_, d| Ok(vec![d.clone()]),
            |x| x[0].broadcast_add(&shifts.unsqueeze(1)?.to_dtype(x[0].dtype())?),
        );
        let shift = Case::normal(&[7], 3);
        check(
            &[Case::normal(&[2, 5, 7], 1)],
            |x| add_channels(&x[0], &shift.to_dtype(x[0].dtype())?),
            |_, d| Ok(vec![d.clone()]),
            |x| x[0].broadcast_add(&shift.to_dtype(x[0].dtype())?),
        );
    }

    #[test]
    fn other_shapes_are_errors() {
        assert!(add(&Case::normal(&[2], 1), &Case::normal(&[3], 1)).is_err());
        assert!(add_channels(&Case::normal(&[2, 3], 1), &Case::normal(&[2], 1)).is_err());
        assert!(add_channels(&Case::normal(&[2, 3], 1), &Case::normal(&[3, 3], 1)).is_err());
    }
}
