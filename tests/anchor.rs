//! The gradient of the KL term through the chain, against differences of the loss itself.

mod support;

use alignprop::config::{Checkpointing, ModelConfig};
use alignprop::diffusion::{DdimSchedule, Noise, Stream};
use alignprop::lora::Adapters;
use alignprop::models::Pipeline;
use alignprop::nn::lora::LoraGradients;
use alignprop::ops::Ledger;
use alignprop::training::{Anchor, Plan, Prompting, anchor, anchored_backprop, rollout};
use candle_core::Tensor;
use support::{fixture, numbers, text};

const STEPS: usize = 3;
const IMAGES: usize = 2;

struct Chain {
    pipeline: Pipeline,
    schedule: DdimSchedule,
    prompting: Prompting,
    noise: Noise,
    adapters: Adapters,
}

impl Chain {
    /// With factors that are not zero: the model is away from its base.
    fn new(set: &str) -> Self {
        let pipeline = Pipeline::load(&ModelConfig::at(text(fixture(set).join("model")))).unwrap();
        let schedule = DdimSchedule::load(&pipeline.source, STEPS, 0.5).unwrap();
        let prompts = ["a cat", "a red dog"].map(String::from);
        let prompting = Prompting {
            prompt_embeds: pipeline.encode_prompts(&prompts).unwrap(),
            negative_prompt_embeds: pipeline.encode_prompts(&[String::new(), String::new()]).unwrap(),
            guidance_scale: 3.0,
        };
        let noise = Noise::new(4);
        let targets = ["to_q", "to_k", "to_v", "to_out.0"].map(String::from);
        let normal = |i: usize, n: usize| noise.normal(Stream::LoraInit, 0, i as u64, n);
        let adapters = Adapters::init(&pipeline.unet.targets(), &targets, 2, 2.0, normal).unwrap();
        let chain = Self { pipeline, schedule, prompting, noise, adapters };
        let moved = chain
            .direction(1)
            .into_iter()
            .zip(chain.adapters.tensors())
            .map(|(d, x)| ((d * 0.2).unwrap() + x).unwrap());
        let adapters = chain.adapters.with_tensors(moved.collect()).unwrap();
        Self { adapters, ..chain }
    }

    /// Random numbers in the shapes of the factors.
    fn direction(&self, number: u64) -> Vec<Tensor> {
        let tensors = self.adapters.tensors().into_iter().zip(0..);
        let random = |(tensor, i): (Tensor, u64)| {
            let data = self.noise.normal(Stream::Renoise, number, i, tensor.elem_count());
            Tensor::from_vec(data, tensor.shape(), tensor.device()).unwrap()
        };
        tensors.map(random).collect()
    }

    fn rollout<'a>(&'a self, adapters: &'a Adapters) -> alignprop::training::Trajectory<'a> {
        let shape = (4, 9, 5);
        let x_t = self.noise.normal_batch(Stream::Latents, 0, 0..IMAGES as u64, shape).unwrap();
        let variance = |i| Ok(self.noise.normal_batch(Stream::Variance, i as u64, 0..IMAGES as u64, shape)?);
        let (unet, steps) = (&self.pipeline.unet, self.schedule.steps());
        let run = |ledger: &mut Ledger| rollout(unet, steps, x_t, &self.prompting, adapters, variance, ledger);
        Ledger::around(run).unwrap().0
    }

    /// The base model's predictions at the latents of these adapters.
    fn base_predictions(&self, trajectory: &alignprop::training::Trajectory) -> Vec<Vec<f32>> {
        let steps = self.schedule.steps().iter().zip(&trajectory.inputs);
        let base = Adapters::default();
        steps
            .map(|(step, x)| self.prompting.predict(&self.pipeline.unet, x, step.timestep, &base).unwrap())
            .map(|prediction| numbers(&prediction))
            .collect()
    }

    /// The term as it is written down, in f64: for each image the mean over its kept steps of the mean squared
    /// difference from the given predictions of the base model.
    fn distances(&self, adapters: &Adapters, base: &[Vec<f32>], plan: &Plan) -> Vec<f64> {
        let trajectory = self.rollout(adapters);
        let each = |image: usize| {
            let kept: Vec<usize> = (0..STEPS).filter(|i| plan.keep[*i][image]).collect();
            let step = |i: &usize| {
                let prediction = numbers(&trajectory.predictions[*i]);
                let n = prediction.len() / IMAGES;
                let range = image * n..(image + 1) * n;
                let squares = prediction[range.clone()].iter().zip(&base[*i][range]);
                squares.map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>() / n as f64
            };
            kept.iter().map(step).sum::<f64>() / kept.len() as f64
        };
        (0..IMAGES).map(each).collect()
    }

    fn moved(&self, direction: &[Tensor], by: f64) -> Adapters {
        let tensors = self.adapters.tensors().into_iter().zip(direction).map(|(x, d)| (x + (d * by).unwrap()).unwrap());
        self.adapters.with_tensors(tensors.collect()).unwrap()
    }
}

/// The gradient along a random direction of all factors, through all that the chain does with them: each kept step's
/// own prediction, and through x_t all later ones. Where a step is not kept, the loss depends on it through the
/// linear path only, so such a mask has no loss of its own whose difference could be taken: here all steps are kept.
fn check(set: &str) {
    let chain = Chain::new(set);
    let plan = Plan::with_mask(&chain.schedule, &[true; STEPS], IMAGES);
    let mut trajectory = chain.rollout(&chain.adapters);
    let base = chain.base_predictions(&trajectory);
    let scale = 0.7;
    for checkpointing in [Checkpointing::Step, Checkpointing::Block] {
        let mut term = Anchor::new(scale, IMAGES);
        let mut sum = LoraGradients::new(&chain.adapters);
        let nothing = trajectory.latents.zeros_like().unwrap();
        let mut ledger = Ledger::default();
        anchored_backprop(
            &chain.pipeline.unet,
            &chain.adapters,
            &mut trajectory,
            &plan,
            &chain.prompting,
            &nothing,
            checkpointing,
            Some(&mut term),
            &mut sum,
            &mut ledger,
        )
        .unwrap();
        let distances = term.distances(&ledger.read().unwrap());
        // the value
        let expected = chain.distances(&chain.adapters, &base, &plan);
        for (distance, expected) in distances.iter().zip(&expected) {
            assert!((distance / expected - 1.0).abs() < 1e-5 && *expected > 1e-4, "{distance} for {expected}");
        }
        // the gradient
        let gradients = sum.finish(&chain.adapters).unwrap();
        for number in [2, 3] {
            let direction = chain.direction(number);
            let along: f64 = gradients
                .iter()
                .zip(&direction)
                .flat_map(|(g, d)| numbers(g).into_iter().zip(numbers(d)))
                .map(|(g, d)| f64::from(g) * f64::from(d))
                .sum();
            let loss =
                |by: f64| scale * chain.distances(&chain.moved(&direction, by), &base, &plan).iter().sum::<f64>();
            // fourth order: f32 rounds the loss at about 1e-6 of it, so the steps are not small
            let h = 4e-3;
            let difference = (8.0 * (loss(h) - loss(-h)) - (loss(2.0 * h) - loss(-2.0 * h))) / (12.0 * h);
            eprintln!("{set} {checkpointing:?}: {along:.6e} by the backward pass, {difference:.6e} by differences");
            assert!(
                (along - difference).abs() < 2e-3 * difference.abs().max(0.1 * expected[0]),
                "{along} {difference}"
            );
        }
    }
}

#[test]
fn the_gradient_of_the_kl_term_is_that_of_its_differences() {
    check("tiny-sd15");
    check("tiny-sd21");
}

/// Two images that keep different steps: each is weighted by its own number.
#[test]
fn an_image_that_keeps_fewer_steps_is_averaged_over_those() {
    let chain = Chain::new("tiny-sd15");
    let plan = Plan {
        keep: vec![vec![false, false], vec![true, false], vec![true, true]],
        ..Plan::with_mask(&chain.schedule, &[true; STEPS], IMAGES)
    };
    let mut trajectory = chain.rollout(&chain.adapters);
    let base = chain.base_predictions(&trajectory);
    let mut term = Anchor::new(1.0, IMAGES);
    let mut sum = LoraGradients::new(&chain.adapters);
    let (unet, nothing) = (&chain.pipeline.unet, trajectory.latents.zeros_like().unwrap());
    let (adapters, checkpointing) = (&chain.adapters, Checkpointing::Step);
    let prompting = &chain.prompting;
    let pull = Some(&mut term);
    let back = |ledger: &mut Ledger| {
        anchored_backprop(
            unet,
            adapters,
            &mut trajectory,
            &plan,
            prompting,
            &nothing,
            checkpointing,
            pull,
            &mut sum,
            ledger,
        )
    };
    let ((), readings) = Ledger::around(back).unwrap();
    let expected = chain.distances(adapters, &base, &plan);
    for (distance, expected) in term.distances(&readings).iter().zip(&expected) {
        assert!((distance / expected - 1.0).abs() < 1e-5, "{distance} for {expected}");
    }
    // and over all steps it is the guard's distance
    let all = Plan::with_mask(&chain.schedule, &[true; STEPS], IMAGES);
    let guard = anchor::distances(unet, chain.schedule.steps(), &trajectory, prompting).unwrap();
    for (distance, expected) in guard.iter().zip(chain.distances(adapters, &base, &all)) {
        assert!((distance / expected - 1.0).abs() < 1e-5, "{distance} for {expected}");
    }
    // of the base model itself it is zero
    let own = anchor::distances(unet, chain.schedule.steps(), &chain.rollout(&Adapters::default()), prompting).unwrap();
    assert_eq!(own, [0.0; IMAGES]);
}
