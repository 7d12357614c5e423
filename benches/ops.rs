//! Each operation, forward and backward, at shapes of Stable Diffusion 1.5 and of the embedded model.
//!
//! `cargo bench --bench ops`; the rate is 10⁹ floating point operations a second, as the products count them. The first
//! line, a square product of the `gemm` crate, is the yardstick.

use alignprop::allocator::{Allocator, keep_pages};
use alignprop::ops::attention::{Heads, attention_bwd, attention_fwd};
use alignprop::ops::conv2d::{Kernel, conv2d_bwd, conv2d_fwd};
use alignprop::ops::linear::{Weight, linear_bwd, linear_fwd};
use candle_core::{Device, Tensor};
use divan::Bencher;
use divan::counter::ItemsCount;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() {
    keep_pages();
    println!("peak of matrix products: {:.0} GFLOP/s", alignprop::ops::matmul_peak(1536, 5) / 1e9);
    divan::main();
}

fn normal(dims: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1f32, dims, &Device::Cpu).unwrap()
}

/// (rows, inputs, outputs)
const LINEAR: [(usize, usize, usize); 6] =
    [(257, 1024, 4096), (257, 4096, 1024), (1024, 320, 2560), (256, 640, 640), (64, 1280, 1280), (1024, 64, 64)];

#[divan::bench(args = LINEAR)]
fn linear_forward(bencher: Bencher, (rows, inputs, outputs): (usize, usize, usize)) {
    let (x, weight) = (normal(&[rows, inputs]), Weight::new(&normal(&[outputs, inputs])).unwrap());
    bencher.counter(ItemsCount::new(2 * rows * inputs * outputs)).bench(|| linear_fwd(&x, &weight, None).unwrap());
}

#[divan::bench(args = LINEAR)]
fn linear_backward(bencher: Bencher, (rows, inputs, outputs): (usize, usize, usize)) {
    let (dy, weight) = (normal(&[rows, outputs]), Weight::new(&normal(&[outputs, inputs])).unwrap());
    bencher.counter(ItemsCount::new(2 * rows * inputs * outputs)).bench(|| linear_bwd(&dy, &weight).unwrap());
}

/// (batch, side, inputs, outputs), 3x3
const CONV: [(usize, usize, usize, usize); 7] = [
    (1, 256, 128, 128),
    (1, 128, 256, 256),
    (1, 32, 320, 320),
    (1, 8, 1280, 1280),
    (1, 32, 80, 80),
    (4, 16, 64, 64),
    (4, 8, 128, 128),
];

#[divan::bench(args = CONV)]
fn conv2d_forward(bencher: Bencher, (batch, side, inputs, outputs): (usize, usize, usize, usize)) {
    let kernel = Kernel::new(&normal(&[outputs, inputs, 3, 3]), None, 1, 1).unwrap();
    let x = normal(&[batch, side, side, inputs]);
    let count = ItemsCount::new(18 * batch * side * side * inputs * outputs);
    bencher.counter(count).bench(|| conv2d_fwd(&x, &kernel).unwrap());
}

#[divan::bench(args = CONV)]
fn conv2d_backward(bencher: Bencher, (batch, side, inputs, outputs): (usize, usize, usize, usize)) {
    let kernel = Kernel::new(&normal(&[outputs, inputs, 3, 3]), None, 1, 1).unwrap();
    let dy = normal(&[batch, side, side, outputs]);
    let count = ItemsCount::new(18 * batch * side * side * inputs * outputs);
    bencher.counter(count).bench(|| conv2d_bwd(&dy, &kernel, side, side).unwrap());
}

/// (batch, queries, keys, heads, head dimension)
const ATTENTION: [(usize, usize, usize, usize, usize); 6] = [
    (1, 1024, 1024, 8, 40),
    (1, 1024, 77, 8, 40),
    (1, 1024, 1024, 8, 10),
    (1, 257, 257, 16, 64),
    (4, 64, 64, 4, 32),
    (1, 1024, 1024, 1, 512),
];

fn attention_inputs((batch, n, m, heads, dim): (usize, usize, usize, usize, usize)) -> ([Tensor; 3], Heads, usize) {
    let c = heads * dim;
    let tensors = [normal(&[batch, n, c]), normal(&[batch, m, c]), normal(&[batch, m, c])];
    (tensors, Heads { count: heads, causal: false }, 2 * batch * n * m * c)
}

#[divan::bench(args = ATTENTION)]
fn attention_forward(bencher: Bencher, shape: (usize, usize, usize, usize, usize)) {
    let ([q, k, v], heads, product) = attention_inputs(shape);
    bencher.counter(ItemsCount::new(2 * product)).bench(|| attention_fwd(&q, &k, &v, heads).unwrap());
}

#[divan::bench(args = ATTENTION)]
fn attention_backward(bencher: Bencher, shape: (usize, usize, usize, usize, usize)) {
    let ([q, k, v], heads, product) = attention_inputs(shape);
    bencher.counter(ItemsCount::new(5 * product)).bench(|| attention_bwd(&q, &q, &k, &v, heads).unwrap());
}
