//! Each operation, forward and backward, at shapes of Stable Diffusion 1.5 and of the embedded model.
//!
//! `cargo bench --bench ops`. The rate of linear layers, convolutions and attention is 10⁹ floating point operations a
//! second, as the products count them; that of the others is bytes a second, of what they must read and write at least.
//! The first lines are the yardsticks: a square product of the `gemm` crate, and a copy that does not fit in the caches.

use alignprop::allocator::{Allocator, keep_pages};
use alignprop::ops::activation::{Activation, activation_bwd, activation_fwd};
use alignprop::ops::attention::{Heads, attention_bwd, attention_fwd};
use alignprop::ops::conv2d::{Kernel, conv2d_bwd, conv2d_fwd};
use alignprop::ops::geglu::{geglu_bwd, geglu_fwd};
use alignprop::ops::group_norm::{GroupNorm, group_norm_bwd, group_norm_fwd};
use alignprop::ops::layer_norm::{LayerNorm, layer_norm_bwd, layer_norm_fwd};
use alignprop::ops::linear::{Weight, linear_bwd, linear_fwd, lora_bwd, lora_fwd};
use alignprop::ops::sum::add;
use alignprop::ops::upsample::{upsample_nearest_bwd, upsample_nearest_fwd};
use candle_core::{Device, Tensor};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use rayon::prelude::*;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() {
    keep_pages();
    println!("peak of matrix products: {:.0} GFLOP/s", alignprop::ops::matmul_peak(1536, 5) / 1e9);
    println!("rate of copies, read and written: {:.0} GB/s", copy_rate() / 1e9);
    divan::main();
}

/// Bytes a second that a copy reads and writes with all threads, the best of five.
fn copy_rate() -> f64 {
    let source = vec![1f32; 1 << 25];
    let mut copy = vec![0f32; source.len()];
    let seconds = (0..5).map(|_| {
        let start = std::time::Instant::now();
        copy.par_chunks_mut(1 << 16).zip(source.par_chunks(1 << 16)).for_each(|(to, from)| to.copy_from_slice(from));
        start.elapsed().as_secs_f64()
    });
    (2 * size_of_val(source.as_slice())) as f64 / seconds.fold(f64::INFINITY, f64::min)
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

/// Bytes of as many numbers.
fn bytes(numbers: usize) -> BytesCount {
    BytesCount::new(4 * numbers)
}

/// (batch, side, channels)
const IMAGES: [(usize, usize, usize); 3] = [(1, 256, 128), (1, 64, 320), (4, 16, 64)];

fn group_norm(channels: usize) -> GroupNorm {
    GroupNorm { weight: normal(&[channels]), bias: normal(&[channels]), groups: 32, eps: 1e-5, silu: true }
}

#[divan::bench(args = IMAGES)]
fn group_norm_silu_forward(bencher: Bencher, (batch, side, channels): (usize, usize, usize)) {
    let (x, norm) = (normal(&[batch, side, side, channels]), group_norm(channels));
    bencher.counter(bytes(2 * x.elem_count())).bench(|| group_norm_fwd(&x, &norm).unwrap());
}

#[divan::bench(args = IMAGES)]
fn group_norm_silu_backward(bencher: Bencher, (batch, side, channels): (usize, usize, usize)) {
    let (x, norm) = (normal(&[batch, side, side, channels]), group_norm(channels));
    bencher.counter(bytes(3 * x.elem_count())).bench(|| group_norm_bwd(&x, &x, &norm).unwrap());
}

#[divan::bench(args = IMAGES)]
fn upsample_forward(bencher: Bencher, (batch, side, channels): (usize, usize, usize)) {
    let x = normal(&[batch, side / 2, side / 2, channels]);
    bencher.counter(bytes(5 * x.elem_count())).bench(|| upsample_nearest_fwd(&x, side, side).unwrap());
}

#[divan::bench(args = IMAGES)]
fn upsample_backward(bencher: Bencher, (batch, side, channels): (usize, usize, usize)) {
    let dy = normal(&[batch, side, side, channels]);
    let count = bytes(dy.elem_count() * 5 / 4);
    bencher.counter(count).bench(|| upsample_nearest_bwd(&dy, side / 2, side / 2).unwrap());
}

/// (rows, features)
const ROWS: [(usize, usize); 3] = [(4096, 320), (257, 1024), (256, 128)];

#[divan::bench(args = ROWS)]
fn layer_norm_forward(bencher: Bencher, (rows, features): (usize, usize)) {
    let norm = LayerNorm { weight: normal(&[features]), bias: normal(&[features]), eps: 1e-5 };
    let x = normal(&[rows, features]);
    bencher.counter(bytes(2 * rows * features)).bench(|| layer_norm_fwd(&x, &norm).unwrap());
}

#[divan::bench(args = ROWS)]
fn layer_norm_backward(bencher: Bencher, (rows, features): (usize, usize)) {
    let norm = LayerNorm { weight: normal(&[features]), bias: normal(&[features]), eps: 1e-5 };
    let x = normal(&[rows, features]);
    bencher.counter(bytes(3 * rows * features)).bench(|| layer_norm_bwd(&x, &x, &norm).unwrap());
}

#[divan::bench(args = ROWS)]
fn add_forward(bencher: Bencher, (rows, features): (usize, usize)) {
    let x = normal(&[rows, features]);
    bencher.counter(bytes(3 * rows * features)).bench(|| add(&x, &x).unwrap());
}

/// Four times as wide inside, as in the UNet's feed-forward.
#[divan::bench(args = ROWS)]
fn geglu_forward(bencher: Bencher, (rows, features): (usize, usize)) {
    let x = normal(&[rows, 8 * features]);
    bencher.counter(bytes(12 * rows * features)).bench(|| geglu_fwd(&x).unwrap());
}

#[divan::bench(args = ROWS)]
fn geglu_backward(bencher: Bencher, (rows, features): (usize, usize)) {
    let (x, dy) = (normal(&[rows, 8 * features]), normal(&[rows, 4 * features]));
    bencher.counter(bytes(20 * rows * features)).bench(|| geglu_bwd(&dy, &x).unwrap());
}

#[divan::bench(args = ROWS)]
fn quick_gelu_forward(bencher: Bencher, (rows, features): (usize, usize)) {
    let x = normal(&[rows, 4 * features]);
    let count = bytes(8 * rows * features);
    bencher.counter(count).bench(|| activation_fwd(&x, Activation::QuickGelu).unwrap());
}

#[divan::bench(args = ROWS)]
fn quick_gelu_backward(bencher: Bencher, (rows, features): (usize, usize)) {
    let x = normal(&[rows, 4 * features]);
    let count = bytes(12 * rows * features);
    bencher.counter(count).bench(|| activation_bwd(&x, &x, Activation::QuickGelu).unwrap());
}

/// (rows, inputs, outputs, rank)
const LORA: [(usize, usize, usize, usize); 4] =
    [(4096, 320, 320, 4), (1024, 80, 80, 4), (77, 768, 320, 4), (256, 128, 128, 4)];

#[divan::bench(args = LORA)]
fn lora_forward(bencher: Bencher, (rows, inputs, outputs, rank): (usize, usize, usize, usize)) {
    let (x, y) = (normal(&[rows, inputs]), normal(&[rows, outputs]));
    let (a, b) = (normal(&[rank, inputs]), normal(&[outputs, rank]));
    let count = bytes(rows * (inputs + 2 * outputs));
    bencher.counter(count).bench(|| lora_fwd(&x, &a, &b, 1.0, &y).unwrap());
}

#[divan::bench(args = LORA)]
fn lora_backward(bencher: Bencher, (rows, inputs, outputs, rank): (usize, usize, usize, usize)) {
    let (x, dy) = (normal(&[rows, inputs]), normal(&[rows, outputs]));
    let (a, b) = (normal(&[rank, inputs]), normal(&[outputs, rank]));
    let count = bytes(rows * (2 * inputs + outputs));
    bencher.counter(count).bench(|| lora_bwd(&dy, &x, &a, &b, 1.0).unwrap());
}
