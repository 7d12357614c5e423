//! Small networks on CLIP's image embedding: the LAION aesthetic predictor, and any other.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::{Differentiable, Judge, Objective, Preprocessor, Score, TapedImages, Towers};
use crate::config::{AestheticConfig, ClipHeadConfig, HeadLayer, Preprocess, Prompt};
use crate::files::unwrapped;
use crate::models::clip::Clip;
use crate::models::hub::resolve_file;
use crate::models::{Source, Weights};
use crate::nn::layers::{activation, unit_norm};
use crate::nn::{Linear, Value};
use crate::ops::activation::Activation;
use crate::ops::device::Compute;
use crate::ops::{Ledger, Number, is_finite};

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

/// (B, D) -> (B, 1).
fn through(head: &[Layer], x: Value) -> Result<Value> {
    head.iter().try_fold(x, |x, layer| {
        Ok(match layer {
            Layer::Linear(linear) => linear.forward(&x)?,
            Layer::Activation(function) => activation(&x, *function)?,
        })
    })
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
        let batch = x.dims()[0];
        Ok(through(&self.head, x)?.reshape(batch)?)
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
    let layers = linear_layers(&weights)?;
    let clip = towers.get(&config.clip)?;
    let head = head(&weights, &layers, clip.vision.embed_dim())?;
    let preprocessor = Preprocessor::of(&clip, config.preprocess, towers.compute.device())?;
    let objective = Objective::of(config.target);
    Ok(Judge::differentiable(ClipHead { clip, head, preprocessor, normalize: true, objective }))
}

/// The numbers of the published head's layers; between them is dropout, which is off.
const PUBLISHED: [usize; 5] = [0, 2, 4, 6, 7];

/// The layers of a head that is linear for certain: the published chain, or a single layer.
///
/// # Errors
/// Another head, whose activations no file of weights tells: names the reward that reads it.
fn linear_layers(weights: &Weights) -> Result<Vec<HeadLayer>> {
    let names = weights.names();
    // `layers.0.weight` -> `layers.0`, and a bare `weight` -> ``
    let layer = |name: &str, end: &str| Some(name.strip_suffix(end)?.strip_suffix('.').unwrap_or_default().to_owned());
    let is_matrix = |name: &String| weights.shape(name).is_some_and(|shape| shape.len() == 2);
    let mut layers: Vec<String> =
        names.iter().filter(|name| is_matrix(name)).filter_map(|name| layer(name, "weight")).collect();
    let number = |layer: &String| layer.rsplit('.').next().and_then(|end| end.parse::<usize>().ok());
    layers.sort_by_key(number);
    let is_of_a_layer = |name: &String| {
        is_matrix(name) && name.ends_with("weight") || layer(name, "bias").is_some_and(|layer| layers.contains(&layer))
    };
    let prefix = |layer: &String| layer.rsplit_once('.').map(|(prefix, _)| prefix.to_owned());
    let is_published = layers.iter().filter_map(number).eq(PUBLISHED)
        && layers.len() == PUBLISHED.len()
        && layers.iter().all(|layer| prefix(layer) == prefix(&layers[0]));
    if names.iter().all(is_of_a_layer) && (layers.len() == 1 || is_published) {
        return Ok(layers.into_iter().map(HeadLayer::Linear).collect());
    }
    let linear: Vec<String> = layers.iter().take(8).map(|layer| format!("{{ linear = \"{layer}\" }}")).collect();
    bail!(
        "{} is neither the published aesthetic head (linear layers `layers.0`, `.2`, `.4`, `.6`, `.7`) nor a single linear layer, and \
         a file of weights does not tell the activations between its layers: take [reward.clip-head] in place of [reward.aesthetic], \
         with this file as `head` and as `layers` what its author computes, such as [{}], where {{ activation = \"relu\" }} goes between",
        weights.file(),
        if linear.is_empty() { "{ linear = \"..\" }".to_owned() } else { linear.join(", ") }
    );
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
    let preprocessor = Preprocessor::of(&clip, Preprocess::Alignprop, weights.compute().device())?;
    let objective = Objective::Target(target);
    Ok(Judge::differentiable(ClipHead { clip, head, preprocessor, normalize: true, objective }))
}

/// What a head's file says of itself, as JSON under [`HeadFile::KEY`] in its header.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct HeadFile {
    /// The CLIP that it was fitted on: a folder or a hub id.
    pub clip: String,
    pub preprocess: Preprocess,
    pub layers: Vec<HeadLayer>,
}

impl HeadFile {
    pub const KEY: &str = "alignprop.head";

    fn of(weights: &Weights) -> Result<Option<Self>> {
        let said = weights.metadata().get(Self::KEY);
        let read = |text: &String| {
            serde_json::from_str(text).with_context(|| format!("{}: `{}` in its header", weights.file(), Self::KEY))
        };
        said.map(read).transpose()
    }
}

/// Any head that the config, or its own file, describes.
pub(super) fn clip_head(config: &ClipHeadConfig, towers: &mut Towers) -> Result<Judge> {
    ensure!(!config.head.is_empty(), "reward.clip-head.head is not set: name the file with the head's weights");
    let weights = Weights::open_file(&resolve_file(&config.head, "model.safetensors")?)?.on(&towers.compute.in_f32());
    let said = HeadFile::of(&weights)?;
    let layers = match (&*config.layers, &said) {
        ([], Some(said)) => &said.layers,
        _ => &config.layers,
    };
    ensure!(
        !layers.is_empty(),
        "reward.clip-head.layers is empty, and {} does not name its layers, as a file of `alignprop fit` does: list them in order, for \
         example [{{ linear = \"layers.0\" }}, {{ activation = \"relu\" }}, {{ linear = \"layers.2\" }}]",
        weights.file()
    );
    let clip = config.clip.as_deref().or(said.as_ref().map(|said| &*said.clip));
    let clip = towers.get(clip.unwrap_or("openai/clip-vit-large-patch14"))?;
    let head = head(&weights, layers, clip.vision.embed_dim())?;
    let preprocess = config.preprocess.or(said.map(|said| said.preprocess)).unwrap_or_default();
    let preprocessor = Preprocessor::of(&clip, preprocess, towers.compute.device())?;
    let (normalize, objective) = (config.normalize, Objective::of(config.target));
    Ok(Judge::differentiable(ClipHead { clip, head, preprocessor, normalize, objective }))
}

/// The vectors that heads read: of a CLIP's image tower, of unit norm.
pub struct Embedder {
    clip: Arc<Clip>,
    preprocessor: Preprocessor,
}

impl Embedder {
    /// `clip` is a folder or a hub id in transformers' layout.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn load(clip: &str, preprocess: Preprocess, compute: &Compute) -> Result<Self> {
        let compute = &compute.for_rewards();
        let clip = Arc::new(Clip::load_transformers(&Source::open(clip)?, false, compute)?);
        Ok(Self { preprocessor: Preprocessor::of(&clip, preprocess, compute.device())?, clip })
    }

    /// Unit vectors (N, D) of N pictures, in f32 on the CPU.
    ///
    /// # Errors
    /// A picture that cannot be prepared, or gives numbers that are not finite.
    pub fn embed(&self, pictures: Vec<RgbImage>) -> Result<Tensor> {
        let images = TapedImages::of_pictures(pictures, self.preprocessor.device());
        let vectors = unit_norm(&images.features(&self.clip, &self.preprocessor)?)?.into_tensor();
        ensure!(is_finite(&vectors)?, "its vector holds numbers that are not finite");
        Ok(vectors.to_device(&Device::Cpu)?)
    }
}

/// The published aesthetic head's scores of unit vectors (N, D) on the CPU.
///
/// # Errors
/// The head cannot be read, or is for vectors of another width.
pub fn aesthetic_scores(file: &str, embeddings: &Tensor) -> Result<Vec<f64>> {
    let weights = Weights::open_file(&resolve_file(file, "aesthetic-model.pth")?)?;
    let head = head(&weights, &linear_layers(&weights)?, embeddings.dims2()?.1)?;
    let scores = through(&head, Value::constant(embeddings))?.into_tensor();
    Ok(scores.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
}

/// The layers with their weights, from `features` inputs to one score.
fn head(weights: &Weights, layers: &[HeadLayer], mut features: usize) -> Result<Vec<Layer>> {
    let mut head = Vec::with_capacity(layers.len());
    for layer in layers {
        head.push(match layer {
            HeadLayer::Activation(function) => Layer::Activation(*function),
            HeadLayer::Linear(name) => {
                // a wrapper's prefix is in no name of `weights`
                let w = weights.pp(unwrapped(&format!("{name}.")).trim_end_matches('.'));
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// The layers that are read of a file with tensors of these names and shapes.
    fn layers(tensors: &[(&str, &[usize])]) -> Result<Vec<HeadLayer>> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("head.safetensors");
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let tensors: HashMap<&str, Tensor> = tensors.iter().map(|(name, shape)| (*name, zeros(shape))).collect();
        candle_core::safetensors::save(&tensors, &file).unwrap();
        linear_layers(&Weights::open_file(&file).unwrap())
    }

    /// The names of linear layers with these numbers under `prefix`, from 6 features to a score.
    fn chain(prefix: &str, numbers: &[usize]) -> Vec<String> {
        numbers.iter().map(|n| format!("{prefix}{n}.weight")).collect()
    }

    #[test]
    fn heads_that_are_linear_for_certain_are_read() {
        for prefix in ["layers.", ""] {
            let names = chain(prefix, &PUBLISHED);
            let tensors: Vec<_> = names.iter().map(|name| (&**name, &[1, 1][..])).collect();
            let expected: Vec<_> = PUBLISHED.iter().map(|n| HeadLayer::Linear(format!("{prefix}{n}"))).collect();
            assert_eq!(layers(&tensors).unwrap(), expected);
        }
        for (name, bias, layer) in
            [("weight", "bias", ""), ("layers.3.weight", "layers.3.bias", "layers.3"), ("fc.weight", "fc.bias", "fc")]
        {
            let expected = [HeadLayer::Linear(layer.into())];
            assert_eq!(layers(&[(name, &[1, 6]), (bias, &[1])]).unwrap(), expected);
            assert_eq!(layers(&[(name, &[1, 6])]).unwrap(), expected);
        }
    }

    #[test]
    fn a_head_that_may_have_activations_is_refused_with_the_way_to_read_it() {
        let mut others: Vec<Vec<String>> =
            [&[0, 3, 5][..], &[0, 2], &[0, 1, 2], &[0, 2, 4], &[0, 3, 6, 9, 11], &[0, 2, 4, 6, 8], &[0, 2, 4, 6, 7, 9]]
                .iter()
                .map(|numbers| chain("layers.", numbers))
                .collect();
        others.push(["fc1.weight", "fc2.weight"].map(str::to_owned).to_vec());
        others.push([chain("a.", &PUBLISHED[..4]), chain("b.", &[7])].concat());
        others.push(chain("layers.", &PUBLISHED).into_iter().chain(["x.weight".into()]).collect());
        for names in others {
            let tensors: Vec<_> = names.iter().map(|name| (&**name, &[1, 1][..])).collect();
            let message = layers(&tensors).unwrap_err().to_string();
            for word in ["head.safetensors", "[reward.clip-head]", "activation", names[0].trim_end_matches(".weight")] {
                assert!(message.contains(word), "{message}");
            }
        }
        // what is no linear layer
        for other in ["norm.weight", "layers.1.running_mean", "scale"] {
            assert!(layers(&[("layers.0.weight", &[1, 6]), (other, &[6])]).is_err(), "{other}");
        }
        assert!(layers(&[("scale", &[6])]).is_err());
    }
}
