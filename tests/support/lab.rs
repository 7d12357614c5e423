//! What tests of methods share: an experiment on the tiny model with a reward of their own.

use std::path::Path;

use alignprop::config::{Config, Policy, Prompt};
use alignprop::diffusion::{Noise, Stream};
use alignprop::lora::Adapters;
use alignprop::ops::device::Compute;
use alignprop::ops::{Ledger, Number};
use alignprop::rewards::{Judge, Rewards, Score, TapedImages, Weighted};
use alignprop::sampling::{Denoiser, Sampler};
use alignprop::training::checkpoint::Checkpoint;
use alignprop::training::trainer::begin;
use alignprop::training::{RunPlan, Setup, StepResult};
use candle_core::{DType, Tensor};

use super::{Experiment, numbers};

/// A score without a gradient: how much redder than blue an image is.
pub struct Red;

impl Score for Red {
    fn scores(&self, images: &TapedImages, _: &[Prompt], ledger: &mut Ledger) -> anyhow::Result<Vec<Number>> {
        let channels = images.tensor()?.to_dtype(DType::F64)?.mean((2, 3))?;
        Ok(ledger.numbers(&(channels.get_on_dim(1, 0)? - channels.get_on_dim(1, 2)?)?)?)
    }
}

/// One reward, of weight 1.
pub fn judged_by(score: impl Score + 'static) -> Rewards {
    Rewards::new(vec![Weighted { name: "red", weight: 1.0, cap: None, judge: Judge::Score(Box::new(score)) }])
}

/// What a step needs, with a reward of the test's own.
pub struct Lab {
    pub config: Config,
    pub sampler: Sampler,
    pub rewards: Rewards,
    pub prompts: Vec<Prompt>,
    pub plan: RunPlan,
    pub start: Checkpoint,
    pub noise: Noise,
}

impl Lab {
    pub fn new(settings: &[&str], compute: &Compute, score: impl Score + 'static) -> Self {
        Self::with_rewards(settings, compute, |_, _| judged_by(score))
    }

    /// With rewards for this config and pipeline.
    pub fn with_rewards(
        settings: &[&str],
        compute: &Compute,
        rewards: impl FnOnce(&Config, &Sampler) -> Rewards,
    ) -> Self {
        let experiment = Experiment::new("tiny-sd15");
        let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
        let config = Config::load(Path::new(&experiment.config()), &settings).unwrap();
        let sampler = Sampler::load(&config.model, &config.sampler, compute).unwrap();
        let (rewards, noise) = (rewards(&config, &sampler), Noise::new(config.run.seed));
        let start = begin(&config, &sampler, &noise).unwrap();
        let prompts = config.prompts.load().unwrap();
        let plan = RunPlan::resolve(&config, &sampler, &rewards, &prompts[0], &start.adapters).unwrap();
        Self { config, sampler, rewards, prompts, plan, start, noise }
    }

    pub fn step(&self, state: &mut Checkpoint) -> anyhow::Result<StepResult> {
        let Self { config, sampler, rewards, prompts, plan, noise, .. } = self;
        let setup = Setup { config, plan, sampler, rewards, prompts, noise: *noise };
        setup.step(state, config.optimizer.lr, |_| ())
    }

    pub fn denoiser<'a>(&'a self, adapters: &'a Adapters) -> Denoiser<'a> {
        let (conditioning, _) = Ledger::around(|ledger| self.sampler.conditioning(&self.prompts, ledger)).unwrap();
        self.sampler.denoiser(adapters, conditioning, self.plan.checkpointing)
    }

    pub fn policy(&self) -> Policy {
        self.config.method.policy().unwrap()
    }
}

/// Random numbers in the shapes of the factors.
pub fn direction(adapters: &Adapters, number: u64) -> Vec<Tensor> {
    let random = |(tensor, i): (Tensor, u64)| {
        let data = Noise::new(7).normal(Stream::Renoise, number, i, tensor.elem_count());
        Tensor::from_vec(data, tensor.shape(), tensor.device()).unwrap()
    };
    adapters.tensors().into_iter().zip(0..).map(random).collect()
}

pub fn moved(adapters: &Adapters, direction: &[Tensor], by: f64) -> Adapters {
    let tensors = adapters.tensors().into_iter().zip(direction).map(|(x, d)| (x + (d * by).unwrap()).unwrap());
    adapters.with_tensors(tensors.collect()).unwrap()
}

/// <gradients, direction>
pub fn along(gradients: &[Tensor], direction: &[Tensor]) -> f64 {
    let pairs = gradients.iter().zip(direction).flat_map(|(g, d)| numbers(g).into_iter().zip(numbers(d)));
    pairs.map(|(g, d)| f64::from(g) * f64::from(d)).sum()
}

/// A derivative by differences of fourth order.
pub fn difference(h: f64, at: impl Fn(f64) -> f64) -> f64 {
    (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h)
}
