//! Is a gradient that came from elsewhere that of the scores? A derivative beside a difference of two scores.
//!
//! ```text
//! u = g / |g|,  D(h) = (s(x + h u) - s(x - h u)) / 2h,  D -> g . u = |g|  as h -> 0
//! ```
//!
//! A score is known to a resolution: its noise from one call to the next, its number format. Steps begin where the gradient promises
//! a difference well above that and grow until two of them agree; that is the score's derivative.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

/// How much of a pixel's range is left on both sides of the picture that is checked; the largest step of a pixel.
const MARGIN: f64 = 0.1;
/// Calls with the same picture.
const REPEATS: usize = 2;
/// How many resolutions large the first difference should be: so an error of one is 6% of it.
const ABOVE_NOISE: f64 = 16.0;
/// From a step to the next.
const GROWTH: f64 = 3.0;
/// The shortest step, as a share of the longest: the roundings of pixels in f32 are 1% of it.
const SHORTEST: f64 = 1e-4;
/// How far apart two derivatives may be, as a share of the larger.
const TOLERANCE: f64 = 0.1;

/// What the comparison says.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    Agrees,
    /// The gradient is zero, or not finite: that is for others to find.
    NothingToCheck,
    /// Says both numbers.
    Differs(String),
}

/// A picture in [0, 1] moved away from both ends, where steps would leave the range.
pub fn inside(picture: &Tensor) -> Result<Tensor> {
    Ok(picture.affine(1.0 - 2.0 * MARGIN, MARGIN)?)
}

/// Compares the gradient of a score at a picture that is [`inside`] with differences of scores along it.
///
/// # Errors
/// Those of `score`.
pub fn check(picture: &Tensor, at: f64, gradient: &Tensor, score: impl Fn(&Tensor) -> Result<f64>) -> Result<Verdict> {
    let values = gradient.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let norm = values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let largest = values.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    if norm == 0.0 || !norm.is_finite() || !at.is_finite() {
        return Ok(Verdict::NothingToCheck);
    }
    let direction = (gradient.to_dtype(DType::F64)? / norm)?;
    let longest = MARGIN * norm / largest; // no pixel moves further than the margin
    let mut again = vec![at];
    for _ in 0..REPEATS {
        again.push(score(picture)?);
    }
    let noise = again.iter().fold(f64::MIN, |a, b| a.max(*b)) - again.iter().fold(f64::MAX, |a, b| a.min(*b));
    let resolution = noise.max(resolution(&again));
    let first = (ABOVE_NOISE * resolution / (2.0 * norm)).max(SHORTEST * longest);
    if first * GROWTH > longest {
        return Ok(Verdict::Differs(format!(
            "a step along the gradient (of norm {norm:.3e}) should change the score by at most {:.3e}, which its noise of {resolution:.3e} \
             from one call to the next hides",
            2.0 * longest * norm
        )));
    }
    let (mut step, mut found): (f64, Vec<f64>) = (first, Vec::new());
    while step <= longest {
        let moved = |by: f64| -> Result<f64> {
            score(&(picture.to_dtype(DType::F64)? + (&direction * by)?)?.to_dtype(picture.dtype())?)
        };
        let derivative = (moved(step)? - moved(-step)?) / (2.0 * step);
        let agrees = |other: f64| (derivative - other).abs() <= TOLERANCE * derivative.abs().max(other.abs());
        if found.last().is_some_and(|before| agrees(*before)) {
            return Ok(match agrees(norm) {
                true => Verdict::Agrees,
                false => Verdict::Differs(format!(
                    "along the gradient the score changes by {derivative:.4e} per unit of length, by the gradient it should be {norm:.4e}"
                )),
            });
        }
        found.push(derivative);
        step *= GROWTH;
    }
    let found: Vec<String> = found.iter().map(|derivative| format!("{derivative:.3e}")).collect();
    Ok(Verdict::Differs(format!(
        "along the gradient the score changes by {} per unit of length in steps of growing size, which do not agree; by the gradient it \
         should be {norm:.4e}",
        found.join(", ")
    )))
}

/// What a score's number format cannot tell apart: scores of bf16 and f16 show by their digits; f32 adds up roundings.
fn resolution(scores: &[f64]) -> f64 {
    let largest = scores.iter().fold(0.0f64, |most, score| most.max(score.abs()));
    let all = |is: &dyn Fn(f64) -> bool| scores.iter().all(|score| is(*score));
    let digits = if all(&|score| bf16::from_f64(score).to_f64() == score) {
        8
    } else if all(&|score| f16::from_f64(score).to_f64() == score) {
        11
    } else {
        20
    };
    largest * f64::powi(2.0, -digits)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::ops::testing::Case;

    /// tanh of a weighted sum, and what it is computed in.
    fn score(weights: &Tensor, picture: &Tensor, round: impl Fn(f64) -> f64) -> f64 {
        let sum = (weights * picture.to_dtype(DType::F64).unwrap()).unwrap().sum_all().unwrap();
        round(sum.to_scalar::<f64>().unwrap().tanh())
    }

    fn verdict(factor: f64, round: impl Fn(f64) -> f64) -> Verdict {
        let weights = (Case::normal(&[1, 3, 8, 8], 1) * 0.02).unwrap();
        let picture = Case::normal(&[1, 3, 8, 8], 2).affine(0.1, 0.5).unwrap().clamp(0.0, 1.0).unwrap();
        let picture = inside(&picture.to_dtype(DType::F32).unwrap()).unwrap();
        let at = score(&weights, &picture, &round);
        let slope = 1.0 - score(&weights, &picture, |s| s).powi(2);
        let gradient = (&weights * (slope * factor)).unwrap().to_dtype(DType::F32).unwrap();
        check(&picture, at, &gradient, |picture| Ok(score(&weights, picture, &round))).unwrap()
    }

    #[test]
    fn a_right_gradient_agrees_in_every_number_format_and_under_noise() {
        assert_eq!(verdict(1.0, |s| s), Verdict::Agrees);
        assert_eq!(verdict(1.0, |s| f64::from(s as f32)), Verdict::Agrees);
        assert_eq!(verdict(1.0, |s| f16::from_f64(s).to_f64()), Verdict::Agrees);
        assert_eq!(verdict(1.0, |s| bf16::from_f64(s).to_f64()), Verdict::Agrees);
        let calls = Cell::new(0);
        let noisy = |s| {
            calls.set(calls.get() + 1);
            s + 1e-4 * [0.3, -0.9, 1.0][calls.get() % 3]
        };
        assert_eq!(verdict(1.0, noisy), Verdict::Agrees);
    }

    #[test]
    fn a_wrong_gradient_differs_and_both_numbers_are_said() {
        for factor in [-1.0, 0.5, 2.0, 0.8, 1.25, 127.5] {
            for format in [|s| s, |s: f64| f64::from(s as f32)] {
                let Verdict::Differs(how) = verdict(factor, format) else { panic!("{factor}") };
                assert!(how.contains("by the gradient it should be"), "{how}");
            }
        }
        assert!(matches!(verdict(-1.0, |s| bf16::from_f64(s).to_f64()), Verdict::Differs(_)));
        let Verdict::Differs(how) = verdict(1e-9, |s| s) else { panic!() };
        assert!(how.contains("hides"), "{how}");
    }

    #[test]
    fn a_gradient_of_zeros_says_nothing() {
        assert_eq!(verdict(0.0, |s| s), Verdict::NothingToCheck);
        assert_eq!(verdict(f64::NAN, |s| s), Verdict::NothingToCheck);
    }
}
