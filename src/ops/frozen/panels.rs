//! The matrix in panels, packed once, for both directions (AVX-512).
//!
//! 32 outputs n are a panel, contiguous for each (t, c). The forward reads a panel's lanes as vectors and the rows of x,
//! where they lie, as scalars: no patch is copied (the indirection buffer of Dukhan 2019). The backward reads the same
//! panels as scalars against lanes made of rows of dy. So one copy of the weights serves both directions, and no product
//! packs them again.

use std::sync::atomic::Ordering;

use rayon::prelude::*;

use super::Taps;
use crate::allocator::lasting;
use crate::ops::gemm::FLOPS;
use crate::ops::tasks::{parallel, share};
use crate::ops::tiles::{
    Block, LANES, ROWS, Segment, Segments, WIDE, each_height, rows_to_lanes, tile, tile_transposed,
};
use crate::ops::{SharedMut, buffer};

/// Outputs of a panel; the last one is filled up with zeros.
pub(in crate::ops) const PANEL: usize = WIDE;
/// Rows that a task of the forward takes through one panel after the other.
const TASK_ROWS: usize = 32 * ROWS;
/// Rows at a multiple of this distance share a set of a first-level cache, which has room for fewer than a tile's twelve.
const CACHE_STRIDE: usize = 4096;
/// Bytes of rows turned into lanes at a time in the backward, by one task (half of a second-level cache) and by all
/// together (half of a third-level cache).
const TASK_LANE_BYTES: usize = 1 << 19;
const SHARED_LANE_BYTES: usize = 1 << 24;
/// Operations under which a product is not worth a second thread.
const SERIAL: usize = 1 << 21;

/// W (outputs, taps, channels) in panels.
pub(in crate::ops) struct Panels {
    data: Vec<f32>,
    outputs: usize,
    taps: usize,
    channels: usize,
}

/// From one panel to the next. The backward reads the same channels of all panels, which must not share their sets of the
/// caches.
fn panel_stride(depth: usize) -> usize {
    let aligned = (PANEL * depth * size_of::<f32>()).is_multiple_of(CACHE_STRIDE);
    PANEL * (depth + if aligned { 2 } else { 0 })
}

impl Panels {
    /// From (outputs, taps, channels), contiguous.
    pub(in crate::ops) fn pack(weight: &[f32], (outputs, taps, channels): (usize, usize, usize)) -> Self {
        let depth = taps * channels;
        let stride = panel_stride(depth);
        let mut data = lasting(|| vec![0.0; outputs.div_ceil(PANEL) * stride]);
        data.par_chunks_mut(stride.max(1)).enumerate().for_each(|(p, panel)| {
            for (n, row) in weight.chunks(depth).skip(p * PANEL).take(PANEL).enumerate() {
                for (k, number) in row.iter().enumerate() {
                    panel[k * PANEL + n] = *number;
                }
            }
        });
        Self { data, outputs, taps, channels }
    }

    pub(in crate::ops) fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }
    fn depth(&self) -> usize {
        self.taps * self.channels
    }
    /// A panel's numbers, (tap, channel, lane), and how many of its lanes are outputs.
    pub(in crate::ops) fn panel(&self, p: usize) -> (&[f32], usize) {
        let panel = &self.data[p * panel_stride(self.depth())..][..PANEL * self.depth()];
        (panel, (self.outputs - p * PANEL).min(PANEL))
    }

    /// y (rows, outputs) = the product, plus `bias` (outputs).
    pub(in crate::ops) fn forward(
        &self,
        x: &[f32],
        taps: &impl Taps,
        rows: usize,
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        assert_eq!(y.len(), rows * self.outputs);
        assert_eq!(taps.count(), self.taps);
        assert!(bias.is_none_or(|bias| bias.len() == self.outputs));
        if y.is_empty() {
            return;
        }
        let work = 2 * y.len() * self.depth();
        FLOPS.fetch_add(work as u64, Ordering::Relaxed);
        let spread = (self.channels * size_of::<f32>()).is_multiple_of(CACHE_STRIDE) && rows > 1;
        let copy = if spread { spread_rows(x, self.channels) } else { Vec::new() };
        let x = if spread {
            Source { data: &copy, stride: self.channels + LANES }
        } else {
            Source { data: x, stride: self.channels }
        };
        let y = SharedMut::new(y);
        let chunks = rows.div_ceil(TASK_ROWS);
        let groups = groups(self.panels(), chunks, work);
        parallel(chunks * groups, |task| {
            let (chunk, group) = (task / groups, task % groups);
            let rows = share(rows, chunks, chunk);
            let panels = share(self.panels(), groups, group);
            // SAFETY: tasks write disjoint rows and columns of y.
            unsafe { self.forward_task(x, taps, rows, panels, bias, y) };
        });
    }

    /// # Safety
    /// No other thread touches these rows and panels of `y`, (_, outputs), meanwhile.
    unsafe fn forward_task(
        &self,
        x: Source,
        taps: &impl Taps,
        rows: std::ops::Range<usize>,
        panels: std::ops::Range<usize>,
        bias: Option<&[f32]>,
        y: SharedMut<f32>,
    ) {
        let zeros = vec![0f32; self.channels];
        let sources = self.row_pointers(x, self.channels, taps, rows.clone(), zeros.as_ptr());
        let blocks = rows.len().div_ceil(ROWS);
        for p in panels {
            let (panel, lanes) = self.panel(p);
            let bias = bias.map_or(std::ptr::null(), |bias| bias[p * PANEL..].as_ptr());
            for b in 0..blocks {
                let block = share(rows.len(), blocks, b);
                let first = &sources[block.start * self.taps..];
                let destination = y.at((rows.start + block.start) * self.outputs + p * PANEL);
                each_height!(block.len(), R => {
                    let segments = Rows {
                        pointers: &first[..R * self.taps],
                        taps: self.taps,
                        channels: self.channels,
                        panel: panel.as_ptr(),
                    };
                    // SAFETY: row pointers have `channels` numbers (checked where they were made), the panel has
                    // 32 lanes for each; the destination is this task's.
                    unsafe {
                        if lanes > LANES {
                            tile::<R, 2>(&segments, bias, destination, self.outputs, lanes)
                        } else {
                            tile::<R, 1>(&segments, bias, destination, self.outputs, lanes)
                        }
                    }
                });
            }
        }
    }

    /// For each row and tap the address of the source row, `missing` for none.
    fn row_pointers(
        &self,
        x: Source,
        features: usize,
        taps: &impl Taps,
        rows: std::ops::Range<usize>,
        missing: *const f32,
    ) -> Vec<*const f32> {
        let mut pointers = vec![missing; rows.len() * self.taps];
        for (row, slots) in rows.zip(pointers.chunks_mut(self.taps)) {
            taps.sources(row, |tap, source| {
                if let Some(source) = source {
                    slots[tap] = x.data[source * x.stride..][..features].as_ptr();
                }
            });
        }
        pointers
    }

    /// dx (rows, channels): the product with the transpose.
    pub(in crate::ops) fn backward(&self, dy: &[f32], taps: &impl Taps, rows: usize, dx: &mut [f32]) {
        assert_eq!(dx.len(), rows * self.channels);
        assert_eq!(taps.count(), self.taps);
        if dx.is_empty() {
            return;
        }
        let work = 2 * rows * self.outputs * self.depth();
        FLOPS.fetch_add(work as u64, Ordering::Relaxed);
        let row_bytes = self.taps * self.outputs * size_of::<f32>();
        let tiles = self.channels.div_ceil(ROWS);
        let dx = SharedMut::new(dx);
        let threads = rayon::current_num_threads();
        let chunk_rows = |bytes: usize| (bytes / row_bytes / PANEL * PANEL).max(PANEL);
        let chunks = rows.div_ceil(chunk_rows(TASK_LANE_BYTES).min(8 * PANEL)).next_multiple_of(2 * threads);
        let small = size_of_val(self.data.as_slice()) <= SHARED_LANE_BYTES / 2;
        if work < SERIAL || small && rows >= chunks * PANEL {
            // many rows: each task makes lanes of its own
            let blocks = rows.div_ceil(PANEL);
            let chunks = chunks.min(blocks);
            let tasks = if work < SERIAL { 1 } else { chunks };
            parallel(tasks, |task| {
                let mut lanes = Vec::new();
                for chunk in share(chunks, tasks, task) {
                    let blocks = share(blocks, chunks, chunk);
                    let rows = blocks.start * PANEL..rows.min(blocks.end * PANEL);
                    self.lanes(dy, taps, rows.clone(), false, &mut lanes);
                    // SAFETY: tasks write disjoint rows.
                    unsafe { self.backward_task(&lanes, rows, 0..tiles, dx) };
                }
            });
        } else {
            // few rows for a large matrix: the tasks share the lanes and divide the channels
            let mut lanes = Vec::new();
            let groups = tiles.min(4 * threads);
            for first in (0..rows).step_by(chunk_rows(SHARED_LANE_BYTES)) {
                let rows = first..rows.min(first + chunk_rows(SHARED_LANE_BYTES));
                self.lanes(dy, taps, rows.clone(), true, &mut lanes);
                parallel(groups, |group| {
                    // SAFETY: tasks write disjoint channels.
                    unsafe { self.backward_task(&lanes, rows.clone(), share(tiles, groups, group), dx) };
                });
            }
        }
    }

    /// Rows of dy as lanes: for each block of 32 rows (or 16, at the end) and each tap, (outputs, lanes).
    fn lanes(&self, dy: &[f32], taps: &impl Taps, rows: std::ops::Range<usize>, threaded: bool, target: &mut Vec<f32>) {
        let padded = rows.len().next_multiple_of(LANES);
        let block_size = self.taps * self.outputs * PANEL;
        // every number below is written before it is read
        target.clear();
        target.reserve(padded * self.taps * self.outputs);
        let dy = Source { data: dy, stride: self.outputs };
        let pointers = self.row_pointers(dy, self.outputs, taps, rows.clone(), std::ptr::null());
        let (pointers, base) = (SharedPointers(&pointers), SharedTarget(target.as_mut_ptr()));
        let blocks = padded.div_ceil(PANEL);
        let tasks = if threaded { blocks } else { 1 };
        let fill = |block: usize, tap: usize| {
            let (pointers, base) = (&pointers, &base);
            let width = (padded - block * PANEL).min(PANEL);
            let mut addresses = [std::ptr::null(); PANEL];
            for (lane, address) in addresses.iter_mut().enumerate().take(rows.len() - block * PANEL) {
                *address = pointers.0[(block * PANEL + lane) * self.taps + tap];
            }
            // SAFETY: addresses have `outputs` numbers (checked where they were made) or are null; the part of `target`
            // that this (block, tap) fills is its own and was reserved.
            unsafe {
                let target = base.0.add(block * block_size + tap * self.outputs * width);
                rows_to_lanes(&addresses[..width], self.outputs, target);
            }
        };
        parallel(tasks, |task| {
            for block in share(blocks, tasks, task) {
                (0..self.taps).for_each(|tap| fill(block, tap));
            }
        });
        // SAFETY: all blocks and taps were written.
        unsafe { target.set_len(padded * self.taps * self.outputs) };
    }

    /// # Safety
    /// No other thread touches these rows and tiles of `dx`, (_, channels), meanwhile.
    unsafe fn backward_task(
        &self,
        lanes: &[f32],
        rows: std::ops::Range<usize>,
        tiles: std::ops::Range<usize>,
        dx: SharedMut<f32>,
    ) {
        let blocks: Vec<Block> = (0..self.taps * self.panels())
            .map(|i| {
                let (tap, p) = (i / self.panels(), i % self.panels());
                let (panel, depth) = self.panel(p);
                let numbers = panel[tap * self.channels * PANEL..].as_ptr();
                Block { numbers, depth, step: tap * self.outputs + p * PANEL }
            })
            .collect();
        let all_tiles = self.channels.div_ceil(ROWS);
        let block_size = self.taps * self.outputs * PANEL;
        for channels in tiles.map(|t| share(self.channels, all_tiles, t)) {
            for block in 0..rows.len().div_ceil(PANEL) {
                let count = (rows.len() - block * PANEL).min(PANEL);
                let lanes = lanes[block * block_size..].as_ptr();
                let destination = dx.at((rows.start + block * PANEL) * self.channels + channels.start);
                each_height!(channels.len(), R => {
                    // SAFETY: the blocks' panels have 32 numbers for each of `channels`, `lanes` has (taps, outputs)
                    // steps of as many lanes as `count` needs; the destination is this task's.
                    unsafe {
                        let first = channels.start;
                        if count > LANES {
                            tile_transposed::<R, 2>(&blocks, first, lanes, destination, self.channels, count)
                        } else {
                            tile_transposed::<R, 1>(&blocks, first, lanes, destination, self.channels, count)
                        }
                    }
                });
            }
        }
    }
}

/// Rows at a distance of `stride`.
#[derive(Clone, Copy)]
struct Source<'a> {
    data: &'a [f32],
    stride: usize,
}

/// Rows of `features` numbers, each one vector further from the one before.
fn spread_rows(x: &[f32], features: usize) -> Vec<f32> {
    let mut copy = buffer(x.len() / features * (features + LANES));
    copy.par_chunks_mut(features + LANES).zip(x.par_chunks(features)).with_min_len(ROWS).for_each(|(copy, x)| {
        copy[..features].copy_from_slice(x);
    });
    copy
}

/// The forward's reduction: for each tap the rows' channels, against one panel.
struct Rows<'a> {
    /// (row, tap)
    pointers: &'a [*const f32],
    taps: usize,
    channels: usize,
    panel: *const f32,
}

impl<const R: usize> Segments<R> for Rows<'_> {
    fn count(&self) -> usize {
        self.taps
    }
    #[inline(always)]
    fn get(&self, tap: usize) -> Segment<R> {
        Segment {
            rows: std::array::from_fn(|r| self.pointers[r * self.taps + tap]),
            depth: self.channels,
            lanes: self.panel.wrapping_add(tap * self.channels * PANEL),
            stride: PANEL,
        }
    }
}

impl std::fmt::Debug for Panels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Panels({}, {}, {})", self.outputs, self.taps, self.channels)
    }
}

struct SharedPointers<'a>(&'a [*const f32]);
// SAFETY: the pointees are a borrowed slice that is only read.
unsafe impl Sync for SharedPointers<'_> {}

struct SharedTarget(*mut f32);
// SAFETY: tasks write disjoint parts.
unsafe impl Sync for SharedTarget {}

/// In how many groups of panels `chunks` groups of rows are divided further, so that all threads have work.
fn groups(panels: usize, chunks: usize, work: usize) -> usize {
    if work < SERIAL {
        return 1;
    }
    (4 * rayon::current_num_threads()).div_ceil(chunks).min(panels)
}
