//! LoRA's products. Their inner or outer size is the rank, a few numbers: reading x and y is what they cost, so each block
//! of rows is read once and everything is done with it.

use std::array::from_fn;
use std::sync::atomic::Ordering;

use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::tiled::Tiled;
use crate::ops::gemm::FLOPS;
#[cfg(target_arch = "x86_64")]
use crate::ops::tiles;
use crate::ops::vector::{LANES, total, vectorised};
use crate::ops::{Real, buffer};

/// Rows of the small matrices that are taken together, and rows of x.
const GROUP: usize = 4;
/// Rows of a task of the forward.
const ROWS: usize = 64;
/// Parts that the backward's sums over rows are made of, whatever the number of threads.
const PARTS: usize = 8;

/// The factors of a layer: A (rank, inputs) and Bᵀ (rank, outputs).
pub(super) struct Factors<'a, T> {
    pub a: &'a [T],
    b: Vec<T>,
    pub rank: usize,
    pub scale: T,
    pub inputs: usize,
    pub outputs: usize,
    #[cfg(target_arch = "x86_64")]
    tiled: Option<Tiled>,
}

impl<'a, T: Real> Factors<'a, T> {
    /// From A (rank, inputs) and B (outputs, rank).
    pub(super) fn new(a: &'a [T], b: &[T], rank: usize, scale: T) -> Self {
        let b = transposed(b, rank);
        Self {
            #[cfg(target_arch = "x86_64")]
            tiled: match (tiles::available(), T::as_f32(a), T::as_f32(&b)) {
                (true, Some(a), Some(b)) => Some(Tiled::new(a, b, rank, scale.f64() as f32)),
                _ => None,
            },
            inputs: a.len() / rank,
            outputs: b.len() / rank,
            a,
            b,
            rank,
            scale,
        }
    }

    fn count_flops(&self, rows: usize, products: usize) {
        let work = products * rows * self.rank * (self.inputs + self.outputs);
        FLOPS.fetch_add(2 * work as u64, Ordering::Relaxed);
    }

    /// y + scale (x Aᵀ) Bᵀ.
    pub(super) fn forward(&self, x: &[T], y: &[T]) -> Vec<T> {
        self.count_flops(y.len() / self.outputs, 1);
        let mut sum = buffer(y.len());
        let (x, y) = (x.par_chunks(ROWS * self.inputs), y.par_chunks(ROWS * self.outputs));
        sum.par_chunks_mut(ROWS * self.outputs).zip(x.zip(y)).for_each(|(sum, (x, y))| {
            sum.copy_from_slice(y);
            #[cfg(target_arch = "x86_64")]
            if let (Some(tiled), Some(x), Some(sum)) = (&self.tiled, T::as_f32(x), T::as_f32_mut(sum)) {
                return tiled.add(x, sum);
            }
            let mut low = vec![T::zero(); self.rank];
            vectorised(
                #[inline(always)]
                || {
                    for (x, sum) in x.chunks(self.inputs).zip(sum.chunks_mut(self.outputs)) {
                        dots(x, self.a, self.scale, &mut low);
                        add_rows(&low, &self.b, sum);
                    }
                },
            );
        });
        sum
    }

    /// The gradients of x, A and B.
    pub(super) fn backward(&self, dy: &[T], x: &[T]) -> (Vec<T>, Vec<T>, Vec<T>) {
        let rows = x.len() / self.inputs;
        self.count_flops(rows, 3);
        let mut dx = buffer(x.len());
        let part = rows.div_ceil(PARTS).next_multiple_of(GROUP).max(ROWS);
        let chunks = x.par_chunks(part * self.inputs).zip(dy.par_chunks(part * self.outputs));
        let sums: Vec<(Vec<T>, Vec<T>)> = dx
            .par_chunks_mut(part * self.inputs)
            .zip(chunks)
            .map(|(dx, (x, dy))| {
                let (mut da, mut db) = (vec![T::zero(); self.a.len()], vec![T::zero(); self.b.len()]);
                self.backward_part(dy, x, dx, &mut da, &mut db);
                (da, db)
            })
            .collect();
        let add = |sum: &mut [T], more: &[T]| sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += *more);
        let mut sums = sums.into_iter();
        let (mut da, mut db) =
            sums.next().unwrap_or_else(|| (vec![T::zero(); self.a.len()], vec![T::zero(); self.b.len()]));
        for (more_da, more_db) in sums {
            add(&mut da, &more_da);
            add(&mut db, &more_db);
        }
        (dx, da, transposed(&db, self.outputs))
    }

    /// dx of some rows; their part of the sums added to da and db.
    fn backward_part(&self, dy: &[T], x: &[T], dx: &mut [T], da: &mut [T], db: &mut [T]) {
        #[cfg(target_arch = "x86_64")]
        if let (Some(tiled), Some(dy), Some(x), Some(dx), Some(da), Some(db)) =
            (&self.tiled, T::as_f32(dy), T::as_f32(x), T::as_f32_mut(dx), T::as_f32_mut(da), T::as_f32_mut(db))
        {
            return tiled.backward(dy, x, dx, da, db);
        }
        vectorised(
            #[inline(always)]
            || self.backward_rows(dy, x, dx, da, db),
        );
    }

    #[inline(always)]
    fn backward_rows(&self, dy: &[T], x: &[T], dx: &mut [T], da: &mut [T], db: &mut [T]) {
        let mut low = vec![T::zero(); GROUP * self.rank];
        let mut d_low = vec![T::zero(); GROUP * self.rank];
        let groups = x.chunks(GROUP * self.inputs).zip(dy.chunks(GROUP * self.outputs));
        for (dx, (x, dy)) in dx.chunks_mut(GROUP * self.inputs).zip(groups) {
            let rows = x.chunks(self.inputs).zip(dy.chunks(self.outputs));
            let lows = low.chunks_mut(self.rank).zip(d_low.chunks_mut(self.rank));
            for (((x, dy), (low, d_low)), dx) in rows.zip(lows).zip(dx.chunks_mut(self.inputs)) {
                dots(x, self.a, self.scale, low);
                dots(dy, &self.b, self.scale, d_low);
                dx.fill(T::zero());
                add_rows(d_low, self.a, dx);
            }
            add_outer(&d_low, self.rank, x, self.inputs, da);
            add_outer(&low, self.rank, dy, self.outputs, db);
        }
    }
}

/// (n, columns) to (columns, n).
fn transposed<T: Real>(matrix: &[T], columns: usize) -> Vec<T> {
    let rows = matrix.len() / columns;
    (0..matrix.len()).map(|i| matrix[i % rows * columns + i / rows]).collect()
}

/// Up to four rows of `matrix` (_, n) from `first` on; where there are fewer, the last one again.
#[inline(always)]
fn rows_of<T>(matrix: &[T], n: usize, first: usize, count: usize) -> [&[T]; GROUP] {
    from_fn(|i| &matrix[(first + i.min(count - 1)) * n..][..n])
}

/// `low[k]` = factor <x, matrix[k]>; matrix (rank, n).
#[inline(always)]
fn dots<T: Real>(x: &[T], matrix: &[T], factor: T, low: &mut [T]) {
    let n = x.len();
    for (group, low) in low.chunks_mut(GROUP).enumerate() {
        let rows = rows_of(matrix, n, group * GROUP, low.len());
        let mut partial = [[T::zero(); LANES]; GROUP];
        let full = n / LANES * LANES;
        for start in (0..full).step_by(LANES) {
            let x = &x[start..][..LANES];
            for (partial, row) in partial.iter_mut().zip(rows) {
                let row = &row[start..][..LANES];
                for lane in 0..LANES {
                    partial[lane] += x[lane] * row[lane];
                }
            }
        }
        for i in full..n {
            for (partial, row) in partial.iter_mut().zip(rows) {
                partial[i - full] += x[i] * row[i];
            }
        }
        for (low, partial) in low.iter_mut().zip(partial) {
            *low = factor * total(partial);
        }
    }
}

/// sum += the sum of `low[k]` matrix[k]; matrix (rank, n).
#[inline(always)]
fn add_rows<T: Real>(low: &[T], matrix: &[T], sum: &mut [T]) {
    let n = sum.len();
    for (group, low) in low.chunks(GROUP).enumerate() {
        let [a, b, c, d] = rows_of(matrix, n, group * GROUP, low.len());
        let [p, q, r, s]: [T; GROUP] = from_fn(|i| low.get(i).copied().unwrap_or(T::zero()));
        for (i, sum) in sum.iter_mut().enumerate() {
            *sum += (p * a[i] + q * b[i]) + (r * c[i] + s * d[i]);
        }
    }
}

/// `sum[k]` += the sum over up to four rows of `low[row][k]` x[row]; low (4, rank), x (rows, n), sum (rank, n).
#[inline(always)]
fn add_outer<T: Real>(low: &[T], rank: usize, x: &[T], n: usize, sum: &mut [T]) {
    let count = x.len() / n;
    let [a, b, c, d] = rows_of(x, n, 0, count);
    for (k, sum) in sum.chunks_mut(n).enumerate() {
        let [p, q, r, s]: [T; GROUP] = from_fn(|row| if row < count { low[row * rank + k] } else { T::zero() });
        for (i, sum) in sum.iter_mut().enumerate() {
            *sum += (p * a[i] + q * b[i]) + (r * c[i] + s * d[i]);
        }
    }
}
