//! A denoising chain that was run.

use candle_core::Tensor;

use super::Recording;

/// The latents of a chain, with what each step predicted where it was run here.
pub struct Trajectory<'a> {
    /// From x_T on, one more than steps.
    latents: Vec<Tensor>,
    predictions: Vec<Tensor>,
    recordings: Vec<Option<Recording<'a>>>,
}

impl<'a> Trajectory<'a> {
    /// A chain of no steps, at x_T (B, C, h, w).
    pub(super) fn at(x_t: Tensor) -> Self {
        Self::of_latents(vec![x_t])
    }

    /// A chain that was run before, from x_T (B, C, h, w) on: at least one. What its steps predicted is not known any more.
    pub fn of_latents(latents: Vec<Tensor>) -> Self {
        Self { latents, predictions: Vec::new(), recordings: Vec::new() }
    }

    /// One more step, from the latents so far to `next`.
    pub(super) fn push(&mut self, prediction: Tensor, recording: Option<Recording<'a>>, next: Tensor) {
        self.latents.push(next);
        self.predictions.push(prediction);
        self.recordings.push(recording);
    }

    /// Goes on with a chain that started from these latents.
    pub fn extend(&mut self, rest: Self) {
        self.latents.extend(rest.latents.into_iter().skip(1));
        self.predictions.extend(rest.predictions);
        self.recordings.extend(rest.recordings);
    }

    /// x_t of step `i`, (B, C, h, w).
    pub fn input(&self, i: usize) -> &Tensor {
        &self.latents[i]
    }

    /// x_{t-1} of step `i`, (B, C, h, w).
    pub fn output(&self, i: usize) -> &Tensor {
        &self.latents[i + 1]
    }

    /// The guided prediction of step `i`, (B, C, h, w).
    pub fn prediction(&self, i: usize) -> &Tensor {
        &self.predictions[i]
    }

    /// x_0, or what the last step gave, (B, C, h, w).
    pub fn latents(&self) -> &Tensor {
        &self.latents[self.latents.len() - 1]
    }

    /// x_T, .., x_0.
    pub fn into_latents(self) -> Vec<Tensor> {
        self.latents
    }

    /// The recording of step `i`, if it was recorded and not taken before.
    pub fn take_recording(&mut self, i: usize) -> Option<Recording<'a>> {
        self.recordings.get_mut(i)?.take()
    }
}
