//! Convolutions on a GPU: cuDNN, channels-last, sums in f32.
//!
//! The kernel is kept as (out, kh, kw, in), which cuDNN calls a filter in NHWC; the forward and the gradient of the input
//! read the same copy. Descriptors, algorithm and workspace of a shape are made once and kept. The algorithm is the first
//! deterministic one that cuDNN recommends and that needs no more than [`MOST_WORKSPACE`] (the first of the others, if there
//! is none): timing them would make the last bits of a run depend on the clock.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use candle_core::{DType, Error, Result, Tensor, bail};
use cudarc::cudnn::{result, sys};

use super::Kernel;
use crate::ops::cuda::{device, pointer, unset};
use crate::ops::device::cuda::{Libraries, allow_tf32};
use crate::ops::gemm;
use crate::ops::sum::{add, add_channels};

/// Bytes that an algorithm may take beside its operands.
const MOST_WORKSPACE: usize = 256 << 20;

/// Recommendations to ask for: as many as there are algorithms.
const ALGORITHMS: usize = 8;

/// What a convolution is planned for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    device: usize,
    dtype: DType,
    backward: bool,
    batch: usize,
    /// (height, width, channels)
    input: (usize, usize, usize),
    output: (usize, usize, usize),
    sides: (usize, usize),
    stride: usize,
    padding: usize,
    tf32: bool,
}

#[derive(Clone, Copy)]
enum Algorithm {
    Forward(sys::cudnnConvolutionFwdAlgo_t),
    Backward(sys::cudnnConvolutionBwdDataAlgo_t),
}

/// cuDNN's descriptions of one convolution.
struct Plan {
    input: sys::cudnnTensorDescriptor_t,
    output: sys::cudnnTensorDescriptor_t,
    bias: sys::cudnnTensorDescriptor_t,
    filter: sys::cudnnFilterDescriptor_t,
    convolution: sys::cudnnConvolutionDescriptor_t,
    identity: sys::cudnnActivationDescriptor_t,
    algorithm: Algorithm,
    workspace: usize,
    /// Whether the bias is added by the convolution; cuDNN can do so with one algorithm, and not for every shape.
    adds_bias: Cell<bool>,
}

thread_local! {
    /// Kept until the thread ends: a run has some dozens of shapes.
    static PLANS: RefCell<HashMap<Shape, Rc<Plan>>> = RefCell::default();
}

/// x (B, H, W, in), weight (out, kh, kw, in), residual (B, H', W', out) -> (B, H', W', out).
pub(super) fn conv2d_fwd(x: &Tensor, kernel: &Kernel, weight: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
    let (batch, height, width, inputs) = x.dims4()?;
    let (kh, kw) = kernel.sides;
    let (out_h, out_w) = (kernel.out_side(height, kh)?, kernel.out_side(width, kw)?);
    let shape = shape(x, kernel, weight, batch, (height, width, inputs), (out_h, out_w, kernel.outputs), false)?;
    let y = unset(x, (batch, out_h, out_w, kernel.outputs), x.dtype())?;
    if let Some(residual) = residual.filter(|r| r.dims() != y.dims() || r.dtype() != y.dtype()) {
        bail!("conv2d: a residual {:?} of {:?} for a result {:?}", residual.dims(), residual.dtype(), y.dims());
    }
    let libraries = Libraries::of(device(x)?)?;
    let plan = plan(libraries, shape)?;
    let Algorithm::Forward(algorithm) = plan.algorithm else { bail!("conv2d: a plan of the other direction") };
    let (workspace, _) = libraries.workspace(plan.workspace)?;
    let (x_at, w_at, y_at) = (pointer(x)?, pointer(weight)?, pointer(&y)?);
    let (one, zero) = (1f32, 0f32);
    let (one, zero) = (std::ptr::from_ref(&one).cast(), std::ptr::from_ref(&zero).cast());
    gemm::count_flops(2 * (batch * out_h * out_w * kernel.outputs * kh * kw * inputs) as u64);
    if let Some(bias) = kernel.bias.as_ref().filter(|_| plan.adds_bias.get()) {
        // without a residual `y` stands for the summand z, whose factor is zero
        let (z_at, factor) = residual.map_or(Ok((y_at, zero)), |residual| Ok::<_, Error>((pointer(residual)?, one)))?;
        // SAFETY: the descriptions are those of these contiguous tensors on this device.
        let added = unsafe {
            result::convolution_bias_activation_forward(
                libraries.cudnn,
                one,
                plan.input,
                x_at as *const _,
                plan.filter,
                w_at as *const _,
                plan.convolution,
                algorithm,
                workspace as *mut _,
                plan.workspace,
                factor,
                plan.output,
                z_at as *const _,
                plan.bias,
                pointer(bias)? as *const _,
                plan.identity,
                plan.output,
                y_at as *mut _,
            )
        };
        if added.is_ok() {
            return Ok(y);
        }
        plan.adds_bias.set(false); // from now on in two steps
    }
    // SAFETY: as above.
    unsafe {
        result::convolution_forward(
            libraries.cudnn,
            one,
            plan.input,
            x_at as *const _,
            plan.filter,
            w_at as *const _,
            plan.convolution,
            algorithm,
            workspace as *mut _,
            plan.workspace,
            zero,
            plan.output,
            y_at as *mut _,
        )
    }
    .map_err(Error::wrap)?;
    let y = match &kernel.bias {
        Some(bias) => add_channels(&y, bias)?,
        None => y,
    };
    match residual {
        Some(residual) => add(&y, residual),
        None => Ok(y),
    }
}

/// cotangent (B, H', W', out), weight (out, kh, kw, in) -> (B, H, W, in).
pub(super) fn conv2d_bwd(
    cotangent: &Tensor,
    kernel: &Kernel,
    weight: &Tensor,
    height: usize,
    width: usize,
) -> Result<Tensor> {
    let (batch, out_h, out_w, outputs) = cotangent.dims4()?;
    let (kh, kw) = kernel.sides;
    let output = (out_h, out_w, outputs);
    let shape = shape(cotangent, kernel, weight, batch, (height, width, kernel.inputs), output, true)?;
    let dx = unset(cotangent, (batch, height, width, kernel.inputs), cotangent.dtype())?;
    let libraries = Libraries::of(device(cotangent)?)?;
    let plan = plan(libraries, shape)?;
    let Algorithm::Backward(algorithm) = plan.algorithm else { bail!("conv2d: a plan of the other direction") };
    let (workspace, _) = libraries.workspace(plan.workspace)?;
    let (one, zero) = (1f32, 0f32);
    // SAFETY: the descriptions are those of these contiguous tensors on this device.
    unsafe {
        result::convolution_backward_data(
            libraries.cudnn,
            std::ptr::from_ref(&one).cast(),
            plan.filter,
            pointer(weight)? as *const _,
            plan.output,
            pointer(cotangent)? as *const _,
            plan.convolution,
            algorithm,
            workspace as *mut _,
            plan.workspace,
            std::ptr::from_ref(&zero).cast(),
            plan.input,
            pointer(&dx)? as *mut _,
        )
    }
    .map_err(Error::wrap)?;
    gemm::count_flops(2 * (batch * out_h * out_w * outputs * kh * kw * kernel.inputs) as u64);
    Ok(dx)
}

fn shape(
    x: &Tensor,
    kernel: &Kernel,
    weight: &Tensor,
    batch: usize,
    input: (usize, usize, usize),
    output: (usize, usize, usize),
    backward: bool,
) -> Result<Shape> {
    if weight.dtype() != x.dtype() || kernel.bias.as_ref().is_some_and(|bias| bias.dtype() != x.dtype()) {
        bail!("conv2d: {:?} activations with a kernel of {:?}", x.dtype(), weight.dtype());
    }
    Ok(Shape {
        device: device(x)?.cuda_stream().context().ordinal(),
        dtype: x.dtype(),
        backward,
        batch,
        input,
        output,
        sides: kernel.sides,
        stride: kernel.stride,
        padding: kernel.padding,
        tf32: allow_tf32(),
    })
}

fn plan(libraries: &Libraries, shape: Shape) -> Result<Rc<Plan>> {
    PLANS.with(|plans| {
        if let Some(plan) = plans.borrow().get(&shape) {
            return Ok(plan.clone());
        }
        let plan = Rc::new(Plan::new(libraries, &shape).map_err(|e| {
            let Shape { batch, input, output, sides, .. } = shape;
            e.context(format!("planning a convolution {sides:?} of {batch} x {input:?} to {output:?}"))
        })?);
        plans.borrow_mut().insert(shape, plan.clone());
        Ok(plan)
    })
}

impl Plan {
    fn new(libraries: &Libraries, shape: &Shape) -> Result<Self> {
        let kind = match shape.dtype {
            DType::F32 => sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
            DType::BF16 => sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16,
            DType::F16 => sys::cudnnDataType_t::CUDNN_DATA_HALF,
            other => bail!("no convolution of {other:?} on a GPU: use f32, bf16 or f16"),
        };
        let math = match shape.dtype {
            // cuDNN's default would round f32 to TF32
            DType::F32 if !shape.tf32 => sys::cudnnMathType_t::CUDNN_FMA_MATH,
            DType::F32 => sys::cudnnMathType_t::CUDNN_DEFAULT_MATH,
            _ => sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
        };
        let nhwc = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC;
        let tensor = |(height, width, channels): (usize, usize, usize), batch: usize| {
            let sides = [batch as i32, channels as i32, height as i32, width as i32];
            let made = result::create_tensor_descriptor().map_err(Error::wrap)?;
            // SAFETY: the description was just made.
            unsafe { result::set_tensor4d_descriptor(made, nhwc, kind, sides) }.map_err(Error::wrap)?;
            Ok::<_, Error>(made)
        };
        let input = tensor(shape.input, shape.batch)?;
        let output = tensor(shape.output, shape.batch)?;
        let bias = tensor((1, 1, shape.output.2), 1)?;
        let filter = result::create_filter_descriptor().map_err(Error::wrap)?;
        let convolution = result::create_convolution_descriptor().map_err(Error::wrap)?;
        let identity = result::create_activation_descriptor().map_err(Error::wrap)?;
        let (kh, kw) = shape.sides;
        let (stride, padding) = (shape.stride as i32, shape.padding as i32);
        // SAFETY: the descriptions were just made.
        unsafe {
            let sides = [shape.output.2 as i32, shape.input.2 as i32, kh as i32, kw as i32];
            result::set_filter4d_descriptor(filter, kind, nhwc, sides).map_err(Error::wrap)?;
            result::set_convolution2d_descriptor(
                convolution,
                padding,
                padding,
                stride,
                stride,
                1,
                1,
                sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION,
                sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
            )
            .map_err(Error::wrap)?;
            result::set_convolution_math_type(convolution, math).map_err(Error::wrap)?;
            result::set_activation_descriptor(
                identity,
                sys::cudnnActivationMode_t::CUDNN_ACTIVATION_IDENTITY,
                sys::cudnnNanPropagation_t::CUDNN_PROPAGATE_NAN,
                0.0,
            )
            .map_err(Error::wrap)?;
        }
        let handle = libraries.cudnn;
        let mut count = 0i32;
        // SAFETY: the descriptions are complete; the arrays are as long as is said, and a perf structure of zeros is one.
        let (algorithm, math, workspace) = unsafe {
            if shape.backward {
                let mut found: [sys::cudnnConvolutionBwdDataAlgoPerf_t; ALGORITHMS] = std::mem::zeroed();
                let (places, at) = (ALGORITHMS as i32, found.as_mut_ptr());
                result::get_convolution_backward_data_algorithm(
                    handle,
                    filter,
                    output,
                    convolution,
                    input,
                    places,
                    &raw mut count,
                    at,
                )
                .map_err(Error::wrap)?;
                let found = found.iter().take(count as usize);
                let best = best(found.map(|perf| (perf, rank(perf.status, perf.determinism, perf.memory))))?;
                (Algorithm::Backward(best.algo), best.mathType, best.memory)
            } else {
                let mut found: [sys::cudnnConvolutionFwdAlgoPerf_t; ALGORITHMS] = std::mem::zeroed();
                let (places, at) = (ALGORITHMS as i32, found.as_mut_ptr());
                result::get_convolution_forward_algorithm(
                    handle,
                    input,
                    filter,
                    convolution,
                    output,
                    places,
                    &raw mut count,
                    at,
                )
                .map_err(Error::wrap)?;
                let found = found.iter().take(count as usize);
                let best = best(found.map(|perf| (perf, rank(perf.status, perf.determinism, perf.memory))))?;
                (Algorithm::Forward(best.algo), best.mathType, best.memory)
            }
        };
        // SAFETY: as above. What was recommended was so with its own kind of arithmetic.
        unsafe { result::set_convolution_math_type(convolution, math) }.map_err(Error::wrap)?;
        let adds_bias = matches!(
            algorithm,
            Algorithm::Forward(sys::cudnnConvolutionFwdAlgo_t::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM)
        );
        let adds_bias = Cell::new(adds_bias);
        Ok(Self { input, output, bias, filter, convolution, identity, algorithm, workspace, adds_bias })
    }
}

/// How much an algorithm is wanted: 0 is best; `None` cannot be used. One whose sums come in any order is better than none.
fn rank(status: sys::cudnnStatus_t, determinism: sys::cudnnDeterminism_t, memory: usize) -> Option<u8> {
    let usable = status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS && memory <= MOST_WORKSPACE;
    usable.then_some(u8::from(determinism != sys::cudnnDeterminism_t::CUDNN_DETERMINISTIC))
}

/// The first of the best ranked; cuDNN names the fastest first.
fn best<'a, T: 'a>(ranked: impl Iterator<Item = (&'a T, Option<u8>)>) -> Result<&'a T> {
    let best = ranked.filter_map(|(perf, rank)| Some((perf, rank?))).min_by_key(|(_, rank)| *rank);
    best.map(|(perf, _)| perf).ok_or_else(|| {
        Error::Msg(format!(
            "cuDNN has no algorithm for it that needs at most {} MiB of workspace",
            MOST_WORKSPACE >> 20
        ))
    })
}
