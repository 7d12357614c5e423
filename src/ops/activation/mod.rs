//! Elementwise functions and their derivatives.
//!
//! ```text
//! silu        x σ(x)                      σ (1 + x (1 - σ))
//! gelu        x Φ(x), the exact one       Φ(x) + x φ(x)
//! quick_gelu  x σ(1.702 x)                σ (1 + 1.702 x (1 - σ))     OpenAI's CLIP
//! gelu_tanh   x σ(2 u), u = sqrt(2/π) (x + 0.044715 x³)       σ + x σ (1 - σ) 2 u'      SigLIP; x (1 + tanh u) / 2
//! unit_range  clamp(x / 2 + 1/2, 0, 1)    1/2 inside [-1, 1], else 0   image in [-1, 1] to [0, 1]
//! ```

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::vector::{sigmoid, vectorised};
use super::{Host, Real, buffer, per_dtype, tensor_from};

/// An elementwise function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    Identity,
    Relu,
    Silu,
    Gelu,
    QuickGelu,
    Tanh,
    Sigmoid,
    /// Transformers' `gelu_pytorch_tanh`.
    GeluTanh,
    /// An image in [-1, 1] to [0, 1], clamped.
    #[serde(skip)]
    UnitRange,
}

impl Activation {
    /// As configuration files spell them (`hidden_act` of transformers, `act_fn` of diffusers).
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "identity" | "linear" => Self::Identity,
            "relu" => Self::Relu,
            "silu" | "swish" => Self::Silu,
            "gelu" => Self::Gelu,
            "quick_gelu" => Self::QuickGelu,
            "tanh" => Self::Tanh,
            "sigmoid" => Self::Sigmoid,
            "gelu_pytorch_tanh" | "gelu_new" | "gelu_tanh" => Self::GeluTanh,
            _ => return None,
        })
    }

    #[inline(always)]
    fn value<T: Real>(self, x: T) -> T {
        let one = T::one();
        match self {
            Self::Identity => x,
            // written so that NaN stays NaN, here and in the last one
            Self::Relu => {
                if x <= T::zero() {
                    T::zero()
                } else {
                    x
                }
            }
            Self::Silu => x * sigmoid(x),
            Self::Gelu => x * x.normal().0,
            Self::QuickGelu => x * sigmoid(T::lit(1.702) * x),
            Self::Tanh => x.tanh(),
            Self::Sigmoid => sigmoid(x),
            Self::GeluTanh => x * sigmoid(twice_u(x).0),
            Self::UnitRange => match x * T::lit(0.5) + T::lit(0.5) {
                y if y < T::zero() => T::zero(),
                y if y > one => one,
                y => y,
            },
        }
    }

    #[inline(always)]
    fn derivative<T: Real>(self, x: T) -> T {
        let (zero, one) = (T::zero(), T::one());
        match self {
            Self::Identity => one,
            Self::Relu => {
                if x > zero {
                    one
                } else {
                    zero
                }
            }
            Self::Silu => {
                let s = sigmoid(x);
                s * (one + x * (one - s))
            }
            Self::Gelu => {
                let (cdf, density) = x.normal();
                cdf + x * density
            }
            Self::QuickGelu => {
                let k = T::lit(1.702);
                let s = sigmoid(k * x);
                s * (one + k * x * (one - s))
            }
            Self::Tanh => one - x.tanh() * x.tanh(),
            Self::Sigmoid => sigmoid(x) * (one - sigmoid(x)),
            Self::GeluTanh => {
                let (u, d_u) = twice_u(x);
                let s = sigmoid(u);
                s + x * s * (one - s) * d_u
            }
            // the borders count as inside, as in torch.clamp
            Self::UnitRange => {
                if x < -one || x > one {
                    zero
                } else {
                    T::lit(0.5)
                }
            }
        }
    }
}

/// 2 u of the gelu by tanh, and its derivative.
#[inline(always)]
fn twice_u<T: Real>(x: T) -> (T, T) {
    let (k, c) = (T::lit(2.0 * 0.797_884_560_802_865_4), T::lit(0.044_715)); // sqrt(2/π)
    (k * x * (T::one() + c * x * x), k * (T::one() + T::lit(3.0) * c * x * x))
}

/// f(x), elementwise.
pub fn activation_fwd(x: &Tensor, function: Activation) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::activation_fwd(x, function);
    }
    per_dtype!(x, activation_fwd_cpu(x, function))
}

/// cotangent · f'(x).
pub fn activation_bwd(cotangent: &Tensor, x: &Tensor, function: Activation) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::activation_bwd(cotangent, x, function);
    }
    per_dtype!(x, activation_bwd_cpu(cotangent, x, function))
}

const BLOCK: usize = 1 << 14;

/// Runs `$body` with the constant `$F` equal to `$function`, so that each function gets a loop of its own. (A variable
/// with the same value, captured by a closure, leaves the choice inside the loop, which is then not vectorised.)
macro_rules! each_activation {
    ($function:expr, $F:ident => $body:block) => {
        each_activation!(@ $function, $F, $body,
            Identity Relu Silu Gelu QuickGelu Tanh Sigmoid GeluTanh UnitRange)
    };
    (@ $function:expr, $F:ident, $body:block, $($name:ident)*) => {
        match $function {
            $(Activation::$name => { const $F: Activation = Activation::$name; $body })*
        }
    };
}

fn activation_fwd_cpu<T: Real>(x: &Tensor, function: Activation) -> Result<Tensor> {
    let data = Host::<T>::read(x)?;
    let mut y = buffer(data.len());
    y.par_chunks_mut(BLOCK).zip(data.par_chunks(BLOCK)).for_each(|(y, x)| {
        each_activation!(function, F => {
            vectorised(#[inline(always)] || {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = F.value(*x);
                }
            });
        });
    });
    tensor_from(y, x.dims())
}

fn activation_bwd_cpu<T: Real>(cotangent: &Tensor, x: &Tensor, function: Activation) -> Result<Tensor> {
    let (dy, data) = (Host::<T>::read(cotangent)?, Host::<T>::read(x)?);
    let mut dx = buffer(data.len());
    dx.par_chunks_mut(BLOCK).zip(data.par_chunks(BLOCK)).zip(dy.par_chunks(BLOCK)).for_each(|((dx, x), dy)| {
        each_activation!(function, F => {
            vectorised(#[inline(always)] || {
                for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
                    *dx = *dy * F.derivative(*x);
                }
            });
        });
    });
    tensor_from(dx, x.dims())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check};

    #[test]
    fn agree_with_autograd_and_finite_differences() {
        type Composed = fn(&Tensor) -> Result<Tensor>;
        let functions: [(Activation, Composed); 9] = [
            (Activation::Identity, |x| x.affine(1.0, 0.0)),
            (Activation::Relu, |x| x.relu()),
            (Activation::Silu, |x| x.silu()),
            // candle's own gelu_erf has a constant of six digits in its backward
            (Activation::Gelu, crate::ops::testing::gelu),
            (Activation::QuickGelu, |x| x * (x.affine(-1.702, 0.0)?.exp()? + 1.0)?.recip()?),
            (Activation::Tanh, |x| x.tanh()),
            (Activation::Sigmoid, |x| (x.neg()?.exp()? + 1.0)?.recip()),
            (Activation::GeluTanh, |x| {
                let u = (x + (x.powf(3.0)? * 0.044_715)?)?.affine((2.0 / std::f64::consts::PI).sqrt(), 0.0)?;
                x * u.tanh()?.affine(0.5, 0.5)?
            }),
            (Activation::UnitRange, |x| x.affine(0.5, 0.5)?.clamp(0.0, 1.0)),
        ];
        for (function, composed) in functions {
            check(
                &[Case::normal(&[3, 77], 1)],
                |x| activation_fwd(&x[0], function),
                |x, dy| Ok(vec![activation_bwd(dy, &x[0], function)?]),
                |x| composed(&x[0]),
            );
        }
    }

    #[test]
    fn large_arguments_stay_finite() {
        let x = Tensor::new(&[-200f32, -90.0, 90.0, 200.0], &candle_core::Device::Cpu).unwrap();
        for function in
            [Activation::Silu, Activation::Gelu, Activation::QuickGelu, Activation::Sigmoid, Activation::GeluTanh]
        {
            for t in
                [activation_fwd(&x, function).unwrap(), activation_bwd(&x.ones_like().unwrap(), &x, function).unwrap()]
            {
                assert!(t.to_vec1::<f32>().unwrap().iter().all(|v| v.is_finite()), "{function:?}");
            }
        }
    }

    #[test]
    fn the_borders_of_the_unit_range_pass_their_gradient() {
        let x = Tensor::new(&[-1f32, 1.0, -1.001, 1.001], &candle_core::Device::Cpu).unwrap();
        let d = activation_bwd(&x.ones_like().unwrap(), &x, Activation::UnitRange).unwrap();
        assert_eq!(d.to_vec1::<f32>().unwrap(), [0.5, 0.5, 0.0, 0.0]);
    }
}
