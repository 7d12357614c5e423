//! Differentiable operations over frozen weights: each has a forward and a backward, written by hand.
//!
//! One folder is one operation: `mod.rs` holds its mathematics, the choice of device and the tests, `cpu.rs` the
//! kernel where it is more than a loop, `cuda.rs` the launches of its kernels on a GPU (whose sources are in `cuda/`). An operation is a pair of plain functions on tensors, `<op>_fwd` and `<op>_bwd`; what is kept between the
//! two is the caller's business ([`crate::nn`] records it on a tape).
//!
//! Activations are channels-last, (B, H, W, C) or (B, N, C), contiguous. The CPU kernels exist in f32, which is what
//! runs, and in f64, which is what finite differences are taken in.

pub mod activation;
pub mod attention;
pub mod concat;
pub mod conv2d;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub mod detections;
pub mod device;
pub mod finite;
pub(crate) mod frozen;
pub mod geglu;
pub mod group_norm;
mod host;
pub mod jpeg_size;
pub mod layer_norm;
pub mod linear;
pub mod replay;
#[cfg(any(feature = "cuda", test))]
#[path = "cuda/signatures.rs"]
#[allow(dead_code, reason = "build.rs reads the sources with it, launches check with it, tests do both")]
mod signatures;
pub mod sum;
#[cfg(target_arch = "x86_64")]
mod tasks;
#[cfg(test)]
pub(crate) mod testing;
/// Register tiles of matrix products for AVX-512.
#[cfg(target_arch = "x86_64")]
pub(crate) mod tiles;
pub mod upsample;
pub(crate) mod vector;

pub use finite::{Ledger, NotANumber, Number, Readings, is_finite, not_a_number};
pub use host::Real;
pub(crate) use host::{Host, Rounded, SharedMut, buffer, per_dtype, tensor_from, widened};

/// Matrix products `dst = beta_dst * dst + a b`, over strided views of host memory.
pub(crate) mod gemm;

/// Floating point operations of all matrix products of this process so far; elementwise work is not counted.
pub fn flops() -> u64 {
    gemm::FLOPS.load(std::sync::atomic::Ordering::Relaxed)
}

/// Peak of this machine's matrix product as this program reaches it, in floating point operations a second.
///
/// Multiplies two square f32 matrices of side `n` `repetitions` times and takes the best; a yardstick for benches.
pub fn matmul_peak(n: usize, repetitions: usize) -> f64 {
    let a = vec![1f32; n * n];
    let b = vec![1f32; n * n];
    let mut c = vec![0f32; n * n];
    let mut best = f64::INFINITY;
    for _ in 0..repetitions {
        let start = std::time::Instant::now();
        gemm::gemm(
            gemm::View::rows(&a, n, n),
            gemm::View::rows(&b, n, n),
            gemm::ViewMut::rows(&mut c, n, n),
            false,
            gemm::Threads::All,
        );
        best = best.min(start.elapsed().as_secs_f64());
    }
    2.0 * (n as f64).powi(3) / best
}
