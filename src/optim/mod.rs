//! AdamW with its state in the open, gradient clipping, learning-rate schedules.

#[cfg(feature = "cuda")]
mod cuda;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};

use crate::config::{LrSchedule, OptimizerConfig};

/// AdamW (Loshchilov & Hutter 2019) in PyTorch's order of operations, f32.
///
/// ```text
/// p <- p (1 - lr λ)
/// m <- β1 m + (1 - β1) g          v <- β2 v + (1 - β2) g²
/// p <- p - lr / (1 - β1ᵗ) · m / (sqrt(v) / sqrt(1 - β2ᵗ) + eps)
/// ```
#[derive(Clone, Debug)]
pub struct AdamW {
    pub betas: [f64; 2],
    pub eps: f64,
    pub weight_decay: f64,
    /// Steps taken.
    pub step: u64,
    /// First and second moments, one pair a parameter, in the parameters' order.
    pub moments: Vec<(Tensor, Tensor)>,
}

impl AdamW {
    /// A fresh state for parameters of these shapes.
    pub fn new(config: &OptimizerConfig, parameters: &[Tensor]) -> Result<Self> {
        let moments = parameters.iter().map(|p| Ok((p.zeros_like()?, p.zeros_like()?))).collect::<Result<_>>()?;
        Ok(Self { betas: config.betas, eps: config.eps, weight_decay: config.weight_decay, step: 0, moments })
    }

    /// The parameters after one step.
    ///
    /// # Errors
    /// Another number of parameters or gradients than the state was made for, or another shape.
    pub fn update(&mut self, parameters: &[Tensor], gradients: &[Tensor], lr: f64) -> Result<Vec<Tensor>> {
        ensure!(
            parameters.len() == self.moments.len() && gradients.len() == parameters.len(),
            "AdamW: {} parameters, {} gradients, {} moments",
            parameters.len(),
            gradients.len(),
            self.moments.len()
        );
        self.step += 1;
        let [beta1, beta2] = self.betas;
        let t = self.step as f64;
        let factors = Factors {
            step_size: (lr / (1.0 - beta1.powf(t))) as f32,
            root: ((1.0 - beta2.powf(t)).sqrt()) as f32,
            decay: (1.0 - lr * self.weight_decay) as f32,
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            rest1: (1.0 - beta1) as f32,
            rest2: (1.0 - beta2) as f32,
            eps: self.eps as f32,
        };
        for (p, g) in parameters.iter().zip(gradients) {
            ensure!(
                p.dims() == g.dims(),
                "AdamW: a gradient of shape {:?} for a parameter of shape {:?}",
                g.dims(),
                p.dims()
            );
        }
        #[cfg(feature = "cuda")]
        if on_gpu(parameters) {
            let (first, second): (Vec<Tensor>, Vec<Tensor>) = self.moments.iter().cloned().unzip();
            let table = cuda::Table::new(&[parameters, gradients, &first, &second])?;
            let [updated, first, second] = table.adamw(&factors)?;
            self.moments = first.into_iter().zip(second).collect();
            return Ok(updated);
        }
        let Factors { decay, beta1: b1, beta2: b2, rest1, rest2, step_size, root, eps } = factors;
        let mut updated = Vec::with_capacity(parameters.len());
        for ((p, g), moments) in parameters.iter().zip(gradients).zip(&mut self.moments) {
            let (mut p_data, g_data) = (numbers(p)?, numbers(g)?);
            let (mut m, mut v) = (numbers(&moments.0)?, numbers(&moments.1)?);
            for (((p, g), m), v) in p_data.iter_mut().zip(&g_data).zip(&mut m).zip(&mut v) {
                *p *= decay;
                *m = b1 * *m + rest1 * g;
                *v = b2 * *v + rest2 * g * g;
                *p -= step_size * (*m / (v.sqrt() / root + eps));
            }
            *moments = (tensor(m, p)?, tensor(v, p)?);
            updated.push(tensor(p_data, p)?);
        }
        Ok(updated)
    }
}

/// The scalars of one step.
struct Factors {
    /// 1 - lr λ
    decay: f32,
    beta1: f32,
    beta2: f32,
    /// 1 - β1, 1 - β2
    rest1: f32,
    rest2: f32,
    /// lr / (1 - β1ᵗ)
    step_size: f32,
    /// sqrt(1 - β2ᵗ)
    root: f32,
    eps: f32,
}

#[cfg(feature = "cuda")]
fn on_gpu(tensors: &[Tensor]) -> bool {
    tensors.first().is_some_and(|tensor| tensor.device().is_cuda())
}

fn numbers(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.flatten_all()?.to_vec1::<f32>()?)
}

fn tensor(data: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from_vec(data, like.shape(), &Device::Cpu)?)
}

/// Elementwise sums of two lists of tensors; on a GPU in one launch.
///
/// # Errors
/// Lists of different lengths or shapes.
pub fn add_all(a: &[Tensor], b: &[Tensor]) -> Result<Vec<Tensor>> {
    ensure!(a.len() == b.len(), "adding {} tensors to {}", b.len(), a.len());
    #[cfg(feature = "cuda")]
    if on_gpu(a) {
        return Ok(cuda::Table::new(&[a, b])?.weighted_sum(1.0, 1.0)?);
    }
    a.iter().zip(b).map(|(a, b)| Ok((a + b)?)).collect()
}

/// The L2 norm of all gradients together, summed in f64: one f64 number, on their device. Does not wait for a GPU.
pub fn global_norm(gradients: &[Tensor]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if on_gpu(gradients) {
        return Ok(cuda::Table::new(&[gradients])?.norm()?);
    }
    let mut sum = 0f64;
    for gradient in gradients {
        sum += numbers(gradient)?.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
    }
    Ok(Tensor::new(&[sum.sqrt()], &Device::Cpu)?)
}

/// Scales the gradients down so that their global norm is at most `max_norm`; returns the norm before, as
/// [`global_norm`] does.
///
/// As `torch.nn.utils.clip_grad_norm_`: the factor is `max_norm / (norm + 1e-6)`, at most one.
pub fn clip_grad_norm(gradients: &mut [Tensor], max_norm: f64) -> Result<Tensor> {
    let norm = global_norm(gradients)?;
    #[cfg(feature = "cuda")]
    if on_gpu(gradients) {
        gradients.clone_from_slice(&cuda::Table::new(&[gradients])?.clipped(&norm, max_norm)?);
        return Ok(norm);
    }
    let factor = max_norm / (norm.to_vec1::<f64>()?[0] + 1e-6);
    if factor < 1.0 {
        for gradient in gradients {
            *gradient = (&*gradient * factor)?;
        }
    }
    Ok(norm)
}

/// An exponential moving average after one more step, f32: `decay average + (1 - decay) parameters`.
pub fn moving_average(average: &[Tensor], parameters: &[Tensor], decay: f64) -> Result<Vec<Tensor>> {
    #[cfg(feature = "cuda")]
    if on_gpu(average) {
        return Ok(cuda::Table::new(&[average, parameters])?.weighted_sum(decay, 1.0 - decay)?);
    }
    let (keep, rest) = (decay as f32, (1.0 - decay) as f32);
    let mixed = |(average, parameter): (&Tensor, &Tensor)| -> Result<Tensor> {
        let numbers = numbers(average)?.into_iter().zip(numbers(parameter)?);
        tensor(numbers.map(|(average, parameter)| keep * average + rest * parameter).collect(), parameter)
    };
    average.iter().zip(parameters).map(mixed).collect()
}

/// The learning rate of optimizer step `step` (from 0) of `total`.
pub fn learning_rate(config: &OptimizerConfig, step: usize, total: usize) -> f64 {
    let warmup = config.warmup_steps;
    if step < warmup {
        return config.lr * (step + 1) as f64 / warmup as f64;
    }
    let progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
    let factor = match config.lr_schedule {
        LrSchedule::Constant => 1.0,
        LrSchedule::Linear => 1.0 - progress,
        LrSchedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
    };
    config.lr * factor.max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    #[test]
    fn adamw_takes_the_steps_of_pytorch() {
        // torch.optim.AdamW([p], lr=0.1, weight_decay=0.1), p = [1, -2], g = [0.5, -0.25] then [0.1, 0.2]
        let config = OptimizerConfig::default();
        let p = vector(&[1.0, -2.0]);
        let mut optimizer = AdamW::new(&config, std::slice::from_ref(&p)).unwrap();
        let p = optimizer.update(&[p], &[vector(&[0.5, -0.25])], 0.1).unwrap();
        assert_close(&p[0], &[0.89, -1.88]);
        let p = optimizer.update(&p, &[vector(&[0.1, 0.2])], 0.1).unwrap();
        // m = [.055, -.0025], v = [2.5975e-4, 1.024375e-4]: m̂ = [.289474, -.013158], v̂ = [.129940, .051244]
        assert_close(&p[0], &[0.8811 - 0.1 * 0.289_473_7 / 0.360_471_9, -1.8612 + 0.1 * 0.013_157_9 / 0.226_371_1]);
    }

    fn assert_close(t: &Tensor, expected: &[f32]) {
        for (x, y) in t.to_vec1::<f32>().unwrap().iter().zip(expected) {
            assert!((x - y).abs() < 1e-5, "{x} and {y}");
        }
    }

    #[test]
    fn clipping_scales_all_gradients_by_one_factor() {
        let mut gradients = [vector(&[3.0]), vector(&[0.0, 4.0])];
        let clip = |gradients: &mut [Tensor], max_norm| {
            clip_grad_norm(gradients, max_norm).unwrap().to_vec1::<f64>().unwrap()[0]
        };
        assert_eq!(clip(&mut gradients, 1.0), 5.0);
        assert_close(&gradients[0], &[0.6]);
        assert_close(&gradients[1], &[0.0, 0.8]);
        assert!((clip(&mut gradients, f64::INFINITY) - 1.0).abs() < 1e-5);
        assert_close(&gradients[0], &[0.6]);
    }

    #[test]
    fn schedules_warm_up_and_end_at_zero() {
        let config = |lr_schedule| OptimizerConfig { lr: 2.0, warmup_steps: 4, lr_schedule, ..Default::default() };
        for schedule in [LrSchedule::Constant, LrSchedule::Linear, LrSchedule::Cosine] {
            let rates: Vec<f64> = (0..5).map(|i| learning_rate(&config(schedule), i, 12)).collect();
            assert_eq!(rates, [0.5, 1.0, 1.5, 2.0, 2.0]);
        }
        assert_eq!(learning_rate(&config(LrSchedule::Linear), 8, 12), 1.0);
        assert!((learning_rate(&config(LrSchedule::Cosine), 8, 12) - 1.0).abs() < 1e-12);
        assert!(learning_rate(&config(LrSchedule::Cosine), 12, 12).abs() < 1e-12);
        assert_eq!(learning_rate(&config(LrSchedule::Constant), 99, 12), 2.0);
    }
}
