//! Whether every number of a tensor is finite.

#[cfg(feature = "cuda")]
mod cuda;

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

/// Whether no element is a NaN or an infinity.
pub fn is_finite(x: &Tensor) -> Result<bool> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::is_finite(x);
    }
    per_dtype!(x, is_finite_cpu(x))
}

/// The place of the first tensor with an element that is a NaN or an infinity. Waits for a GPU once, not once a tensor.
pub fn first_not_finite(tensors: &[&Tensor]) -> Result<Option<usize>> {
    #[cfg(feature = "cuda")]
    if let Some(first) = tensors.first().filter(|first| first.device().is_cuda()) {
        let flags = cuda::flags(tensors.len(), first.device())?;
        for (index, tensor) in tensors.iter().enumerate() {
            cuda::mark(&flags, index, tensor)?;
        }
        return Ok(cuda::set(&flags)?.into_iter().position(|set| set));
    }
    for (index, tensor) in tensors.iter().enumerate() {
        if !is_finite(tensor)? {
            return Ok(Some(index));
        }
    }
    Ok(None)
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
        let tensor = |x: f32| Tensor::new(&[1.0, x], &Device::Cpu).unwrap();
        let (good, bad) = (tensor(2.0), tensor(f32::NAN));
        assert_eq!(first_not_finite(&[&good, &bad, &good, &bad]).unwrap(), Some(1));
        assert_eq!(first_not_finite(&[&good, &good]).unwrap(), None);
        assert!(is_finite(&Tensor::from_vec(Vec::<f32>::new(), 0, &Device::Cpu).unwrap()).unwrap());
    }
}
