//! The tile: up to twelve rows times one or two vectors of sixteen lanes, in registers (AVX-512).
//!
//! 24 accumulators, two vectors of lanes and one broadcast fill 27 of the 32 registers; each step of the reduction loads
//! 2 vectors and 12 scalars for 24 fused multiply-adds, so the multipliers are what limits.

use std::arch::x86_64::*;

/// Lanes of a vector.
pub(super) const LANES: usize = 16;
/// Rows of a tile at most.
pub(super) const ROWS: usize = 12;

/// Whether this CPU has what the kernels here need.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
}

/// A stretch of the reduction: `depth` numbers of each row, and as many vectors of lanes.
#[derive(Clone, Copy)]
pub(super) struct Segment<const R: usize> {
    /// Where each row's numbers start, contiguous.
    pub rows: [*const f32; R],
    pub depth: usize,
    /// The lanes that the first number of each row meets.
    pub lanes: *const f32,
    /// From the lanes of one number to those of the next.
    pub stride: usize,
}

/// The stretches of one tile's reduction.
pub(super) trait Segments<const R: usize> {
    fn count(&self) -> usize;
    /// Implementations are `#[inline(always)]`: behind a call the accumulators would leave their registers.
    fn get(&self, index: usize) -> Segment<R>;
}

fn mask(lanes: usize) -> __mmask16 {
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
pub(super) unsafe fn tile<const R: usize, const V: usize>(
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

/// A stretch of the transposed reduction: a panel's `depth` outputs of R channels, 32 numbers apart, against rows as lanes.
#[derive(Clone, Copy)]
pub(super) struct Block {
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
pub(super) unsafe fn tile_transposed<const R: usize, const V: usize>(
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
pub(super) unsafe fn rows_to_lanes(rows: &[*const f32], depth: usize, target: *mut f32) {
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
