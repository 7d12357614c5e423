//! The random numbers of the denoising chains of some samples.

use std::ops::Range;

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::diffusion::{Noise, Stream, place};
use crate::ops::device::upload;

/// Where the noise of some samples' chains comes from: x_T, and what each DDIM step with σ > 0 adds.
#[derive(Clone)]
pub struct ChainNoise {
    pub(super) noise: Noise,
    /// Of x_T, and of the steps' noise.
    pub(super) streams: [Stream; 2],
    /// The optimizer step; 0 for chains that belong to none.
    pub(super) step: u64,
    pub(super) samples: Range<u64>,
    /// (channels, h, w) of one sample's latents.
    pub(super) shape: (usize, usize, usize),
    pub(super) device: Device,
}

impl ChainNoise {
    /// x_T, (B, C, h, w).
    pub fn initial_latents(&self) -> Result<Tensor> {
        self.normal(self.streams[0], self.step)
    }

    /// x_T where every `group` samples in a row share the first one's, (B, C, h, w).
    pub fn shared_latents(&self, group: u64) -> Result<Tensor> {
        let of = |sample: u64| {
            let first = sample - sample % group;
            Self { samples: first..first + 1, ..self.clone() }.initial_latents()
        };
        Ok(Tensor::cat(&self.samples.clone().map(of).collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// z of denoising step `i`, (B, C, h, w).
    pub fn of_step(&self, i: usize) -> Result<Tensor> {
        self.normal(self.streams[1], place(self.step, i))
    }

    /// The noise of repetition `i` of the last step (DRaFT-LV), (B, C, h, w).
    pub fn of_repetition(&self, i: usize) -> Result<Tensor> {
        self.normal(Stream::Renoise, place(self.step, i))
    }

    fn normal(&self, stream: Stream, step: u64) -> Result<Tensor> {
        Ok(upload(&self.noise.normal_batch(stream, step, self.samples.clone(), self.shape)?, &self.device)?)
    }
}
