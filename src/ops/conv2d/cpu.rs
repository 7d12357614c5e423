use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::Kernel;
use crate::ops::gemm::{Threads, View, ViewMut, gemm};
use crate::ops::{Host, Real, SharedMut, tensor_from};

/// Bytes of a tile's gathered taps: large enough that packing the kernel for each tile's product is paid back.
const TILE_BYTES: usize = 1024 * 1024;

/// Which source pixel a tap reads: `position` along one axis of the destination, `None` outside the image.
#[derive(Clone, Copy)]
struct Axis {
    source: usize,
    stride: usize,
    padding: usize,
    transposed: bool,
}

impl Axis {
    fn tap(&self, position: usize, offset: usize) -> Option<usize> {
        if self.transposed {
            // the source pixels i with s i + u - p = position
            let shifted = (position + self.padding).checked_sub(offset)?;
            (shifted % self.stride == 0 && shifted / self.stride < self.source).then_some(shifted / self.stride)
        } else {
            let shifted = (position * self.stride + offset).checked_sub(self.padding)?;
            (shifted < self.source).then_some(shifted)
        }
    }
}

/// Rows of a tile such that `taps * channels` numbers each fit [`TILE_BYTES`], at least a few for the product to be efficient.
fn tile_rows<T>(row: usize) -> usize {
    (TILE_BYTES / (row * size_of::<T>())).clamp(64, 1024)
}

/// One tile leaves the product to share the threads; several tiles share them already.
fn threads(tiles: usize) -> Threads {
    if tiles == 1 { Threads::All } else { Threads::One }
}

/// Copies the taps of destination pixels `first..first + rows` (counted over batch, row, column) side by side.
#[allow(clippy::too_many_arguments)]
fn gather<T: Real>(
    source: &[T],
    channels: usize,
    (y, x): (Axis, Axis),
    (out_h, out_w): (usize, usize),
    (kh, kw): (usize, usize),
    first: usize,
    rows: usize,
    tile: &mut [T],
) {
    for (row, taps) in (first..first + rows).zip(tile.chunks_mut(kh * kw * channels)) {
        let (b, i, j) = (row / (out_h * out_w), row / out_w % out_h, row % out_w);
        let mut taps = taps.chunks_mut(channels);
        for u in 0..kh {
            let line = y.tap(i, u).map(|k| (b * y.source + k) * x.source);
            for v in 0..kw {
                let slot = taps.next().expect("kh * kw taps");
                match line.zip(x.tap(j, v)) {
                    Some((line, l)) => slot.copy_from_slice(&source[(line + l) * channels..][..channels]),
                    None => slot.fill(T::zero()),
                }
            }
        }
    }
}

pub(super) fn conv2d_fwd<T: Real>(x: &Tensor, kernel: &Kernel) -> Result<Tensor> {
    let (batch, height, width, inputs) = x.dims4()?;
    let (kh, kw, _, outputs) = kernel.weight.dims4()?;
    let (out_h, out_w) = (kernel.out_side(height, kh)?, kernel.out_side(width, kw)?);
    let x = Host::<T>::read(x)?;
    let weight = Host::<T>::read(&kernel.weight)?;
    let bias = kernel.bias.as_ref().map(Host::<T>::read).transpose()?;
    let axis = |source| Axis { source, stride: kernel.stride, padding: kernel.padding, transposed: false };
    let taps = kh * kw * inputs;
    let mut y = vec![T::zero(); batch * out_h * out_w * outputs];

    let tile_rows = tile_rows::<T>(taps);
    let threads = threads((batch * out_h * out_w).div_ceil(tile_rows));
    y.par_chunks_mut(tile_rows * outputs).enumerate().for_each_init(Vec::new, |tile, (index, y)| {
        let rows = y.len() / outputs;
        tile.resize(tile_rows * taps, T::zero());
        gather(&x, inputs, (axis(height), axis(width)), (out_h, out_w), (kh, kw), index * tile_rows, rows, tile);
        if let Some(bias) = &bias {
            y.chunks_mut(outputs).for_each(|pixel| pixel.copy_from_slice(bias));
        }
        gemm(
            View::rows(tile, rows, taps),
            View::rows(&weight, taps, outputs),
            ViewMut::rows(y, rows, outputs),
            bias.is_some(),
            threads,
        );
    });
    tensor_from(y, (batch, out_h, out_w, outputs))
}

pub(super) fn conv2d_bwd<T: Real>(cotangent: &Tensor, kernel: &Kernel, height: usize, width: usize) -> Result<Tensor> {
    let (batch, out_h, out_w, outputs) = cotangent.dims4()?;
    let (kh, kw, inputs, _) = kernel.weight.dims4()?;
    let dy = Host::<T>::read(cotangent)?;
    let weight = Host::<T>::read(&kernel.weight)?;
    let axis = |source| Axis { source, stride: kernel.stride, padding: kernel.padding, transposed: true };
    let taps = kh * kw * outputs;
    let mut dx = vec![T::zero(); batch * height * width * inputs];

    let tile_rows = tile_rows::<T>(taps);
    let threads = threads((batch * height * width).div_ceil(tile_rows));
    dx.par_chunks_mut(tile_rows * inputs).enumerate().for_each_init(Vec::new, |tile, (index, dx)| {
        let rows = dx.len() / inputs;
        tile.resize(tile_rows * taps, T::zero());
        gather(&dy, outputs, (axis(out_h), axis(out_w)), (height, width), (kh, kw), index * tile_rows, rows, tile);
        // one product per tap, because the taps' transposed matrices (out, in) are not one strided matrix
        let dx = SharedMut::new(dx);
        for tap in 0..kh * kw {
            let columns = View::strided(&tile[tap * outputs..], rows, outputs, taps, 1);
            let matrix = View::rows(&weight[tap * inputs * outputs..][..inputs * outputs], inputs, outputs).t();
            // SAFETY: `dx` is this closure's own chunk, and the products run one after the other.
            let target = unsafe { ViewMut::shared(dx, 0, rows, inputs, inputs) };
            gemm(columns, matrix, target, tap > 0, threads);
        }
    });
    tensor_from(dx, (batch, height, width, inputs))
}
