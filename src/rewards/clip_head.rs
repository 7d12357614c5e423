//! Small networks on CLIP's image embedding: the LAION aesthetic predictor, and any other.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Tensor;

use super::{Differentiable, Judge, Objective, Preprocessor, Score, TapedImages, Towers};
use crate::config::{AestheticConfig, ClipHeadConfig, HeadLayer, Preprocess, Prompt};
use crate::models::Weights;
use crate::models::clip::Clip;
use crate::models::hub::resolve_file;
use crate::nn::layers::{activation, unit_norm};
use crate::nn::{Linear, Value};
use crate::ops::activation::Activation;
use crate::ops::{Ledger, Number};

/// A multilayer perceptron on the embedding of an image.
struct ClipHead {
    clip: Arc<Clip>,
    /// In f32.
    head: Vec<Layer>,
    preprocessor: Preprocessor,
    /// Whether the head reads unit-norm embeddings.
    normalize: bool,
    objective: Objective,
}

enum Layer {
    Linear(Linear),
    Activation(Activation),
}

impl Score for ClipHead {
    fn scores(&self, images: &TapedImages, prompts: &[Prompt], ledger: &mut Ledger) -> Result<Vec<Number>> {
        Ok(ledger.numbers(self.on_tape(images, prompts)?.tensor())?)
    }

    fn embedding(&self, images: &TapedImages) -> Result<Option<Tensor>> {
        Ok(Some(unit_norm(&images.features(&self.clip, &self.preprocessor)?)?.into_tensor()))
    }
}

impl Differentiable for ClipHead {
    fn on_tape(&self, images: &TapedImages, _prompts: &[Prompt]) -> Result<Value> {
        let mut x = images.features(&self.clip, &self.preprocessor)?;
        if self.normalize {
            x = unit_norm(&x)?;
        }
        for layer in &self.head {
            x = match layer {
                Layer::Linear(linear) => linear.forward(&x)?,
                Layer::Activation(function) => activation(&x, *function)?,
            };
        }
        let batch = x.dims()[0];
        Ok(x.reshape(batch)?)
    }

    fn objective(&self) -> Objective {
        self.objective
    }
}

/// The LAION aesthetic predictor: linear layers without activations between them (dropout is off), as published in
/// `sac+logos+ava1-l14-linearMSE.pth`.
pub(super) fn aesthetic(config: &AestheticConfig, towers: &mut Towers) -> Result<Judge> {
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
    let clip = towers.get(&config.clip)?;
    let head = head(&weights, &layers, clip.vision.embed_dim())?;
    let preprocessor = Preprocessor::new(config.preprocess, clip.vision.image_size(), towers.compute.device())?;
    let objective = Objective::of(config.target);
    Ok(Judge::differentiable(ClipHead { clip, head, preprocessor, normalize: true, objective }))
}

/// The LAION predictor's shapes on any tower, its numbers from `weights`: for measuring.
pub(super) fn aesthetic_shapes(clip: Arc<Clip>, weights: &Weights, target: f64) -> Result<Judge> {
    let mut head = Vec::new();
    let mut features = clip.vision.embed_dim();
    for (place, outputs) in [(0, 1024), (2, 128), (4, 64), (6, 16), (7, 1)] {
        let w = weights.pp(format!("layers.{place}"));
        let bias = w.get("bias", &[outputs])?;
        head.push(Layer::Linear(Linear::new(&w.get("weight", &[outputs, features])?, Some(bias))?));
        features = outputs;
    }
    let preprocessor = Preprocessor::new(Preprocess::Alignprop, clip.vision.image_size(), weights.compute().device())?;
    let objective = Objective::Target(target);
    Ok(Judge::differentiable(ClipHead { clip, head, preprocessor, normalize: true, objective }))
}

/// Any head that the config describes.
pub(super) fn clip_head(config: &ClipHeadConfig, towers: &mut Towers) -> Result<Judge> {
    ensure!(!config.head.is_empty(), "reward.clip-head.head is not set: name the file with the head's weights");
    let weights = Weights::open_file(&resolve_file(&config.head, "model.safetensors")?)?.on(&towers.compute.in_f32());
    let clip = towers.get(&config.clip)?;
    let head = head(&weights, &config.layers, clip.vision.embed_dim())?;
    let preprocessor = Preprocessor::new(config.preprocess, clip.vision.image_size(), towers.compute.device())?;
    Ok(Judge::differentiable(ClipHead {
        clip,
        head,
        preprocessor,
        normalize: config.normalize,
        objective: Objective::of(config.target),
    }))
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
