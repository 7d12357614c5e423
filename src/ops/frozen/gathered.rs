//! For a tile of rows the taps that each needs are copied side by side, and matrix products finish the tile: one in the
//! forward, one a tap in the backward.

use rayon::prelude::*;

use super::Taps;
use crate::ops::gemm::{Threads, View, ViewMut, gemm};
use crate::ops::{Real, SharedMut};

/// Bytes of a tile's gathered taps: large enough that packing the matrix for each tile's product is paid back.
const TILE_BYTES: usize = 1024 * 1024;

/// Rows of a tile such that `features` numbers each fit [`TILE_BYTES`], at least a few for the product to be efficient.
fn tile_rows<T>(features: usize) -> usize {
    (TILE_BYTES / (features * size_of::<T>())).clamp(64, 1024)
}

/// One tile leaves the product to share the threads; several tiles share them already.
fn threads(tiles: usize) -> Threads {
    if tiles == 1 { Threads::All } else { Threads::One }
}

/// Copies the taps of the rows from `first` on side by side, `features` numbers each.
fn gather<T: Real>(source: &[T], features: usize, taps: &impl Taps, first: usize, tile: &mut [T]) {
    for (row, slots) in tile.chunks_mut(taps.count() * features).enumerate() {
        taps.sources(first + row, |tap, from| {
            let slot = &mut slots[tap * features..][..features];
            match from {
                Some(from) => slot.copy_from_slice(&source[from * features..][..features]),
                None => slot.fill(T::zero()),
            }
        });
    }
}

/// `weight` (taps, channels, outputs), `shape` (outputs, taps, channels).
pub(super) fn forward<T: Real>(
    weight: &[T],
    shape: (usize, usize, usize),
    x: &[T],
    taps: &impl Taps,
    rows: usize,
    bias: Option<&[T]>,
    y: &mut [T],
) {
    let (outputs, count, channels) = shape;
    let features = count * channels;
    let tile_rows = tile_rows::<T>(features);
    let threads = threads(rows.div_ceil(tile_rows));
    y.par_chunks_mut(tile_rows * outputs).enumerate().for_each_init(Vec::new, |tile, (index, y)| {
        let rows = y.len() / outputs;
        tile.resize(rows * features, T::zero());
        gather(x, channels, taps, index * tile_rows, tile);
        if let Some(bias) = bias {
            y.chunks_mut(outputs).for_each(|row| row.copy_from_slice(bias));
        }
        gemm(
            View::rows(tile, rows, features),
            View::rows(weight, features, outputs),
            ViewMut::rows(y, rows, outputs),
            bias.is_some(),
            threads,
        );
    });
}

/// `weight` (taps, channels, outputs), `shape` (outputs, taps, channels).
pub(super) fn backward<T: Real>(
    weight: &[T],
    shape: (usize, usize, usize),
    dy: &[T],
    taps: &impl Taps,
    rows: usize,
    dx: &mut [T],
) {
    let (outputs, count, channels) = shape;
    let features = count * outputs;
    let tile_rows = tile_rows::<T>(features);
    let threads = threads(rows.div_ceil(tile_rows));
    dx.par_chunks_mut(tile_rows * channels).enumerate().for_each_init(Vec::new, |tile, (index, dx)| {
        let rows = dx.len() / channels;
        tile.resize(rows * features, T::zero());
        gather(dy, outputs, taps, index * tile_rows, tile);
        // one product a tap: the taps' transposed matrices (outputs, channels) are not one strided matrix
        let dx = SharedMut::new(dx);
        for tap in 0..count {
            let columns = View::strided(&tile[tap * outputs..], rows, outputs, features, 1);
            let matrix = View::rows(&weight[tap * channels * outputs..][..channels * outputs], channels, outputs).t();
            // SAFETY: `dx` is this closure's own chunk, and the products run one after the other.
            let target = unsafe { ViewMut::shared(dx, 0, rows, channels, channels) };
            gemm(columns, matrix, target, tap > 0, threads);
        }
    });
}
