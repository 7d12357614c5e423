//! Linear layers over frozen weights, and their low-rank adapters.
//!
//! ```text
//! y   = x Wᵀ + b               x (..., in)  W (out, in)  b (out)  y (..., out)
//! d_x = d_y W                  W and b are frozen: they get no gradient and cost none
//!
//! y  += s (x Aᵀ) Bᵀ            A (rank, in)  B (out, rank)       the adapter, s = alpha / rank
//! d_x += s (d_y B) A
//! d_A  = s (d_y B)ᵀ x
//! d_B  = s d_yᵀ (x Aᵀ)
//! ```

mod cpu;
#[cfg(feature = "cuda")]
mod cublaslt;
#[cfg(feature = "cuda")]
mod cuda;
mod thin;
#[cfg(target_arch = "x86_64")]
mod tiled;

use candle_core::{Result, Tensor, bail};

use super::frozen::Frozen;
use super::sum::add;
use super::{per_dtype, widened};

/// A frozen weight (out, in), stored for products in both directions.
#[derive(Clone, Debug)]
pub struct Weight {
    store: Store,
    outputs: usize,
    inputs: usize,
}

#[derive(Clone, Debug)]
enum Store {
    Host(Frozen),
    /// (out, in), on a GPU
    Device(Tensor),
}

impl Weight {
    /// From (out, in).
    pub fn new(weight: &Tensor) -> Result<Self> {
        let (outputs, inputs) = weight.dims2()?;
        let store = if weight.device().is_cpu() {
            Store::Host(Frozen::new(&widened(weight)?.reshape((outputs, 1, inputs))?)?)
        } else {
            Store::Device(weight.contiguous()?)
        };
        Ok(Self { store, outputs, inputs })
    }
    fn on_host(&self) -> Result<&Frozen> {
        match &self.store {
            Store::Host(frozen) => Ok(frozen),
            Store::Device(weight) => {
                bail!("a weight on {:?} with activations in host memory", weight.device().location())
            }
        }
    }
    pub fn in_features(&self) -> usize {
        self.inputs
    }
    pub fn out_features(&self) -> usize {
        self.outputs
    }
}

/// `x Wᵀ + b`: x (..., in), weight (out, in), bias (out) -> (..., out).
pub fn linear_fwd(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let (_, inputs) = rows_of(x)?;
    if weight.inputs != inputs {
        bail!("linear: {inputs} features for a weight of shape ({}, {})", weight.outputs, weight.inputs);
    }
    #[cfg(feature = "cuda")]
    if let Store::Device(weight) = &weight.store {
        return cublaslt::linear_fwd(x, weight, bias, None);
    }
    per_dtype!(x, linear_fwd_cpu(x, weight, bias))
}

/// What an adapter is to its layer: A (rank, in), B (out, rank), both f32.
#[derive(Clone, Copy)]
pub struct Adapter<'a> {
    pub a: &'a Tensor,
    pub b: &'a Tensor,
    pub scale: f64,
}

/// `residual + x Wᵀ + b + scale (x Aᵀ) Bᵀ`; the residual (..., out) and the adapter may be absent. On a GPU the product
/// starts from the residual, which is then not read and written once more.
pub fn adapted_fwd(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    adapter: Option<Adapter>,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let adapt = |y: Tensor| match adapter {
        Some(Adapter { a, b, scale }) => lora_fwd(x, a, b, scale, &y),
        None => Ok(y),
    };
    #[cfg(feature = "cuda")]
    if let (Store::Device(weight), Some(_)) = (&weight.store, residual) {
        return adapt(cublaslt::linear_fwd(x, weight, bias, residual)?);
    }
    let y = adapt(linear_fwd(x, weight, bias)?)?;
    match residual {
        Some(residual) => add(&y, residual),
        None => Ok(y),
    }
}

/// The gradient of the input: cotangent (..., out) -> (..., in).
pub fn linear_bwd(cotangent: &Tensor, weight: &Weight) -> Result<Tensor> {
    let (_, outputs) = rows_of(cotangent)?;
    if weight.outputs != outputs {
        bail!(
            "linear: a cotangent of {outputs} features for a weight of shape ({}, {})",
            weight.outputs,
            weight.inputs
        );
    }
    #[cfg(feature = "cuda")]
    if let Store::Device(weight) = &weight.store {
        return cublaslt::linear_bwd(cotangent, weight);
    }
    per_dtype!(cotangent, linear_bwd_cpu(cotangent, weight))
}

/// `y + scale (x Aᵀ) Bᵀ`, the adapter's part added to the frozen layer's output `y`.
pub fn lora_fwd(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64, y: &Tensor) -> Result<Tensor> {
    let ((_, inputs), (rank, a_in), (out, b_rank)) = (rows_of(x)?, a.dims2()?, b.dims2()?);
    if a_in != inputs || rank != b_rank || out != rows_of(y)?.1 {
        bail!("LoRA factors A {:?}, B {:?} on a layer {:?} -> {:?}", a.dims(), b.dims(), x.dims(), y.dims());
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::lora_fwd(x, a, b, scale, y);
    }
    per_dtype!(x, lora_fwd_cpu(x, a, b, scale, y))
}

/// Gradients of [`lora_fwd`] with respect to (x, A, B); the one of `y` is the cotangent itself.
pub fn lora_bwd(
    cotangent: &Tensor,
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<(Tensor, Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::lora_bwd(cotangent, x, a, b, scale);
    }
    let (dx, da, db) = per_dtype!(widened(x)?, lora_bwd_cpu(cotangent, x, a, b, scale))?;
    Ok((dx.to_dtype(x.dtype())?, da, db))
}

use cpu::{
    linear_bwd as linear_bwd_cpu, linear_fwd as linear_fwd_cpu, lora_bwd as lora_bwd_cpu, lora_fwd as lora_fwd_cpu,
};

/// (number of rows, features) of a tensor whose last axis is the features.
fn rows_of(x: &Tensor) -> Result<(usize, usize)> {
    let features = *x.dims().last().unwrap_or(&1);
    Ok((x.elem_count() / features.max(1), features))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check};

    #[test]
    fn linear_agrees_with_autograd_and_finite_differences() {
        for (rows, inputs, outputs) in [(1, 1, 1), (3, 5, 7), (33, 64, 17), (130, 40, 70)] {
            let weight = Case::normal(&[outputs, inputs], 1);
            let bias = Case::normal(&[outputs], 2);
            check(
                &[Case::normal(&[2, rows, inputs], 3)],
                |x| {
                    linear_fwd(
                        &x[0],
                        &Weight::new(&weight.to_dtype(x[0].dtype())?)?,
                        Some(&bias.to_dtype(x[0].dtype())?),
                    )
                },
                |x, dy| Ok(vec![linear_bwd(dy, &Weight::new(&weight.to_dtype(x[0].dtype())?)?)?]),
                |x| {
                    let weight = weight.to_dtype(x[0].dtype())?.t()?;
                    x[0].broadcast_matmul(&weight)?.broadcast_add(&bias.to_dtype(x[0].dtype())?)
                },
            );
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_gpu_agrees_with_the_cpu() {
        use crate::ops::testing::{gpu_tolerance, gpus, relative_error};
        for compute in gpus() {
            // rows, inputs and outputs that are no multiples of anything, and a view that starts in the middle
            for (rows, inputs, outputs) in [(1, 1, 1), (3, 5, 7), (77, 768, 320), (130, 40, 70), (4096, 320, 2560)] {
                let case = |dims: &[usize], seed| Case::normal(dims, seed).to_dtype(compute.dtype()).unwrap();
                let (weight, bias) = (case(&[outputs, inputs], 1), case(&[outputs], 2));
                let x = case(&[3, rows, inputs], 3).narrow(0, 1, 2).unwrap();
                let (dy, residual) = (case(&[2, rows, outputs], 4), case(&[2, rows, outputs], 5));
                let there = |t: &Tensor| t.to_device(compute.device()).unwrap();
                let (here, gpu) = (Weight::new(&weight).unwrap(), Weight::new(&there(&weight)).unwrap());
                let factor = |dims: &[usize], seed| Case::normal(dims, seed).to_dtype(candle_core::DType::F32).unwrap();
                let (a, b) = (factor(&[4, inputs], 6), factor(&[outputs, 4], 7));
                let onto = |there: &dyn Fn(&Tensor) -> Tensor, weight, bias: Option<&Tensor>| {
                    let (a, b, bias) = (&there(&a), &there(&b), bias.map(there));
                    let adapter = Adapter { a, b, scale: 0.5 };
                    adapted_fwd(&there(&x), weight, bias.as_ref(), Some(adapter), Some(&there(&residual)))
                };
                let pairs = [
                    (onto(&there, &gpu, Some(&bias)), onto(&Tensor::clone, &here, Some(&bias))),
                    (onto(&there, &gpu, None), onto(&Tensor::clone, &here, None)),
                    (linear_fwd(&there(&x), &gpu, Some(&there(&bias))), linear_fwd(&x, &here, Some(&bias))),
                    (linear_fwd(&there(&x), &gpu, None), linear_fwd(&x, &here, None)),
                    (linear_bwd(&there(&dy), &gpu), linear_bwd(&dy, &here)),
                ];
                for (found, expected) in pairs {
                    let found = found.unwrap().to_device(&candle_core::Device::Cpu).unwrap();
                    let error = relative_error(&found, &expected.unwrap());
                    assert!(error < gpu_tolerance(&compute), "{rows}x{inputs}x{outputs}, {compute:?}: {error}");
                }
            }
        }
    }

    #[test]
    fn an_adapted_layer_onto_a_residual_is_the_sum_of_its_parts() {
        let [weight, bias, x, a, b, residual] =
            [(&[7, 5][..], 1), (&[7], 2), (&[3, 5], 3), (&[2, 5], 4), (&[7, 2], 5), (&[3, 7], 6)]
                .map(|(dims, seed)| Case::normal(dims, seed));
        let held = Weight::new(&weight).unwrap();
        let run = |adapted: bool, onto: bool| {
            let adapter = adapted.then_some(Adapter { a: &a, b: &b, scale: 0.7 });
            adapted_fwd(&x, &held, Some(&bias), adapter, onto.then_some(&residual)).unwrap()
        };
        let plain = x.matmul(&weight.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
        let low = x.matmul(&a.t().unwrap()).unwrap().matmul(&b.t().unwrap()).unwrap();
        for (adapted, onto) in [(false, false), (false, true), (true, false), (true, true)] {
            let mut expected = plain.clone();
            if adapted {
                expected = (expected + (&low * 0.7).unwrap()).unwrap();
            }
            if onto {
                expected = (expected + &residual).unwrap();
            }
            let error = crate::ops::testing::relative_error(&run(adapted, onto), &expected);
            assert!(error < 1e-12, "{adapted} {onto} {error}");
        }
    }

    #[test]
    fn half_precision_is_f32_rounded() {
        let case = |dims: &[usize], seed| Case::normal(dims, seed).to_dtype(candle_core::DType::BF16).unwrap();
        let (weight, bias, x) = (case(&[7, 5], 1), case(&[7], 2), case(&[3, 5], 3));
        let wide = |t: &Tensor| t.to_dtype(candle_core::DType::F32).unwrap();
        let found = linear_fwd(&x, &Weight::new(&weight).unwrap(), Some(&bias)).unwrap();
        let expected = linear_fwd(&wide(&x), &Weight::new(&wide(&weight)).unwrap(), Some(&wide(&bias))).unwrap();
        let numbers = |t: &Tensor| wide(t).to_vec2::<f32>().unwrap();
        assert_eq!(numbers(&found), numbers(&expected.to_dtype(candle_core::DType::BF16).unwrap()));
        assert_ne!(numbers(&found), numbers(&expected));
    }

    #[test]
    fn lora_agrees_with_autograd_and_finite_differences() {
        for (rows, inputs, outputs, rank) in
            [(1, 3, 2, 1), (5, 7, 6, 2), (40, 16, 24, 4), (301, 37, 50, 6), (77, 80, 33, 14)]
        {
            let y = Case::normal(&[2, rows, outputs], 9);
            check(
                &[
                    Case::normal(&[2, rows, inputs], 1),
                    Case::normal(&[rank, inputs], 2),
                    Case::normal(&[outputs, rank], 3),
                ],
                |t| lora_fwd(&t[0], &t[1], &t[2], 0.7, &y.to_dtype(t[0].dtype())?),
                |t, dy| {
                    let (dx, da, db) = lora_bwd(dy, &t[0], &t[1], &t[2], 0.7)?;
                    Ok(vec![dx, da, db])
                },
                |t| {
                    let low = t[0].broadcast_matmul(&t[1].t()?)?;
                    low.broadcast_matmul(&t[2].t()?)?.affine(0.7, 0.0)?.add(&y.to_dtype(t[0].dtype())?)
                },
            );
        }
    }
}
