//! The transformer that all of CLIP's towers are, and what each puts around it.

use anyhow::{Result, bail};
use candle_core::Tensor;

use crate::models::Weights;
use crate::models::parameters::{layer_norm, linear};
use crate::nn::layers::{activation, dot_product_attention};
use crate::nn::{LayerNorm, Linear, Value, computed_in};
use crate::ops::activation::Activation;
use crate::ops::attention::Heads;

pub(in crate::models) struct TowerConfig {
    pub width: usize,
    pub mlp: usize,
    pub layers: usize,
    pub heads: usize,
    pub act: Activation,
    pub eps: f64,
}

/// Pre-norm transformer layers.
struct Transformer {
    layers: Vec<Layer>,
    heads: Heads,
    act: Activation,
}

struct Layer {
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl Transformer {
    /// `w` is at `encoder`.
    fn load(w: &Weights, config: &TowerConfig, causal: bool) -> Result<Self> {
        let layers =
            (0..config.layers).map(|i| Layer::load(&w.pp(format!("layers.{i}")), config)).collect::<Result<_>>()?;
        Ok(Self { layers, heads: Heads { count: config.heads, causal }, act: config.act })
    }

    /// (B, N, C) -> (B, N, C).
    fn through(&self, layers: &[Layer], x: Value) -> Result<Value> {
        layers.iter().try_fold(x, |hidden, layer| {
            let normed = layer.norm1.forward(&hidden)?;
            self.rest(layer, &hidden, &normed, &normed)
        })
    }

    /// The first row alone of what all layers give, (B, N, C) -> (B, 1, C): in the last layer the other rows are
    /// keys and values and nothing else.
    fn forward_to_first(&self, x: Value) -> Result<Value> {
        let Some((last, layers)) = self.layers.split_last() else { return Ok(x.narrow(1, 0, 1)?) };
        let hidden = self.through(layers, x)?;
        let normed = last.norm1.forward(&hidden)?;
        self.rest(last, &hidden.narrow(1, 0, 1)?, &normed.narrow(1, 0, 1)?, &normed)
    }

    /// A layer behind its first norm, for the rows of `hidden`: `queries` are those rows normed, `keys` all rows normed.
    fn rest(&self, layer: &Layer, hidden: &Value, queries: &Value, keys: &Value) -> Result<Value> {
        let (q, k, v) = (layer.q.forward(queries)?, layer.k.forward(keys)?, layer.v.forward(keys)?);
        let hidden = layer.out.forward_onto(&dot_product_attention(&q, &k, &v, self.heads)?, hidden)?;
        let normed = layer.norm2.forward(&hidden)?;
        Ok(layer.fc2.forward_onto(&activation(&layer.fc1.forward(&normed)?, self.act)?, &hidden)?)
    }
}

impl Layer {
    fn load(w: &Weights, config: &TowerConfig) -> Result<Self> {
        let (c, mlp, eps) = (config.width, config.mlp, config.eps);
        let attention = w.pp("self_attn");
        Ok(Self {
            norm1: layer_norm(&w.pp("layer_norm1"), c, eps)?,
            q: linear(&attention.pp("q_proj"), c, c, true)?,
            k: linear(&attention.pp("k_proj"), c, c, true)?,
            v: linear(&attention.pp("v_proj"), c, c, true)?,
            out: linear(&attention.pp("out_proj"), c, c, true)?,
            norm2: layer_norm(&w.pp("layer_norm2"), c, eps)?,
            fc1: linear(&w.pp("mlp.fc1"), c, mlp, true)?,
            fc2: linear(&w.pp("mlp.fc2"), mlp, c, true)?,
        })
    }
}

/// The weights at `prefix`, which transformers 5 leaves out where a tower is saved by itself.
fn within(w: &Weights, prefix: &str, key: &str) -> Weights {
    let inner = w.pp(prefix);
    if inner.contains(key) { inner } else { w.clone() }
}

/// A projection: a linear layer `<name>.weight` (D, C), or a matrix `<name>` (C, D) where the model is open_clip's.
fn projection(w: &Weights, name: &str, width: usize, dim: usize) -> Result<Linear> {
    let weight = match w.contains(name) {
        true => w.get(name, &[width, dim])?.t()?.contiguous()?,
        false => w.get(&format!("{name}.weight"), &[dim, width])?,
    };
    Ok(Linear::new(&weight, None)?)
}

/// Token ids to hidden states, and to one embedding of the whole text.
pub struct TextTower {
    tokens: Tensor,
    positions: Tensor,
    transformer: Transformer,
    final_norm: LayerNorm,
    projection: Option<Linear>,
    /// The id whose first place stands for the text; `None`: the place of the largest id.
    eos: Option<u32>,
}

impl TextTower {
    pub(in crate::models) fn load(
        w: &Weights,
        config: &TowerConfig,
        vocabulary: usize,
        length: usize,
        projection_dim: Option<usize>,
        eos: Option<u32>,
    ) -> Result<Self> {
        let c = config.width;
        let m = within(w, "text_model", "embeddings.token_embedding.weight");
        Ok(Self {
            tokens: m.get("embeddings.token_embedding.weight", &[vocabulary, c])?,
            positions: m.get("embeddings.position_embedding.weight", &[length, c])?,
            transformer: Transformer::load(&m.pp("encoder"), config, true)?,
            final_norm: layer_norm(&m.pp("final_layer_norm"), c, config.eps)?,
            projection: projection_dim.map(|dim| projection(w, "text_projection", c, dim)).transpose()?,
            eos,
        })
    }

    pub fn vocab_size(&self) -> usize {
        self.tokens.dims()[0]
    }

    /// Normalised hidden states (B, N, C) of token ids, B lists of N.
    ///
    /// # Errors
    /// As [`Self::unnormed`].
    pub fn hidden(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        self.normed(&self.unnormed(ids, 0)?)
    }

    /// Hidden states (B, N, C) behind the final norm.
    pub fn normed(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.final_norm.forward(&hidden.clone().into())?.into_tensor())
    }

    /// Hidden states (B, N, C) before the last `skipped` layers and without the final norm, of token ids, B lists of N.
    ///
    /// # Errors
    /// An id outside the vocabulary, more ids than positions, lists of different length.
    pub fn unnormed(&self, ids: &[Vec<u32>], skipped: usize) -> Result<Tensor> {
        Ok(self.transformer.through(self.split(skipped).0, self.embed(ids)?)?.into_tensor())
    }

    /// [`Self::unnormed`] and [`Self::pooled`] of the same ids.
    pub fn unnormed_and_pooled(&self, ids: &[Vec<u32>], skipped: usize) -> Result<(Tensor, Tensor)> {
        let hidden = self.unnormed(ids, skipped)?;
        let last = self.transformer.through(self.split(skipped).1, hidden.clone().into())?.into_tensor();
        Ok((hidden, self.pool(&self.normed(&last)?, ids)?))
    }

    /// The layers, and the last `skipped` of them.
    fn split(&self, skipped: usize) -> (&[Layer], &[Layer]) {
        let layers = &self.transformer.layers;
        layers.split_at(layers.len().saturating_sub(skipped))
    }

    fn embed(&self, ids: &[Vec<u32>]) -> Result<Value> {
        let length = ids.first().map_or(0, Vec::len);
        let (vocabulary, positions) = (self.tokens.dims()[0], self.positions.dims()[0]);
        if length == 0 || length > positions || ids.iter().any(|list| list.len() != length) {
            bail!("the text encoder takes lists of 1 to {positions} ids, all of one length; got {length}");
        }
        if let Some(id) = ids.iter().flatten().find(|id| **id as usize >= vocabulary) {
            bail!(
                "token id {id} is outside the text encoder's vocabulary of {vocabulary}: this tokenizer belongs to another model"
            );
        }
        let flat: Vec<u32> = ids.iter().flatten().copied().collect();
        let flat = Tensor::from_vec(flat, ids.len() * length, self.tokens.device())?;
        let tokens = self.tokens.index_select(&flat, 0)?.reshape((ids.len(), length, ()))?;
        Ok(tokens.broadcast_add(&self.positions.narrow(0, 0, length)?)?.into())
    }

    /// The (projected) embedding of each text, (B, D).
    pub fn pooled(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        self.pool(&self.hidden(ids)?, ids)
    }

    fn pool(&self, hidden: &Tensor, ids: &[Vec<u32>]) -> Result<Tensor> {
        let rows = ids
            .iter()
            .enumerate()
            .map(|(row, list)| {
                let place = match self.eos {
                    Some(eos) => list.iter().position(|id| *id == eos).unwrap_or(0),
                    // the first of the largest, as argmax has it
                    None => (0..list.len()).rev().max_by_key(|i| list[*i]).unwrap_or(0),
                };
                hidden.get(row)?.get(place)
            })
            .collect::<candle_core::Result<Vec<_>>>()?;
        let pooled = Tensor::stack(&rows, 0)?.contiguous()?;
        Ok(match &self.projection {
            Some(projection) => projection.forward(&Value::from(pooled))?.into_tensor(),
            None => pooled,
        })
    }
}

/// Pixels to one embedding.
pub struct VisionTower {
    image_size: usize,
    patch_size: usize,
    /// (C, 3 · patch · patch)
    patch_embedding: Linear,
    /// (1, C)
    class_embedding: Tensor,
    /// One row for the class token and one for each patch, ((1 + patches) · C)
    positions: Tensor,
    pre_norm: LayerNorm,
    transformer: Transformer,
    post_norm: LayerNorm,
    projection: Linear,
}

impl VisionTower {
    pub(in crate::models) fn load(
        w: &Weights,
        config: &TowerConfig,
        image_size: usize,
        patch_size: usize,
        dim: usize,
    ) -> Result<Self> {
        let c = config.width;
        if patch_size == 0 || !image_size.is_multiple_of(patch_size) {
            bail!("an image of {image_size} pixels does not divide into patches of {patch_size}");
        }
        let patches = (image_size / patch_size).pow(2);
        let kernel = [c, 3, patch_size, patch_size];
        let flat = (c, 3 * patch_size * patch_size);
        let m = within(w, "vision_model", "embeddings.class_embedding");
        Ok(Self {
            image_size,
            patch_size,
            patch_embedding: Linear::new(&m.get("embeddings.patch_embedding.weight", &kernel)?.reshape(flat)?, None)?,
            class_embedding: m.get("embeddings.class_embedding", &[c])?.reshape((1, c))?,
            positions: m.get("embeddings.position_embedding.weight", &[patches + 1, c])?.flatten_all()?,
            pre_norm: layer_norm(&m.pp("pre_layrnorm"), c, config.eps)?, // sic
            transformer: Transformer::load(&m.pp("encoder"), config, false)?,
            post_norm: layer_norm(&m.pp("post_layernorm"), c, config.eps)?,
            projection: projection(w, "visual_projection", c, dim)?,
        })
    }

    /// The side of the square image that the tower takes.
    pub fn image_size(&self) -> usize {
        self.image_size
    }
    /// Features of the embedding.
    pub fn embed_dim(&self) -> usize {
        self.projection.out_features()
    }

    /// Projected image features (B, D), not normalised, of pixels (B, 3, S, S); both in f32.
    pub fn forward(&self, pixels: &Value) -> Result<Value> {
        let (_, channels, h, w) = pixels.tensor().dims4()?;
        let s = self.image_size;
        if channels != 3 || h != s || w != s {
            bail!("the vision tower takes 3x{s}x{s} pixels, got {channels}x{h}x{w}");
        }
        computed_in(self.class_embedding.dtype(), pixels, |pixels| self.features(pixels))
    }

    /// [`Self::forward`] in the number format of the weights.
    fn features(&self, pixels: &Value) -> Result<Value> {
        let (b, _, s, _) = pixels.tensor().dims4()?;
        let (p, c) = (self.patch_size, self.class_embedding.dims()[1]);
        let side = s / p;
        let patches = pixels.reshape(vec![b, 3, side, p, side, p])?.permute(&[0, 2, 4, 1, 3, 5])?.reshape((
            b,
            side * side,
            3 * p * p,
        ))?;
        let embedded = self.patch_embedding.forward(&patches)?.reshape((b, side * side * c))?;
        // an image's tokens are one row here, so that the class token goes in front without a kernel of its own
        let class = Value::from(self.class_embedding.expand((b, c))?.contiguous()?);
        let tokens = class.concat_last(&embedded)?.add_channels(&self.positions)?.reshape((b, 1 + side * side, c))?;
        let pooled = self.transformer.forward_to_first(self.pre_norm.forward(&tokens)?)?.reshape((b, c))?;
        Ok(self.projection.forward(&self.post_norm.forward(&pooled)?)?)
    }
}
