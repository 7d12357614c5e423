//! 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3): 16 products where the sum over taps needs 36 (Lavin & Gray 2016).
//!
//! ```text
//! Y = Aᵀ [ (G g Gᵀ) ∘ (Bᵀ d B) ] A        d a 4x4 patch of x, g the 3x3 kernel, Y a 2x2 patch of y
//!
//! Bᵀ = 1  0 -1  0      G = 1    0   0      Aᵀ = 1  1  1  0
//!      0  1  1  0          1/2  1/2 1/2         0  1 -1 -1
//!      0 -1  1  0          1/2 -1/2 1/2
//!      0  1  0 -1          0    0   1
//! ```
//!
//! The products over channels of the 16 places are matrix products with the transformed kernel U = G g Gᵀ, which is packed
//! as a matrix with 16 taps. The gradient of the input is the convolution of d_y with the kernel turned by 180 degrees
//! and transposed: turning g swaps the first and the last row (and column) of U, so the same U serves both directions.
//!
//! All factors are 0, 1 and 1/2, so rounding grows little; the 3x3 kernels of a UNet and of a VAE's decoder are nearly
//! all of this kind.

use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::atomic::Ordering;

use candle_core::{Result, Tensor};

use super::Images;
use crate::ops::frozen::panels::{PANEL, Panels};
use crate::ops::gemm::FLOPS;
use crate::ops::tasks::{parallel, share};
use crate::ops::tiles::{Block, LANES, ROWS, Strided, each_height, mask, rows_to_lanes, strided_tile, tile_transposed};
use crate::ops::{Host, SharedMut, buffer, tiles};

/// Places of a transformed patch.
const PLACES: usize = 16;
/// Bytes of transformed patches that a task of the forward holds at a time: half of a second-level cache.
const PATCH_BYTES: usize = 1 << 19;
/// Channels of the result that a task of the backward transforms back at a time.
const CHANNELS: usize = 4 * ROWS;
/// U is 16/9 of the kernel. Kernels beyond this many channel pairs lie where images are small, and stay as they are.
const LARGEST: usize = 640 * 640;
/// The same for [`Images::Small`]: U still fits in a cache.
const LARGEST_FOR_SMALL: usize = 256 * 256;

/// A transformed kernel.
#[derive(Debug)]
pub(super) struct Winograd {
    kernel: Panels,
    inputs: usize,
    outputs: usize,
}

/// A batch of images, in patches of 2x2 pixels.
#[derive(Clone, Copy)]
struct Grid {
    height: usize,
    width: usize,
    rows: usize,
    columns: usize,
    patches: usize,
}

impl Grid {
    fn new(batch: usize, height: usize, width: usize) -> Self {
        let (rows, columns) = (height.div_ceil(2), width.div_ceil(2));
        Self { height, width, rows, columns, patches: batch * rows * columns }
    }
    /// (image, first line, first column) of a patch of the result.
    fn patch(&self, index: usize) -> (usize, usize, usize) {
        let (line, j) = (index / self.columns, index % self.columns);
        (line / self.rows, 2 * (line % self.rows), 2 * j)
    }
    /// The 4x4 pixels that a patch reads, as indices of pixels in the batch; `None` outside the image.
    fn sources(&self, index: usize) -> [Option<usize>; PLACES] {
        let (image, i, j) = self.patch(index);
        std::array::from_fn(|place| {
            let (i, j) = ((i + place / 4).checked_sub(1)?, (j + place % 4).checked_sub(1)?);
            (i < self.height && j < self.width).then_some((image * self.height + i) * self.width + j)
        })
    }
    /// The 2x2 pixels of the result; `None` beyond an odd side.
    fn targets(&self, index: usize) -> [Option<usize>; 4] {
        let (image, i, j) = self.patch(index);
        std::array::from_fn(|place| {
            let (i, j) = (i + place / 2, j + place % 2);
            (i < self.height && j < self.width).then_some((image * self.height + i) * self.width + j)
        })
    }
}

/// Bᵀ along one axis.
#[inline]
#[target_feature(enable = "avx512f")]
fn spread(d: [__m512; 4]) -> [__m512; 4] {
    [_mm512_sub_ps(d[0], d[2]), _mm512_add_ps(d[1], d[2]), _mm512_sub_ps(d[2], d[1]), _mm512_sub_ps(d[1], d[3])]
}

/// Aᵀ along one axis.
#[inline]
#[target_feature(enable = "avx512f")]
fn gather(m: [__m512; 4]) -> [__m512; 2] {
    [_mm512_add_ps(_mm512_add_ps(m[0], m[1]), m[2]), _mm512_sub_ps(_mm512_sub_ps(m[1], m[2]), m[3])]
}

/// Bᵀ d B of each patch: `target` is (place, patch, channel).
#[target_feature(enable = "avx512f")]
fn transform(x: &[f32], channels: usize, grid: &Grid, patches: Range<usize>, target: &mut [f32]) {
    let count = patches.len();
    assert!(target.len() >= PLACES * count * channels);
    let target = target.as_mut_ptr();
    for (t, patch) in patches.enumerate() {
        let sources = grid.sources(patch).map(|pixel| pixel.map(|pixel| x[pixel * channels..][..channels].as_ptr()));
        for c in (0..channels).step_by(LANES) {
            let lanes = mask(channels - c);
            // SAFETY: each source has `channels` numbers, the target was measured above; masked lanes are not touched.
            unsafe {
                let d: [[__m512; 4]; 4] = std::array::from_fn(|i| {
                    spread(std::array::from_fn(|j| match sources[4 * i + j] {
                        Some(pixel) => _mm512_maskz_loadu_ps(lanes, pixel.add(c)),
                        None => _mm512_setzero_ps(),
                    }))
                });
                for (j, column) in (0..4).map(|j| (j, spread([d[0][j], d[1][j], d[2][j], d[3][j]]))) {
                    for (i, v) in column.into_iter().enumerate() {
                        _mm512_mask_storeu_ps(target.add(((4 * i + j) * count + t) * channels + c), lanes, v);
                    }
                }
            }
        }
    }
}

/// Aᵀ m A + bias of each patch into `width` channels of the result from `channel` on; `m` is (place, patch, `stride`).
///
/// # Safety
/// No other thread touches these patches' channels of `y`, (pixel, channels), meanwhile.
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx512f")]
unsafe fn transform_back(
    m: &[f32],
    stride: usize,
    grid: &Grid,
    patches: Range<usize>,
    bias: Option<&[f32]>,
    channel: usize,
    width: usize,
    y: SharedMut<f32>,
    channels: usize,
) {
    let count = patches.len();
    assert!(m.len() >= PLACES * count * stride && width <= stride);
    assert!(channel + width <= channels && bias.is_none_or(|bias| bias.len() == channels));
    for (t, patch) in patches.enumerate() {
        let targets = grid.targets(patch).map(|pixel| pixel.map(|pixel| y.at(pixel * channels + channel)));
        for c in (0..width).step_by(LANES) {
            let lanes = mask(width - c);
            // SAFETY: lengths were measured above; masked lanes are not touched.
            unsafe {
                let start = match bias {
                    Some(bias) => _mm512_maskz_loadu_ps(lanes, bias.as_ptr().add(channel + c)),
                    None => _mm512_setzero_ps(),
                };
                let rows: [[__m512; 2]; 4] = std::array::from_fn(|i| {
                    gather(std::array::from_fn(|j| {
                        _mm512_maskz_loadu_ps(lanes, m.as_ptr().add(((4 * i + j) * count + t) * stride + c))
                    }))
                });
                for j in 0..2 {
                    let column = gather([rows[0][j], rows[1][j], rows[2][j], rows[3][j]]);
                    for (i, value) in column.into_iter().enumerate() {
                        if let Some(target) = targets[2 * i + j] {
                            _mm512_mask_storeu_ps(target.add(c), lanes, _mm512_add_ps(value, start));
                        }
                    }
                }
            }
        }
    }
}

impl Winograd {
    /// From PyTorch's layout (out, in, 3, 3), where that is worth it.
    pub(super) fn new(weight: &Tensor, stride: usize, padding: usize, images: Images) -> Result<Option<Self>> {
        let (outputs, inputs, kh, kw) = weight.dims4()?;
        let largest = if images == Images::Small { LARGEST_FOR_SMALL } else { LARGEST };
        let fits = (kh, kw, stride, padding) == (3, 3, 1, 1)
            && inputs.min(outputs) >= LANES
            && inputs * outputs <= largest
            && weight.dtype() == candle_core::DType::F32
            && weight.device().is_cpu()
            && tiles::available();
        if !fits {
            return Ok(None);
        }
        let weight = weight.contiguous()?;
        let mut u = vec![0f32; outputs * PLACES * inputs];
        for (index, g) in Host::<f32>::read(&weight)?.chunks(9).enumerate() {
            let (o, c) = (index / inputs, index % inputs);
            for (place, value) in transformed_kernel(g).into_iter().enumerate() {
                u[(o * PLACES + place) * inputs + c] = value;
            }
        }
        Ok(Some(Self { kernel: Panels::pack(&u, (outputs, PLACES, inputs)), inputs, outputs }))
    }

    /// x (batch, height, width, inputs) -> y (batch, height, width, outputs).
    pub(super) fn forward(
        &self,
        x: &[f32],
        (batch, height, width): (usize, usize, usize),
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        let grid = Grid::new(batch, height, width);
        self.count_flops(&grid);
        let y = SharedMut::new(y);
        let most = (PATCH_BYTES / (PLACES * self.inputs * size_of::<f32>()) / ROWS * ROWS).clamp(ROWS, 4 * ROWS);
        let panels = self.kernel.panels();
        self.chunks(grid.patches, most, panels, |patches, panels, threads| {
            let mut v = buffer(PLACES * patches.len() * self.inputs);
            // SAFETY (here and below): `Winograd` exists only where the CPU has AVX-512.
            unsafe { transform(x, self.inputs, &grid, patches.clone(), &mut v) };
            let groups = if threads { panels.len() } else { 1 };
            parallel(groups, |group| {
                let mut m = buffer(PLACES * patches.len() * PANEL);
                for p in share(panels.len(), groups, group) {
                    let lanes = self.place_products(&v, patches.len(), p, &mut m);
                    // SAFETY: tasks write disjoint patches or panels of y.
                    unsafe {
                        transform_back(&m, PANEL, &grid, patches.clone(), bias, p * PANEL, lanes, y, self.outputs)
                    };
                }
            });
        });
    }

    /// The 16 products of a panel: `v` (place, patch, input) to `m` (place, patch, 32); how many lanes are outputs.
    fn place_products(&self, v: &[f32], patches: usize, p: usize, m: &mut [f32]) -> usize {
        let (panel, lanes) = self.kernel.panel(p);
        let blocks = patches.div_ceil(ROWS);
        for place in 0..PLACES {
            let panel = panel[place * self.inputs * PANEL..][..self.inputs * PANEL].as_ptr();
            for block in (0..blocks).map(|b| share(patches, blocks, b)) {
                let first = v[(place * patches + block.start) * self.inputs..][..block.len() * self.inputs].as_ptr();
                let target = m[(place * patches + block.start) * PANEL..][..block.len() * PANEL].as_mut_ptr();
                let operands = Strided { first, stride: self.inputs, depth: self.inputs, lanes: panel };
                // SAFETY: all three were measured above.
                unsafe { strided_tile(block.len(), &operands, target, PANEL, lanes) };
            }
        }
        lanes
    }

    /// dy (batch, height, width, outputs) -> dx (batch, height, width, inputs).
    pub(super) fn backward(&self, dy: &[f32], (batch, height, width): (usize, usize, usize), dx: &mut [f32]) {
        let grid = Grid::new(batch, height, width);
        self.count_flops(&grid);
        let dx = SharedMut::new(dx);
        self.chunks(grid.patches, PANEL, self.inputs.div_ceil(CHANNELS), |patches, groups, threads| {
            let count = patches.len();
            let lanes = count.next_multiple_of(LANES);
            let mut rows = buffer(PLACES * count * self.outputs);
            // SAFETY: as in `forward`.
            unsafe { transform(dy, self.outputs, &grid, patches.clone(), &mut rows) };
            let mut v = buffer::<f32>(PLACES * self.outputs * lanes);
            for (place, v) in v.chunks_mut(self.outputs * lanes).enumerate() {
                let addresses: [*const f32; PANEL] = std::array::from_fn(|t| {
                    if t < count {
                        rows[(place * count + t) * self.outputs..][..self.outputs].as_ptr()
                    } else {
                        std::ptr::null()
                    }
                });
                // SAFETY: every address has `outputs` numbers, `v` has room for `outputs * lanes`.
                unsafe { rows_to_lanes(&addresses[..lanes], self.outputs, v.as_mut_ptr()) };
            }
            drop(rows);
            let tasks = if threads { groups.len() } else { 1 };
            parallel(tasks, |task| {
                let mut m = buffer(PLACES * count * CHANNELS);
                for group in share(groups.len(), tasks, task) {
                    let channels = group * CHANNELS..self.inputs.min((group + 1) * CHANNELS);
                    self.transposed_products(&v, count, channels.clone(), &mut m);
                    let (first, width) = (channels.start, channels.len());
                    // SAFETY: tasks write disjoint patches or channels of dx.
                    unsafe {
                        transform_back(&m, CHANNELS, &grid, patches.clone(), None, first, width, dx, self.inputs)
                    };
                }
            });
        });
    }

    /// The 16 products with the transposed matrix: `v` (place, output, lane) to `m` (place, patch, 48) for `channels`.
    fn transposed_products(&self, v: &[f32], patches: usize, channels: Range<usize>, m: &mut [f32]) {
        let lanes = patches.next_multiple_of(LANES);
        let tiles = channels.len().div_ceil(ROWS);
        for place in 0..PLACES {
            let v = v[place * self.outputs * lanes..][..self.outputs * lanes].as_ptr();
            let blocks: Vec<Block> = (0..self.kernel.panels())
                .map(|p| {
                    let (panel, depth) = self.kernel.panel(p);
                    Block {
                        numbers: panel[turned(place) * self.inputs * PANEL..][..self.inputs * PANEL].as_ptr(),
                        depth,
                        step: p * PANEL,
                    }
                })
                .collect();
            let m = &mut m[place * patches * CHANNELS..][..patches * CHANNELS];
            for tile in (0..tiles).map(|t| share(channels.len(), tiles, t)) {
                let target = m[tile.start..].as_mut_ptr();
                let first = channels.start + tile.start;
                each_height!(tile.len(), R => {
                    // SAFETY: the blocks have 32 numbers for each channel below `inputs`, `v` was measured above, and
                    // `m` has `patches` rows of 48 numbers.
                    unsafe {
                        if lanes > LANES {
                            tile_transposed::<R, 2>(&blocks, first, v, target, CHANNELS, patches)
                        } else {
                            tile_transposed::<R, 1>(&blocks, first, v, target, CHANNELS, patches)
                        }
                    }
                });
            }
        }
    }

    /// Calls `run(patches, parts, threads)` for chunks of at most `most` patches: chunks on all threads where there are
    /// enough of them, else one after the other, each free to divide its `parts` among the threads.
    fn chunks(
        &self,
        patches: usize,
        most: usize,
        parts: usize,
        run: impl Fn(Range<usize>, Range<usize>, bool) + Send + Sync,
    ) {
        let threads = rayon::current_num_threads();
        let chunks = patches.div_ceil(most);
        if chunks >= threads {
            let chunks = chunks.next_multiple_of(threads).min(patches);
            parallel(chunks, |chunk| run(share(patches, chunks, chunk), 0..parts, false));
        } else {
            (0..chunks).for_each(|chunk| run(share(patches, chunks, chunk), 0..parts, true));
        }
    }

    fn count_flops(&self, grid: &Grid) {
        let work = 2 * PLACES * grid.patches * self.inputs * self.outputs;
        FLOPS.fetch_add(work as u64, Ordering::Relaxed);
    }
}

/// The place of U that `place` is for the kernel turned by 180 degrees.
fn turned(place: usize) -> usize {
    let swap = |i: usize| if i.is_multiple_of(3) { 3 - i } else { i };
    4 * swap(place / 4) + swap(place % 4)
}

/// G g Gᵀ.
fn transformed_kernel(g: &[f32]) -> [f32; PLACES] {
    let spread = |g: [f64; 3]| [g[0], 0.5 * (g[0] + g[1] + g[2]), 0.5 * (g[0] - g[1] + g[2]), g[2]];
    let rows: [[f64; 4]; 3] = std::array::from_fn(|i| spread(std::array::from_fn(|j| f64::from(g[3 * i + j]))));
    let columns: [[f64; 4]; 4] = std::array::from_fn(|j| spread(std::array::from_fn(|i| rows[i][j])));
    std::array::from_fn(|place| columns[place % 4][place / 4] as f32)
}
