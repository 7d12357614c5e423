//! Peak memory, counted by the allocator: it does not grow with the steps that are differentiated, nor with the batch.
//!
//! The weights' files are mapped and do not count; whatever is allocated on any thread does.

mod support;

use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use alignprop::allocator::{self, Allocator};
use alignprop::config::{
    AestheticConfig, Checkpointing, ClipScoreConfig, Config, ModelConfig, Precision, Preprocess, Prompt, RewardsConfig,
};
use alignprop::diffusion::{DdimSchedule, Noise, Stream};
use alignprop::lora::Adapters;
use alignprop::models::tokenizer::ClipTokenizer;
use alignprop::models::{Pipeline, Source};
use alignprop::ops::device::Compute;
use alignprop::ops::{Ledger, flops};
use alignprop::rewards::Rewards;
use alignprop::sampling::{Conditioning, Denoiser, Sampler};
use alignprop::training::memory::Parts;
use alignprop::training::step::{Critic, Tally, credit, differentiate, sample};
use alignprop::training::trainer::begin;
use alignprop::training::{Plan, RunPlan, Setup};
use candle_core::{DType, Device, Tensor};
use support::{Experiment, fixture, text};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// One measurement at a time, since the counters are the process's; and on one thread, since the buffers of several
/// are in use together or not, as it happens.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    static ONE_THREAD: Once = Once::new();
    ONE_THREAD.call_once(|| rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How far the memory in use rises above what it was.
fn peak(mut work: impl FnMut()) -> f64 {
    work(); // what is made once and kept
    let before = allocator::live();
    allocator::reset_peak();
    work();
    (allocator::peak() - before) as f64
}

fn assert_flat(what: &str, few: f64, many: f64) {
    eprintln!("{what}: {:.2} MB and {:.2} MB", few / 1e6, many / 1e6);
    assert!(few > 1e5, "{what}: {few} bytes are too few to compare");
    assert!(many < 1.05 * few, "{what}: {few} bytes become {many}");
}

const STEPS: usize = 4;

/// A chain of the tiny pipeline on latents that are large enough for the UNet's activations to count.
struct Chain {
    pipeline: Pipeline,
    schedule: DdimSchedule,
    adapters: Adapters,
    noise: Noise,
    prompt: Prompt,
}

impl Chain {
    fn new() -> Self {
        let pipeline = Pipeline::load(&ModelConfig::at(text(fixture("tiny-sd15/model")))).unwrap();
        let schedule = DdimSchedule::load(&pipeline.source, STEPS, 0.0).unwrap();
        let noise = Noise::new(0);
        let targets = ["to_q", "to_k", "to_v", "to_out.0"].map(String::from);
        let normal = |i: usize, n: usize| noise.normal(Stream::LoraInit, 0, i as u64, n);
        let adapters = Adapters::init(&pipeline.unet.targets(), &targets, 2, 2.0, normal).unwrap();
        Self { pipeline, schedule, adapters, noise, prompt: "a cat".into() }
    }

    fn prompts(count: usize) -> Vec<Prompt> {
        vec![Prompt::from("a cat"); count]
    }

    /// Of `batch` images.
    fn denoiser(&self, batch: usize, checkpointing: Checkpointing) -> Denoiser<'_> {
        let embeds = |text: &str| self.pipeline.encode_prompts(&[text.to_owned()]).unwrap();
        let conditioning = Conditioning::new(embeds("a cat"), embeds(""), 5.0, &Compute::cpu());
        // with all that guidance may need
        let conditioning = conditioning.rescaled(0.7);
        let conditioning = conditioning.select(&Tensor::zeros(batch, DType::U32, &Device::Cpu).unwrap()).unwrap();
        Denoiser { unet: &self.pipeline.unet, adapters: &self.adapters, conditioning, checkpointing }
    }

    fn critic<'a>(&'a self, rewards: &'a Rewards, checkpointing: Checkpointing) -> Critic<'a> {
        Critic { vae: &self.pipeline.vae, rewards, checkpointing }
    }

    fn parts<'a>(&'a self, rewards: &'a Rewards, latent_shape: (usize, usize, usize)) -> Parts<'a> {
        let (denoiser, vae) = (self.denoiser(1, Checkpointing::Step), &self.pipeline.vae);
        let (differentiates_rewards, kept_latents, prompt) = (true, 0, &self.prompt);
        Parts {
            denoiser,
            vae,
            rewards,
            prompt,
            timestep: 500.0,
            latent_shape,
            steps: STEPS,
            differentiates_rewards,
            kept_latents,
        }
    }

    /// The peak of the backward pass through the last `k` steps.
    fn backward_peak(&self, k: usize, checkpointing: Checkpointing) -> f64 {
        let keep: Vec<bool> = (0..STEPS).map(|i| i + k >= STEPS).collect();
        let plan = Plan::with_mask(&self.schedule, &keep, 1);
        let denoiser = self.denoiser(1, checkpointing);
        let x_t = self.noise.normal_batch(Stream::Latents, 0, 0..1, (4, 24, 20)).unwrap();
        let mut tally = Tally::new(&self.adapters);
        let no_noise = |_| unreachable!();
        let mut trajectory = sample(&denoiser, &plan, x_t.clone(), no_noise, 0, &mut tally.ledger).unwrap();
        peak(|| {
            differentiate(&denoiser, &plan, &mut trajectory, Some(&x_t), &mut [], &mut tally).unwrap();
            assert_eq!(tally.take_gradients(&self.adapters).unwrap().len(), 160);
        })
    }
}

fn aesthetic() -> RewardsConfig {
    let aesthetic = AestheticConfig {
        clip: text(fixture("tiny-sd15/clip")),
        head: text(fixture("tiny-sd15/aesthetic_head.safetensors")),
        ..Default::default()
    };
    RewardsConfig { aesthetic: Some(aesthetic), ..Default::default() }
}

#[test]
fn the_backward_pass_needs_the_memory_of_one_step() {
    let _alone = alone();
    let chain = Chain::new();
    for checkpointing in [Checkpointing::Step, Checkpointing::Block] {
        let peaks = [1, 2, STEPS].map(|k| chain.backward_peak(k, checkpointing));
        assert_flat(&format!("{checkpointing:?}, 2 and {STEPS} steps"), peaks[1], peaks[2]);
        // from the second step on there are two sets of gradients: the sum, and those that are added to it
        let gradients = 4.0 * chain.adapters.parameter_count() as f64 * 1.5;
        assert_flat(&format!("{checkpointing:?}, 1 and 2 steps"), peaks[0] + gradients, peaks[1]);
    }
}

#[test]
fn checkpointing_each_block_needs_less() {
    let _alone = alone();
    let chain = Chain::new();
    let [step, block] = [Checkpointing::Step, Checkpointing::Block].map(|c| chain.backward_peak(1, c));
    eprintln!("step {:.2} MB, block {:.2} MB", step / 1e6, block / 1e6);
    assert!(block < 0.7 * step, "{block} bytes instead of {step}");
}

#[test]
fn images_are_decoded_and_scored_one_at_a_time() {
    let _alone = alone();
    let chain = Chain::new();
    let rewards = Rewards::load(&aesthetic(), &chain.pipeline.tokenizer).unwrap();
    let measure = |batch: u64, checkpointing| {
        let latents = chain.noise.normal_batch(Stream::Latents, 0, 0..batch, (4, 9, 5)).unwrap();
        let prompts = Chain::prompts(batch as usize);
        peak(|| {
            let mut tally = Tally::new(&chain.adapters);
            credit(&chain.critic(&rewards, checkpointing), &latents, &prompts, 1.0, &mut tally).unwrap();
        })
    };
    for checkpointing in [Checkpointing::Step, Checkpointing::Block] {
        assert_flat(
            &format!("{checkpointing:?}, 1 and 4 images"),
            measure(1, checkpointing),
            measure(4, checkpointing),
        );
    }
}

/// On one thread, where the count does not depend on which of two was faster.
#[test]
fn the_estimate_is_near_the_peak() {
    let _alone = alone();
    let chain = Chain::new();
    let rewards = Rewards::load(&aesthetic(), &chain.pipeline.tokenizer).unwrap();
    for (latent_shape, batch) in [((4, 9, 5), 1), ((4, 9, 5), 4), ((4, 32, 24), 3)] {
        for (checkpointing, stored) in [
            (Checkpointing::Step, 0),
            (Checkpointing::Step, 1),
            (Checkpointing::Step, STEPS),
            (Checkpointing::Block, 0),
        ] {
            let parts = chain.parts(&rewards, latent_shape);
            let estimate = parts.estimate(&parts.measure(checkpointing).unwrap(), batch, stored);
            let plan = Plan::with_mask(&chain.schedule, &[true; STEPS], batch);
            let (denoiser, critic) = (chain.denoiser(batch, checkpointing), chain.critic(&rewards, checkpointing));
            let x_t = chain.noise.normal_batch(Stream::Latents, 0, 0..batch as u64, latent_shape).unwrap();
            let loaded = allocator::live() as f64;
            let peak = loaded
                + peak(|| {
                    let mut tally = Tally::new(&chain.adapters);
                    let no_noise = |_| unreachable!();
                    let mut trajectory =
                        sample(&denoiser, &plan, x_t.clone(), no_noise, stored, &mut tally.ledger).unwrap();
                    let prompts = Chain::prompts(batch);
                    let credit = credit(&critic, trajectory.latents(), &prompts, 1.0, &mut tally).unwrap();
                    let d = Some(&credit.d_latents);
                    differentiate(&denoiser, &plan, &mut trajectory, d, &mut [], &mut tally).unwrap();
                });
            let ratio = estimate.total() / peak;
            eprintln!(
                "{latent_shape:?} x {batch}, {checkpointing:?}, {stored}: {estimate}, {:.2} MB, {ratio:.3}",
                peak / 1e6
            );
            assert!((0.8..1.25).contains(&ratio), "{ratio}");
        }
    }
}

/// What a tower adds does not grow with the image, what the decoder's way back adds does: the peak of a small image is another
/// one than that of a large one.
#[test]
fn the_estimate_of_an_image_is_near_its_peak_whatever_its_size() {
    let _alone = alone();
    let chain = Chain::new();
    let clip_score = ClipScoreConfig { model: "assets/emoji-clip".to_owned(), ..Default::default() };
    let config = RewardsConfig { clip_score: Some(clip_score), ..Default::default() };
    let tokenizer = ClipTokenizer::load(&Source::open("assets/emoji-clip").unwrap()).unwrap();
    let rewards = Rewards::load(&config, &tokenizer.into()).unwrap();
    let prompts = Chain::prompts(1);
    for side in [8, 16, 32, 64] {
        let latent_shape = (4, side, side);
        let parts = chain.parts(&rewards, latent_shape);
        let checkpointing = Checkpointing::Step;
        let estimate = parts.estimate(&parts.measure(checkpointing).unwrap(), 1, 0).image;
        let latents = chain.noise.normal_batch(Stream::Latents, 0, 0..1, latent_shape).unwrap();
        let peak = peak(|| {
            let mut tally = Tally::new(&chain.adapters);
            credit(&chain.critic(&rewards, checkpointing), &latents, &prompts, 1.0, &mut tally).unwrap();
        });
        eprintln!("{side}: {:.2} MB, estimate {:.2} MB", peak / 1e6, estimate / 1e6);
        assert!((0.95..1.05).contains(&(estimate / peak)), "{side}: {estimate} for {peak}");
    }
}

/// To the last operation: what the way back saves is what the rollout did for the stored steps.
#[test]
fn stored_steps_are_not_evaluated_again() {
    let _alone = alone();
    let chain = Chain::new();
    let plan = Plan::with_mask(&chain.schedule, &[true; STEPS], 1);
    let denoiser = chain.denoiser(1, Checkpointing::Step);
    let x_t = chain.noise.normal_batch(Stream::Latents, 0, 0..1, (4, 24, 20)).unwrap();
    let run = |stored: usize| {
        let (mut tally, no_noise) = (Tally::new(&chain.adapters), |_| unreachable!());
        let start = flops();
        let mut trajectory = sample(&denoiser, &plan, x_t.clone(), no_noise, stored, &mut tally.ledger).unwrap();
        let there = flops();
        differentiate(&denoiser, &plan, &mut trajectory, Some(&x_t), &mut [], &mut tally).unwrap();
        (there - start, flops() - there)
    };
    let (_, evaluated) = run(0);
    let (rollout, stored) = run(STEPS);
    assert!(rollout > 0 && stored > 0);
    assert_eq!(evaluated - stored, rollout);
    assert_eq!(evaluated - run(1).1, rollout / STEPS as u64);
}

/// To the last operation: a cosine multiplies no matrices beyond its tower's, so beside another reward on that tower it costs
/// nothing, and it would cost all of its own.
#[test]
fn two_rewards_on_one_tower_run_it_once_there_and_back() {
    let _alone = alone();
    let tokenizer = Pipeline::load(&ModelConfig::at(text(fixture("tiny-sd15/model")))).unwrap().tokenizer;
    let clip = text(fixture("tiny-sd15/clip"));
    // the weights of the head and of the cosine; `None`: not there
    let rewards = |head: Option<f64>, cosine: Option<f64>, cosine_preprocess| {
        let config = RewardsConfig {
            aesthetic: head.map(|weight| AestheticConfig { weight, ..aesthetic().aesthetic.unwrap() }),
            clip_score: cosine.map(|weight| ClipScoreConfig {
                weight,
                model: clip.clone(),
                preprocess: cosine_preprocess,
                ..Default::default()
            }),
            ..Default::default()
        };
        Rewards::load(&config, &tokenizer).unwrap()
    };
    let blocks = Noise::new(1).normal_batch(Stream::Latents, 0, 0..2, (3, 12, 10)).unwrap();
    let images = (blocks.upsample_nearest2d(48, 40).unwrap() * 0.4).unwrap();
    let prompts = Chain::prompts(2);
    // operations there, back, and of scores alone; the gradient
    let count = |rewards: &Rewards| {
        rewards.scores(&images, &prompts).unwrap(); // embeds the prompts, once and for all
        let start = flops();
        let judged = rewards.judge(&images, &prompts, &mut Ledger::default()).unwrap();
        let there = flops();
        let d_images = judged.pull(2.0).unwrap();
        let back = flops();
        rewards.scores(&images, &prompts).unwrap();
        ([there - start, back - there, flops() - back], d_images)
    };
    let same = Preprocess::Alignprop;
    let (head, d_head) = count(&rewards(Some(0.1), None, same));
    let (tower, d_cosine) = count(&rewards(None, Some(2.0), same));
    let (both, d_both) = count(&rewards(Some(0.1), Some(2.0), same));
    eprintln!("[there, back, scores]: head {head:?}, cosine {tower:?}, both {both:?}");
    assert!(tower.iter().all(|operations| *operations > 1_000_000), "{tower:?}");
    assert_eq!(both, head);
    let sum = (d_head + d_cosine).unwrap();
    let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let error = norm(&(&d_both - &sum).unwrap()) / norm(&sum);
    assert!(error < 1e-5, "{error}"); // sums in another order

    // what is not trained reads the tower's features and is not on the tape
    assert_eq!(count(&rewards(Some(0.1), Some(0.0), same)).0, head);
    let untrained_head = count(&rewards(Some(0.0), Some(2.0), same)).0;
    assert_eq!(untrained_head, [head[0], tower[1], head[2]]);
    // other pixels are another run of the tower
    let (apart, _) = count(&rewards(None, Some(2.0), Preprocess::Squash));
    let (two, _) = count(&rewards(Some(0.1), Some(2.0), Preprocess::Squash));
    assert_eq!(two, [0, 1, 2].map(|i| head[i] + apart[i]));
}

/// In f16 an overflow costs a backward pass and not the rollout, of which there are many steps here to one that is
/// differentiated.
#[test]
fn an_overflow_in_f16_repeats_the_backward_pass_alone() {
    let _alone = alone();
    let compute = Compute::open_any("cpu", Some(Precision::F16), false).unwrap();
    let settings = ["truncation.k=1", "train.batch_size=1", "train.steps=1"].map(String::from);
    let config = &Config::parse(include_str!("../configs/emoji.toml"), "emoji.toml", &settings).unwrap();
    let sampler = &Sampler::load(&config.model, &config.sampler, &compute).unwrap();
    let rewards = &Rewards::load_on(&config.reward, &sampler.pipeline.tokenizer, &compute).unwrap();
    let (prompts, noise) = (&config.prompts.load().unwrap(), Noise::new(1));
    let start = begin(config, sampler, &noise).unwrap();
    let plan = &RunPlan::resolve(config, sampler, rewards, &prompts[0], &start.adapters).unwrap();
    let setup = Setup { config, plan, sampler, rewards, prompts, noise };
    // the operations of a step that begins with this loss scale, and the scale that it ends with
    let step = |scale: f64| {
        let mut state = start.clone();
        state.loss_scale = serde_json::from_str(&format!("{{\"scale\": {scale:?}, \"good_steps\": 0}}")).unwrap();
        let before = flops();
        setup.step(&mut state, 1e-3, |_| ()).unwrap();
        ((flops() - before) as f64, state.loss_scale.unwrap().get())
    };
    let (without, scale) = step(65536.0);
    assert_eq!(scale, 65536.0);
    let (with, scale) = step(f64::powi(2.0, 60));
    let overflows = 60.0 - scale.log2();
    eprintln!("{:.1} Mflop, {:.1} with {overflows} overflows", without / 1e6, with / 1e6);
    assert!(overflows >= 5.0, "{overflows}");
    assert!(with > without && with < without * (1.0 + 0.3 * overflows), "{without}, {with}");
}

/// The peak of a whole `train`, models included.
fn train_peak(settings: &[&str]) -> f64 {
    let settings = [&["train.steps=1", "run.save_every=0", "train.checkpointing=step"], settings].concat();
    peak(|| {
        Experiment::trained(&settings);
    })
}

#[test]
fn training_needs_the_same_memory_for_any_number_of_steps_and_micro_batches() {
    let _alone = alone();
    let fixed = |k: &'static str, steps: &'static str| ["truncation.rule=fixed", k, steps];
    let one = train_peak(&fixed("truncation.k=1", "sampler.num_inference_steps=4"));
    let all = train_peak(&fixed("truncation.k=4", "sampler.num_inference_steps=4"));
    assert_flat("1 and 4 differentiated steps", one, all);
    let long = train_peak(&fixed("truncation.k=8", "sampler.num_inference_steps=8"));
    assert_flat("1 of 4 steps and 8 of 8", one, long);
    let accumulated = train_peak(&["train.gradient_accumulation_steps=4"]);
    assert_flat("1 and 4 micro-batches", train_peak(&["train.gradient_accumulation_steps=1"]), accumulated);
    let repeated = |n| train_peak(&["truncation.rule=draft-lv", n]);
    assert_flat("1 and 4 repetitions", repeated("truncation.n=1"), repeated("truncation.n=4"));
    let steps = |n| train_peak(&["sampler.num_inference_steps=2", n]);
    assert_flat("1 and 4 optimizer steps", steps("train.steps=1"), steps("train.steps=4"));
}
