//! YOLOS (Fang et al. 2021): a ViT with detection tokens beside its patches, each of which says what it sees and where; from
//! the layout of transformers' `YolosForObjectDetection`. Frozen; images are differentiable.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::clip::PixelStatistics;
use super::parameters::{layer_norm, linear};
use super::transformer::{TowerConfig, Transformer, VIT, patches};
use super::{Source, Weights};
use crate::nn::layers::activation;
use crate::nn::{LayerNorm, Linear, Value, computed_in};
use crate::ops::activation::Activation;
use crate::ops::device::Compute;

/// `config.json`, with transformers' defaults.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct Config {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    hidden_act: String,
    layer_norm_eps: f64,
    image_size: Sides,
    patch_size: usize,
    qkv_bias: bool,
    num_detection_tokens: usize,
    use_mid_position_embeddings: bool,
    /// Class names by their number as a text.
    id2label: BTreeMap<String, String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-12,
            image_size: Sides::Both([512, 864]),
            patch_size: 16,
            qkv_bias: true,
            num_detection_tokens: 100,
            use_mid_position_embeddings: true,
            id2label: BTreeMap::new(),
        }
    }
}

/// Of sizes in a config; what lies beyond is no detector's.
const MOST: usize = 1 << 14;

/// Height and width, or one number for both.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged)]
enum Sides {
    Square(usize),
    Both([usize; 2]),
}

impl Config {
    /// Names of the classes by their numbers.
    fn labels(&self) -> Result<Vec<String>> {
        let count = self.id2label.len();
        ensure!(count > 0, "config.json: there is no `id2label`, the names of the classes");
        let name = |number: usize| {
            self.id2label
                .get(&number.to_string())
                .cloned()
                .with_context(|| format!("config.json: `id2label` has {count} classes and no {number}"))
        };
        (0..count).map(name).collect()
    }
}

/// A detector: what its tokens see in an image.
pub struct Yolos {
    patch_size: usize,
    /// (C, 3 · patch · patch), with a bias
    patch_embedding: Linear,
    /// (1, C) and (1, Q · C)
    class_token: Tensor,
    detection_tokens: Tensor,
    detections: usize,
    positions: Positions,
    transformer: Transformer,
    norm: LayerNorm,
    /// In f32, as the boxes' head is.
    class_head: Vec<Linear>,
    box_head: Vec<Linear>,
    labels: Vec<String>,
    /// How pixels are normalised.
    pub pixels: PixelStatistics,
}

impl Yolos {
    /// A folder in transformers' layout.
    ///
    /// # Errors
    /// A file is missing or of another model; names it and the key.
    pub fn load(source: &Source, compute: &Compute) -> Result<Self> {
        let kind: ModelType = source.read_json("config.json")?;
        ensure!(
            kind.model_type.as_deref().is_none_or(|kind| kind == "yolos"),
            "{} is a `{}` and no YOLOS detector: give one such as hustvl/yolos-tiny",
            source.label(),
            kind.model_type.unwrap_or_default()
        );
        let config: Config = source.read_json("config.json")?;
        let weights = Weights::open(source, "model", None)?.on(compute);
        Self::new(&config, &weights, PixelStatistics::of_detector(source)?)
            .with_context(|| format!("loading the detector {}", source.label()))
    }

    fn new(config: &Config, weights: &Weights, pixels: PixelStatistics) -> Result<Self> {
        let Config { hidden_size: c, num_attention_heads: heads, patch_size: patch, num_detection_tokens: q, .. } =
            *config;
        ensure!(config.qkv_bias, "config.json: `qkv_bias` = false is not implemented: no published YOLOS has it");
        ensure!(c > 0 && heads > 0 && c.is_multiple_of(heads), "config.json: {heads} heads for a hidden size of {c}");
        ensure!(
            (1..=MOST).contains(&patch) && q <= MOST && c <= MOST,
            "config.json: patches of {patch} pixels, {q} detection tokens, a hidden size of {c}: each is at most {MOST}"
        );
        let labels = config.labels()?;
        let act = Activation::from_name(&config.hidden_act)
            .with_context(|| format!("config.json: `hidden_act` {} is not known", config.hidden_act))?;
        let tower = TowerConfig {
            width: c,
            mlp: config.intermediate_size,
            layers: config.num_hidden_layers,
            heads,
            act,
            eps: config.layer_norm_eps,
        };
        let (embeddings, encoder) = (weights.pp("vit.embeddings"), weights.pp("vit.encoder"));
        let projection = embeddings.pp("patch_embeddings.projection");
        let kernel = projection.get("weight", &[c, 3, patch, patch])?.reshape((c, 3 * patch * patch))?;
        let mid = match config.use_mid_position_embeddings {
            true => config.num_hidden_layers.saturating_sub(1),
            false => 0,
        };
        let in_f32 = weights.on(&weights.compute().in_f32());
        let head = |name: &str, outputs: usize| -> Result<Vec<Linear>> {
            let layer = |(i, outputs)| linear(&in_f32.pp(format!("{name}.layers.{i}")), c, outputs, true);
            (0..).zip([c, c, outputs]).map(layer).collect()
        };
        Ok(Self {
            patch_size: patch,
            patch_embedding: Linear::new(&kernel, Some(projection.get("bias", &[c])?))?,
            class_token: embeddings.get("cls_token", &[1, 1, c])?.reshape((1, c))?,
            detection_tokens: embeddings.get("detection_tokens", &[1, q, c])?.reshape((1, q * c))?,
            detections: q,
            positions: Positions::load(weights, config, mid)?,
            transformer: Transformer::load(&encoder.pp("layer"), &tower, &VIT, false)?,
            norm: layer_norm(&weights.pp("vit.layernorm"), c, config.layer_norm_eps)?,
            class_head: head("class_labels_classifier", labels.len() + 1)?,
            box_head: head("bbox_predictor", 4)?,
            labels,
            pixels,
        })
    }

    /// Names of the classes, by their numbers.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }
    /// How many things it can see in an image.
    pub fn detections(&self) -> usize {
        self.detections
    }
    /// Height and width of an image are multiples of this.
    pub fn patch_size(&self) -> usize {
        self.patch_size
    }

    /// Detection tokens (B, Q, C) of normalised pixels (B, 3, H, W); both in f32.
    ///
    /// # Errors
    /// H or W is no multiple of the patch.
    pub fn tokens(&self, pixels: &Value) -> Result<Value> {
        computed_in(self.class_token.dtype(), pixels, |pixels| self.hidden(pixels))
    }

    /// [`Self::tokens`] in the number format of the weights.
    fn hidden(&self, pixels: &Value) -> Result<Value> {
        let (b, _, height, width) = pixels.tensor().dims4()?;
        let (c, q) = (self.class_token.dims()[1], self.detections);
        let patches = patches(pixels, self.patch_size)?;
        let count = patches.dims()[1];
        let embedded = self.patch_embedding.forward(&patches)?.reshape((b, count * c))?;
        let positions = self.positions.of(height / self.patch_size, width / self.patch_size)?;
        // an image's tokens are one row here, so that the others go beside the patches without a kernel of their own
        let constant = |x: &Tensor| Ok::<_, candle_core::Error>(Value::from(x.expand((b, x.dims()[1]))?.contiguous()?));
        let tokens =
            constant(&self.class_token)?.concat_last(&embedded)?.concat_last(&constant(&self.detection_tokens)?)?;
        let tokens = tokens.add_channels(&positions[0])?.reshape((b, 1 + count + q, c))?;
        Ok(self.norm.forward(&self.transformer.forward_to(tokens, 1 + count, q, &positions[1..])?)?)
    }

    /// Logits (B, Q, classes + 1) of detection tokens; the last one is "none".
    pub fn logits(&self, tokens: &Value) -> Result<Value> {
        mlp(&self.class_head, tokens)
    }

    /// Boxes (B, Q, 4) of detection tokens: centre x, centre y, width, height, as shares of the image.
    pub fn boxes(&self, tokens: &Value) -> Result<Value> {
        Ok(activation(&mlp(&self.box_head, tokens)?, Activation::Sigmoid)?)
    }
}

#[derive(Deserialize)]
struct ModelType {
    model_type: Option<String>,
}

fn mlp(layers: &[Linear], x: &Value) -> Result<Value> {
    let Some((last, layers)) = layers.split_last() else { return Ok(x.clone()) };
    let hidden = layers.iter().try_fold(x.clone(), |x, layer| activation(&layer.forward(&x)?, Activation::Relu))?;
    Ok(last.forward(&hidden)?)
}

/// Position embeddings: those in front of the first layer, and those behind each layer but the last where a model has them.
/// The patches' are resized to the image.
struct Positions {
    /// In f32 on the CPU, (1 + rows · columns + Q, C) each.
    tables: Vec<Tensor>,
    /// Of the patches that the tables are for.
    rows: usize,
    columns: usize,
    compute: Compute,
    /// By rows and columns; a run's images have one size.
    resized: Mutex<HashMap<(usize, usize), Vec<Tensor>>>,
}

impl Positions {
    fn load(weights: &Weights, config: &Config, mid: usize) -> Result<Self> {
        let (c, q, patch) = (config.hidden_size, config.num_detection_tokens, config.patch_size);
        let [height, width] = match config.image_size {
            Sides::Both(sides) => sides,
            Sides::Square(side) => [side; 2],
        };
        ensure!(
            [height, width].iter().all(|side| (patch..=MOST).contains(side)),
            "config.json: an image of {height}x{width} in patches of {patch}: its sides are from one patch to {MOST} pixels"
        );
        let (rows, columns) = (height / patch, width / patch);
        let tokens = 1 + rows * columns + q;
        let w = weights.on(&Compute::cpu());
        let mut tables = vec![w.get("vit.embeddings.position_embeddings", &[1, tokens, c])?.squeeze(0)?];
        if mid > 0 {
            let all = w.get("vit.encoder.mid_position_embeddings", &[mid, 1, tokens, c])?;
            tables.extend((0..mid).map(|i| all.get(i)?.squeeze(0)).collect::<candle_core::Result<Vec<_>>>()?);
        }
        Ok(Self { tables, rows, columns, compute: weights.compute().clone(), resized: Mutex::default() })
    }

    /// The tables for an image of so many patches, each flattened, in the network's number format.
    fn of(&self, rows: usize, columns: usize) -> Result<Vec<Tensor>> {
        let mut resized = self.resized.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = resized.get(&(rows, columns)) {
            return Ok(known.clone());
        }
        let made = self.tables.iter().map(|table| self.resize(table, rows, columns)).collect::<Result<Vec<_>>>()?;
        resized.insert((rows, columns), made.clone());
        Ok(made)
    }

    fn resize(&self, table: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
        let (tokens, c) = table.dims2()?;
        let count = self.rows * self.columns;
        let patches = table.narrow(0, 1, count)?.to_dtype(DType::F64)?;
        let vertical = bicubic(self.rows, rows)?.matmul(&patches.reshape((self.rows, self.columns * c))?)?;
        let horizontal =
            bicubic(self.columns, columns)?.broadcast_matmul(&vertical.reshape((rows, self.columns, c))?)?;
        let patches = horizontal.reshape((rows * columns, c))?.to_dtype(DType::F32)?;
        let (first, last) = (table.narrow(0, 0, 1)?, table.narrow(0, 1 + count, tokens - 1 - count)?);
        let whole = Tensor::cat(&[&first, &patches, &last], 0)?.flatten_all()?;
        Ok(self.compute.put(&whole)?)
    }
}

/// PyTorch's bicubic interpolation of one axis without antialiasing (`align_corners = false`) as a matrix (outputs, inputs) in
/// f64: Keys' cubic with a = -3/4, the border repeated.
fn bicubic(inputs: usize, outputs: usize) -> candle_core::Result<Tensor> {
    const A: f64 = -0.75;
    let weight = |x: f64| match x.abs() {
        x if x <= 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        x if x < 2.0 => ((x - 5.0) * x + 8.0) * x * A - 4.0 * A,
        _ => 0.0,
    };
    let mut matrix = vec![0.0; outputs * inputs];
    for (i, row) in matrix.chunks_mut(inputs).enumerate() {
        let place = (i as f64 + 0.5) * inputs as f64 / outputs as f64 - 0.5;
        for tap in -1..=2 {
            let at = place.floor() + f64::from(tap);
            row[at.clamp(0.0, (inputs - 1) as f64) as usize] += weight(place - at);
        }
    }
    Tensor::from_vec(matrix, (outputs, inputs), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_number_of_patches_changes_nothing_and_weights_add_up() {
        let identity = bicubic(5, 5).unwrap().to_vec2::<f64>().unwrap();
        for (i, row) in identity.iter().enumerate() {
            assert!(row.iter().enumerate().all(|(j, x)| *x == f64::from(u8::from(i == j))), "{row:?}");
        }
        for (inputs, outputs) in [(5, 3), (3, 8), (1, 4), (7, 6)] {
            let sums = bicubic(inputs, outputs).unwrap().sum(1).unwrap().to_vec1::<f64>().unwrap();
            assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-12), "{inputs} -> {outputs}: {sums:?}");
        }
        // torch.nn.functional.interpolate([0, 1, 4], size = 4, mode = "bicubic") of one axis
        let x = Tensor::new(&[[0f64], [1.0], [4.0]], &Device::Cpu).unwrap();
        let y = bicubic(3, 4).unwrap().matmul(&x).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let expected = [-0.071_777_343_75, 0.310_058_593_75, 2.190_917_968_75, 4.215_332_031_25];
        assert!(y.iter().zip(expected).all(|(y, expected)| (y - expected).abs() < 1e-12), "{y:?}");
    }
}
