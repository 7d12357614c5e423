//! What the integration tests share: the fixtures, small experiments on them, and how to read and change files.
#![allow(dead_code)] // each test binary uses a part of it

pub mod lab;
pub mod original;
pub mod program;
pub mod server;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use alignprop::cli::Cli;
use alignprop::lora::formats;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use clap::Parser;
use serde_json::{Map, Value};

/// `tests/fixtures/<name>`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A path as the text that TOML and command lines hold.
pub fn text(path: impl AsRef<Path>) -> String {
    path.as_ref().to_str().expect("a path in UTF-8").to_owned()
}

/// Copies a folder with all that is in it.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (from, name) = {
            let entry = entry.unwrap();
            (entry.path(), entry.file_name())
        };
        if from.is_dir() {
            copy_folder(&from, &to.join(name));
        } else {
            // not `fs::copy`, which would keep a read-only file read-only
            fs::write(to.join(name), fs::read(from).unwrap()).unwrap();
        }
    }
}

/// Replaces one text in a file; it must be there.
pub fn edit(path: &Path, old: &str, new: &str) {
    let content = fs::read_to_string(path).unwrap();
    assert!(content.contains(old), "{} has no `{old}`", path.display());
    fs::write(path, content.replacen(old, new, 1)).unwrap();
}

pub fn read_tensors(path: &Path) -> BTreeMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap().into_iter().collect()
}

/// Changes one tensor of a safetensors file, which keeps its type.
pub fn change_tensor(path: &Path, name: &str, change: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>) {
    let mut tensors: HashMap<String, Tensor> = read_tensors(path).into_iter().collect();
    let old = tensors.get(name).unwrap_or_else(|| panic!("{} has no `{name}`", path.display()));
    let new = change(&old.to_dtype(DType::F32).unwrap()).unwrap().to_dtype(old.dtype()).unwrap();
    tensors.insert(name.to_owned(), new);
    // as a new file: the old one may be mapped
    fs::remove_file(path).unwrap();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// Makes every number of one tensor a NaN.
pub fn poison(path: &Path, name: &str) {
    change_tensor(path, name, |t| t.affine(0.0, f64::NAN));
}

pub fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// |x - y| / |y|, all tensors together; they have the same names and shapes.
pub fn distance(x: &BTreeMap<String, Tensor>, y: &BTreeMap<String, Tensor>) -> f64 {
    assert!(x.keys().eq(y.keys()));
    let (mut difference, mut norm) = (0.0, 0.0);
    for (name, y) in y {
        assert_eq!(x[name].dims(), y.dims(), "{name}");
        for (x, y) in numbers(&x[name]).into_iter().zip(numbers(y)) {
            difference += f64::from(x - y).powi(2);
            norm += f64::from(y).powi(2);
        }
    }
    assert!(norm > 0.0 && norm.is_finite(), "the norm is {norm}");
    (difference / norm).sqrt()
}

pub fn norm(tensors: &BTreeMap<String, Tensor>) -> f64 {
    tensors.values().flat_map(numbers).map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// The names of what a folder holds, sorted; empty where there is no folder.
pub fn listing(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Runs a command line inside this process.
pub fn run<S: AsRef<str>>(arguments: &[S]) -> Result<bool> {
    let line = std::iter::once("alignprop").chain(arguments.iter().map(AsRef::as_ref));
    alignprop::commands::run(Cli::try_parse_from(line)?)
}

/// A small experiment in a folder of its own, which goes when it is dropped.
pub struct Experiment {
    pub folder: tempfile::TempDir,
    config: PathBuf,
}

impl Experiment {
    /// On a pipeline: rank 2, 3 steps, all of them kept, with guidance and noise; the reward is `aesthetic`.
    ///
    /// 72 x 40 pixels are 9 x 5 latents, no multiple of 8 and the least that leaves the innermost attention two
    /// positions: over one position alone the gradient of to_q and to_k is zero.
    pub fn new(set: &str) -> Self {
        Self::on(&fixture(set))
    }

    /// On the pipeline and the rewards in a folder such as `tests/fixtures/tiny-sd15`.
    pub fn on(set: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let [model, clip, head, run] =
            [set.join("model"), set.join("clip"), set.join("aesthetic_head.safetensors"), folder.path().join("run")]
                .map(text);
        let config = format!(
            r#"
            lora.rank = 2
            reward.aesthetic = {{ clip = '{clip}', head = '{head}' }}
            prompts.list = ["a cat", "a red dog", "two foxes in the snow"]
            [model]
            path = '{model}'
            [sampler]
            num_inference_steps = 3
            guidance_scale = 5.0
            eta = 0.5
            height = 72
            width = 40
            [truncation]
            rule = "full"
            [optimizer]
            lr = 1e-2
            [train]
            steps = 2
            [run]
            dir = '{run}'
            save_every = 1
            sample_every = 0
            keep_checkpoints = 0
            "#
        );
        let path = folder.path().join("experiment.toml");
        fs::write(&path, config).unwrap();
        Self { folder, config: path }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The experiment's file.
    pub fn config(&self) -> String {
        text(&self.config)
    }

    pub fn run_folder(&self) -> PathBuf {
        self.path("run")
    }

    /// `train --config ... --set ...`.
    pub fn train(&self, set: &[&str]) -> Result<()> {
        let config = self.config();
        run(&with_settings(&["train", "--config", &config], set)).map(|_| ())
    }

    /// `train --resume ... --set ...`.
    pub fn resume(&self, set: &[&str]) -> Result<()> {
        let dir = text(self.run_folder());
        run(&with_settings(&["train", "--resume", &dir], set)).map(|_| ())
    }

    /// Trains in a fresh folder, and gives it.
    pub fn trained(set: &[&str]) -> Self {
        let experiment = Self::new("tiny-sd15");
        experiment.train(set).unwrap();
        experiment
    }

    pub fn checkpoint(&self, step: usize) -> PathBuf {
        self.run_folder().join(format!("checkpoints/step-{step:06}"))
    }

    /// The numbers of the steps that have a checkpoint.
    pub fn checkpoints(&self) -> Vec<String> {
        listing(&self.run_folder().join("checkpoints"))
    }

    pub fn lora_file(&self, step: usize) -> PathBuf {
        self.checkpoint(step).join("pytorch_lora_weights.safetensors")
    }

    /// The factors after a step, by their names.
    pub fn adapters(&self, step: usize) -> BTreeMap<String, Tensor> {
        formats::load(&self.lora_file(step)).unwrap().adapters.named_tensors().into_iter().collect()
    }

    /// AdamW's moments after a step, by their names.
    pub fn moments(&self, step: usize) -> BTreeMap<String, Tensor> {
        read_tensors(&self.checkpoint(step).join("optimizer.safetensors"))
    }

    /// The gradients of the first step: AdamW's first moment is then (1 - 0.9) of them.
    pub fn first_gradients(&self) -> BTreeMap<String, Tensor> {
        let moments = self.moments(1).into_iter();
        moments.filter_map(|(name, m)| Some((name.strip_prefix("exp_avg.")?.to_owned(), (m * 10.0).unwrap()))).collect()
    }

    /// The lines of the metrics, without the time they took.
    pub fn metrics(&self) -> Vec<Map<String, Value>> {
        let text = fs::read_to_string(self.run_folder().join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| {
            let mut line: Map<String, Value> = serde_json::from_str(line).unwrap();
            line.remove("seconds");
            line
        });
        lines.collect()
    }

    /// One metric of all the lines that have it.
    pub fn metric(&self, name: &str) -> Vec<f64> {
        self.metrics().iter().filter_map(|line| line.get(name)?.as_f64()).collect()
    }
}

/// A command line with `--set` before each setting.
pub fn with_settings<'a>(line: &[&'a str], set: &[&'a str]) -> Vec<&'a str> {
    line.iter().copied().chain(set.iter().flat_map(|setting| ["--set", *setting])).collect()
}

/// The settings of the other rewards of `tests/fixtures/tiny-sd15`.
pub fn hps_settings() -> [String; 2] {
    let model = text(fixture("tiny-sd15/hps"));
    [format!("reward.hps.model={model}"), "reward.hps.file=HPS_tiny.pt".to_owned()]
}
