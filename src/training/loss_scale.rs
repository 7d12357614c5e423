//! Gradients through f16: the loss is scaled up so that small cotangents are not rounded to zero on their way.
//!
//! f16 has 5 bits of exponent: below 6e-8 there is nothing. The scale multiplies the loss's gradient where the reward
//! gives it, and divides the adapters' gradients (f32) at the end of a micro-batch. (The tower of a reward has a scale of its own within:
//! `nn/precision.rs`.) A scale that makes something overflow is halved, and the backward pass of that micro-batch is done again:
//! the chain does not depend on it and is kept, so nothing is lost but the time. After `GROWTH_INTERVAL` steps without overflow the scale is
//! doubled (Micikevicius et al. 2018; PyTorch's `GradScaler`).

use candle_core::DType;
use serde::{Deserialize, Serialize};

const START: f64 = 65536.0;
const LEAST: f64 = 1.0;
const MOST: f64 = 16_777_216.0;
/// PyTorch waits for 2000 steps, and loses a step with every overflow; here a step is longer and not lost.
const GROWTH_INTERVAL: u32 = 200;

/// A dynamic loss scale, for activations in f16.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct LossScale {
    /// A power of two, so that it changes no bit of a mantissa.
    scale: f64,
    /// Steps without overflow since the scale last changed.
    good_steps: u32,
}

impl LossScale {
    /// The scale to start with, if activations of `dtype` need one.
    pub fn new(dtype: DType) -> Option<Self> {
        (dtype == DType::F16).then_some(Self { scale: START, good_steps: 0 })
    }

    /// With this scale, a power of two.
    #[cfg(test)]
    pub(super) fn starting_at(scale: f64) -> Self {
        Self { scale, good_steps: 0 }
    }

    pub fn get(&self) -> f64 {
        self.scale
    }

    /// After a step whose numbers were finite.
    pub fn grow(&mut self) {
        self.good_steps += 1;
        if self.good_steps >= GROWTH_INTERVAL {
            *self = Self { scale: (self.scale * 2.0).min(MOST), good_steps: 0 };
        }
    }

    /// The scale to do a step again with that met a number which was not finite; `None` where a smaller one cannot help.
    pub fn smaller(&self) -> Option<Self> {
        (self.scale > LEAST).then_some(Self { scale: self.scale / 2.0, good_steps: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_f16_is_scaled() {
        let start = |dtype| LossScale::new(dtype).map(|scale| scale.get());
        assert_eq!([DType::F32, DType::BF16, DType::F16].map(start), [None, None, Some(65536.0)]);
    }

    #[test]
    fn it_falls_at_an_overflow_and_grows_back() {
        let mut scale = LossScale::new(DType::F16).unwrap().smaller().unwrap();
        assert_eq!(scale.get(), 32768.0);
        (0..GROWTH_INTERVAL - 1).for_each(|_| scale.grow());
        assert_eq!(scale.get(), 32768.0);
        scale.grow();
        assert_eq!(scale.get(), 65536.0);
        let mut falls = 0;
        while let Some(smaller) = scale.smaller() {
            (scale, falls) = (smaller, falls + 1);
        }
        assert_eq!((falls, scale.get()), (16, 1.0));
    }
}
