//! Kernels on a GPU: loading, launching, and tensors as device pointers.
//!
//! The kernels are the `.cu` files beside this one; `build.rs` compiles each to a fat binary that the program embeds.
//! A kernel `name` exists as `name_f32`, `name_bf16` and `name_f16`. Its parameters are pointers, 64-bit integers and
//! f32 numbers, nothing else, so that a [`Kernel`]'s arguments cannot be of the wrong width.
//!
//! Everything runs on the device's one stream, from one thread: what a kernel writes is there for the next one, and
//! memory that a dropped tensor gives back is reused after the kernels that read it. Nothing here waits for the GPU but
//! [`read`].

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use candle_core::cuda_backend::{CudaDType, CudaDevice, WrapErr};
use candle_core::{DType, Device, Result, Shape, Storage, Tensor, bail};
use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::{CudaFunction, CudaModule, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

/// (file stem, fat binary) of every `.cu` file; empty where `build.rs` found no compiler.
const MODULES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/cuda_modules.rs"));

/// Shared memory that a kernel may have without asking for more.
const PLAIN_SHARED: usize = 48 << 10;

struct Loaded {
    function: CudaFunction,
    /// Bytes of dynamic shared memory that it has been allowed.
    shared: usize,
}

#[derive(Default)]
struct Cache {
    modules: HashMap<(usize, &'static str), Arc<CudaModule>>,
    functions: HashMap<(usize, &'static str, DType), Loaded>,
}

thread_local! {
    /// By the device's number; the GPU is used from one thread.
    static CACHE: RefCell<Cache> = RefCell::default();
}

/// A kernel and its arguments, in the order of its parameters.
pub(crate) struct Kernel {
    device: CudaDevice,
    module: &'static str,
    name: &'static str,
    dtype: DType,
    arguments: Vec<Argument>,
}

#[derive(Clone, Copy)]
enum Argument {
    Pointer(u64),
    Int(i64),
    Float(f32),
}

impl Kernel {
    /// The kernel `name` of the file `module`.cu for `x`'s element type, on its device.
    ///
    /// # Errors
    /// `x` is not on a GPU, or of a type that the kernels are not written for.
    pub(crate) fn of(module: &'static str, name: &'static str, x: &Tensor) -> Result<Self> {
        suffix(x.dtype())?;
        Ok(Self { device: device(x)?.clone(), module, name, dtype: x.dtype(), arguments: Vec::with_capacity(16) })
    }

    /// The first element of a tensor of the kernel's element type.
    pub(crate) fn tensor(&mut self, tensor: &Tensor) -> Result<&mut Self> {
        self.typed(tensor, self.dtype)
    }

    /// The first element of a tensor of `dtype`.
    pub(crate) fn typed(&mut self, tensor: &Tensor, dtype: DType) -> Result<&mut Self> {
        if tensor.dtype() != dtype {
            bail!("the CUDA kernel {} was given {:?} where it reads {dtype:?}", self.name, tensor.dtype());
        }
        self.arguments.push(Argument::Pointer(pointer(tensor)?));
        Ok(self)
    }

    /// An address in device memory, 0 for none.
    pub(crate) fn address(&mut self, address: u64) -> &mut Self {
        self.arguments.push(Argument::Pointer(address));
        self
    }

    pub(crate) fn int(&mut self, value: usize) -> &mut Self {
        self.arguments.push(Argument::Int(value as i64));
        self
    }

    pub(crate) fn float(&mut self, value: f64) -> &mut Self {
        self.arguments.push(Argument::Float(value as f32));
        self
    }

    /// Launches `blocks` of `threads` with `shared` bytes of dynamic shared memory each. Does not wait.
    ///
    /// # Errors
    /// What the driver says: a grid or a block that is too large, no such kernel, an error of an earlier kernel.
    pub(crate) fn launch(&mut self, blocks: [usize; 3], threads: usize, shared: usize) -> Result<()> {
        if blocks.contains(&0) {
            return Ok(());
        }
        let stream = self.device.cuda_stream();
        let config = LaunchConfig {
            grid_dim: (blocks[0] as u32, blocks[1] as u32, blocks[2] as u32),
            block_dim: (threads as u32, 1, 1),
            shared_mem_bytes: shared as u32,
        };
        self.with_function(shared, |function| {
            let mut builder = stream.launch_builder(function);
            for argument in &self.arguments {
                match argument {
                    Argument::Pointer(value) => builder.arg(value),
                    Argument::Int(value) => builder.arg(value),
                    Argument::Float(value) => builder.arg(value),
                };
            }
            // SAFETY: the pointers are of live tensors that the caller holds, large enough for the sizes passed beside
            // them; each kernel's parameters are listed where it is called.
            unsafe { builder.launch(config) }.w()
        })?;
        Ok(())
    }

    fn with_function<T>(&self, shared: usize, run: impl FnOnce(&CudaFunction) -> Result<T>) -> Result<T> {
        let ordinal = self.device.cuda_stream().context().ordinal();
        CACHE.with_borrow_mut(|cache| {
            let key = (ordinal, self.name, self.dtype);
            if !cache.functions.contains_key(&key) {
                let module = match cache.modules.get(&(ordinal, self.module)) {
                    Some(module) => module.clone(),
                    None => {
                        let module = load(&self.device, self.module)?;
                        cache.modules.insert((ordinal, self.module), module.clone());
                        module
                    }
                };
                let name = format!("{}_{}", self.name, suffix(self.dtype)?);
                let function = module.load_function(&name).w()?;
                cache.functions.insert(key, Loaded { function, shared: PLAIN_SHARED });
            }
            let loaded = cache.functions.get_mut(&key).expect("it was inserted");
            if shared > loaded.shared {
                let attribute = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                loaded.function.set_attribute(attribute, shared as i32).w()?;
                loaded.shared = shared;
            }
            run(&loaded.function)
        })
    }
}

/// The ending of the kernels' names for an element type.
fn suffix(dtype: DType) -> Result<&'static str> {
    Ok(match dtype {
        DType::F32 => "f32",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        other => bail!("there is no CUDA kernel for {other:?}: use f32, bf16 or f16"),
    })
}

fn load(device: &CudaDevice, name: &str) -> Result<Arc<CudaModule>> {
    let Some((_, binary)) = MODULES.iter().find(|(stem, _)| *stem == name) else {
        bail!("no CUDA module is called {name}");
    };
    if binary.is_empty() {
        bail!(
            "this program was built without nvcc, so it has no CUDA kernels: build it again with \
             `cargo build --release --features cuda` where CUDA 12 or 13 is installed"
        );
    }
    device.cuda_stream().context().load_module(Ptx::from_binary(binary.to_vec())).w()
}

/// The GPU that a tensor is on.
pub(crate) fn device(x: &Tensor) -> Result<&CudaDevice> {
    match x.device() {
        Device::Cuda(device) => Ok(device),
        other => bail!("a CUDA kernel was given a tensor on {:?}", other.location()),
    }
}

/// The address of a contiguous tensor's first element.
///
/// # Errors
/// It is not contiguous, or not on a GPU.
pub(crate) fn pointer(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, _)) = layout.contiguous_offsets() else {
        bail!("a CUDA kernel needs contiguous data, got strides {:?} for {:?}", layout.stride(), layout.shape());
    };
    let Storage::Cuda(storage) = &*storage else {
        bail!("a CUDA kernel was given a tensor on {:?}", tensor.device().location());
    };
    fn address<T: CudaDType + DeviceRepr>(storage: &candle_core::CudaStorage, start: usize) -> Result<u64> {
        let stream = storage.device.cuda_stream();
        let (base, _reads) = storage.as_cuda_slice::<T>()?.device_ptr(&stream);
        Ok(base + (start * size_of::<T>()) as u64)
    }
    match tensor.dtype() {
        DType::U8 => address::<u8>(storage, start),
        DType::U32 => address::<u32>(storage, start),
        DType::I64 => address::<i64>(storage, start),
        DType::F16 => address::<half::f16>(storage, start),
        DType::BF16 => address::<half::bf16>(storage, start),
        DType::F32 => address::<f32>(storage, start),
        DType::F64 => address::<f64>(storage, start),
        other => bail!("there is no CUDA kernel for {other:?}"),
    }
}

/// A tensor on `like`'s device whose numbers are not set: a kernel must write every one.
pub(crate) fn unset(like: &Tensor, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    device(like)?;
    // SAFETY: device memory that holds anything at all; every caller hands it to a kernel that fills it.
    unsafe { Tensor::empty(shape, dtype, like.device()) }
}

/// The numbers of a small tensor on the host. Waits for everything that was launched before.
pub(crate) fn read(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

/// Whether the tensor's data starts at a multiple of 16 bytes, as the kernels' vector loads want it.
pub(crate) fn aligned(tensors: &[&Tensor]) -> Result<bool> {
    for tensor in tensors {
        if pointer(tensor)? % 16 != 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Threads of a block of an elementwise kernel.
const THREADS: usize = 256;
/// Elements that a thread of one reads at a time where the data allows it.
const VECTOR: usize = 8;

impl Kernel {
    /// Launches an elementwise kernel whose threads have [`VECTOR`] of `n` elements each, whatever the alignment; tells it
    /// whether `tensors` all are aligned.
    pub(crate) fn launch_map(&mut self, n: usize, tensors: &[&Tensor]) -> Result<()> {
        self.int(aligned(tensors)?.into()).launch([n.div_ceil(THREADS * VECTOR), 1, 1], THREADS, 0)
    }

    /// Launches an elementwise kernel over `n` elements in rows of `widths`: eight to a thread where every width and every
    /// address allows it, else one. Tells it which.
    pub(crate) fn launch_rows(&mut self, n: usize, widths: &[usize], tensors: &[&Tensor]) -> Result<()> {
        let vector = widths.iter().all(|width| width.is_multiple_of(VECTOR)) && aligned(tensors)?;
        let per_thread = if vector { VECTOR } else { 1 };
        self.int(vector.into()).launch([n.div_ceil(THREADS * per_thread), 1, 1], THREADS, 0)
    }
}

#[cfg(test)]
mod tests;
