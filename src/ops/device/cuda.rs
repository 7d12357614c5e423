//! Opening a GPU, its memory, and the handles of NVIDIA's libraries.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Storage, Tensor, WithDType, bail};
use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, result, sys};

use super::Counts;

/// Whether products of f32 may round their inputs to TF32; set once, when the device is opened.
static ALLOW_TF32: AtomicBool = AtomicBool::new(false);

pub(in crate::ops) fn allow_tf32() -> bool {
    ALLOW_TF32.load(Relaxed)
}

/// # Errors
/// No driver, no library, no such GPU; says which.
pub(super) fn open(name: &str, ordinal: usize, allow_tf32: bool) -> anyhow::Result<Device> {
    let or_else = "use --device cpu, or mend this";
    // cudarc panics where a library is missing, so each one is looked for first
    for (found, library, package) in libraries() {
        anyhow::ensure!(
            found,
            "device `{name}`: {library} is not to be found ({package}); is its folder in LD_LIBRARY_PATH? {or_else}"
        );
    }
    result::init().map_err(|e| anyhow::anyhow!("device `{name}`: the driver does not start: {e}; {or_else}"))?;
    let count = result::device::get_count().map_err(|e| anyhow::anyhow!("device `{name}`: {e}; {or_else}"))?;
    anyhow::ensure!(
        ordinal < count as usize,
        "device `{name}`: there are {count} GPUs here, counted from 0; {or_else}"
    );
    let opened = || -> anyhow::Result<Device> {
        let device = Device::new_cuda(ordinal)?;
        let cuda = device.as_cuda_device()?;
        // SAFETY: the program uses one stream, in whose order memory is taken and given back.
        unsafe { cuda.disable_event_tracking() };
        keep_freed_memory(cuda)?;
        Ok(device)
    };
    let device = opened().map_err(|e| e.context(format!("device `{name}` cannot be opened; {or_else}")))?;
    ALLOW_TF32.store(allow_tf32, Relaxed);
    candle_core::cuda_backend::set_gemm_reduced_precision_f32(allow_tf32);
    Ok(device)
}

/// Each library: whether it is there, its name, and who brings it.
fn libraries() -> [(bool, &'static str, &'static str); 5] {
    let toolkit = "it comes with CUDA 12 or 13";
    [
        ("libcuda", "it comes with NVIDIA's driver"),
        ("libcublas", toolkit),
        ("libcublasLt", toolkit),
        ("libcurand", toolkit),
        ("libcudnn", "cuDNN 9"),
    ]
    .map(|(library, package)| (is_there(library), library, package))
}

/// Whether the loader finds a library under one of the names that cudarc tries.
fn is_there(library: &str) -> bool {
    ["so", "so.13", "so.12", "so.11", "so.10", "so.9", "so.1"].iter().any(|ending| {
        // SAFETY: NVIDIA's libraries may be loaded at any time; nothing is called in this one.
        unsafe { libloading::Library::new(format!("{library}.{ending}")) }.is_ok()
    })
}

/// Freed memory stays with the allocator: a step takes again what the last one gave back.
fn keep_freed_memory(device: &CudaDevice) -> Result<()> {
    let mut all = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a 64-bit number, and `all` is one.
    unsafe { result::mem_pool::set_attribute(pool(device)?, attribute, std::ptr::from_mut(&mut all).cast()) }
        .map_err(candle_core::Error::wrap)
}

/// The pool that the device's allocations come from.
fn pool(device: &CudaDevice) -> Result<sys::CUmemoryPool> {
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().map_err(candle_core::Error::wrap)?;
    // SAFETY: the handle is that of a device whose context is open.
    unsafe { result::device::get_mem_pool(stream.context().cu_device()) }.map_err(candle_core::Error::wrap)
}

/// The most bytes that CUDA promises to copy from ordinary memory without waiting for what was launched before.
const PIECE: usize = 64 << 10;

/// A tensor on the device, copied in pieces that nothing waits for.
pub(super) fn upload(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    fn copy<T: WithDType + CudaDType + DeviceRepr>(tensor: &Tensor, device: &CudaDevice) -> Result<CudaStorage> {
        let data = tensor.flatten_all()?.to_vec1::<T>()?;
        // SAFETY: the copies fill all of it.
        let mut copied = unsafe { device.alloc::<T>(data.len())? };
        let piece = PIECE / size_of::<T>();
        for (index, data) in data.chunks(piece).enumerate() {
            let place = index * piece..index * piece + data.len();
            device.cuda_stream().memcpy_htod(data, &mut copied.slice_mut(place)).w()?;
        }
        Ok(CudaStorage::wrap_cuda_slice(copied, device.clone()))
    }
    let cuda = device.as_cuda_device()?;
    let storage = match tensor.dtype() {
        DType::F32 => copy::<f32>(tensor, cuda)?,
        DType::I64 => copy::<i64>(tensor, cuda)?,
        other => bail!("numbers of {other:?} are not uploaded, f32 and i64 are"),
    };
    Ok(Tensor::from_storage(Storage::Cuda(storage), tensor.shape(), BackpropOp::none(), false))
}

pub(super) fn name(device: &Device) -> Result<String> {
    device.as_cuda_device()?.cuda_stream().context().name().map_err(candle_core::Error::wrap)
}

/// (free, total) bytes of the device.
pub(super) fn memory(device: &Device) -> Result<(usize, usize)> {
    device.as_cuda_device()?.cuda_stream().context().mem_get_info().map_err(candle_core::Error::wrap)
}

pub(super) fn counts(device: &Device) -> Result<Counts> {
    use sys::CUmemPool_attribute as Attribute;
    let pool = pool(device.as_cuda_device()?)?;
    let read = |attribute| -> Result<usize> {
        let mut bytes = 0u64;
        // SAFETY: these attributes are 64-bit numbers, and `bytes` is one.
        unsafe { result::mem_pool::get_attribute(pool, attribute, std::ptr::from_mut(&mut bytes).cast()) }
            .map_err(candle_core::Error::wrap)?;
        Ok(bytes as usize)
    };
    Ok(Counts {
        live: read(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
        peak: read(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
        reserved: read(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
        reserved_peak: read(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)?,
    })
}

pub(super) fn reset_peak(device: &Device) -> Result<()> {
    use sys::CUmemPool_attribute as Attribute;
    let pool = pool(device.as_cuda_device()?)?;
    for attribute in [Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH] {
        let mut zero = 0u64;
        // SAFETY: these attributes are 64-bit numbers, and `zero` is one; 0 is the value that resets them.
        unsafe { result::mem_pool::set_attribute(pool, attribute, std::ptr::from_mut(&mut zero).cast()) }
            .map_err(candle_core::Error::wrap)?;
    }
    Ok(())
}

thread_local! {
    static LIBRARIES: RefCell<HashMap<DeviceId, &'static Libraries>> = RefCell::default();
}

/// The handles of cuBLASLt and cuDNN on one device's stream, and the workspace that their kernels share: work on a stream
/// is in order, so one is enough.
pub(in crate::ops) struct Libraries {
    pub(in crate::ops) cublaslt: cudarc::cublaslt::sys::cublasLtHandle_t,
    pub(in crate::ops) cudnn: cudarc::cudnn::sys::cudnnHandle_t,
    workspace: RefCell<CudaSlice<u8>>,
    device: CudaDevice,
}

/// Bytes of workspace at first: what NVIDIA recommends for cuBLASLt on Hopper.
pub(in crate::ops) const WORKSPACE: usize = 32 << 20;

impl Libraries {
    /// Those of this thread; made when first asked for, and never given back: at the end of a program the driver may be gone
    /// before them.
    ///
    /// # Errors
    /// The libraries'.
    pub(in crate::ops) fn of(device: &CudaDevice) -> Result<&'static Self> {
        if let Some(found) = LIBRARIES.with(|all| all.borrow().get(&device.id()).copied()) {
            return Ok(found);
        }
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().map_err(candle_core::Error::wrap)?;
        let cublaslt = cudarc::cublaslt::result::create_handle().map_err(candle_core::Error::wrap)?;
        let cudnn = cudarc::cudnn::result::create_handle().map_err(candle_core::Error::wrap)?;
        // SAFETY: the handle was just made and the stream lives as long as the device.
        unsafe { cudarc::cudnn::result::set_stream(cudnn, stream.cu_stream().cast()) }
            .map_err(candle_core::Error::wrap)?;
        // SAFETY: nobody reads it before a kernel has written it.
        let workspace = RefCell::new(unsafe { device.alloc::<u8>(WORKSPACE)? });
        let made: &Self = Box::leak(Box::new(Self { cublaslt, cudnn, workspace, device: device.clone() }));
        LIBRARIES.with(|all| all.borrow_mut().insert(device.id(), made));
        Ok(made)
    }

    /// The address of at least `bytes` for the next kernel on the stream.
    ///
    /// # Errors
    /// Out of memory.
    pub(in crate::ops) fn workspace(&self, bytes: usize) -> Result<(u64, usize)> {
        if self.workspace.borrow().len() < bytes {
            // SAFETY: as above; the old one is given back in the stream's order, behind the kernels that use it.
            *self.workspace.borrow_mut() = unsafe { self.device.alloc::<u8>(bytes)? };
        }
        let workspace = self.workspace.borrow();
        let stream = self.device.cuda_stream();
        Ok((workspace.device_ptr(&stream).0, workspace.len()))
    }
}
