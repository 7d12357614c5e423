//! LoRA's products in f32 on AVX-512 tiles. Rows of x and dy become lanes, so that no sum runs across a vector.

use crate::ops::buffer;
use crate::ops::tasks::share;
use crate::ops::tiles::{Columns, LANES, ROWS, Strided, WIDE, rows_to_lanes, strided_tile};

/// A matrix (rank, columns) with zeros behind each row, up to a multiple of 16 numbers.
struct Padded {
    data: Vec<f32>,
    columns: usize,
    width: usize,
}

impl Padded {
    fn new(matrix: &[f32], rank: usize) -> Self {
        let columns = matrix.len() / rank;
        let width = columns.next_multiple_of(LANES);
        let mut data = vec![0.0; rank * width];
        for (row, source) in data.chunks_mut(width).zip(matrix.chunks(columns)) {
            row[..columns].copy_from_slice(source);
        }
        Self { data, columns, width }
    }
}

/// The factors of a layer.
pub(super) struct Tiled {
    /// A (rank, inputs)
    a: Padded,
    /// Bᵀ (rank, outputs)
    b: Padded,
    rank: usize,
    scale: f32,
}

impl Tiled {
    /// For a CPU with AVX-512, which the caller has asked for.
    pub(super) fn new(a: &[f32], b: &[f32], rank: usize, scale: f32) -> Self {
        Self { a: Padded::new(a, rank), b: Padded::new(b, rank), rank, scale }
    }

    /// sum += scale (x Aᵀ) Bᵀ.
    pub(super) fn add(&self, x: &[f32], sum: &mut [f32]) {
        let mut lanes = buffer(self.a.columns * WIDE);
        let mut low = buffer(self.rank * WIDE);
        for (x, sum) in x.chunks(WIDE * self.a.columns).zip(sum.chunks_mut(WIDE * self.b.columns)) {
            self.low(x, &self.a, &mut lanes, &mut low);
            self.expand(&low, &self.b, sum, false);
        }
    }

    /// dx, and da (rank, inputs) and db (rank, outputs) added to.
    pub(super) fn backward(&self, dy: &[f32], x: &[f32], dx: &mut [f32], da: &mut [f32], db: &mut [f32]) {
        let (inputs, outputs) = (self.a.columns, self.b.columns);
        let mut lanes = buffer(inputs.max(outputs) * WIDE);
        let [mut low, mut d_low, mut turned] = std::array::from_fn(|_| buffer(self.rank * WIDE));
        let blocks = x.chunks(WIDE * inputs).zip(dy.chunks(WIDE * outputs));
        for (dx, (x, dy)) in dx.chunks_mut(WIDE * inputs).zip(blocks) {
            self.low(x, &self.a, &mut lanes, &mut low);
            self.low(dy, &self.b, &mut lanes, &mut d_low);
            self.expand(&d_low, &self.a, dx, true);
            self.add_outer(&d_low, &mut turned, x, inputs, da);
            self.add_outer(&low, &mut turned, dy, outputs, db);
        }
    }

    /// `low` (rank, 32) = scale matrix xᵀ for up to 32 rows of x; lanes without a row are zero.
    fn low(&self, x: &[f32], matrix: &Padded, lanes: &mut [f32], low: &mut [f32]) {
        let (n, width) = (matrix.columns, matrix.width);
        assert!(lanes.len() >= n * WIDE && low.len() == self.rank * WIDE);
        let mut rows = [std::ptr::null(); WIDE];
        for (row, x) in rows.iter_mut().zip(x.chunks_exact(n)) {
            *row = x.as_ptr();
        }
        // SAFETY: rows have n numbers and `lanes` has room for 32 times as many. The CPU was asked (`Tiled::new`).
        unsafe { rows_to_lanes(&rows, n, lanes.as_mut_ptr()) };
        let blocks = self.rank.div_ceil(ROWS);
        for block in (0..blocks).map(|b| share(self.rank, blocks, b)) {
            let first = matrix.data[block.start * width..][..block.len() * width].as_ptr();
            let operands = Strided { first, stride: width, depth: n, lanes: lanes.as_ptr() };
            let target = low[block.start * WIDE..][..block.len() * WIDE].as_mut_ptr();
            // SAFETY: the operands and the target were measured above.
            unsafe { strided_tile(block.len(), &operands, target, WIDE, WIDE) };
        }
        low.iter_mut().for_each(|x| *x *= self.scale);
    }

    /// y (rows, columns) = lowᵀ matrix, or added to y.
    fn expand(&self, low: &[f32], matrix: &Padded, y: &mut [f32], replace: bool) {
        let (columns, depth) = (matrix.columns, self.rank);
        let rows = y.len() / columns;
        assert!(rows <= WIDE && low.len() == depth * WIDE);
        let (numbers, vectors) = (low.as_ptr(), matrix.data.as_ptr());
        let products = Columns { numbers, step: WIDE, vectors, stride: matrix.width, depth };
        // SAFETY: `low` was measured above, the matrix is padded to whole vectors, and y has these rows.
        unsafe { products.product(rows, y.as_mut_ptr(), columns, columns, replace) };
    }

    /// sum (rank, n) += low xᵀ for the rows of x, (rows, n); `turned` is room for low, transposed.
    fn add_outer(&self, low: &[f32], turned: &mut [f32], x: &[f32], n: usize, sum: &mut [f32]) {
        let rows = x.len() / n;
        assert!(rows <= WIDE && sum.len() == self.rank * n && turned.len() == self.rank * WIDE);
        for (k, low) in low.chunks(WIDE).enumerate() {
            for (row, value) in low.iter().enumerate() {
                turned[row * self.rank + k] = *value;
            }
        }
        let full = n / LANES * LANES;
        let columns = |vectors: &[f32], stride| Columns {
            numbers: turned.as_ptr(),
            step: self.rank,
            vectors: vectors.as_ptr(),
            stride,
            depth: rows,
        };
        // SAFETY: x has whole vectors up to `full` in each of its rows.
        unsafe { columns(x, n).product(self.rank, sum.as_mut_ptr(), n, full, false) };
        if full < n {
            // the last columns are no whole vector: from a copy with room behind them
            let mut rest = [0f32; WIDE * LANES];
            for (rest, x) in rest.chunks_mut(LANES).zip(x.chunks(n)) {
                rest[..n - full].copy_from_slice(&x[full..]);
            }
            // SAFETY: `rest` has a vector for each row, and sum that many numbers behind `full` in each of its rows.
            unsafe { columns(&rest, LANES).product(self.rank, sum[full..].as_mut_ptr(), n, n - full, false) };
        }
    }
}
