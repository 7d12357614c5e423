use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::Heads;
#[cfg(target_arch = "x86_64")]
use super::tiled;
use crate::ops::gemm::{Threads, View, ViewMut, gemm, scaled_gemm};
#[cfg(target_arch = "x86_64")]
use crate::ops::tiles;
use crate::ops::vector::{max_of, sum_of, vectorised};
use crate::ops::{Host, Real, SharedMut, buffer, tensor_from};

/// Scores that one task holds at a time, a tile of queries against all keys: 1 MiB in f32, twice that in the backward.
const TILE_SCORES: usize = 1 << 18;

pub(super) struct Shape {
    pub(super) batch: usize,
    pub(super) queries: usize,
    pub(super) keys: usize,
    pub(super) channels: usize,
    pub(super) heads: Heads,
}

impl Shape {
    fn of(q: &Tensor, k: &Tensor, heads: Heads) -> Result<Self> {
        let (batch, queries, channels) = q.dims3()?;
        Ok(Self { batch, queries, keys: k.dims()[1], channels, heads })
    }
    pub(super) fn dim(&self) -> usize {
        self.channels / self.heads.count
    }
    fn tile(&self) -> usize {
        (TILE_SCORES / self.keys).clamp(16, 256)
    }
    pub(super) fn scale<T: Real>(&self) -> T {
        T::lit(1.0 / (self.dim() as f64).sqrt())
    }
    /// Offset of row `row` of head `head` of image `image` in a (B, rows, C) buffer.
    pub(super) fn offset(&self, image: usize, rows: usize, row: usize, head: usize) -> usize {
        (image * rows + row) * self.channels + head * self.dim()
    }
    /// The rows `first..first + rows` of one head as a matrix (rows, d), of a buffer with `total` rows an image.
    fn head<'a, T: Real>(
        &self,
        data: &'a [T],
        image: usize,
        total: usize,
        head: usize,
        first: usize,
        rows: usize,
    ) -> View<'a, T> {
        View::strided(&data[self.offset(image, total, first, head)..], rows, self.dim(), self.channels, 1)
    }
    /// softmax(Q Kᵀ / sqrt(d)) of `rows` queries from `first` on, into `p` (rows, keys).
    fn probabilities<T: Real>(&self, q: View<T>, k: View<T>, first: usize, rows: usize, p: &mut [T], threads: Threads) {
        scaled_gemm(self.scale(), q, k.t(), ViewMut::rows(p, rows, self.keys), false, threads);
        vectorised(
            #[inline(always)]
            || {
                for (row, p) in p.chunks_mut(self.keys).enumerate() {
                    let visible = if self.heads.causal { first + row + 1 } else { self.keys };
                    let (p, hidden) = p.split_at_mut(visible);
                    hidden.fill(T::zero());
                    let max = max_of(p);
                    p.iter_mut().for_each(|p| *p = (*p - max).exp_fast());
                    let inverse = T::one() / sum_of(p, |_, p| p);
                    p.iter_mut().for_each(|p| *p *= inverse);
                }
            },
        );
    }
}

pub(super) fn attention_fwd<T: Real>(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<Tensor> {
    let shape = Shape::of(q, k, heads)?;
    let dims = q.dims();
    let (q, k, v) = (Host::<T>::read(q)?, Host::<T>::read(k)?, Host::<T>::read(v)?);
    let (q, k, v): (&[T], &[T], &[T]) = (&q, &k, &v);
    let mut out = buffer(q.len());
    #[cfg(target_arch = "x86_64")]
    if let (true, Some(q), Some(k), Some(v), Some(out_f32)) =
        (tiles::available(), T::as_f32(q), T::as_f32(k), T::as_f32(v), T::as_f32_mut(&mut out))
    {
        tiled::forward(&shape, q, k, v, out_f32);
        return tensor_from(out, dims);
    }
    let target = SharedMut::new(&mut out);
    let tile = shape.tile();
    let tiles = shape.queries.div_ceil(tile);
    (0..shape.batch * heads.count * tiles).into_par_iter().for_each_init(Vec::new, |p, task| {
        let (image, head, first) = (task / (heads.count * tiles), task / tiles % heads.count, task % tiles * tile);
        let rows = tile.min(shape.queries - first);
        p.resize(rows * shape.keys, T::zero());
        let queries = shape.head(q, image, shape.queries, head, first, rows);
        let keys = shape.head(k, image, shape.keys, head, 0, shape.keys);
        let values = shape.head(v, image, shape.keys, head, 0, shape.keys);
        shape.probabilities(queries, keys, first, rows, p, Threads::One);
        // SAFETY: tasks write disjoint (image, head, rows) blocks of the output.
        let o = unsafe {
            ViewMut::shared(target, shape.offset(image, shape.queries, first, head), rows, shape.dim(), shape.channels)
        };
        gemm(View::rows(p, rows, shape.keys), values, o, false, Threads::One);
    });
    tensor_from(out, dims)
}

pub(super) fn attention_bwd<T: Real>(
    cotangent: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
) -> Result<(Tensor, Tensor, Tensor)> {
    let shape = Shape::of(q, k, heads)?;
    let (q_dims, k_dims) = (q.dims(), k.dims());
    let (dout, q, k, v) = (Host::<T>::read(cotangent)?, Host::<T>::read(q)?, Host::<T>::read(k)?, Host::<T>::read(v)?);
    let (dout, q, k, v): (&[T], &[T], &[T], &[T]) = (&dout, &q, &k, &v);
    let (mut dq, mut dk, mut dv) = (buffer(q.len()), buffer(k.len()), buffer(v.len()));
    #[cfg(target_arch = "x86_64")]
    if let (true, Some(dout), Some(q), Some(k), Some(v), Some(dq_f32), Some(dk_f32), Some(dv_f32)) = (
        tiles::available(),
        T::as_f32(dout),
        T::as_f32(q),
        T::as_f32(k),
        T::as_f32(v),
        T::as_f32_mut(&mut dq),
        T::as_f32_mut(&mut dk),
        T::as_f32_mut(&mut dv),
    ) {
        tiled::backward(&shape, dout, q, k, v, dq_f32, dk_f32, dv_f32);
        return Ok((tensor_from(dq, q_dims)?, tensor_from(dk, k_dims)?, tensor_from(dv, k_dims)?));
    }
    let (dq_target, dk_target, dv_target) = (SharedMut::new(&mut dq), SharedMut::new(&mut dk), SharedMut::new(&mut dv));
    let tile = shape.tile();
    let tasks = shape.batch * heads.count;
    let threads = if tasks < rayon::current_num_threads() { Threads::All } else { Threads::One };
    (0..tasks).into_par_iter().for_each_init(
        || (Vec::new(), Vec::new()),
        |(p, dp), task| {
            let (image, head) = (task / heads.count, task % heads.count);
            let keys = shape.head(k, image, shape.keys, head, 0, shape.keys);
            let values = shape.head(v, image, shape.keys, head, 0, shape.keys);
            for first in (0..shape.queries).step_by(tile) {
                let rows = tile.min(shape.queries - first);
                p.resize(rows * shape.keys, T::zero());
                dp.resize(rows * shape.keys, T::zero());
                let queries = shape.head(q, image, shape.queries, head, first, rows);
                let d_o = shape.head(dout, image, shape.queries, head, first, rows);
                shape.probabilities(queries, keys, first, rows, p, threads);

                // SAFETY (here and below): a task writes only its own (image, head) block of each gradient, and its
                // products run one after the other.
                let block = |target, total, row, rows| unsafe {
                    ViewMut::shared(target, shape.offset(image, total, row, head), rows, shape.dim(), shape.channels)
                };
                // d_V += Pᵀ d_O
                gemm(
                    View::rows(p, rows, shape.keys).t(),
                    d_o,
                    block(dv_target, shape.keys, 0, shape.keys),
                    first > 0,
                    threads,
                );
                // d_P = d_O Vᵀ, then d_S in its place
                gemm(d_o, values.t(), ViewMut::rows(dp, rows, shape.keys), false, threads);
                vectorised(
                    #[inline(always)]
                    || {
                        for (p, dp) in p.chunks(shape.keys).zip(dp.chunks_mut(shape.keys)) {
                            let p = &p[..dp.len()];
                            let dot = sum_of(dp, |i, dp| p[i] * dp);
                            p.iter().zip(dp.iter_mut()).for_each(|(p, dp)| *dp = *p * (*dp - dot));
                        }
                    },
                );
                scaled_gemm(
                    shape.scale(),
                    View::rows(dp, rows, shape.keys),
                    keys,
                    block(dq_target, shape.queries, first, rows),
                    false,
                    threads,
                );
                scaled_gemm(
                    shape.scale(),
                    View::rows(dp, rows, shape.keys).t(),
                    queries,
                    block(dk_target, shape.keys, 0, shape.keys),
                    first > 0,
                    threads,
                );
            }
        },
    );
    Ok((tensor_from(dq, q_dims)?, tensor_from(dk, k_dims)?, tensor_from(dv, k_dims)?))
}
