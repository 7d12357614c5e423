//! ImageReward, and SigLIP's towers under the rewards that take a CLIP.

mod support;

use std::sync::Arc;

use alignprop::commands::verify::verify;
use alignprop::config::{Config, Prompt};
use alignprop::diffusion::{Noise, Stream};
use alignprop::models::Source;
use alignprop::models::tokenizer::ClipTokenizer;
use alignprop::ops::Ledger;
use alignprop::rewards::Rewards;
use candle_core::{Device, Tensor};
use support::{Experiment, change_tensor, copy_folder, fixture, norm, poison, text};

fn rewards(settings: &[String]) -> anyhow::Result<Rewards> {
    let config = Config::parse("", "test", settings)?;
    let source = Source::open(&text(fixture("tiny-sd15/model")))?;
    Rewards::load(&config.reward, &Arc::new(ClipTokenizer::load(&source.sub("tokenizer"))?))
}

fn image_reward(file: &str) -> [String; 2] {
    [
        format!("reward.image-reward.model={}", text(fixture("tiny-imagereward"))),
        format!("reward.image-reward.file={file}"),
    ]
}

fn images(batch: u64) -> Tensor {
    let blocks = Noise::new(1).normal_batch(Stream::Latents, 0, 0..batch, (3, 5, 7)).unwrap();
    (blocks.upsample_nearest2d(40, 56).unwrap() * 0.4).unwrap()
}

#[test]
fn the_fixtures_are_reproduced_and_what_is_wrong_is_found() {
    let failures = |dir: &std::path::Path| {
        let rows = verify(dir, None).unwrap().rows;
        let failed = rows.iter().filter(|row| !row.pass);
        (rows.len(), failed.map(|row| format!("{}: {}", row.case, row.what)).collect::<Vec<_>>())
    };
    // ids and their mask; of two images the pixels, the scores from both files and two gradients; of one the ViT's tokens and two
    // texts' hidden states
    assert_eq!(failures(&fixture("tiny-imagereward")), (2 + 2 * 5 + 3, vec![]));
    assert_eq!(failures(&fixture("tiny-siglip")), (4, vec![]));

    let folder = tempfile::tempdir().unwrap();
    let copy = |set: &str| {
        copy_folder(&fixture(set), &folder.path().join(set));
        folder.path().join(set)
    };
    let dir = copy("tiny-imagereward");
    change_tensor(&dir.join("model.safetensors"), "mlp.layers.7.bias", |x| x + 0.1);
    poison(&dir.join("parts.safetensors"), "dimage_1_prompt1");
    std::fs::write(
        dir.join("vocab.txt"),
        std::fs::read_to_string(dir.join("vocab.txt")).unwrap().replace("red", "blue"),
    )
    .unwrap();
    let failed = failures(&dir).1;
    for expected in ["tokenizer: input_ids", "image 0: scores, of the largest", "image 1: gradient, text 1"] {
        assert!(failed.iter().any(|row| row == expected), "{failed:?}");
    }
    assert!(!failed.contains(&"image 0: pixels".to_owned()));
    let dir = copy("tiny-siglip");
    change_tensor(&dir.join("parts.safetensors"), "d_pixels", |x| x * 1.001);
    assert_eq!(failures(&dir).1, ["cosine: gradient of the pixels"]);
}

#[test]
fn image_reward_is_trained_and_both_files_give_the_same() {
    let [model, file] = image_reward("ImageReward.pt");
    let settings = ["reward.aesthetic.weight=0", &model, &file, "optimizer.loss_coeff=1"];
    let run = Experiment::trained(&settings);
    let scores = run.metric("reward/image-reward");
    assert_eq!((scores.len(), run.metric("loss")[0]), (2, -scores[0]));
    // of the factors B; while these are 0, A has none
    let gradients = run.first_gradients();
    let of_b =
        |(name, g): (&String, &Tensor)| !name.contains("lora_B") || norm(&[(name.clone(), g.clone())].into()) > 0.0;
    assert!(norm(&gradients) > 0.0 && gradients.iter().all(of_b));
    let (prompts, images) = (["a cat", "two red foxes"].map(Prompt::from), images(2));
    let of = |file| rewards(&image_reward(file)).unwrap().scores(&images, &prompts).unwrap();
    assert_eq!(of("ImageReward.pt"), of("model.safetensors"));
    // an image's score is its own, whatever it is judged beside
    let alone = |row: usize| {
        let image = images.narrow(0, row, 1).unwrap().contiguous().unwrap();
        rewards(&image_reward("model.safetensors")).unwrap().scores(&image, &prompts[row..=row]).unwrap()[0][0]
    };
    for (row, scores) in of("model.safetensors").iter().enumerate() {
        assert!((scores[0] - alone(row)).abs() < 1e-5, "{scores:?}");
    }
}

/// ReFL's relu(2 - score): a target with a cap at it.
#[test]
fn a_target_with_a_cap_at_it_pulls_from_below_alone() {
    let (images, prompts) = (images(1), [Prompt::from("a cat")]);
    let score = rewards(&image_reward("model.safetensors")).unwrap().scores(&images, &prompts).unwrap()[0][0];
    let pull = |target: f64| {
        let mut settings = image_reward("model.safetensors").to_vec();
        settings.push(format!("reward.image-reward.target={target:?}"));
        let rewards = rewards(&settings).unwrap().with_caps(&[("image-reward".to_owned(), target)].into());
        let (judged, readings) = Ledger::around(|ledger| rewards.judge(&images, &prompts, ledger)).unwrap();
        let loss = judged.scores()[0].loss(&rewards, &readings);
        (loss, judged.pull(1.0).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap())
    };
    let (loss, squared) = pull(score + 1.0);
    assert!((loss - 1.0).abs() < 1e-5 && squared > 0.0, "{loss} and {squared}");
    assert_eq!(pull(score - 1.0), (0.0, 0.0));
}

#[test]
fn what_is_no_image_reward_is_named() {
    let error = |settings: [String; 2]| format!("{:#}", rewards(&settings).err().unwrap());
    let clip = format!("reward.image-reward.model={}", text(fixture("tiny-sd15/clip")));
    let message = error([clip, "reward.image-reward.file=model.safetensors".into()]);
    assert!(
        message.starts_with("loading the reward `image-reward`: ") && message.contains("is no ImageReward"),
        "{message}"
    );
    let folder = tempfile::tempdir().unwrap();
    let vocab = folder.path().join("vocab.txt");
    std::fs::write(&vocab, "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n").unwrap();
    let settings =
        [image_reward("model.safetensors").to_vec(), vec![format!("reward.image-reward.vocab={}", text(&vocab))]]
            .concat();
    let message = format!("{:#}", rewards(&settings).err().unwrap());
    assert!(message.contains("reads 21 token ids") && message.contains("has 8 with [DEC] and [ENC]"), "{message}");
}

#[test]
fn siglip_gives_cosines_and_features_for_heads() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("siglip");
    copy_folder(&fixture("tiny-siglip/model"), &model);
    let vocab: Vec<(&str, f64)> =
        vec![("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁cat", -1.5), ("▁dog", -1.6), ("▁", -4.0)];
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "post_processor": null, "decoder": null, "normalizer": null,
        "added_tokens": [], "pre_tokenizer": { "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true },
        "model": { "type": "Unigram", "unk_id": 1, "vocab": vocab, "byte_fallback": false },
    });
    std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let head = folder.path().join("head.safetensors");
    let weight = Noise::new(3).normal(Stream::LoraInit, 0, 0, 16);
    let weight = Tensor::from_vec(weight, (1, 16), &Device::Cpu).unwrap();
    candle_core::safetensors::save(&[("fc.weight", weight)].into(), &head).unwrap();
    let settings = [
        format!("reward.clip-score={{ model = '{}', preprocess = 'squash' }}", text(&model)),
        format!(
            "reward.clip-head={{ clip = '{}', head = '{}', layers = [{{ linear = 'fc' }}] }}",
            text(&model),
            text(&head)
        ),
    ];
    let rewards = rewards(&settings).unwrap();
    let judge = |prompt: &str| {
        let noted = |ledger: &mut Ledger| rewards.judge(&images(1), &[prompt.into()], ledger);
        let (judged, readings) = Ledger::around(noted).unwrap();
        let scores = judged.scores()[0].get(&readings);
        (scores, judged.pull(1.0).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap())
    };
    let ((cat, squared), (dog, _)) = (judge("A cat!"), judge("a dog"));
    // the head's score comes first and has no prompt
    assert!(squared > 0.0 && cat[0] == dog[0] && cat[1] != dog[1] && cat[1].abs() <= 1.0, "{cat:?} and {dog:?}");
}
