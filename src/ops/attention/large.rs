//! Attention with heads of more than 160 numbers on a GPU (the VAE's one head of 512): cuBLAS products over a block of
//! queries at a time, scores in f32, a softmax kernel between them. What exists of the scores is at most 32 MB.

use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Result, Tensor};
use cudarc::cublas::sys::{
    cublasComputeType_t::CUBLAS_COMPUTE_32F, cublasGemmAlgo_t::CUBLAS_GEMM_DFALT, cublasOperation_t, cudaDataType,
};

use super::Heads;
use crate::ops::cuda::{Kernel, device, pointer, unset};

/// Numbers of the block of scores.
const SCORES: usize = 8 << 20;

/// A matrix of a tensor's memory by rows: `offset` elements in, `pitch` elements a row.
#[derive(Clone, Copy)]
struct Rows<'a> {
    tensor: &'a Tensor,
    offset: usize,
    pitch: usize,
}

impl Rows<'_> {
    fn address(self) -> Result<u64> {
        Ok(pointer(self.tensor)? + (self.offset * self.tensor.dtype().size_in_bytes()) as u64)
    }
    fn dtype(self) -> cudaDataType {
        match self.tensor.dtype() {
            DType::BF16 => cudaDataType::CUDA_R_16BF,
            DType::F16 => cudaDataType::CUDA_R_16F,
            _ => cudaDataType::CUDA_R_32F,
        }
    }
}

/// Which factor of a product is transposed.
#[derive(Clone, Copy, PartialEq)]
enum Transposed {
    Neither,
    First,
    Second,
}

/// c = alpha a b + beta c with a of (rows, inner) and b of (inner, columns) after transposition; sums in f32.
fn product(
    c: Rows,
    a: Rows,
    b: Rows,
    transposed: Transposed,
    (rows, columns, inner): (usize, usize, usize),
    (alpha, beta): (f64, f64),
) -> Result<()> {
    let operation = |which| match transposed == which {
        true => cublasOperation_t::CUBLAS_OP_T,
        false => cublasOperation_t::CUBLAS_OP_N,
    };
    let blas = device(c.tensor)?.cublas_handle();
    let (alpha, beta) = (alpha as f32, beta as f32);
    // cuBLAS counts by columns: it sees every matrix transposed, so cᵀ = bᵀ aᵀ
    // SAFETY: the matrices lie inside tensors that the caller holds; alpha and beta are on the host for the call.
    unsafe {
        cudarc::cublas::result::gemm_ex(
            *blas.handle(),
            operation(Transposed::Second),
            operation(Transposed::First),
            columns as i32,
            rows as i32,
            inner as i32,
            (&raw const alpha).cast(),
            b.address()? as *const _,
            b.dtype(),
            b.pitch as i32,
            a.address()? as *const _,
            a.dtype(),
            a.pitch as i32,
            (&raw const beta).cast(),
            c.address()? as *mut _,
            c.dtype(),
            c.pitch as i32,
            CUBLAS_COMPUTE_32F,
            CUBLAS_GEMM_DFALT,
        )
    }
    .w()
}

/// The blocks of queries of every head: (offset of the head's queries, of its keys, first query, queries).
fn blocks(q: &Tensor, k: &Tensor, heads: Heads) -> Result<Vec<(usize, usize, usize, usize)>> {
    let ((batch, n, channels), (_, m, _)) = (q.dims3()?, k.dims3()?);
    let rows = (SCORES / m.max(1)).clamp(1, n.max(1));
    let mut all = Vec::new();
    for image in 0..batch {
        for head in 0..heads.count {
            let column = head * (channels / heads.count);
            for first in (0..n).step_by(rows) {
                let query = (image * n + first) * channels + column;
                all.push((query, image * m * channels + column, first, rows.min(n - first)));
            }
        }
    }
    Ok(all)
}

pub(super) fn attention_fwd(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<Tensor> {
    let ((_, n, channels), (_, m, _)) = (q.dims3()?, k.dims3()?);
    let d = channels / heads.count;
    let rows = (SCORES / m.max(1)).clamp(1, n.max(1));
    let (s, p) = (unset(q, (rows, m), DType::F32)?, unset(q, (rows, m), q.dtype())?);
    let o = unset(q, q.shape(), q.dtype())?;
    let scores = |tensor| Rows { tensor, offset: 0, pitch: m };
    let at = |tensor, offset| Rows { tensor, offset, pitch: channels };
    for (query, key, first, rows) in blocks(q, k, heads)? {
        let size = (rows, m, d);
        product(scores(&s), at(q, query), at(k, key), Transposed::Second, size, (1.0 / (d as f64).sqrt(), 0.0))?;
        let kernel = Kernel::of("softmax", "softmax_fwd", q)?.output("p", &p).input("s", &s);
        kernel.int("m", m).int("first", first).flag("causal", heads.causal).launch([rows, 1, 1], 256, 0)?;
        product(at(&o, query), scores(&p), at(v, key), Transposed::Neither, (rows, d, m), (1.0, 0.0))?;
    }
    Ok(o)
}

pub(super) fn attention_bwd(
    cotangent: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
) -> Result<(Tensor, Tensor, Tensor)> {
    let ((_, n, channels), (_, m, _)) = (q.dims3()?, k.dims3()?);
    let d = channels / heads.count;
    let scale = 1.0 / (d as f64).sqrt();
    let rows = (SCORES / m.max(1)).clamp(1, n.max(1));
    let (s, d_p) = (unset(q, (rows, m), DType::F32)?, unset(q, (rows, m), DType::F32)?);
    let (p, d_s) = (unset(q, (rows, m), q.dtype())?, unset(q, (rows, m), q.dtype())?);
    let d_q = unset(q, q.shape(), q.dtype())?;
    // in f32: the blocks of queries add to them
    let (d_k, d_v) = (unset(k, k.shape(), DType::F32)?, unset(v, v.shape(), DType::F32)?);
    let scores = |tensor| Rows { tensor, offset: 0, pitch: m };
    let at = |tensor, offset| Rows { tensor, offset, pitch: channels };
    for (query, key, first, rows) in blocks(q, k, heads)? {
        let sum = if first == 0 { 0.0 } else { 1.0 };
        product(scores(&s), at(q, query), at(k, key), Transposed::Second, (rows, m, d), (scale, 0.0))?;
        product(scores(&d_p), at(cotangent, query), at(v, key), Transposed::Second, (rows, m, d), (1.0, 0.0))?;
        let kernel = Kernel::of("softmax", "softmax_bwd", q)?.output("p", &p).output("d_s", &d_s);
        let kernel = kernel.input("s", &s).input("d_p", &d_p);
        kernel.int("m", m).int("first", first).flag("causal", heads.causal).launch([rows, 1, 1], 256, 0)?;
        product(at(&d_v, key), scores(&p), at(cotangent, query), Transposed::First, (m, d, rows), (1.0, sum))?;
        product(at(&d_q, query), scores(&d_s), at(k, key), Transposed::Neither, (rows, d, m), (scale, 0.0))?;
        product(at(&d_k, key), scores(&d_s), at(q, query), Transposed::First, (m, d, rows), (scale, sum))?;
    }
    Ok((d_q, d_k.to_dtype(k.dtype())?, d_v.to_dtype(v.dtype())?))
}
