//! One test body for every operation: finite differences in f64, and the same formula from candle's own operations
//! under its autograd in f64 and f32. (The third proof, against PyTorch, is `alignprop verify`.)

use candle_core::{DType, Device, Result, Tensor, Var};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};

pub(crate) struct Case;

impl Case {
    /// Standard normal numbers, f64.
    pub(crate) fn normal(shape: &[usize], seed: u64) -> Tensor {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let n = shape.iter().product();
        let data: Vec<f64> = (0..n).map(|_| StandardNormal.sample(&mut rng)).collect();
        Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
    }
}

fn numbers(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// ||x - y|| / ||y||
pub(crate) fn relative_error(x: &Tensor, y: &Tensor) -> f64 {
    assert_eq!(x.dims(), y.dims());
    let (x, y) = (numbers(x), numbers(y));
    let difference: f64 = x.iter().zip(&y).map(|(x, y)| (x - y) * (x - y)).sum();
    let norm: f64 = y.iter().map(|y| y * y).sum();
    (difference / norm.max(1e-300)).sqrt()
}

/// The GPU to compare with the CPU, in each number format; none, and a line that says why, where there is no GPU.
#[cfg(feature = "cuda")]
pub(crate) fn gpus() -> Vec<super::device::Compute> {
    use crate::config::Precision;
    let open = |precision| match super::device::Compute::open("cuda", Some(precision), false) {
        Ok(compute) => Some(compute),
        Err(error) => {
            eprintln!("not compared with a GPU: {error:#}");
            None
        }
    };
    [Precision::F32, Precision::Bf16, Precision::F16].into_iter().map_while(open).collect()
}

/// How far a GPU's result may be from that of the CPU, which rounds to the same format: the order of sums in f32, one
/// rounding to the other side in a half format.
#[cfg(feature = "cuda")]
pub(crate) fn gpu_tolerance(compute: &super::device::Compute) -> f64 {
    match compute.dtype() {
        DType::F32 => 2e-5,
        DType::BF16 => 8e-3,
        _ => 1e-3,
    }
}

type Forward<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Checks `forward` and `backward` (inputs, cotangent -> gradient of every input) against finite differences and
/// against `composed`, the same function made of candle operations that its autograd differentiates.
pub(crate) fn check(
    inputs: &[Tensor],
    forward: impl Fn(&[Tensor]) -> Result<Tensor>,
    backward: impl Fn(&[Tensor], &Tensor) -> Result<Vec<Tensor>>,
    composed: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let y = forward(inputs).unwrap();
    let cotangent = Case::normal(y.dims(), 1234);
    let gradients = backward(inputs, &cotangent).unwrap();
    assert_eq!(gradients.len(), inputs.len());

    for (dtype, bound) in [(DType::F64, 1e-10), (DType::F32, 5e-6)] {
        // f32: some tens of roundings of 6e-8 each; the expected numbers are those of the rounded inputs in f64
        let cast: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(dtype).unwrap()).collect();
        let cotangent = cotangent.to_dtype(dtype).unwrap();
        let (expected, d_expected) = autograd(&cast, &cotangent, &composed);
        let y = forward(&cast).unwrap();
        assert!(y.is_contiguous(), "outputs are contiguous");
        let error = relative_error(&y, &expected);
        assert!(error < bound, "forward in {dtype:?}: relative error {error:.2e}");
        let gradients = backward(&cast, &cotangent).unwrap();
        for (i, (d, expected)) in gradients.iter().zip(&d_expected).enumerate() {
            assert_eq!(d.dtype(), dtype);
            let error = relative_error(d, expected);
            assert!(error < bound, "gradient of input {i} in {dtype:?}: relative error {error:.2e}");
        }
    }
    for (i, gradient) in gradients.iter().enumerate() {
        finite_differences(inputs, i, &forward, &cotangent, gradient);
    }
}

/// The value and the gradients by candle's autograd, in f64.
fn autograd(inputs: &[Tensor], cotangent: &Tensor, composed: Forward) -> (Tensor, Vec<Tensor>) {
    let double = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(&double(t)).unwrap()).collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = composed(&tracked).unwrap();
    let mut grads = (&y * double(cotangent)).unwrap().sum_all().unwrap().backward().unwrap();
    (y.detach(), vars.iter().map(|v| grads.remove(v).unwrap()).collect())
}

/// Central differences along random directions: (f(x + h v) - f(x - h v)) / 2h = <d_x, v>.
fn finite_differences(inputs: &[Tensor], which: usize, forward: Forward, cotangent: &Tensor, gradient: &Tensor) {
    let h = 1e-5;
    let loss = |x: Tensor| {
        let mut moved = inputs.to_vec();
        moved[which] = x;
        numbers(&(forward(&moved).unwrap() * cotangent).unwrap()).iter().sum::<f64>()
    };
    for direction in 0..4 {
        let v = Case::normal(inputs[which].dims(), 77 + direction);
        let step = (&v * h).unwrap();
        let numeric = (loss((&inputs[which] + &step).unwrap()) - loss((&inputs[which] - &step).unwrap())) / (2.0 * h);
        let products = numbers(&(gradient * &v).unwrap());
        let analytic: f64 = products.iter().sum();
        // the scale of rounding is that of the terms, not of their sum
        let scale = products.iter().map(|p| p * p).sum::<f64>().sqrt().max(1e-6);
        let error = (numeric - analytic).abs() / scale;
        assert!(
            error < 1e-5,
            "input {which}: finite difference {numeric:.9}, gradient {analytic:.9} (error {error:.1e})"
        );
    }
}

/// x Φ(x) of candle's operations.
pub(crate) fn gelu(x: &Tensor) -> Result<Tensor> {
    x * (x.affine(std::f64::consts::FRAC_1_SQRT_2, 0.0)?.erf()? + 1.0)?.affine(0.5, 0.0)?
}
