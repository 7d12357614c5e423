//! LoRA's products in f32 on AVX-512 tiles. Rows of x and dy become lanes, so that no sum runs across a vector.

use crate::ops::buffer;
use crate::ops::frozen::panels::share;
use crate::ops::tiles::{LANES, ROWS, Strided, WIDE, each_height, rows_to_lanes, strided_tile, tile_columns};

/// A matrix (n, columns) with zeros behind each row, up to a multiple of 32 numbers.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    columns: usize,
    width: usize,
}

fn padded(matrix: &[f32], columns: usize) -> Vec<f32> {
    let width = columns.next_multiple_of(WIDE);
    let mut data = vec![0.0; matrix.len() / columns * width];
    for (row, source) in data.chunks_mut(width).zip(matrix.chunks(columns)) {
        row[..columns].copy_from_slice(source);
    }
    data
}

/// The factors: A (rank, inputs) and Bᵀ (rank, outputs), in padded rows.
pub(super) struct Tiled {
    a: Vec<f32>,
    b: Vec<f32>,
    rank: usize,
    scale: f32,
    inputs: usize,
    outputs: usize,
}

impl Tiled {
    /// For a CPU with AVX-512, which the caller has asked for.
    pub(super) fn new(a: &[f32], b: &[f32], rank: usize, scale: f32) -> Self {
        let (inputs, outputs) = (a.len() / rank, b.len() / rank);
        Self { a: padded(a, inputs), b: padded(b, outputs), rank, scale, inputs, outputs }
    }
    fn a(&self) -> Rows<'_> {
        Rows { data: &self.a, columns: self.inputs, width: self.inputs.next_multiple_of(WIDE) }
    }
    fn b(&self) -> Rows<'_> {
        Rows { data: &self.b, columns: self.outputs, width: self.outputs.next_multiple_of(WIDE) }
    }

    /// sum += scale (x Aᵀ) Bᵀ.
    pub(super) fn add(&self, x: &[f32], sum: &mut [f32]) {
        let mut lanes = buffer(self.inputs * WIDE);
        let mut low = buffer(self.rank * WIDE);
        for (x, sum) in x.chunks(WIDE * self.inputs).zip(sum.chunks_mut(WIDE * self.outputs)) {
            self.low(x, self.a(), &mut lanes, &mut low);
            self.expand(&low, self.b(), sum, false);
        }
    }

    /// dx, and da (rank, inputs) and db (rank, outputs) added to.
    pub(super) fn backward(&self, dy: &[f32], x: &[f32], dx: &mut [f32], da: &mut [f32], db: &mut [f32]) {
        let mut lanes = buffer(self.inputs.max(self.outputs) * WIDE);
        let [mut low, mut d_low, mut rows] = std::array::from_fn(|_| buffer(self.rank * WIDE));
        let blocks = x.chunks(WIDE * self.inputs).zip(dy.chunks(WIDE * self.outputs));
        for (dx, (x, dy)) in dx.chunks_mut(WIDE * self.inputs).zip(blocks) {
            self.low(x, self.a(), &mut lanes, &mut low);
            self.low(dy, self.b(), &mut lanes, &mut d_low);
            self.expand(&d_low, self.a(), dx, true);
            self.add_outer(&d_low, &mut rows, x, self.inputs, da);
            self.add_outer(&low, &mut rows, dy, self.outputs, db);
        }
    }

    /// `low` (rank, 32) = scale matrix xᵀ for up to 32 rows of x; lanes without a row are zero.
    fn low(&self, x: &[f32], matrix: Rows, lanes: &mut [f32], low: &mut [f32]) {
        let n = matrix.columns;
        assert!(lanes.len() >= n * WIDE && low.len() == self.rank * WIDE);
        let mut rows = [std::ptr::null(); WIDE];
        for (row, x) in rows.iter_mut().zip(x.chunks_exact(n)) {
            *row = x.as_ptr();
        }
        // SAFETY: rows have n numbers and `lanes` has room for 32 times as many. The CPU was asked (`Tiled::new`).
        unsafe { rows_to_lanes(&rows, n, lanes.as_mut_ptr()) };
        let blocks = self.rank.div_ceil(ROWS);
        for block in (0..blocks).map(|b| share(self.rank, blocks, b)) {
            let first = matrix.data[block.start * matrix.width..][..block.len() * matrix.width].as_ptr();
            let operands = Strided { first, stride: matrix.width, depth: n, lanes: lanes.as_ptr() };
            let target = low[block.start * WIDE..][..block.len() * WIDE].as_mut_ptr();
            // SAFETY: the operands and the target were measured above.
            unsafe { strided_tile(block.len(), &operands, target, WIDE, WIDE) };
        }
        low.iter_mut().for_each(|x| *x *= self.scale);
    }

    /// y (rows, columns) = lowᵀ matrix, or added to y.
    fn expand(&self, low: &[f32], matrix: Rows, y: &mut [f32], replace: bool) {
        let rows = y.len() / matrix.columns;
        assert!(rows <= WIDE && low.len() == self.rank * WIDE && matrix.data.len() == self.rank * matrix.width);
        let blocks = rows.div_ceil(ROWS);
        for block in (0..blocks).map(|b| share(rows, blocks, b)) {
            for c in (0..matrix.columns).step_by(WIDE) {
                let columns = (matrix.columns - c).min(WIDE);
                let target = y[block.start * matrix.columns + c..].as_mut_ptr();
                let step =
                    Step { numbers: &low[block.start..], step: WIDE, vectors: &matrix.data[c..], stride: matrix.width };
                // SAFETY: `low` and the padded matrix were measured above; y has these rows.
                unsafe { step.tile(block.len(), self.rank, target, matrix.columns, columns, replace) };
            }
        }
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
        // the last columns, which are no whole vectors
        let full = n / LANES * LANES;
        let mut rest = [0f32; WIDE * LANES];
        if full < n {
            for (rest, x) in rest.chunks_mut(LANES).zip(x.chunks(n)) {
                rest[..n - full].copy_from_slice(&x[full..]);
            }
        }
        let blocks = self.rank.div_ceil(ROWS);
        for block in (0..blocks).map(|b| share(self.rank, blocks, b)) {
            let numbers = &turned[block.start..];
            let mut c = 0;
            while c < n {
                let (vectors, stride, columns) = match n - c {
                    left if left >= WIDE => (&x[c..], n, WIDE),
                    left if left >= LANES => (&x[c..], n, LANES),
                    left => (&rest[..], LANES, left),
                };
                let target = sum[block.start * n + c..].as_mut_ptr();
                let step = Step { numbers, step: self.rank, vectors, stride };
                // SAFETY: x has whole vectors at these columns of each of its rows, and `rest` has one for each.
                unsafe { step.tile(block.len(), rows, target, n, columns, false) };
                c += columns;
            }
        }
    }
}

/// Neighbouring numbers at each step of a reduction, against vectors.
struct Step<'a> {
    numbers: &'a [f32],
    step: usize,
    vectors: &'a [f32],
    stride: usize,
}

impl Step<'_> {
    /// # Safety
    /// As for [`tile_columns`]: of each of `depth` steps there are `height` numbers, and 32 lanes of vectors, or 16 where
    /// `columns` is no more.
    unsafe fn tile(
        &self,
        height: usize,
        depth: usize,
        target: *mut f32,
        row_stride: usize,
        columns: usize,
        replace: bool,
    ) {
        let (numbers, vectors) = (self.numbers.as_ptr(), self.vectors.as_ptr());
        let (step, stride) = (self.step, self.stride);
        each_height!(height, R => {
            // SAFETY: the caller's promises.
            unsafe {
                if columns > LANES {
                    tile_columns::<R, 2>(numbers, step, vectors, stride, depth, target, row_stride, columns, replace)
                } else {
                    tile_columns::<R, 1>(numbers, step, vectors, stride, depth, target, row_stride, columns, replace)
                }
            }
        });
    }
}
