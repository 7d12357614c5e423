//! The matrix product of the `gemm` crate behind bounds-checked views.

use std::sync::atomic::{AtomicU64, Ordering};

use super::host::{Real, SharedMut};

/// Floating point operations of all products so far: 2 m n k each.
pub(crate) static FLOPS: AtomicU64 = AtomicU64::new(0);

/// Counts products that other code than [`gemm`] computes: a GPU's.
#[cfg(feature = "cuda")]
pub(crate) fn count_flops(flops: u64) {
    FLOPS.fetch_add(flops, Ordering::Relaxed);
}

/// A read-only matrix: element (r, c) lies at `r * row_stride + c * col_stride`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> View<'a, T> {
    pub(crate) fn strided(data: &'a [T], rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Self {
        assert_in_bounds(data.len(), rows, cols, row_stride, col_stride);
        Self { data, rows, cols, row_stride, col_stride }
    }
    /// Row-major without gaps.
    pub(crate) fn rows(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols, 1)
    }
    /// The transpose, without a copy.
    pub(crate) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// The destination of a product.
pub(crate) struct ViewMut<'a, T> {
    data: SharedMut<'a, T>,
    offset: usize,
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a, T> ViewMut<'a, T> {
    pub(crate) fn rows(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        assert_in_bounds(data.len(), rows, cols, cols, 1);
        Self { data: SharedMut::new(data), offset: 0, rows, cols, row_stride: cols }
    }
    /// `rows` x `cols` elements from `offset` on, rows `row_stride` apart, inside a buffer that other threads write too.
    ///
    /// # Safety
    /// Until the product has returned, no other thread may touch these elements.
    pub(crate) unsafe fn shared(
        data: SharedMut<'a, T>,
        offset: usize,
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Self {
        assert!(offset <= data.len());
        assert_in_bounds(data.len() - offset, rows, cols, row_stride, 1);
        Self { data, offset, rows, cols, row_stride }
    }
}

fn assert_in_bounds(len: usize, rows: usize, cols: usize, row_stride: usize, col_stride: usize) {
    if rows > 0 && cols > 0 {
        let last = (rows - 1) * row_stride + (cols - 1) * col_stride;
        assert!(last < len, "a {rows}x{cols} view (strides {row_stride}, {col_stride}) of {len} elements");
    }
}

/// How many threads one product may use.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Threads {
    One,
    All,
}

/// `dst = a b`, or `dst += a b` when `accumulate`.
pub(crate) fn gemm<T: Real>(a: View<T>, b: View<T>, dst: ViewMut<T>, accumulate: bool, threads: Threads) {
    scaled_gemm(T::one(), a, b, dst, accumulate, threads);
}

/// `dst = factor a b`, or `dst += factor a b` when `accumulate`.
pub(crate) fn scaled_gemm<T: Real>(
    factor: T,
    a: View<T>,
    b: View<T>,
    dst: ViewMut<T>,
    accumulate: bool,
    threads: Threads,
) {
    assert_eq!(a.cols, b.rows, "inner sizes of a product");
    assert_eq!((a.rows, b.cols), (dst.rows, dst.cols), "outer sizes of a product");
    if dst.rows == 0 || dst.cols == 0 {
        return;
    }
    FLOPS.fetch_add(2 * (dst.rows * dst.cols * a.cols) as u64, Ordering::Relaxed);
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    let pointer = dst.data.at(dst.offset);
    // SAFETY: every view was checked to lie inside its buffer; the destination is exclusive (by `&mut`, or by the
    // promise of `ViewMut::shared`), so it does not alias the operands.
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.cols,
            a.cols,
            pointer,
            1,
            dst.row_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::one(),
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}
