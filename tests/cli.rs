//! The program as a user meets it: exit codes, files, and what it says when something is wrong.

mod support;

use std::fs;
use std::path::Path;

use image::RgbImage;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;
use support::program::*;
use support::*;

fn model(set: &str) -> String {
    text(fixture(set).join("model"))
}

fn lora(form: &str) -> String {
    text(fixture("lora").join(form))
}

/// `sample` of one small picture with two steps.
fn sample_line<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let line = ["sample", "--prompt", "a cat", "--height", "72", "--width", "40", "--eta", "0.5"];
    let steps: &[&str] = if more.contains(&"--steps") { &[] } else { &["--steps", "2"] };
    [&line[..], &["--model", model, "-o", "out.png"], steps, more].concat()
}

/// The bytes of the picture that `sample` makes.
fn sample(more: &[&str]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let stdout = succeeds(folder.path(), &sample_line(&model("tiny-sd15"), more));
    assert_eq!(stdout, "out.png\n");
    fs::read(folder.path().join("out.png")).unwrap()
}

fn decode(png: &[u8]) -> RgbImage {
    image::load_from_memory_with_format(png, image::ImageFormat::Png).unwrap().to_rgb8()
}

/// The largest difference of two pictures in any byte.
fn difference(one: &[u8], other: &[u8]) -> u8 {
    let (one, other) = (decode(one), decode(other));
    assert_eq!(one.dimensions(), other.dimensions());
    one.into_raw().into_iter().zip(other.into_raw()).map(|(x, y)| x.abs_diff(y)).max().unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

// ---------------------------------------------------------------------------------------------------- help

#[test]
fn every_command_has_help_with_examples() {
    let folder = tempfile::tempdir().unwrap();
    let help = succeeds(folder.path(), &["--help"]);
    for command in ["train", "eval", "soup", "sample", "verify"] {
        assert!(help.contains(&format!("  {command}")), "{help}");
        let help = succeeds(folder.path(), &[command, "--help"]);
        assert!(help.contains("Usage: alignprop ") && help.contains("Examples:"), "{help}");
    }
    let expected = format!("alignprop {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(succeeds(folder.path(), &["--version"]), expected);
}

#[test]
fn completions_and_man_pages_have_every_command() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = succeeds(folder.path(), &["completions", shell]);
        assert!(["lora-start", "completions", "reward-precision"].iter().all(|word| script.contains(word)), "{script}");
    }
    assert_eq!(succeeds(folder.path(), &["man", "share/man1"]), "");
    let pages = listing(&folder.path().join("share/man1"));
    let help = succeeds(folder.path(), &["--help"]);
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // what is indented further goes on with a description
    let commands = lines.filter_map(|line| line.strip_prefix("  ")?.split_once(' ')).map(|(command, _)| command);
    for command in commands.filter(|command| !["", "help"].contains(command)) {
        let page = format!("alignprop-{command}.1");
        assert!(pages.contains(&page), "{page} is not in {pages:?}");
    }
    let page = fs::read_to_string(folder.path().join("share/man1/alignprop-train.1")).unwrap();
    assert!(page.contains("Examples:") && page.contains("resume"), "{page}");
    fs::write(folder.path().join("file"), "").unwrap();
    assert_fails(folder.path(), &["man", "file"], &["writing man pages to file"]);
}

#[test]
fn a_wrong_command_line_is_code_2_and_says_what_is_known() {
    let folder = tempfile::tempdir().unwrap();
    for (line, words) in [
        (&["trian"][..], "'train'"),
        (&["train", "--confg", "x"], "--config"),
        (&["train", "--device", "gpu"], "cpu, cuda or cuda:N"),
        (&["train", "--precision", "fp16"], "'f16'"),
        (&["eval"], "--checkpoint"),
        (&["eval", "--checkpoint", "x", "--reward", "beauty"], "aesthetic"),
        (&["sample", "-o", "x.png"], "--prompt"),
        (&["sample", "--prompt", "x", "-o", "x.png", "--steps", "0"], "1 or more"),
        (&["soup", "x", "-o", "y"], "FILE=WEIGHT"),
        (&["soup", "x=1"], "--output"),
        (&["verify"], "<DIR>"),
    ] {
        let output =
            alignprop(folder.path()).args(line).assert().code(2).stderr(contains("error: ").and(contains(words)));
        output.stderr(contains("panicked").not());
    }
    assert_eq!(listing(folder.path()), [""; 0]);
}

// ---------------------------------------------------------------------------------------------------- train

#[test]
fn a_dry_run_describes_the_run_and_writes_nothing() {
    let experiment = Experiment::new("tiny-sd15");
    let folder = experiment.folder.path();
    let before = listing(folder);
    let line = ["train", "--config", &experiment.config(), "--dry-run"];
    alignprop(folder)
        .args(line)
        .assert()
        .success()
        .stdout(contains("nothing was written"))
        .stderr(contains("rank 2 on 80 layers").and(contains("72x40")).and(contains("aesthetic on 3 prompts")));
    assert_eq!(listing(folder), before);

    experiment.train(&["train.steps=1"]).unwrap();
    let config = fs::read_to_string(experiment.run_folder().join("config.toml")).unwrap();
    succeeds(folder, &["train", "--resume", "run", "--set", "train.steps=9", "--dry-run"]);
    assert_eq!(fs::read_to_string(experiment.run_folder().join("config.toml")).unwrap(), config);
    assert_eq!(experiment.checkpoints(), ["step-000000", "step-000001"]);
}

#[test]
fn the_memory_is_estimated_and_fitted_before_the_start() {
    let experiment = Experiment::new("tiny-sd15");
    let folder = experiment.folder.path();
    let config = experiment.config();
    let stderr = |settings: &[&str]| {
        let line = with_settings(&["train", "--config", &config, "--dry-run"], settings);
        let output = alignprop(folder).args(line).assert().success();
        String::from_utf8(output.get_output().stderr.clone()).unwrap()
    };
    let large = ["sampler.height=256", "sampler.width=256", "train.batch_size=4"];
    let said = stderr(&large);
    assert!(said.contains("memory ") && said.contains("VAE and reward") && said.contains("available"), "{said}");
    // what the machine has free is enough for all of it
    assert!(said.contains("checkpointing `step`, 3 steps stored, micro-batches of 4 x 1"), "{said}");
    let step = [&large[..], &["train.checkpointing=step"]].concat();
    let stored = [&step[..], &["train.stored_steps=1"]].concat();
    let mib = |said: &str| -> f64 {
        let line = said.lines().find(|line| line.starts_with("memory ")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let said = stderr(&step);
    assert!(said.contains("checkpointing `step`, micro-batches of 4 x 1"), "{said}");
    let (step, stored) = (mib(&said), mib(&stderr(&stored)));
    let block = mib(&stderr(&[&large[..], &["train.checkpointing=block"]].concat()));
    assert!(block + 4.0 < step && step + 4.0 < stored, "{block}, {step} and {stored} MiB");
    // half way between what the one needs and the other
    let between = |less: f64, more: f64| format!("train.memory_budget={}", (less + more) / 2.0 / 1024.0);
    let said = stderr(&[&large[..], &[&between(step, stored)]].concat());
    assert!(said.contains("checkpointing `step`, micro-batches of 4 x 1") && said.contains("allowed"), "{said}");
    let budget = between(block, step);
    let said = stderr(&[&large[..], &[&budget]].concat());
    assert!(said.contains("checkpointing `block`, micro-batches of 4 x 1"), "{said}");
    let line = with_settings(&["train", "--config", &config, "--set", "train.checkpointing=step"], &large);
    let line = [&line[..], &["--set", &budget]].concat();
    assert_fails(folder, &line, &["train.memory_budget = 0.0", "checkpointing = \"auto\"", "batch_size"]);
    assert!(!experiment.run_folder().exists());

    // the choice is the run's: it is in its config
    let settings = ["train.checkpointing=auto", "train.steps=1"];
    let output = alignprop(folder).args(with_settings(&["train", "--config", &config], &settings)).assert().success();
    let said = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    assert!(said.contains(" at the peak, ") && said.contains(" estimated (ratio "), "{said}");
    let saved = fs::read_to_string(experiment.run_folder().join("config.toml")).unwrap();
    assert!(saved.contains("checkpointing = \"step\"") && saved.contains("stored_steps = 3"), "{saved}");
}

#[test]
fn training_is_quiet_where_there_is_no_terminal() {
    let experiment = Experiment::new("tiny-sd15");
    let line = ["train", "--config", &experiment.config(), "--set", "train.steps=1"];
    let output = alignprop(experiment.folder.path()).args(line).assert().success();
    let output = output.get_output();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(stdout.contains("run: ") && stdout.contains("adapter: "), "{stdout}");
    assert!(!stderr.contains(['\r', '\u{1b}', '%']), "{stderr}");
}

#[test]
fn bad_settings_are_named_and_start_no_run() {
    let experiment = Experiment::new("tiny-sd15");
    let config = experiment.config();
    fs::write(experiment.path("empty.txt"), "# no prompt\n\n").unwrap();
    fs::write(experiment.path("file"), "in the way").unwrap();
    let cases: &[(&[&str], &[&str])] = &[
        // size and sampler
        (&["sampler.height=100"], &["sampler.height = 100", "multiples of 8", "104"]),
        (&["sampler.width=3"], &["sampler.width = 3", "multiples of 8", "the nearest is 8"]),
        (&["sampler.num_inference_steps=0"], &["sampler.num_inference_steps = 0", "1 or more"]),
        (&["sampler.num_inference_steps=2000"], &["sampler.num_inference_steps = 2000", "1 to 1000"]),
        (&["sampler.eta=1.5"], &["sampler.eta = 1.5", "0 (DDIM) to 1"]),
        // truncation
        (&["truncation.rule=fixed", "truncation.k=4"], &["truncation.k = 4", "sampler.num_inference_steps = 3"]),
        (&["truncation.rule=fixed"], &["truncation.k", "needs it"]),
        (&["truncation.rule=random"], &["truncation.rule", "`random`", "`uniform`"]),
        (
            &["truncation.rule=refl", "truncation.lo=1", "truncation.hi=3"],
            &["truncation.hi = 3", "0 (the noisiest) to 2"],
        ),
        // keys and values
        (&["optimizer.lrr=1"], &["unknown key `optimizer.lrr`", "did you mean `lr`?"]),
        (&["sampling.eta=1"], &["unknown key `sampling`", "did you mean `sampler`?"]),
        (&["optimizer.lr=fast"], &["optimizer.lr", "--set optimizer.lr=fast"]),
        (&["optimizer.lr=-1"], &["optimizer.lr = -1", "more than 0"]),
        (&["optimizer.lr"], &["--set optimizer.lr", "section.key=value"]),
        (&["train.steps=0"], &["train.steps = 0", "1 or more"]),
        (&["lora.rank=0"], &["lora.rank = 0", "1 or more"]),
        (&["lora.target_modules=['conv']"], &["lora.target_modules", "`conv`", "to_q"]),
        // rewards
        (&["reward.beauty.weight=1"], &["unknown key `reward.beauty`", "`aesthetic`", "`hps`"]),
        (&["reward.aesthetic.weight=0"], &["weight of every reward (aesthetic) is 0", "reward.aesthetic.weight"]),
        (&["reward.aesthetic.clip=no/such/folder"], &["reward `aesthetic`", "`no/such/folder` does not exist"]),
        (&["reward.aesthetic.head=no/such.pth"], &["reward `aesthetic`", "`no/such.pth` does not exist"]),
        (&["reward.hps.model=.", "reward.hps.file=none.pt"], &["reward `hps`", "`none.pt` not found in"]),
        // prompts
        (&["prompts.file=empty.txt"], &["empty.txt", "no prompt", "one on each line"]),
        (&["prompts.file=missing.txt"], &["missing.txt", "prompts.file"]),
        (&["prompts.list=[]"], &["prompts.list is empty", "at least one"]),
        (&["prompts.builtin=plants"], &["prompts.builtin = \"plants\"", "\"animals\"", "prompts.file"]),
        // device
        (&["run.device=cuda"], &["`cuda`", "--device cpu"]),
        (&["run.device=tpu"], &["run.device = \"tpu\"", "cpu, cuda or cuda:N"]),
        (&["run.precision=bf16"], &["precision", "--precision f32"]),
        (&["run.reward_precision=bf16"], &["reward precision bf16", "--reward-precision f32"]),
        (&["run.reward_precision=half"], &["`run.reward_precision`", "`half`", "`f16`"]),
        // places
        (&["model.path=no/such/model"], &["`no/such/model` does not exist", "hub id"]),
        (&["model.path=file"], &["file` is a file", "folder"]),
        (&["model.path=."], &["model_index.json", "not found"]),
        (&["run.dir=file"], &["file"]),
        (&["run.dir=file/run"], &["file/run"]),
    ];
    let before = listing(experiment.folder.path());
    for (settings, words) in cases {
        assert_fails(experiment.folder.path(), &with_settings(&["train", "--config", &config], settings), words);
        assert_eq!(listing(experiment.folder.path()), before, "{settings:?}");
    }
    for (flags, words) in [
        (["--device", "cuda:1"], "`cuda:1`"),
        (["--precision", "bf16"], "--precision f32"),
        (["--precision", "f16"], "--precision f32"),
        (["--reward-precision", "f16"], "--reward-precision f32"),
    ] {
        let line = ["train", "--config", &config, flags[0], flags[1]];
        assert_fails(experiment.folder.path(), &line, &[words]);
    }
    assert_fails(experiment.folder.path(), &["train", "--config", "none.toml"], &["none.toml"]);
    let words = ["no file `emojis`", "no preset", "emoji-guard", "did you mean `emoji`?"];
    assert_fails(experiment.folder.path(), &["train", "--config", "emojis"], &words);
    assert_eq!(listing(experiment.folder.path()), before);
}

#[test]
fn a_bad_line_of_a_config_is_named_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    for (config, words) in [
        ("[optimizer]\nlr = 1e-4\nepsilon = 1\n", &["`optimizer.epsilon`", "line 3", "did you mean `eps`?"][..]),
        ("[train]\nrank = 4\n", &["`train.rank`", "line 2", "did you mean `lora.rank`?"]),
        ("[train]\nsteps = \"many\"\n", &["`train.steps`", "line 2"]),
        ("[train\nsteps = 1\n", &["x.toml", "line 1"]),
        (
            "reward.aesthetic.target = 10\nreward.aestethic.weight = 1\n",
            &["`reward.aestethic`", "line 2", "`aesthetic`"],
        ),
    ] {
        fs::write(folder.path().join("x.toml"), config).unwrap();
        assert_fails(folder.path(), &["train", "--config", "x.toml"], &[words, &["x.toml"]].concat());
    }
    assert_eq!(listing(folder.path()), ["x.toml"]);
}

#[test]
fn a_folder_with_a_run_is_not_written_over() {
    let experiment = Experiment::trained(&["train.steps=1"]);
    let metrics = experiment.metrics();
    let line = ["train", "--config", &experiment.config(), "--set", "run.seed=1"];
    assert_fails(experiment.folder.path(), &line, &["already holds a run", "--resume", "run.dir="]);
    assert_eq!(experiment.metrics(), metrics);
    let config = fs::read_to_string(experiment.run_folder().join("config.toml")).unwrap();
    assert!(config.contains("seed = 0"), "{config}");
}

#[test]
fn a_run_without_a_folder_gets_one_with_the_next_number() {
    let experiment = Experiment::new("tiny-sd15");
    let folder = experiment.folder.path();
    edit(&folder.join("experiment.toml"), &format!("dir = '{}'", text(experiment.run_folder())), "");
    let train = |more: &[&str]| {
        let line = [&["train", "--config", "experiment.toml", "--set", "train.steps=1"], more].concat();
        let output = alignprop(folder).args(line).assert().success();
        String::from_utf8(output.get_output().stderr.clone()).unwrap()
    };
    assert!(!train(&[]).contains("run  "));
    let config = fs::read(folder.join("runs/experiment/config.toml")).unwrap();
    for name in ["runs/experiment-2", "runs/experiment-3"] {
        for more in [&["--dry-run"][..], &[]] {
            let said = train(more);
            assert!(said.contains(name) && said.contains("--resume runs/experiment`"), "{said}");
        }
        let config = fs::read_to_string(folder.join(name).join("config.toml")).unwrap();
        assert!(config.contains(&format!("dir = \"{name}\"")), "{config}");
    }
    assert_eq!(listing(&folder.join("runs")), ["experiment", "experiment-2", "experiment-3"]);
    assert!(config == fs::read(folder.join("runs/experiment/config.toml")).unwrap());
}

#[test]
fn presets_are_listed_printed_and_found_by_name_from_any_folder() {
    let folder = tempfile::tempdir().unwrap();
    let command = |line: &[&str]| {
        let output = alignprop(folder.path()).env("ALIGNPROP_DATA", folder.path()).args(line).assert().success();
        String::from_utf8(output.get_output().stdout.clone()).unwrap()
    };
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let names: Vec<String> = listing(&configs).iter().map(|file| file.trim_end_matches(".toml").to_owned()).collect();
    let list = command(&["config"]);
    assert!(list.lines().map(|line| line.split_whitespace().next().unwrap()).eq(&names), "{list}");
    for name in names {
        assert_eq!(command(&["config", &name]), fs::read_to_string(configs.join(format!("{name}.toml"))).unwrap());
    }
    command(&["train", "--config", "emoji-compress", "--dry-run"]);
    // a file of the name counts before it
    fs::write(folder.path().join("emoji"), "sampler.eta = 2").unwrap();
    assert_fails(folder.path(), &["train", "--config", "emoji"], &["sampler.eta = 2"]);
}

#[test]
fn what_is_no_run_cannot_be_resumed() {
    let experiment = Experiment::new("tiny-sd15");
    let folder = experiment.folder.path();
    fs::create_dir(folder.join("empty")).unwrap();
    assert_fails(folder, &["train", "--resume", "empty"], &["empty", "no run folder", "config.toml"]);
    assert_fails(folder, &["train", "--resume", "missing"], &["missing", "no run folder"]);
    let line = ["train", "--resume", "empty", "--config", &experiment.config()];
    assert_fails(folder, &line, &["--resume", "--config", "--set"]);

    experiment.train(&["train.steps=1"]).unwrap();
    fs::remove_dir_all(experiment.run_folder().join("checkpoints")).unwrap();
    assert_fails(folder, &["train", "--resume", "run"], &["run", "no checkpoint", "run.dir"]);
}

#[test]
fn a_damaged_checkpoint_is_named_and_left_alone() {
    let whole = Experiment::trained(&["train.steps=1"]);
    for (file, words) in [
        ("state.json", &["state.json"][..]),
        ("optimizer.safetensors", &["optimizer.safetensors"]),
        ("pytorch_lora_weights.safetensors", &["pytorch_lora_weights.safetensors"]),
    ] {
        for damage in ["truncated", "missing"] {
            let folder = tempfile::tempdir().unwrap();
            copy_folder(&whole.run_folder(), &folder.path().join("run"));
            let path = folder.path().join("run/checkpoints/step-000001").join(file);
            let bytes = fs::read(&path).unwrap();
            match damage {
                "truncated" => fs::write(&path, &bytes[..bytes.len() / 2]).unwrap(),
                _ => fs::remove_file(&path).unwrap(),
            }
            let metrics = fs::read(folder.path().join("run/metrics.jsonl")).unwrap();
            let line = ["train", "--resume", "run", "--set", "train.steps=2"];
            assert_fails(folder.path(), &line, &[words, &["run/checkpoints/step-000001", "remove it"]].concat());
            assert_eq!(listing(&folder.path().join("run/checkpoints")), ["step-000000", "step-000001"]);
            assert!(metrics == fs::read(folder.path().join("run/metrics.jsonl")).unwrap());
            let config = fs::read_to_string(folder.path().join("run/config.toml")).unwrap();
            assert!(config.contains("\nsteps = 1\n"), "{config}");
        }
    }
}

#[test]
fn an_unfinished_checkpoint_is_not_resumed_from() {
    let experiment = Experiment::trained(&["train.steps=1"]);
    fs::create_dir(experiment.run_folder().join("checkpoints/.unfinished-step-000002")).unwrap();
    let line = ["train", "--resume", "run", "--set", "train.steps=2"];
    let output = alignprop(experiment.folder.path()).args(line).assert().success();
    output.stderr(contains("from step 1"));
    assert_eq!(experiment.checkpoints(), ["step-000000", "step-000001", "step-000002"]);
}

// ---------------------------------------------------------------------------------------------------- models

/// A copy of a pipeline with something wrong in it.
fn assert_model_fails(set: &str, damage: impl FnOnce(&Path), words: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy_folder(&fixture(set).join("model"), &model);
    damage(&model);
    assert_fails(folder.path(), &sample_line("model", &[]), words);
    assert_eq!(listing(folder.path()), ["model"]);
}

fn truncate(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() - 10]).unwrap();
}

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

#[test]
fn missing_files_of_a_model_are_named() {
    let remove = |file: &'static str| move |model: &Path| fs::remove_file(model.join(file)).unwrap();
    assert_model_fails("tiny-sd21", remove(UNET), &["UNet", "diffusion_pytorch_model.safetensors", "model/unet"]);
    assert_model_fails("tiny-sd21", remove("unet/config.json"), &["`config.json`", "model/unet"]);
    assert_model_fails("tiny-sd21", remove("model_index.json"), &["model_index.json", "not found in model"]);
    assert_model_fails("tiny-sd21", remove("tokenizer/tokenizer.json"), &["tokenizer.json", "model/tokenizer"]);
    assert_model_fails("tiny-sd15", remove("tokenizer/merges.txt"), &["merges.txt", "model/tokenizer"]);
    assert_model_fails(
        "tiny-sd21",
        remove("scheduler/scheduler_config.json"),
        &["scheduler_config.json", "model/scheduler"],
    );
    let shard = "unet/diffusion_pytorch_model-00002-of-00002.safetensors";
    assert_model_fails("tiny-sd15", remove(shard), &["-00002-of-00002.safetensors", "index.json", "model/unet"]);
    let vae = |model: &Path| fs::remove_dir_all(model.join("vae")).unwrap();
    assert_model_fails("tiny-sd21", vae, &["VAE", "there is no folder model/vae"]);
}

#[test]
fn truncated_weights_are_named() {
    for (part, file) in [
        ("UNet", UNET),
        ("VAE", "vae/diffusion_pytorch_model.safetensors"),
        ("text encoder", "text_encoder/model.safetensors"),
    ] {
        let path = format!("model/{file}");
        assert_model_fails("tiny-sd21", |model| truncate(&model.join(file)), &[part, &path, "truncated", "download"]);
        let empty = |model: &Path| fs::write(model.join(file), "").unwrap();
        assert_model_fails("tiny-sd21", empty, &[part, &path, "empty"]);
        let pointer =
            |model: &Path| fs::write(model.join(file), "version https://git-lfs.github.com/spec/v1\n").unwrap();
        assert_model_fails("tiny-sd21", pointer, &[part, &path, "git lfs pull"]);
    }
}

#[test]
fn configs_that_do_not_fit_the_weights_are_named() {
    let set = |file: &'static str, old: &'static str, new: &'static str| {
        move |model: &Path| edit(&model.join(file), old, new)
    };
    assert_model_fails(
        "tiny-sd21",
        set("unet/config.json", "\"cross_attention_dim\": 32", "\"cross_attention_dim\": 40"),
        &[UNET, "attn2.to_k.weight", "[8, 32]", "[8, 40]"],
    );
    assert_model_fails(
        "tiny-sd15",
        set("unet/config.json", "\"layers_per_block\": 1", "\"layers_per_block\": 2"),
        &["UNet", "there is no `down_blocks.0"],
    );
    assert_model_fails(
        "tiny-sd21",
        set("vae/config.json", "\"layers_per_block\": 1", "\"layers_per_block\": 2"),
        &["VAE", "vae/diffusion_pytorch_model.safetensors", "there is no `decoder."],
    );
    assert_model_fails(
        "tiny-sd21",
        set("text_encoder/config.json", "\"hidden_size\": 32", "\"hidden_size\": 40"),
        &["text encoder", "[1114, 32]", "[1114, 40]"],
    );
    assert_model_fails(
        "tiny-sd21",
        set("unet/config.json", "\"norm_num_groups\": 8", "\"norm_num_groups\": 7"),
        &["UNet", "norm_num_groups"],
    );
    assert_model_fails("tiny-sd21", set("unet/config.json", "{", "["), &["model/unet/config.json"]);
    // another model's text encoder
    assert_model_fails(
        "tiny-sd15",
        |model| {
            let other = fixture("tiny-sd21/model/text_encoder");
            fs::remove_dir_all(model.join("text_encoder")).unwrap();
            copy_folder(&other, &model.join("text_encoder"));
        },
        &["UNet", "text encoder", "24", "32"],
    );
}

#[test]
fn architectures_that_are_not_supported_are_named() {
    let set = |file: &'static str, old: &'static str, new: &'static str| {
        move |model: &Path| edit(&model.join(file), old, new)
    };
    assert_model_fails(
        "tiny-sd21",
        set("model_index.json", "StableDiffusionPipeline", "StableDiffusionXLPipeline"),
        &["StableDiffusionXLPipeline", "text_encoder_2"],
    );
    assert_model_fails(
        "tiny-sd21",
        set("unet/config.json", "\"CrossAttnDownBlock2D\"", "\"AttnDownBlock2D\""),
        &["unet/config.json", "`AttnDownBlock2D`", "CrossAttnDownBlock2D"],
    );
    assert_model_fails(
        "tiny-sd21",
        set("scheduler/scheduler_config.json", "\"scaled_linear\"", "\"quadratic\""),
        &["scheduler_config.json", "`quadratic`", "scaled_linear"],
    );
    assert_model_fails(
        "tiny-sd21",
        set("scheduler/scheduler_config.json", "\"v_prediction\"", "\"flow\""),
        &["scheduler_config.json", "`flow`", "v_prediction"],
    );
}

#[test]
fn a_unet_without_a_middle_block_paints_as_one_whose_middle_block_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let [without, idle] = ["without", "idle"].map(|name| folder.path().join(name));
    for model in [&without, &idle] {
        copy_folder(&fixture("tiny-sd21/model"), model);
    }
    edit(
        &without.join("unet/config.json"),
        "\"mid_block_type\": \"UNetMidBlock2DCrossAttn\"",
        "\"mid_block_type\": null",
    );
    let nothing = ["resnets.0.conv2", "resnets.1.conv2", "attentions.0.proj_out"];
    for file in listing(&idle.join("unet")).iter().filter(|name| name.ends_with(".safetensors")) {
        let file = idle.join("unet").join(file);
        for name in read_tensors(&file).into_keys() {
            let layer = name.strip_prefix("mid_block.").and_then(|name| name.rsplit_once('.'));
            if layer.is_some_and(|(layer, _)| nothing.contains(&layer)) {
                change_tensor(&file, &name, |t| t.affine(0.0, 0.0));
            }
        }
    }
    let paint = |model: &Path, height: &str| {
        let out = folder.path().join("x.safetensors");
        let line = ["sample", "--model", &text(model), "--prompt", "a boat", "--steps", "3", "--height", height];
        succeeds(
            folder.path(),
            &[&line[..], &["--width", "64", "-o", "x.png", "--save-tensors", &text(&out)]].concat(),
        );
        numbers(&read_tensors(&out)["latents"])
    };
    let (without, idle) = (paint(&without, "72"), paint(&idle, "72"));
    // the idle block adds zeros
    let far = without.iter().zip(&idle).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(far < 1e-5, "{far}");
}

#[test]
fn old_configs_are_read_as_diffusers_repairs_them() {
    let folder = tempfile::tempdir().unwrap();
    let [now, old] = ["now", "old"].map(|name| folder.path().join(name));
    for model in [&now, &old] {
        copy_folder(&fixture("tiny-sd21/model"), model);
    }
    edit(&old.join("scheduler/scheduler_config.json"), "\"steps_offset\": 1", "\"steps_offset\": 0");
    edit(&old.join("scheduler/scheduler_config.json"), "\"clip_sample\": false", "\"clip_sample\": true");
    let paint = |model: &Path| {
        let output = alignprop(folder.path()).args(sample_line(&text(model), &[])).assert().success();
        let stderr = String::from_utf8_lossy(&output.get_output().stderr).into_owned();
        (fs::read(folder.path().join("out.png")).unwrap(), stderr)
    };
    let ((right, quiet), (repaired, said)) = (paint(&now), paint(&old));
    assert_eq!(decode(&right), decode(&repaired));
    assert!(!quiet.contains("warning"), "{quiet}");
    for key in ["steps_offset = 0", "clip_sample"] {
        assert_eq!(said.lines().filter(|line| line.contains(key)).count(), 1, "{said}");
    }
    assert!(said.contains("scheduler_config.json"), "{said}");
}

#[test]
fn a_vae_of_another_class_is_named() {
    let tiny = |model: &Path| edit(&model.join("vae/config.json"), "\"AutoencoderKL\"", "\"AutoencoderTiny\"");
    assert_model_fails("tiny-sd21", tiny, &["vae/config.json", "AutoencoderTiny", "AutoencoderKL"]);
}

#[test]
fn a_reward_model_with_damage_is_named() {
    let experiment = Experiment::new("tiny-sd15");
    let folder = experiment.folder.path();
    let config = experiment.config();
    copy_folder(&fixture("tiny-sd15/clip"), &folder.join("clip"));
    truncate(&folder.join("clip/model.safetensors"));
    let hps = fs::read(fixture("tiny-sd15/hps/HPS_tiny.pt")).unwrap();
    fs::write(folder.join("cut.pt"), &hps[..hps.len() / 2]).unwrap();
    let [hps_model, _] = hps_settings();
    let other_head = format!("reward.aesthetic.head={}", text(fixture("tiny-sd15/clip/model.safetensors")));
    let before = listing(folder);
    for (settings, words) in [
        (&["reward.aesthetic.clip=clip"][..], &["reward `aesthetic`", "clip/model.safetensors", "truncated"][..]),
        (&["reward.aesthetic.head=cut.pt"], &["reward `aesthetic`", "cut.pt", "truncated"]),
        (&[&other_head], &["reward `aesthetic`", "clip/model.safetensors"]),
        (&[&hps_model, "reward.hps.file=open_clip_config.json"], &["reward `hps`", "open_clip_config.json"]),
    ] {
        assert_fails(folder, &with_settings(&["train", "--config", &config], settings), words);
        assert_eq!(listing(folder), before);
    }
}

#[test]
fn the_embedded_model_is_found_from_any_folder() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("data");
    let command = |line: &[&str]| {
        let mut command = alignprop(folder.path());
        command.env("ALIGNPROP_DATA", &place).args(line);
        command
    };
    let run_dir = format!("run.dir={}", text(folder.path().join("run")));
    let dry_run = ["train", "--dry-run", "--set", "train.steps=1", "--set", &run_dir];
    command(&dry_run).assert().success();
    let unpacked = |name: &str| place.join(&listing(&place)[0]).join(name);
    let file = unpacked("assets/prompts/emoji-train.txt");
    let prompts = fs::read(&file).unwrap();
    fs::write(&file, "damaged").unwrap();
    command(&["train", "--dry-run", "--config", "configs/emoji.toml"]).assert().success();
    assert_eq!((fs::read(&file).unwrap(), listing(&place).len()), (prompts, 1));
    // under the same name in a clone, unless something else lies there
    let clone = Path::new(env!("CARGO_MANIFEST_DIR"));
    command(&dry_run).current_dir(clone).assert().stderr(contains("model       assets/emoji-sd ("));
    copy_folder(&clone.join("assets/emoji-sd"), &folder.path().join("assets/emoji-sd"));
    command(&dry_run).assert().stderr(contains("model       assets/emoji-sd ("));
    fs::write(folder.path().join("assets/emoji-sd/scheduler/scheduler_config.json"), "{}").unwrap();
    let whole = folder.path().join("assets/emoji-sd").canonicalize().unwrap();
    command(&dry_run).assert().stderr(contains(format!("model       {} (", whole.display())));
    // a folder of this name in the working directory counts before it
    fs::remove_file(folder.path().join("assets/emoji-sd/model_index.json")).unwrap();
    assert_command_fails(&mut command(&dry_run), &["assets/emoji-sd", "model_index.json"]);
    fs::remove_dir_all(folder.path().join("assets")).unwrap();
    // no place to unpack to
    fs::remove_dir_all(&place).unwrap();
    fs::write(&place, "").unwrap();
    assert_command_fails(&mut command(&dry_run), &["unpacking", "ALIGNPROP_DATA"]);
}

#[test]
fn a_hub_that_cannot_be_reached_is_said_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let line = sample_line("owner/name", &[]);
    assert_fails(folder.path(), &line, &["owner/name", "HF_HUB_OFFLINE", "model.path=DIR", "HF_HOME"]);

    let mut command = alignprop(folder.path());
    command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", "http://127.0.0.1:9").args(&line);
    assert_command_fails(&mut command, &["owner/name", "could not be reached", "model.path=DIR"]);
    assert!(!folder.path().join("out.png").exists());
}

// ---------------------------------------------------------------------------------------------------- sample

#[test]
fn a_seed_is_a_picture() {
    let one = sample(&["--seed", "7"]);
    assert!(one == sample(&["--seed", "7"]));
    assert!(one != sample(&["--seed", "8"]));
    assert!(one != sample(&["--seed", "7", "--guidance-scale", "1"]));
    assert!(one != sample(&["--seed", "7", "--negative-prompt", "a blurred photo"]));
    assert!(one != sample(&["--seed", "7", "--steps", "3"]));
    assert_eq!(decode(&one).dimensions(), (40, 72));
}

#[test]
fn samplers_draw_other_pictures_of_the_same_noise() {
    let kinds = ["ddim", "euler", "euler-ancestral", "dpmpp-2m"];
    let mut pictures: Vec<Vec<u8>> = kinds.iter().map(|kind| sample(&["--sampler", kind, "--steps", "4"])).collect();
    pictures.extend(kinds[1..].iter().map(|kind| sample(&["--sampler", kind, "--karras", "--steps", "4"])));
    for (i, picture) in pictures.iter().enumerate() {
        assert!(!pictures[..i].contains(picture), "{i}");
    }
    assert!(pictures[0] == sample(&["--steps", "4"]));
    let folder = tempfile::tempdir().unwrap();
    let model = model("tiny-sd15");
    let line = sample_line(&model, &["--karras"]);
    assert_fails(folder.path(), &line, &["sampler.karras", "dpmpp-2m"]);
}

#[test]
fn several_prompts_are_a_grid() {
    let folder = tempfile::tempdir().unwrap();
    let line = [
        "sample",
        "--prompt",
        "a cat",
        "a dog",
        "a fox",
        "--steps",
        "1",
        "--height",
        "16",
        "--width",
        "24",
        "--model",
        &model("tiny-sd21"),
        "-o",
        "pictures/grid.png",
    ];
    succeeds(folder.path(), &line);
    let grid = image::open(folder.path().join("pictures/grid.png")).unwrap();
    assert_eq!((grid.width(), grid.height()), (2 * 24 + 4, 2 * 16 + 4));
    assert_eq!(listing(&folder.path().join("pictures")), ["grid.png"]);
}

#[test]
fn a_long_prompt_is_cut_with_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let long = vec!["otter"; 100].join(" ");
    let model = model("tiny-sd15");
    let line = ["sample", "--prompt", &long, "--steps", "1", "--height", "16", "--width", "16", "--model", &model];
    let output = alignprop(folder.path()).args(line).args(["-o", "out.png"]).assert().success();
    output.stderr(contains("warning").and(contains("the first 77")));
}

#[test]
fn a_lora_of_scale_zero_is_the_base_model() {
    let [base, tuned] = [&[][..], &["--lora", &lora("diffusers")]].map(sample);
    assert!(difference(&base, &tuned) > 8, "the adapter has too little effect to test with");
    assert!(base == sample(&["--lora", &lora("diffusers"), "--lora-scale", "0"]));
    assert!(tuned == sample(&["--lora", &lora("diffusers"), "--lora-scale", "1"]));
    let half = sample(&["--lora", &lora("diffusers"), "--lora-scale", "0.5"]);
    assert!(half != base && half != tuned);
}

#[test]
fn a_lora_from_a_timestep_on_is_the_base_model_before_it() {
    let tuned = lora("diffusers");
    let from = |start: &str| sample(&["--lora", &tuned, "--lora-start", start, "--steps", "4"]);
    let (base, full) = (sample(&["--steps", "4"]), sample(&["--lora", &tuned, "--steps", "4"]));
    // timesteps are 0 to 999; at the ends it is one model or the other, to the byte
    assert!(from("0") == base && from("1000") == full);
    let half = from("500");
    assert!(half != base && half != full);
    // the later it starts, the nearer to the base model
    assert!(difference(&from("300"), &base) <= difference(&full, &base));
    let folder = tempfile::tempdir().unwrap();
    let line = sample_line(&model("tiny-sd15"), &["--lora-start", "500"]).join("\n");
    let line: Vec<&str> = line.split('\n').collect();
    alignprop(folder.path()).args(line).assert().code(2).stderr(contains("--lora <FILE>"));
}

#[test]
fn the_three_lora_formats_are_one_adapter() {
    let [diffusers, peft, attn_procs] =
        ["diffusers", "peft", "attn_procs"].map(|form| sample(&["--lora", &lora(form)]));
    assert!(diffusers == peft);
    assert!(diffusers == attn_procs);
    assert!(diffusers != sample(&[]));
    // a folder is read as the file in it
    let file = text(fixture("lora/diffusers/pytorch_lora_weights.safetensors"));
    assert!(diffusers == sample(&["--lora", &file]));
}

#[test]
fn bad_loras_are_named_and_make_no_picture() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
    let good = fs::read(fixture("lora/diffusers/pytorch_lora_weights.safetensors")).unwrap();
    write("cut.safetensors", &good[..good.len() / 2]);
    write("garbage.safetensors", b"these are no weights");
    write("empty.safetensors", b"");
    write("strange.safetensors", &fs::read(fixture("tiny-sd15/aesthetic_head.safetensors")).unwrap());
    write("nan.safetensors", &good);
    let layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight";
    poison(&folder.path().join("nan.safetensors"), &format!("unet.{layer}"));
    write("out.png", b"an older picture");
    fs::create_dir(folder.path().join("folder")).unwrap();
    let before = listing(folder.path());

    let pipeline = model("tiny-sd15");
    for (file, words) in [
        ("cut.safetensors", &["cut.safetensors", "truncated", "copy it again"][..]),
        ("garbage.safetensors", &["garbage.safetensors", "safetensors"]),
        ("empty.safetensors", &["empty.safetensors"]),
        ("strange.safetensors", &["strange.safetensors", "`layers.0.bias`", "lora_A"]),
        ("nan.safetensors", &["nan.safetensors", "not a number", "mid_block"]),
        ("missing.safetensors", &["missing.safetensors", "check the path"]),
        ("folder", &["folder", "pytorch_lora_weights.safetensors"]),
    ] {
        assert_fails(folder.path(), &sample_line(&pipeline, &["--lora", file]), words);
    }
    let other = [lora("diffusers"), model("tiny-sd21")];
    let words = ["another model", "attn2.to_k", "24 -> 8", "32 -> 8", &other[1]];
    assert_fails(folder.path(), &sample_line(&other[1], &["--lora", &other[0]]), &words);
    assert_eq!(listing(folder.path()), before);
    assert_eq!(fs::read(folder.path().join("out.png")).unwrap(), b"an older picture");
}

#[test]
fn a_picture_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "in the way").unwrap();
    fs::create_dir(folder.path().join("taken.png")).unwrap();
    for output in ["file/out.png", "taken.png"] {
        let model = model("tiny-sd15");
        let line = [
            "sample", "--prompt", "x", "--steps", "1", "--height", "16", "--width", "16", "--model", &model, "-o",
            output,
        ];
        assert_fails(folder.path(), &line, &[output]);
    }
    assert_eq!(listing(folder.path()), ["file", "taken.png"]);
    assert_eq!(listing(&folder.path().join("taken.png")), [""; 0]);
}

// ---------------------------------------------------------------------------------------------------- eval

/// One step of training that moves the pictures.
fn tuned() -> Experiment {
    Experiment::trained(&["train.steps=1", "optimizer.lr=0.1"])
}

fn halves(grid: &Path) -> (RgbImage, RgbImage) {
    let grid = image::open(grid).unwrap().to_rgb8();
    let (width, height) = grid.dimensions();
    let row = (height - 4) / 2;
    let half = |top| image::imageops::crop_imm(&grid, 0, top, width, row).to_image();
    (half(0), half(row + 4))
}

#[test]
fn eval_compares_a_run_with_the_base_model() {
    let run = tuned();
    let folder = run.folder.path();
    let stdout = succeeds(folder, &["eval", "--checkpoint", "run", "--seeds", "2"]);
    assert!(stdout.contains("difference") && stdout.contains("two foxes in the snow"), "{stdout}");
    assert_eq!(listing(&folder.join("run/eval")), ["eval.json", "grid.png"]);

    let report = json(&folder.join("run/eval/eval.json"));
    assert_eq!((&report["seeds"], &report["prompts"]), (&2.into(), &3.into()));
    let reward = &report["rewards"][0];
    assert_eq!((&reward["reward"], &reward["preprocess"]), (&"aesthetic".into(), &"alignprop".into()));
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} in {report}"));
    for comparison in reward["per_prompt"].as_array().unwrap().iter().chain([&reward["overall"]]) {
        let [base, tuned, difference] = ["base", "tuned", "difference"].map(|key| number(&comparison[key]["mean"]));
        assert!((tuned - base - difference).abs() < 1e-9 && difference != 0.0, "{comparison}");
        assert!(number(&comparison["base"]["stderr"]) > 0.0);
    }
    let mean: f64 = (0..3).map(|p| number(&reward["per_prompt"][p]["tuned"]["mean"]) / 3.0).sum();
    assert!((mean - number(&reward["overall"]["tuned"]["mean"])).abs() < 1e-9);

    // 6 pairs of 160 x 288, base above, tuned below
    let (above, below) = halves(&folder.join("run/eval/grid.png"));
    assert_eq!(above.dimensions(), (6 * 160 + 5 * 4, 288));
    assert!(above != below);

    // of scale 0 the tuned pictures are the base's
    succeeds(folder, &["eval", "--checkpoint", "run", "--seeds", "2", "--lora-scale", "0", "--out", "zero"]);
    let (zero_above, zero_below) = halves(&folder.join("zero/grid.png"));
    assert!(zero_above == above && zero_below == above);
    let zero = json(&folder.join("zero/eval.json"));
    let overall = &zero["rewards"][0]["overall"];
    assert_eq!(overall["difference"]["mean"], 0.0);
    assert_eq!(overall["base"], reward["overall"]["base"]);
}

#[test]
fn eval_sweeps_scales_and_gates_by_timestep() {
    let run = tuned();
    let folder = run.folder.path();
    let eval = |more: &[&str], out: &str| {
        let line = [&["eval", "--checkpoint", "run", "--seeds", "1", "--out", out][..], more].concat();
        let stdout = succeeds(folder, &line);
        (json(&folder.join(out).join("eval.json")), stdout)
    };
    let (plain, _) = eval(&[], "plain");
    assert!(plain.get("sweep").is_none());
    let (sweep, stdout) = eval(&["--lora-scale", "0,0.5,1"], "sweep");
    assert!(stdout.contains("LoRA scale"), "{stdout}");
    let rows = sweep["sweep"].as_array().unwrap();
    let scales: Vec<f64> = rows.iter().map(|row| row["lora_scale"].as_f64().unwrap()).collect();
    assert_eq!(scales, [0.0, 0.5, 1.0]);
    // no LoRA is the base model; the last one is what a plain evaluation finds
    assert_eq!(rows[0]["difference"]["mean"], 0.0);
    assert_ne!(rows[1]["tuned"], rows[2]["tuned"]);
    let overall = &plain["rewards"][0]["overall"];
    assert_eq!((&rows[2]["tuned"], &rows[2]["base"]), (&overall["tuned"], &overall["base"]));
    assert_eq!(sweep["rewards"], plain["rewards"]);
    // a row of pictures for each: the base and three scales, 288 high with 4 between
    let grid = image::open(folder.join("sweep/grid.png")).unwrap();
    assert_eq!(grid.height(), 4 * 288 + 3 * 4);

    let overall = |report: &Value| report["rewards"][0]["overall"].clone();
    assert_eq!(overall(&eval(&["--lora-start", "1000"], "full").0), overall(&plain));
    assert_eq!(overall(&eval(&["--lora-start", "0"], "none").0)["difference"]["mean"], 0.0);
    assert_ne!(overall(&eval(&["--lora-start", "500"], "half").0), overall(&plain));
    let (euler, _) = eval(&["--sampler", "euler"], "euler");
    assert_eq!((plain["sampler"].as_str(), euler["sampler"].as_str()), (Some("ddim"), Some("euler")));
    assert_ne!(overall(&euler), overall(&plain));
}

#[test]
fn eval_takes_the_moving_average() {
    let run = Experiment::trained(&["train.steps=2", "optimizer.lr=0.1", "regularization.ema_decay=0.5"]);
    let folder = run.folder.path();
    let eval = |checkpoint: &str, more: &[&str]| {
        succeeds(folder, &[&["eval", "--checkpoint", checkpoint, "--seeds", "1", "--out", "out"][..], more].concat());
        json(&folder.join("out/eval.json"))["rewards"].clone()
    };
    let average = eval("run", &["--ema"]);
    assert_ne!(average, eval("run", &[]));
    assert_eq!(average, eval("run/checkpoints/step-000002", &["--ema"]));
    let config = run.config();
    assert_eq!(average, eval("run/pytorch_lora_weights_ema.safetensors", &["--config", &config]));
    let plain = tuned();
    let line = ["eval", "--checkpoint", "run", "--ema"];
    assert_fails(plain.folder.path(), &line, &["--ema", "pytorch_lora_weights_ema.safetensors", "ema_decay"]);
}

#[test]
fn eval_reads_one_checkpoint_with_its_runs_config() {
    let run = Experiment::trained(&["train.steps=2", "optimizer.lr=0.1"]);
    let folder = run.folder.path();
    fs::write(folder.join("held-out.txt"), "a horse\n").unwrap();
    let mut scores = Vec::new();
    for step in [1, 2] {
        let file = text(run.lora_file(step));
        let line =
            ["eval", "--checkpoint", &file, "--prompts", "held-out.txt", "--seeds", "1", "--reward", "aesthetic"];
        succeeds(folder, &line);
        let report = json(&folder.join("eval/eval.json"));
        assert_eq!(report["rewards"][0]["per_prompt"][0]["prompt"], "a horse");
        assert_eq!(report["checkpoint"], file);
        scores.push(report["rewards"][0]["overall"].clone());
    }
    assert_eq!(scores[0]["base"], scores[1]["base"]);
    assert_ne!(scores[0]["tuned"], scores[1]["tuned"]);

    // the run is its last checkpoint
    succeeds(folder, &["eval", "--checkpoint", "run", "--prompts", "held-out.txt", "--seeds", "1"]);
    assert_eq!(json(&folder.join("run/eval/eval.json"))["rewards"][0]["overall"], scores[1]);
    // and a file from elsewhere takes a config
    let config = run.config();
    let line = ["eval", "--checkpoint", &lora("peft"), "--config", &config, "--seeds", "1", "--out", "other"];
    succeeds(folder, &line);
    assert_eq!(listing(&folder.join("other")), ["eval.json", "grid.png"]);
}

#[test]
fn eval_names_what_is_wrong_and_writes_nothing() {
    let run = tuned();
    let folder = run.folder.path();
    fs::write(folder.join("empty.txt"), "\n").unwrap();
    fs::write(folder.join("garbage.safetensors"), "garbage").unwrap();
    let (config, other_model) = (run.config(), format!("model.path={}", model("tiny-sd21")));
    let before = listing(folder);
    for (line, words) in [
        (&["--checkpoint", "run", "--prompts", "empty.txt"][..], &["empty.txt", "no prompt"][..]),
        (&["--checkpoint", "run", "--prompts", "none.txt"], &["none.txt"]),
        (&["--checkpoint", "run", "--reward", "hps"], &["reward `hps`", "xswu/HPSv2", "HF_HUB_OFFLINE"]),
        (&["--checkpoint", "run", "--set", &other_model], &["another model", "tiny-sd21"]),
        (&["--checkpoint", "run", "--device", "cuda"], &["`cuda`", "--device cpu"]),
        (&["--checkpoint", "garbage.safetensors", "--config", &config], &["garbage.safetensors"]),
        (&["--checkpoint", "missing", "--config", &config], &["missing"]),
    ] {
        let line = [&["eval", "--seeds", "1", "--out", "results"], line].concat();
        assert_fails(folder, &line, words);
        assert_eq!(listing(folder), before, "{line:?}");
    }
}

// ---------------------------------------------------------------------------------------------------- soup

/// The picture of a soup.
fn soup_picture(line: &[&str]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let stdout = succeeds(folder.path(), &[&["soup"], line, &["-o", "soup.safetensors"]].concat());
    assert!(stdout.starts_with("soup.safetensors: 80 layers of rank "), "{stdout}");
    assert_eq!(listing(folder.path()), ["soup.safetensors"]);
    sample(&["--lora", &text(folder.path().join("soup.safetensors"))])
}

#[test]
fn a_soup_of_one_is_that_one() {
    let whole = format!("{}=1", lora("peft"));
    let halves = [format!("{}=0.5", lora("peft")), format!("{}=0.5", lora("attn_procs"))];
    let alone = sample(&["--lora", &lora("peft")]);
    for line in [
        &[whole.as_str()][..],
        &[&whole, "--average", "factors"],
        &[&whole, "--rank", "2"],
        &[&halves[0], &halves[1]],
        &[&halves[0], &halves[1], "--average", "factors"],
        &[&halves[0], &halves[1], "--rank", "2"],
    ] {
        let picture = soup_picture(line);
        // products are taken apart and put together: rounding may move a byte
        assert!(difference(&picture, &alone) <= 1, "{line:?}: {}", difference(&picture, &alone));
    }
}

#[test]
fn a_soup_with_the_base_model_scales_the_effect() {
    let half = format!("{}=0.5", lora("peft"));
    let scaled = sample(&["--lora", &lora("peft"), "--lora-scale", "0.5"]);
    for line in [&[half.as_str(), "--with-base"][..], &[&half, "--with-base", "--average", "factors"]] {
        let picture = soup_picture(line);
        assert!(difference(&picture, &scaled) <= 1, "{line:?}: {}", difference(&picture, &scaled));
    }
    assert!(difference(&scaled, &sample(&[])) > 4 && difference(&scaled, &sample(&["--lora", &lora("peft")])) > 4);
}

#[test]
fn a_soup_of_two_ranks_adds_them_and_is_cut_back() {
    let run = Experiment::trained(&["train.steps=2", "lora.rank=3", "optimizer.lr=0.1"]);
    let folder = run.folder.path();
    let parts = [format!("{}=0.25", lora("peft")), format!("{}=0.75", text(run.lora_file(2)))];
    let soup = |more: &[&str]| {
        let line = [&["soup", &parts[0], &parts[1], "-o", "soup.safetensors"], more].concat();
        alignprop(folder).args(line).assert().success()
    };
    soup(&[]).stdout(contains("80 layers of rank 5"));
    soup(&["--rank", "4"]).stdout(contains("80 layers of rank 4")).stderr(contains("relative error"));
    let loaded = alignprop::lora::formats::load(&folder.join("soup.safetensors")).unwrap();
    assert_eq!(loaded.metadata["soup"], parts.join(" "));
    assert_eq!(loaded.metadata["average"], "product");
    assert_eq!(loaded.metadata["base_model"], model("tiny-sd15"));

    let before = fs::read(folder.join("soup.safetensors")).unwrap();
    let line = ["soup", &parts[0], &parts[1], "--average", "factors", "-o", "soup.safetensors"];
    assert_fails(folder, &line, &["different ranks", "average the products"]);
    assert!(before == fs::read(folder.join("soup.safetensors")).unwrap());
}

#[test]
fn bad_soups_are_named_and_write_nothing() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("garbage.safetensors"), "garbage").unwrap();
    let part = |weight: &str| format!("{}={weight}", lora("diffusers"));
    let other = Experiment::new("tiny-sd21");
    other.train(&["train.steps=1"]).unwrap();
    let other = format!("{}=0.5", text(other.lora_file(1)));
    let before = listing(folder.path());
    for (line, words) in [
        (&[part("0.5"), part("0.4")][..], &["0.9", "not to 1", "--with-base"][..]),
        (&[part("0.7"), part("0.7"), "--with-base".into()], &["1.4", "--with-base", "0 to 1"]),
        (&[part("1"), "--average".into(), "factors".into(), "--rank".into(), "1".into()], &["--rank", "leave"]),
        (&["garbage.safetensors=1".into()], &["garbage.safetensors"]),
        (&["missing.safetensors=1".into()], &["missing.safetensors"]),
        (&[part("0.5"), other], &["different models", "(in, out)"]),
    ] {
        let line: Vec<&str> =
            ["soup", "-o", "soup.safetensors"].into_iter().chain(line.iter().map(String::as_str)).collect();
        assert_fails(folder.path(), &line, words);
        assert_eq!(listing(folder.path()), before, "{line:?}");
    }
    assert_fails(folder.path(), &["soup", &part("1"), "-o", "no/such/soup.safetensors"], &["no/such/soup.safetensors"]);
}

#[test]
fn without_a_config_the_embedded_model_trains() {
    let temporary = tempfile::tempdir().unwrap();
    let run = temporary.path().join("run");
    let settings =
        ["train.steps=1", "train.batch_size=1", "sampler.num_inference_steps=2", "truncation.k=1", "run.num_samples=1"];
    let mut command = alignprop(Path::new(env!("CARGO_MANIFEST_DIR")));
    command.args(["train", "--set", &format!("run.dir={}", run.display())]);
    settings.iter().for_each(|setting| {
        command.args(["--set", setting]);
    });
    command.assert().success().stdout(contains("clip-score"));
    assert!(run.join("pytorch_lora_weights.safetensors").is_file());
}
