//! The f32 kernels on AVX-512 tiles.
//!
//! The forward has queries as lanes: a block of 32 meets the keys tile by tile, with a running softmax in which nothing
//! runs across a vector, and no dimension of a head leaves lanes empty. The backward has keys as lanes: scores of a block
//! of queries against all keys stay in the cache, for the gradients of the query and, by columns, of keys and values.

use rayon::prelude::*;

use super::cpu::Shape;
use crate::ops::gemm::FLOPS;
use crate::ops::tasks::share;
use crate::ops::tiles::{
    Columns, HIDDEN, LANES, ROWS, Softmax, Strided, WIDE, exponentials, lanes_to_rows, rows_to_lanes, softmax_backward,
    strided_tile,
};
use crate::ops::{SharedMut, buffer};

/// Scores that a block of queries holds in the backward: 256 KiB, and as much for their gradients.
const BLOCK_SCORES: usize = 1 << 16;
/// Keys that a block of queries meets at a time: their scores are half of a first-level cache.
const KEY_TILE: usize = 128;

/// Rows of one head, (row, d) at distance `stride`.
#[derive(Clone, Copy)]
struct Head<'a> {
    data: &'a [f32],
    stride: usize,
    rows: usize,
    dim: usize,
}

impl<'a> Head<'a> {
    fn of(shape: &Shape, data: &'a [f32], image: usize, rows: usize, head: usize) -> Self {
        let data = &data[shape.offset(image, rows, 0, head)..];
        assert!(data.len() >= (rows - 1) * shape.channels + shape.dim());
        Self { data, stride: shape.channels, rows, dim: shape.dim() }
    }
    fn row(&self, row: usize) -> *const f32 {
        self.data[row * self.stride..][..self.dim].as_ptr()
    }
}

/// Panels of 32 lanes, each (depth, 32).
struct Panels {
    data: Vec<f32>,
    depth: usize,
    lanes: usize,
}

impl Panels {
    /// Rows as lanes: for S = Q Kᵀ.
    fn of_rows(head: Head) -> Self {
        let count = head.rows.div_ceil(WIDE);
        let mut data = buffer(count * WIDE * head.dim);
        for (p, panel) in data.chunks_mut(WIDE * head.dim).enumerate() {
            let rows: [*const f32; WIDE] = std::array::from_fn(|lane| {
                let row = p * WIDE + lane;
                if row < head.rows { head.row(row) } else { std::ptr::null() }
            });
            // SAFETY: rows have `dim` numbers; the panel has 32 lanes for each. The CPU was asked (`tiles::available`).
            unsafe { rows_to_lanes(&rows, head.dim, panel.as_mut_ptr()) };
        }
        Self { data, depth: head.dim, lanes: head.rows }
    }
    /// Channels as lanes: for P V.
    fn of_channels(head: Head) -> Self {
        let count = head.dim.div_ceil(WIDE);
        let mut data = buffer::<f32>(count * WIDE * head.rows);
        for (p, panel) in data.chunks_mut(WIDE * head.rows).enumerate() {
            let channels = p * WIDE..head.dim.min((p + 1) * WIDE);
            for (row, lanes) in panel.chunks_mut(WIDE).enumerate() {
                let (lanes, rest) = lanes.split_at_mut(channels.len());
                lanes.copy_from_slice(&head.data[row * head.stride..][channels.clone()]);
                rest.fill(0.0);
            }
        }
        Self { data, depth: head.rows, lanes: head.dim }
    }
    fn count(&self) -> usize {
        self.lanes.div_ceil(WIDE)
    }
    fn panel(&self, p: usize) -> (*const f32, usize) {
        (self.data[p * WIDE * self.depth..][..WIDE * self.depth].as_ptr(), (self.lanes - p * WIDE).min(WIDE))
    }
}

/// `destination[r, lane] = sum_k rows[r][k] panels[k][lane]`; at most 12 rows at a distance of `stride`.
///
/// # Safety
/// The CPU has AVX-512, `rows` rows of `panels.depth` numbers are readable, the destination's rows (`row_stride` apart)
/// are writable and exclusive.
unsafe fn product(
    first: *const f32,
    stride: usize,
    rows: usize,
    panels: &Panels,
    destination: *mut f32,
    row_stride: usize,
) {
    for p in 0..panels.count() {
        let (lanes, count) = panels.panel(p);
        let operands = Strided { first, stride, depth: panels.depth, lanes };
        // SAFETY: the caller's promises.
        unsafe { strided_tile(rows, &operands, destination.wrapping_add(p * WIDE), row_stride, count) };
    }
}

/// In how many parts the queries of a head are divided, so that few heads keep several threads busy; a function of the
/// shape alone, as sums depend on it.
fn parts(shape: &Shape) -> usize {
    let heads = shape.batch * shape.heads.count;
    if heads >= 4 { 1 } else { (4 / heads).min(shape.queries.div_ceil(64)) }
}

fn count_flops(shape: &Shape, products: usize) {
    let work = shape.batch * shape.heads.count * shape.queries * shape.keys * shape.dim();
    FLOPS.fetch_add((2 * products * work) as u64, std::sync::atomic::Ordering::Relaxed);
}

/// exp of the scaled scores of one row of queries, zero where the key is hidden; the inverse of their sum.
fn row_exponentials(shape: &Shape, query: usize, scores: &mut [f32]) -> f32 {
    let visible = if shape.heads.causal { query + 1 } else { shape.keys };
    let (scores, hidden) = scores.split_at_mut(visible);
    hidden.fill(0.0);
    // SAFETY: the CPU was asked before this module's kernels were chosen.
    1.0 / unsafe { exponentials(scores, shape.scale()) }
}

pub(super) fn forward(shape: &Shape, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) {
    count_flops(shape, 2);
    let (heads, parts, dim) = (shape.heads.count, parts(shape), shape.dim());
    let target = SharedMut::new(out);
    (0..shape.batch * heads * parts).into_par_iter().for_each(|task| {
        let (image, head, part) = (task / (heads * parts), task / parts % heads, task % parts);
        let q = Head::of(shape, q, image, shape.queries, head);
        let k = Head::of(shape, k, image, shape.keys, head);
        let v = Head::of(shape, v, image, shape.keys, head);
        let mut lanes = buffer(dim * WIDE);
        let mut scores = buffer(KEY_TILE.min(shape.keys) * WIDE);
        let mut o = buffer(dim * WIDE);
        let mine = share(shape.queries, parts, part);
        for first in mine.clone().step_by(WIDE) {
            let queries = WIDE.min(mine.end - first);
            let rows =
                std::array::from_fn::<_, WIDE, _>(|r| if r < queries { q.row(first + r) } else { std::ptr::null() });
            // SAFETY (here and below): the heads' rows were checked; a task writes its own (image, head, rows) block of
            // the output. The CPU was asked before this module's kernels were chosen.
            unsafe { rows_to_lanes(&rows, dim, lanes.as_mut_ptr()) };
            let mut softmax = Softmax::new(shape.scale());
            let visible = if shape.heads.causal { shape.keys.min(first + queries) } else { shape.keys };
            for key in (0..visible).step_by(KEY_TILE) {
                let keys = KEY_TILE.min(visible - key);
                let scores = &mut scores[..keys * WIDE];
                let blocks = keys.div_ceil(ROWS);
                for block in (0..blocks).map(|b| share(keys, blocks, b)) {
                    let first = k.row(key + block.start);
                    let operands = Strided { first, stride: k.stride, depth: dim, lanes: lanes.as_ptr() };
                    let target = scores[block.start * WIDE..].as_mut_ptr();
                    unsafe { strided_tile(block.len(), &operands, target, WIDE, queries) };
                }
                if shape.heads.causal {
                    for (key, scores) in (key..).zip(scores.chunks_mut(WIDE)) {
                        scores[..key.saturating_sub(first).min(queries)].fill(HIDDEN);
                    }
                }
                let earlier = if key == 0 { &mut [][..] } else { &mut o[..] };
                let products = Columns {
                    numbers: v.row(key),
                    step: v.stride,
                    vectors: scores.as_ptr(),
                    stride: WIDE,
                    depth: keys,
                };
                unsafe {
                    if queries > LANES {
                        softmax.advance::<2>(scores, earlier)
                    } else {
                        softmax.advance::<1>(scores, earlier)
                    }
                    products.product(dim, o.as_mut_ptr(), WIDE, queries, key == 0);
                }
            }
            let inverse = softmax.sum.map(|sum| 1.0 / sum);
            for o in o.chunks_exact_mut(WIDE) {
                o.iter_mut().zip(inverse).for_each(|(o, inverse)| *o *= inverse);
            }
            let rows = std::array::from_fn::<_, WIDE, _>(|r| {
                let row = first + r.min(queries - 1);
                target.at(shape.offset(image, shape.queries, row, head))
            });
            unsafe { lanes_to_rows(o.as_ptr(), WIDE, dim, &rows[..queries]) };
        }
    });
}

/// Gradients into dq, dk, dv.
#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    shape: &Shape,
    dout: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    count_flops(shape, 5);
    let (heads, parts) = (shape.heads.count, parts(shape));
    // parts of a head's queries beyond the first sum into buffers of their own
    let size = dk.len();
    let (mut more_dk, mut more_dv) = (buffer::<f32>((parts - 1) * size), buffer::<f32>((parts - 1) * size));
    let dq_target = SharedMut::new(dq);
    let dk_targets: Vec<_> = std::iter::once(&mut *dk).chain(more_dk.chunks_mut(size)).map(SharedMut::new).collect();
    let dv_targets: Vec<_> = std::iter::once(&mut *dv).chain(more_dv.chunks_mut(size)).map(SharedMut::new).collect();
    let block_rows = (BLOCK_SCORES / shape.keys / ROWS * ROWS).clamp(ROWS, 8 * ROWS);
    (0..shape.batch * heads * parts).into_par_iter().for_each(|task| {
        let (image, head, part) = (task / (heads * parts), task / parts % heads, task % parts);
        let q = Head::of(shape, q, image, shape.queries, head);
        let d_o = Head::of(shape, dout, image, shape.queries, head);
        let k = Head::of(shape, k, image, shape.keys, head);
        let v = Head::of(shape, v, image, shape.keys, head);
        let (keys, values, key_channels) = (Panels::of_rows(k), Panels::of_rows(v), Panels::of_channels(k));
        // room for the last vector, which ends behind the last key
        let mut scores = buffer(block_rows * shape.keys + LANES);
        let mut d_scores = buffer(block_rows * shape.keys + LANES);
        // gradients of keys and values, (channel, key)
        let width = shape.keys.next_multiple_of(LANES);
        let (mut dk_columns, mut dv_columns) = (buffer::<f32>(shape.dim() * width), buffer::<f32>(shape.dim() * width));
        let mine = share(shape.queries, parts, part);
        for start in mine.clone().step_by(block_rows) {
            let depth = block_rows.min(mine.end - start);
            let blocks = depth.div_ceil(ROWS);
            for block in (0..blocks).map(|b| share(depth, blocks, b)) {
                let (first, rows) = (start + block.start, block.len());
                let range = block.start * shape.keys..block.end * shape.keys;
                let (p, d_p) = (&mut scores[range.clone()], &mut d_scores[range]);
                // SAFETY: the heads' rows were checked; a task writes its own (image, head, rows) block of dq.
                unsafe {
                    product(q.row(first), q.stride, rows, &keys, p.as_mut_ptr(), shape.keys);
                    product(d_o.row(first), d_o.stride, rows, &values, d_p.as_mut_ptr(), shape.keys);
                    for (r, (p, d_p)) in p.chunks_mut(shape.keys).zip(d_p.chunks_mut(shape.keys)).enumerate() {
                        let inverse = row_exponentials(shape, first + r, p);
                        softmax_backward(p, d_p, inverse, shape.scale());
                    }
                    let dq = dq_target.at(shape.offset(image, shape.queries, first, head));
                    product(d_p.as_ptr(), shape.keys, rows, &key_channels, dq, shape.channels);
                }
            }
            let replace = start == mine.start;
            for (head, scores, sums) in [(d_o, &scores, &mut dv_columns), (q, &d_scores, &mut dk_columns)] {
                let (numbers, vectors) = (head.row(start), scores.as_ptr());
                let products = Columns { numbers, step: head.stride, vectors, stride: shape.keys, depth };
                // SAFETY: rows of queries and of scores were measured above, the sums have `width` numbers a channel.
                unsafe { products.product(shape.dim(), sums.as_mut_ptr(), width, shape.keys, replace) };
            }
        }
        for (sums, targets) in [(&dk_columns, &dk_targets), (&dv_columns, &dv_targets)] {
            for key in (0..shape.keys).step_by(WIDE) {
                let count = WIDE.min(shape.keys - key);
                let rows = std::array::from_fn::<_, WIDE, _>(|r| {
                    targets[part].at(shape.offset(image, shape.keys, key + r.min(count - 1), head))
                });
                // SAFETY: a task writes its own (image, head) block of its part's dk and dv.
                unsafe { lanes_to_rows(sums[key..].as_ptr(), width, shape.dim(), &rows[..count]) };
            }
        }
    });
    for (sum, more) in [(dk, &more_dk), (dv, &more_dv)] {
        for part in more.chunks(size) {
            sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        }
    }
}
