//! The samplers that people draw with, forward only: Euler and Euler ancestral (Karras et al. 2022, as k-diffusion has
//! them) and DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095), with the noise levels of diffusers' schedulers.
//!
//! A noise level is σ = sqrt((1 - ᾱ) / ᾱ). x is what the UNet is given, which diffusers' Euler divides by sqrt(1 + σ²) first;
//! then Euler's step is DDIM's between two levels, and Euler ancestral's DDIM's with eta = 1. DPM-Solver++ 2M extrapolates
//! the prediction of x_0 from that of the step before:
//!
//! ```text
//! D       = x_0 + (x_0 - x_0') / (2 r)      r = (λ_i - λ_{i-1}) / (λ_{i+1} - λ_i),  λ = -log σ
//! x_{i+1} = s x_i + sqrt(ᾱ_{i+1}) (1 - σ_{i+1} / σ_i) D      s: DDIM's, to which D = x_0 leads
//! ```

use anyhow::{Context, Result, bail};
use candle_core::Tensor;

use super::ddim::{DdimStep, alphas_cumprod, ddim_timesteps, origin_and_noise, step};
use super::{DdimSchedule, SchedulerConfig};
use crate::config::SamplerKind;
use crate::models::Source;

/// A chain that is only run forward.
#[derive(Clone, Debug)]
pub struct Solver {
    /// The standard deviation of what the chain starts from.
    pub start: f64,
    pub steps: Vec<SolverStep>,
}

/// A DDIM step, plus `previous` times the prediction of x_0 that the step before made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SolverStep {
    pub ddim: DdimStep,
    pub previous: f64,
    /// x_0 as factors of [x_t, out].
    original: [f64; 2],
}

impl SolverStep {
    /// x_{t-1}, as [`DdimStep::apply`]; `previous` is the last step's [`Self::predicted_original`].
    pub fn apply(&self, x_t: &Tensor, out: &Tensor, previous: Option<&Tensor>, z: Option<&Tensor>) -> Result<Tensor> {
        let next = self.ddim.apply(x_t, out, z)?;
        match previous {
            _ if self.previous == 0.0 => Ok(next),
            Some(previous) => Ok((next + (previous * self.previous)?)?),
            None => bail!("this step needs the prediction of the step before"),
        }
    }

    /// The prediction of x_0.
    pub fn predicted_original(&self, x_t: &Tensor, out: &Tensor) -> Result<Tensor> {
        Ok(((x_t * self.original[0])? + (out * self.original[1])?)?)
    }
}

impl From<&DdimSchedule> for Solver {
    fn from(schedule: &DdimSchedule) -> Self {
        let steps = schedule.steps().iter();
        Self {
            start: 1.0,
            steps: steps.map(|ddim| SolverStep { ddim: *ddim, previous: 0.0, original: [0.0; 2] }).collect(),
        }
    }
}

impl Solver {
    /// The chain of a pipeline. `karras`: whether the noise levels are spaced as Karras et al. do; `None`: as the
    /// scheduler's config says. DDIM is not one of these: see [`DdimSchedule`].
    ///
    /// # Errors
    /// As [`Self::new`], and a scheduler for which none of these can stand in.
    pub fn load(
        pipeline: &Source,
        kind: SamplerKind,
        karras: Option<bool>,
        num_inference_steps: usize,
    ) -> Result<Self> {
        let config = super::scheduler::load(pipeline)?;
        Self::new(&config, kind, karras, num_inference_steps)
            .with_context(|| format!("the scheduler of {}", pipeline.label()))
    }

    /// # Errors
    /// More inference than training steps, or a key that asks for another computation.
    pub fn new(config: &SchedulerConfig, kind: SamplerKind, karras: Option<bool>, n: usize) -> Result<Self> {
        let prediction = config.prediction(n)?;
        refuse_others(config)?;
        let mut alphas = alphas_cumprod(config)?;
        if let Some(last) = alphas.last_mut().filter(|_| config.rescale_betas_zero_snr) {
            *last = 2f64.powi(-24); // as diffusers, so that the first level is finite
        }
        // σ of the training timesteps, in PyTorch's f32
        let table: Vec<f64> = alphas
            .iter()
            .map(|alpha| {
                let alpha = *alpha as f32;
                f64::from(((1.0 - alpha) / alpha).sqrt())
            })
            .collect();
        let mut timesteps = timesteps(config, kind, n)?;
        let mut sigmas: Vec<f64> = timesteps.iter().map(|t| interpolated(&table, *t)).collect();
        let dpm = kind == SamplerKind::Dpmpp2m;
        if karras.unwrap_or(config.use_karras_sigmas) {
            let ends = if dpm { (table[table.len() - 1], table[0]) } else { (sigmas[0], sigmas[n - 1]) };
            sigmas = karras_levels(ends, n);
            timesteps = sigmas.iter().map(|sigma| timestep_of(&table, *sigma)).collect();
            if dpm {
                let whole = if config.beta_schedule == "squaredcos_cap_v2" { f64::floor } else { f64::round_ties_even };
                timesteps.iter_mut().for_each(|t| *t = whole(*t));
            }
        }
        sigmas.push(match config.final_sigmas_type.as_str() {
            "zero" => 0.0,
            "sigma_min" => table[0],
            other => bail!("scheduler_config.json: final_sigmas_type `{other}` is not known (zero, sigma_min)"),
        });
        let to_f32 = |numbers: &mut Vec<f64>| numbers.iter_mut().for_each(|x| *x = f64::from(*x as f32));
        to_f32(&mut sigmas);
        to_f32(&mut timesteps);

        let alpha = |sigma: f64| 1.0 / (1.0 + sigma * sigma);
        let eta = if kind == SamplerKind::EulerAncestral { 1.0 } else { 0.0 };
        let steps = (0..n).map(|i| {
            let (now, next) = (sigmas[i], sigmas[i + 1]);
            let mut ddim = step(prediction, timesteps[i], alpha(now), alpha(next), eta);
            let original = origin_and_noise(prediction, alpha(now)).0;
            if !dpm && i + 1 == n {
                // diffusers' Euler ends in its own scale, which is another where the last level is not 0
                let scale = alpha(next).sqrt().recip();
                ddim.sample *= scale;
                ddim.model_output *= scale;
                ddim.noise *= scale;
            }
            let mut previous = 0.0;
            // the first and the last step have nothing to extrapolate from, or to
            if dpm && i > 0 && next > 0.0 && !(i + 1 == n && n < FEW) {
                let (h, h_before) = ((now / next).ln(), (sigmas[i - 1] / now).ln());
                let extrapolated = alpha(next).sqrt() * (1.0 - next / now) * h / (2.0 * h_before);
                ddim.sample += extrapolated * original[0];
                ddim.model_output += extrapolated * original[1];
                previous = -extrapolated;
            }
            SolverStep { ddim, previous, original }
        });
        let steps = steps.collect();
        // diffusers' Euler starts from noise alone, without the image's share, where the first level is the highest
        let from_noise = !dpm && spacing(config) != "leading";
        let start = if from_noise { (1.0 - alpha(sigmas[0])).sqrt() } else { 1.0 };
        Ok(Self { start, steps })
    }
}

/// Chains of fewer steps end with a first-order step, whatever noise they end at.
const FEW: usize = 15;

fn spacing(config: &SchedulerConfig) -> &str {
    config.timestep_spacing.as_deref().unwrap_or("linspace")
}

/// # Errors
/// A key of these schedulers that asks for noise levels which are not implemented.
fn refuse_others(config: &SchedulerConfig) -> Result<()> {
    for (key, usual) in [
        ("interpolation_type", "linear"),
        ("timestep_type", "discrete"),
        ("use_exponential_sigmas", "false"),
        ("use_beta_sigmas", "false"),
        ("use_lu_lambdas", "false"),
        ("sigma_min", "null"),
        ("sigma_max", "null"),
    ] {
        let Some(found) = config.rest.get(key).filter(|found| !found.is_null()) else { continue };
        if found.as_str().map_or_else(|| found.to_string(), str::to_owned) != usual {
            bail!(
                "scheduler_config.json: `{key}` = {found} is not supported (only {usual}); sampler.kind = \"ddim\" does not read it"
            );
        }
    }
    Ok(())
}

/// The timesteps of `n` steps, from the noisiest on; Euler's need not be whole.
fn timesteps(config: &SchedulerConfig, kind: SamplerKind, n: usize) -> Result<Vec<f64>> {
    let train = config.num_train_timesteps;
    let (last, dpm) = ((train - 1) as f64, kind == SamplerKind::Dpmpp2m);
    let falling: Vec<f64> = match spacing(config) {
        "linspace" if dpm => (1..=n).rev().map(|i| (i as f64 * (last / n as f64)).round_ties_even()).collect(),
        "linspace" if n == 1 => vec![0.0],
        "linspace" => (0..n).rev().map(|i| f64::from((i as f64 * (last / (n - 1) as f64)) as f32)).collect(),
        "leading" if dpm => (1..=n).rev().map(|i| (i * (train / (n + 1)) + config.steps_offset) as f64).collect(),
        _ => ddim_timesteps(config, n)?.into_iter().map(|t| t as f64).collect(),
    };
    match falling.iter().find(|t| **t > last) {
        Some(t) => bail!("timestep {t} of {train}: steps_offset {} does not fit {n} steps", config.steps_offset),
        None => Ok(falling),
    }
}

/// The entry of `table` at `t`, linear between its entries.
fn interpolated(table: &[f64], t: f64) -> f64 {
    let below = t as usize;
    let above = table[(below + 1).min(table.len() - 1)];
    table[below] + (t - below as f64) * (above - table[below])
}

/// The timestep of a noise level, linear in the levels' logarithms (k-diffusion's `sigma_to_t`). `table` rises.
fn timestep_of(table: &[f64], sigma: f64) -> f64 {
    let log = |i: usize| f64::from((table[i] as f32).ln());
    let wanted = sigma.max(1e-10).ln();
    let above = (0..table.len()).find(|i| log(*i) > wanted).unwrap_or(table.len());
    let low = above.saturating_sub(1).min(table.len().saturating_sub(2));
    if low + 1 == table.len() {
        return 0.0;
    }
    let share = ((log(low) - wanted) / (log(low) - log(low + 1))).clamp(0.0, 1.0);
    (1.0 - share) * low as f64 + share * (low + 1) as f64
}

/// `n` noise levels between the two (Karras et al. 2022, equation 5, with ρ = 7).
fn karras_levels((highest, lowest): (f64, f64), n: usize) -> Vec<f64> {
    const RHO: f64 = 7.0;
    let (highest, lowest) = (highest.powf(1.0 / RHO), lowest.powf(1.0 / RHO));
    let at = |i: usize| if n > 1 { i as f64 / (n - 1) as f64 } else { 0.0 };
    (0..n).map(|i| (highest + at(i) * (lowest - highest)).powf(RHO)).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use serde::Deserialize;

    use super::*;
    use crate::ops::testing::relative_error;

    #[derive(Deserialize)]
    struct Recorded {
        x_t: Vec<f32>,
        noises: Vec<Vec<f32>>,
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        config: SchedulerConfig,
        kind: SamplerKind,
        karras: Option<bool>,
        steps: usize,
        timesteps: Vec<f64>,
        /// What the model is given at each step, and the end of the chain.
        inputs: Vec<Vec<f32>>,
        latents: Vec<f32>,
    }

    /// The prediction that the recorded chains were made with, of the numbers x at `timestep`.
    fn model(x: &Tensor, timestep: f64) -> Result<Tensor> {
        Ok(((x.tanh()? * 0.7)? + 0.3 * (timestep / 150.0).sin())?)
    }

    fn tensor(numbers: &[f32]) -> Tensor {
        Tensor::new(numbers, &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
    }

    /// Against chains of diffusers' schedulers (`tools/make_samplers.py`). Theirs round to f32.
    #[test]
    fn chains_are_those_of_diffusers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/samplers.json");
        let recorded: Recorded = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert!(recorded.cases.len() >= 20);
        for case in &recorded.cases {
            let Case { config, kind, karras, steps, .. } = case;
            let about = format!("{kind:?} {karras:?} {steps} {:?} {}", config.timestep_spacing, config.prediction_type);
            let solver = Solver::new(config, *kind, *karras, *steps).unwrap();
            // of a first level of 4096 their f32 leaves less
            let bound = if config.rescale_betas_zero_snr { 1e-4 } else { 1e-5 };
            let mut x = (tensor(&recorded.x_t) * solver.start).unwrap();
            let mut previous: Option<Tensor> = None;
            assert_eq!(solver.steps.len(), case.timesteps.len(), "{about}");
            for (i, step) in solver.steps.iter().enumerate() {
                let expected = case.timesteps[i];
                assert!((step.ddim.timestep - expected).abs() <= 1e-4, "{about}: {} {expected}", step.ddim.timestep);
                let error = relative_error(&x, &tensor(&case.inputs[i]));
                assert!(error < bound, "{about}: input of step {i}: {error:.1e}");
                let out = model(&x, step.ddim.timestep).unwrap();
                let original = step.predicted_original(&x, &out).unwrap();
                x = step.apply(&x, &out, previous.as_ref(), Some(&tensor(&recorded.noises[i]))).unwrap();
                previous = Some(original);
            }
            let error = relative_error(&x, &tensor(&case.latents));
            assert!(error < bound, "{about}: latents: {error:.1e}");
        }
    }

    #[test]
    fn what_would_change_the_noise_levels_is_refused() {
        let refuse = |json: &str, part: &str| {
            let config: SchedulerConfig = serde_json::from_str(json).unwrap();
            let message = Solver::new(&config, SamplerKind::Euler, None, 5).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        };
        refuse(r#"{"interpolation_type": "log_linear"}"#, "interpolation_type");
        refuse(r#"{"use_beta_sigmas": true}"#, "use_beta_sigmas");
        refuse(r#"{"sigma_min": 0.1}"#, "sigma_min");
        refuse(r#"{"final_sigmas_type": "none"}"#, "final_sigmas_type `none`");
        refuse(r#"{"timestep_spacing": "leading", "steps_offset": 900}"#, "steps_offset 900");
        refuse(r#"{"thresholding": true}"#, "thresholding");
        refuse(r#"{"num_train_timesteps": 4}"#, "1 to 4");
    }
}
