//! A network that computes in a number format of its own, between f32 on both sides.
//!
//! ```text
//! y = f32(network(round(x)))        d_x = f32(pullback of round(d_y))
//! ```
//!
//! f16 has 5 bits of exponent: below 6e-5 it loses bits, below 6e-8 there is nothing, and a cotangent of a reward is as small
//! as the batch is large. A pullback is linear, so in f16 each row of d_y (an image) goes in with the same norm, and its own
//! norm comes back to d_x:
//!
//! ```text
//! n = ||d_y|| / 64        d_x = n f32(pullback of round(d_y / n))
//! ```
//!
//! So the gradient has the bits that f16 can hold whatever factors the loss has, and a loss scale is neither needed for it nor
//! seen by it. What is not finite in d_y or on the way is not finite in d_x.

use anyhow::Result;
use candle_core::{DType, Tensor};

use super::{Tape, Value};

/// The norm of a cotangent in f16. Of the two embedded towers one overflows at 2¹⁴ and not at 2¹²; ViT-L/14's shapes with random
/// weights lose bits at 1 and none from 2⁶ to 2¹⁶.
const NORM: f64 = 64.0;
/// Keeps a cotangent of zeros from being divided by its norm.
const LEAST: f64 = 1e-30;

/// `network` of x (B, ...), computed in `dtype`; x, the result (B, ...) and both cotangents are in x's format. The rows of the
/// first axis must not see each other.
///
/// # Errors
/// The network's.
pub fn computed_in(dtype: DType, x: &Value, network: impl FnOnce(&Value) -> Result<Value>) -> Result<Value> {
    let outside = x.tensor().dtype();
    if dtype == outside {
        return network(x);
    }
    let (tape, rounded) = (Tape::new(), x.tensor().to_dtype(dtype)?);
    let inside = if x.is_on_tape() { tape.leaf(&rounded) } else { rounded.into() };
    let output = network(&inside)?;
    let y = output.tensor().to_dtype(outside)?;
    Ok(Value::step([x], y, move |d| {
        let (d, norms) = if dtype == DType::F16 { sized(d)? } else { (d.clone(), None) };
        let d_x = tape.backward(&[(&output, &d.to_dtype(dtype)?)])?.take(&inside, "what goes into the network")?;
        let d_x = d_x.to_dtype(outside)?;
        Ok([Some(match norms {
            Some(norms) => rows(&d_x)?.broadcast_mul(&norms)?.reshape(d_x.shape())?,
            None => d_x,
        })])
    }))
}

/// The rows of a cotangent with norms of [`NORM`], and what they were divided by, (B, 1).
fn sized(d: &Tensor) -> candle_core::Result<(Tensor, Option<Tensor>)> {
    let flat = rows(d)?;
    let norms = flat.sqr()?.sum_keepdim(1)?.sqrt()?.affine(1.0 / NORM, LEAST)?;
    Ok((flat.broadcast_div(&norms)?.reshape(d.shape())?, Some(norms)))
}

/// (B, ...) as (B, n).
fn rows(x: &Tensor) -> candle_core::Result<Tensor> {
    x.reshape((x.dims()[0], ()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Linear;
    use crate::nn::layers::activation;
    use crate::ops::activation::Activation;
    use crate::ops::is_finite;
    use crate::ops::testing::{Case, relative_error};

    /// Two layers of 24 features in `dtype`, at (3, 24): the result and the gradient of x.
    fn forward_and_backward(dtype: DType, factor: f64, d: &Tensor) -> (Tensor, Tensor) {
        let weight = |seed| {
            let weight = (Case::normal(&[24, 24], seed) * (factor / 5.0)).unwrap();
            Linear::new(&weight.to_dtype(dtype).unwrap(), None).unwrap()
        };
        let (tape, x) = (Tape::new(), Case::normal(&[3, 24], 3).to_dtype(DType::F32).unwrap());
        let leaf = tape.leaf(&x);
        let network = |x: &Value| {
            assert_eq!(x.tensor().dtype(), dtype);
            Ok(weight(2).forward(&activation(&weight(1).forward(x)?, Activation::Gelu)?)?)
        };
        let y = computed_in(dtype, &leaf, network).unwrap();
        let y_of_a_constant = computed_in(dtype, &Value::constant(&x), network).unwrap();
        assert!(!y_of_a_constant.is_on_tape());
        assert_eq!(numbers(y_of_a_constant.tensor()), numbers(y.tensor()));
        let d_x = tape.backward(&[(&y, d)]).unwrap().take(&leaf, "x").unwrap();
        assert_eq!([y.tensor().dtype(), d_x.dtype()], [DType::F32; 2]);
        (y.into_tensor(), d_x)
    }

    fn cotangent(factor: f64) -> Tensor {
        (Case::normal(&[3, 24], 4) * factor).unwrap().to_dtype(DType::F32).unwrap()
    }

    fn numbers(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn half_precision_is_near_f32() {
        let (y, d_x) = forward_and_backward(DType::F32, 1.0, &cotangent(1.0));
        for (dtype, bound) in [(DType::BF16, 1e-2), (DType::F16, 1e-3)] {
            let (found, d_found) = forward_and_backward(dtype, 1.0, &cotangent(1.0));
            for (found, expected) in [(found, &y), (d_found, &d_x)] {
                let error = relative_error(&found, expected);
                assert!(error > bound / 100.0 && error < bound, "{dtype:?}: {error}");
            }
        }
    }

    #[test]
    fn a_cotangent_of_any_size_has_the_same_bits() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let (_, d_x) = forward_and_backward(dtype, 1.0, &cotangent(1.0));
            assert!(numbers(&d_x).iter().all(|x| x.abs() > 1e-6));
            for exponent in [-40, 20] {
                let (_, scaled) = forward_and_backward(dtype, 1.0, &cotangent(f64::powi(2.0, exponent)));
                assert_eq!(numbers(&(scaled * f64::powi(2.0, -exponent)).unwrap()), numbers(&d_x), "{dtype:?}");
            }
            // and each row has its own
            let rows = Tensor::new(&[[1f32], [1e-9], [0.0]], d_x.device()).unwrap();
            let (_, mixed) = forward_and_backward(dtype, 1.0, &cotangent(1.0).broadcast_mul(&rows).unwrap());
            let expected = d_x.broadcast_mul(&rows).unwrap();
            for row in 0..3 {
                let [found, expected] = [&mixed, &expected].map(|x| x.narrow(0, row, 1).unwrap());
                assert!(relative_error(&found, &expected) < 1e-2, "{dtype:?}, row {row}");
            }
            assert_eq!(numbers(&mixed)[48..], [0.0; 24], "{dtype:?}");
        }
    }

    #[test]
    fn what_overflows_is_not_hidden() {
        let (y, d_x) = forward_and_backward(DType::F16, 1.0, &cotangent(f64::INFINITY));
        assert!(is_finite(&y).unwrap() && !is_finite(&d_x).unwrap());
        // the squares of the cotangent overflow in f32
        assert!(!is_finite(&forward_and_backward(DType::F16, 1.0, &cotangent(1e25)).1).unwrap());
        // a network whose numbers are too large for f16
        let (y, d_x) = forward_and_backward(DType::F16, 1e3, &cotangent(1.0));
        assert!(!is_finite(&y).unwrap() && !is_finite(&d_x).unwrap());
        assert!(is_finite(&forward_and_backward(DType::BF16, 1e3, &cotangent(1.0)).1).unwrap());
    }
}
