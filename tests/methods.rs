//! Reward-weighted regression, Adjoint Matching and RSA-FT: gradients against differences, runs that are resumed, and what they do.

mod support;

use std::fs;

use alignprop::config::Prompt;
use alignprop::lora::Adapters;
use alignprop::ops::Ledger;
use alignprop::ops::device::Compute;
use alignprop::rewards::Rewards;
use alignprop::sampling::{Denoiser, Trajectory};
use alignprop::training::Plan;
use alignprop::training::adjoint_matching::{MatchingTerm, lean_adjoints};
use alignprop::training::rwr::one_step_each;
use alignprop::training::step::{Tally, differentiate};
use alignprop::training::terms::RegressionTerm;
use candle_core::{DType, Tensor};
use support::lab::{Lab, Red, along, difference, direction, moved};
use support::*;

const RWR: [&str; 7] = [
    "method.kind=rwr",
    "method.updates=2",
    "method.inner_epochs=2",
    "method.inverse_temperature=1",
    "optimizer.loss_coeff=1",
    "train.batch_size=2",
    "train.gradient_accumulation_steps=2",
];
const SPARSE: [&str; 6] = [
    "method.kind=rwr-sparse",
    "method.group_size=4",
    "method.percentile=60",
    "method.inner_epochs=2",
    "optimizer.loss_coeff=1",
    "train.batch_size=4",
];
const ADJOINT: [&str; 6] = [
    "method.kind=adjoint-matching",
    "method.steps=2",
    "method.lambda=10",
    "sampler.eta=1",
    "optimizer.loss_coeff=1",
    "train.batch_size=2",
];

fn denoiser<'a>(lab: &'a Lab, adapters: &'a Adapters, prompts: &[Prompt]) -> Denoiser<'a> {
    let (conditioning, _) = Ledger::around(|ledger| lab.sampler.conditioning(prompts, ledger)).unwrap();
    lab.sampler.denoiser(adapters, conditioning, lab.plan.checkpointing)
}

fn dot(x: &Tensor, y: &Tensor) -> f64 {
    numbers(x).into_iter().zip(numbers(y)).map(|(x, y)| f64::from(x) * f64::from(y)).sum()
}

// ---------------------------------------------------------------------------------------------------- regression

#[test]
fn the_regressions_gradient_is_its_derivative() {
    let lab = Lab::new(&RWR, &Compute::cpu(), Red);
    let (start, prompts) = (&lab.start.adapters, &lab.prompts[..3]);
    let adapters = moved(start, &direction(start, 1), 0.1);
    let noise = lab.sampler.training_noise(&lab.noise, 0, 0..3);
    let (x_0, z) = (noise.initial_latents().unwrap(), noise.of_step(0).unwrap());
    let (timesteps, factors) = ([3, 500, 900], vec![0.5, 2.0, 0.1]);
    let (x_t, targets) = lab.sampler.schedule.noised(&timesteps, &x_0, &z).unwrap();
    let loss = |adapters: &Adapters| -> f64 {
        let each = |row: usize| {
            let of = |x: &Tensor| x.narrow(0, row, 1).unwrap();
            let prediction =
                denoiser(&lab, adapters, &prompts[row..=row]).predict(&of(&x_t), timesteps[row] as f64).unwrap();
            let apart = (prediction - of(&targets)).unwrap();
            factors[row] * dot(&apart, &apart) / apart.elem_count() as f64
        };
        (0..3).map(each).sum()
    };
    let mut term = RegressionTerm::new(factors.clone(), targets.clone());
    let mut tally = Tally::new(&adapters);
    let mut trajectory = Trajectory::of_latents(vec![x_t.clone(); 4]);
    let of_all = denoiser(&lab, &adapters, prompts);
    differentiate(&of_all, &one_step_each(&timesteps), &mut trajectory, None, &mut [&mut term], &mut tally).unwrap();
    let gradients = tally.take_gradients(&adapters).unwrap();
    let losses = term.losses(&tally.ledger.read().unwrap());
    let found: f64 = losses.iter().map(|(row, loss)| factors[*row] * loss).sum();
    assert!((found / loss(&adapters) - 1.0).abs() < 1e-5, "{found}");
    for number in [2, 3] {
        let direction = direction(&adapters, number);
        let (along, difference) =
            (along(&gradients, &direction), difference(4e-3, |by| loss(&moved(&adapters, &direction, by))));
        eprintln!("{along:.6e} by the backward pass, {difference:.6e} by differences");
        assert!((along - difference).abs() < 5e-3 * difference.abs(), "{along} and {difference}");
    }
}

#[test]
fn a_regression_is_resumed_to_the_last_bit_and_keeps_the_best() {
    for settings in [&RWR[..], &SPARSE] {
        let whole = Experiment::trained(&[settings, &["train.steps=3"]].concat());
        let parts = Experiment::trained(&[settings, &["train.steps=2"]].concat());
        parts.resume(&["train.steps=3"]).unwrap();
        assert!(fs::read(whole.lora_file(3)).unwrap() == fs::read(parts.lora_file(3)).unwrap());
        assert_eq!(whole.metrics(), parts.metrics());
        assert!(whole.metric("regression/loss").iter().all(|loss| *loss > 0.0));
    }
    let kept = |settings: &[&str]| Experiment::trained(settings).metric("regression/kept");
    assert_eq!(kept(&RWR), [1.0, 1.0]);
    // two of four are above the interpolated 60 % of them
    assert_eq!(kept(&SPARSE), [0.5, 0.5]);
}

/// The loss falls on images, timesteps and noise that the run does not train on.
#[test]
fn a_regression_learns() {
    let more = ["method.inner_epochs=24", "optimizer.weight_decay=0", "optimizer.max_grad_norm=1"];
    let lab = Lab::new(&[&RWR[..], &more].concat(), &Compute::cpu(), Red);
    let schedule = &lab.sampler.schedule;
    let noise = lab.sampler.evaluation_noise(5, 0..3);
    let prompts = &lab.prompts[..3];
    let images = lab.sampler.draw(prompts, &noise, &lab.start.adapters, None).unwrap().latents;
    let loss = |adapters: &Adapters| -> f64 {
        let at = |timestep: usize| {
            let z = noise.of_step(timestep).unwrap();
            let (x_t, target) = schedule.noised(&[timestep; 3], &images, &z).unwrap();
            let apart = (denoiser(&lab, adapters, prompts).predict(&x_t, timestep as f64).unwrap() - target).unwrap();
            dot(&apart, &apart) / apart.elem_count() as f64
        };
        [50, 250, 450, 650, 850].into_iter().map(at).sum::<f64>() / 5.0
    };
    let before = loss(&lab.start.adapters);
    let mut state = lab.start.clone();
    lab.step(&mut state).unwrap();
    let after = loss(&state.adapters);
    eprintln!("{before} before, {after} after");
    assert!(after < 0.95 * before, "{before} before, {after} after");
}

// ---------------------------------------------------------------------------------------------------- adjoint matching

/// A lean adjoint is the derivative of what the chain gives at its end, by the base model with the same noise.
#[test]
fn lean_adjoints_are_the_derivative_of_the_base_chain() {
    let lab = Lab::new(&ADJOINT, &Compute::cpu(), Red);
    let none = Adapters::default();
    let base = denoiser(&lab, &none, &lab.prompts[..2]).unguided();
    let noise = lab.sampler.training_noise(&lab.noise, 0, 0..2);
    let steps = lab.sampler.schedule.steps();
    let from = |i: usize, x: Tensor| {
        let of_step = |k| noise.of_step(i + k);
        Ledger::around(|ledger| base.rollout(&steps[i..], x, of_step, |_| false, ledger)).unwrap().0
    };
    let trajectory = from(0, noise.initial_latents().unwrap());
    let a_0 = noise.of_step(7).unwrap();
    // whatever adapters there are, they are left aside
    let start = &lab.start.adapters;
    let adapted = moved(start, &direction(start, 1), 0.3);
    let mut tally = Tally::new(&adapted);
    let of_adapted = denoiser(&lab, &adapted, &lab.prompts[..2]).unguided();
    let targets = lean_adjoints(&of_adapted, steps, &trajectory, a_0.clone(), &[0, 1, 2], &mut tally).unwrap();
    tally.ledger.read().unwrap();
    assert_eq!(targets.iter().map(|target| target.index).collect::<Vec<_>>(), [2, 1, 0]);
    for target in targets {
        let (x, v) = (trajectory.input(target.index), noise.of_step(8).unwrap());
        let end = |by: f64| dot(&a_0, from(target.index, (x + (&v * by).unwrap()).unwrap()).latents());
        let (along, difference) = (dot(&target.adjoint, &v), difference(1e-2, end));
        eprintln!("{along:.6e} by the backward pass, {difference:.6e} by differences");
        assert!((along - difference).abs() < 5e-3 * difference.abs().max(1.0), "{along} and {difference}");
        let prediction = base.predict(x, steps[target.index].timestep).unwrap();
        assert!(numbers(&prediction) == numbers(&target.prediction));
    }
}

#[test]
fn the_matchings_gradient_is_its_derivative() {
    let lab = Lab::new(&ADJOINT, &Compute::cpu(), Red);
    let start = &lab.start.adapters;
    let adapters = moved(start, &direction(start, 1), 0.1);
    let noise = lab.sampler.training_noise(&lab.noise, 0, 0..2);
    let steps = lab.sampler.schedule.steps().to_vec();
    let trajectory = || {
        let x_t = noise.initial_latents()?;
        Ledger::around(|ledger| {
            denoiser(&lab, start, &lab.prompts[..2]).unguided().rollout(
                &steps,
                x_t,
                |i| noise.of_step(i),
                |_| false,
                ledger,
            )
        })
    };
    let mut trajectory = trajectory().unwrap().0;
    let none = Adapters::default();
    let base: Vec<Tensor> = (0..3)
        .map(|i| {
            denoiser(&lab, &none, &lab.prompts[..2]).unguided().predict(trajectory.input(i), steps[i].timestep).unwrap()
        })
        .collect();
    let adjoint = noise.of_step(7).unwrap();
    let chosen = [0, 2];
    let latents: Vec<Tensor> = (0..3).map(|i| trajectory.input(i).clone()).collect();
    let losses = |adapters: &Adapters| -> Vec<f64> {
        let of = |i: &usize| {
            let prediction = denoiser(&lab, adapters, &lab.prompts[..2])
                .unguided()
                .predict(&latents[*i], steps[*i].timestep)
                .unwrap();
            let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
            let weight = steps[*i].model_output / steps[*i].noise;
            let apart = ((wide(&prediction) - wide(&base[*i])).unwrap() * weight).unwrap();
            let d = (apart + (wide(&adjoint) * steps[*i].noise).unwrap()).unwrap();
            d.sqr().unwrap().flatten_from(1).unwrap().sum(1).unwrap().to_vec1::<f64>().unwrap()
        };
        chosen.iter().flat_map(of).collect()
    };
    let mut sorted = losses(&adapters);
    sorted.sort_by(f64::total_cmp);
    // one of four is left out
    let below = (sorted[2].sqrt() + sorted[3].sqrt()) / 2.0;
    let loss = |adapters: &Adapters| -> f64 {
        losses(adapters).into_iter().filter(|loss| loss.sqrt() < below).sum::<f64>() * 0.25
    };
    let targets = || {
        let start = (&adjoint * 1.0)?;
        let mut tally = Tally::new(&adapters);
        lean_adjoints(
            &denoiser(&lab, &adapters, &lab.prompts[..2]).unguided(),
            &steps,
            &trajectory,
            start,
            &chosen,
            &mut tally,
        )
    };
    let mut targets = targets().unwrap();
    targets.iter_mut().for_each(|target| target.adjoint = adjoint.clone());
    let mut term = MatchingTerm { scale: 0.25, below: Some(below), targets, losses: Vec::new() };
    let keep = (0..3).map(|i| vec![chosen.contains(&i); 2]).collect();
    let plan = Plan { steps: steps.clone(), keep, detach_input: false, renoise: 0 };
    let mut tally = Tally::new(&adapters);
    differentiate(
        &denoiser(&lab, &adapters, &lab.prompts[..2]).unguided(),
        &plan,
        &mut trajectory,
        None,
        &mut [&mut term],
        &mut tally,
    )
    .unwrap();
    let gradients = tally.take_gradients(&adapters).unwrap();
    tally.ledger.read().unwrap();
    for number in [2, 3] {
        let direction = direction(&adapters, number);
        let (along, difference) =
            (along(&gradients, &direction), difference(1e-3, |by| loss(&moved(&adapters, &direction, by))));
        eprintln!("{along:.6e} by the backward pass, {difference:.6e} by differences");
        assert!((along - difference).abs() < 5e-3 * difference.abs(), "{along} and {difference}");
    }
}

#[test]
fn a_matching_is_resumed_to_the_last_bit_with_its_threshold() {
    let whole = Experiment::trained(&[&ADJOINT[..], &["train.steps=4"]].concat());
    let parts = Experiment::trained(&[&ADJOINT[..], &["train.steps=2"]].concat());
    parts.resume(&["train.steps=4"]).unwrap();
    assert!(fs::read(whole.lora_file(4)).unwrap() == fs::read(parts.lora_file(4)).unwrap());
    assert_eq!(whole.metrics(), parts.metrics());
    assert!(whole.metric("matching/loss").iter().all(|loss| *loss > 0.0));
    assert_eq!(whole.metric("matching/kept")[0], 1.0);
    let threshold = read_tensors(&whole.checkpoint(4).join("statistics.safetensors"));
    let threshold = threshold["matching.threshold"].to_vec1::<f64>().unwrap();
    assert!(threshold[0] == 4.0 && threshold[1] > 0.0, "{threshold:?}");
    // all of them count where nothing is left out, and nothing is remembered
    let all = Experiment::trained(&[&ADJOINT[..], &["method.quantile=1"]].concat());
    assert_eq!(all.metric("matching/kept"), [1.0, 1.0]);
    assert!(!all.checkpoint(2).join("statistics.safetensors").exists());
}

/// On prompts and noise that it does not train on, as AlignProp's own test.
#[test]
fn a_matched_model_has_the_higher_reward() {
    let [model, file] = hps_settings();
    let settings = [
        model.as_str(),
        file.as_str(),
        "method.kind=adjoint-matching",
        "method.steps=3",
        "method.lambda=1e4",
        "method.quantile=1",
        "reward.aesthetic.weight=0",
        "sampler.guidance_scale=1",
        "sampler.eta=1",
        "lora.rank=16",
        "optimizer.lr=1e-2",
        "optimizer.weight_decay=0",
        "optimizer.max_grad_norm=1",
        "train.steps=16",
        "train.batch_size=6",
        "run.sample_every=16",
        "run.num_samples=12",
        "run.save_every=0",
    ];
    let rewards = Experiment::trained(&settings).metric("sample/hps");
    eprintln!("{rewards:?}");
    assert!(rewards.len() == 2 && rewards[1] > rewards[0] + 0.001, "{rewards:?}");
}

// ---------------------------------------------------------------------------------------------------- moved images

#[test]
fn an_image_is_moved_by_rho_to_where_its_loss_is_higher() {
    let load = |config: &alignprop::config::Config, sampler: &alignprop::sampling::Sampler| {
        Rewards::load(&config.reward, &sampler.pipeline.tokenizer).unwrap()
    };
    let lab = Lab::with_rewards(&[], &Compute::cpu(), load);
    let noise = lab.sampler.training_noise(&lab.noise, 0, 0..2);
    let images = lab.sampler.decode(&noise.initial_latents().unwrap()).unwrap();
    let prompts = &lab.prompts[..2];
    let (moved, _) = Ledger::around(|ledger| lab.rewards.judge(&images, prompts, ledger)?.moved_against(0.5)).unwrap();
    let losses = |images: &Tensor| -> Vec<f64> {
        lab.rewards.scores(images, prompts).unwrap().iter().map(|scores| lab.rewards.loss(scores)).collect()
    };
    let (before, after) = (losses(&images), losses(&moved));
    for row in 0..2 {
        let apart = ((moved.get(row).unwrap() - images.get(row).unwrap()).unwrap() * 0.5).unwrap();
        let distance = dot(&apart, &apart).sqrt();
        assert!((distance - 0.5).abs() < 1e-4, "image {row}: {distance}");
        assert!(after[row] > before[row], "image {row}: {} and {}", after[row], before[row]);
        let sharpness = lab.rewards.sharpness(&images.narrow(0, row, 1).unwrap(), &prompts[row], 0.5).unwrap();
        assert!((sharpness - (after[row] - before[row])).abs() < 1e-4, "image {row}: {sharpness}");
    }
}

#[test]
fn moved_images_have_gradients_of_their_own_and_are_watched() {
    let run = |settings: &[&str]| Experiment::trained(&[&["train.steps=1"], settings].concat());
    let plain = run(&[]);
    let (near, far) = (run(&["method.rho=1e-6"]), run(&["method.rho=1"]));
    assert_eq!(far.metric("reward/aesthetic"), plain.metric("reward/aesthetic"));
    let apart = |run: &Experiment| distance(&run.first_gradients(), &plain.first_gradients());
    let (of_near, of_far) = (apart(&near), apart(&far));
    assert!(of_near < 1e-2 && of_far > 10.0 * of_near, "{of_near} and {of_far}");
    assert!(plain.metric("sharpness").is_empty());
    assert!(far.metric("sharpness")[0] > near.metric("sharpness")[0]);

    let watched = ["method.rho=1", "guard.every=1", "guard.num_prompts=1", "guard.seeds=1", "train.steps=3"];
    let sharp = run(&[&watched[..], &["guard.max_sharpness=1e-9"]].concat());
    assert!(sharp.metric("guard/sharpness")[0] > 1e-9);
    // it is so from the start, and the run goes no further
    assert_eq!(sharp.checkpoints(), ["step-000000"]);
    let calm = run(&[&watched[..], &["guard.max_sharpness=inf"]].concat());
    assert_eq!(calm.metric("guard/sharpness").len(), 4);
    // without a rho it is the paper's
    let usual = run(&["guard.every=1", "guard.num_prompts=1", "guard.seeds=1", "guard.max_sharpness=inf"]);
    assert_eq!(usual.metric("guard/sharpness").len(), 2);
}
