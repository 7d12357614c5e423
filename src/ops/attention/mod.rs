//! Scaled dot-product attention of several heads, without the whole score matrix.
//!
//! ```text
//! S = Q Kᵀ / sqrt(d),  P = softmax(S),  O = P V          per head: Q (N, d)  K, V (M, d)
//!
//! d_V = Pᵀ d_O
//! d_P = d_O Vᵀ
//! d_S = P (d_P - rowsum(P d_P))
//! d_Q = d_S K / sqrt(d)        d_K = d_Sᵀ Q / sqrt(d)
//! ```
//!
//! The heads are slices of the channels, (B, N, heads · d), so nothing is transposed. Scores exist for a tile of queries
//! at a time (Rabe & Staats 2021; Dao et al. 2022); the backward computes them again from Q and K.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod large;
#[cfg(any(feature = "cuda", test))]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
mod sizes;
#[cfg(target_arch = "x86_64")]
mod tiled;

use candle_core::{Result, Tensor, bail};

use super::per_dtype;
use cpu::{attention_bwd as attention_bwd_cpu, attention_fwd as attention_fwd_cpu};

/// How the channels split and which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    pub count: usize,
    /// Query i sees keys 0..=i only.
    pub causal: bool,
}

/// What a forward pass keeps for its backward beside its inputs: nothing on a CPU; on a GPU the output and a number for
/// each row of scores, which save the backward a pass over the scores.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    #[cfg(feature = "cuda")]
    cuda: Option<cuda::Kept>,
}

/// q (B, N, C), k and v (B, M, C) -> (B, N, C).
pub fn attention_fwd(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<Tensor> {
    Ok(attention_fwd_kept(q, k, v, heads)?.0)
}

/// As [`attention_fwd`], with what [`attention_bwd_kept`] is faster with.
pub fn attention_fwd_kept(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<(Tensor, Kept)> {
    check(q, k, v, heads)?;
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        let (output, kept) = cuda::attention_fwd(q, k, v, heads)?;
        return Ok((output, Kept { cuda: kept }));
    }
    fn on_cpu(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<Tensor> {
        per_dtype!(q, attention_fwd_cpu(q, k, v, heads))
    }
    Ok((on_cpu(q, k, v, heads)?, Kept::default()))
}

/// Gradients with respect to (q, k, v).
pub fn attention_bwd(
    cotangent: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
) -> Result<(Tensor, Tensor, Tensor)> {
    attention_bwd_kept(cotangent, q, k, v, heads, &Kept::default())
}

/// As [`attention_bwd`], with what the forward of the same inputs kept.
pub fn attention_bwd_kept(
    cotangent: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
    kept: &Kept,
) -> Result<(Tensor, Tensor, Tensor)> {
    check(q, k, v, heads)?;
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        return cuda::attention_bwd(cotangent, q, k, v, heads, kept.cuda.as_ref());
    }
    let _ = kept;
    per_dtype!(q, attention_bwd_cpu(cotangent, q, k, v, heads))
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<()> {
    let ((b, n, c), (bk, m, ck)) = (q.dims3()?, k.dims3()?);
    if k.dims() != v.dims() || b != bk || c != ck {
        bail!("attention: q {:?}, k {:?}, v {:?}", q.dims(), k.dims(), v.dims());
    }
    if heads.count == 0 || c % heads.count != 0 {
        bail!("attention: {c} channels do not divide into {} heads", heads.count);
    }
    if heads.causal && n != m {
        bail!("causal attention needs as many queries ({n}) as keys ({m})");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check};
    use candle_core::D;

    fn composed(t: &[Tensor], heads: Heads) -> Result<Tensor> {
        let split = |x: &Tensor| {
            let (b, n, c) = x.dims3()?;
            x.reshape((b, n, heads.count, c / heads.count))?.transpose(1, 2)?.contiguous()
        };
        let (b, n, c) = t[0].dims3()?;
        let (q, k, v) = (split(&t[0])?, split(&t[1])?, split(&t[2])?);
        let mut scores = (q.matmul(&k.t()?.contiguous()?)? / ((c / heads.count) as f64).sqrt())?;
        if heads.causal {
            let mask: Vec<f64> = (0..n * n).map(|i| if i % n > i / n { -1e30 } else { 0.0 }).collect();
            let mask = Tensor::from_vec(mask, (n, n), t[0].device())?.to_dtype(t[0].dtype())?;
            scores = scores.broadcast_add(&mask)?;
        }
        let e = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
        p.matmul(&v)?.transpose(1, 2)?.contiguous()?.reshape((b, n, c))
    }

    #[test]
    fn agrees_with_autograd_and_finite_differences() {
        // (queries, keys, heads, head dimension); the last one needs several tiles of queries
        for (n, m, count, d, causal) in [
            (1, 1, 1, 1, false),
            (5, 7, 2, 3, false),
            (8, 77, 3, 4, false),
            (9, 9, 2, 5, true),
            (300, 33, 2, 8, false),
            (270, 270, 1, 3, true),
            // several tiles of keys, and channels beyond one block
            (33, 290, 2, 40, false),
        ] {
            let heads = Heads { count, causal };
            let c = count * d;
            check(
                &[Case::normal(&[2, n, c], 1), Case::normal(&[2, m, c], 2), Case::normal(&[2, m, c], 3)],
                |t| attention_fwd(&t[0], &t[1], &t[2], heads),
                |t, dy| {
                    let (dq, dk, dv) = attention_bwd(dy, &t[0], &t[1], &t[2], heads)?;
                    Ok(vec![dq, dk, dv])
                },
                |t| composed(t, heads),
            );
        }
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        let heads = Heads { count: 1, causal: false };
        let f32 = |dims: &[usize], seed| Case::normal(dims, seed).to_dtype(candle_core::DType::F32).unwrap();
        let (q, v) = (f32(&[1, 40, 8], 1), f32(&[1, 200, 8], 3));
        for bad in [f32::NAN, f32::INFINITY] {
            let mut k = f32(&[1, 200, 8], 2).flatten_all().unwrap().to_vec1::<f32>().unwrap();
            k[170 * 8 + 3] = bad;
            let k = Tensor::from_vec(k, (1, 200, 8), &candle_core::Device::Cpu).unwrap();
            let out = attention_fwd(&q, &k, &v, heads).unwrap();
            assert!(!crate::ops::is_finite(&out).unwrap(), "{bad} in a key");
        }
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let q = (Case::normal(&[1, 4, 8], 1) * 1e3).unwrap().to_dtype(candle_core::DType::F32).unwrap();
        let y = attention_fwd(&q, &q, &q, Heads { count: 1, causal: false }).unwrap();
        assert!(y.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|x| x.is_finite()));
    }
}
