//! Kernels on a GPU: loading, launching, and tensors as device pointers.
//!
//! The kernels are the `.cu` files beside this one; `build.rs` compiles each to a fat binary that the program embeds, and
//! reads from its source what each kernel takes. A kernel `name` exists as `name_f32`, `name_bf16` and `name_f16`. Its
//! parameters are pointers, 64-bit integers and f32 numbers, nothing else. A [`Kernel`] is given each by its name, and a launch
//! compares names, order, kinds and element types with the source: no compiler sees both sides.
//!
//! Everything runs on the device's one stream, from one thread: what a kernel writes is there for the next one, and
//! memory that a dropped tensor gives back is reused after the kernels that read it. Nothing here waits for the GPU but
//! [`read`].

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use candle_core::cuda_backend::{CudaDType, CudaDevice, WrapErr};
use candle_core::{DType, Device, Error, Result, Shape, Storage, Tensor, bail};
use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::{CudaFunction, CudaModule, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

use super::device::upload;
use super::signatures::{Element, Kind, check};

/// (file stem, fat binary) of every `.cu` file; empty where `build.rs` found no compiler.
const MODULES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/cuda_modules.rs"));

/// (name, parameters) of every kernel, from the sources.
const SIGNATURES: &[(&str, &[(&str, Kind)])] = {
    use Element::*;
    use Kind::*;
    include!(concat!(env!("OUT_DIR"), "/cuda_signatures.rs"))
};

/// Shared memory that a kernel may have without asking for more.
const PLAIN_SHARED: usize = 48 << 10;

struct Loaded {
    function: CudaFunction,
    name: &'static str,
    parameters: &'static [(&'static str, Kind)],
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

/// A kernel and its arguments, which are given by the names and in the order of its parameters. It holds the tensors until they
/// are read on the stream, so a temporary may be an argument.
#[must_use = "a kernel does nothing before it is launched"]
pub(crate) struct Kernel {
    device: CudaDevice,
    module: &'static str,
    name: &'static str,
    dtype: DType,
    arguments: Vec<Argument>,
}

struct Argument {
    name: &'static str,
    value: Value,
}

enum Value {
    Input(Tensor),
    Output(Tensor),
    NoOutput(DType),
    Addresses(Addresses),
    Int(usize),
    Float(f64),
}

/// What the driver is given.
enum Passed {
    Pointer(u64),
    Int(i64),
    Float(f32),
}

impl Value {
    fn kind(&self) -> Result<Kind> {
        Ok(match self {
            Self::Input(tensor) => Kind::Input(element(tensor.dtype())?),
            Self::Output(tensor) => Kind::Output(element(tensor.dtype())?),
            Self::NoOutput(dtype) => Kind::Output(element(*dtype)?),
            Self::Addresses(_) => Kind::Input(Element::I64),
            Self::Int(_) => Kind::Int,
            Self::Float(_) => Kind::Float,
        })
    }

    fn pass(&self) -> Result<Passed> {
        Ok(match self {
            Self::Input(tensor) | Self::Output(tensor) => Passed::Pointer(pointer(tensor)?),
            Self::NoOutput(_) => Passed::Pointer(0),
            Self::Addresses(addresses) => Passed::Pointer(pointer(&addresses.table)?),
            Self::Int(value) => Passed::Int((*value).try_into().map_err(Error::wrap)?),
            Self::Float(value) => {
                let narrow = *value as f32;
                if narrow.is_finite() != value.is_finite() {
                    bail!("{value} is too large for f32");
                }
                Passed::Float(narrow)
            }
        })
    }
}

impl Kernel {
    /// The kernel `name` of the file `module`.cu for `x`'s element type, on its device.
    ///
    /// # Errors
    /// `x` is not on a GPU, or of a type that the kernels are not written for.
    pub(crate) fn of(module: &'static str, name: &'static str, x: &Tensor) -> Result<Self> {
        suffix(x.dtype())?;
        Ok(Self { device: device(x)?.clone(), module, name, dtype: x.dtype(), arguments: Vec::with_capacity(20) })
    }

    fn with(mut self, name: &'static str, value: Value) -> Self {
        self.arguments.push(Argument { name, value });
        self
    }

    /// A contiguous tensor that the kernel reads.
    pub(crate) fn input(self, name: &'static str, tensor: &Tensor) -> Self {
        self.with(name, Value::Input(tensor.clone()))
    }

    /// A contiguous tensor that the kernel writes.
    pub(crate) fn output(self, name: &'static str, tensor: &Tensor) -> Self {
        self.with(name, Value::Output(tensor.clone()))
    }

    /// A tensor of `dtype` that the kernel writes if there is one, else a null pointer.
    pub(crate) fn output_if_any(self, name: &'static str, tensor: Option<&Tensor>, dtype: DType) -> Self {
        self.with(name, tensor.map_or(Value::NoOutput(dtype), |tensor| Value::Output(tensor.clone())))
    }

    /// A table of addresses that the kernel reads, and through them.
    pub(crate) fn addresses(self, name: &'static str, addresses: &Addresses) -> Self {
        self.with(name, Value::Addresses(addresses.clone()))
    }

    pub(crate) fn int(self, name: &'static str, value: usize) -> Self {
        self.with(name, Value::Int(value))
    }

    /// An integer that is 1 or 0.
    pub(crate) fn flag(self, name: &'static str, value: bool) -> Self {
        self.int(name, value.into())
    }

    pub(crate) fn float(self, name: &'static str, value: f64) -> Self {
        self.with(name, Value::Float(value))
    }

    /// Launches `blocks` of `threads` with `shared` bytes of dynamic shared memory each. Does not wait. The check of the
    /// arguments is a comparison of a short name and of two numbers for each, every time.
    ///
    /// # Errors
    /// Arguments that are not those of the kernel's source, a number that does not fit, a tensor that is not contiguous. What
    /// the driver says: a grid or a block that is too large, no such kernel, an error of an earlier kernel.
    pub(crate) fn launch(self, blocks: [usize; 3], threads: usize, shared: usize) -> Result<()> {
        if blocks.contains(&0) {
            return Ok(());
        }
        self.with_function(shared, |loaded| {
            let about = |what: &str, e: Error| e.context(format!("the CUDA kernel {}: {what}", loaded.name));
            let mut given = Vec::with_capacity(self.arguments.len());
            for Argument { name, value } in &self.arguments {
                given.push((*name, value.kind().map_err(|e| about(name, e))?));
            }
            check(loaded.name, loaded.parameters, given.into_iter()).map_err(Error::msg)?;
            let mut passed = Vec::with_capacity(self.arguments.len());
            for Argument { name, value } in &self.arguments {
                passed.push(value.pass().map_err(|e| about(name, e))?);
            }

            let number = |what, value: usize| u32::try_from(value).map_err(|e| about(what, Error::wrap(e)));
            let [x, y, z] = blocks;
            let config = LaunchConfig {
                grid_dim: (number("blocks", x)?, number("blocks", y)?, number("blocks", z)?),
                block_dim: (number("threads", threads)?, 1, 1),
                shared_mem_bytes: number("shared memory", shared)?,
            };
            let stream = self.device.cuda_stream();
            let mut builder = stream.launch_builder(&loaded.function);
            for passed in &passed {
                match passed {
                    Passed::Pointer(value) => builder.arg(value),
                    Passed::Int(value) => builder.arg(value),
                    Passed::Float(value) => builder.arg(value),
                };
            }
            // SAFETY: the arguments are of the number, order and types of the kernel's source, which was just checked. `self`
            // holds the tensors, and memory that is given back afterwards is so in the stream's order. That each tensor is
            // large enough for the sizes passed beside it is the caller's part.
            unsafe { builder.launch(config) }.w()?;
            Ok(())
        })
    }

    fn with_function<T>(&self, shared: usize, run: impl FnOnce(&Loaded) -> Result<T>) -> Result<T> {
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
                let Some(&(name, parameters)) = SIGNATURES.iter().find(|(known, _)| *known == name) else {
                    bail!("no CUDA kernel is called {name}");
                };
                let function = module.load_function(name).w()?;
                cache.functions.insert(key, Loaded { function, name, parameters, shared: PLAIN_SHARED });
            }
            let loaded = cache.functions.get_mut(&key).expect("it was inserted");
            if shared > loaded.shared {
                let attribute = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                loaded.function.set_attribute(attribute, shared.try_into().map_err(Error::wrap)?).w()?;
                loaded.shared = shared;
            }
            run(loaded)
        })
    }
}

/// What the kernels' sources call an element type.
fn element(dtype: DType) -> Result<Element> {
    Ok(match dtype {
        DType::F32 => Element::F32,
        DType::BF16 => Element::BF16,
        DType::F16 => Element::F16,
        DType::F64 => Element::F64,
        DType::I64 => Element::I64,
        other => bail!("no CUDA kernel reads or writes {other:?}"),
    })
}

/// A table with addresses of tensors for a kernel to read, and the tensors, which live as long.
#[derive(Clone)]
pub(crate) struct Addresses {
    /// (rows, 6), i64: two numbers, four addresses.
    table: Tensor,
    _owners: Arc<[Tensor]>,
}

impl Addresses {
    /// The table of these numbers and tensors, with address 0 where a row has fewer than four tensors.
    ///
    /// # Errors
    /// No row, a number that is too large, a tensor that is not contiguous or not on `device`.
    pub(crate) fn new(rows: Vec<([usize; 2], Vec<Tensor>)>, device: &Device) -> Result<Self> {
        let count = rows.len();
        let (mut table, mut owners) = (Vec::with_capacity(6 * count), Vec::new());
        for (numbers, tensors) in rows {
            if tensors.len() > 4 {
                bail!("a row of a table of addresses has room for four tensors, not for {}", tensors.len());
            }
            for number in numbers {
                table.push(i64::try_from(number).map_err(Error::wrap)?);
            }
            for tensor in &tensors {
                // an address may have its highest bit set; the kernel makes the same 64 bits a pointer again
                table.push(pointer(tensor)?.cast_signed());
            }
            table.extend((tensors.len()..4).map(|_| 0));
            owners.extend(tensors);
        }
        let table = upload(&Tensor::from_vec(table, (count, 6), &Device::Cpu)?, device)?;
        Ok(Self { table, _owners: owners.into() })
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

/// The address of a contiguous tensor's first element, for calls of NVIDIA's libraries; a kernel of ours is given the tensor.
///
/// # Errors
/// It is not contiguous, or not on a GPU.
pub(in crate::ops) fn pointer(tensor: &Tensor) -> Result<u64> {
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
    /// whether all its tensors are aligned.
    pub(crate) fn launch_map(self, n: usize) -> Result<()> {
        let vector = self.aligned()?;
        self.flag("vector", vector).launch([n.div_ceil(THREADS * VECTOR), 1, 1], THREADS, 0)
    }

    /// Launches an elementwise kernel over `n` elements in rows of `widths`: eight to a thread where every width and every
    /// address allows it, else one. Tells it which.
    pub(crate) fn launch_rows(self, n: usize, widths: &[usize]) -> Result<()> {
        let vector = widths.iter().all(|width| width.is_multiple_of(VECTOR)) && self.aligned()?;
        let per_thread = if vector { VECTOR } else { 1 };
        self.flag("vector", vector).launch([n.div_ceil(THREADS * per_thread), 1, 1], THREADS, 0)
    }

    /// Whether all tensors that it has been given are [`aligned`].
    pub(crate) fn aligned(&self) -> Result<bool> {
        let tensors = self.arguments.iter().filter_map(|argument| match &argument.value {
            Value::Input(tensor) | Value::Output(tensor) => Some(tensor),
            _ => None,
        });
        aligned(&tensors.collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests;
