//! `alignprop bench`: one optimizer step, timed by its phases.

use std::time::Instant;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use serde::Serialize;

use crate::cli::{Architecture, BenchArgs};
use crate::config::{Checkpointing, ModelConfig, OptimizerConfig, Precision, Prompt};
use crate::diffusion::{DdimSchedule, Noise, SchedulerConfig, Stream};
use crate::lora::Adapters;
use crate::models::clip::Clip;
use crate::models::unet::{PerBlock, Unet, UnetConfig};
use crate::models::vae::{Vae, VaeConfig};
use crate::models::{Source, Weights};
use crate::ops::device::{Compute, upload};
use crate::ops::linear::{Weight, linear_fwd};
use crate::ops::{flops, matmul_peak};
use crate::optim::AdamW;
use crate::rewards::Rewards;
use crate::sampling::{Conditioning, Denoiser};
use crate::training::Plan;
use crate::training::loss_scale::LossScale;
use crate::training::memory::{Meter, Parts};
use crate::training::step::{Critic, Tally, credit, differentiate, sample, update};

/// Side of the square product that the CPU's peak is taken from.
const PEAK_SIDE: usize = 1536;
/// And a GPU's: 1.1 TFLOP.
const GPU_PEAK_SIDE: usize = 8192;

#[derive(Serialize)]
struct Report {
    model: String,
    /// `cpu`, or the GPU's name.
    device: String,
    dtype: &'static str,
    /// Of the reward's tower.
    reward_dtype: &'static str,
    size: [usize; 2],
    batch: usize,
    steps: usize,
    backprop_steps: usize,
    stored_steps: usize,
    /// Medians, in seconds.
    step_s: f64,
    /// The steps of the chain whose gradient is not kept.
    rollout_s: f64,
    /// The forward passes of those whose gradient is.
    kept_steps_s: f64,
    reward_s: f64,
    backprop_s: f64,
    /// The most that was held, MiB: the process' resident memory, or what a GPU's allocator took from the device.
    peak_mib: Option<u64>,
    /// The most that was allocated at a time during the steps, MiB, and what `train` would have expected.
    allocated_mib: f64,
    estimated_mib: f64,
    trainable: usize,
    /// Arithmetic of the matrix products, in 10¹² operations.
    rollout_tflop: f64,
    kept_steps_tflop: f64,
    reward_tflop: f64,
    backprop_tflop: f64,
    /// The best matrix product of this device in this number format, operations a second / 10⁹.
    matmul_gflops: f64,
    /// The step's arithmetic at that rate, as a share of its time.
    share_of_peak: f64,
}

/// Seconds and operations of the four phases.
#[derive(Clone, Copy, Default)]
struct Phases {
    seconds: [f64; 4],
    flops: [u64; 4],
    total: f64,
}

pub fn run(args: &BenchArgs) -> Result<()> {
    let compute = &Compute::open(&args.device, args.precision, args.allow_tf32)?
        .with_rewards_in(args.reward_precision)?
        .with_graphs(args.cuda_graphs);
    let matmul_gflops = peak_gflops(compute)?;
    let meter = Meter::of(compute);
    let mut work = Work::load(args, compute)?;
    let estimate = work.estimate()?;
    meter.reset_peak()?;

    let mut runs = Vec::with_capacity(args.reps);
    for repetition in 0..=args.reps {
        let mut phases = Phases::default();
        let (start, mut lap, mut count) = (Instant::now(), Instant::now(), flops());
        work.step(repetition as u64, |phase| {
            compute.synchronize()?;
            phases.seconds[phase] += lap.elapsed().as_secs_f64();
            phases.flops[phase] += flops() - count;
            (lap, count) = (Instant::now(), flops());
            Ok(())
        })?;
        phases.total = start.elapsed().as_secs_f64();
        if repetition > 0 {
            runs.push(phases); // the first one warms the caches
        }
    }
    let subject = &work.subject;
    let (_, h, w) = subject.latent_shape;
    let median = |value: &dyn Fn(&Phases) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
    };
    let tflop = |phase: usize| median(&|p| p.flops[phase] as f64) / 1e12;
    let step_s = median(&|p| p.total);
    let report = Report {
        model: subject.name.clone(),
        device: compute.gpu_name().unwrap_or_else(|| "cpu".to_owned()),
        dtype: torch_name(compute),
        reward_dtype: torch_name(&compute.for_rewards()),
        size: [h * subject.vae.factor(), w * subject.vae.factor()],
        batch: args.batch,
        steps: args.steps,
        backprop_steps: args.backprop_steps,
        stored_steps: work.stored_steps,
        step_s,
        rollout_s: median(&|p| p.seconds[0]),
        kept_steps_s: median(&|p| p.seconds[1]),
        reward_s: median(&|p| p.seconds[2]),
        backprop_s: median(&|p| p.seconds[3]),
        peak_mib: meter.held().map(|bytes| mib(bytes) as u64),
        allocated_mib: mib(meter.peak()? as f64),
        estimated_mib: mib(estimate),
        trainable: work.adapters.parameter_count(),
        rollout_tflop: tflop(0),
        kept_steps_tflop: tflop(1),
        reward_tflop: tflop(2),
        backprop_tflop: tflop(3),
        matmul_gflops,
        share_of_peak: (0..4).map(tflop).sum::<f64>() * 1e3 / matmul_gflops / step_s,
    };
    if args.json {
        say!("{}", serde_json::to_string(&report)?);
    } else {
        say!(
            "{} {}x{}, batch {}, {} steps, {} back, {} (reward {}) on {}",
            report.model,
            report.size[0],
            report.size[1],
            report.batch,
            report.steps,
            report.backprop_steps,
            report.dtype,
            report.reward_dtype,
            if compute.device().is_cpu() { "the CPU" } else { &report.device }
        );
        for (phase, seconds, tflop) in [
            ("rollout", report.rollout_s, report.rollout_tflop),
            ("kept steps", report.kept_steps_s, report.kept_steps_tflop),
            ("VAE and reward", report.reward_s, report.reward_tflop),
            ("backprop", report.backprop_s, report.backprop_tflop),
        ] {
            say!("{phase:<15} {seconds:8.3} s  {tflop:7.3} TFLOP  {:6.0} GFLOP/s", tflop * 1e3 / seconds);
        }
        say!(
            "{:<15} {step_s:8.3} s  {:.0}% of this device's {matmul_gflops:.0} GFLOP/s in matrix products",
            "step",
            100.0 * report.share_of_peak
        );
        if let Some(peak) = report.peak_mib {
            say!("{:<15} {peak:8} MiB", "peak memory");
        }
        say!(
            "{:<15} {:8.0} MiB at the peak, {:.0} MiB estimated (ratio {:.2})",
            "allocated",
            report.allocated_mib,
            report.estimated_mib,
            report.estimated_mib / report.allocated_mib
        );
    }
    Ok(())
}

/// The number format as PyTorch calls it.
fn torch_name(compute: &Compute) -> &'static str {
    match compute.precision() {
        Precision::F32 => "float32",
        Precision::Bf16 => "bfloat16",
        Precision::F16 => "float16",
    }
}

/// The best matrix product of the device as this program reaches it, operations a second / 10⁹.
fn peak_gflops(compute: &Compute) -> Result<f64> {
    if compute.device().is_cpu() {
        return Ok(matmul_peak(PEAK_SIDE, 5) / 1e9);
    }
    let n = GPU_PEAK_SIDE;
    // numbers, not zeros: a GPU's clock falls with the power that its switching takes
    let values = Noise::new(0).normal(Stream::Latents, 0, 0, n);
    let row = compute.put(&Tensor::from_vec(values, (1, n), &Device::Cpu)?)?;
    let matrix = row.broadcast_as((n, n))?.contiguous()?;
    let weight = Weight::new(&matrix)?;
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        compute.synchronize()?;
        let start = Instant::now();
        linear_fwd(&matrix, &weight, None)?;
        compute.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (n as f64).powi(3) / best / 1e9)
}

/// One optimizer step, over and over: the models, what they are asked, and the adapters that are trained.
pub struct Work {
    pub subject: Subject,
    pub plan: Plan,
    pub conditioning: Conditioning,
    pub adapters: Adapters,
    optimizer: AdamW,
    optimizer_config: OptimizerConfig,
    noise: Noise,
    /// Steps of the chain before the first one that keeps its gradient.
    first_kept: usize,
    batch: usize,
    checkpointing: Checkpointing,
    stored_steps: usize,
}

impl Work {
    pub fn load(args: &BenchArgs, compute: &Compute) -> Result<Self> {
        ensure!(
            args.backprop_steps <= args.steps,
            "--backprop-steps {} is more than --steps {}",
            args.backprop_steps,
            args.steps
        );
        let subject = Subject::load(args, compute)?;
        let noise = Noise::new(0);
        let first_kept = args.steps - args.backprop_steps;
        let kept: Vec<bool> = (0..args.steps).map(|i| i >= first_kept).collect();
        let plan = Plan::with_mask(&subject.schedule, &kept, args.batch);
        // text embeddings of any numbers: time and memory do not depend on them
        let embeds = |stream| {
            compute.put(&noise.normal_batch(stream, 0, 0..args.batch as u64, (1, 77, subject.context))?.squeeze(1)?)
        };
        let conditioning = Conditioning::new(embeds(Stream::Prompts)?, embeds(Stream::Renoise)?, args.cfg, compute);
        let targets = ["to_q", "to_k", "to_v", "to_out.0"].map(String::from);
        let normal = |i: usize, n: usize| noise.normal(Stream::LoraInit, 0, i as u64, n);
        let adapters = Adapters::init(&subject.unet.targets(), &targets, args.rank, args.rank as f64, normal)?;
        let adapters = adapters.to_device(compute.device())?;
        let optimizer_config = OptimizerConfig::default();
        Ok(Self {
            plan,
            conditioning,
            optimizer: AdamW::new(&optimizer_config, &adapters.tensors())?,
            adapters,
            optimizer_config,
            noise,
            first_kept,
            batch: args.batch,
            checkpointing: args.checkpointing,
            stored_steps: args.stored_steps.min(args.backprop_steps),
            subject,
        })
    }

    /// The UNet with the adapters as they are now.
    pub fn denoiser(&self) -> Denoiser<'_> {
        Denoiser {
            unet: &self.subject.unet,
            adapters: &self.adapters,
            conditioning: self.conditioning.clone(),
            checkpointing: self.checkpointing,
        }
    }

    /// The decoder and the reward.
    pub fn critic(&self) -> Critic<'_> {
        let Subject { vae, rewards, .. } = &self.subject;
        Critic { vae, rewards, checkpointing: self.checkpointing }
    }

    /// The memory that `train` would expect, in bytes.
    fn estimate(&self) -> Result<f64> {
        let parts = Parts {
            denoiser: self.denoiser(),
            vae: &self.subject.vae,
            rewards: &self.subject.rewards,
            prompt: &Prompt::from(""),
            timestep: self.plan.steps[0].timestep,
            latent_shape: self.subject.latent_shape,
            steps: self.plan.steps.len(),
            differentiates_rewards: true,
            kept_latents: 0,
        };
        Ok(parts.estimate(&parts.measure(self.checkpointing)?, self.batch, self.stored_steps).total())
    }

    /// Noise of the latents' shape, (B, C, h, w).
    pub fn latents(&self, number: u64) -> Result<Tensor> {
        let noise =
            self.noise.normal_batch(Stream::Latents, number, 0..self.batch as u64, self.subject.latent_shape)?;
        Ok(upload(&noise, self.subject.unet.compute().device())?)
    }

    /// One optimizer step; `mark` is told when a phase (0 to 3, as in the report) has ended.
    pub fn step(&mut self, number: u64, mut mark: impl FnMut(usize) -> Result<()>) -> Result<()> {
        let OptimizerConfig { loss_coeff, max_grad_norm, lr, .. } = self.optimizer_config;
        let loss_scale = LossScale::new(self.subject.unet.compute().dtype()).map_or(1.0, |scale| scale.get());
        let mut tally = Tally::scaled(&self.adapters, loss_scale);
        let no_noise = |_| anyhow::bail!("eta is 0");
        let prompts = vec![Prompt::from(""); self.batch];
        let denoiser = self.denoiser();
        // in two parts, so that the steps that keep their gradient have a time of their own
        let (first, kept) = self.plan.split_at(self.first_kept);
        let mut trajectory = sample(&denoiser, &first, self.latents(number)?, no_noise, 0, &mut tally.ledger)?;
        mark(0)?;
        let middle = trajectory.latents().clone();
        trajectory.extend(sample(&denoiser, &kept, middle, no_noise, self.stored_steps, &mut tally.ledger)?);
        mark(1)?;
        let scale = loss_coeff / self.batch as f64;
        let credit = credit(&self.critic(), trajectory.latents(), &prompts, scale, &mut tally)?;
        mark(2)?;
        differentiate(&denoiser, &self.plan, &mut trajectory, Some(&credit.d_latents), &mut [], &mut tally)?;
        let update = update(&mut tally, &self.adapters, &self.optimizer, max_grad_norm, lr)?;
        tally.ledger.read()?;
        drop(trajectory);
        (self.adapters, self.optimizer) = (update.adapters, update.optimizer);
        mark(3)
    }
}

/// What is measured.
pub struct Subject {
    name: String,
    pub unet: Unet,
    pub vae: Vae,
    pub rewards: Rewards,
    schedule: DdimSchedule,
    latent_shape: (usize, usize, usize),
    /// Features of the text embeddings.
    context: usize,
}

impl Subject {
    fn load(args: &BenchArgs, compute: &Compute) -> Result<Self> {
        let random = Weights::random(0).on(compute);
        let schedule = DdimSchedule::new(&SchedulerConfig::stable_diffusion(), args.steps, 0.0)?;
        let (name, unet, vae) = match (&args.model, args.arch) {
            (Some(path), _) => {
                let source = Source::pipeline(&ModelConfig::at(path))?;
                let unet = Unet::load(&source.sub("unet"), None, compute)?;
                (path.clone(), unet, Vae::load(&source.sub("vae"), None, compute)?)
            }
            (None, Some(Architecture::Sd15)) => stable_diffusion_15("sd15", 1, 32, &random)?,
            (None, _) => stable_diffusion_15("sd15-quarter", 4, 16, &random)?,
        };
        let for_rewards = compute.for_rewards();
        let clip = match &args.clip {
            Some(path) => Clip::load_transformers(&Source::open(path)?, false, &for_rewards)?,
            None => Clip::vit_l_14_vision(&random.pp("clip").on(&for_rewards))?,
        };
        let rewards = Rewards::aesthetic_shapes(clip, &random.pp("head").on(&compute.in_f32()), 10.0)?;
        let factor = vae.factor();
        let (height, width) = args.size.unwrap_or_else(|| match &unet.config().sample_size {
            Some(PerBlock::One(side)) => (side * factor, side * factor),
            _ => (512, 512),
        });
        ensure!(
            height % factor == 0 && width % factor == 0 && height > 0 && width > 0,
            "--size {height}x{width}: the sides are multiples of {factor}"
        );
        let context = unet.config().cross_attention_dim.at(0).unwrap_or(768);
        let latent_shape = (unet.config().in_channels, height / factor, width / factor);
        Ok(Self { name, unet, vae, rewards, schedule, latent_shape, context })
    }
}

/// The exact shapes of Stable Diffusion 1.5, its channels divided by `divisor`.
fn stable_diffusion_15(name: &str, divisor: usize, groups: usize, random: &Weights) -> Result<(String, Unet, Vae)> {
    let unet = UnetConfig {
        sample_size: Some(PerBlock::One(64)),
        block_out_channels: [320, 640, 1280, 1280].map(|c| c / divisor).to_vec(),
        cross_attention_dim: PerBlock::One(768),
        norm_num_groups: groups,
        ..Default::default()
    };
    let vae = VaeConfig {
        block_out_channels: [128, 256, 512, 512].map(|c| c / divisor).to_vec(),
        up_block_types: vec!["UpDecoderBlock2D".into(); 4],
        layers_per_block: 2,
        norm_num_groups: groups,
        ..Default::default()
    };
    Ok((name.to_owned(), Unet::new(unet, &random.pp("unet"))?, Vae::new(vae, &random.pp("vae"))?))
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}
