//! Small networks on CLIP's image embedding: the LAION aesthetic predictor, and any other.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Tensor;

use super::images::{Images, Tower, Towers};
use super::{Differentiable, Objective, Score, noted};
use crate::config::{AestheticConfig, ClipHeadConfig, HeadLayer, Prompt};
use crate::models::Weights;
use crate::models::hub::resolve_file;
use crate::nn::layers::{activation, unit_norm};
use crate::nn::{Linear, Value};
use crate::ops::activation::Activation;
use crate::ops::{Ledger, Number};

/// A multilayer perceptron on the embedding of an image.
struct ClipHead {
    /// For messages.
    name: &'static str,
    tower: Arc<Tower>,
    /// In f32.
    head: Vec<Layer>,
    /// Whether the head reads unit-norm embeddings.
    normalize: bool,
    objective: Objective,
}

enum Layer {
    Linear(Linear),
    Activation(Activation),
}

impl Score for ClipHead {
    fn scores(&self, images: &Images, prompts: &[Prompt], ledger: &mut Ledger) -> Result<Vec<Number>> {
        noted(self.name, &self.on_tape(images, prompts)?, images, ledger)
    }

    fn embedding(&self, images: &Images) -> Result<Option<Tensor>> {
        Ok(Some(unit_norm(&images.embedding(&self.tower)?)?.into_tensor()))
    }
}

impl Differentiable for ClipHead {
    fn on_tape(&self, images: &Images, _prompts: &[Prompt]) -> Result<Value> {
        let mut x = images.embedding(&self.tower)?;
        if self.normalize {
            x = unit_norm(&x)?;
        }
        for layer in &self.head {
            x = match layer {
                Layer::Linear(linear) => linear.forward(&x)?,
                Layer::Activation(function) => activation(&x, *function)?,
            };
        }
        Ok(x.reshape(images.count())?)
    }

    fn objective(&self) -> Objective {
        self.objective
    }
}

/// The LAION aesthetic predictor: linear layers without activations between them (dropout is off), as published in
/// `sac+logos+ava1-l14-linearMSE.pth`.
pub(super) fn aesthetic(config: &AestheticConfig, towers: &mut Towers) -> Result<Box<dyn Differentiable>> {
    let file = resolve_file(&config.head, "aesthetic-model.pth")?;
    let weights = Weights::open_file(&file)?.on(&towers.compute.in_f32());
    let mut layers: Vec<(usize, String)> = weights
        .names()
        .iter()
        .filter_map(|name| name.strip_suffix(".weight"))
        .filter_map(|layer| Some((layer.rsplit('.').next()?.parse().ok()?, layer.to_owned())))
        .collect();
    layers.sort();
    ensure!(
        !layers.is_empty(),
        "{} holds no aesthetic head: its keys should be `layers.0.weight`, `layers.0.bias`, ...",
        weights.file()
    );
    let layers: Vec<HeadLayer> = layers.into_iter().map(|(_, name)| HeadLayer::Linear(name)).collect();
    let tower = towers.get(&config.clip, config.preprocess)?;
    let head = head(&weights, &layers, tower.clip.vision.embed_dim())?;
    let objective = Objective::of(config.target);
    Ok(Box::new(ClipHead { name: "aesthetic", tower, head, normalize: true, objective }))
}

/// The LAION predictor's shapes on any tower, its numbers from `weights`: for measuring.
pub(super) fn aesthetic_shapes(tower: Arc<Tower>, weights: &Weights, target: f64) -> Result<Box<dyn Differentiable>> {
    let mut head = Vec::new();
    let mut features = tower.clip.vision.embed_dim();
    for (place, outputs) in [(0, 1024), (2, 128), (4, 64), (6, 16), (7, 1)] {
        let w = weights.pp(format!("layers.{place}"));
        let bias = w.get("bias", &[outputs])?;
        head.push(Layer::Linear(Linear::new(&w.get("weight", &[outputs, features])?, Some(bias))?));
        features = outputs;
    }
    Ok(Box::new(ClipHead { name: "aesthetic", tower, head, normalize: true, objective: Objective::Target(target) }))
}

/// Any head that the config describes.
pub(super) fn clip_head(config: &ClipHeadConfig, towers: &mut Towers) -> Result<Box<dyn Differentiable>> {
    ensure!(!config.head.is_empty(), "reward.clip-head.head is not set: name the file with the head's weights");
    let weights = Weights::open_file(&resolve_file(&config.head, "model.safetensors")?)?.on(&towers.compute.in_f32());
    let tower = towers.get(&config.clip, config.preprocess)?;
    let head = head(&weights, &config.layers, tower.clip.vision.embed_dim())?;
    let objective = Objective::of(config.target);
    Ok(Box::new(ClipHead { name: "clip-head", tower, head, normalize: config.normalize, objective }))
}

/// The layers with their weights, from `features` inputs to one score.
fn head(weights: &Weights, layers: &[HeadLayer], mut features: usize) -> Result<Vec<Layer>> {
    let mut head = Vec::with_capacity(layers.len());
    for layer in layers {
        head.push(match layer {
            HeadLayer::Activation(function) => Layer::Activation(*function),
            HeadLayer::Linear(name) => {
                let w = weights.pp(name);
                let shape = w.shape("weight").with_context(|| format!("{} has no layer `{name}`; it has {}", weights.file(), weights.names().join(", ")))?;
                let [outputs, inputs] = shape[..] else { bail!("`{name}.weight` in {} is no matrix: {shape:?}", weights.file()) };
                ensure!(outputs > 0, "`{name}.weight` in {} is empty", weights.file());
                ensure!(
                    inputs == features,
                    "the head in {} does not fit: `{name}` takes {inputs} features and gets {features} (the CLIP it was trained on is another?)",
                    weights.file()
                );
                features = outputs;
                let bias = w.contains("bias").then(|| w.get("bias", &[outputs])).transpose()?;
                Layer::Linear(Linear::new(&w.get("weight", &[outputs, inputs])?, bias)?)
            }
        });
    }
    ensure!(features == 1, "the head in {} ends in {features} numbers, not in one score", weights.file());
    Ok(head)
}
