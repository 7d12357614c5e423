//! Attention on a GPU: tiles in shared memory for heads of up to 160 numbers (`ops/cuda/attention.cuh`), cuBLAS and a
//! softmax over a few queries at a time for larger ones (the VAE's one head of 512).

use candle_core::{DType, Result, Tensor};

use super::Heads;
use super::sizes::{LARGEST_HEAD, Tiled};
use crate::ops::cuda::{Kernel, aligned, unset};

/// Blocks that fill a large GPU twice over.
const BLOCKS: usize = 264;

/// What the forward leaves for the backward.
#[derive(Clone, Debug)]
pub struct Kept {
    output: Tensor,
    /// L of every row, (B, heads, N), f32: 4 bytes a query and head.
    lse: Tensor,
}

/// Adds the sizes, with which every tiled kernel's parameters end.
fn sizes(kernel: Kernel, q: &Tensor, k: &Tensor, heads: Heads, tensors: &[&Tensor]) -> Result<Kernel> {
    let ((_, n, channels), (_, m, _)) = (q.dims3()?, k.dims3()?);
    let d = channels / heads.count;
    let vector = (d * q.dtype().size_in_bytes()).is_multiple_of(16) && aligned(tensors)?;
    let kernel = kernel.int("n", n).int("m", m).int("channels", channels).int("d", d);
    Ok(kernel.flag("causal", heads.causal).flag("vector", vector).float("scale", 1.0 / (d as f64).sqrt()))
}

pub(super) fn attention_fwd(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<(Tensor, Option<Kept>)> {
    let (batch, n, channels) = q.dims3()?;
    let d = channels / heads.count;
    if d > LARGEST_HEAD {
        return Ok((super::large::attention_fwd(q, k, v, heads)?, None));
    }
    let tiled = Tiled::new(q.dtype(), d)?;
    let output = unset(q, q.shape(), q.dtype())?;
    let lse = unset(q, (batch, heads.count, n), DType::F32)?;
    let kernel = Kernel::of(tiled.module, tiled.names[0], q)?.output("o", &output).output("lse", &lse);
    let kernel = sizes(kernel.input("q", q).input("k", k).input("v", v), q, k, heads, &[q, k, v])?;
    kernel.launch([n.div_ceil(tiled.forward_rows), heads.count, batch], tiled.threads, tiled.forward_bytes)?;
    Ok((output.clone(), Some(Kept { output, lse })))
}

pub(super) fn attention_bwd(
    cotangent: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
    kept: Option<&Kept>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let ((batch, n, channels), (_, m, _)) = (q.dims3()?, k.dims3()?);
    let d = channels / heads.count;
    if d > LARGEST_HEAD {
        return super::large::attention_bwd(cotangent, q, k, v, heads);
    }
    let kept = match kept {
        Some(kept) => kept.clone(),
        None => attention_fwd(q, k, v, heads)?.1.expect("the tiled kernels keep their statistics"),
    };
    let tiled = Tiled::new(q.dtype(), d)?;

    let rows = batch * heads.count * n;
    let delta = unset(q, (batch, heads.count, n), DType::F32)?;
    let kernel = Kernel::of(tiled.module, "attention_delta", q)?.output("delta", &delta);
    let kernel = kernel.input("d_o", cotangent).input("o", &kept.output);
    let kernel = kernel.int("batch", batch).int("n", n).int("heads", heads.count).int("d", d);
    kernel.launch([rows.div_ceil(8), 1, 1], 256, 0)?;

    let d_q = unset(q, q.shape(), q.dtype())?;
    let inputs = |kernel: Kernel| {
        let kernel = kernel.input("d_o", cotangent).input("lse", &kept.lse).input("delta", &delta);
        sizes(kernel.input("q", q).input("k", k).input("v", v), q, k, heads, &[q, k, v, cotangent])
    };
    let kernel = inputs(Kernel::of(tiled.module, tiled.names[1], q)?.output("d_q", &d_q))?;
    kernel.launch([n.div_ceil(tiled.backward_rows), heads.count, batch], tiled.threads, tiled.backward_bytes)?;

    // few keys: the queries are split among blocks, or most of the GPU would wait for a few
    let tiles = m.div_ceil(tiled.backward_rows);
    let splits =
        if heads.causal { 1 } else { (BLOCKS / (tiles * heads.count * batch).max(1)).clamp(1, n.div_ceil(128)) };
    let (d_k, d_v) = (unset(k, k.shape(), k.dtype())?, unset(v, v.shape(), v.dtype())?);
    let parts = if splits > 1 { Some(unset(k, (splits, 2, k.elem_count()), DType::F32)?) } else { None };
    let kernel = Kernel::of(tiled.module, tiled.names[2], q)?.output("d_k", &d_k).output("d_v", &d_v);
    let kernel = inputs(kernel.output_if_any("parts", parts.as_ref(), DType::F32).int("splits", splits))?;
    kernel.launch([tiles * splits, heads.count, batch], tiled.threads, tiled.backward_bytes)?;
    if let Some(parts) = &parts {
        let kernel = Kernel::of(tiled.module, "attention_sum", k)?.output("d_k", &d_k).output("d_v", &d_v);
        let kernel = kernel.input("parts", parts).int("splits", splits).int("n", k.elem_count());
        kernel.launch([(2 * k.elem_count()).div_ceil(256), 1, 1], 256, 0)?;
    }
    Ok((d_q, d_k, d_v))
}
