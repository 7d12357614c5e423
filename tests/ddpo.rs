//! Policy gradients: the objective against differences of itself, rounds that are resumed, and a policy that learns.

mod support;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use alignprop::commands::verify::verify;
use alignprop::config::{Config, Precision, Prompt};
use alignprop::diffusion::{DdimSchedule, SchedulerConfig};
use alignprop::lora::{Adapters, formats};
use alignprop::ops::device::Compute;
use alignprop::ops::{Ledger, Number};
use alignprop::rewards::{Score, TapedImages};
use alignprop::sampling::Trajectory;
use alignprop::training::Plan;
use alignprop::training::checkpoint::Checkpoint;
use alignprop::training::ddpo::{Chain, densities};
use alignprop::training::health::is_not_a_number;
use alignprop::training::step::{Tally, differentiate};
use alignprop::training::terms::{ClippedObjective, KlTerm, Ratio, StepTerm};
use candle_core::{DType, Tensor};
use support::lab::{Lab, Red, along, difference, direction, moved};
use support::*;

/// An experiment in which DDPO has all that chance decides: two updates, two inner epochs, two of three steps.
const DDPO: [&str; 10] = [
    "method.kind=ddpo",
    "method.updates=2",
    "method.inner_epochs=2",
    "method.timestep_fraction=0.7",
    "method.buffer_size=3",
    "method.min_count=2",
    "sampler.eta=1",
    "optimizer.loss_coeff=1",
    "train.batch_size=2",
    "train.gradient_accumulation_steps=2",
];

fn ddpo<'a>(more: &[&'a str]) -> Vec<&'a str> {
    DDPO.into_iter().chain(more.iter().copied()).collect()
}

// ---------------------------------------------------------------------------------------------------- the objective

/// The gradient of clipped objective and KL term at adapters away from those that sampled, against differences of the loss
/// as it is written down; some samples' steps are cut by the clip.
#[test]
fn the_objectives_gradient_is_its_derivative() {
    let lab = Lab::new(&ddpo(&[]), &Compute::cpu(), Red);
    let schedule = &lab.sampler.schedule;
    let chain = Chain::of(&lab.policy(), schedule, 0).unwrap();
    let (batch, steps) = (3, chain.steps.len());
    let start = &lab.start.adapters;
    let sampled_by = moved(start, &direction(start, 1), 0.1);
    let (adapters, base) = (moved(&sampled_by, &direction(start, 2), 0.02), Adapters::default());
    let noise = lab.sampler.training_noise(&lab.noise, 0, 0..batch as u64);
    let ((trajectory, old), readings) = Ledger::around(|ledger| {
        let x_t = noise.initial_latents()?;
        let trajectory =
            lab.denoiser(&sampled_by).rollout(&chain.steps, x_t, |i| noise.of_step(i), |_| false, ledger)?;
        let old = densities(&chain, &trajectory, ledger)?;
        Ok((trajectory, old))
    })
    .unwrap();
    let old: Vec<Vec<f64>> = old.iter().map(|row| row.iter().map(|number| readings.get(*number)).collect()).collect();
    let latents = trajectory.into_latents();

    let predictions = |adapters: &Adapters| -> Vec<Tensor> {
        let denoiser = lab.denoiser(adapters);
        chain.steps.iter().zip(&latents).map(|(step, x)| denoiser.predict(x, step.timestep).unwrap()).collect()
    };
    let ratios = |adapters: &Adapters| -> Vec<Vec<f64>> {
        let of = |(i, out): (usize, Tensor)| {
            let step = &chain.steps[i];
            let new = step.log_prob(&step.noise_of(&latents[i], &out, &latents[i + 1]).unwrap()).unwrap();
            new.to_vec1::<f64>().unwrap().iter().zip(&old[i]).map(|(new, old)| (new - old).exp()).collect()
        };
        predictions(adapters).into_iter().enumerate().map(of).collect()
    };
    let mut from_one: Vec<f64> = ratios(&adapters).concat().iter().map(|ratio| (ratio - 1.0).abs()).collect();
    from_one.sort_by(f64::total_cmp);
    // a clip in the widest gap of the middle of nine ratios
    let middle = (2..6).max_by(|i, j| {
        let gap = |i: usize| from_one[i + 1] - from_one[i];
        gap(*i).total_cmp(&gap(*j))
    });
    let clip_range = (from_one[middle.unwrap()] + from_one[middle.unwrap() + 1]) / 2.0;
    let (advantages, kl_weight) = ([1.0, -0.7, -2.0], 0.3);
    let of_base = predictions(&base);
    let loss = |adapters: &Adapters| -> f64 {
        let mut sum = 0.0;
        for (i, out) in predictions(adapters).into_iter().enumerate() {
            let step = &chain.steps[i];
            let apart = ((out - &of_base[i]).unwrap().to_dtype(DType::F64).unwrap() * step.model_output).unwrap();
            let squares = apart.sqr().unwrap().flatten_from(1).unwrap().mean(1).unwrap().to_vec1::<f64>().unwrap();
            sum += squares.iter().map(|square| kl_weight * square / (2.0 * step.noise * step.noise)).sum::<f64>();
        }
        for row in ratios(adapters) {
            sum += row.iter().zip(advantages).map(|(ratio, a)| Ratio::loss(*ratio, a, clip_range).0).sum::<f64>();
        }
        sum / (steps * batch) as f64
    };

    let keep = vec![vec![true; batch]; steps];
    let plan = Plan { steps: chain.steps.clone(), keep, detach_input: false, renoise: 0 };
    for ledger in [Ledger::default(), Ledger::always_later()] {
        let mut tally = Tally { ledger, ..Tally::new(&adapters) };
        let mut objective = ClippedObjective {
            scale: 1.0 / (steps * batch) as f64,
            clip_range,
            advantages: &advantages,
            log_probs: &old,
            ratios: Vec::new(),
        };
        let mut kl = KlTerm::of_densities(kl_weight / batch as f64, &plan);
        let mut terms: [&mut dyn StepTerm; 2] = [&mut objective, &mut kl];
        let mut trajectory = Trajectory::of_latents(latents.clone());
        differentiate(&lab.denoiser(&adapters), &plan, &mut trajectory, None, &mut terms, &mut tally).unwrap();
        let gradients = tally.take_gradients(&adapters).unwrap();
        let readings = tally.ledger.read().unwrap();
        let expected = ratios(&adapters);
        let cut = |ratio: &&Ratio| Ratio::loss(readings.get(ratio.value), advantages[ratio.row], clip_range).1;
        assert!((1..9).contains(&objective.ratios.iter().filter(cut).count()), "nothing or all is cut");
        for ratio in &objective.ratios {
            assert!((readings.get(ratio.value) - expected[ratio.index][ratio.row]).abs() < 1e-6);
        }
        for number in [3, 4] {
            let direction = direction(&adapters, number);
            let along = along(&gradients, &direction);
            // so small a step that no ratio crosses the clip
            let difference = difference(2e-4, |by| loss(&moved(&adapters, &direction, by)));
            eprintln!("{along:.6e} by the backward pass, {difference:.6e} by differences");
            assert!((along - difference).abs() < 5e-3 * difference.abs(), "{along} and {difference}");
        }
    }
}

/// The chain of a window is deterministic outside, and what has no density is not trained.
#[test]
fn steps_without_a_density_are_left_out() {
    let policy = |settings: &[&str]| {
        let settings: Vec<String> =
            settings.iter().chain(&["sampler.eta=1", "train.batch_size=2"]).map(|set| (*set).to_owned()).collect();
        Config::parse("", "test", &settings).unwrap().method.policy().unwrap()
    };
    let schedule = |set_alpha_to_one| {
        let config = SchedulerConfig { set_alpha_to_one, ..SchedulerConfig::stable_diffusion() };
        DdimSchedule::new(&config, 5, 1.0).unwrap()
    };
    let trained = |settings: &[&str], set_alpha_to_one, round| {
        Chain::of(&policy(settings), &schedule(set_alpha_to_one), round).map(|chain| chain.trained)
    };
    assert_eq!(trained(&["method.kind=ddpo"], false, 0).unwrap(), [0, 1, 2, 3, 4]);
    // the last step goes to an image without noise
    assert_eq!(trained(&["method.kind=ddpo"], true, 0).unwrap(), [0, 1, 2, 3]);
    assert_eq!(trained(&["method.kind=ddpo", "method.drop_last=true"], false, 0).unwrap(), [0, 1, 2, 3]);
    let window = ["method.kind=grpo", "method.group_size=2", "method.window={ size = 2, every = 1 }"];
    assert_eq!(trained(&window, false, 1).unwrap(), [1, 2]);
    let chain = Chain::of(&policy(&window), &schedule(false), 1).unwrap();
    let noise: Vec<bool> = chain.steps.iter().map(|step| step.noise > 0.0).collect();
    assert_eq!(noise, [false, true, true, false, false]);
    let deterministic = DdimSchedule::new(&SchedulerConfig::stable_diffusion(), 5, 0.0).unwrap();
    assert_eq!(chain.steps[3], deterministic.steps()[3]);
    let last = ["method.kind=grpo", "method.group_size=2", "method.window={ size = 1, every = 1 }"];
    assert!(trained(&last, false, 9).unwrap_err().to_string().starts_with("no denoising step is left to train"));
}

/// The larger sets, which are not part of the repository.
#[test]
fn the_reference_set_of_policies_beside_the_repository_is_reproduced() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/reference/policy");
    if !dir.is_dir() {
        eprintln!("skipped: there is no {}", dir.display());
        return;
    }
    let report = verify(&dir, None).unwrap();
    let failed: Vec<String> =
        report.rows.iter().filter(|row| !row.pass).map(|row| format!("{}: {}", row.case, row.what)).collect();
    assert!(report.passed() && report.skipped.is_empty(), "{failed:?} {:?}", report.skipped);
    let cases = "trajectory,advantages,is_common,is_per_sample,is_kl,is_grpo,sf,update 2,rwr_all,rwr_prompt,rwr-sparse 5,\
                 rsa_aesthetic_rho0.01,rsa_hps_rho1.0,adjoint,adjoint_kept";
    for case in cases.split(',') {
        assert!(report.rows.iter().any(|row| row.case == case), "{case}");
    }
}

// ---------------------------------------------------------------------------------------------------- runs

fn statistics(run: &Experiment, step: usize) -> Vec<u8> {
    fs::read(run.checkpoint(step).join("statistics.safetensors")).unwrap()
}

fn assert_same_run(one: &Experiment, other: &Experiment, step: usize) {
    for file in ["pytorch_lora_weights.safetensors", "optimizer.safetensors", "state.json"] {
        // the moments are written in no order
        if file.starts_with("optimizer") {
            let numbers = |run: &Experiment| -> Vec<Vec<f32>> { run.moments(step).values().map(numbers).collect() };
            assert!(numbers(one) == numbers(other), "the moments differ");
        } else {
            let read = |run: &Experiment| fs::read(run.checkpoint(step).join(file)).unwrap();
            assert!(read(one) == read(other), "{file} differs");
        }
    }
    assert_eq!(one.metrics(), other.metrics());
}

#[test]
fn two_rounds_and_two_more_are_four() {
    let whole = Experiment::trained(&ddpo(&["train.steps=4", "run.sample_every=2", "regularization.ema_decay=0.5"]));
    let parts = Experiment::trained(&ddpo(&["train.steps=2", "run.sample_every=2", "regularization.ema_decay=0.5"]));
    parts.resume(&["train.steps=4"]).unwrap();
    assert_same_run(&whole, &parts, 4);
    assert_eq!(statistics(&whole, 4).len(), statistics(&parts, 4).len());
    // four updates a round
    let state: serde_json::Value =
        serde_json::from_slice(&fs::read(whole.checkpoint(4).join("state.json")).unwrap()).unwrap();
    assert_eq!((state["step"].as_u64(), state["optimizer_step"].as_u64()), (Some(4), Some(16)));
    assert!(whole.metric("policy/ratio_spread").iter().all(|spread| *spread > 0.0 && *spread < 1.0));
    assert!(whole.metric("backprop_steps").iter().all(|steps| *steps == 2.0));
    // the statistics are what the third round begins with: without them it is another one
    let forgetful =
        Experiment::trained(&ddpo(&["train.steps=2", "run.sample_every=2", "regularization.ema_decay=0.5"]));
    fs::remove_file(forgetful.checkpoint(2).join("statistics.safetensors")).unwrap();
    forgetful.resume(&["train.steps=4"]).unwrap();
    assert_ne!(forgetful.metric("grad_norm"), whole.metric("grad_norm"));
    // and what is no list of rewards is named
    let damaged = Experiment::trained(&ddpo(&["train.steps=1"]));
    fs::copy(damaged.lora_file(1), damaged.checkpoint(1).join("statistics.safetensors")).unwrap();
    let error = format!("{:#}", damaged.resume(&["train.steps=2"]).unwrap_err());
    assert!(error.contains("statistics.safetensors is damaged") && error.contains("step-000001"), "{error}");
}

#[test]
fn another_split_into_micro_batches_is_the_same_round() {
    // near the sign of the gradient, which rounding may flip, AdamW would not be
    let run =
        |split: [&str; 2]| Experiment::trained(&[&ddpo(&["train.steps=1", "optimizer.eps=1e-2"])[..], &split].concat());
    let at_once = run(["train.batch_size=4", "train.gradient_accumulation_steps=1"]);
    let parts = run(["train.batch_size=1", "train.gradient_accumulation_steps=4"]);
    let apart = distance(&parts.moments(1), &at_once.moments(1));
    assert!(apart < 1e-3, "{apart}");
    for name in ["reward/aesthetic", "grad_norm"] {
        let (x, y) = (parts.metric(name)[0], at_once.metric(name)[0]);
        assert!((x / y - 1.0).abs() < 1e-3, "{name}: {x} and {y}");
    }
}

#[test]
fn with_one_update_the_ratios_are_one() {
    let one = Experiment::trained(&ddpo(&["method.updates=1", "method.inner_epochs=1"]));
    let spread = one.metric("policy/ratio_spread");
    assert!(spread.len() == 2 && spread.iter().all(|spread| *spread < 1e-6), "{spread:?}");
    assert_eq!(one.metric("policy/outside_clip"), [0.0, 0.0]);
    assert!(one.metric("grad_norm").iter().all(|norm| *norm > 0.0));
    let metadata = formats::load(&one.lora_file(2)).unwrap().metadata;
    assert!(metadata["method"].starts_with(r#"kind = "ddpo", updates = 1"#), "{metadata:?}");
    assert!(!metadata.contains_key("truncation"));
}

/// With almost no noise in the steps, images that begin with the same noise are the same.
#[test]
fn a_group_shares_its_prompt_and_on_request_its_noise() {
    let spread = |settings: &[&str]| {
        let grpo =
            ["method.kind=grpo", "method.group_size=4", "sampler.eta=1e-6", "train.batch_size=4", "train.steps=1"];
        Experiment::trained(&[&grpo, settings].concat()).metric("reward/aesthetic_std")[0]
    };
    let (shared, own) = (spread(&[]), spread(&["method.shared_noise=false"]));
    assert!(shared < 1e-4 && own > 1e-3, "{shared} and {own}");
    let two = spread(&["train.gradient_accumulation_steps=2"]);
    // two prompts from one noise differ less than two noises
    assert!(two > 10.0 * shared, "two groups are not one: {two} and {shared}");
}

#[test]
fn grpo_trains_its_window_and_stays_near_the_base_model() {
    let grpo = ["method.kind=grpo", "method.group_size=2", "method.updates=2", "sampler.eta=1", "train.batch_size=4"];
    let window = ["method.window={ size = 1, every = 1 }", "method.drop_last=false", "regularization.kl_weight=0.1"];
    let run = Experiment::trained(&[&grpo[..], &window].concat());
    assert_eq!(run.metric("backprop_steps"), [1.0, 1.0]);
    // the first update starts at the base model, the second has left it
    assert!(run.metric("distance").iter().all(|distance| *distance > 0.0));
    let all = Experiment::trained(&grpo);
    assert_eq!(all.metric("backprop_steps"), [2.0, 2.0]);
}

#[test]
fn a_round_that_meets_no_number_changes_nothing() {
    /// Not a number in the second round.
    struct Fails(AtomicUsize);
    impl Score for Fails {
        fn scores(&self, images: &TapedImages, prompts: &[Prompt], ledger: &mut Ledger) -> anyhow::Result<Vec<Number>> {
            let before = self.0.fetch_add(1, Ordering::Relaxed);
            let scores = Red.scores(images, prompts, ledger)?;
            Ok(if before == 3 { vec![f64::NAN.into(); prompts.len()] } else { scores })
        }
    }
    let lab = Lab::new(&ddpo(&[]), &Compute::cpu(), Fails(AtomicUsize::new(0)));
    let mut state = lab.start.clone();
    lab.step(&mut state).unwrap(); // two micro-batches
    let before = state.clone();
    let error = lab.step(&mut state).err().unwrap();
    assert!(is_not_a_number(&error), "{error:#}");
    assert_eq!((state.step, state.optimizer.step), (before.step, before.optimizer.step));
    assert!(state.statistics == before.statistics);
    let factors = |state: &Checkpoint| -> Vec<Vec<f32>> { state.adapters.tensors().iter().map(numbers).collect() };
    assert!(factors(&state) == factors(&before));
}

/// A score that gives every image the same: there is nothing to learn, and nothing is moved.
#[test]
fn a_flat_score_teaches_nothing() {
    struct Flat;
    impl Score for Flat {
        fn scores(&self, _: &TapedImages, prompts: &[Prompt], _: &mut Ledger) -> anyhow::Result<Vec<Number>> {
            Ok(vec![0.1.into(); prompts.len()])
        }
    }
    let lab = Lab::new(&ddpo(&[]), &Compute::cpu(), Flat);
    let mut state = lab.start.clone();
    let result = lab.step(&mut state).unwrap();
    assert_eq!((result.grad_norm, state.step, state.optimizer.step), (0.0, 1, 0));
}

#[test]
fn a_round_in_half_precision_is_near_that_in_f32() {
    let run = |precision| {
        let compute = Compute::open_any("cpu", Some(precision), false).unwrap();
        // one update: its ratios are 1 but for rounding
        let lab = Lab::new(
            &ddpo(&["method.updates=1", "method.inner_epochs=1", "sampler.guidance_scale=1.5"]),
            &compute,
            Red,
        );
        let mut state = lab.start.clone();
        assert_eq!(state.loss_scale.is_some(), precision == Precision::F16);
        let result = lab.step(&mut state).unwrap();
        let moments = state.optimizer.moments.iter().flat_map(|(m, _)| numbers(m)).collect::<Vec<_>>();
        (result.images[0].scores[0], moments)
    };
    let (score, moments) = run(Precision::F32);
    for (precision, bound) in [(Precision::Bf16, 0.6), (Precision::F16, 0.1)] {
        let (found, found_moments) = run(precision);
        assert!((found - score).abs() < 0.1 * bound, "{precision:?}: {found} for {score}");
        let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let apart = squares(&mut found_moments.iter().zip(&moments).map(|(x, y)| x - y));
        let error = apart / squares(&mut moments.iter().copied());
        assert!(error > 0.0 && error < bound, "{precision:?}: {error}");
    }
}

/// A score without a gradient rises, on noise that the run does not train on.
#[test]
fn a_policy_learns_a_score_without_a_gradient() {
    for kind in [&["method.kind=ddpo", "method.buffer_size=0"][..], &["method.kind=grpo", "method.group_size=8"]] {
        let settings = [
            kind,
            &[
                "method.updates=2",
                "method.clip_range=1e-2",
                "sampler.eta=1",
                "sampler.guidance_scale=1.5",
                "lora.rank=4",
                "optimizer.lr=1e-2",
                "optimizer.loss_coeff=1",
                "optimizer.weight_decay=0",
                "optimizer.max_grad_norm=1",
                "train.batch_size=16",
            ],
        ]
        .concat();
        let lab = Lab::new(&settings, &Compute::cpu(), Red);
        let redness = |adapters: &Adapters| {
            let of = |number: u64| {
                let prompts = [lab.prompts[number as usize % lab.prompts.len()].clone()];
                let noise = lab.sampler.evaluation_noise(5, number..number + 1);
                let image = lab.sampler.draw(&prompts, &noise, adapters, None).unwrap().images;
                lab.rewards.scores(&image, &prompts).unwrap()[0][0]
            };
            (0..24).map(of).collect::<Vec<f64>>()
        };
        let before = redness(&lab.start.adapters);
        let mut state = lab.start.clone();
        for _ in 0..30 {
            lab.step(&mut state).unwrap();
        }
        let after = redness(&state.adapters);
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let pairs: Vec<f64> = after.iter().zip(&before).map(|(x, y)| x - y).collect();
        let error = (pairs.iter().map(|x| (x - mean(&pairs)).powi(2)).sum::<f64>() / (24.0 * 23.0)).sqrt();
        eprintln!("{kind:?}: {:.4} before, {:.4} after; {:.4} ± {error:.4}", mean(&before), mean(&after), mean(&pairs));
        assert!(mean(&pairs) > 4.0 * error, "{kind:?}: {} ± {error}", mean(&pairs));
    }
}
