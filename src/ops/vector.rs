//! Elementwise mathematics that the compiler can vectorise.
//!
//! The standard library's `exp` and a scalar `erf` cost a call an element; attention and the gates of the feed-forward
//! are made of them. Here they are polynomials without branches, exact to one or two units in the last place of f32
//! (tested below); f64, which only tests use, takes the library's.

use super::Real;

/// Runs `kernel` compiled for the widest vectors that this CPU has.
///
/// The closure is `#[inline(always)]` where it is written, and its loops are `for`: a body that is left behind a call, as
/// `for_each` may leave its own, is compiled for the oldest CPU.
#[inline(always)]
pub(crate) fn vectorised<R>(kernel: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(kernel)
}

/// eˣ in f32: x = n ln 2 + r, eʳ by its minimax polynomial, 2ⁿ by the exponent's bits. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp_f32(x: f32) -> f32 {
    /// Adding it rounds to a whole number, which then lies in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_145_75; // the product with a small n is exact
    const LN2_LOW: f32 = 1.428_606_8e-6;
    // outside, eˣ is zero or infinite; comparisons that keep NaN
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 90.0 { 90.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let q =
        ((((1.989_299_2e-4 * r + 1.393_545_2e-3) * r + 8.333_309e-3) * r + 4.166_645e-2) * r + 0.166_666_67) * r + 0.5;
    let exp_r = 1.0 + (r + r * r * q);
    // 2ⁿ in two factors: n reaches beyond the exponents of normal numbers
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    exp_r * power(half) * power(n.wrapping_sub(half))
}

/// (Φ(x), φ(x)) of the standard normal distribution, with one exponential for both.
///
/// Φ(-|x|) = erfcx(a) e^{-a²} / 2 with a = |x| / sqrt 2 and erfcx(a) = e^{a²} erfc(a), a polynomial in t = 1 / (1 + 0.4 a)
/// times t, which is exact to 6e-9; so the tail keeps its relative precision.
#[inline(always)]
pub(crate) fn normal_f32(x: f32) -> (f32, f32) {
    let a = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.4 * a);
    let mut p = -0.025_867_076_f32;
    p = p * t + 0.122_182_94;
    p = p * t - 0.192_358_79;
    p = p * t + 0.079_602_11;
    p = p * t + 0.001_806_012_4;
    p = p * t + 0.057_313_52;
    p = p * t + 0.128_511_74;
    p = p * t + 0.169_563_17;
    p = p * t + 0.207_917;
    p = p * t + 0.225_652_81;
    p = p * t + 0.225_676_55;
    let e = exp_f32(-0.5 * x * x);
    let tail = 0.5 * p * t * e;
    (if x < 0.0 { tail } else { 1.0 - tail }, 0.398_942_3 * e)
}

/// σ(x).
#[inline(always)]
pub(crate) fn sigmoid<T: Real>(x: T) -> T {
    T::one() / (T::one() + (-x).exp_fast())
}

/// Sixteen partial sums, so that a sum fills a vector register and rounds less than one running sum.
pub(crate) const LANES: usize = 16;

/// The sum of all lanes, by halves.
#[inline(always)]
pub(crate) fn total<T: Real>(mut partial: [T; LANES]) -> T {
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            partial[lane] += partial[lane + width];
        }
    }
    partial[0]
}

/// The sum of f(i, x_i) over a slice.
#[inline(always)]
pub(crate) fn sum_of<T: Real>(x: &[T], f: impl Fn(usize, T) -> T) -> T {
    let mut partial = [T::zero(); LANES];
    let blocks = x.chunks_exact(LANES);
    let rest = blocks.remainder();
    let start = x.len() - rest.len();
    for (block, values) in blocks.enumerate() {
        for lane in 0..LANES {
            partial[lane] += f(block * LANES + lane, values[lane]);
        }
    }
    for (i, value) in rest.iter().enumerate() {
        partial[i] += f(start + i, *value);
    }
    total(partial)
}

/// The largest element; negative infinity for none.
#[inline(always)]
pub(crate) fn max_of<T: Real>(x: &[T]) -> T {
    let larger = |a: T, b: T| if a > b { a } else { b };
    let mut partial = [T::neg_infinity(); LANES];
    let blocks = x.chunks_exact(LANES);
    let rest = blocks.remainder();
    for values in blocks {
        for lane in 0..LANES {
            partial[lane] = larger(values[lane], partial[lane]);
        }
    }
    for (i, value) in rest.iter().enumerate() {
        partial[i] = larger(*value, partial[i]);
    }
    partial.into_iter().fold(T::neg_infinity(), larger)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units of the last place of the expected f32.
    fn ulps(found: f32, expected: f64) -> f64 {
        let expected_f32 = expected as f32;
        let unit = f64::from(f32::from_bits(expected_f32.abs().to_bits() + 1)) - f64::from(expected_f32.abs());
        (f64::from(found) - expected).abs() / unit
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let worst = (-87_000..88_000)
            .map(|i| i as f32 * 1e-3)
            .map(|x| ulps(exp_f32(x), f64::from(x).exp()))
            .fold(0.0, f64::max);
        assert!(worst < 2.0, "{worst}");
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(-1e9), 0.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(1e9), f32::INFINITY);
        assert!(exp_f32(f32::NAN).is_nan());
        // denormal results lose digits, not their size
        assert!((f64::from(exp_f32(-100.0)) / (-100f64).exp() - 1.0).abs() < 0.05);
    }

    #[test]
    fn the_normal_distribution_keeps_its_tail() {
        for i in -8000..8000 {
            let x = i as f32 * 1e-3;
            let (cdf, density) = normal_f32(x);
            let a = f64::from(x) * std::f64::consts::FRAC_1_SQRT_2;
            let expected = 0.5 * libm::erfc(-a);
            // e^{-x²/2} carries x² / 2 roundings of its argument
            let relative = 5e-7 + f64::from(x * x) * 0.5 * 6e-8;
            assert!((f64::from(cdf) / expected - 1.0).abs() < relative, "cdf at {x}: {cdf} and {expected}");
            let expected = (-a * a).exp() / (2.0 * std::f64::consts::PI).sqrt();
            assert!((f64::from(density) / expected - 1.0).abs() < relative, "density at {x}");
        }
        assert!(normal_f32(f32::NAN).0.is_nan());
        assert_eq!(normal_f32(-60.0).0, 0.0);
        assert_eq!(normal_f32(60.0).0, 1.0);
    }

    #[test]
    fn sums_and_maxima_cover_the_rest() {
        for n in [0, 1, 15, 16, 17, 100] {
            let x: Vec<f64> = (0..n).map(|i| f64::from(i) - 7.0).collect();
            assert_eq!(sum_of(&x, |i, x| x + i as f64), x.iter().sum::<f64>() + (0..n).map(f64::from).sum::<f64>());
            assert_eq!(max_of(&x), x.iter().copied().fold(f64::NEG_INFINITY, f64::max));
        }
    }
}
