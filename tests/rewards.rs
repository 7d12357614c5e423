//! Several rewards on one batch of images, and scores that have no gradient.

mod support;

use std::sync::Arc;

use alignprop::config::{
    AestheticConfig, Checkpointing, ClipScoreConfig, CompressibilityConfig, Config, HpsConfig, ModelConfig, Prompt,
    RewardsConfig,
};
use alignprop::diffusion::{Noise, Stream};
use alignprop::lora::Adapters;
use alignprop::models::tokenizer::ClipTokenizer;
use alignprop::models::{Pipeline, Source};
use alignprop::ops::device::Compute;
use alignprop::ops::{Ledger, Number};
use alignprop::rewards::{ImageScores, Judge, Judged, Rewards, Score, TapedImages, Weighted};
use alignprop::training::PromptLists;
use alignprop::training::guard::Guard;
use alignprop::training::step::{Critic, Tally, credit};
use anyhow::Context;
use candle_core::{Device, Tensor};
use support::{fixture, numbers, text};

fn tokenizer() -> Arc<ClipTokenizer> {
    let source = Source::open(&text(fixture("tiny-sd15/model"))).unwrap();
    Arc::new(ClipTokenizer::load(&source.sub("tokenizer")).unwrap())
}

/// A head and a cosine on one CLIP, and a stand-in.
fn three_rewards() -> Rewards {
    let clip = text(fixture("tiny-sd15/clip"));
    let head = text(fixture("tiny-sd15/aesthetic_head.safetensors"));
    let config = RewardsConfig {
        aesthetic: Some(AestheticConfig { clip: clip.clone(), head, weight: 0.5, ..Default::default() }),
        clip_score: Some(ClipScoreConfig { model: clip, weight: 2.0, ..Default::default() }),
        compressibility: Some(CompressibilityConfig { weight: 0.25 }),
        ..Default::default()
    };
    Rewards::load(&config, &tokenizer()).unwrap()
}

/// Images (B, 3, 40, 32) of blocks.
fn images(batch: u64) -> Tensor {
    let blocks = Noise::new(1).normal_batch(Stream::Latents, 0, 0..batch, (3, 10, 8)).unwrap();
    (blocks.upsample_nearest2d(40, 32).unwrap() * 0.4).unwrap()
}

fn error(x: &[f32], y: &[f32]) -> f32 {
    let largest = y.iter().fold(0f32, |most, y| most.max(y.abs()));
    x.iter().zip(y).fold(0f32, |most, (x, y)| most.max((x - y).abs())) / largest
}

#[test]
fn a_batch_is_judged_as_its_images_one_at_a_time() {
    let rewards = three_rewards();
    let (images, prompts) = (images(3), ["a cat", "a red dog", "two foxes"].map(Prompt::from));
    let judge = |images: &Tensor, prompts: &[Prompt]| {
        let ((scores, d_images), readings) = Ledger::around(|ledger| {
            let judged = rewards.judge(images, prompts, ledger)?;
            Ok((judged.scores().to_vec(), judged.pull(3.0)?))
        })
        .unwrap();
        let of = |scores: &ImageScores| (scores.get(&readings), scores.loss(&rewards, &readings));
        (scores.iter().map(of).collect::<Vec<_>>(), d_images)
    };
    let (scores, d_images) = judge(&images, &prompts);
    let at_once = rewards.scores(&images, &prompts).unwrap();
    for (row, prompt) in prompts.iter().enumerate() {
        let image = images.narrow(0, row, 1).unwrap();
        let (alone, d_image) = judge(&image, std::slice::from_ref(prompt));
        let ((found, loss), (expected, loss_alone)) = (&scores[row], &alone[0]);
        assert_eq!(*found, at_once[row]);
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5 * expected.abs().max(1.0), "{found} for {expected}");
        }
        // the size of a file is exact
        assert_eq!(found[2], expected[2]);
        assert!((loss - loss_alone).abs() < 1e-5);
        let error = error(&numbers(&d_images.narrow(0, row, 1).unwrap()), &numbers(&d_image));
        assert!(error < 1e-4, "image {row}: {error}");
    }
    assert!(at_once[0] != at_once[1]);
    // a prompt for each image, no more and no less
    let message = rewards.scores(&images, &prompts[..2]).unwrap_err().to_string();
    assert_eq!(message, "3 images with 2 prompts");
}

/// What the prompt's `count` says, whatever the image.
struct Count;

impl Score for Count {
    fn scores(&self, _: &TapedImages, prompts: &[Prompt], _: &mut Ledger) -> anyhow::Result<Vec<Number>> {
        let count = |prompt: &Prompt| {
            let count = prompt.fields.get("count").and_then(serde_json::Value::as_f64);
            Ok(count.with_context(|| format!("`{prompt}` has no count"))?.into())
        };
        prompts.iter().map(count).collect()
    }
}

/// JPEG sizes, which are trained, and counts, which are not.
fn with_count(weight: f64) -> Rewards {
    let config = RewardsConfig { compressibility: Some(CompressibilityConfig::default()), ..Default::default() };
    let mut rewards: Vec<Weighted> = Rewards::load(&config, &tokenizer()).unwrap().into_iter().collect();
    rewards.push(Weighted { name: "count", weight, cap: None, judge: Judge::Score(Arc::new(Count)) });
    Rewards::new(rewards)
}

fn counted(text: &str, count: u64) -> Prompt {
    Prompt { text: text.to_owned(), fields: serde_json::Map::from_iter([("count".to_owned(), count.into())]) }
}

#[test]
fn a_score_without_a_gradient_is_scored_and_not_trained() {
    let judged = with_count(1.0).judge(&images(1), &[counted("a cat", 1)], &mut Ledger::default());
    let message = judged.err().unwrap().to_string();
    assert!(
        message.starts_with("the reward `count` has no gradient, and a weight of 1: set its weight to 0"),
        "{message}"
    );

    let (rewards, prompts) = (with_count(0.0), [counted("two cats", 2), counted("three dogs", 3)]);
    // as `eval` scores
    let scores = rewards.scores(&images(2), &prompts).unwrap();
    assert_eq!([scores[0][1], scores[1][1]], [2.0, 3.0]);
    assert!(scores[0][0] < 0.0);
    let message = rewards.scores(&images(1), &["a cat".into()]).unwrap_err().to_string();
    assert_eq!(message, "`a cat` has no count");

    // in a step
    let pipeline = Pipeline::load(&ModelConfig::at(text(fixture("tiny-sd15/model")))).unwrap();
    let latents = Noise::new(0).normal_batch(Stream::Latents, 0, 0..2, (4, 9, 5)).unwrap();
    let step = |rewards: &Rewards| {
        let critic = Critic { vae: &pipeline.vae, rewards, checkpointing: Checkpointing::Step };
        let mut tally = Tally::new(&Adapters::default());
        let credit = credit(&critic, &latents, &prompts, 1.0, &mut tally).unwrap();
        let readings = tally.ledger.read().unwrap();
        let scores: Vec<_> = credit.scores.iter().map(|scores| scores.get(&readings)).collect();
        let losses: Vec<_> = credit.scores.iter().map(|scores| scores.loss(rewards, &readings)).collect();
        (scores, losses, numbers(&credit.d_latents))
    };
    let (scores, losses, d_latents) = step(&rewards);
    let trained = Rewards::new(with_count(0.0).into_iter().take(1).collect());
    let (scores_alone, losses_alone, d_alone) = step(&trained);
    assert_eq!([scores[0][1], scores[1][1]], [2.0, 3.0]);
    assert_eq!([scores[0][0], scores[1][0]], [scores_alone[0][0], scores_alone[1][0]]);
    assert_eq!((losses, d_latents), (losses_alone, d_alone));

    // where nothing is trained, nothing pulls
    let count = Weighted { name: "count", weight: 0.0, cap: None, judge: Judge::Score(Arc::new(Count)) };
    let judged: Judged = Rewards::new(vec![count]).judge(&images(2), &prompts, &mut Ledger::default()).unwrap();
    let d_images = judged.pull(1.0).unwrap();
    assert_eq!(d_images.dims(), [2, 3, 40, 32]);
    assert!(numbers(&d_images).iter().all(|d| *d == 0.0));
}

#[test]
fn the_guard_reports_a_score_that_reads_fields() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("counts.jsonl");
    std::fs::write(&file, "{\"prompt\": \"two cats\", \"count\": 2}\n{\"prompt\": \"five cats\", \"count\": 5}\n")
        .unwrap();
    let config = Config::parse(&format!("guard.every = 1\nguard.prompts.file = '{}'", text(&file)), "test", &[]);
    let config = config.unwrap();
    let prompts = PromptLists::load(&config).unwrap();
    let guard = Guard::load(&config, prompts.guard(), &tokenizer(), &Compute::cpu()).unwrap().unwrap();
    let image = |prompt: &Prompt, _, _| {
        assert!(prompt.fields.contains_key("count"));
        Ok((Tensor::zeros((1, 3, 16, 16), candle_core::DType::F32, &Device::Cpu)?, 0.0))
    };
    let line = guard.evaluate(&with_count(0.0), image).unwrap();
    assert_eq!(line["guard/reward/count"], 3.5);
    assert_eq!(line["guard/reward"], line["guard/reward/compressibility"]);
    // held out, it counts
    let line = guard.with_held_out(with_count(2.0)).evaluate(&with_count(0.0), image).unwrap();
    let size = line["guard/held_out/compressibility"].as_f64().unwrap();
    assert!((line["guard/held_out"].as_f64().unwrap() - (2.0 * 3.5 + size)).abs() < 1e-9);
}

#[test]
fn a_tower_with_pixel_statistics_of_its_own_scores_as_one_with_openais_whose_weights_take_them_up() {
    let (mean, std) = ([0.2f64, 0.5, 0.6], [0.3f64, 0.7, 0.4]);
    let (openai_mean, openai_std) = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]);
    let folder = tempfile::tempdir().unwrap();
    let [own, twin] = ["own", "twin"].map(|name| folder.path().join(name));
    for clip in [&own, &twin] {
        support::copy_folder(&fixture("tiny-sd21/clip"), clip);
    }
    let about = format!(r#"{{"image_mean": {mean:?}, "image_std": {std:?}}}"#);
    std::fs::write(own.join("preprocessor_config.json"), about).unwrap();
    // (x - mean) / std = (openai_std / std) y + (openai_mean - mean) / std, where y is normalised as OpenAI's
    let per_colour = |values: [f64; 3]| Tensor::new(&values.map(|v| v as f32), &Device::Cpu).unwrap();
    let scale = per_colour([0, 1, 2].map(|c| openai_std[c] / std[c])).reshape((1, 3, 1, 1)).unwrap();
    let offset = per_colour([0, 1, 2].map(|c| (openai_mean[c] - mean[c]) / std[c])).reshape((1, 3)).unwrap();
    let (file, vision) = (twin.join("model.safetensors"), "vision_model.embeddings.");
    let kernel = format!("{vision}patch_embedding.weight");
    let sums = support::read_tensors(&file)[&kernel].to_dtype(candle_core::DType::F32).unwrap().sum((2, 3)).unwrap();
    let shift = sums.broadcast_mul(&offset).unwrap().sum(1).unwrap();
    support::change_tensor(&file, &kernel, |kernel| kernel.broadcast_mul(&scale));
    support::change_tensor(&file, &format!("{vision}position_embedding.weight"), |positions| {
        let patches = positions.narrow(0, 1, positions.dims()[0] - 1)?.broadcast_add(&shift)?;
        Tensor::cat(&[positions.narrow(0, 0, 1)?, patches], 0)
    });
    let scores = |clip: &std::path::Path| {
        let head = text(fixture("tiny-sd21/aesthetic_head.safetensors"));
        let config = RewardsConfig {
            aesthetic: Some(AestheticConfig { clip: text(clip), head, ..Default::default() }),
            clip_score: Some(ClipScoreConfig { model: text(clip), ..Default::default() }),
            ..Default::default()
        };
        let rewards = Rewards::load(&config, &tokenizer()).unwrap();
        rewards.scores(&images(1), &["a red dog".into()]).unwrap().concat()
    };
    let (own, twin, plain) = (scores(&own), scores(&twin), scores(&fixture("tiny-sd21/clip")));
    for reward in 0..2 {
        // the twin's weights are rounded to the format of their file once more
        let (rounding, effect) = ((own[reward] - twin[reward]).abs(), (own[reward] - plain[reward]).abs());
        assert!(rounding < 1e-3 && rounding < 0.1 * effect, "{own:?} {twin:?} {plain:?}");
    }
}

#[test]
fn an_open_clip_model_takes_the_pixel_statistics_of_its_config() {
    let folder = tempfile::tempdir().unwrap();
    let score = |name: &str, files: &[(&str, &str)], config: Option<&str>| {
        let model = folder.path().join(name);
        support::copy_folder(&fixture("tiny-sd15/hps"), &model);
        for (file, added) in files {
            let old = std::fs::read_to_string(model.join(file)).unwrap_or("{ }".into());
            let start = old.trim_end().strip_suffix('}').unwrap().trim_end();
            let comma = if start.ends_with('{') { "" } else { "," };
            std::fs::write(model.join(file), format!("{start}{comma} {added}}}")).unwrap();
        }
        let config = RewardsConfig {
            hps: Some(HpsConfig {
                file: "HPS_tiny.pt".into(),
                config: config.map(|file| text(model.join(file))),
                model: text(model),
                ..Default::default()
            }),
            ..Default::default()
        };
        let rewards = Rewards::load(&config, &tokenizer()).unwrap();
        rewards.scores(&images(1), &["a red dog".into()]).unwrap()[0][0]
    };
    let open_clip = ("open_clip_config.json", r#""preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]}"#);
    let transformers = ("preprocessor_config.json", r#""image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]"#);
    let other = ("preprocessor_config.json", r#""image_mean": 0.1, "image_std": 0.9"#);
    let own = score("own", &[open_clip], None);
    assert!((own - score("plain", &[], None)).abs() > 1e-4);
    assert_eq!(own, score("transformers", &[transformers], None));
    assert_eq!(own, score("both", &[open_clip, other], None));
    assert_eq!(own, score("named", &[open_clip, other], Some("open_clip_config.json")));
}

#[test]
fn open_clip_weights_are_read_by_their_path_alone() {
    let folder = fixture("tiny-sd15/hps");
    let score = |model: Option<String>, file: Option<String>| {
        let default = HpsConfig::default();
        let (model, file) = (model.unwrap_or(default.model), file.unwrap_or(default.file));
        let config = RewardsConfig { hps: Some(HpsConfig { model, file, ..Default::default() }), ..Default::default() };
        Rewards::load(&config, &tokenizer())?.scores(&images(1), &["a red dog".into()])
    };
    let inside = score(Some(text(&folder)), Some("HPS_tiny.pt".into())).unwrap();
    let path = text(folder.join("HPS_tiny.pt"));
    assert_eq!(inside, score(None, Some(path.clone())).unwrap());
    assert_eq!(inside, score(Some(path), None).unwrap());
    // nothing is asked of the hub for a path that does not exist
    let error = format!("{:#}", score(None, Some(text(folder.join("HPS_tny.pt")))).unwrap_err());
    assert!(error.contains("does not exist") && error.contains("HPS_tiny.pt"), "{error}");
}
