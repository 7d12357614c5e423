//! `train` on the tiny pipelines: what it learns, what it writes, and what makes no difference.

mod support;

use std::collections::BTreeMap;
use std::fs;

use alignprop::lora::formats;
use alignprop::models::Source;
use alignprop::models::tokenizer::ClipTokenizer;
use alignprop::training::checkpoint::EMA;
use candle_core::Tensor;
use support::*;

/// AdamW's first update is near the sign of the gradient, which rounding may flip; with a large epsilon it is in
/// proportion to the gradient instead.
const SMOOTH: &str = "optimizer.eps=1e-3";

fn error(result: anyhow::Result<()>) -> String {
    format!("{:#}", result.expect_err("an error"))
}

fn bytes(tensors: BTreeMap<String, Tensor>) -> BTreeMap<String, Vec<u32>> {
    tensors.into_iter().map(|(name, t)| (name, numbers(&t).into_iter().map(f32::to_bits).collect())).collect()
}

/// The same run to the last bit: adapters, optimizer, metrics.
fn assert_same_run(one: &Experiment, other: &Experiment, step: usize) {
    assert!(fs::read(one.lora_file(step)).unwrap() == fs::read(other.lora_file(step)).unwrap(), "the adapters differ");
    assert!(bytes(one.moments(step)) == bytes(other.moments(step)), "the optimizer's moments differ");
    let state = |run: &Experiment| fs::read_to_string(run.checkpoint(step).join("state.json")).unwrap();
    assert_eq!(state(one), state(other));
    assert_eq!(one.metrics(), other.metrics());
}

// ---------------------------------------------------------------------------------------------------- resuming

/// All that chance decides: noise in every step, a truncation for each sample, prompts, two micro-batches.
const CHANCE: [&str; 4] =
    ["sampler.eta=1.0", "truncation.rule=uniform", "train.gradient_accumulation_steps=2", "run.sample_every=2"];

fn chance<'a>(more: &[&'a str]) -> Vec<&'a str> {
    CHANCE.into_iter().chain(more.iter().copied()).collect()
}

#[test]
fn two_steps_and_two_more_are_four() {
    let whole = Experiment::trained(&chance(&["train.steps=4"]));
    let parts = Experiment::trained(&chance(&["train.steps=2"]));
    parts.resume(&["train.steps=4"]).unwrap();
    assert_same_run(&whole, &parts, 4);
    let final_file = |run: &Experiment| fs::read(run.run_folder().join("pytorch_lora_weights.safetensors")).unwrap();
    assert!(final_file(&whole) == final_file(&parts));
    // the chances differ from step to step, so there was something to continue
    assert!(whole.metric("backprop_steps").windows(2).any(|pair| pair[0] != pair[1]));
}

/// Stopping keeps the length of the schedule, which `train.steps` would change.
#[test]
fn a_stopped_run_continues_its_schedule() {
    let schedule = ["train.steps=4", "optimizer.lr_schedule=linear", "train.batch_size=2"];
    let whole = Experiment::trained(&chance(&schedule));
    let stopped = Experiment::new("tiny-sd15");
    let config = stopped.config();
    let line = ["train", "--config", &config, "--stop-at", "2"];
    support::run(&with_settings(&line, &chance(&schedule))).unwrap();
    assert_eq!(stopped.checkpoints(), ["step-000000", "step-000001", "step-000002"]);
    assert!(!stopped.run_folder().join("pytorch_lora_weights.safetensors").exists());
    stopped.resume(&[]).unwrap();
    assert_same_run(&whole, &stopped, 4);
    assert!(whole.metric("lr").is_sorted_by(|earlier, later| earlier > later));
}

#[test]
fn an_interrupted_run_continues_its_schedule_and_drops_what_it_repeats() {
    let schedule = ["train.steps=4", "optimizer.lr_schedule=cosine", "optimizer.warmup_steps=2"];
    let whole = Experiment::trained(&chance(&schedule));
    let interrupted = Experiment::trained(&chance(&schedule));
    // as if it had been killed in step 4, while writing a line of the metrics
    fs::remove_dir_all(interrupted.checkpoint(3)).unwrap();
    fs::remove_dir_all(interrupted.checkpoint(4)).unwrap();
    let metrics = interrupted.run_folder().join("metrics.jsonl");
    let text = fs::read_to_string(&metrics).unwrap();
    fs::write(&metrics, &text[..text.len() - 30]).unwrap();

    interrupted.resume(&[]).unwrap();
    assert_same_run(&whole, &interrupted, 4);
    let lr = whole.metric("lr");
    assert!(lr[0] < lr[1] && lr[3] < lr[2], "{lr:?}");
}

#[test]
fn another_seed_is_another_run() {
    let one = Experiment::trained(&["train.steps=1"]);
    let same = Experiment::trained(&["train.steps=1"]);
    let other = Experiment::trained(&["train.steps=1", "run.seed=1"]);
    assert!(bytes(one.adapters(1)) == bytes(same.adapters(1)));
    assert!(distance(&other.adapters(1), &one.adapters(1)) > 0.1);
    assert_ne!(one.metric("reward/aesthetic"), other.metric("reward/aesthetic"));
}

#[test]
fn a_run_that_was_interrupted_in_its_first_step_is_resumed() {
    let whole = Experiment::trained(&chance(&["train.steps=1"]));
    let interrupted = Experiment::trained(&chance(&["train.steps=1"]));
    fs::remove_dir_all(interrupted.checkpoint(1)).unwrap();
    interrupted.resume(&[]).unwrap();
    assert_same_run(&whole, &interrupted, 1);
}

#[test]
fn a_run_that_was_interrupted_before_its_sample_grid_draws_it() {
    let settings = chance(&["train.steps=4", "truncation.rule=fixed", "truncation.k=1"]);
    let whole = Experiment::trained(&settings);
    let interrupted = Experiment::trained(&settings);
    // the checkpoint of step 2 is there, its grid is not
    fs::remove_dir_all(interrupted.checkpoint(3)).unwrap();
    fs::remove_dir_all(interrupted.checkpoint(4)).unwrap();
    fs::remove_file(interrupted.run_folder().join("samples/step-000002.png")).unwrap();
    let metrics = interrupted.run_folder().join("metrics.jsonl");
    let text = fs::read_to_string(&metrics).unwrap();
    let lines: Vec<&str> = text.lines().take_while(|line| !line.contains(r#""step":2,"sample"#)).collect();
    assert_eq!(lines.len(), 3);
    fs::write(&metrics, lines.join("\n") + "\n").unwrap();

    interrupted.resume(&[]).unwrap();
    assert_same_run(&whole, &interrupted, 4);
    assert_eq!(listing(&interrupted.run_folder().join("samples")), listing(&whole.run_folder().join("samples")));
}

#[test]
fn a_finished_run_is_left_as_it_is() {
    let run = Experiment::trained(&["train.steps=1"]);
    let (adapters, metrics) = (fs::read(run.lora_file(1)).unwrap(), run.metrics());
    run.resume(&[]).unwrap();
    assert!(fs::read(run.lora_file(1)).unwrap() == adapters);
    assert_eq!((run.metrics(), run.checkpoints().len()), (metrics, 2));
}

#[test]
fn a_resumed_run_keeps_its_adapters() {
    let run = Experiment::trained(&["train.steps=1"]);
    for setting in ["lora.rank=3", "lora.alpha=1", "lora.target_modules=['to_q']"] {
        let error = error(run.resume(&["train.steps=2", setting]));
        let key = setting.split('=').next().unwrap();
        assert!(error.contains(key) && error.contains("keeps its adapters"), "{error}");
    }
    assert_eq!(run.checkpoints(), ["step-000000", "step-000001"]);
    assert_eq!(run.metrics().len(), 1);
}

// ---------------------------------------------------------------------------------------------------- learning

/// On prompts and noise that it does not train on. The tiny reward models are random, and of them `hps` is the one
/// whose gradient agrees from image to image.
#[test]
fn the_reward_rises() {
    let [model, file] = hps_settings();
    let settings = [
        model.as_str(),
        file.as_str(),
        "reward.aesthetic.weight=0",
        "sampler.guidance_scale=2",
        "sampler.eta=0",
        "lora.rank=16",
        "optimizer.lr=1e-2",
        "optimizer.weight_decay=0",
        "train.steps=16",
        "train.batch_size=6",
        "run.sample_every=16",
        "run.num_samples=12",
        "run.save_every=0",
    ];
    let up = Experiment::trained(&settings);
    let rewards = up.metric("sample/hps");
    assert_eq!(rewards.len(), 2);
    assert!(rewards[1] > rewards[0] + 0.003, "{rewards:?}");
}

#[test]
fn a_negative_weight_turns_the_gradient() {
    let up = Experiment::trained(&["train.steps=1"]).first_gradients();
    let down = Experiment::trained(&["train.steps=1", "reward.aesthetic.weight=-1"]).first_gradients();
    let turned = down.into_iter().map(|(name, g)| (name, g.neg().unwrap())).collect();
    assert!(distance(&turned, &up) < 1e-6);
}

/// B starts as zero: in the first step it alone has a gradient, from the second on A has one too.
fn assert_every_factor_learns(run: &Experiment, what: &str) {
    let (first, second) = (run.adapters(1), run.adapters(2));
    let gradients = run.moments(2);
    assert_eq!(first.len(), 160, "{what}");
    for (name, tensor) in &first {
        let moved = numbers(tensor) != numbers(&second[name]);
        assert!(moved, "{what}: {name} did not move in step 2");
        assert!(numbers(&gradients[&format!("exp_avg_sq.{name}")]).iter().any(|v| *v > 0.0), "{what}: {name}");
        let is_zero = numbers(tensor).iter().all(|x| *x == 0.0);
        assert!(!is_zero, "{what}: {name} is zero after step 1");
    }
}

#[test]
fn every_factor_learns_under_every_truncation_rule() {
    for (rule, kept) in [
        (&["truncation.rule=uniform"][..], 1.0..=3.0),
        (&["truncation.rule=uniform", "truncation.per=batch"], 1.0..=3.0),
        (&["truncation.rule=fixed", "truncation.k=1"], 1.0..=1.0),
        (&["truncation.rule=fixed", "truncation.k=2"], 2.0..=2.0),
        (&["truncation.rule=gaussian", "truncation.mean=2", "truncation.std=1"], 1.0..=2.0),
        (&["truncation.rule=per-step", "truncation.lo=0", "truncation.hi=2"], 1.0..=3.0),
        (&["truncation.rule=full"], 3.0..=3.0),
        (&["truncation.rule=steps", "truncation.steps=[0, 2]"], 2.0..=2.0),
        (&["truncation.rule=steps", "truncation.steps=[0]"], 1.0..=1.0),
        (&["truncation.rule=draft-lv", "truncation.n=2"], 2.0..=2.0),
        (&["truncation.rule=refl", "truncation.lo=1", "truncation.hi=2"], 1.0..=1.0),
        (&["truncation.rule=drtune"], 3.0..=3.0),
        (&["truncation.rule=drtune", "truncation.k=2"], 2.0..=2.0),
    ] {
        let what = rule.join(" ");
        // without weight decay: what moves has a gradient
        let settings = [rule, &["optimizer.weight_decay=0", "train.batch_size=2"]].concat();
        let run = Experiment::trained(&settings);
        assert_every_factor_learns(&run, &what);
        let steps = run.metric("backprop_steps");
        assert!(steps.iter().all(|steps| kept.contains(steps)), "{what}: {steps:?}");
        assert!(run.metric("grad_norm").iter().all(|norm| *norm > 0.0), "{what}");
    }
}

/// What tells the rules apart is the gradient; the images and their rewards are the same.
#[test]
fn truncation_rules_give_different_gradients_of_the_same_images() {
    let rules = [
        &["truncation.rule=full"][..],
        &["truncation.rule=fixed", "truncation.k=1"],
        &["truncation.rule=fixed", "truncation.k=2"],
        &["truncation.rule=steps", "truncation.steps=[0]"],
        &["truncation.rule=drtune"],
    ];
    let runs = rules.map(|rule| Experiment::trained(&[rule, &["train.steps=1"]].concat()));
    for (i, one) in runs.iter().enumerate() {
        assert_eq!(one.metric("reward/aesthetic"), runs[0].metric("reward/aesthetic"));
        for other in &runs[..i] {
            let distance = distance(&one.first_gradients(), &other.first_gradients());
            assert!(distance > 1e-3, "{distance}");
        }
    }
    // a chain of which every step is named is the full one
    let named = Experiment::trained(&["truncation.rule=steps", "truncation.steps=[2, 1, 0]", "train.steps=1"]);
    assert!(bytes(named.adapters(1)) == bytes(runs[0].adapters(1)));
}

#[test]
fn a_step_that_keeps_nothing_changes_nothing() {
    // r is 2 or 3: steps 0 and 1 are always detached, step 2 where its draw is 3
    let rule = ["truncation.rule=per-step", "truncation.lo=2", "truncation.hi=3", "train.steps=6"];
    let run = Experiment::trained(&rule);
    let kept = run.metric("backprop_steps");
    let Some(empty) = kept.iter().position(|steps| *steps == 0.0) else { panic!("choose another seed: {kept:?}") };
    assert!(kept.contains(&1.0), "choose another seed: {kept:?}");
    assert_eq!(run.metric("grad_norm")[empty], 0.0);
    if empty > 0 {
        assert!(bytes(run.adapters(empty)) == bytes(run.adapters(empty + 1)));
    }
}

#[test]
fn the_gradient_is_clipped_to_its_bound() {
    // a loss so large that the 1e-6 in the formula, g * bound / (norm + 1e-6), does not count
    let settings = ["train.steps=1", "optimizer.loss_coeff=1e4"];
    let free = Experiment::trained(&[&settings[..], &["optimizer.max_grad_norm=inf"]].concat());
    let bound = free.metric("grad_norm")[0] / 10.0;
    let clipped = Experiment::trained(&[&settings[..], &[&format!("optimizer.max_grad_norm={bound}")]].concat());
    assert_eq!(clipped.metric("grad_norm"), free.metric("grad_norm"));
    assert!((norm(&free.first_gradients()) / (10.0 * bound) - 1.0).abs() < 1e-4);
    assert!((norm(&clipped.first_gradients()) / bound - 1.0).abs() < 1e-4);
}

// ---------------------------------------------------------------------------------------------------- no difference

#[test]
fn another_split_into_micro_batches_is_the_same_step() {
    let settings = ["sampler.eta=1.0", "truncation.rule=uniform", "train.steps=1", SMOOTH];
    let run = |split: [&str; 2]| Experiment::trained(&[&settings[..], &split].concat());
    let at_once = run(["train.batch_size=4", "train.gradient_accumulation_steps=1"]);
    for split in [
        ["train.batch_size=2", "train.gradient_accumulation_steps=2"],
        ["train.batch_size=1", "train.gradient_accumulation_steps=4"],
    ] {
        let parts = run(split);
        assert_eq!(parts.metric("backprop_steps"), at_once.metric("backprop_steps"));
        for name in ["loss", "reward/aesthetic", "reward/aesthetic_std", "grad_norm"] {
            let (x, y) = (parts.metric(name)[0], at_once.metric(name)[0]);
            assert!((x / y - 1.0).abs() < 1e-4, "{name}: {x} and {y}");
        }
        let apart = distance(&parts.first_gradients(), &at_once.first_gradients());
        assert!(apart < 1e-4, "{apart}");
        let apart = distance(&parts.adapters(1), &at_once.adapters(1));
        assert!(apart < 1e-5, "{apart}");
    }
}

#[test]
fn stable_diffusion_xl_learns_in_every_attention_and_hears_texts_and_sizes() {
    let run = |more: &[&str]| {
        let run = Experiment::new("tiny-sdxl");
        run.train(&[&["optimizer.weight_decay=0", "sampler.eta=1.0", SMOOTH], more].concat()).unwrap();
        run
    };
    let at_once = run(&["train.batch_size=2"]);
    let first = at_once.adapters(1);
    // four layers of two attentions each: 1 x 2 + 1 x 3 on the way down, 3 in the middle, 2 x 3 + 2 x 2 on the way up
    assert_eq!(first.len(), 2 * 4 * 2 * (2 + 3 + 3 + 6 + 4));
    // B begins at 0 and has a gradient at once; what comes of a small one in A may be less than a rounding
    let mut of_b = first.iter().filter(|(name, _)| name.contains("lora_B"));
    assert!(of_b.all(|(_, tensor)| numbers(tensor).iter().any(|x| *x != 0.0)));
    let parts = run(&["train.batch_size=1", "train.gradient_accumulation_steps=2"]);
    let apart = distance(&parts.first_gradients(), &at_once.first_gradients());
    assert!(apart < 1e-4, "{apart}");
    for checkpointing in ["train.checkpointing=block", "train.checkpointing=step"] {
        let other = run(&["train.batch_size=2", checkpointing]);
        let apart = distance(&other.first_gradients(), &at_once.first_gradients());
        assert!(apart < 1e-4, "{checkpointing}: {apart}");
    }
    // no negative prompt is another one than an empty text
    for other in
        ["sampler.negative_prompt=", "sampler.original_size=[300, 200]", "sampler.crops_coords_top_left=[0, 9]"]
    {
        let other = run(&["train.steps=1", "train.batch_size=2", other]);
        assert!(distance(&other.first_gradients(), &at_once.first_gradients()) > 1e-4);
    }
}

#[test]
fn block_checkpointing_gives_the_same_adapters() {
    let step = Experiment::trained(&[SMOOTH]);
    let block = Experiment::trained(&[SMOOTH, "train.checkpointing=block"]);
    for n in [1, 2] {
        let (step, block) = (step.adapters(n), block.adapters(n));
        assert!(distance(&block, &step) < 1e-5, "{}", distance(&block, &step));
    }
    let (step, block) = (step.first_gradients(), block.first_gradients());
    assert!(distance(&block, &step) < 1e-5, "{}", distance(&block, &step));
}

#[test]
fn stored_steps_give_the_same_run_to_the_last_bit() {
    let run = |settings: &[&str], stored: &str| {
        let stored = format!("train.stored_steps={stored}");
        let settings = [&["train.batch_size=2", "train.checkpointing=step", &stored], settings].concat();
        let run = Experiment::trained(&settings);
        let adapters = [1, 2].map(|step| fs::read(run.lora_file(step)).unwrap());
        assert!(adapters[0] != adapters[1]);
        (run.metrics(), adapters)
    };
    for settings in [
        &["truncation={ rule = \"fixed\", k = 3 }"][..],
        &["truncation={ rule = \"fixed\", k = 3 }", "sampler.guidance_scale=1"],
        &["truncation={ rule = \"fixed\", k = 3 }", "sampler.guidance_rescale=0.7"],
        &["truncation={ rule = \"fixed\", k = 3 }", "regularization.kl_weight=0.1"],
        // some images of the batch keep a step and some do not: those are evaluated again
        &["truncation={ rule = \"uniform\" }"],
        &["truncation={ rule = \"steps\", steps = [0, 2] }"],
        &["truncation={ rule = \"drtune\", k = 2 }"],
        &["truncation={ rule = \"refl\", lo = 1, hi = 2 }"],
        &["truncation={ rule = \"draft-lv\", n = 2 }"],
    ] {
        let evaluated = run(settings, "0");
        assert!(run(settings, "1") == evaluated && run(settings, "99") == evaluated, "{settings:?}");
    }
}

#[test]
fn without_guidance_the_negative_prompt_is_not_read() {
    let run = |guidance: &str, negative: &str| {
        let guidance = format!("sampler.guidance_scale={guidance}");
        let negative = format!("sampler.negative_prompt={negative}");
        Experiment::trained(&["train.steps=1", &guidance, &negative])
    };
    assert!(bytes(run("1.0", "").adapters(1)) == bytes(run("1.0", "a blurred photo").adapters(1)));
    let (plain, negative) = (run("5.0", ""), run("5.0", "a blurred photo"));
    assert_ne!(plain.metric("reward/aesthetic"), negative.metric("reward/aesthetic"));
    assert!(distance(&negative.first_gradients(), &plain.first_gradients()) > 1e-3);
    assert_ne!(run("1.0", "").metric("reward/aesthetic"), plain.metric("reward/aesthetic"));
}

#[test]
fn a_rescaled_guidance_is_another_run_and_one_of_nothing_the_same() {
    let run = |more: &[&str]| Experiment::trained(&[&["train.steps=1"], more].concat());
    let plain = run(&[]);
    assert!(bytes(run(&["sampler.guidance_rescale=0"]).adapters(1)) == bytes(plain.adapters(1)));
    let rescaled = run(&["sampler.guidance_rescale=0.7"]);
    assert_ne!(rescaled.metric("reward/aesthetic"), plain.metric("reward/aesthetic"));
    assert!(distance(&rescaled.first_gradients(), &plain.first_gradients()) > 1e-3);
    // without guidance there is nothing to rescale
    let alone = run(&["sampler.guidance_scale=1"]);
    let both = run(&["sampler.guidance_scale=1", "sampler.guidance_rescale=0.7"]);
    assert!(bytes(both.adapters(1)) == bytes(alone.adapters(1)));
}

// ---------------------------------------------------------------------------------------------------- rewards

/// Settings for all five kinds of reward, with these weights.
fn all_rewards(weights: [f64; 5]) -> Vec<String> {
    let [aesthetic, clip_head, hps, clip_score, pickscore] = weights;
    let clip = text(fixture("tiny-sd15/clip"));
    let head = text(fixture("tiny-sd15/aesthetic_head.safetensors"));
    let layers = r#"[{ linear = "layers.0" }, { activation = "relu" }, { linear = "layers.2" }, { linear = "layers.4" }, { linear = "layers.6" }, { linear = "layers.7" }]"#;
    let mut settings = vec![
        format!("reward.aesthetic.weight={aesthetic}"),
        "reward.aesthetic.target=10".to_owned(),
        format!("reward.clip-head={{ weight = {clip_head:?}, clip = '{clip}', head = '{head}', layers = {layers} }}"),
        format!("reward.hps.weight={hps}"),
        format!("reward.clip-score={{ weight = {clip_score:?}, model = '{clip}' }}"),
        format!("reward.pickscore={{ weight = {pickscore:?}, model = '{clip}', preprocess = 'squash' }}"),
    ];
    settings.extend(hps_settings());
    settings
}

fn train_with(rewards: &[String], more: &[&str]) -> Experiment {
    let settings: Vec<&str> = rewards.iter().map(String::as_str).chain(more.iter().copied()).collect();
    Experiment::trained(&settings)
}

#[test]
fn rewards_add_up_and_each_is_logged() {
    let weights = [1.0, 0.5, 2.0, 1.5, -0.25];
    let run = train_with(&all_rewards(weights), &["train.steps=1", "train.batch_size=2", "optimizer.loss_coeff=0.1"]);
    let value = |kind: &str| run.metric(&format!("reward/{kind}"))[0];
    // |score - target|, -score, and 1 - cosine; all linear here, so the losses of the means are the mean losses
    let losses = [
        10.0 - value("aesthetic"),
        -value("clip-head"),
        1.0 - value("hps"),
        1.0 - value("clip-score"),
        1.0 - value("pickscore"),
    ];
    let expected: f64 = 0.1 * weights.iter().zip(losses).map(|(weight, loss)| weight * loss).sum::<f64>();
    let loss = run.metric("loss")[0];
    assert!((loss / expected - 1.0).abs() < 1e-5, "{loss} for {expected}");
    assert!(run.metric("reward/hps_std")[0] > 0.0);

    // and the gradient is the same sum
    let alone = |kind: usize| {
        let mut weights = [0.0; 5];
        weights[kind] = 1.0;
        train_with(&all_rewards(weights), &["train.steps=1", "train.batch_size=2", "optimizer.loss_coeff=0.1"])
            .first_gradients()
    };
    let mut sum: BTreeMap<String, Tensor> =
        run.first_gradients().into_iter().map(|(name, g)| (name, g.zeros_like().unwrap())).collect();
    for (kind, weight) in weights.into_iter().enumerate() {
        let gradients = alone(kind);
        assert!(norm(&gradients) > 0.0);
        sum.iter_mut().for_each(|(name, sum)| *sum = (&*sum + (&gradients[name] * weight).unwrap()).unwrap());
    }
    let apart = distance(&sum, &run.first_gradients());
    assert!(apart < 1e-4, "{apart}");
}

#[test]
fn rewards_are_scaled_by_how_far_their_scores_spread() {
    let rewards = all_rewards([0.0, 2.0, 0.0, 0.5, 0.0]);
    let more = ["train.scale_rewards=true", "train.steps=3", "train.batch_size=2", "optimizer.loss_coeff=0.1"];
    let run = train_with(&rewards, &more);
    let of = |kind: &str, step: usize| run.metric(&format!("reward/{kind}"))[step];
    let std = |kind: &str, step: usize| run.metric(&format!("reward/{kind}_std"))[step];
    // of all images of the steps before: within the batches and between them
    let spread = |kind: &str, step: usize| {
        let mean = (0..step).map(|at| of(kind, at)).sum::<f64>() / step as f64;
        let squares = (0..step).map(|at| std(kind, at).powi(2) + (of(kind, at) - mean).powi(2)).sum::<f64>();
        (squares / step as f64).sqrt()
    };
    for step in 0..3 {
        let divisor = |kind: &str| if step == 0 { 1.0 } else { spread(kind, step) };
        let losses = -2.0 * of("clip-head", step) / divisor("clip-head")
            + 0.5 * (1.0 - of("clip-score", step)) / divisor("clip-score");
        let loss = run.metric("loss")[step];
        assert!((loss / (0.1 * losses) - 1.0).abs() < 1e-5, "step {step}: {loss} for {}", 0.1 * losses);
    }
    // and a resumed run scales as the run did
    let parts = train_with(&rewards, &[&more[..], &["train.steps=2"]].concat());
    parts.resume(&["train.steps=3"]).unwrap();
    assert!(bytes(parts.adapters(3)) == bytes(run.adapters(3)));
}

#[test]
fn a_reward_of_weight_zero_is_logged_and_does_not_train() {
    let alone = Experiment::trained(&["reward.aesthetic.target=10"]);
    let sizes = ["reward.compressibility.weight=0", "reward.incompressibility.weight=0"];
    let watched = train_with(&all_rewards([1.0, 0.0, 0.0, 0.0, 0.0]), &sizes);
    for kind in ["clip-head", "hps", "clip-score", "pickscore", "compressibility", "incompressibility"] {
        assert_eq!(watched.metric(&format!("reward/{kind}")).len(), 2, "{kind}");
    }
    assert!(bytes(watched.adapters(2)) == bytes(alone.adapters(2)));
    assert_eq!(watched.metric("loss"), alone.metric("loss"));
}

#[test]
fn compressibility_shows_sizes_of_files_and_trains_a_smooth_stand_in() {
    let size = |weights: &str| {
        let settings = [format!("reward={weights}"), "train.steps=1".into(), "optimizer.loss_coeff=1".into()];
        Experiment::trained(&settings.each_ref().map(String::as_str))
    };
    let small = size("{ compressibility = { weight = 1 }, incompressibility = { weight = 0 } }");
    let large = size("{ compressibility = { weight = 0 }, incompressibility = { weight = 1 } }");
    let kilobytes = small.metric("reward/incompressibility")[0];
    assert!((0.6..40.0).contains(&kilobytes), "{kilobytes}");
    assert_eq!(small.metric("reward/compressibility")[0], -kilobytes);
    let smooth = small.metric("loss")[0];
    assert!((smooth / kilobytes - 1.0).abs() < 0.2, "{smooth} for {kilobytes} kB");
    assert_eq!(small.metric("loss")[0], -large.metric("loss")[0]);
    assert!(norm(&small.first_gradients()) > 0.0);
    assert!(distance(&small.first_gradients(), &large.first_gradients()) > 1.0);
}

#[test]
fn another_preprocessing_is_another_score() {
    let score = |preprocess: &str| {
        let preprocess = format!("reward.aesthetic.preprocess={preprocess}");
        Experiment::trained(&["train.steps=1", &preprocess]).metric("reward/aesthetic")[0]
    };
    let [alignprop, official, squash] = ["alignprop", "hpsv2-official", "squash"].map(score);
    assert!(alignprop != official && alignprop != squash && official != squash);
}

// ---------------------------------------------------------------------------------------------------- adapters

#[test]
fn only_the_named_layers_are_trained() {
    let run = Experiment::trained(&["lora.target_modules=['to_v', 'attn2.to_out.0']"]);
    let adapters = run.adapters(2);
    // 10 transformer blocks of two attentions: 20 to_v and 10 attn2.to_out.0
    assert_eq!(adapters.len(), 2 * 30);
    for (name, tensor) in &adapters {
        assert!(name.contains(".to_v.lora_") || name.contains(".attn2.to_out.0.lora_"), "{name}");
        assert!(numbers(tensor).iter().any(|x| *x != 0.0), "{name}");
    }
    let error = error(Experiment::new("tiny-sd15").train(&["lora.target_modules=['to_w']"]));
    assert!(error.contains("lora.target_modules") && error.contains("to_w") && error.contains("to_q"), "{error}");
}

#[test]
fn alpha_scales_the_product() {
    let plain = Experiment::trained(&["train.steps=1"]);
    let strong = Experiment::trained(&["train.steps=1", "lora.alpha=8"]);
    // alpha / rank = 4: B = 0 gets four times the gradient
    let scaled = plain.first_gradients().into_iter().map(|(name, g)| (name, (g * 4.0).unwrap())).collect();
    assert!(distance(&strong.first_gradients(), &scaled) < 1e-5);
    let alpha = |run: &Experiment| formats::load(&run.lora_file(1)).unwrap().adapters.factors()[0].alpha;
    assert_eq!((alpha(&plain), alpha(&strong)), (2.0, 8.0));
}

#[test]
fn the_adapter_says_how_it_was_made() {
    let run = Experiment::new("tiny-sd15");
    run.train(&["run.seed=7", "truncation.rule=fixed", "truncation.k=2", "reward.aesthetic.weight=0.5"]).unwrap();
    for (file, step) in [(run.lora_file(1), "1"), (run.run_folder().join("pytorch_lora_weights.safetensors"), "2")] {
        let metadata = formats::load(&file).unwrap().metadata;
        assert_eq!(metadata["base_model"], text(fixture("tiny-sd15/model")));
        assert_eq!(metadata["reward"], "aesthetic=0.5");
        assert_eq!(metadata["truncation"], r#"rule = "fixed", k = 2"#);
        assert_eq!((metadata["seed"].as_str(), metadata["step"].as_str()), ("7", step));
    }
    // the names of diffusers, and nothing else: diffusers refuses other keys
    let names = read_tensors(&run.lora_file(2));
    assert_eq!(names.len(), 160);
    for name in names.keys() {
        let ends = name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight");
        assert!(name.starts_with("unet.") && ends, "{name}");
    }
}

// ---------------------------------------------------------------------------------------------------- run folder

#[test]
fn a_run_folder_holds_config_metrics_samples_and_checkpoints() {
    let run = Experiment::trained(&["train.steps=2", "run.sample_every=1", "run.num_samples=3"]);
    let folder = run.run_folder();
    let expected = [
        "checkpoints",
        "config.toml",
        "metrics.jsonl",
        "prompts.jsonl",
        "pytorch_lora_weights.safetensors",
        "report.html",
        "samples",
        "sources.json",
        "tensorboard",
    ];
    assert_eq!(listing(&folder), expected);
    let report = fs::read_to_string(folder.join("report.html")).unwrap();
    for part in [
        "optimizer step 2 of 2 · Finished",
        "Before and after",
        "at step 0 and at step 2",
        "<h3>a red dog</h3>",
        "Next: ",
    ] {
        assert!(report.contains(part), "{part}");
    }
    // a grid, a list and three pictures a step; of the first and the last the page has the pictures
    assert_eq!(listing(&folder.join("samples")).len(), 3 * 5);
    assert!(report.matches("data:image/png").count() == 6);
    assert_eq!(listing(&folder.join("tensorboard")).len(), 1);
    assert_eq!(run.checkpoints(), ["step-000000", "step-000001", "step-000002"]);
    let expected = ["optimizer.safetensors", "pytorch_lora_weights.safetensors", "state.json"];
    assert_eq!(listing(&run.checkpoint(2)), expected);
    assert!(
        fs::read(folder.join("pytorch_lora_weights.safetensors")).unwrap() == fs::read(run.lora_file(2)).unwrap(),
        "the run's adapter is that of the last checkpoint"
    );

    // three pictures of 40 x 72, four times as large, with 4 white pixels between them and the captions under them
    let pictures: Vec<_> = (0..3)
        .map(|step| {
            let path = folder.join(format!("samples/step-{step:06}.png"));
            image::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).to_rgb8()
        })
        .collect();
    for picture in &pictures {
        // 4 pixels, and 10 each for the prompt and the score
        assert_eq!(picture.dimensions(), (3 * 160 + 2 * 4, 288 + 24));
        assert!((160..164).all(|x| picture.get_pixel(x, 100).0 == [255; 3]));
    }
    assert!(pictures[0] != pictures[2], "the pictures of the base model and of the adapted one are the same");

    let steps: Vec<_> = run.metrics().iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [0, 1, 1, 2, 2]);
    let training: Vec<_> = run.metrics().into_iter().filter(|line| line.contains_key("loss")).collect();
    assert_eq!(training.len(), 2);
    for key in ["loss", "reward/aesthetic", "reward/aesthetic_std", "grad_norm", "lr", "backprop_steps"] {
        assert!(training.iter().all(|line| line[key].is_number()), "{key}");
    }
    assert_eq!(run.metric("sample/aesthetic").len(), 3);
}

#[test]
fn sample_grids_are_on_fixed_noise() {
    let settings = ["train.steps=1", "run.sample_every=1"];
    let one = Experiment::trained(&settings);
    let other = Experiment::trained(&[&settings[..], &["optimizer.lr=1e-4", "truncation.rule=uniform"]].concat());
    let grid =
        |run: &Experiment, step: usize| fs::read(run.run_folder().join(format!("samples/step-{step:06}.png"))).unwrap();
    assert!(grid(&one, 0) == grid(&other, 0));
    assert!(grid(&one, 1) != grid(&other, 1));
    // and on the same noise after every step: where the adapters hardly move, so do the pictures
    let still = Experiment::trained(&[&settings[..], &["optimizer.lr=1e-9"]].concat());
    let pixels = |step| image::load_from_memory(&grid(&still, step)).unwrap().to_rgb8().into_raw();
    // a value on the border of two bytes may fall to either side
    assert!(pixels(0).iter().zip(&pixels(1)).all(|(a, b)| a.abs_diff(*b) <= 1));
}

#[test]
fn the_saved_config_is_the_resolved_one() {
    let run = Experiment::trained(&["train.steps=1", "optimizer.lr=0.0123"]);
    let saved = run.run_folder().join("config.toml");
    let config = fs::read_to_string(&saved).unwrap();
    for line in ["lr = 0.0123", "rule = \"full\"", "betas = [0.9, 0.999]", "loss_coeff = 0.01", "height = 72"] {
        assert!(config.lines().any(|found| found == line), "`{line}` is not in\n{config}");
    }
    // training from it is the same run
    let again = Experiment::new("tiny-sd15");
    let dir = format!("run.dir={}", text(again.run_folder()));
    support::run(&["train", "--config", &text(saved), "--set", &dir]).unwrap();
    assert_same_run(&run, &again, 1);
}

#[test]
fn old_checkpoints_go() {
    let run =
        Experiment::trained(&["train.steps=4", "run.keep_checkpoints=2", "truncation.rule=fixed", "truncation.k=1"]);
    assert_eq!(run.checkpoints(), ["step-000003", "step-000004"]);
    let run = Experiment::trained(&["train.steps=3", "run.save_every=2", "truncation.rule=fixed", "truncation.k=1"]);
    assert_eq!(run.checkpoints(), ["step-000000", "step-000002", "step-000003"]);
}

// ---------------------------------------------------------------------------------------------------- pipelines

/// Stable Diffusion 2: v-prediction, linear projections, weights in bf16; 1.x above: epsilon, convolutions, f16.
#[test]
fn a_pipeline_of_the_second_kind_trains() {
    let run = Experiment::new("tiny-sd21");
    // 7 x 9 latents
    run.train(&["sampler.height=56", "sampler.width=72", "truncation.rule=uniform", "optimizer.weight_decay=0"])
        .unwrap();
    let (first, second) = (run.adapters(1), run.adapters(2));
    assert_eq!(first.len(), 256);
    for (name, tensor) in &first {
        assert!(numbers(tensor) != numbers(&second[name]), "{name}");
    }
}

#[test]
fn a_size_with_odd_latents_trains_upright_and_lying() {
    for (height, width) in [(88, 56), (40, 104), (24, 8)] {
        let size = [format!("sampler.height={height}"), format!("sampler.width={width}")];
        let run = Experiment::trained(&["train.steps=1", "run.sample_every=1", &size[0], &size[1]]);
        let picture = image::open(run.run_folder().join("samples/step-000001.png")).unwrap();
        // enlarged to 128 pixels of width or more
        let factor = 128u32.div_ceil(width);
        assert!((height * factor + 1..height * factor + 90).contains(&picture.height()));
        assert!(run.metric("grad_norm")[0] > 0.0);
    }
}

#[test]
fn without_a_size_the_model_says_it() {
    let experiment = Experiment::new("tiny-sd15");
    let config = experiment.config();
    let without: String = fs::read_to_string(&config)
        .unwrap()
        .lines()
        .filter(|line| !line.contains("height") && !line.contains("width"))
        .map(|line| format!("{line}\n"))
        .collect();
    fs::write(&config, without).unwrap();
    experiment.train(&["train.steps=1", "run.sample_every=1", "run.num_samples=1"]).unwrap();
    let picture = image::open(experiment.run_folder().join("samples/step-000001.png")).unwrap();
    // sample_size 11 times 8, enlarged twice, and two lines of text
    assert_eq!((picture.width(), picture.height()), (176, 176 + 24));
}

// ---------------------------------------------------------------------------------------------------- not a number

/// One good step, then a NaN in this tensor: the error names the optimizer step and this room, and what was good stays.
fn assert_nan_is_traced(file: &str, tensor: &str, room: &[&str], more: &[&str]) {
    let models = tempfile::tempdir().unwrap();
    copy_folder(&fixture("tiny-sd15"), models.path());
    let run = Experiment::on(models.path());
    run.train(&[&["train.steps=1"], more].concat()).unwrap();
    let (adapter, metrics) = (fs::read(run.lora_file(1)).unwrap(), run.metrics());

    poison(&models.path().join(file), tensor);
    let message = error(run.resume(&["train.steps=3", "train.max_skipped_steps=0"]));
    assert!(message.contains("optimizer step 2"), "{message}");
    assert!(message.contains("not a number"), "{message}");
    for word in room {
        assert!(message.contains(word), "`{word}`: {message}");
    }
    assert_eq!(run.checkpoints(), ["step-000000", "step-000001"]);
    assert!(adapter == fs::read(run.lora_file(1)).unwrap());
    assert_eq!(run.metrics(), metrics);
}

#[test]
fn a_nan_in_the_unet_is_traced() {
    let shard = "model/unet/diffusion_pytorch_model-00002-of-00002.safetensors";
    assert_nan_is_traced(shard, "conv_out.bias", &["UNet", "denoising step 0"], &[]);
}

#[test]
fn a_nan_in_the_vae_is_traced() {
    let file = "model/vae/diffusion_pytorch_model.fp16.safetensors";
    assert_nan_is_traced(file, "decoder.conv_out.bias", &["VAE"], &[]);
}

#[test]
fn a_nan_in_a_reward_is_traced() {
    assert_nan_is_traced("aesthetic_head.safetensors", "layers.4.bias", &["reward", "aesthetic"], &[]);
    let tower = "vision_model.post_layernorm.weight";
    assert_nan_is_traced("clip/model.safetensors", tower, &["reward", "aesthetic"], &[]);
}

/// `draft-lv` runs the last step again: its own rollout.
#[test]
fn a_nan_is_traced_in_repeated_steps_too() {
    let more = ["truncation.rule=draft-lv", "truncation.n=2"];
    assert_nan_is_traced("aesthetic_head.safetensors", "layers.0.weight", &["reward", "aesthetic"], &more);
}

#[test]
fn a_nan_in_the_text_encoder_is_traced() {
    let models = tempfile::tempdir().unwrap();
    copy_folder(&fixture("tiny-sd15"), models.path());
    poison(&models.path().join("model/text_encoder/model.safetensors"), "text_model.final_layer_norm.bias");
    let run = Experiment::on(models.path());
    let message = error(run.train(&[]));
    assert!(message.contains("not a number") && message.contains("text encoder"), "{message}");
    assert!(!run.run_folder().exists());
}

/// Overflow in the adapters themselves: the last good checkpoint stays.
#[test]
fn a_learning_rate_that_breaks_the_adapters_is_an_error() {
    let run = Experiment::new("tiny-sd15");
    let message = error(run.train(&["train.steps=4", "optimizer.lr=1e30", "train.max_skipped_steps=0"]));
    assert!(message.contains("not a number") && message.contains("optimizer step 2"), "{message}");
    assert_eq!(run.checkpoints(), ["step-000000", "step-000001"]);
}

// ---------------------------------------------------------------------------------------------------- skipped steps

/// The text encoder has a NaN in the embedding of one word, so only the steps that draw its prompt meet it.
fn with_a_bad_word() -> (tempfile::TempDir, Experiment) {
    let models = tempfile::tempdir().unwrap();
    copy_folder(&fixture("tiny-sd15"), models.path());
    let tokenizer = ClipTokenizer::load(&Source::open(&text(models.path().join("model/tokenizer"))).unwrap()).unwrap();
    let (with, without) = (tokenizer.encode("dog").unwrap(), tokenizer.encode("").unwrap());
    let word = *with.iter().find(|id| !without.contains(id)).unwrap() as usize;
    let file = models.path().join("model/text_encoder/model.safetensors");
    change_tensor(&file, "text_model.embeddings.token_embedding.weight", |table| {
        let mut rows: Vec<Vec<f32>> = table.to_vec2()?;
        rows[word].fill(f32::NAN);
        Tensor::new(rows, table.device())
    });
    let experiment = Experiment::on(models.path());
    (models, experiment)
}

const BAD_WORD: [&str; 3] = ["prompts.list=['a cat', 'dog']", "train.steps=8", "optimizer.weight_decay=0"];

#[test]
fn a_step_that_is_not_finite_is_skipped_and_counted() {
    let (_models, run) = with_a_bad_word();
    run.train(&[&BAD_WORD[..], &["train.max_skipped_steps=8"]].concat()).unwrap();
    let skipped: Vec<usize> = run
        .metrics()
        .iter()
        .filter(|line| line.contains_key("skipped"))
        .map(|line| {
            let cause = line["cause"].as_str().unwrap();
            assert!(
                cause.contains("not a number") && cause.contains("text encoder") && cause.contains("`dog`"),
                "{cause}"
            );
            line["step"].as_u64().unwrap() as usize
        })
        .collect();
    assert!(!skipped.is_empty() && skipped.len() < 8, "choose another seed: {skipped:?}");
    let mut taken = 0;
    for step in 1..=8 {
        let same = bytes(run.adapters(step)) == bytes(run.adapters(step - 1));
        let same_moments = bytes(run.moments(step)) == bytes(run.moments(step - 1));
        let is_skipped = skipped.contains(&step);
        assert_eq!((same, same_moments), (is_skipped, is_skipped), "step {step}");
        taken += usize::from(!is_skipped);
        let state: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(run.checkpoint(step).join("state.json")).unwrap()).unwrap();
        assert_eq!(state["optimizer_step"], taken);
    }
    assert_eq!(run.metric("loss").len(), taken);
}

#[test]
fn too_many_skipped_steps_in_a_row_stop_the_run_with_the_last_good_state() {
    let (_models, run) = with_a_bad_word();
    let only_bad_from_2 = [&BAD_WORD[..], &["run.save_every=0", "prompts.list=['dog']"]].concat();
    run.train(&["train.steps=8", "run.save_every=0", "prompts.list=['a cat']", "train.max_skipped_steps=2"]).unwrap();
    let before = run.adapters(8);
    let message = error(run.resume(&[&only_bad_from_2[..], &["train.steps=20"]].concat()));
    for words in ["optimizer step 11", "the 2 before it were skipped", "not a number", "text encoder", "are intact"] {
        assert!(message.contains(words), "`{words}`: {message}");
    }
    assert_eq!(run.checkpoints(), ["step-000000", "step-000008"]);
    assert!(bytes(run.adapters(8)) == bytes(before));
    assert_eq!(run.metric("skipped"), [1.0, 1.0]);
    // it goes on from there, and what was skipped is forgotten
    run.resume(&["prompts.list=['a cat']", "train.steps=9"]).unwrap();
    assert_eq!((run.metric("skipped").len(), run.metric("loss").len()), (0, 9));
}

#[test]
fn a_run_that_does_not_move_says_why() {
    // every score is above its cap: the loss is flat
    let run = Experiment::new("tiny-sd15");
    let message = error(run.train(&["regularization.reward_cap.aesthetic=-100"]));
    assert!(message.contains("did not move") && message.contains("above its cap"), "{message}");
    assert_eq!(run.checkpoints(), ["step-000000"]);
    // an update that underflows
    let message = error(Experiment::new("tiny-sd15").train(&["optimizer.lr=1e-50"]));
    assert!(message.contains("did not move") && message.contains("optimizer.lr is too small"), "{message}");
}

// ---------------------------------------------------------------------------------------------------- regularisers

#[test]
fn above_its_cap_a_reward_pulls_no_more() {
    let score = Experiment::trained(&["train.steps=1"]).metric("reward/aesthetic")[0];
    let gradients = |cap: f64| {
        let cap = format!("regularization.reward_cap.aesthetic={cap}");
        // the second reward keeps the adapters moving
        let [model, file] = hps_settings();
        Experiment::trained(&["train.steps=1", &cap, &model, &file])
    };
    let [model, file] = hps_settings();
    let free = Experiment::trained(&["train.steps=1", &model, &file]);
    let above = gradients(score + 1.0);
    assert!(bytes(above.first_gradients()) == bytes(free.first_gradients()));
    let alone = Experiment::trained(&["train.steps=1", &model, &file, "reward.aesthetic.weight=0"]);
    let below = gradients(score - 1.0);
    assert!(bytes(below.first_gradients()) == bytes(alone.first_gradients()));
    // the loss is that of the cap
    let loss = |run: &Experiment| run.metric("loss")[0];
    assert!((loss(&below) - loss(&alone) - 0.01 * (1.0 - score)).abs() < 1e-6, "{} {}", loss(&below), loss(&alone));
}

#[test]
fn the_moving_average_is_exact_and_resumed() {
    let settings = ["regularization.ema_decay=0.75", "train.steps=4"];
    let run = Experiment::trained(&settings);
    let average = |run: &Experiment, step| read_tensors(&run.checkpoint(step).join(EMA));
    let adapters = |step| read_tensors(&run.lora_file(step));
    let mut expected: BTreeMap<String, Vec<f32>> =
        adapters(0).into_iter().map(|(name, tensor)| (name, numbers(&tensor))).collect();
    for step in 0..=4 {
        for (name, tensor) in adapters(step).into_iter().filter(|_| step > 0) {
            let sums = expected.get_mut(&name).unwrap().iter_mut().zip(numbers(&tensor));
            sums.for_each(|(average, x)| *average = 0.75 * *average + 0.25 * x);
        }
        for (name, tensor) in average(&run, step) {
            assert!(numbers(&tensor) == expected[&name], "{name} after step {step}");
        }
    }
    assert!(distance(&average(&run, 4), &adapters(4)) > 1e-3);
    let last = |run: &Experiment| fs::read(run.run_folder().join(EMA)).unwrap();
    assert!(last(&run) == fs::read(run.checkpoint(4).join(EMA)).unwrap());
    // stopped in between
    let parts = Experiment::trained(&["regularization.ema_decay=0.75", "train.steps=2"]);
    parts.resume(&["train.steps=4"]).unwrap();
    assert!(last(&parts) == last(&run));
    // and without it there is none, in the same adapters
    let plain = Experiment::trained(&["train.steps=4"]);
    assert!(fs::read(plain.lora_file(4)).unwrap() == fs::read(run.lora_file(4)).unwrap());
    assert!(!plain.checkpoint(4).join(EMA).exists());
}

#[test]
fn the_kl_term_keeps_the_model_near_its_start() {
    let run = |weight: &str| {
        let weight = format!("regularization.kl_weight={weight}");
        Experiment::trained(&["train.steps=4", "sampler.guidance_scale=2", "optimizer.lr=1e-2", &weight])
    };
    let [free, held] = ["0", "1e4"].map(run);
    assert_eq!(free.metric("distance"), [0.0; 0]);
    // B is zero before the first step, so the distance is too, and its gradient
    assert_eq!(held.metric("distance")[0], 0.0);
    assert!(bytes(held.adapters(1)) == bytes(free.adapters(1)));
    assert!(held.metric("distance")[1] > 0.0);
    let watched = ["guard.every=4", "guard.num_prompts=1", "guard.seeds=1"];
    let at_the_end = |run: &Experiment| {
        run.resume(&[&watched[..], &["train.steps=5", "optimizer.lr=1e-12"]].concat()).unwrap();
        *run.metric("guard/distance").last().unwrap()
    };
    let (free, held) = (at_the_end(&free), at_the_end(&held));
    assert!(held < 0.5 * free && held > 0.0, "{held} and {free}");
}

// ---------------------------------------------------------------------------------------------------- the guard

/// A reward that is held out and turned around: what raises one lowers the other.
fn against_itself() -> Vec<String> {
    let clip = text(fixture("tiny-sd15/clip"));
    let head = text(fixture("tiny-sd15/aesthetic_head.safetensors"));
    vec![
        format!("guard.reward.aesthetic={{ weight = -1.0, clip = '{clip}', head = '{head}' }}"),
        "guard.every=1".into(),
        "guard.num_prompts=2".into(),
        "guard.seeds=2".into(),
        "prompts.list=['a cat', 'a red dog']".into(),
        "sampler.eta=0".into(),
        "sampler.guidance_scale=1".into(),
        "optimizer.weight_decay=0".into(),
    ]
}

fn guarded(more: &[&str]) -> Experiment {
    let settings = against_itself();
    Experiment::trained(&[&settings.iter().map(String::as_str).collect::<Vec<_>>()[..], more].concat())
}

#[test]
fn the_guard_stops_a_run_whose_held_out_score_falls() {
    let run = guarded(&["train.steps=30", "guard.patience=2", "run.keep_checkpoints=1", "train.batch_size=2"]);
    let (reward, held_out) = (run.metric("guard/reward"), run.metric("guard/held_out"));
    assert_eq!(reward.len(), held_out.len());
    assert!(reward.iter().zip(&held_out).all(|(x, y)| (x + y).abs() < 1e-9), "one is the other turned around");
    let steps = run.metric("loss").len();
    assert!((2..30).contains(&steps), "{steps}: {reward:?}");
    // it rose twice in a row at the end, and not before
    let rises: Vec<bool> = reward.windows(2).map(|pair| pair[1] > pair[0]).collect();
    assert!(rises.ends_with(&[true, true]), "{reward:?}");
    assert!(!rises[..rises.len() - 1].windows(2).any(|pair| pair == [true, true]), "{reward:?}");
    // the last checkpoint is there, and the best one by the held-out score
    let best = (0..held_out.len()).max_by(|a, b| held_out[*a].total_cmp(&held_out[*b])).unwrap();
    let expected: std::collections::BTreeSet<String> = [best, steps].map(|step| format!("step-{step:06}")).into();
    assert_eq!(run.checkpoints(), expected.into_iter().collect::<Vec<_>>());
    let last = fs::read(run.run_folder().join("pytorch_lora_weights.safetensors")).unwrap();
    assert!(last == fs::read(run.lora_file(steps)).unwrap());

    // a run that goes on stops again, unless it is told not to
    run.resume(&[]).unwrap();
    assert_eq!(run.metric("loss").len(), steps);
    let (patience, end) = ("guard.patience=0", format!("train.steps={}", steps + 1));
    run.resume(&[patience, &end]).unwrap();
    assert_eq!(run.metric("loss").len(), steps + 1);
}

#[test]
fn the_guard_changes_nothing_that_is_learned() {
    let plain = Experiment::trained(&["train.steps=2"]);
    let settings =
        ["train.steps=2", "guard.every=2", "guard.num_prompts=1", "guard.seeds=3", "guard.prompts.list=['an owl']"];
    let watched = Experiment::trained(&settings);
    assert!(fs::read(plain.lora_file(2)).unwrap() == fs::read(watched.lora_file(2)).unwrap());
    // before the first step the model is the base model; one prompt's images differ by their noise
    let (distance, diversity) = (watched.metric("guard/distance"), watched.metric("guard/diversity"));
    assert_eq!((distance.len(), diversity.len(), distance[0]), (2, 2, 0.0));
    assert!(distance[1] > 0.0 && diversity.iter().all(|d| *d > 0.0 && *d < 2.0), "{distance:?} {diversity:?}");
    assert_eq!(watched.metric("guard/held_out"), [0.0; 0]);
    // one image of a prompt has no diversity
    let one = Experiment::trained(&["train.steps=1", "guard.every=1", "guard.seeds=1"]);
    assert_eq!(one.metric("guard/diversity"), [0.0; 0]);
}

#[test]
fn without_a_guard_the_best_checkpoint_is_that_of_the_samples() {
    let settings =
        ["train.steps=5", "run.sample_every=1", "run.num_samples=2", "run.keep_checkpoints=1", "optimizer.lr=0.1"];
    let run = Experiment::trained(&settings);
    let losses = run.metric("sample/loss");
    let best = (0..losses.len()).min_by(|a, b| losses[*a].total_cmp(&losses[*b])).unwrap();
    let expected: std::collections::BTreeSet<String> = [best, 5].map(|step| format!("step-{step:06}")).into();
    assert_eq!(run.checkpoints(), expected.into_iter().collect::<Vec<_>>());
    let run = Experiment::trained(&[&settings[..], &["run.keep_best=false"]].concat());
    assert_eq!(run.checkpoints(), ["step-000005"]);
}
