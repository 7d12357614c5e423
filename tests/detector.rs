//! Rewards that a detector gives: how many things, and whether there is one.

mod support;

use std::sync::Arc;

use alignprop::commands::verify::{Report, verify};
use alignprop::config::{Config, Prompt};
use alignprop::diffusion::{Noise, Stream};
use alignprop::models::Source;
use alignprop::models::tokenizer::ClipTokenizer;
use alignprop::ops::Ledger;
use alignprop::rewards::Rewards;
use candle_core::Tensor;
use support::{Experiment, change_tensor, copy_folder, distance, edit, fixture, norm, poison, text};

/// The model of `[reward.KIND]` as a setting.
fn model(kind: &str) -> String {
    format!("reward.{kind}.model={}", text(fixture("tiny-yolos/model")))
}

fn rewards(settings: &[&str]) -> anyhow::Result<Rewards> {
    let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
    let config = Config::parse("", "test", &settings)?;
    let source = Source::open(&text(fixture("tiny-sd15/model")))?;
    Rewards::load(&config.reward, &Arc::new(ClipTokenizer::load(&source.sub("tokenizer"))?))
}

/// An image (1, 3, height, width) of blocks.
fn image(height: usize, width: usize) -> Tensor {
    let blocks =
        Noise::new(1).normal_batch(Stream::Latents, 0, 0..1, (3, height.div_ceil(8), width.div_ceil(8))).unwrap();
    let whole = blocks.upsample_nearest2d(height.div_ceil(8) * 8, width.div_ceil(8) * 8).unwrap();
    (whole.narrow(2, 0, height).unwrap().narrow(3, 0, width).unwrap().contiguous().unwrap() * 0.4).unwrap()
}

fn failures(report: &Report) -> Vec<String> {
    report.rows.iter().filter(|row| !row.pass).map(|row| format!("{}: {}", row.case, row.what)).collect()
}

#[test]
fn the_fixture_is_reproduced_and_what_is_wrong_is_found() {
    let report = verify(&fixture("tiny-yolos"), None).unwrap();
    assert_eq!(failures(&report), [""; 0]);
    assert!(report.passed() && report.skipped.is_empty());
    // of two images each: pixels, logits, boxes, and of two classes the distribution and three numbers with their gradients; of
    // two sets of logits: the distribution, the expected count with its gradient, three gradients; and the labels
    assert_eq!(report.rows.len(), 2 * (3 + 2 * (1 + 3 * 2)) + 2 * (1 + 2 + 3) + 1);

    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("set");
    copy_folder(&fixture("tiny-yolos"), &dir);
    let parts = dir.join("parts.safetensors");
    change_tensor(&parts, "dreward_0_class1_n2", |x| x * 1.001);
    change_tensor(&parts, "boxes_1", |x| x + 1e-3);
    poison(&dir.join("count.safetensors"), "sure_dlogits_n0");
    edit(&dir.join("model/config.json"), "\"fox\"", "\"wolf\"");
    let expected = [
        "detector: labels",
        "image 0: class1, Exactly(2), gradient",
        "image 1: boxes",
        "sure: gradient of log P(N = 0), absolute",
    ];
    assert_eq!(failures(&verify(&dir, None).unwrap()), expected);
    edit(&dir.join("reference.json"), "\"yolos\"", "\"yolo\"");
    let error = format!("{:#}", verify(&dir, None).err().unwrap());
    assert!(error.contains("is of kind `yolo`"), "{error}");
}

#[test]
fn counts_are_trained_and_logged() {
    let count = model("count");
    let settings = ["reward.aesthetic.weight=0", &count, "optimizer.loss_coeff=1"];
    let run = Experiment::trained(&settings);
    let [score, expected, detected] =
        ["reward/count", "reward/count-expected", "reward/count-detected"].map(|name| run.metric(name));
    assert_eq!([score.len(), expected.len(), detected.len()], [2; 3]);
    assert!(score.iter().all(|score| *score < 0.0) && expected.iter().all(|count| (0.0..4.0).contains(count)));
    assert_eq!(run.metric("loss")[0], -score[0]);
    let gradients = run.first_gradients();
    // of the factors B; while these are 0, A has none
    let of_b =
        |(name, g): (&String, &Tensor)| !name.contains("lora_B") || norm(&[(name.clone(), g.clone())].into()) > 0.0;
    assert!(norm(&gradients) > 0.0 && gradients.iter().all(of_b));
    // a class or a number of its own is another reward
    let object = [&*model("object"), "reward.object.object=dog"].map(str::to_owned);
    let other = Experiment::trained(&["reward.aesthetic.weight=0", &object[0], &object[1], "optimizer.loss_coeff=1"]);
    assert!(distance(&other.first_gradients(), &gradients) > 0.1);
}

#[test]
fn a_prompt_without_a_thing_or_a_number_ends_the_run_before_it_trains() {
    let (count, held_out) = (model("count"), format!("guard.{}", model("object")));
    for (settings, message) in [
        (
            &[&*count, "prompts.list=['a cat', 'two wugs']"][..],
            "in prompts: the reward `count`: no word of the prompt \"two wugs\"",
        ),
        (&[&*count, "prompts.list=['cats']"], "the prompt \"cats\" does not say how many of `cat`"),
        (&[&*count, "prompts.list=['9 cats']"], "asks for 9 things, and the detector sees at most 4"),
        (&[&*count, "run.sample_prompts.list=['a wug']"], "in run.sample_prompts: the reward `count`: no word"),
        (
            &[&*held_out, "guard.every=1", "guard.prompts.list=['a wug']"],
            "the guard's held-out rewards: the reward `object`: no word",
        ),
        (
            &[&*model("object"), "reward.object.object='wug'"],
            "reward.object.object: the detector knows no `wug`: it knows",
        ),
    ] {
        let experiment = Experiment::new("tiny-sd15");
        let error = format!("{:#}", experiment.train(settings).unwrap_err());
        assert!(error.contains(message), "{settings:?}\n{error}");
        assert!(!experiment.run_folder().join("metrics.jsonl").exists());
    }
}

#[test]
fn what_is_no_detector_is_named() {
    let clip = format!("reward.count.model={}", text(fixture("tiny-sd15/clip")));
    let error = format!("{:#}", rewards(&[&clip]).err().unwrap());
    assert!(
        error.starts_with("loading the reward `count`: ") && error.contains("is a `clip` and no YOLOS detector"),
        "{error}"
    );
}

#[test]
fn presence_and_absence_are_opposites_and_images_of_any_size_are_seen() {
    let object = model("object");
    let score = |settings: &[&str], image: &Tensor| {
        let settings: Vec<&str> = settings.iter().copied().chain([&*object]).collect();
        rewards(&settings).unwrap().scores(image, &["two dogs".into()]).unwrap()[0].clone()
    };
    for image in [image(40, 32), image(37, 61), image(5, 90)] {
        let (present, absent) = (score(&[], &image), score(&["reward.object.remove=true"], &image));
        assert!((present[0].exp() + absent[0].exp() - 1.0).abs() < 1e-5, "{present:?} and {absent:?}");
        assert_eq!(present[1..], absent[1..]);
        // the named class counts before the prompt's
        let cat = score(&["reward.object.object='cats'"], &image);
        assert_ne!(cat[0], present[0]);
        // another size in front of the detector
        assert_ne!(score(&["reward.object.size=64"], &image)[0], present[0]);
    }
}

/// The threshold counts what transformers' post-processing would.
#[test]
fn the_thresholded_count_falls_with_the_threshold() {
    let counts = ["0", "0.2", "1"].map(|threshold| {
        let threshold = format!("reward.count.threshold={threshold}");
        rewards(&[&model("count"), &threshold]).unwrap().scores(&image(40, 32), &["a dog".into()]).unwrap()[0][2]
    });
    assert!(counts[0] >= counts[1] && counts[1] >= counts[2] && counts[2] == 0.0, "{counts:?}");
}

/// On the gradient alone. (The fixture's random detector hardly looks at its image, so it does not come to see them.)
#[test]
fn following_the_gradient_goes_towards_the_number_that_was_asked_for() {
    let rewards = rewards(&[&model("count")]).unwrap();
    for n in [0, 1, 3] {
        let prompts = [Prompt { text: "cats".into(), fields: [("count".to_owned(), n.into())].into_iter().collect() }];
        let mut x = image(40, 32);
        let judge = |x: &Tensor| {
            let noted = |ledger: &mut Ledger| rewards.judge(x, &prompts, ledger);
            let (judged, readings) = Ledger::around(noted).unwrap();
            (judged.scores()[0].get(&readings), judged.pull(1.0).unwrap())
        };
        let before = judge(&x).0;
        for _ in 0..60 {
            let d = judge(&x).1;
            let length = d.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            x = (&x - (d * f64::from(0.2 / length)).unwrap()).unwrap().clamp(-1f32, 1.0).unwrap();
        }
        let after = judge(&x).0;
        assert!(after[0] > before[0] + 1e-4, "{n}: {before:?}, then {after:?}");
        let apart = |scores: &[f64]| (scores[1] - f64::from(n)).abs();
        assert!(n == 1 || apart(&after) < apart(&before), "{n}: {before:?}, then {after:?}");
    }
}
