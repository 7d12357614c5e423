//! ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP's ViT and its text encoder, which attends to the image, with a head on the
//! first token; from the published `ImageReward.pt` or the same tensors as safetensors. Frozen; images are differentiable.

use anyhow::{Context, Result, bail, ensure};
use candle_core::Tensor;
use serde::Deserialize;

use super::parameters::{layer_norm, linear};
use super::transformer::{TIMM, TowerConfig, Transformer, patches};
use super::{Source, Weights};
use crate::nn::layers::{activation, dot_product_attention};
use crate::nn::{LayerNorm, Linear, Value, computed_in};
use crate::ops::activation::Activation;
use crate::ops::attention::Heads;

/// Mean and standard deviation of the head's output over the data that the model was trained on.
const MEAN: f64 = 0.167_173_628_300_524_26;
const STD: f64 = 1.033_339_496_605_407_2;

/// Channels of an attention head of the ViT.
const HEAD_WIDTH: usize = 64;

/// The head's layers; between them are dropouts, which are off, and no activations.
const HEAD: [usize; 5] = [0, 2, 4, 6, 7];

/// `med_config.json`, with BERT-base's numbers. (Its `encoder_width` is not the ViT's: shapes say that.)
#[derive(Debug, Deserialize)]
#[serde(default)]
struct Config {
    num_attention_heads: usize,
    hidden_act: String,
    layer_norm_eps: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { num_attention_heads: 12, hidden_act: "gelu".into(), layer_norm_eps: 1e-12 }
    }
}

/// What people would think of an image for a text.
pub struct ImageReward {
    image_size: usize,
    patch_size: usize,
    /// (C, 3 · patch · patch), with a bias
    patch_embedding: Linear,
    /// (1, C)
    class_token: Tensor,
    /// ((1 + patches) · C)
    positions: Tensor,
    vit: Transformer,
    vit_norm: LayerNorm,
    /// (vocabulary, H) and (positions, H)
    word_embeddings: Tensor,
    text_positions: Tensor,
    text_norm: LayerNorm,
    layers: Vec<TextLayer>,
    /// In f32.
    head: Vec<Linear>,
}

/// A post-norm layer: attention to the text, attention to the image, a network.
struct TextLayer {
    attention: Attention,
    crossattention: Attention,
    inner: Linear,
    outer: Linear,
    norm: LayerNorm,
    act: Activation,
}

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    norm: LayerNorm,
    heads: Heads,
}

impl ImageReward {
    /// `weights` are those of the published file; `beside` may have a `med_config.json`.
    ///
    /// # Errors
    /// The file is of another model.
    pub fn load(weights: &Weights, beside: &Source) -> Result<Self> {
        const FIRST: &str = "blip.visual_encoder.cls_token";
        let names = weights.names();
        // copies of it have another model's name in front
        let prefix = names.iter().find_map(|name| name.strip_suffix(FIRST));
        let prefix = prefix.with_context(|| format!("{} is no ImageReward: it has no `{FIRST}`", weights.file()))?;
        let config = match beside.find("med_config.json")? {
            Some(_) => beside.read_json("med_config.json")?,
            None => Config::default(),
        };
        Self::new(&weights.pp(prefix.trim_end_matches('.')), &config)
    }

    fn new(w: &Weights, config: &Config) -> Result<Self> {
        let visual = w.pp("blip.visual_encoder");
        let shape = |w: &Weights, name: &str| {
            w.shape(name).with_context(|| format!("{}: there is no `{}.{name}`", w.file(), w.prefix()))
        };
        let [c, 3, patch, _] = shape(&visual, "patch_embed.proj.weight")?[..] else {
            bail!("{}: `patch_embed.proj.weight` is no kernel of RGB patches", w.file())
        };
        let tokens = shape(&visual, "pos_embed")?.get(1).copied().unwrap_or(0);
        let side = tokens.saturating_sub(1).isqrt();
        ensure!(
            side > 0 && side * side + 1 == tokens && c > 0 && c.is_multiple_of(HEAD_WIDTH),
            "{}: {tokens} positions are no square of patches, or a width of {c} is no multiple of {HEAD_WIDTH}",
            w.file()
        );
        let blocks = visual.pp("blocks");
        let tower = TowerConfig {
            width: c,
            mlp: shape(&blocks, "0.mlp.fc1.weight")?[0],
            layers: count(&blocks),
            heads: c / HEAD_WIDTH,
            act: Activation::Gelu,
            eps: 1e-6,
        };
        let projection = visual.pp("patch_embed.proj");
        let kernel = projection.get("weight", &[c, 3, patch, patch])?.reshape((c, 3 * patch * patch))?;

        let text = w.pp("blip.text_encoder");
        let (embeddings, layers) = (text.pp("embeddings"), text.pp("encoder.layer"));
        let [vocabulary, h] = shape(&embeddings, "word_embeddings.weight")?[..] else {
            bail!("{}: the word embeddings are no matrix", w.file())
        };
        let positions = shape(&embeddings, "position_embeddings.weight")?[0];
        let layer = |i| TextLayer::load(&layers.pp(i), config, h, c);
        let in_f32 = w.on(&w.compute().in_f32()).pp("mlp.layers");
        let mut features = h;
        let mut head = Vec::with_capacity(HEAD.len());
        for place in HEAD {
            let w = in_f32.pp(place);
            let outputs = shape(&w, "weight")?[0];
            head.push(linear(&w, features, outputs, true)?);
            features = outputs;
        }
        ensure!(features == 1, "{}: the head ends in {features} numbers, not in one score", w.file());
        Ok(Self {
            image_size: side * patch,
            patch_size: patch,
            patch_embedding: Linear::new(&kernel, Some(projection.get("bias", &[c])?))?,
            class_token: visual.get("cls_token", &[1, 1, c])?.reshape((1, c))?,
            positions: visual.get("pos_embed", &[1, tokens, c])?.flatten_all()?,
            vit: Transformer::load(&blocks, &tower, &TIMM, false)?,
            vit_norm: layer_norm(&visual.pp("norm"), c, 1e-6)?,
            word_embeddings: embeddings.get("word_embeddings.weight", &[vocabulary, h])?,
            text_positions: embeddings.get("position_embeddings.weight", &[positions, h])?,
            text_norm: layer_norm(&embeddings.pp("LayerNorm"), h, config.layer_norm_eps)?,
            layers: (0..count(&layers)).map(layer).collect::<Result<_>>()?,
            head,
        })
    }

    /// The side of the square image that the model takes.
    pub fn image_size(&self) -> usize {
        self.image_size
    }
    /// How many ids the tokenizer may give.
    pub fn vocab_size(&self) -> usize {
        self.word_embeddings.dims()[0]
    }

    /// Scores (B) of pixels (B, 3, S, S) for one text's ids an image; both in f32.
    ///
    /// # Errors
    /// Pixels of another size, an id outside the vocabulary, more ids than positions.
    pub fn scores(&self, pixels: &Value, ids: &[Vec<u32>]) -> Result<Value> {
        let first = computed_in(self.class_token.dtype(), pixels, |pixels| {
            let image = self.image(pixels)?;
            let (mut rows, h) = (Vec::with_capacity(ids.len()), self.word_embeddings.dims()[1]);
            for (row, ids) in ids.iter().enumerate() {
                rows.push(self.text(&image.narrow(0, row, 1)?, ids)?.narrow(1, 0, 1)?.reshape((1, h))?);
            }
            let first = rows.into_iter().map(Ok).reduce(|all: Result<Value>, row| Ok(all?.concat_last(&row?)?));
            Ok(first.context("there are no texts to score")??.reshape((ids.len(), h))?)
        })?;
        let score = self.head.iter().try_fold(first, |x, layer| layer.forward(&x))?;
        Ok(score.reshape(ids.len())?.affine(1.0 / STD, -MEAN / STD)?)
    }

    /// The ViT's tokens (B, 1 + patches, C), in the number format of the weights, as the pixels (B, 3, S, S) are.
    pub fn image(&self, pixels: &Value) -> Result<Value> {
        let (b, _, height, width) = pixels.tensor().dims4()?;
        let (side, c) = (self.image_size, self.class_token.dims()[1]);
        ensure!(height == side && width == side, "ImageReward takes {side}x{side} pixels, got {height}x{width}");
        let patches = patches(pixels, self.patch_size)?;
        let count = patches.dims()[1];
        let embedded = self.patch_embedding.forward(&patches)?.reshape((b, count * c))?;
        let class = Value::from(self.class_token.expand((b, c))?.contiguous()?);
        let tokens = class.concat_last(&embedded)?.add_channels(&self.positions)?.reshape((b, 1 + count, c))?;
        Ok(self.vit_norm.forward(&self.vit.forward(tokens)?)?)
    }

    /// The text encoder's last hidden states (1, N, H) of N ids, without padding, for an image's tokens (1, M, C). (Padding,
    /// which the original masks by -10000, has a weight of exactly 0 in its attention.)
    pub fn text(&self, image: &Value, ids: &[u32]) -> Result<Value> {
        let (vocabulary, positions) = (self.vocab_size(), self.text_positions.dims()[0]);
        ensure!(!ids.is_empty() && ids.len() <= positions, "{} ids for {positions} positions", ids.len());
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
            bail!(
                "token id {id} is outside ImageReward's vocabulary of {vocabulary}: this vocab.txt belongs to another model"
            );
        }
        let places = Tensor::from_vec(ids.to_vec(), ids.len(), self.word_embeddings.device())?;
        let words = self.word_embeddings.index_select(&places, 0)?;
        let embedded = (words + self.text_positions.narrow(0, 0, ids.len())?)?.unsqueeze(0)?;
        let hidden = self.text_norm.forward(&embedded.into())?;
        self.layers.iter().try_fold(hidden, |hidden, layer| layer.forward(&hidden, image))
    }
}

/// How many layers `0`, `1`, .. there are.
fn count(w: &Weights) -> usize {
    let names = w.names();
    let has = |i: &usize| names.iter().any(|name| name.split('.').next() == Some(&i.to_string()));
    (0..).take_while(has).count()
}

impl TextLayer {
    /// `h` wide, for an image of width `c`.
    fn load(w: &Weights, config: &Config, h: usize, c: usize) -> Result<Self> {
        let act = Activation::from_name(&config.hidden_act)
            .with_context(|| format!("med_config.json: `hidden_act` {} is not known", config.hidden_act))?;
        let inner = w.pp("intermediate.dense");
        let width = inner.shape("bias").and_then(|shape| shape.first().copied()).unwrap_or(4 * h);
        Ok(Self {
            attention: Attention::load(&w.pp("attention"), config, h, h)?,
            crossattention: Attention::load(&w.pp("crossattention"), config, h, c)?,
            inner: linear(&inner, h, width, true)?,
            outer: linear(&w.pp("output.dense"), width, h, true)?,
            norm: layer_norm(&w.pp("output.LayerNorm"), h, config.layer_norm_eps)?,
            act,
        })
    }

    fn forward(&self, x: &Value, image: &Value) -> Result<Value> {
        let x = self.crossattention.forward(&self.attention.forward(x, x)?, image)?;
        let inner = activation(&self.inner.forward(&x)?, self.act)?;
        Ok(self.norm.forward(&self.outer.forward_onto(&inner, &x)?)?)
    }
}

impl Attention {
    /// From tokens of width `h` to those of width `source`.
    fn load(w: &Weights, config: &Config, h: usize, source: usize) -> Result<Self> {
        let count = config.num_attention_heads;
        ensure!(count > 0 && h.is_multiple_of(count), "med_config.json: {count} heads for a hidden size of {h}");
        Ok(Self {
            query: linear(&w.pp("self.query"), h, h, true)?,
            key: linear(&w.pp("self.key"), source, h, true)?,
            value: linear(&w.pp("self.value"), source, h, true)?,
            out: linear(&w.pp("output.dense"), h, h, true)?,
            norm: layer_norm(&w.pp("output.LayerNorm"), h, config.layer_norm_eps)?,
            heads: Heads { count, causal: false },
        })
    }

    /// x (1, N, H) with what it finds in `source` (1, M, ..), normed.
    fn forward(&self, x: &Value, source: &Value) -> Result<Value> {
        let (q, k, v) = (self.query.forward(x)?, self.key.forward(source)?, self.value.forward(source)?);
        let found = dot_product_attention(&q, &k, &v, self.heads)?;
        Ok(self.norm.forward(&self.out.forward_onto(&found, x)?)?)
    }
}
