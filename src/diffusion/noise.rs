//! Counted randomness: every number is a function of (seed, stream, step, sample), never of what was drawn before.
//!
//! So a resumed run, and a run with another micro-batch, sees the same noise, prompts and truncation.

use candle_core::{Device, Result, Tensor};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rand_distr::{Distribution, StandardNormal};

/// What the numbers are for. The discriminants are part of the file format of a run: do not renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    LoraInit = 1,
    Prompts = 2,
    /// The start of the chain, x_T.
    Latents = 3,
    /// The noise of each DDIM step with eta > 0.
    Variance = 4,
    Truncation = 5,
    /// The noise of DRaFT-LV's repeated last steps.
    Renoise = 6,
    /// The fixed latents of sample grids and evaluation.
    Evaluation = 7,
    /// The noise of each DDIM step with eta > 0 of those.
    EvaluationVariance = 8,
    /// The fixed latents of the guard's evaluations: other pictures than those that `eval` judges.
    Guard = 9,
    /// The noise of each DDIM step with eta > 0 of those.
    GuardVariance = 10,
    /// The order of a round's images in training, and their steps (DDPO).
    Shuffle = 11,
    /// Where regression on finished images noises them to (RWR), and with what.
    RegressionTimestep = 12,
    RegressionNoise = 13,
}

/// One number for (optimizer step, place within it); a chain has fewer than 2¹⁶ steps. Part of the file format of a run.
pub fn place(step: u64, within: usize) -> u64 {
    step << 16 | within as u64
}

/// The source of all randomness of a run.
#[derive(Clone, Copy, Debug)]
pub struct Noise {
    pub seed: u64,
}

impl Noise {
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// A generator of its own for (stream, step, sample).
    pub fn generator(&self, stream: Stream, step: u64, sample: u64) -> ChaCha12Rng {
        let mut key = [0u8; 32];
        for (slot, word) in key.chunks_mut(8).zip([self.seed, stream as u64, step, sample]) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        ChaCha12Rng::from_seed(key)
    }

    /// `n` standard normal numbers.
    pub fn normal(&self, stream: Stream, step: u64, sample: u64, n: usize) -> Vec<f32> {
        let mut rng = self.generator(stream, step, sample);
        (0..n).map(|_| StandardNormal.sample(&mut rng)).collect()
    }

    /// Standard normal tensors of `shape` for several samples, stacked in front: (samples, ...shape).
    pub fn normal_batch(
        &self,
        stream: Stream,
        step: u64,
        samples: std::ops::Range<u64>,
        shape: (usize, usize, usize),
    ) -> Result<Tensor> {
        let (c, h, w) = shape;
        let count = samples.end.saturating_sub(samples.start) as usize;
        let data: Vec<f32> = samples.flat_map(|sample| self.normal(stream, step, sample, c * h * w)).collect();
        Tensor::from_vec(data, (count, c, h, w), &Device::Cpu)
    }

    /// A number in 0..n.
    pub fn below(&self, stream: Stream, step: u64, sample: u64, n: usize) -> usize {
        below(&mut self.generator(stream, step, sample), n)
    }
}

/// A number in 0..n, n > 0, from a generator; the bias of n / 2⁶⁴ does not matter.
pub fn below(rng: &mut impl Rng, n: usize) -> usize {
    ((u128::from(rng.next_u64()) * n as u128) >> 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_the_same_noise_in_any_batch() {
        let noise = Noise::new(3);
        let whole = noise.normal_batch(Stream::Latents, 5, 0..4, (2, 3, 1)).unwrap();
        let part = noise.normal_batch(Stream::Latents, 5, 2..4, (2, 3, 1)).unwrap();
        let expected = whole.narrow(0, 2, 2).unwrap();
        assert_eq!(
            part.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            expected.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        );
    }

    #[test]
    fn streams_steps_samples_and_seeds_differ() {
        let draw = |seed, stream, step, sample| Noise::new(seed).normal(stream, step, sample, 2);
        let all = [
            draw(0, Stream::Latents, 0, 0),
            draw(1, Stream::Latents, 0, 0),
            draw(0, Stream::Variance, 0, 0),
            draw(0, Stream::Latents, 1, 0),
            draw(0, Stream::Latents, 0, 1),
        ];
        for (i, x) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|y| y != x));
        }
    }

    #[test]
    fn the_numbers_are_standard_normal() {
        let x = Noise::new(1).normal(Stream::Latents, 0, 0, 100_000);
        let mean = x.iter().sum::<f32>() / 1e5;
        let var = x.iter().map(|v| v * v).sum::<f32>() / 1e5;
        assert!(mean.abs() < 0.02 && (var - 1.0).abs() < 0.02, "mean {mean}, variance {var}");
    }

    #[test]
    fn the_numbers_do_not_change_between_versions() {
        // a run's resume depends on them
        assert_eq!(Noise::new(7).below(Stream::Prompts, 1, 2, 1_000_000), 867_288);
    }
}
