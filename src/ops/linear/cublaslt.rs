//! Frozen products on a GPU: cuBLASLt, the bias added in the product's epilogue.
//!
//! cuBLASLt's matrices are column by column, so a row-major (n, m) matrix is its (m, n):
//!
//! ```text
//! y  (rows, out) = x W' + b     is  y' (out, rows) = W (out, in) x' (in, rows) + b      W' is stored: "transposed"
//! dx (rows, in)  = dy W         is  dx' (in, rows) = W' (in, out) dy' (out, rows)       W' is stored: "as it is"
//! ```
//!
//! Sums are f32 whatever the element type is. Layouts and the algorithm of a shape are made once and kept.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use candle_core::{DType, Error, Result, Tensor, bail};
use cudarc::cublaslt::{result, sys};

use super::rows_of;
use crate::ops::cuda::{device, pointer, unset};
use crate::ops::device::cuda::{Libraries, WORKSPACE, allow_tf32};
use crate::ops::gemm;

/// What a product is planned for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    device: usize,
    dtype: DType,
    backward: bool,
    rows: usize,
    inputs: usize,
    outputs: usize,
    bias: bool,
    /// What all addresses are multiples of, in bytes, up to 16.
    alignment: u32,
    tf32: bool,
}

/// cuBLASLt's description of one product, and the algorithm that it recommends.
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    input: sys::cublasLtMatrixLayout_t,
    output: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

thread_local! {
    /// Kept until the thread ends: a run has some dozens of shapes.
    static PLANS: RefCell<HashMap<Shape, Rc<Plan>>> = RefCell::default();
}

/// x (..., in), weight (out, in), bias (out) -> (..., out).
pub(super) fn linear_fwd(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    product(x, weight, bias, residual, false)
}

/// cotangent (..., out) -> (..., in).
pub(super) fn linear_bwd(cotangent: &Tensor, weight: &Tensor) -> Result<Tensor> {
    product(cotangent, weight, None, None, true)
}

fn product(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    backward: bool,
) -> Result<Tensor> {
    let (rows, _) = rows_of(x)?;
    let (outputs, inputs) = weight.dims2()?;
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = if backward { inputs } else { outputs };
    }
    if let Some(residual) = residual.filter(|residual| residual.dims() != dims) {
        bail!("linear: a residual of shape {:?} for a result of shape {dims:?}", residual.dims());
    }
    for (name, tensor) in [("weight", Some(weight)), ("bias", bias), ("residual", residual)] {
        if let Some(tensor) = tensor.filter(|tensor| tensor.dtype() != x.dtype()) {
            bail!("linear: {:?} activations with a {name} of {:?}", x.dtype(), tensor.dtype());
        }
    }
    let y = unset(x, dims, x.dtype())?;
    if rows == 0 || inputs == 0 || outputs == 0 {
        return residual.map_or_else(|| y.zeros_like(), |residual| Ok(residual.clone()));
    }
    let device = device(x)?;
    let libraries = Libraries::of(device)?;
    let (x_at, w_at, y_at) = (pointer(x)?, pointer(weight)?, pointer(&y)?);
    let b_at = bias.map(pointer).transpose()?;
    // the summand; without one its factor is zero, and it is not read
    let c_at = residual.map_or(Ok(y_at), pointer)?;
    let addresses = x_at | w_at | y_at | c_at | b_at.unwrap_or(0);
    let shape = Shape {
        device: device.cuda_stream().context().ordinal(),
        dtype: x.dtype(),
        backward,
        rows,
        inputs,
        outputs,
        bias: bias.is_some(),
        alignment: 1 << addresses.trailing_zeros().min(4),
        tf32: allow_tf32(),
    };
    let plan = PLANS.with(|plans| -> Result<Rc<Plan>> {
        if let Some(plan) = plans.borrow().get(&shape) {
            return Ok(plan.clone());
        }
        let plan = Plan::new(libraries, &shape).map_err(|e| e.context(format!("planning a product of {rows} rows")))?;
        let plan = Rc::new(plan);
        plans.borrow_mut().insert(shape, plan.clone());
        Ok(plan)
    })?;
    let (workspace, bytes) = libraries.workspace(WORKSPACE)?;
    let (alpha, beta) = (1f32, if residual.is_some() { 1f32 } else { 0f32 });
    // SAFETY: the layouts are those of these contiguous tensors on this device, which live until the product is on the
    // stream; alpha and beta are read by the host before the call returns.
    unsafe {
        if let Some(bias) = b_at {
            set(plan.description, sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        result::matmul(
            libraries.cublaslt,
            plan.description,
            std::ptr::from_ref(&alpha).cast(),
            std::ptr::from_ref(&beta).cast(),
            w_at as *const _,
            plan.weight,
            x_at as *const _,
            plan.input,
            c_at as *const _,
            plan.output,
            y_at as *mut _,
            plan.output,
            &raw const plan.algorithm,
            workspace as *mut _,
            bytes.min(WORKSPACE),
            device.cuda_stream().cu_stream().cast(),
        )
        .map_err(Error::wrap)?;
    }
    gemm::count_flops(2 * rows as u64 * inputs as u64 * outputs as u64);
    Ok(y)
}

impl Plan {
    fn new(libraries: &Libraries, shape: &Shape) -> Result<Self> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let kind = match shape.dtype {
            DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
            DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
            DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
            other => bail!("no product of {other:?} on a GPU: use f32, bf16 or f16"),
        };
        let compute = if shape.tf32 && shape.dtype == DType::F32 {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
        } else {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
        };
        let (m, k) = if shape.backward { (shape.inputs, shape.outputs) } else { (shape.outputs, shape.inputs) };
        let layout = |rows: usize, columns: usize| {
            result::create_matrix_layout(kind, rows as u64, columns as u64, rows as i64).map_err(Error::wrap)
        };
        let description = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F).map_err(Error::wrap)?;
        let weight = layout(shape.inputs, shape.outputs)?;
        let input = layout(k, shape.rows)?;
        let output = layout(m, shape.rows)?;
        let epilogue = if shape.bias {
            sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS
        } else {
            sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT
        };
        let preference = result::create_matmul_pref().map_err(Error::wrap)?;
        // SAFETY: each attribute is written from a value of its own type and size.
        let found = unsafe {
            let transposed = i32::from(!shape.backward);
            set(description, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed)?;
            set(description, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            if shape.bias {
                // the heuristic wants an address of the right alignment; each product sets its own
                let address = 0x1000_0000_u64 | u64::from(shape.alignment);
                set(description, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &address)?;
            }
            use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
            let prefer = |attribute, value: *const std::ffi::c_void, bytes| {
                result::set_matmul_pref_attribute(preference, attribute, value, bytes).map_err(Error::wrap)
            };
            let workspace = std::ptr::from_ref(&WORKSPACE).cast();
            prefer(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace, size_of::<usize>())?;
            let alignment = std::ptr::from_ref(&shape.alignment).cast();
            for attribute in [
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ] {
                prefer(attribute, alignment, size_of::<u32>())?;
            }
            let found = result::get_matmul_algo_heuristic(
                libraries.cublaslt,
                description,
                weight,
                input,
                output,
                output,
                preference,
            );
            result::destroy_matmul_pref(preference).map_err(Error::wrap)?;
            found
        };
        Ok(Self { description, weight, input, output, algorithm: found.map_err(Error::wrap)?.algo })
    }
}

/// Sets one attribute of a description.
///
/// # Safety
/// `T` is the attribute's type.
unsafe fn set<T>(
    description: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<()> {
    // SAFETY: `value` is as large as it says; its type is the caller's promise.
    unsafe {
        result::set_matmul_desc_attribute(description, attribute, std::ptr::from_ref(value).cast(), size_of::<T>())
    }
    .map_err(Error::wrap)
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: the plan made them and nobody else has them; a product that is on the stream needs them no more.
        unsafe {
            let _ = result::destroy_matmul_desc(self.description);
            for layout in [self.weight, self.input, self.output] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}
