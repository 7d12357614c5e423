//! The tile: up to twelve rows times one or two vectors of sixteen lanes, in registers (AVX-512).
//!
//! 24 accumulators, two vectors of lanes and one broadcast fill 27 of the 32 registers; each step of the reduction loads
//! 2 vectors and 12 scalars for 24 fused multiply-adds, so the multipliers are what limits.

// indices of registers: the loops are unrolled, and both sides are indexed
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::tasks::share;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;
/// Lanes of a tile at most, and of one step of a panel.
pub(crate) const WIDE: usize = 2 * LANES;
/// Rows of a tile at most.
pub(crate) const ROWS: usize = 12;

/// Runs `body` with the constant `$R` equal to `$height`, which is 1 to 12.
macro_rules! each_height {
    ($height:expr, $R:ident => $body:block) => {
        each_height!(@ $height, $R, $body, 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    (@ $height:expr, $R:ident, $body:block, $($n:literal)*) => {
        match $height {
            $($n => { const $R: usize = $n; $body })*
            other => unreachable!("a tile of {other} rows"),
        }
    };
}

pub(crate) use each_height;

/// Whether this CPU has what the kernels here need.
pub(crate) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
}

/// A stretch of the reduction: `depth` numbers of each row, and as many vectors of lanes.
#[derive(Clone, Copy)]
pub(crate) struct Segment<const R: usize> {
    /// Where each row's numbers start, contiguous.
    pub rows: [*const f32; R],
    pub depth: usize,
    /// The lanes that the first number of each row meets.
    pub lanes: *const f32,
    /// From the lanes of one number to those of the next.
    pub stride: usize,
}

/// The stretches of one tile's reduction.
pub(crate) trait Segments<const R: usize> {
    fn count(&self) -> usize;
    /// Implementations are `#[inline(always)]`: behind a call the accumulators would leave their registers.
    fn get(&self, index: usize) -> Segment<R>;
}

pub(crate) fn mask(lanes: usize) -> __mmask16 {
    if lanes >= LANES { !0 } else { (1u16 << lanes) - 1 }
}

/// acc[r][lane] + the sum over all segments of rows[r][k] lanes[k][lane].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn reduce<const R: usize, const V: usize>(
    mut acc: [[__m512; V]; R],
    segments: &impl Segments<R>,
) -> [[__m512; V]; R] {
    for index in 0..segments.count() {
        let Segment { rows, depth, mut lanes, stride } = segments.get(index);
        for k in 0..depth {
            // SAFETY: the caller's promise about the segment.
            unsafe {
                let mut v = [_mm512_setzero_ps(); V];
                for (j, v) in v.iter_mut().enumerate() {
                    *v = _mm512_loadu_ps(lanes.add(LANES * j));
                }
                for r in 0..R {
                    let a = _mm512_set1_ps(*rows[r].add(k));
                    for j in 0..V {
                        acc[r][j] = _mm512_fmadd_ps(a, v[j], acc[r][j]);
                    }
                }
                lanes = lanes.add(stride);
            }
        }
    }
    acc
}

/// A tile whose rows are rows of the destination: `lanes` numbers of each, rows `row_stride` apart, starting from `bias`
/// (`lanes` numbers, the same for all rows) or, where that is null, from zero.
///
/// # Safety
/// The CPU has AVX-512. Segments point to readable memory: `depth` numbers at each row pointer, 16 V numbers at each
/// step's lanes. The destination is writable and exclusive.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn tile<const R: usize, const V: usize>(
    segments: &impl Segments<R>,
    bias: *const f32,
    destination: *mut f32,
    row_stride: usize,
    lanes: usize,
) {
    let masks: [__mmask16; V] = std::array::from_fn(|j| mask(lanes.saturating_sub(LANES * j)));
    let mut start = [_mm512_setzero_ps(); V];
    // SAFETY: the caller's promises; masked lanes are not touched.
    unsafe {
        if !bias.is_null() {
            for j in 0..V {
                start[j] = _mm512_maskz_loadu_ps(masks[j], bias.wrapping_add(LANES * j));
            }
        }
        let acc = reduce([start; R], segments);
        for (r, row) in acc.iter().enumerate() {
            for j in 0..V {
                _mm512_mask_storeu_ps(destination.wrapping_add(r * row_stride + LANES * j), masks[j], row[j]);
            }
        }
    }
}

/// One stretch: rows at a distance of `stride`, `depth` numbers of each, against a panel of 32 lanes a step.
pub(crate) struct Strided {
    pub first: *const f32,
    pub stride: usize,
    pub depth: usize,
    pub lanes: *const f32,
}

impl<const R: usize> Segments<R> for Strided {
    fn count(&self) -> usize {
        1
    }
    #[inline(always)]
    fn get(&self, _: usize) -> Segment<R> {
        Segment {
            rows: std::array::from_fn(|r| self.first.wrapping_add(r * self.stride)),
            depth: self.depth,
            lanes: self.lanes,
            stride: WIDE,
        }
    }
}

/// [`tile`] of `rows` rows (1 to 12) and `lanes` lanes (1 to 32), from zero.
///
/// # Safety
/// As for [`tile`].
pub(crate) unsafe fn strided_tile(
    rows: usize,
    operands: &Strided,
    destination: *mut f32,
    row_stride: usize,
    lanes: usize,
) {
    each_height!(rows, R => {
        // SAFETY: the caller's promises.
        unsafe {
            if lanes > LANES {
                tile::<R, 2>(operands, std::ptr::null(), destination, row_stride, lanes)
            } else {
                tile::<R, 1>(operands, std::ptr::null(), destination, row_stride, lanes)
            }
        }
    });
}

/// A stretch of the transposed reduction: a panel's `depth` outputs of R channels, 32 numbers apart, against rows as lanes.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    /// Those of the first channel of all.
    pub numbers: *const f32,
    pub depth: usize,
    /// Which step of the lanes the first output meets.
    pub step: usize,
}

/// A tile whose lanes are rows of the destination: lane l's R numbers go to `destination + l row_stride`.
///
/// # Safety
/// The CPU has AVX-512. Blocks point to readable memory: `depth` numbers for each of R channels from `channel` on, and
/// `lanes_of_rows` has 16 V lanes for each of their steps. The destination is writable and exclusive.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn tile_transposed<const R: usize, const V: usize>(
    blocks: &[Block],
    channel: usize,
    lanes_of_rows: *const f32,
    destination: *mut f32,
    row_stride: usize,
    lanes: usize,
) {
    let mut acc = [[_mm512_setzero_ps(); V]; R];
    // SAFETY: the caller's promises.
    unsafe {
        for (index, block) in blocks.iter().enumerate() {
            // the next block's numbers lie elsewhere, where no hardware looks ahead
            if let Some(next) = blocks.get(index + 1) {
                let numbers = next.numbers.add(channel * 2 * LANES);
                for line in 0..2 * R {
                    _mm_prefetch::<_MM_HINT_T0>(numbers.wrapping_add(line * LANES).cast());
                }
            }
            let mut numbers = block.numbers.add(channel * 2 * LANES);
            let mut vectors = lanes_of_rows.add(block.step * V * LANES);
            for _ in 0..block.depth {
                let v: [__m512; V] = std::array::from_fn(|j| _mm512_loadu_ps(vectors.add(LANES * j)));
                for r in 0..R {
                    let a = _mm512_set1_ps(*numbers.add(r * 2 * LANES));
                    for j in 0..V {
                        acc[r][j] = _mm512_fmadd_ps(a, v[j], acc[r][j]);
                    }
                }
                numbers = numbers.add(1);
                vectors = vectors.add(LANES * V);
            }
        }
        for j in 0..V {
            let block: [__m512; LANES] = std::array::from_fn(|r| if r < R { acc[r][j] } else { _mm512_setzero_ps() });
            let block = transpose(block);
            for (l, numbers) in block.iter().enumerate().take(lanes.saturating_sub(LANES * j)) {
                _mm512_mask_storeu_ps(destination.add((LANES * j + l) * row_stride), mask(R), *numbers);
            }
        }
    }
}

/// A tile that is added to what is at the destination (or replaces it): rows are R neighbouring numbers of each step.
///
/// ```text
/// destination[r row_stride + lane] += sum_{k < depth} numbers[k step + r] lanes[k stride + lane]
/// ```
///
/// # Safety
/// As for [`tile`].
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx512f")]
unsafe fn tile_columns<const R: usize, const V: usize>(
    mut numbers: *const f32,
    step: usize,
    mut vectors: *const f32,
    stride: usize,
    depth: usize,
    destination: *mut f32,
    row_stride: usize,
    lanes: usize,
    replace: bool,
) {
    let masks: [__mmask16; V] = std::array::from_fn(|j| mask(lanes.saturating_sub(LANES * j)));
    let mut acc = [[_mm512_setzero_ps(); V]; R];
    // SAFETY: the caller's promises; masked lanes are not touched.
    unsafe {
        for _ in 0..depth {
            let v: [__m512; V] = std::array::from_fn(|j| _mm512_loadu_ps(vectors.add(LANES * j)));
            for r in 0..R {
                let a = _mm512_set1_ps(*numbers.add(r));
                for j in 0..V {
                    acc[r][j] = _mm512_fmadd_ps(a, v[j], acc[r][j]);
                }
            }
            numbers = numbers.wrapping_add(step);
            vectors = vectors.wrapping_add(stride);
        }
        for (r, row) in acc.iter().enumerate() {
            for j in 0..V {
                let target = destination.wrapping_add(r * row_stride + LANES * j);
                let sum = if replace { row[j] } else { _mm512_add_ps(row[j], _mm512_maskz_loadu_ps(masks[j], target)) };
                _mm512_mask_storeu_ps(target, masks[j], sum);
            }
        }
    }
}

/// A product by [`tile_columns`], in blocks of at most twelve columns and 32 lanes:
/// `destination[c, lane] += sum_{k < depth} numbers[k step + c] vectors[k stride + lane]`, or replaced.
pub(crate) struct Columns {
    pub numbers: *const f32,
    pub step: usize,
    pub vectors: *const f32,
    pub stride: usize,
    pub depth: usize,
}

impl Columns {
    /// # Safety
    /// The CPU has AVX-512; at each step `columns` numbers are readable, and `lanes` numbers of vectors up to a multiple of
    /// 16; the destination's rows (`row_stride` apart) are writable and exclusive.
    pub(crate) unsafe fn product(
        &self,
        columns: usize,
        destination: *mut f32,
        row_stride: usize,
        lanes: usize,
        replace: bool,
    ) {
        let &Self { step, stride, depth, .. } = self;
        let blocks = columns.div_ceil(ROWS);
        for lane in (0..lanes).step_by(WIDE) {
            let (vectors, count) = (self.vectors.wrapping_add(lane), (lanes - lane).min(WIDE));
            for block in (0..blocks).map(|b| share(columns, blocks, b)) {
                let numbers = self.numbers.wrapping_add(block.start);
                let target = destination.wrapping_add(block.start * row_stride + lane);
                each_height!(block.len(), R => {
                    // SAFETY: the caller's promises.
                    unsafe {
                        if count > LANES {
                            tile_columns::<R, 2>(numbers, step, vectors, stride, depth, target, row_stride, count, replace)
                        } else {
                            tile_columns::<R, 1>(numbers, step, vectors, stride, depth, target, row_stride, count, replace)
                        }
                    }
                });
            }
        }
    }
}

/// x = exp(scale (x - max x)) in place; the sum of all. `x` is not empty, `scale` is positive.
#[target_feature(enable = "avx512f")]
pub(crate) fn exponentials(x: &mut [f32], scale: f32) -> f32 {
    let full = x.len() / LANES * LANES;
    let tail = mask(x.len() - full);
    let negative = _mm512_set1_ps(f32::NEG_INFINITY);
    let p = x.as_mut_ptr();
    // SAFETY: whole vectors lie below `full`, and the tail's mask ends at the slice's length.
    unsafe {
        let mut max = [_mm512_mask_loadu_ps(negative, tail, p.add(full)); 4];
        for i in (0..full).step_by(LANES) {
            let lane = i / LANES % 4;
            max[lane] = _mm512_max_ps(max[lane], _mm512_loadu_ps(p.add(i)));
        }
        let max = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(max[0], max[1]), _mm512_max_ps(max[2], max[3])));
        let scale = _mm512_set1_ps(scale * std::f32::consts::LOG2_E);
        let max = _mm512_mul_ps(_mm512_set1_ps(max), scale);
        let mut sum = _mm512_setzero_ps();
        for i in (0..full).step_by(LANES) {
            let e = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(p.add(i)), scale, max));
            _mm512_storeu_ps(p.add(i), e);
            sum = _mm512_add_ps(sum, e);
        }
        let e = exp2(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(tail, p.add(full)), scale, max));
        _mm512_mask_storeu_ps(p.add(full), tail, e);
        sum = _mm512_mask_add_ps(sum, tail, sum, e);
        _mm512_reduce_add_ps(sum)
    }
}

/// The running softmax of up to 32 queries, as lanes.
pub(crate) struct Softmax {
    /// Scores' largest so far, times scale log₂ e.
    max: [f32; WIDE],
    /// Of the exponentials so far.
    pub sum: [f32; WIDE],
    scale: f32,
}

impl Softmax {
    /// Of scores that are multiplied by a positive `scale`.
    pub(crate) fn new(scale: f32) -> Self {
        // far below every score, and finite: its exponential is 0
        Self { max: [HIDDEN; WIDE], sum: [0.0; WIDE], scale: scale * std::f32::consts::LOG2_E }
    }

    /// Scores (keys, 32), of which V vectors of queries count, become exponentials beside the largest score so far;
    /// `output` (channels, 32), of the keys before, is brought to that scale.
    #[target_feature(enable = "avx512f")]
    pub(crate) fn advance<const V: usize>(&mut self, scores: &mut [f32], output: &mut [f32]) {
        assert!(V * LANES <= WIDE);
        let scale = _mm512_set1_ps(self.scale);
        for j in 0..V {
            let lanes = j * LANES;
            // SAFETY: whole rows of 32 numbers, of which 16 from `lanes` on are read and written.
            unsafe {
                let mut max = [_mm512_set1_ps(f32::NEG_INFINITY); 4];
                for (k, row) in scores.chunks_exact(WIDE).enumerate() {
                    max[k % 4] = _mm512_max_ps(max[k % 4], _mm512_loadu_ps(row.as_ptr().add(lanes)));
                }
                let max = _mm512_max_ps(_mm512_max_ps(max[0], max[1]), _mm512_max_ps(max[2], max[3]));
                let before = _mm512_loadu_ps(self.max.as_ptr().add(lanes));
                let max = _mm512_max_ps(before, _mm512_mul_ps(max, scale));
                _mm512_storeu_ps(self.max.as_mut_ptr().add(lanes), max);

                let factor = exp2(_mm512_sub_ps(before, max));
                for row in output.chunks_exact_mut(WIDE) {
                    let row = row.as_mut_ptr().add(lanes);
                    _mm512_storeu_ps(row, _mm512_mul_ps(_mm512_loadu_ps(row), factor));
                }
                let mut sum = [_mm512_setzero_ps(); 4];
                sum[0] = _mm512_mul_ps(_mm512_loadu_ps(self.sum.as_ptr().add(lanes)), factor);
                for (k, row) in scores.chunks_exact_mut(WIDE).enumerate() {
                    let row = row.as_mut_ptr().add(lanes);
                    let e = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(row), scale, max));
                    _mm512_storeu_ps(row, e);
                    sum[k % 4] = _mm512_add_ps(sum[k % 4], e);
                }
                let sum = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
                _mm512_storeu_ps(self.sum.as_mut_ptr().add(lanes), sum);
            }
        }
    }
}

/// A score that counts for nothing: finite, so that differences of two are.
pub(crate) const HIDDEN: f32 = -1e30;

/// 2ˣ for x up to 127: x = n + r, 2ʳ by its minimax polynomial, to one unit in the last place.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp2(x: __m512) -> __m512 {
    let c = |value: f32| _mm512_set1_ps(value);
    let n = _mm512_roundscale_ps::<0x08>(x);
    let r = _mm512_sub_ps(x, n);
    let mut p = c(1.535_336_2e-4);
    for term in [1.339_887_5e-3, 9.618_437e-3, 5.550_332_4e-2, 0.240_226_48, std::f32::consts::LN_2, 1.0] {
        p = _mm512_fmadd_ps(p, r, c(term));
    }
    _mm512_scalef_ps(p, n)
}

/// The softmax's backward in place: d_p = scale inverse p (d_p - inverse <p, d_p>), p = inverse p.
#[target_feature(enable = "avx512f")]
pub(crate) fn softmax_backward(p: &mut [f32], d_p: &mut [f32], inverse: f32, scale: f32) {
    assert_eq!(p.len(), d_p.len());
    let full = p.len() / LANES * LANES;
    let tail = mask(p.len() - full);
    let (p, d) = (p.as_mut_ptr(), d_p.as_mut_ptr());
    // SAFETY: as in `exponentials`; both slices have the same length.
    unsafe {
        let mut dot = [_mm512_setzero_ps(); 4];
        for i in (0..full).step_by(LANES) {
            let lane = i / LANES % 4;
            dot[lane] = _mm512_fmadd_ps(_mm512_loadu_ps(p.add(i)), _mm512_loadu_ps(d.add(i)), dot[lane]);
        }
        let (a, b) = (_mm512_maskz_loadu_ps(tail, p.add(full)), _mm512_maskz_loadu_ps(tail, d.add(full)));
        dot[0] = _mm512_fmadd_ps(a, b, dot[0]);
        let dot = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(dot[0], dot[1]), _mm512_add_ps(dot[2], dot[3])));
        let (dot, inverse, scale) = (_mm512_set1_ps(dot * inverse), _mm512_set1_ps(inverse), _mm512_set1_ps(scale));
        let step = |mask: __mmask16, i: usize| {
            let probability = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, p.add(i)), inverse);
            let gradient = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, d.add(i)), dot);
            _mm512_mask_storeu_ps(p.add(i), mask, probability);
            _mm512_mask_storeu_ps(d.add(i), mask, _mm512_mul_ps(_mm512_mul_ps(probability, scale), gradient));
        };
        for i in (0..full).step_by(LANES) {
            step(!0, i);
        }
        step(tail, full);
    }
}

/// Sixteen rows of sixteen numbers to sixteen columns.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: [__m512; LANES]) -> [__m512; LANES] {
    // pairs of rows, then fours, then eights, then all: the usual butterflies
    let mut a = r;
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    let pd = |x: __m512| _mm512_castps_pd(x);
    let mut b = a;
    for i in 0..4 {
        b[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(a[4 * i]), pd(a[4 * i + 2])));
        b[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(a[4 * i]), pd(a[4 * i + 2])));
        b[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(a[4 * i + 1]), pd(a[4 * i + 3])));
        b[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(a[4 * i + 1]), pd(a[4 * i + 3])));
    }
    // b[4 i + c] holds, in its quarter q, column 4 q + c of rows 4 i .. 4 i + 4
    let mut out = b;
    for c in 0..4 {
        let low = _mm512_shuffle_f32x4::<0x88>(b[c], b[4 + c]); // quarters 0 2 of both
        let high = _mm512_shuffle_f32x4::<0xdd>(b[c], b[4 + c]); // quarters 1 3 of both
        let low2 = _mm512_shuffle_f32x4::<0x88>(b[8 + c], b[12 + c]);
        let high2 = _mm512_shuffle_f32x4::<0xdd>(b[8 + c], b[12 + c]);
        out[c] = _mm512_shuffle_f32x4::<0x88>(low, low2);
        out[8 + c] = _mm512_shuffle_f32x4::<0xdd>(low, low2);
        out[4 + c] = _mm512_shuffle_f32x4::<0x88>(high, high2);
        out[12 + c] = _mm512_shuffle_f32x4::<0xdd>(high, high2);
    }
    out
}

/// Turns rows into lanes: `target[k * lanes + l] = rows[l][k]` for k < depth, zero where a row is null.
///
/// # Safety
/// The CPU has AVX-512; rows that are not null have `depth` readable numbers; `target` has room for
/// `depth * rows.len()` numbers, and `rows.len()` is a multiple of 16.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn rows_to_lanes(rows: &[*const f32], depth: usize, target: *mut f32) {
    let lanes = rows.len();
    for (group, rows) in rows.chunks_exact(LANES).enumerate() {
        for k in (0..depth).step_by(LANES) {
            let width = mask(depth - k);
            // SAFETY: the caller's promises; masked lanes are not read.
            unsafe {
                let block: [__m512; LANES] = std::array::from_fn(|l| {
                    if rows[l].is_null() { _mm512_setzero_ps() } else { _mm512_maskz_loadu_ps(width, rows[l].add(k)) }
                });
                let block = transpose(block);
                for (c, column) in block.iter().enumerate().take(depth - k) {
                    _mm512_storeu_ps(target.add((k + c) * lanes + group * LANES), *column);
                }
            }
        }
    }
}

/// Turns lanes into rows: `rows[l][k] = source[k * stride + l]` for k < depth.
///
/// # Safety
/// The CPU has AVX-512; at each of `depth` steps `source` has as many readable numbers as there are rows, up to a multiple
/// of 16; rows have `depth` writable numbers that no other thread touches.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn lanes_to_rows(source: *const f32, stride: usize, depth: usize, rows: &[*mut f32]) {
    for (group, rows) in rows.chunks(LANES).enumerate() {
        for k in (0..depth).step_by(LANES) {
            let width = mask(depth - k);
            // SAFETY: the caller's promises.
            unsafe {
                let block: [__m512; LANES] = std::array::from_fn(|c| {
                    if k + c < depth {
                        _mm512_loadu_ps(source.add((k + c) * stride + group * LANES))
                    } else {
                        _mm512_setzero_ps()
                    }
                });
                for (row, numbers) in rows.iter().zip(transpose(block)) {
                    _mm512_mask_storeu_ps(row.add(k), width, numbers);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_exact_to_two_units_in_the_last_place() {
        if !available() {
            return;
        }
        let scores: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.7919).sin() * 20.0).collect();
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let expected: Vec<f64> = scores.iter().map(|s| ((f64::from(*s) - f64::from(max)) * 0.25).exp()).collect();
        let mut found = scores.clone();
        // SAFETY: the CPU was asked.
        let sum = unsafe { exponentials(&mut found, 0.25) };
        for (found, expected) in found.iter().zip(&expected) {
            // the exponent itself is rounded: up to ten times log2 e, by half a unit
            let relative = (f64::from(*found) / expected - 1.0).abs();
            assert!(relative < 2.4e-7 + 1.5e-6, "{found} and {expected}");
        }
        assert!((f64::from(sum) / expected.iter().sum::<f64>() - 1.0).abs() < 1e-6);

        // powers of two whose exponent is not rounded: the polynomial alone
        for i in -640..=640 {
            let x = i as f32 / 64.0;
            let mut lanes = [0f32; LANES];
            // SAFETY: the CPU was asked, and the array has sixteen numbers.
            unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), exp2(_mm512_set1_ps(x))) };
            let expected = f64::from(x).exp2();
            assert!((f64::from(lanes[3]) / expected - 1.0).abs() < 2.4e-7, "2^{x}: {} and {expected}", lanes[3]);
        }
    }
}
