//! The gradient of the KL term through the chain, against differences of the loss itself.

mod support;

use alignprop::config::{Checkpointing, ModelConfig};
use alignprop::diffusion::{DdimSchedule, DdimStep, Noise, Stream};
use alignprop::lora::Adapters;
use alignprop::models::Pipeline;
use alignprop::ops::Ledger;
use alignprop::ops::device::Compute;
use alignprop::sampling::{Conditioning, Denoiser, Trajectory};
use alignprop::training::Plan;
use alignprop::training::step::{Tally, differentiate};
use alignprop::training::terms::{KeptStep, KlTerm, StepTerm, distances_from_base};
use candle_core::Tensor;
use support::{fixture, numbers, text};

const STEPS: usize = 3;
const IMAGES: usize = 2;

struct Chain {
    pipeline: Pipeline,
    schedule: DdimSchedule,
    conditioning: Conditioning,
    noise: Noise,
    adapters: Adapters,
}

impl Chain {
    /// With factors that are not zero: the model is away from its base.
    fn new(set: &str) -> Self {
        let pipeline = Pipeline::load(&ModelConfig::at(text(fixture(set).join("model")))).unwrap();
        let schedule = DdimSchedule::load(&pipeline.source, STEPS, 0.5).unwrap();
        let prompts = ["a cat", "a red dog"].map(String::from);
        let conditioning = Conditioning::new(
            pipeline.encode_prompts(&prompts).unwrap(),
            pipeline.encode_prompts(&[String::new(), String::new()]).unwrap(),
            3.0,
            &Compute::cpu(),
        );
        let noise = Noise::new(4);
        let targets = ["to_q", "to_k", "to_v", "to_out.0"].map(String::from);
        let normal = |i: usize, n: usize| noise.normal(Stream::LoraInit, 0, i as u64, n);
        let adapters = Adapters::init(&pipeline.unet.targets(), &targets, 2, 2.0, normal).unwrap();
        let chain = Self { pipeline, schedule, conditioning, noise, adapters };
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

    fn denoiser<'a>(&'a self, adapters: &'a Adapters, checkpointing: Checkpointing) -> Denoiser<'a> {
        Denoiser { unet: &self.pipeline.unet, adapters, conditioning: self.conditioning.clone(), checkpointing }
    }

    fn rollout<'a>(&'a self, adapters: &'a Adapters) -> Trajectory<'a> {
        let shape = (4, 9, 5);
        let x_t = self.noise.normal_batch(Stream::Latents, 0, 0..IMAGES as u64, shape).unwrap();
        let variance = |i| Ok(self.noise.normal_batch(Stream::Variance, i as u64, 0..IMAGES as u64, shape)?);
        let (denoiser, steps) = (self.denoiser(adapters, Checkpointing::Step), self.schedule.steps());
        Ledger::around(|ledger| denoiser.rollout(steps, x_t, variance, |_| false, ledger)).unwrap().0
    }

    /// The base model's predictions at the latents of these adapters.
    fn base_predictions(&self, trajectory: &Trajectory) -> Vec<Vec<f32>> {
        let base = Adapters::default();
        let denoiser = self.denoiser(&base, Checkpointing::Step);
        let steps = self.schedule.steps().iter().enumerate();
        let prediction = |(i, step): (usize, &DdimStep)| denoiser.predict(trajectory.input(i), step.timestep).unwrap();
        steps.map(|step| numbers(&prediction(step))).collect()
    }

    /// The term as it is written down, in f64: for each image the mean over its kept steps of the mean squared
    /// difference from the given predictions of the base model.
    fn distances(&self, adapters: &Adapters, base: &[Vec<f32>], plan: &Plan) -> Vec<f64> {
        let trajectory = self.rollout(adapters);
        let each = |image: usize| {
            let kept: Vec<usize> = (0..STEPS).filter(|i| plan.keep[*i][image]).collect();
            let step = |i: &usize| {
                let prediction = numbers(trajectory.prediction(*i));
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
fn check(set: &str, guidance_rescale: f64) {
    let mut chain = Chain::new(set);
    chain.conditioning = chain.conditioning.rescaled(guidance_rescale);
    let plan = Plan::with_mask(&chain.schedule, &[true; STEPS], IMAGES);
    let mut trajectory = chain.rollout(&chain.adapters);
    let base = chain.base_predictions(&trajectory);
    let scale = 0.7;
    for checkpointing in [Checkpointing::Step, Checkpointing::Block] {
        let mut term = KlTerm::new(scale, &plan);
        let mut tally = Tally::new(&chain.adapters);
        let denoiser = chain.denoiser(&chain.adapters, checkpointing);
        let nothing = trajectory.latents().zeros_like().unwrap();
        differentiate(&denoiser, &plan, &mut trajectory, Some(&nothing), &mut [&mut term], &mut tally).unwrap();
        let gradients = tally.take_gradients(&chain.adapters).unwrap();
        let distances = term.distances(&tally.ledger.read().unwrap());
        // the value
        let expected = chain.distances(&chain.adapters, &base, &plan);
        for (distance, expected) in distances.iter().zip(&expected) {
            assert!((distance / expected - 1.0).abs() < 1e-5 && *expected > 1e-4, "{distance} for {expected}");
        }
        // the gradient
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
    check("tiny-sd15", 0.0);
    check("tiny-sd21", 0.0);
}

#[test]
fn the_gradient_of_a_rescaled_guidance_is_that_of_its_differences() {
    // with it the chain of tiny-sd21 bends too much for differences in f32; `verify` has one
    check("tiny-sd15", 0.7);
    check("tiny-sd15", 1.0);
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
    let mut term = KlTerm::new(1.0, &plan);
    let adapters = &chain.adapters;
    let denoiser = chain.denoiser(adapters, Checkpointing::Step);
    let nothing = trajectory.latents().zeros_like().unwrap();
    let mut tally = Tally::new(adapters);
    differentiate(&denoiser, &plan, &mut trajectory, Some(&nothing), &mut [&mut term], &mut tally).unwrap();
    let readings = tally.ledger.read().unwrap();
    let expected = chain.distances(adapters, &base, &plan);
    for (distance, expected) in term.distances(&readings).iter().zip(&expected) {
        assert!((distance / expected - 1.0).abs() < 1e-5, "{distance} for {expected}");
    }
    // and over all steps it is the guard's distance
    let all = Plan::with_mask(&chain.schedule, &[true; STEPS], IMAGES);
    let guard = distances_from_base(&denoiser, chain.schedule.steps(), &trajectory).unwrap();
    for (distance, expected) in guard.iter().zip(chain.distances(adapters, &base, &all)) {
        assert!((distance / expected - 1.0).abs() < 1e-5, "{distance} for {expected}");
    }
    // of the base model itself it is zero
    let base = Adapters::default();
    let of_base = chain.denoiser(&base, Checkpointing::Step);
    let own = distances_from_base(&of_base, chain.schedule.steps(), &chain.rollout(&base)).unwrap();
    assert_eq!(own, [0.0; IMAGES]);
}

/// `<weight, prediction>` at every kept step, whose gradient is the weight, and what it saw.
struct Linear {
    weights: Vec<Tensor>,
    seen: Vec<usize>,
}

impl StepTerm for Linear {
    fn cotangent(&mut self, at: &KeptStep, _: &mut Ledger) -> anyhow::Result<Tensor> {
        self.seen.push(at.index);
        // what the step led to is what its prediction and its noise make of x_t
        let noise = at.step.apply(at.input, at.prediction, Some(&at.input.zeros_like()?))?;
        let left = numbers(&(at.output - noise)?).iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        let expected = at.step.noise.powi(2) * at.output.elem_count() as f64;
        assert!((left / expected - 1.0).abs() < 0.3, "the noise of step {}: {left} for {expected}", at.index);
        let rows: Vec<u32> = at.rows.iter().map(|row| *row as u32).collect();
        Ok(self.weights[at.index].index_select(&Tensor::new(rows, self.weights[0].device())?, 0)?)
    }
}

/// Without a gradient of the images the chain is not walked: each kept step is differentiated at its own x_t, as a sum over
/// separate evaluations.
#[test]
fn a_term_alone_is_differentiated_at_each_step_by_itself() {
    let chain = Chain::new("tiny-sd15");
    let keep = vec![vec![true, true], vec![false, true], vec![true, true]];
    let plan = Plan { keep, ..Plan::with_mask(&chain.schedule, &[true; STEPS], IMAGES) };
    let denoiser = chain.denoiser(&chain.adapters, Checkpointing::Step);
    let mut trajectory = chain.rollout(&chain.adapters);
    let weight = |i: usize| chain.noise.normal_batch(Stream::Renoise, i as u64, 0..IMAGES as u64, (4, 9, 5)).unwrap();
    let mut term = Linear { weights: (0..STEPS).map(weight).collect(), seen: Vec::new() };
    let mut tally = Tally::new(&chain.adapters);
    differentiate(&denoiser, &plan, &mut trajectory, None, &mut [&mut term], &mut tally).unwrap();
    assert_eq!(term.seen, [2, 1, 0]);
    let gradients = tally.take_gradients(&chain.adapters).unwrap();

    let mut expected = Tally::new(&chain.adapters);
    for (i, rows) in [(2, 0..2), (1, 1..2), (0, 0..2u32)] {
        let rows = Tensor::new(rows.collect::<Vec<_>>(), &candle_core::Device::Cpu).unwrap();
        let pick = |x: &Tensor| x.index_select(&rows, 0).unwrap();
        let step = denoiser.select(&rows).unwrap();
        let recording = step.record(&pick(trajectory.input(i)), plan.steps[i].timestep).unwrap();
        recording.pull(&pick(&term.weights[i]), &mut expected.gradients).unwrap();
    }
    for (found, expected) in gradients.iter().zip(expected.take_gradients(&chain.adapters).unwrap()) {
        assert_eq!(numbers(found), numbers(&expected));
        assert!(numbers(found).iter().any(|x| *x != 0.0));
    }
    // a loss of nothing is a mistake
    let nothing = differentiate(&denoiser, &plan, &mut trajectory, None, &mut [], &mut tally).unwrap_err();
    assert!(nothing.to_string().contains("without terms"), "{nothing}");
}

/// A recording of the whole batch does not fit a step that only some samples keep.
#[test]
fn a_recorded_step_that_is_not_used_is_an_error() {
    let chain = Chain::new("tiny-sd15");
    let keep = vec![vec![false, false], vec![true, false], vec![true, true]];
    let plan = Plan { keep, ..Plan::with_mask(&chain.schedule, &[true; STEPS], IMAGES) };
    let denoiser = chain.denoiser(&chain.adapters, Checkpointing::Step);
    let recorded = |which: usize| {
        let x_t = chain.noise.normal_batch(Stream::Latents, 0, 0..IMAGES as u64, (4, 9, 5)).unwrap();
        let noise = |_| Ok(x_t.clone());
        let run = |ledger: &mut Ledger| denoiser.rollout(&plan.steps, x_t.clone(), noise, |i| i == which, ledger);
        let mut trajectory = Ledger::around(run).unwrap().0;
        let d = trajectory.latents().clone();
        differentiate(&denoiser, &plan, &mut trajectory, Some(&d), &mut [], &mut Tally::new(&chain.adapters))
    };
    recorded(2).unwrap();
    let error = recorded(1).unwrap_err().to_string();
    assert!(error.contains("step 1 was recorded for the whole batch, and only 1 of its 2 samples keep it"), "{error}");
}
