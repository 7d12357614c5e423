//! DDIM (Song et al. 2021) as diffusers' `DDIMScheduler` computes it, as coefficients of a linear step.
//!
//! ```text
//! x_0   = (x_t - sqrt(1 - a) ε) / sqrt(a)                      epsilon prediction, a = ᾱ_t, p = ᾱ_{t-1}
//! x_0   = sqrt(a) x_t - sqrt(1 - a) v,  ε = sqrt(a) v + sqrt(1 - a) x_t       v prediction
//! σ     = eta sqrt((1 - p) / (1 - a) (1 - a / p))
//! x_t-1 = sqrt(p) x_0 + sqrt(1 - p - σ²) ε + σ z
//!       = c_x x_t + c_out out + σ z                            out: what the UNet gives
//! ```

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::models::Source;

/// `scheduler/scheduler_config.json`, with the defaults of diffusers' DDIMScheduler. The config of another scheduler
/// (PNDM in the Stable Diffusion 1.x repositories) is read for what they share.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    pub num_train_timesteps: usize,
    pub beta_start: f64,
    pub beta_end: f64,
    pub beta_schedule: String,
    pub trained_betas: Option<Vec<f64>>,
    pub clip_sample: Option<bool>,
    pub thresholding: bool,
    pub set_alpha_to_one: bool,
    pub steps_offset: usize,
    pub prediction_type: String,
    /// Absent: the default of each scheduler's class.
    pub timestep_spacing: Option<String>,
    pub rescale_betas_zero_snr: bool,
    pub use_karras_sigmas: bool,
    /// `zero`, or `sigma_min`: the noise level that Euler and DPM-Solver end at.
    pub final_sigmas_type: String,
    /// Everything else, to refuse what would change the computation of a solver.
    #[serde(flatten)]
    pub rest: serde_json::Map<String, serde_json::Value>,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 1e-4,
            beta_end: 0.02,
            beta_schedule: "linear".into(),
            trained_betas: None,
            clip_sample: None,
            thresholding: false,
            set_alpha_to_one: true,
            steps_offset: 0,
            prediction_type: "epsilon".into(),
            timestep_spacing: None,
            rescale_betas_zero_snr: false,
            use_karras_sigmas: false,
            final_sigmas_type: "zero".into(),
            rest: serde_json::Map::new(),
        }
    }
}

impl SchedulerConfig {
    /// Stable Diffusion 1.x's own.
    pub fn stable_diffusion() -> Self {
        Self {
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: "scaled_linear".into(),
            clip_sample: Some(false),
            set_alpha_to_one: false,
            steps_offset: 1,
            ..Default::default()
        }
    }
}

/// What the UNet's output means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prediction {
    Epsilon,
    V,
    Sample,
}

/// One step of the chain: x_{t-1} = `sample` x_t + `model_output` out + `noise` z.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DdimStep {
    /// What the UNet is told; a whole number in DDIM's own schedule.
    pub timestep: f64,
    pub sample: f64,
    pub model_output: f64,
    /// σ, zero where eta is.
    pub noise: f64,
}

impl DdimStep {
    /// x_{t-1}; `noise` may be left out where σ is zero.
    pub fn apply(&self, x_t: &Tensor, model_output: &Tensor, noise: Option<&Tensor>) -> candle_core::Result<Tensor> {
        let x = self.mean(x_t, model_output)?;
        match noise {
            Some(noise) if self.noise != 0.0 => x + (noise * self.noise)?,
            None if self.noise != 0.0 => candle_core::bail!("a DDIM step with eta > 0 needs its noise"),
            _ => Ok(x),
        }
    }

    /// μ, x_{t-1} without its noise.
    pub fn mean(&self, x_t: &Tensor, model_output: &Tensor) -> candle_core::Result<Tensor> {
        (x_t * self.sample)? + (model_output * self.model_output)?
    }

    /// z = (x_{t-1} - μ) / σ, in f64: the noise that makes x_{t-1} of x_t. σ is not zero.
    pub fn noise_of(&self, x_t: &Tensor, model_output: &Tensor, x_next: &Tensor) -> candle_core::Result<Tensor> {
        let wide = |x: &Tensor| x.to_dtype(DType::F64);
        (wide(x_next)? - self.mean(&wide(x_t)?, &wide(model_output)?)?)? / self.noise
    }

    /// log N(x_{t-1}; μ, σ²) from that noise z (B, C, h, w): the mean over an image's elements, as DDPO's code has it, (B) in f64.
    pub fn log_prob(&self, z: &Tensor) -> candle_core::Result<Tensor> {
        let constant = self.noise.ln() + 0.5 * std::f64::consts::TAU.ln();
        z.sqr()?.flatten_from(1)?.mean(1)?.affine(-0.5, -constant)
    }
}

/// More would be a damaged file; each timestep takes memory.
const MAX_TRAIN_TIMESTEPS: usize = 1_000_000;

impl SchedulerConfig {
    /// Checks the keys that every sampler reads, and gives what the UNet's output means.
    ///
    /// # Errors
    /// More inference than training steps, thresholding, a prediction that is not known.
    pub(super) fn prediction(&self, num_inference_steps: usize) -> Result<Prediction> {
        let train = self.num_train_timesteps;
        if num_inference_steps == 0 || num_inference_steps > train {
            bail!("sampler.num_inference_steps = {num_inference_steps}: this scheduler has 1 to {train} steps");
        }
        if train > MAX_TRAIN_TIMESTEPS {
            bail!(
                "scheduler_config.json: num_train_timesteps = {train}: at most {MAX_TRAIN_TIMESTEPS}; Stable Diffusion has 1000"
            );
        }
        if self.thresholding {
            bail!("scheduler_config.json asks for thresholding, which latent diffusion does not use; set it to false");
        }
        match self.prediction_type.as_str() {
            "epsilon" => Ok(Prediction::Epsilon),
            "v_prediction" => Ok(Prediction::V),
            "sample" => Ok(Prediction::Sample),
            other => {
                bail!("scheduler_config.json: prediction_type `{other}` is not known (epsilon, v_prediction, sample)")
            }
        }
    }
}

/// A schedule of inference steps, from the noisiest on.
#[derive(Clone, Debug)]
pub struct DdimSchedule {
    prediction: Prediction,
    /// ᾱ of the training timesteps, rounded to f32 as PyTorch has them: 1 - ᾱ cancels near the end, and the rounding is
    /// part of what the model is sampled with.
    alphas_cumprod: Vec<f64>,
    /// Of each step: the timestep, and ᾱ of the next one.
    levels: Vec<(usize, f64)>,
    steps: Vec<DdimStep>,
}

impl DdimSchedule {
    /// The schedule of a pipeline.
    ///
    /// # Errors
    /// As [`Self::new`], and a scheduler for which DDIM cannot stand in.
    pub fn load(pipeline: &Source, num_inference_steps: usize, eta: f64) -> Result<Self> {
        let config = super::scheduler::load(pipeline)?;
        Self::new(&config, num_inference_steps, eta).with_context(|| format!("the scheduler of {}", pipeline.label()))
    }

    /// # Errors
    /// More inference than training steps, or a scheduler that samples differently (thresholding).
    pub fn new(config: &SchedulerConfig, num_inference_steps: usize, eta: f64) -> Result<Self> {
        let prediction = config.prediction(num_inference_steps)?;
        let train = config.num_train_timesteps;
        let alphas_cumprod = alphas_cumprod(config)?;
        let timesteps = ddim_timesteps(config, num_inference_steps)?;
        if prediction == Prediction::Epsilon && timesteps.iter().any(|t| alphas_cumprod[*t] < 1e-12) {
            bail!(
                "scheduler_config.json: rescale_betas_zero_snr leaves no signal at timestep {}, from which epsilon prediction cannot tell the image; it goes with v_prediction",
                timesteps[0]
            );
        }
        let last = if config.set_alpha_to_one { 1.0 } else { alphas_cumprod[0] };
        let stride = train / num_inference_steps;
        let next = |timestep: usize| timestep.checked_sub(stride).map_or(last, |previous| alphas_cumprod[previous]);
        let levels = timesteps.into_iter().map(|timestep| (timestep, next(timestep))).collect();
        Ok(Self { prediction, alphas_cumprod, levels, steps: Vec::new() }.with_eta(eta))
    }

    /// The same steps with another amount of noise, from 0 (DDIM) to 1 (DDPM).
    pub fn with_eta(self, eta: f64) -> Self {
        let of = |(timestep, next): &(usize, f64)| {
            step(self.prediction, *timestep as f64, self.alphas_cumprod[*timestep], *next, eta)
        };
        let steps = self.levels.iter().map(of).collect();
        Self { steps, ..self }
    }

    pub fn steps(&self) -> &[DdimStep] {
        &self.steps
    }
    pub fn len(&self) -> usize {
        self.steps.len()
    }
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Step `i` replaced by its prediction of x_0, where a chain may stop early.
    pub fn predicted_original(&self, i: usize) -> DdimStep {
        step(self.prediction, self.steps[i].timestep, self.alpha(i), 1.0, 0.0)
    }

    /// How many timesteps the model was trained on.
    pub fn train_timesteps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// Images x_0 (B, C, h, w), each noised to a timestep of its own, and what the UNet should predict there.
    ///
    /// ```text
    /// x_t = sqrt(ᾱ) x_0 + sqrt(1 - ᾱ) z        target: z, or v = sqrt(ᾱ) z - sqrt(1 - ᾱ) x_0, or x_0
    /// ```
    pub fn noised(&self, timesteps: &[usize], x_0: &Tensor, z: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        let of = |value: &dyn Fn(f64) -> f64| {
            let values: Vec<f32> = timesteps.iter().map(|t| value(self.alphas_cumprod[*t]) as f32).collect();
            Tensor::from_vec(values, (timesteps.len(), 1, 1, 1), x_0.device())
        };
        let (signal, spread) = (of(&|alpha| alpha.sqrt())?, of(&|alpha| (1.0 - alpha).sqrt())?);
        let x_t = (x_0.broadcast_mul(&signal)? + z.broadcast_mul(&spread)?)?;
        let target = match self.prediction {
            Prediction::Epsilon => z.clone(),
            Prediction::V => (z.broadcast_mul(&signal)? - x_0.broadcast_mul(&spread)?)?,
            Prediction::Sample => x_0.clone(),
        };
        Ok((x_t, target))
    }

    /// (factor of x_0, factor of the noise) that make x_t at step `i`: sqrt(ᾱ), sqrt(1 - ᾱ).
    pub fn add_noise(&self, i: usize) -> (f64, f64) {
        let alpha = self.alpha(i);
        (alpha.sqrt(), (1.0 - alpha).sqrt())
    }

    /// ᾱ at step `i`.
    fn alpha(&self, i: usize) -> f64 {
        self.alphas_cumprod[self.steps[i].timestep as usize]
    }
}

/// x_0 and ε as `[x_t, out]` coefficients at ᾱ = `a`.
pub(super) fn origin_and_noise(prediction: Prediction, a: f64) -> ([f64; 2], [f64; 2]) {
    let (signal, spread) = (a.sqrt(), (1.0 - a).sqrt());
    match prediction {
        Prediction::Epsilon => ([1.0 / signal, -spread / signal], [0.0, 1.0]),
        Prediction::V => ([signal, -spread], [spread, signal]),
        Prediction::Sample => ([0.0, 1.0], [1.0 / spread, -signal / spread]),
    }
}

/// The coefficients of one step from ᾱ = `a` to ᾱ = `p`.
pub(super) fn step(prediction: Prediction, timestep: f64, a: f64, p: f64, eta: f64) -> DdimStep {
    let sigma = if eta == 0.0 { 0.0 } else { eta * ((1.0 - p) / (1.0 - a) * (1.0 - a / p)).max(0.0).sqrt() };
    let direction = (1.0 - p - sigma * sigma).max(0.0).sqrt();
    let (x0, eps) = origin_and_noise(prediction, a);
    DdimStep {
        timestep,
        sample: p.sqrt() * x0[0] + direction * eps[0],
        model_output: p.sqrt() * x0[1] + direction * eps[1],
        noise: sigma,
    }
}

/// ᾱ of every training timestep, with PyTorch's roundings: f32 betas, a product accumulated in f64, f32 results.
pub(super) fn alphas_cumprod(config: &SchedulerConfig) -> Result<Vec<f64>> {
    let n = config.num_train_timesteps;
    let betas: Vec<f32> = match (&config.trained_betas, config.beta_schedule.as_str()) {
        (Some(betas), _) if betas.len() == n => betas.iter().map(|b| *b as f32).collect(),
        (Some(betas), _) => bail!("scheduler_config.json: {} trained_betas for {n} training timesteps", betas.len()),
        (None, "linear") => linspace(config.beta_start as f32, config.beta_end as f32, n),
        (None, "scaled_linear") => linspace(config.beta_start.sqrt() as f32, config.beta_end.sqrt() as f32, n)
            .into_iter()
            .map(|root| root * root)
            .collect(),
        (None, "squaredcos_cap_v2") => {
            let bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
            (0..n)
                .map(|i| (1.0 - bar((i + 1) as f64 / n as f64) / bar(i as f64 / n as f64)).min(0.999) as f32)
                .collect()
        }
        (None, other) => bail!(
            "scheduler_config.json: beta_schedule `{other}` is not known (linear, scaled_linear, squaredcos_cap_v2)"
        ),
    };
    let betas = if config.rescale_betas_zero_snr { zero_terminal_snr(&betas) } else { betas };
    let mut product = 1f64;
    let alphas: Vec<f64> = betas
        .iter()
        .map(|beta| {
            product *= f64::from(1.0 - beta);
            f64::from(product as f32)
        })
        .collect();
    Ok(alphas)
}

/// torch.linspace in f32: from both ends to the middle, multiplied and added with one rounding.
fn linspace(start: f32, end: f32, n: usize) -> Vec<f32> {
    let step = if n > 1 { (end - start) / (n - 1) as f32 } else { 0.0 };
    (0..n)
        .map(|i| if i < n / 2 { step.mul_add(i as f32, start) } else { (-step).mul_add((n - 1 - i) as f32, end) })
        .collect()
}

/// Lin et al. 2023, algorithm 1: shifts and scales sqrt(ᾱ) so that the last one is zero.
fn zero_terminal_snr(betas: &[f32]) -> Vec<f32> {
    let mut product = 1f64;
    let roots: Vec<f64> = betas
        .iter()
        .map(|beta| {
            product *= 1.0 - f64::from(*beta);
            product.sqrt()
        })
        .collect();
    let (Some(first), Some(last)) = (roots.first().copied(), roots.last().copied()) else { return Vec::new() };
    let bars: Vec<f64> = roots.iter().map(|root| ((root - last) * first / (first - last)).powi(2)).collect();
    (0..bars.len())
        .map(|i| 1.0 - if i == 0 { bars[0] } else { bars[i] / bars[i - 1] })
        .map(|beta| beta as f32)
        .collect()
}

pub(super) fn ddim_timesteps(config: &SchedulerConfig, n: usize) -> Result<Vec<usize>> {
    let train = config.num_train_timesteps;
    let steps: Vec<usize> = match config.timestep_spacing.as_deref().unwrap_or("leading") {
        "leading" => (0..n).rev().map(|i| i * (train / n) + config.steps_offset).collect(),
        "linspace" => {
            let last = (train - 1) as f64;
            // numpy's linspace and its rounding of halves to even
            (0..n)
                .rev()
                .map(|i| if n == 1 { 0 } else { (i as f64 * (last / (n - 1) as f64)).round_ties_even() as usize })
                .collect()
        }
        "trailing" => {
            // numpy's arange fills with (start + step) - start, and its length rounds up
            let (start, step) = (train as f64, -(train as f64 / n as f64));
            let delta = (start + step) - start;
            if (-start / step).ceil() as usize != n {
                bail!(
                    "{n} steps do not divide {train} timesteps evenly with timestep_spacing `trailing`; take another number of steps"
                );
            }
            (0..n).map(|i| (start + i as f64 * delta).round_ties_even() as usize - 1).collect()
        }
        other => bail!("scheduler_config.json: timestep_spacing `{other}` is not known (leading, trailing, linspace)"),
    };
    match steps.iter().find(|t| **t >= train) {
        Some(t) => bail!("timestep {t} of {train}: steps_offset {} does not fit {n} steps", config.steps_offset),
        None => Ok(steps),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stable_diffusion() -> SchedulerConfig {
        SchedulerConfig::stable_diffusion()
    }

    #[test]
    fn timesteps_are_diffusers() {
        let at = |spacing: &str, n| {
            ddim_timesteps(&SchedulerConfig { timestep_spacing: Some(spacing.into()), ..stable_diffusion() }, n)
                .unwrap()
        };
        assert_eq!(at("leading", 5), [801, 601, 401, 201, 1]);
        assert_eq!(at("leading", 7), [853, 711, 569, 427, 285, 143, 1]);
        assert_eq!(at("linspace", 10), [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]);
        assert_eq!(at("trailing", 6), [999, 832, 666, 499, 332, 166]);
        assert_eq!(at("trailing", 48)[..4], [999, 978, 957, 936]);
    }

    #[test]
    fn a_step_inverts_the_noising_of_a_known_image() {
        // with the true noise, x_{t-1} is the same image with the same noise at the next level
        for prediction in ["epsilon", "v_prediction", "sample"] {
            let config = SchedulerConfig { prediction_type: prediction.into(), ..stable_diffusion() };
            let schedule = DdimSchedule::new(&config, 10, 0.0).unwrap();
            let (x0, z) = (0.7, -1.3);
            for i in 0..9 {
                let (s, n) = schedule.add_noise(i);
                let x_t = s * x0 + n * z;
                let out = match prediction {
                    "epsilon" => z,
                    "v_prediction" => s * z - n * x0,
                    _ => x0,
                };
                let step = schedule.steps()[i];
                let (s, n) = schedule.add_noise(i + 1);
                assert!(
                    (step.sample * x_t + step.model_output * out - (s * x0 + n * z)).abs() < 1e-9,
                    "{prediction} step {i}"
                );
                let stop = schedule.predicted_original(i);
                assert!((stop.sample * x_t + stop.model_output * out - x0).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn a_noised_image_and_its_target_give_the_image_back() {
        for prediction_type in ["epsilon", "v_prediction", "sample"] {
            let config = SchedulerConfig { prediction_type: prediction_type.into(), ..stable_diffusion() };
            let schedule = DdimSchedule::new(&config, 10, 0.0).unwrap();
            let normal = |seed| crate::ops::testing::Case::normal(&[2, 4, 3, 5], seed).to_dtype(DType::F32).unwrap();
            let (x_0, z) = (normal(1), normal(2));
            let timesteps = [3, 7].map(|i| schedule.steps()[i].timestep as usize);
            let (x_t, target) = schedule.noised(&timesteps, &x_0, &z).unwrap();
            for (row, i) in [3, 7].into_iter().enumerate() {
                let row = |x: &Tensor| x.narrow(0, row, 1).unwrap();
                let back = schedule.predicted_original(i).mean(&row(&x_t), &row(&target)).unwrap();
                assert!(crate::ops::testing::relative_error(&back, &row(&x_0)) < 1e-4, "{prediction_type}");
            }
        }
    }

    #[test]
    fn the_density_of_a_step_is_that_of_its_noise() {
        let schedule = DdimSchedule::new(&stable_diffusion(), 10, 0.0).unwrap().with_eta(1.0);
        assert_eq!(schedule.steps(), DdimSchedule::new(&stable_diffusion(), 10, 1.0).unwrap().steps());
        let step = schedule.steps()[4];
        let normal = |seed: usize| crate::ops::testing::Case::normal(&[2, 4, 3, 5], seed as u64).to_dtype(DType::F64);
        let [x, out, z] = [1, 2, 3].map(|seed| normal(seed).unwrap());
        let next = step.apply(&x, &out, Some(&z)).unwrap();
        let found = step.noise_of(&x, &out, &next).unwrap();
        assert!(crate::ops::testing::relative_error(&found, &z) < 1e-12);
        let densities = step.log_prob(&found).unwrap().to_vec1::<f64>().unwrap();
        let rows = z.flatten_from(1).unwrap().to_vec2::<f64>().unwrap();
        for (density, row) in densities.iter().zip(rows) {
            let of = |z: &f64| ((-0.5 * z * z).exp() / (step.noise * std::f64::consts::TAU.sqrt())).ln();
            assert!((density - row.iter().map(of).sum::<f64>() / row.len() as f64).abs() < 1e-12);
        }
    }

    #[test]
    fn eta_one_keeps_the_variance() {
        let schedule = DdimSchedule::new(&stable_diffusion(), 10, 1.0).unwrap();
        for i in 0..9 {
            // a point mass at zero with noise of variance 1 - ᾱ keeps variance 1 - ᾱ of the next level
            let step = schedule.steps()[i];
            let ((_, now), (_, next)) = (schedule.add_noise(i), schedule.add_noise(i + 1));
            let coefficient = step.sample * now + step.model_output;
            assert!((coefficient * coefficient + step.noise * step.noise - next * next).abs() < 1e-9);
        }
    }

    #[test]
    fn what_would_change_the_chain_is_refused() {
        let refuse = |config: SchedulerConfig, n, part: &str| {
            let message = DdimSchedule::new(&config, n, 0.0).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        };
        refuse(SchedulerConfig { thresholding: true, ..stable_diffusion() }, 5, "thresholding");
        refuse(SchedulerConfig { timestep_spacing: Some("trailing".into()), ..stable_diffusion() }, 61, "61 steps");
        refuse(
            SchedulerConfig {
                rescale_betas_zero_snr: true,
                timestep_spacing: Some("trailing".into()),
                ..stable_diffusion()
            },
            5,
            "v_prediction",
        );
        refuse(SchedulerConfig { prediction_type: "flow".into(), ..stable_diffusion() }, 5, "`flow`");
        refuse(SchedulerConfig { timestep_spacing: Some("karras".into()), ..stable_diffusion() }, 5, "`karras`");
        refuse(stable_diffusion(), 1001, "1 to 1000");
    }

    #[test]
    fn zero_terminal_snr_ends_near_zero() {
        let config = SchedulerConfig {
            rescale_betas_zero_snr: true,
            timestep_spacing: Some("trailing".into()),
            prediction_type: "v_prediction".into(),
            ..stable_diffusion()
        };
        let schedule = DdimSchedule::new(&config, 4, 0.0).unwrap();
        assert!(schedule.add_noise(0).0 < 1e-3);
    }
}
