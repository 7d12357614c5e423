//! The parts of an optimizer step and the whole of it, at the shapes of `tools/compare_cpu.py`.
//!
//! `cargo bench --bench step`; the rate is 10⁹ floating point operations a second, as the products count them.

use alignprop::allocator::{Allocator, keep_pages};
use alignprop::cli::{Cli, Command};
use alignprop::commands::bench::Work;
use alignprop::config::Prompt;
use alignprop::nn::lora::LoraGradients;
use alignprop::ops::device::Compute;
use alignprop::ops::{Ledger, flops};
use clap::Parser;
use divan::Bencher;
use divan::counter::ItemsCount;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() {
    keep_pages();
    println!("peak of matrix products: {:.0} GFLOP/s", alignprop::ops::matmul_peak(1536, 5) / 1e9);
    divan::main();
}

/// Arguments of `alignprop bench`.
const WORK: [(&str, &str); 3] = [
    ("emoji", "--model assets/emoji-sd --clip assets/emoji-clip --batch 4 --steps 20 --backprop-steps 5"),
    ("sd15-quarter", "--arch sd15-quarter --random-weights --size 256x256 --steps 10 --backprop-steps 2"),
    ("sd15", "--arch sd15 --random-weights --size 256x256 --steps 2 --backprop-steps 1"),
];
const NAMES: [&str; 3] = [WORK[0].0, WORK[1].0, WORK[2].0];

fn load(name: &str) -> Work {
    let arguments = WORK.iter().find(|work| work.0 == name).expect("one of the names").1;
    let cli = Cli::parse_from(["alignprop", "bench"].into_iter().chain(arguments.split(' ')));
    let Command::Bench(arguments) = cli.command else { unreachable!("it says bench") };
    Work::load(&arguments, &Compute::cpu()).unwrap()
}

/// Runs `part` over and over beside its operations a second.
fn measure<T>(bencher: Bencher, mut part: impl FnMut() -> T) {
    let before = flops();
    part();
    bencher.counter(ItemsCount::new(flops() - before)).bench_local(part);
}

/// One evaluation for the whole batch, both branches of guidance.
#[divan::bench(args = NAMES, sample_count = 10)]
fn unet_forward(bencher: Bencher, name: &str) {
    let work = load(name);
    let (x, t) = (work.latents(0).unwrap(), work.plan.steps[0].timestep);
    let denoiser = work.denoiser();
    measure(bencher, || denoiser.predict(&x, t).unwrap());
}

/// The same, recorded and pulled back.
#[divan::bench(args = NAMES, sample_count = 5)]
fn unet_forward_and_backward(bencher: Bencher, name: &str) {
    let work = load(name);
    let (x, t) = (work.latents(0).unwrap(), work.plan.steps[0].timestep);
    let denoiser = work.denoiser();
    measure(bencher, || {
        let mut gradients = LoraGradients::new(&work.adapters);
        denoiser.record(&x, t).unwrap().pull(&x, &mut gradients).unwrap()
    });
}

/// One image.
#[divan::bench(args = NAMES, sample_count = 10)]
fn vae_forward(bencher: Bencher, name: &str) {
    let work = load(name);
    let x = work.latents(0).unwrap().narrow(0, 0, 1).unwrap();
    measure(bencher, || work.subject.vae.decode(&x).unwrap());
}

/// One image there and back.
#[divan::bench(args = NAMES, sample_count = 5)]
fn vae_forward_and_backward(bencher: Bencher, name: &str) {
    let work = load(name);
    let x = work.latents(0).unwrap().narrow(0, 0, 1).unwrap();
    let cotangent = work.subject.vae.decode(&x).unwrap();
    measure(bencher, || work.subject.vae.trace(&x, Default::default()).unwrap().pull(&cotangent).unwrap());
}

/// The score of one image.
#[divan::bench(args = NAMES, sample_count = 10)]
fn reward_forward(bencher: Bencher, name: &str) {
    let work = load(name);
    let image = work.subject.vae.decode(&work.latents(0).unwrap().narrow(0, 0, 1).unwrap()).unwrap();
    let prompts = [Prompt::from("")];
    measure(bencher, || work.subject.rewards.scores(&image, &prompts).unwrap());
}

/// The score of one image and its gradient.
#[divan::bench(args = NAMES, sample_count = 5)]
fn reward_forward_and_backward(bencher: Bencher, name: &str) {
    let work = load(name);
    let image = work.subject.vae.decode(&work.latents(0).unwrap().narrow(0, 0, 1).unwrap()).unwrap();
    let prompts = [Prompt::from("")];
    measure(bencher, || {
        let judged = work.subject.rewards.judge(&image, &prompts, &mut Ledger::default()).unwrap();
        judged.pull(1.0).unwrap()
    });
}

/// Rollout, VAE, reward, backward, AdamW.
#[divan::bench(args = NAMES, sample_count = 3)]
fn optimizer_step(bencher: Bencher, name: &str) {
    let mut work = load(name);
    let mut number = 0;
    measure(bencher, || {
        number += 1;
        work.step(number, |_| Ok(())).unwrap();
    });
}
