//! `alignprop bench`: one optimizer step, timed by its phases.

use std::time::Instant;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use serde::Serialize;

use crate::cli::{Architecture, BenchArgs};
use crate::config::{ModelConfig, OptimizerConfig, Precision};
use crate::diffusion::{DdimSchedule, Noise, SchedulerConfig, Stream};
use crate::lora::Adapters;
use crate::models::clip::Clip;
use crate::models::unet::{PerBlock, Unet, UnetConfig};
use crate::models::vae::{Vae, VaeConfig};
use crate::models::{Source, Weights};
use crate::nn::lora::LoraGradients;
use crate::ops::device::Compute;
use crate::ops::linear::{Weight, linear_fwd};
use crate::ops::{flops, matmul_peak};
use crate::optim::{AdamW, clip_grad_norm};
use crate::rewards::Rewards;
use crate::training::loss_scale::{LossScale, unscale};
use crate::training::memory::{self, Meter, Parts};
use crate::training::{Plan, Prompting, backprop, reward_cotangent, rollout};

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
    size: [usize; 2],
    batch: usize,
    steps: usize,
    backprop_steps: usize,
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
    ensure!(
        args.backprop_steps <= args.steps,
        "--backprop-steps {} is more than --steps {}",
        args.backprop_steps,
        args.steps
    );
    let compute = &Compute::open(&args.device, args.precision, args.allow_tf32)?;
    let matmul_gflops = peak_gflops(compute)?;
    let meter = Meter::of(compute);
    let subject = Subject::load(args, compute)?;
    let (channels, h, w) = subject.latent_shape;
    let noise = Noise::new(0);
    let plan = Plan::with_mask(
        &subject.schedule,
        &(0..args.steps).map(|i| i + args.backprop_steps >= args.steps).collect::<Vec<_>>(),
        args.batch,
    );
    let embeds = |stream| {
        compute.put(&noise.normal_batch(stream, 0, 0..args.batch as u64, (1, 77, subject.context))?.squeeze(1)?)
    };
    let prompting = Prompting {
        prompt_embeds: embeds(Stream::Prompts)?,
        negative_prompt_embeds: embeds(Stream::Renoise)?,
        guidance_scale: args.cfg,
    };
    let prompts = vec![String::new(); args.batch];
    let targets = ["to_q", "to_k", "to_v", "to_out.0"].map(String::from);
    let normal = |i: usize, n: usize| noise.normal(Stream::LoraInit, 0, i as u64, n);
    let mut adapters = Adapters::init(&subject.unet.targets(), &targets, args.rank, args.rank as f64, normal)?;
    adapters = adapters.to_device(compute.device())?;
    let loss_scale = LossScale::new(compute.dtype()).map_or(1.0, |scale| scale.get());
    let mut optimizer = AdamW::new(&OptimizerConfig::default(), &adapters.tensors())?;

    let parts = Parts {
        unet: &subject.unet,
        vae: &subject.vae,
        rewards: &subject.rewards,
        adapters: &adapters,
        prompting: &prompting,
        timestep: plan.steps[0].timestep,
        latent_shape: subject.latent_shape,
        steps: args.steps,
    };
    let estimate = parts.estimate(&parts.measure(args.checkpointing)?, args.batch).total();
    memory::release();
    meter.reset_peak()?;

    let mut runs = Vec::with_capacity(args.reps);
    for repetition in 0..=args.reps {
        let x_t = noise.normal_batch(Stream::Latents, repetition as u64, 0..args.batch as u64, (channels, h, w))?;
        let x_t = x_t.to_device(compute.device())?;
        compute.synchronize()?;
        let mut phases = Phases::default();
        let (start, mut lap, mut count) = (Instant::now(), Instant::now(), flops());
        let mut mark = |phase: usize| -> Result<()> {
            compute.synchronize()?;
            phases.seconds[phase] += lap.elapsed().as_secs_f64();
            phases.flops[phase] += flops() - count;
            (lap, count) = (Instant::now(), flops());
            Ok(())
        };
        let (first, kept) = plan.steps.split_at(args.steps - args.backprop_steps);
        let no_noise = |_| anyhow::bail!("eta is 0");
        let mut trajectory = rollout(&subject.unet, first, x_t, &prompting, &adapters, no_noise)?;
        mark(0)?;
        let last = rollout(&subject.unet, kept, trajectory.latents, &prompting, &adapters, no_noise)?;
        trajectory.inputs.extend(last.inputs);
        trajectory.latents = last.latents;
        memory::release();
        mark(1)?;
        let credit = reward_cotangent(
            &subject.vae,
            &subject.rewards,
            &trajectory.latents,
            &prompts,
            loss_scale * 0.01 / args.batch as f64,
            args.checkpointing,
        )?;
        memory::release();
        mark(2)?;
        let mut sum = LoraGradients::new(&adapters);
        backprop(
            &subject.unet,
            &adapters,
            &trajectory,
            &plan,
            &prompting,
            &credit.d_latents,
            args.checkpointing,
            &mut sum,
        )?;
        let mut gradients = sum.finish(&adapters)?;
        unscale(&mut gradients, loss_scale)?;
        clip_grad_norm(&mut gradients, 5.0)?;
        let updated = optimizer.update(&adapters.tensors(), &gradients, 1e-3)?;
        adapters = adapters.with_tensors(updated)?;
        memory::release();
        mark(3)?;
        phases.total = start.elapsed().as_secs_f64();
        if repetition > 0 {
            runs.push(phases); // the first one warms the caches
        }
    }
    let median = |value: &dyn Fn(&Phases) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
    };
    let tflop = |phase: usize| median(&|p| p.flops[phase] as f64) / 1e12;
    let step_s = median(&|p| p.total);
    let report = Report {
        model: subject.name,
        device: compute.gpu_name().unwrap_or_else(|| "cpu".to_owned()),
        dtype: match compute.precision() {
            Precision::F32 => "float32",
            Precision::Bf16 => "bfloat16",
            Precision::F16 => "float16",
        },
        size: [h * subject.vae.factor(), w * subject.vae.factor()],
        batch: args.batch,
        steps: args.steps,
        backprop_steps: args.backprop_steps,
        step_s,
        rollout_s: median(&|p| p.seconds[0]),
        kept_steps_s: median(&|p| p.seconds[1]),
        reward_s: median(&|p| p.seconds[2]),
        backprop_s: median(&|p| p.seconds[3]),
        peak_mib: meter.held().map(|bytes| mib(bytes) as u64),
        allocated_mib: mib(meter.peak()? as f64),
        estimated_mib: mib(estimate),
        trainable: adapters.parameter_count(),
        rollout_tflop: tflop(0),
        kept_steps_tflop: tflop(1),
        reward_tflop: tflop(2),
        backprop_tflop: tflop(3),
        matmul_gflops,
        share_of_peak: (0..4).map(tflop).sum::<f64>() * 1e3 / matmul_gflops / step_s,
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!(
            "{} {}x{}, batch {}, {} steps, {} back, {} on {}",
            report.model,
            report.size[0],
            report.size[1],
            report.batch,
            report.steps,
            report.backprop_steps,
            report.dtype,
            if compute.device().is_cpu() { "the CPU" } else { &report.device }
        );
        for (phase, seconds, tflop) in [
            ("rollout", report.rollout_s, report.rollout_tflop),
            ("kept steps", report.kept_steps_s, report.kept_steps_tflop),
            ("VAE and reward", report.reward_s, report.reward_tflop),
            ("backprop", report.backprop_s, report.backprop_tflop),
        ] {
            println!("{phase:<15} {seconds:8.3} s  {tflop:7.3} TFLOP  {:6.0} GFLOP/s", tflop * 1e3 / seconds);
        }
        println!(
            "{:<15} {step_s:8.3} s  {:.0}% of this device's {matmul_gflops:.0} GFLOP/s in matrix products",
            "step",
            100.0 * report.share_of_peak
        );
        if let Some(peak) = report.peak_mib {
            println!("{:<15} {peak:8} MiB", "peak memory");
        }
        println!(
            "{:<15} {:8.0} MiB at the peak, {:.0} MiB estimated (ratio {:.2})",
            "allocated",
            report.allocated_mib,
            report.estimated_mib,
            report.estimated_mib / report.allocated_mib
        );
    }
    Ok(())
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

/// What is measured.
struct Subject {
    name: String,
    unet: Unet,
    vae: Vae,
    rewards: Rewards,
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
        let in_f32 = compute.in_f32();
        let clip = match &args.clip {
            Some(path) => Clip::load_transformers(&Source::open(path)?, false, &in_f32)?,
            None => Clip::vit_l_14_vision(&random.pp("clip").on(&in_f32))?,
        };
        let rewards = Rewards::aesthetic_shapes(clip, &random.pp("head").on(&in_f32), 10.0)?;
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
