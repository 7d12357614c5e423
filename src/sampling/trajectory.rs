//! A denoising chain that was run.

use candle_core::Tensor;

use super::Recording;

/// The latents of a chain: what each step started from and predicted, and what the last one gave.
pub struct Trajectory<'a> {
    steps: Vec<Taken<'a>>,
    latents: Tensor,
}

/// One step of it.
struct Taken<'a> {
    input: Tensor,
    prediction: Tensor,
    recording: Option<Recording<'a>>,
}

impl<'a> Trajectory<'a> {
    /// A chain of no steps, at x_T (B, C, h, w).
    pub(super) fn at(x_t: Tensor) -> Self {
        Self { steps: Vec::new(), latents: x_t }
    }

    /// One more step, from the latents so far to `next`.
    pub(super) fn push(&mut self, prediction: Tensor, recording: Option<Recording<'a>>, next: Tensor) {
        let input = std::mem::replace(&mut self.latents, next);
        self.steps.push(Taken { input, prediction, recording });
    }

    /// Goes on with a chain that started from these latents.
    pub fn extend(&mut self, rest: Self) {
        self.steps.extend(rest.steps);
        self.latents = rest.latents;
    }

    /// x_t of step `i`, (B, C, h, w).
    pub fn input(&self, i: usize) -> &Tensor {
        &self.steps[i].input
    }

    /// x_{t-1} of step `i`, (B, C, h, w).
    pub fn output(&self, i: usize) -> &Tensor {
        self.steps.get(i + 1).map_or(&self.latents, |next| &next.input)
    }

    /// The guided prediction of step `i`, (B, C, h, w).
    pub fn prediction(&self, i: usize) -> &Tensor {
        &self.steps[i].prediction
    }

    /// x_0, or what the last step gave, (B, C, h, w).
    pub fn latents(&self) -> &Tensor {
        &self.latents
    }

    /// The recording of step `i`, if it was recorded and not taken before.
    pub fn take_recording(&mut self, i: usize) -> Option<Recording<'a>> {
        self.steps[i].recording.take()
    }
}
