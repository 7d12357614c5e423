//! Files of other programs: single-file models, adapters of every format, pickles; and what `export` writes for them.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use alignprop::lora::formats::{self, Format};
use alignprop::lora::{Adapters, Factor};
use assert_cmd::Command;
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use support::original::{self, Tensors};
use support::*;

/// What a command wrote to stderr; it must have succeeded.
fn run_in<S: AsRef<str>>(folder: &Path, line: &[S]) -> (String, String) {
    let output = command(folder).args(line.iter().map(AsRef::as_ref)).assert().success();
    let output = output.get_output();
    (String::from_utf8_lossy(&output.stdout).into(), String::from_utf8_lossy(&output.stderr).into())
}

/// What a command that must fail says: no panic, all of `words`.
fn fails<S: AsRef<str>>(folder: &Path, line: &[S], words: &[&str]) -> String {
    let output = command(folder).args(line.iter().map(AsRef::as_ref)).assert().code(1);
    let stderr = String::from_utf8_lossy(&output.get_output().stderr).into_owned();
    assert!(!stderr.contains("panicked") && stderr.contains("error: "), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "`{word}` is not in:\n{stderr}");
    }
    stderr
}

/// The program in this folder, cut off from the hub and from the user's cache.
fn command(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_alignprop"));
    command.current_dir(folder).env("HF_HUB_OFFLINE", "1").env("HF_HOME", folder.join("no-cache"));
    command.env_remove("HF_HUB_CACHE").env_remove("HUGGINGFACE_HUB_CACHE").env_remove("HF_TOKEN");
    command
}

/// The tensors of a small picture: latents, embeddings, the image before rounding; and the warnings.
fn sample(folder: &Path, model: &str, more: &[&str]) -> (Tensors, String) {
    let line = [
        &["sample", "--prompt", "a cat, 4k!", "--model", model, "--height", "32", "--width", "40", "--steps", "2"][..],
        &["-o", "out.png", "--save-tensors", "out.safetensors"],
        more,
    ]
    .concat();
    let (_, stderr) = run_in(folder, &line);
    (read_tensors(&folder.join("out.safetensors")), stderr)
}

fn assert_same(x: &Tensors, y: &Tensors) {
    for (name, y) in y {
        assert!(numbers(&x[name]) == numbers(y), "{name} differs");
    }
}

fn models() -> Vec<PathBuf> {
    let tiny = ["tiny-sd15", "tiny-sd21", "tiny-sdxl"].map(|set| fixture(set).join("model"));
    let beside = ["sd15", "sd21", "sdxl"]
        .map(|set| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/reference").join(set).join("model"));
    tiny.into_iter().chain(beside.into_iter().filter(|model| model.is_dir())).collect()
}

// ---------------------------------------------------------------------------------------------------- single files

#[test]
fn a_single_file_is_the_pipeline_that_it_was_made_of() {
    for model in models() {
        let folder = tempfile::tempdir().unwrap();
        original::save(&original::checkpoint(&model), &[], &folder.path().join("model.safetensors"));
        let config = format!("model.config={}", text(&model));
        let (whole, _) = sample(folder.path(), &text(&model), &[]);
        let (single, warnings) = sample(folder.path(), "model.safetensors", &["--set", &config]);
        assert_same(&single, &whole);
        // the tiny models have other numbers of heads and groups than their sizes suggest, and no encoder in their VAE
        let differing = warnings.lines().filter(|line| line.contains("the config counts"));
        let known = ["`attention_head_dim`", "`norm_num_groups`", "`use_quant_conv`"];
        assert!(differing.clone().all(|line| known.iter().any(|key| line.contains(key))), "{warnings}");
    }
}

#[test]
fn a_vae_beside_a_single_file_counts_before_the_one_inside() {
    const VAE: &str = "first_stage_model.";
    let model = fixture("tiny-sd15/model");
    let config = format!("model.config={}", text(&model));
    let checkpoint = original::checkpoint(&model);
    // a VAE whose pictures are lighter
    let mut lighter = checkpoint.clone();
    let bias = lighter.get_mut("first_stage_model.decoder.conv_out.bias").unwrap();
    *bias = bias.affine(1.0, 0.25).unwrap();
    let vae = |keep: fn(&str) -> String| -> Tensors {
        let parts = lighter.iter().filter(|(name, _)| name.starts_with(VAE));
        let mut vae: Tensors = parts.map(|(name, tensor)| (keep(name), tensor.clone())).collect();
        vae.insert("loss.logvar".into(), Tensor::zeros((), DType::F32, &Device::Cpu).unwrap());
        vae
    };
    let folder = tempfile::tempdir().unwrap();
    original::save(&lighter, &[], &folder.path().join("lighter.safetensors"));
    let (want, quiet) = sample(folder.path(), "lighter.safetensors", &["--set", &config]);
    assert!(!quiet.contains(".vae."), "{quiet}");

    original::save(&checkpoint, &[], &folder.path().join("a.v1.safetensors"));
    original::save(&vae(|name| name.to_owned()), &[], &folder.path().join("a.v1.vae.safetensors"));
    let without: Tensors = checkpoint.into_iter().filter(|(name, _)| !name.starts_with(VAE)).collect();
    original::save(&without, &[], &folder.path().join("b.safetensors"));
    original::save_ckpt(&vae(|name| name[VAE.len()..].to_owned()), None, &folder.path().join("b.vae.pt"));
    for (file, beside) in [("a.v1.safetensors", "a.v1.vae.safetensors"), ("b.safetensors", "b.vae.pt")] {
        let (found, warnings) = sample(folder.path(), file, &["--set", &config]);
        assert_same(&found, &want);
        assert_eq!(warnings.lines().filter(|line| line.contains(beside)).count(), 1, "{warnings}");
    }
    fs::remove_file(folder.path().join("b.vae.pt")).unwrap();
    let line = ["sample", "--prompt", "a", "--model", "b.safetensors", "--set", &config, "-o", "out.png"];
    fails(folder.path(), &line, &["b.safetensors", "no VAE", ".vae.safetensors"]);
    original::save(&original::component(&model.join("vae")), &[], &folder.path().join("b.vae.safetensors"));
    fails(folder.path(), &line, &["b.vae.safetensors", "move it away"]);
}

#[test]
fn the_configs_of_a_single_file_follow_from_its_shapes() {
    for (set, factor) in [("tiny-sd15", 8), ("tiny-sd21", 8)] {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("folder");
        original::widen(&fixture(set).join("model"), factor, &model);
        let file = folder.path().join("single/model.safetensors");
        fs::create_dir(folder.path().join("single")).unwrap();
        original::save(&original::checkpoint(&model), &[], &file);
        // the tokenizer of the other generation may lie beside: what 2.x pads with is known
        let tokenizer = folder.path().join("single/tokenizer");
        copy_folder(&fixture("tiny-sd15/model/tokenizer"), &tokenizer);
        let (whole, _) = sample(folder.path(), "folder", &[]);
        let (single, warnings) = sample(folder.path(), "single/model.safetensors", &[]);
        assert_same(&single, &whole);
        assert_eq!(warnings.contains("model.prediction_type"), set == "tiny-sd21", "{warnings}");

        // what the file says of itself
        let v = |metadata: &[(&str, &str)], more: &[&str]| {
            original::save(&original::checkpoint(&model), metadata, &file);
            sample(folder.path(), "single/model.safetensors", more)
        };
        let other = if set == "tiny-sd21" { "epsilon" } else { "v" };
        let (changed, warnings) = v(&[("modelspec.prediction_type", other)], &[]);
        assert!(
            numbers(&changed["images"]) != numbers(&single["images"]) && !warnings.contains("warning"),
            "{warnings}"
        );
        let own = if set == "tiny-sd21" { "v_prediction" } else { "epsilon" };
        let setting = format!("model.prediction_type={own}");
        let (again, warnings) = v(&[("modelspec.prediction_type", other)], &["--set", &setting]);
        assert_same(&again, &single);
        assert!(warnings.contains("says of itself") && warnings.contains(own), "{warnings}");
    }
}

#[test]
fn a_ckpt_is_read_with_a_warning_and_its_step_tells_its_prediction() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("tiny-sd21/model");
    let tensors = original::checkpoint(&model);
    let file = |name: &str| folder.path().join(name);
    original::save_ckpt(&tensors, Some(12), &file("model.ckpt"));
    let config = ["--set", &format!("model.config={}", text(&model))];
    let (whole, _) = sample(folder.path(), &text(&model), &[]);
    let (pickled, warnings) = sample(folder.path(), "model.ckpt", &config);
    assert_same(&pickled, &whole);
    assert!(warnings.contains("model.ckpt is a pickle") && warnings.contains("model.safetensors"), "{warnings}");

    let wide = folder.path().join("wide");
    original::widen(&model, 8, &wide);
    copy_folder(&model.join("tokenizer"), &folder.path().join("tokenizer"));
    let tensors = original::checkpoint(&wide);
    original::save_ckpt(&tensors, Some(875_000), &file("base.ckpt"));
    original::save(&tensors, &[("modelspec.prediction_type", "epsilon")], &file("base.safetensors"));
    let (base, warnings) = sample(folder.path(), "base.ckpt", &[]);
    assert!(!warnings.contains("prediction_type"), "{warnings}");
    assert_same(&base, &sample(folder.path(), "base.safetensors", &[]).0);
    // AUTOMATIC1111's way
    original::save(&tensors, &[], &file("with-yaml.safetensors"));
    fs::write(file("with-yaml.yaml"), "model:\n  params:\n    parameterization: \"v\"\n").unwrap();
    let (v, warnings) = sample(folder.path(), "with-yaml.safetensors", &[]);
    assert!(!warnings.contains("warning"), "{warnings}");
    assert!(numbers(&v["images"]) != numbers(&base["images"]));
}

#[test]
fn marks_in_a_single_file_say_its_prediction() {
    let folder = tempfile::tempdir().unwrap();
    let wide = folder.path().join("wide");
    original::widen(&fixture("tiny-sd15/model"), 8, &wide);
    copy_folder(&wide.join("tokenizer"), &folder.path().join("tokenizer"));
    let tensors = original::checkpoint(&wide);
    let file = folder.path().join("x.safetensors");
    let paint = |marks: &[&str], header: &[(&str, &str)], more: &[&str]| {
        let mut tensors = tensors.clone();
        for mark in marks {
            tensors.insert((*mark).to_owned(), Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap());
        }
        original::save(&tensors, header, &file);
        let (painted, warnings) = sample(folder.path(), "x.safetensors", more);
        (numbers(&painted["latents"]), warnings)
    };
    let v = paint(&[], &[], &["--set", "model.prediction_type=v_prediction"]).0;
    let epsilon = paint(&[], &[], &[]).0;
    assert!(v != epsilon);
    let (marked, warnings) = paint(&["v_pred"], &[], &[]);
    assert!(marked == v && !warnings.contains("warning"), "{warnings}");
    // what the user asks for counts, and a contradiction is said
    let (asked, warnings) = paint(&["v_pred", "ztsnr"], &[], &["--set", "model.prediction_type=epsilon"]);
    assert!(asked == epsilon && warnings.contains("model.prediction_type = epsilon counts"), "{warnings}");
    let (marked, warnings) = paint(&["v_pred"], &[("modelspec.prediction_type", "epsilon")], &[]);
    assert!(marked == v && warnings.contains("`v_pred`") && warnings.contains("modelspec"), "{warnings}");

    // zero terminal SNR, as in a folder that says so
    let scheduler = wide.join("scheduler/scheduler_config.json");
    edit(&scheduler, "\"epsilon\"", "\"v_prediction\"");
    edit(&scheduler, "\"rescale_betas_zero_snr\": false", "\"rescale_betas_zero_snr\": true");
    edit(&scheduler, "\"leading\"", "\"trailing\"");
    let whole = numbers(&sample(folder.path(), "wide", &[]).0["latents"]);
    let (marked, warnings) = paint(&["v_pred", "ztsnr"], &[], &[]);
    assert!(marked == whole && marked != v && warnings.contains("`ztsnr`"), "{warnings}");
    // alone it says nothing of the prediction
    assert!(paint(&["ztsnr"], &[], &[]).0 == epsilon);
    original::save(
        &tensors
            .clone()
            .into_iter()
            .chain([("edm_mean".to_owned(), Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap())])
            .collect(),
        &[],
        &file,
    );
    fails(folder.path(), &["sample", "--prompt", "a", "--model", "x.safetensors", "-o", "y.png"], &["edm_mean", "EDM"]);
}

#[test]
fn what_is_no_whole_single_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("tiny-sd15/model");
    let whole = original::checkpoint(&model);
    let file = folder.path().join("x.safetensors");
    let write = |tensors: Tensors| original::save(&tensors, &[], &file);
    let without = |prefix: &str| {
        write(whole.clone().into_iter().filter(|(name, _)| !name.starts_with(prefix)).collect());
    };
    let with = |name: &str| {
        let extra = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
        write(whole.clone().into_iter().chain([(name.to_owned(), extra)]).collect());
    };
    let config = format!("model.config={}", text(&model));
    let line = |more: &[&str]| {
        let start = ["sample", "--prompt", "x", "--steps", "1", "--model", "x.safetensors", "-o", "out.png"];
        [&start[..], more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let configured = line(&["--set", &config]);

    without("first_stage_model");
    fails(folder.path(), &configured, &["x.safetensors has no VAE", "whole checkpoint"]);
    without("cond_stage_model");
    fails(folder.path(), &configured, &["x.safetensors has no text encoder", "whole checkpoint"]);
    without("model.diffusion_model");
    fails(folder.path(), &configured, &["no Stable Diffusion model", "model.diffusion_model"]);
    without("model.diffusion_model.input_blocks.1.0.in_layers.0.weight");
    fails(folder.path(), &configured, &["UNet", "down_blocks.0.resnets.0.norm1.weight"]);
    with("model.diffusion_model.label_emb.0.0.weight");
    fails(folder.path(), &configured, &["refiner of Stable Diffusion XL", "1.x, 2.x and XL"]);
    with("model.diffusion_model.input_blocks.1.5.what");
    fails(folder.path(), &configured, &["model.diffusion_model.input_blocks.1.5.what", "not known"]);
    write(original::component(&model.join("unet")));
    fails(folder.path(), &configured, &["one part of a pipeline", "model_index.json"]);
    fs::copy(fixture("lora/peft/adapter_model.safetensors"), &file).unwrap();
    fails(folder.path(), &configured, &["is a LoRA", "--lora"]);
    // a tiny model's numbers of heads and groups are nowhere, and a tokenizer is in no file
    write(whole.clone());
    fails(folder.path(), &line(&[]), &["norm_num_groups", "model.config"]);
    let bare = folder.path().join("bare");
    copy_folder(&model, &bare);
    fs::remove_dir_all(bare.join("tokenizer")).unwrap();
    let words = ["no tokenizer", "model.tokenizer", "vocab.json", "openai/clip-vit-large-patch14"];
    fails(folder.path(), &line(&["--set", "model.config=bare"]), &words);
    let tokenizer = format!("model.tokenizer={}", text(model.join("tokenizer")));
    run_in(folder.path(), &line(&["--set", "model.config=bare", "--set", &tokenizer]));
    // a folder has all this itself
    let line = ["sample", "--prompt", "x", "--model", &text(&model), "--set", &tokenizer, "-o", "out.png"];
    fails(folder.path(), &line, &["model.tokenizer is for a single file", "leave the key out"]);
}

// ---------------------------------------------------------------------------------------------------- adapters

/// A LoRA on all layers that can be adapted, of several ranks, none of which is its alpha.
fn adapter(set: &str) -> Adapters {
    let config = alignprop::config::ModelConfig::at(text(fixture(set).join("model")));
    let targets = alignprop::models::Pipeline::load(&config).unwrap().unet.targets();
    let mut state = 1u64;
    let mut random = |shape: (usize, usize)| {
        let values: Vec<f32> = (0..shape.0 * shape.1)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
            })
            .collect();
        (Tensor::from_vec(values, shape, &Device::Cpu).unwrap() * 0.5).unwrap()
    };
    let factors = targets.iter().enumerate().map(|(i, target)| {
        let (rank, alpha) = if i % 7 == 3 { (3, 4.5) } else { (2, 3.0) };
        let (a, b) = (random((rank, target.in_features)), random((target.out_features, rank)));
        Factor { convolution: target.convolution, ..Factor::new(&target.module, a, b, alpha).unwrap() }
    });
    Adapters::new(factors.collect()).unwrap()
}

fn saved(adapters: &Adapters, folder: &Path) -> String {
    let path = folder.join("lora.safetensors");
    let metadata = [("reward".to_owned(), "aesthetic=1".to_owned()), ("seed".into(), "7".into())].into();
    formats::save(adapters, &metadata, &path).unwrap();
    text(path)
}

fn assert_same_adapters(x: &Adapters, y: &Adapters) {
    assert_eq!(x.factors().len(), y.factors().len());
    for (x, y) in x.factors().iter().zip(y.factors()) {
        assert_eq!((&x.module, x.alpha, x.convolution), (&y.module, y.alpha, y.convolution));
        assert!(numbers(&x.a) == numbers(&y.a) && numbers(&x.b) == numbers(&y.b), "{}", x.module);
    }
}

#[test]
fn every_exported_format_is_the_same_adapter() {
    for set in ["tiny-sd15", "tiny-sd21"] {
        let folder = tempfile::tempdir().unwrap();
        let model = text(fixture(set).join("model"));
        let adapters = adapter(set);
        let lora = saved(&adapters, folder.path());
        let (expected, _) = sample(folder.path(), &model, &["--lora", &lora]);
        let (base, _) = sample(folder.path(), &model, &[]);
        assert!(distance(&expected, &base) > 0.05, "the adapter has too little effect to test with");

        for (format, out, found) in [
            ("diffusers", "pytorch_lora_weights.safetensors", Format::Diffusers),
            ("peft", "peft", Format::Peft),
            ("kohya", "lora.safetensors", Format::Kohya),
        ] {
            let (stdout, warnings) = run_in(folder.path(), &["export", &lora, "--format", format, "--model", &model]);
            assert_eq!((stdout.trim(), warnings.as_str()), (format!("export/{out}").as_str(), ""));
            let path = folder.path().join("export").join(out);
            let loaded = formats::load(&path).unwrap();
            assert_eq!((loaded.format, loaded.ignored.len()), (found, 0));
            assert_eq!(loaded.metadata["reward"], "aesthetic=1");
            assert_same_adapters(&loaded.adapters, &adapters);
            assert_same(&sample(folder.path(), &model, &["--lora", &text(&path)]).0, &expected);
            // soup reads it too
            run_in(folder.path(), &["soup", &format!("{}=1", text(&path)), "-o", "soup.safetensors"]);
            let soup = sample(folder.path(), &model, &["--lora", "soup.safetensors"]).0;
            assert!(distance(&soup, &expected) < 1e-5);
            let soup = formats::load(&folder.path().join("soup.safetensors")).unwrap().adapters;
            for (x, y) in soup.factors().iter().zip(adapters.factors()) {
                assert_eq!((&x.module, x.convolution), (&y.module, y.convolution));
            }
        }
        assert_eq!(listing(&folder.path().join("export/peft")), ["adapter_config.json", "adapter_model.safetensors"]);
        // smaller, and half as strong
        let line =
            ["export", &lora, "--format", "kohya", "--precision", "f16", "--lora-scale", "0.5", "--out", "half.st"];
        run_in(folder.path(), &line);
        let half = formats::load(&folder.path().join("half.st")).unwrap().adapters;
        assert_eq!(half.factors()[0].alpha, adapters.factors()[0].alpha / 2.0);
        assert!(read_tensors(&folder.path().join("half.st")).values().all(|tensor| tensor.dtype() == DType::F16));
    }
}

fn header(path: &Path) -> BTreeMap<String, String> {
    let bytes = fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    serde_json::from_value(header["__metadata__"].clone()).unwrap()
}

#[test]
fn a_kohya_file_has_the_keys_shapes_and_header_of_kohyas_scripts() {
    for (set, version, architecture, prediction, kernel) in [
        ("tiny-sd15", "sd_v1", "stable-diffusion-v1/lora", "epsilon", &[1, 1][..]),
        ("tiny-sd21", "sd_v2_v", "stable-diffusion-v2-768-v/lora", "v", &[]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let lora = saved(&adapter(set), folder.path());
        let model = text(fixture(set).join("model"));
        run_in(folder.path(), &["export", &lora, "--format", "kohya", "--model", &model, "--out", "kohya.safetensors"]);
        let path = folder.path().join("kohya.safetensors");
        let tensors = read_tensors(&path);
        let block = "lora_unet_down_blocks_0_attentions_0";
        let attention = format!("{block}_transformer_blocks_0_attn2");
        let context = if set == "tiny-sd15" { 24 } else { 32 };
        for (key, shape) in [
            (format!("{attention}_to_k.lora_down.weight"), vec![2, context]),
            (format!("{attention}_to_k.lora_up.weight"), vec![8, 2]),
            (format!("{attention}_to_k.alpha"), vec![]),
            (format!("{attention}_to_out_0.lora_up.weight"), vec![8, 2]),
            (format!("{block}_transformer_blocks_0_ff_net_0_proj.lora_down.weight"), vec![2, 8]),
            (format!("{block}_transformer_blocks_0_ff_net_2.lora_up.weight"), vec![8, 2]),
            (format!("{block}_proj_in.lora_down.weight"), [&[2, 8], kernel].concat()),
            (format!("{block}_proj_in.lora_up.weight"), [&[8, 2], kernel].concat()),
            ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v.alpha".into(), vec![]),
        ] {
            let tensor = tensors.get(&key).unwrap_or_else(|| panic!("no {key}"));
            assert_eq!(tensor.dims().len(), shape.len(), "{key}");
            // the rank of a layer is 2 or 3
            for (found, expected) in tensor.dims().iter().zip(&shape) {
                assert!(found == expected || (*expected == 2 && *found == 3), "{key}: {:?}", tensor.dims());
            }
        }
        let endings = [".alpha", ".lora_down.weight", ".lora_up.weight"];
        assert!(tensors.keys().all(|key| {
            let (name, _) = key.split_once('.').unwrap();
            name.starts_with("lora_unet_") && endings.iter().any(|ending| *key == format!("{name}{ending}"))
        }));
        let header = header(&path);
        for (key, value) in [
            ("ss_network_module", "networks.lora"),
            ("ss_network_dim", "2"),
            ("ss_network_alpha", "3.0"),
            ("ss_base_model_version", version),
            ("ss_v2", if set == "tiny-sd15" { "False" } else { "True" }),
            ("ss_seed", "7"),
            ("modelspec.sai_model_spec", "1.0.0"),
            ("modelspec.architecture", architecture),
            ("modelspec.implementation", "diffusers"),
            ("modelspec.title", "lora"),
            ("modelspec.prediction_type", prediction),
            ("modelspec.resolution", if set == "tiny-sd15" { "88x88" } else { "64x64" }),
        ] {
            assert_eq!(header.get(key).map(String::as_str), Some(value), "{key}");
        }
    }
}

#[test]
fn a_kohya_file_for_xl_has_the_original_names() {
    let folder = tempfile::tempdir().unwrap();
    let adapters = adapter("tiny-sdxl");
    let lora = saved(&adapters, folder.path());
    let model = text(fixture("tiny-sdxl").join("model"));
    let line = ["export", &lora, "--format", "kohya", "--model", &model, "--set", "model.clip_skip=1"];
    run_in(folder.path(), &[&line[..], &["--out", "kohya.safetensors"]].concat());
    let path = folder.path().join("kohya.safetensors");
    let tensors = read_tensors(&path);
    for name in [
        "input_blocks_4_1_proj_in",
        "input_blocks_7_1_transformer_blocks_2_attn2_to_k",
        "middle_block_1_transformer_blocks_2_attn1_to_out_0",
        "output_blocks_0_1_transformer_blocks_0_ff_net_2",
        "output_blocks_4_1_transformer_blocks_1_attn1_to_q",
    ] {
        let key = format!("lora_unet_{name}.lora_down.weight");
        assert!(tensors.contains_key(&key), "no {key} among {:?}", tensors.keys());
    }
    assert_eq!(tensors.len(), 3 * adapters.factors().len());
    let header = header(&path);
    for (key, value) in [
        ("ss_base_model_version", "sdxl_base_v1-0"),
        ("ss_v2", "False"),
        ("ss_clip_skip", "2"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora"),
        ("modelspec.implementation", "https://github.com/Stability-AI/generative-models"),
        ("modelspec.prediction_type", "epsilon"),
    ] {
        assert_eq!(header.get(key).map(String::as_str), Some(value), "{key}");
    }
    let read = formats::load(&path).unwrap().adapters;
    let [own, read] = [&adapters, &read].map(|adapters| {
        adapters.named_tensors().into_iter().map(|(name, tensor)| (name, numbers(&tensor))).collect::<BTreeMap<_, _>>()
    });
    assert!(own == read);
}

#[test]
fn another_vae_and_skipped_layers_change_the_picture() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("tiny-sd15/model");
    let (whole, _) = sample(folder.path(), &text(&model), &[]);
    let with = |setting: &str| sample(folder.path(), &text(&model), &["--set", setting]);
    let (skipped, _) = with("model.clip_skip=1");
    assert!(numbers(&skipped["prompt_embeds"]) != numbers(&whole["prompt_embeds"]));
    assert_same(&with("model.clip_skip=0").0, &whole);
    let line = ["sample", "--prompt", "a", "--model", &text(&model), "-o", "out.png", "--set"];
    fails(folder.path(), &[&line[..], &["model.clip_skip=2"]].concat(), &["2 layers", "model.clip_skip"]);

    // a VAE whose pictures are lighter, in every form
    let mut vae = original::component(&model.join("vae"));
    let bias = vae.get_mut("decoder.conv_out.bias").unwrap();
    *bias = (&*bias + 0.25).unwrap();
    copy_folder(&model.join("vae"), &folder.path().join("pipeline/vae"));
    fs::remove_file(folder.path().join("pipeline/vae/diffusion_pytorch_model.fp16.safetensors")).unwrap();
    original::save(&vae, &[], &folder.path().join("pipeline/vae/diffusion_pytorch_model.safetensors"));
    original::save(&vae, &[], &folder.path().join("diffusers.safetensors"));
    copy_folder(&model, &folder.path().join("all"));
    fs::remove_file(folder.path().join("all/vae/diffusion_pytorch_model.fp16.safetensors")).unwrap();
    original::save(&vae, &[], &folder.path().join("all/vae/diffusion_pytorch_model.safetensors"));
    let checkpoint = original::checkpoint(&folder.path().join("all"));
    original::save(&checkpoint, &[], &folder.path().join("whole.safetensors"));
    let bare = |name: &str| name.strip_prefix("first_stage_model.").map(str::to_owned);
    let bare: Tensors = checkpoint.iter().filter_map(|(name, tensor)| Some((bare(name)?, tensor.clone()))).collect();
    original::save(&bare, &[], &folder.path().join("original.safetensors"));
    let (expected, _) = sample(folder.path(), "all", &[]);
    assert!(numbers(&expected["images"]) != numbers(&whole["images"]));
    for form in ["pipeline", "pipeline/vae", "diffusers.safetensors", "original.safetensors", "whole.safetensors"] {
        assert_same(&with(&format!("model.vae={form}")).0, &expected);
    }
    fails(folder.path(), &[&line[..], &["model.vae=nowhere"]].concat(), &["model.vae", "nowhere"]);
    let lora = text(fixture("lora/diffusers/pytorch_lora_weights.safetensors"));
    fails(folder.path(), &[&line[..], &[&format!("model.vae={lora}")]].concat(), &["model.vae", "has no VAE"]);
    // it is part of a merged pipeline
    let line = ["export", &lora, "--format", "merged", "--model", &text(&model), "--lora-scale", "0"];
    run_in(folder.path(), &[&line[..], &["--set", "model.vae=original.safetensors", "--out", "merged"]].concat());
    assert_same(&sample(folder.path(), "merged", &[]).0, &expected);
}

#[test]
fn peft_and_diffusers_files_have_their_keys_and_configs() {
    let folder = tempfile::tempdir().unwrap();
    let adapters = adapter("tiny-sd15");
    let lora = saved(&adapters, folder.path());
    run_in(folder.path(), &["export", &lora, "--format", "peft"]);
    run_in(folder.path(), &["export", &lora, "--format", "diffusers"]);
    let peft = folder.path().join("export/peft");
    let diffusers = folder.path().join("export/pytorch_lora_weights.safetensors");
    let (peft_keys, diffusers_keys) = (read_tensors(&peft.join("adapter_model.safetensors")), read_tensors(&diffusers));
    let module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0";
    assert_eq!(peft_keys[&format!("base_model.model.{module}.lora_A.weight")].dims()[1], 16);
    assert_eq!(diffusers_keys[&format!("unet.{module}.lora_B.weight")].dims()[0], 16);
    assert_eq!(diffusers_keys["unet.mid_block.attentions.0.proj_in.lora_A.weight"].dims()[2..], [1, 1]);
    assert_eq!(peft_keys.len(), 2 * adapters.factors().len());
    let config: Value = serde_json::from_str(&fs::read_to_string(peft.join("adapter_config.json")).unwrap()).unwrap();
    let own: Value = serde_json::from_str(&header(&diffusers)["lora_adapter_metadata"]).unwrap();
    for key in ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"] {
        assert_eq!(config[key], own[format!("unet.{key}")], "{key}");
    }
    assert_eq!((&config["peft_type"], &config["r"], &config["lora_alpha"]), (&"LORA".into(), &2.into(), &3.0.into()));
    assert!(config["rank_pattern"].as_object().unwrap().values().all(|rank| *rank == 3));
}

/// A small file of kohya's scripts for `tiny-sd15`.
fn kohya_file(folder: &Path, change: impl FnOnce(&mut Tensors)) -> String {
    let adapters = adapter("tiny-sd15");
    let mut tensors = Tensors::new();
    for factor in adapters.factors().iter().take(6) {
        let name = format!("lora_unet_{}", factor.module.replace('.', "_"));
        tensors.insert(format!("{name}.lora_down.weight"), factor.a.clone());
        tensors.insert(format!("{name}.lora_up.weight"), factor.b.clone());
        tensors.insert(format!("{name}.alpha"), Tensor::new(factor.alpha as f32, &Device::Cpu).unwrap());
    }
    change(&mut tensors);
    let path = folder.join("kohya.safetensors");
    original::save(&tensors, &[("ss_network_module", "networks.lora")], &path);
    text(path)
}

#[test]
fn files_of_kohyas_scripts_are_read_as_they_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let model = text(fixture("tiny-sd15/model"));
    let attention = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k";
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();

    // text encoders are left out with a warning, by every command; an absent alpha is the rank
    let file = kohya_file(folder.path(), |tensors| {
        tensors.remove(&format!("{attention}.alpha")).unwrap();
        let te = "lora_te_text_model_encoder_layers_0_mlp_fc1";
        tensors.insert(format!("{te}.lora_down.weight"), zeros(&[2, 24]));
        tensors.insert(format!("{te}.lora_up.weight"), zeros(&[48, 2]));
        tensors.insert(format!("{te}.alpha"), zeros(&[]));
    });
    let loaded = formats::load(Path::new(&file)).unwrap();
    assert_eq!((loaded.format, loaded.ignored.len(), loaded.adapters.factors().len()), (Format::Kohya, 3, 6));
    let factor = loaded.adapters.get("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k").unwrap();
    assert_eq!(factor.alpha, factor.rank() as f64);
    assert_eq!(loaded.metadata["ss_network_module"], "networks.lora");
    let part = format!("{file}=1");
    for line in [
        &["sample", "--prompt", "x", "--steps", "1", "--model", &model, "--lora", &file, "-o", "out.png"][..],
        &["soup", &part, "-o", "soup.safetensors"],
        &["export", &file, "--format", "diffusers"],
    ] {
        let (_, warnings) = run_in(folder.path(), line);
        assert!(warnings.contains("3 text-encoder tensors are ignored"), "{warnings}");
    }

    let cases: [(&str, &[usize], &[&str]); 6] = [
        (".hada_w1_a", &[2, 8], &["LoHa", "not supported"]),
        (".lokr_w1", &[2, 2], &["LoKr", "not supported"]),
        (".dora_scale", &[8, 1], &["DoRA", "not supported"]),
        (".lora_mid.weight", &[2, 2, 3, 3], &["LoCon", "not supported"]),
        (".diff", &[8, 8], &["whole differences", "not supported"]),
        (".what", &[1], &["not understood", "lora_unet_<layer>"]),
    ];
    for (ending, shape, words) in cases {
        let key = format!("{attention}{ending}");
        let file = kohya_file(folder.path(), |tensors| {
            tensors.insert(key.clone(), zeros(shape));
        });
        let line = ["sample", "--prompt", "x", "--model", &model, "--lora", &file, "-o", "none.png"];
        fails(folder.path(), &line, &[&["kohya.safetensors", &key], words].concat());
    }
    // LoCon: a layer that exists and cannot be adapted
    let file = kohya_file(folder.path(), |tensors| {
        let name = "lora_unet_down_blocks_0_resnets_0_conv1";
        tensors.insert(format!("{name}.lora_down.weight"), zeros(&[2, 8, 3, 3]));
        tensors.insert(format!("{name}.lora_up.weight"), zeros(&[8, 2, 1, 1]));
    });
    let words = ["down_blocks.0.resnets.0.conv1", "LoCon", "proj_in"];
    fails(folder.path(), &["export", &file, "--format", "peft", "--out", "no"], &words);
    assert!(!folder.path().join("none.png").exists() && !folder.path().join("no").exists());
}

// ---------------------------------------------------------------------------------------------------- merged

#[test]
fn a_merged_pipeline_is_the_base_with_the_adapter() {
    for set in ["tiny-sd15", "tiny-sd21", "tiny-sdxl"] {
        let folder = tempfile::tempdir().unwrap();
        let model = text(fixture(set).join("model"));
        let lora = saved(&adapter(set), folder.path());
        let (expected, _) = sample(folder.path(), &model, &["--lora", &lora, "--lora-scale", "0.5"]);
        let line = ["export", &lora, "--format", "merged", "--model", &model, "--lora-scale", "0.5"];
        let whole = [&line[..], &["--precision", "f32", "--out", "models/merged"]].concat();
        let (stdout, _) = run_in(folder.path(), &whole);
        assert_eq!(stdout, "models/merged\n");
        let (merged, warnings) = sample(folder.path(), "models/merged", &[]);
        assert!(
            distance(&merged, &expected) < 1e-5 && warnings.is_empty(),
            "{} {warnings}",
            distance(&merged, &expected)
        );
        assert_eq!(listing(&folder.path().join("models")), ["merged"]);
        let second = |name| (set == "tiny-sdxl").then_some(name);
        let parts = ["model_index.json", "scheduler", "text_encoder"].into_iter().chain(second("text_encoder_2"));
        let parts = parts.chain(["tokenizer"]).chain(second("tokenizer_2")).chain(["unet", "vae"]);
        assert_eq!(listing(&folder.path().join("models/merged")), parts.collect::<Vec<_>>());

        // without a word, the source's precision; what no adapter changes is copied to the byte
        run_in(folder.path(), &[&line[..], &["--out", "own"]].concat());
        for (part, changes) in [("unet", true), ("vae", false), ("text_encoder", false)] {
            let [old, new] =
                [fixture(set).join("model"), folder.path().join("own")].map(|m| original::component(&m.join(part)));
            assert!(old.keys().eq(new.keys()));
            let mut changed = 0;
            for (name, old) in &old {
                assert_eq!((old.dtype(), old.dims()), (new[name].dtype(), new[name].dims()), "{name}");
                changed += usize::from(numbers(old) != numbers(&new[name]));
            }
            assert_eq!(changed > 0, changes, "{part}: {changed}");
        }
        run_in(folder.path(), &[&line[..], &["--precision", "bf16", "--out", "small"]].concat());
        let small = original::component(&folder.path().join("small/vae"));
        assert!(small.values().all(|tensor| tensor.dtype() == DType::BF16));
        sample(folder.path(), "small", &[]);

        // what is there is not replaced, and a failure leaves nothing
        fails(folder.path(), &whole, &["models/merged exists already", "--out"]);
        let other = text(fixture(if set == "tiny-sd15" { "tiny-sd21" } else { "tiny-sd15" }).join("model"));
        let wrong = ["export", &lora, "--format", "merged", "--model", &other, "--out", "wrong"];
        fails(folder.path(), &wrong, &["another model"]);
        fails(folder.path(), &["export", &lora, "--format", "merged"], &["lora.safetensors", "--model"]);
        let found = listing(folder.path());
        assert!(!found.iter().any(|name| name.starts_with(".unfinished") || name == "wrong"), "{found:?}");
    }
}

#[test]
fn a_single_file_is_merged_into_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let wide = folder.path().join("wide");
    original::widen(&fixture("tiny-sd21/model"), 8, &wide);
    original::save(
        &original::checkpoint(&wide),
        &[("modelspec.prediction_type", "v")],
        &folder.path().join("x.safetensors"),
    );
    // 1.x's tokenizer, whose padding is not 2.x's
    copy_folder(&fixture("tiny-sd15/model/tokenizer"), &folder.path().join("tokenizer"));
    let zero = Tensor::zeros((1, 64), DType::F32, &Device::Cpu).unwrap();
    let module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
    let factor = Factor::new(module, zero.clone(), zero.t().unwrap().contiguous().unwrap(), 1.0).unwrap();
    let lora = saved(&Adapters::new(vec![factor]).unwrap(), folder.path());
    run_in(folder.path(), &["export", &lora, "--format", "merged", "--model", "x.safetensors", "--out", "merged"]);
    let (merged, _) = sample(folder.path(), "merged", &[]);
    assert_same(&merged, &sample(folder.path(), &text(&wide), &[]).0);
    for part in ["unet", "vae", "text_encoder"] {
        let [old, new] = [&wide, &folder.path().join("merged")].map(|model| original::component(&model.join(part)));
        let name = |key: &str| key.strip_prefix("text_model.").unwrap_or(key).to_owned();
        assert!(old.keys().map(|key| name(key)).eq(new.keys().map(|key| name(key))), "{part}");
    }
}

#[test]
fn a_run_is_exported_with_its_own_model() {
    let run = Experiment::trained(&["train.steps=1", "optimizer.lr=0.1", "lora.alpha=3"]);
    let folder = run.folder.path();
    for (format, out) in [
        ("diffusers", "run/export/pytorch_lora_weights.safetensors"),
        ("kohya", "run/export/run.safetensors"),
        ("peft", "run/export/peft"),
        ("merged", "run/export/merged"),
    ] {
        let (stdout, warnings) = run_in(folder, &["export", "run", "--format", format]);
        assert_eq!((stdout.trim(), warnings.as_str()), (out, ""));
        if format != "merged" {
            assert_same_adapters(
                &formats::load(&folder.join(out)).unwrap().adapters,
                &formats::load(&run.lora_file(1)).unwrap().adapters,
            );
        }
    }
    // eval reads kohya's file
    let config = run.config();
    let line =
        ["eval", "--checkpoint", "run/export/run.safetensors", "--config", &config, "--seeds", "1", "--out", "e"];
    run_in(folder, &line);
    assert_eq!(listing(&folder.join("e")), ["eval.json", "grid.png"]);
}

// ---------------------------------------------------------------------------------------------------- init_from

#[test]
fn training_goes_on_from_an_adapter_made_elsewhere() {
    let first = Experiment::trained(&["train.steps=1", "optimizer.lr=0.1", "lora.alpha=3"]);
    let folder = first.folder.path();
    run_in(folder, &["export", "run", "--format", "kohya", "--out", "kohya.safetensors"]);
    let kohya = text(folder.join("kohya.safetensors"));
    let init = format!("lora.init_from={kohya}");

    let second = Experiment::new("tiny-sd15");
    edit(Path::new(&second.config()), "lora.rank = 2", "");
    second.train(&["train.steps=1", &init]).unwrap();
    let start = formats::load(&second.lora_file(0)).unwrap().adapters;
    assert_same_adapters(&start, &formats::load(&first.lora_file(1)).unwrap().adapters);
    assert!(distance(&second.adapters(1), &second.adapters(0)) > 0.0);
    let config = fs::read_to_string(second.run_folder().join("config.toml")).unwrap();
    assert!(
        config.contains("rank = 2\n") && config.contains("alpha = 3.0\n") && config.contains("\"to_out.0\"]"),
        "{config}"
    );
    // the file is not needed any more
    fs::remove_file(&kohya).unwrap();
    second.resume(&["train.steps=2"]).unwrap();
    let error = format!("{:#}", second.resume(&["train.steps=3", "lora.rank=4"]).unwrap_err());
    assert!(error.contains("lora.rank = 4") && error.contains("rank 2"), "{error}");
}

#[test]
fn an_adapter_that_is_not_what_the_config_says_starts_no_run() {
    let folder = tempfile::tempdir().unwrap();
    let all = saved(&adapter("tiny-sd15"), folder.path());
    let experiment = Experiment::new("tiny-sd15");
    let init = format!("lora.init_from={all}");
    let error = |settings: &[&str]| format!("{:#}", experiment.train(settings).unwrap_err());
    let e = error(&[&init]);
    assert!(e.contains("lora.rank = 2") && e.contains("lora.safetensors has rank 3"), "{e}");
    edit(Path::new(&experiment.config()), "lora.rank = 2", "");
    let e = error(&[&init, "lora.alpha=3"]);
    assert!(e.contains("lora.alpha = 3") && e.contains("alpha 4.5"), "{e}");
    let e = error(&[&init, "lora.target_modules=['to_q']"]);
    assert!(e.contains("lora.safetensors adapts") && e.contains("target_modules"), "{e}");
    let e = error(&["lora.init_from=none.safetensors"]);
    assert!(e.contains("lora.init_from") && e.contains("none.safetensors"), "{e}");
    let e = error(&[&format!("model.path={}", text(fixture("tiny-sd21/model"))), &init]);
    assert!(e.contains("another model"), "{e}");
    assert!(!experiment.run_folder().exists());
    // layers beyond attention and mixed ranks train
    experiment.train(&["train.steps=1", &init]).unwrap();
    assert_eq!(experiment.adapters(1).len(), 2 * adapter("tiny-sd15").factors().len());
    for (name, tensor) in experiment.adapters(1) {
        assert!(numbers(&tensor) != numbers(&experiment.adapters(0)[&name]), "{name} has not moved");
    }
    experiment.resume(&["train.steps=2"]).unwrap();
}

// ---------------------------------------------------------------------------------------------------- pickles

#[test]
fn pickled_loras_are_read_with_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let safe = text(fixture("lora/diffusers/pytorch_lora_weights.safetensors"));
    let tensors = read_tensors(Path::new(&safe));
    original::save_ckpt(&tensors, None, &folder.path().join("lora.bin"));
    let model = text(fixture("tiny-sd15/model"));
    let (pickled, warnings) = sample(folder.path(), &model, &["--lora", "lora.bin"]);
    assert!(warnings.contains("lora.bin is a pickle") && warnings.contains("lora.safetensors"), "{warnings}");
    let plain: Adapters = formats::load(Path::new(&safe)).unwrap().adapters;
    let pickled_adapters = formats::load(&folder.path().join("lora.bin")).unwrap().adapters;
    for (x, y) in pickled_adapters.factors().iter().zip(plain.factors()) {
        assert!(numbers(&x.a) == numbers(&y.a) && numbers(&x.b) == numbers(&y.b));
    }
    assert!(pickled["images"].elem_count() > 0);

    // a component's pickle names the file that would be better
    let pipeline = folder.path().join("model");
    copy_folder(&fixture("tiny-sd15/model"), &pipeline);
    let encoder = original::component(&pipeline.join("text_encoder"));
    fs::remove_file(pipeline.join("text_encoder/model.safetensors")).unwrap();
    original::save_ckpt(&encoder, None, &pipeline.join("text_encoder/pytorch_model.bin"));
    let (from_pickle, warnings) = sample(folder.path(), "model", &[]);
    assert!(
        warnings.contains("pytorch_model.bin is a pickle") && warnings.contains("prefer model.safetensors"),
        "{warnings}"
    );
    assert_same(&from_pickle, &sample(folder.path(), &model, &[]).0);
}

#[test]
fn a_malformed_pickle_is_an_error_and_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    let model = text(fixture("tiny-sd15/model"));
    let path = folder.path().join("bad.bin");
    let tensor = |args: &[u8]| [b"}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n", args, b"Rs."].concat();
    let storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ";
    for (what, pickle) in [
        ("a tuple that is too short", tensor(b"K\x01\x85")),
        ("a storage that is too short", tensor(b"((K\x01tQK\0K\x02K\x03tK\0t")),
        ("a size beyond the storage", tensor(&[b"(", &storage[..], b"K\0K\x07\x85K\x01\x85t"].concat())),
        (
            "a size without bounds",
            tensor(&[b"(", &storage[..], b"K\0J\xff\xff\xff\x7f\x85J\xff\xff\xff\x7f\x85t"].concat()),
        ),
        ("more strides than axes", tensor(&[b"(", &storage[..], b"K\0K\x06\x85K\x01K\x01\x86t"].concat())),
        ("objects without end", [b"}".to_vec(), vec![0x85; 1_000_000], b".".to_vec()].concat()),
        ("copies of copies", [&b"K\x01"[..], &b"q\0h\0\x86".repeat(80), b"."].concat()),
        ("a text without its bytes", b"X\xff\xff\xff\xffabc.".to_vec()),
        ("a number of 200 bytes", [&b"\x8a\xc8"[..], &[1; 200], b"."].concat()),
        ("nothing to put together", b"R.".to_vec()),
        ("a mark that is missing", b"K\x01t.".to_vec()),
        ("no end", b"}".to_vec()),
        ("another opcode", b"cos\nsystem\nU\x02ls\x85R.".to_vec()),
        ("a call", b"cos\nsystem\nX\x02\0\0\0ls\x85R.".to_vec()),
    ] {
        let files = [("archive/data.pkl".to_owned(), pickle), ("archive/data/0".to_owned(), vec![0; 24])];
        fs::write(&path, original::zip(&files)).unwrap();
        let line = ["sample", "--prompt", "x", "--model", &model, "--lora", "bad.bin", "-o", "out.png"];
        let message = fails(folder.path(), &line, &["bad.bin"]);
        assert!(message.len() < 2000, "{what}: {message}");
    }
}
