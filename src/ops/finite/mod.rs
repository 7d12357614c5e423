//! Whether every number of a tensor is finite, and the ledger in which a step notes what it wants to know of its numbers.

#[cfg(feature = "cuda")]
mod cuda;
mod ledger;

pub use ledger::{Ledger, Number, Readings};

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::vector::vectorised;
use super::{Host, Real, per_dtype};

/// A number that is none, or infinite. The text names the room in which it was found.
///
/// `train` tells it from other errors: a step that meets one is skipped.
#[derive(Debug, thiserror::Error)]
#[error("not a number: {0}")]
pub struct NotANumber(pub String);

/// The error of a check that found a number that is not finite in `room`.
///
/// # Errors
/// Always.
pub fn not_a_number<T>(room: impl Into<String>) -> anyhow::Result<T> {
    Err(NotANumber(room.into()).into())
}

const BLOCK: usize = 1 << 16;

/// Whether no element is a NaN or an infinity. Waits for a GPU; a step notes in its [`Ledger`] what it wants to know.
pub fn is_finite(x: &Tensor) -> Result<bool> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::is_finite(x);
    }
    per_dtype!(x, is_finite_cpu(x))
}

/// Makes `slots[index]` (f64) NaN where `x` has an element that is a NaN or an infinity, and leaves it otherwise. Does not
/// wait for a GPU.
fn mark(slots: &Tensor, index: usize, x: &Tensor) -> Result<()> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::mark(slots, index, x);
    }
    if !is_finite(x)? {
        slots.slice_set(&Tensor::new(&[f64::NAN], x.device())?, 0, index)?;
    }
    Ok(())
}

fn is_finite_cpu<T: Real>(x: &Tensor) -> Result<bool> {
    let x = x.contiguous()?;
    let data = Host::<T>::read(&x)?;
    let data: &[T] = &data;
    Ok(data.par_chunks(BLOCK).all(|block| {
        vectorised(
            #[inline(always)]
            || block.iter().fold(true, |finite, x| finite & x.is_finite()),
        )
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn one_bad_number_among_many_is_found() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0, 17, 199_999] {
                let mut data = vec![1e30f32; 200_000];
                let good = Tensor::from_vec(data.clone(), data.len(), &Device::Cpu).unwrap();
                assert!(is_finite(&good).unwrap());
                data[place] = bad;
                let n = data.len();
                assert!(!is_finite(&Tensor::from_vec(data, n, &Device::Cpu).unwrap()).unwrap());
            }
        }
        assert!(is_finite(&Tensor::from_vec(Vec::<f32>::new(), 0, &Device::Cpu).unwrap()).unwrap());
    }
}
