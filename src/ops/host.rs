//! Tensors as slices of host memory: the door between candle's storage and the CPU kernels.

use std::marker::PhantomData;
use std::ops::Deref;

use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, StorageRef, Tensor, WithDType};
use num_traits::Float;

/// The element types that the CPU kernels are written for.
pub trait Real: WithDType + Float + std::ops::AddAssign + std::iter::Sum + 'static {
    /// The slice of a storage of this type.
    fn slice(storage: &CpuStorage) -> Option<&[Self]>;
    /// eˣ, in f32 a polynomial that vectorises.
    fn exp_fast(self) -> Self;
    /// (Φ(x), φ(x)) of the standard normal distribution.
    fn normal(self) -> (Self, Self);
    fn lit(value: f64) -> Self;
    fn f64(self) -> f64;
    /// The slice itself where the type is f32.
    fn as_f32(data: &[Self]) -> Option<&[f32]>;
    fn as_f32_mut(data: &mut [Self]) -> Option<&mut [f32]>;
}

impl Real for f32 {
    fn slice(storage: &CpuStorage) -> Option<&[f32]> {
        match storage {
            CpuStorage::F32(data) => Some(data),
            _ => None,
        }
    }
    #[inline(always)]
    fn exp_fast(self) -> f32 {
        super::vector::exp_f32(self)
    }
    #[inline(always)]
    fn normal(self) -> (f32, f32) {
        super::vector::normal_f32(self)
    }
    #[inline(always)]
    fn lit(value: f64) -> f32 {
        value as f32
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        self.into()
    }
    fn as_f32(data: &[f32]) -> Option<&[f32]> {
        Some(data)
    }
    fn as_f32_mut(data: &mut [f32]) -> Option<&mut [f32]> {
        Some(data)
    }
}

impl Real for f64 {
    fn slice(storage: &CpuStorage) -> Option<&[f64]> {
        match storage {
            CpuStorage::F64(data) => Some(data),
            _ => None,
        }
    }
    fn exp_fast(self) -> f64 {
        self.exp()
    }
    fn normal(self) -> (f64, f64) {
        let cdf = 0.5 * libm::erfc(-self * std::f64::consts::FRAC_1_SQRT_2);
        (cdf, (-0.5 * self * self).exp() / (2.0 * std::f64::consts::PI).sqrt())
    }
    #[inline(always)]
    fn lit(value: f64) -> f64 {
        value
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        self
    }
    fn as_f32(_: &[f64]) -> Option<&[f32]> {
        None
    }
    fn as_f32_mut(_: &mut [f64]) -> Option<&mut [f32]> {
        None
    }
}

/// A contiguous tensor in host memory, read as a slice while the guard lives. Half precision is read as f32.
pub(crate) struct Host<'a, T>(Data<'a, T>);

enum Data<'a, T> {
    InPlace { guard: StorageRef<'a>, start: usize, len: usize },
    Widened(Vec<T>),
}

impl<'a, T: Real> Host<'a, T> {
    /// # Errors
    /// The tensor is not contiguous, not in host memory, or of another element type.
    pub(crate) fn read(tensor: &'a Tensor) -> Result<Self> {
        let (guard, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!(
                "a kernel needs contiguous data, got strides {:?} for {:?}",
                layout.stride(),
                layout.shape()
            )
        };
        match &*guard {
            Storage::Cpu(storage) if T::slice(storage).is_some() => {}
            Storage::Cpu(CpuStorage::BF16(data)) if T::DTYPE == DType::F32 => {
                return Ok(Self(Data::Widened(data[start..end].iter().map(|x| T::lit(x.to_f64())).collect())));
            }
            Storage::Cpu(CpuStorage::F16(data)) if T::DTYPE == DType::F32 => {
                return Ok(Self(Data::Widened(data[start..end].iter().map(|x| T::lit(x.to_f64())).collect())));
            }
            Storage::Cpu(_) => {
                candle_core::bail!("a kernel for {:?} was given {:?}", T::DTYPE, tensor.dtype())
            }
            _ => candle_core::bail!("this operation has no kernel for {:?} yet", tensor.device().location()),
        }
        Ok(Self(Data::InPlace { guard, start, len: end - start }))
    }
}

impl<T: Real> Deref for Host<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        let (guard, start, len) = match &self.0 {
            Data::InPlace { guard, start, len } => (guard, *start, *len),
            Data::Widened(data) => return data,
        };
        match &**guard {
            Storage::Cpu(storage) => {
                let data = T::slice(storage).expect("checked in Host::read");
                &data[start..start + len]
            }
            _ => unreachable!("checked in Host::read"),
        }
    }
}

/// bf16 and f16 as f32, others as they are.
pub(crate) fn widened(tensor: &Tensor) -> Result<Tensor> {
    match tensor.dtype() {
        DType::BF16 | DType::F16 => tensor.to_dtype(DType::F32),
        _ => Ok(tensor.clone()),
    }
}

/// What a kernel gives, rounded to the number format of activations.
pub(crate) trait Rounded: Sized {
    fn rounded(self, dtype: DType) -> Result<Self>;
}

impl Rounded for Tensor {
    fn rounded(self, dtype: DType) -> Result<Self> {
        self.to_dtype(dtype)
    }
}

impl Rounded for (Tensor, Tensor, Tensor) {
    fn rounded(self, dtype: DType) -> Result<Self> {
        Ok((self.0.to_dtype(dtype)?, self.1.to_dtype(dtype)?, self.2.to_dtype(dtype)?))
    }
}

impl Rounded for bool {
    fn rounded(self, _: DType) -> Result<Self> {
        Ok(self)
    }
}

/// A buffer of `len` numbers for a kernel that writes each of them before it reads any: its contents are arbitrary.
///
/// Filling it with zeros would be a pass over memory in one thread. In tests it is full of NaN, which a kernel that forgets
/// an element passes on.
pub(crate) fn buffer<T: Real>(len: usize) -> Vec<T> {
    let mut data = Vec::<T>::with_capacity(len);
    let start = data.as_mut_ptr();
    // SAFETY: as far as the compiler can know, these no instructions write the memory behind the pointer; every pattern of
    // bits is a number of T (f32 or f64).
    unsafe { std::arch::asm!("/* {} */", in(reg) start, options(nostack, preserves_flags)) };
    // SAFETY: the capacity is `len`, and the elements count as written.
    unsafe { data.set_len(len) };
    if cfg!(test) {
        data.fill(T::nan());
    }
    data
}

/// A host tensor that takes over `data`.
pub(crate) fn tensor_from<T: Real>(data: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &Device::Cpu)
}

/// A mutable slice that several threads write, each in places of its own (interleaved, so that it cannot be split).
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<'a, T> {
    pointer: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: the pointer comes from an exclusive borrow of a slice of `Send` elements; those who dereference it
// promise in their own unsafe block that no two threads touch the same element.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Self { pointer: data.as_mut_ptr(), len: data.len(), life: PhantomData }
    }
    /// The address of element `offset`.
    pub(crate) fn at(&self, offset: usize) -> *mut T {
        assert!(offset < self.len, "offset {offset} outside a buffer of {}", self.len);
        // In bounds by the assertion; creating the pointer is not a dereference.
        self.pointer.wrapping_add(offset)
    }
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

/// Calls a kernel generic over [`Real`] with the tensor's element type. In half precision the kernel computes in f32, and
/// its results are rounded: what a GPU does, for checking its roundings on a CPU.
macro_rules! per_dtype {
    ($tensor:expr, $kernel:ident ( $($argument:expr),* $(,)? )) => {
        match $tensor.dtype() {
            candle_core::DType::F32 => $kernel::<f32>($($argument),*),
            candle_core::DType::F64 => $kernel::<f64>($($argument),*),
            half @ (candle_core::DType::BF16 | candle_core::DType::F16) => {
                $crate::ops::Rounded::rounded($kernel::<f32>($($argument),*)?, half)
            }
            other => candle_core::bail!("{} has no CPU kernel for {other:?}: use f32", stringify!($kernel)),
        }
    };
}
pub(crate) use per_dtype;
