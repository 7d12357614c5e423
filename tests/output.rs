//! Files for other people and programs, and what is read out of them again.

mod support;

use std::collections::HashMap;
use std::fs;

use alignprop::lora::{Adapters, Factor, formats};
use candle_core::{Device, Tensor};
use support::program::*;
use support::*;

const LAYER: &str = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q";

/// A LoRA whose factors have numbers of these sizes.
fn sized(a: f32, b: f32) -> Adapters {
    let tensor = |size: f32, shape: (usize, usize)| {
        let values = (0..shape.0 * shape.1).map(|i| if i % 2 == 0 { size } else { -size }).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    Adapters::new(vec![Factor::new(LAYER, tensor(a, (2, 16)), tensor(b, (16, 2)), 2.0).unwrap()]).unwrap()
}

#[test]
fn a_lora_that_a_precision_cannot_hold_is_not_written_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (name, a, b, precision, words) in [
        ("large", 3e5, 1e-2, "f16", &["lora", "3.0000e5", "infinite as f16", "bf16 or f32"][..]),
        ("small", 1.0, 1e-9, "f16", &["zero as f16", "1.0000e-9", "bf16 or f32"]),
        ("huge", 1.0, 3.4e38, "bf16", &["infinite as bf16", "f32"]),
    ] {
        formats::save(&sized(a, b), &HashMap::new(), &folder.join("lora.safetensors")).unwrap();
        for format in ["kohya", "diffusers", "peft"] {
            let line = ["export", "lora.safetensors", "--format", format, "--out", name, "--precision"];
            assert_fails(folder, &[&line[..], &[precision]].concat(), words);
            assert!(!folder.join(name).exists());
            succeeds(folder, &[&line[..], &["f32"]].concat());
            if folder.join(name).is_dir() {
                fs::remove_dir_all(folder.join(name))
            } else {
                fs::remove_file(folder.join(name))
            }
            .unwrap();
        }
    }
    // what f16 rounds and holds is written
    formats::save(&sized(6e4, 1e-6), &HashMap::new(), &folder.join("lora.safetensors")).unwrap();
    succeeds(
        folder,
        &["export", "lora.safetensors", "--format", "kohya", "--precision", "f16", "--out", "k.safetensors"],
    );
}

#[test]
fn a_picture_is_in_the_format_of_its_name_or_not_begun() {
    let folder = tempfile::tempdir().unwrap();
    let model = text(fixture("tiny-sd15/model"));
    let sample = |out: &str| {
        let line = ["sample", "--prompt", "x", "--steps", "1", "--height", "16", "--width", "16", "--model"];
        [&line[..], &[&model, "-o", out]].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    for (name, start) in [("a.jpeg", &b"\xff\xd8\xff"[..]), ("b.WEBP", b"RIFF"), ("new/c.Png", b"\x89PNG")] {
        succeeds(folder.path(), &sample(name));
        assert!(fs::read(folder.path().join(name)).unwrap().starts_with(start), "{name}");
    }
    for name in ["d.gif", "d"] {
        // before anything else is looked at: there is no such model
        let mut line = sample(name);
        line.extend(["--set".into(), "model.variant=none".into()]);
        assert_fails(folder.path(), &line, &[name, ".png", ".jpg", ".webp"]);
    }
    assert_eq!(listing(folder.path()), ["a.jpeg", "b.WEBP", "new"]);
}

#[test]
fn the_base_model_of_a_lora_is_found_in_its_file() {
    let run = Experiment::trained(&["train.steps=1", "optimizer.lr=0.1"]);
    let folder = run.folder.path();
    let model = text(fixture("tiny-sd15/model"));
    let (own, kohya) = (run.run_folder().join("pytorch_lora_weights.safetensors"), folder.join("kohya.safetensors"));
    let adapters = formats::load(&own).unwrap().adapters;
    let about = |key: &str, name: &str| HashMap::from([(key.to_owned(), name.to_owned())]);
    let line = |lora: &str, out: &str| {
        let line =
            ["sample", "--prompt", "x", "--steps", "2", "--height", "72", "--width", "40", "--lora", lora, "-o", out];
        line.map(str::to_owned).to_vec()
    };
    let picture = |name: &str| fs::read(folder.join(name)).unwrap();
    succeeds(folder, &[line(&text(&own), "given.png"), vec!["--model".into(), model.clone()]].concat());

    formats::save(&adapters, &about("ss_sd_model_name", &model), &kohya).unwrap();
    formats::save_peft(&adapters, &about("base_model", &model), Default::default(), &folder.join("peft")).unwrap();
    let peft = folder.join("peft/adapter_model.safetensors");
    fs::copy(&peft, folder.join("bare")).unwrap();
    formats::save_peft(&adapters, &about("none", "x"), Default::default(), &folder.join("other")).unwrap();
    edit(
        &folder.join("other/adapter_config.json"),
        "\"base_model_name_or_path\": null",
        &format!("\"base_model_name_or_path\": \"{model}\""),
    );
    for lora in [&own, &kohya, &folder.join("peft"), &folder.join("bare"), &folder.join("other")] {
        let output = alignprop(folder).args(line(&text(lora), "found.png")).assert().success();
        let said = String::from_utf8(output.get_output().stderr.clone()).unwrap();
        assert!(said.contains(&model) && said.contains("names as its base"), "{said}");
        assert!(picture("found.png") == picture("given.png"), "{}", lora.display());
    }
    // what is said counts more than the header
    let other = text(fixture("tiny-sd21/model"));
    for said in [["--model", &other], ["--set", &format!("model.path={other}")]] {
        assert_fails(
            folder,
            &[line(&text(&own), "x.png"), said.map(str::to_owned).to_vec()].concat(),
            &["another model"],
        );
    }
    // one that is not here is not taken for another in silence
    formats::save(&adapters, &about("base_model", "/no/such"), &kohya).unwrap();
    let output = alignprop(folder).args(line(&text(&kohya), "x.png")).assert().code(1);
    let said = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    assert!(
        said.contains("warning") && said.contains("`/no/such`, which is not here") && said.contains("--model"),
        "{said}"
    );

    let line = [
        "eval",
        "--checkpoint",
        &text(&own),
        "--reward",
        "compressibility",
        "--seeds",
        "1",
        "--set",
        "prompts.list=['x']",
    ];
    let more = ["--set", "sampler.num_inference_steps=1", "--set", "sampler.height=16", "--set", "sampler.width=16"];
    succeeds(folder, &[&line[..], &more].concat());
    assert!(fs::read_to_string(folder.join("eval/eval.json")).unwrap().contains(&model));
}

#[test]
fn a_file_for_others_has_no_folders_of_this_machine() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("someone/private/my-base");
    copy_folder(&fixture("tiny-sd15/model"), &base);
    let experiment = Experiment::new("tiny-sd15");
    experiment.train(&["train.steps=1", &format!("model.path={}", text(&base))]).unwrap();
    let (run, out) = (experiment.run_folder(), experiment.path("out"));
    let own = formats::load(&run.join("pytorch_lora_weights.safetensors")).unwrap().metadata;
    assert_eq!(own["base_model"], text(&base)); // a run must find it again
    let part = format!("{}=1", text(&run));
    support::run(&["soup", &part, "-o", &text(experiment.path("soup.safetensors"))]).unwrap();
    for lora in [run, experiment.path("soup.safetensors")] {
        for format in ["kohya", "diffusers", "peft"] {
            let line = ["export", &text(&lora), "--format", format, "--out", &text(&out)];
            support::run(&line).unwrap();
            let file = if format == "peft" { out.join("adapter_model.safetensors") } else { out.clone() };
            let metadata = formats::load(&file).unwrap().metadata;
            assert_eq!(metadata["base_model"], "my-base");
            assert!(format != "kohya" || metadata["ss_sd_model_name"] == "my-base");
            let mut texts: Vec<String> = metadata.into_values().collect();
            if format == "peft" {
                texts.push(fs::read_to_string(out.join("adapter_config.json")).unwrap());
                assert!(texts[texts.len() - 1].contains("\"base_model_name_or_path\": \"my-base\""));
            }
            let here = [text(folder.path()), text(experiment.folder.path())];
            assert!(texts.iter().all(|text| here.iter().all(|here| !text.contains(here))), "{format}: {texts:?}");
            if out.is_dir() { fs::remove_dir_all(&out) } else { fs::remove_file(&out) }.unwrap();
        }
    }
}
