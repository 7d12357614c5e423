//! What each of CLIP's towers puts around its transformer.

use anyhow::{Result, bail};
use candle_core::Tensor;

use crate::models::Weights;
use crate::models::parameters::{layer_norm, linear};
use crate::models::transformer::{CLIP, TowerConfig, Transformer, patches, thirds};
use crate::nn::layers::{activation, dot_product_attention};
use crate::nn::{LayerNorm, Linear, Value, computed_in};
use crate::ops::activation::Activation;
use crate::ops::attention::Heads;

/// The weights at `prefix`, which transformers 5 leaves out where a tower is saved by itself.
fn within(w: &Weights, prefix: &str, key: &str) -> Weights {
    let inner = w.pp(prefix);
    if inner.contains(key) { inner } else { w.clone() }
}

/// How many patches a square image has.
fn patches_of(image_size: usize, patch_size: usize) -> Result<usize> {
    // beyond any tower's
    const MOST: usize = 1 << 14;
    if patch_size == 0 || image_size > MOST || !image_size.is_multiple_of(patch_size) {
        bail!("an image of {image_size} pixels does not divide into patches of {patch_size}, or has more than {MOST}");
    }
    Ok((image_size / patch_size).pow(2))
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
    pooled: Pooled,
}

/// The place that stands for a text.
enum Pooled {
    /// The first one of this id.
    First(u32),
    /// The first one of the largest id.
    Largest,
    Last,
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
            transformer: Transformer::load(&m.pp("encoder.layers"), config, &CLIP, true)?,
            final_norm: layer_norm(&m.pp("final_layer_norm"), c, config.eps)?,
            projection: projection_dim.map(|dim| projection(w, "text_projection", c, dim)).transpose()?,
            pooled: eos.map_or(Pooled::Largest, Pooled::First),
        })
    }

    /// SigLIP's: every position sees all, and `text_model.head` projects the last one.
    pub(super) fn load_siglip(
        w: &Weights,
        config: &TowerConfig,
        vocabulary: usize,
        length: usize,
        dim: usize,
    ) -> Result<Self> {
        let (c, m) = (config.width, within(w, "text_model", "embeddings.token_embedding.weight"));
        Ok(Self {
            tokens: m.get("embeddings.token_embedding.weight", &[vocabulary, c])?,
            positions: m.get("embeddings.position_embedding.weight", &[length, c])?,
            transformer: Transformer::load(&m.pp("encoder.layers"), config, &CLIP, false)?,
            final_norm: layer_norm(&m.pp("final_layer_norm"), c, config.eps)?,
            projection: Some(linear(&m.pp("head"), c, dim, true)?),
            pooled: Pooled::Last,
        })
    }

    pub(super) fn is_siglip(&self) -> bool {
        matches!(self.pooled, Pooled::Last)
    }

    /// How many ids a text may have.
    pub fn length(&self) -> usize {
        self.positions.dims()[0]
    }

    pub fn vocab_size(&self) -> usize {
        self.tokens.dims()[0]
    }

    /// Normalised hidden states (B, N, C) of token ids, B lists of N.
    ///
    /// # Errors
    /// An id outside the vocabulary, more ids than positions, lists of different length.
    pub fn hidden(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
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
        let hidden = tokens.broadcast_add(&self.positions.narrow(0, 0, length)?)?;
        Ok(self.final_norm.forward(&self.transformer.forward(hidden.into())?)?.into_tensor())
    }

    /// The (projected) embedding of each text, (B, D).
    pub fn pooled(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let hidden = self.hidden(ids)?;
        let rows = ids
            .iter()
            .enumerate()
            .map(|(row, list)| {
                let place = match self.pooled {
                    Pooled::First(eos) => list.iter().position(|id| *id == eos).unwrap_or(0),
                    // as argmax has it
                    Pooled::Largest => (0..list.len()).rev().max_by_key(|i| list[*i]).unwrap_or(0),
                    Pooled::Last => list.len() - 1,
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
    /// One row for the class token, if there is one, and one for each patch, (tokens · C)
    positions: Tensor,
    transformer: Transformer,
    post_norm: LayerNorm,
    pooling: Pooling,
    embed_dim: usize,
}

/// How tokens become one embedding.
enum Pooling {
    /// A token in front of the patches, which a projection reads.
    ClassToken {
        /// (1, C)
        class_embedding: Tensor,
        pre_norm: LayerNorm,
        projection: Linear,
    },
    Probe(Box<Probe>),
}

/// A learned query's attention to all tokens, and a network on what it finds.
struct Probe {
    /// (1, 1, C)
    query: Tensor,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    out: Linear,
    heads: Heads,
    norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    act: Activation,
}

impl Probe {
    fn load(w: &Weights, config: &TowerConfig) -> Result<Self> {
        let (c, attention) = (config.width, w.pp("attention"));
        let [to_q, to_k, to_v] = thirds(&attention, "in_proj_weight", "in_proj_bias", c)?;
        Ok(Self {
            query: w.get("probe", &[1, 1, c])?,
            to_q,
            to_k,
            to_v,
            out: linear(&attention.pp("out_proj"), c, c, true)?,
            heads: Heads { count: config.heads, causal: false },
            norm: layer_norm(&w.pp("layernorm"), c, config.eps)?,
            fc1: linear(&w.pp("mlp.fc1"), c, config.mlp, true)?,
            fc2: linear(&w.pp("mlp.fc2"), config.mlp, c, true)?,
            act: config.act,
        })
    }

    /// (B, N, C) -> (B, C).
    fn forward(&self, x: &Value) -> Result<Value> {
        let (b, _, c) = x.tensor().dims3()?;
        let query = Value::from(self.query.expand((b, 1, c))?.contiguous()?);
        let (q, k, v) = (self.to_q.forward(&query)?, self.to_k.forward(x)?, self.to_v.forward(x)?);
        let found = self.out.forward(&dot_product_attention(&q, &k, &v, self.heads)?)?;
        let inner = activation(&self.fc1.forward(&self.norm.forward(&found)?)?, self.act)?;
        Ok(self.fc2.forward_onto(&inner, &found)?.reshape((b, c))?)
    }
}

impl VisionTower {
    pub(in crate::models) fn load(
        w: &Weights,
        config: &TowerConfig,
        image_size: usize,
        patch_size: usize,
        dim: usize,
    ) -> Result<Self> {
        let (c, patches) = (config.width, patches_of(image_size, patch_size)?);
        let kernel = [c, 3, patch_size, patch_size];
        let flat = (c, 3 * patch_size * patch_size);
        let m = within(w, "vision_model", "embeddings.class_embedding");
        Ok(Self {
            image_size,
            patch_size,
            patch_embedding: Linear::new(&m.get("embeddings.patch_embedding.weight", &kernel)?.reshape(flat)?, None)?,
            positions: m.get("embeddings.position_embedding.weight", &[patches + 1, c])?.flatten_all()?,
            transformer: Transformer::load(&m.pp("encoder.layers"), config, &CLIP, false)?,
            post_norm: layer_norm(&m.pp("post_layernorm"), c, config.eps)?,
            pooling: Pooling::ClassToken {
                class_embedding: m.get("embeddings.class_embedding", &[c])?.reshape((1, c))?,
                pre_norm: layer_norm(&m.pp("pre_layrnorm"), c, config.eps)?, // sic
                projection: projection(w, "visual_projection", c, dim)?,
            },
            embed_dim: dim,
        })
    }

    /// SigLIP's: no class token, and a learned query reads the patches.
    pub(super) fn load_siglip(w: &Weights, config: &TowerConfig, image_size: usize, patch_size: usize) -> Result<Self> {
        let (c, patches) = (config.width, patches_of(image_size, patch_size)?);
        let m = within(w, "vision_model", "embeddings.patch_embedding.weight");
        let embedding = m.pp("embeddings.patch_embedding");
        let kernel = embedding.get("weight", &[c, 3, patch_size, patch_size])?;
        let kernel = kernel.reshape((c, 3 * patch_size * patch_size))?;
        Ok(Self {
            image_size,
            patch_size,
            patch_embedding: Linear::new(&kernel, Some(embedding.get("bias", &[c])?))?,
            positions: m.get("embeddings.position_embedding.weight", &[patches, c])?.flatten_all()?,
            transformer: Transformer::load(&m.pp("encoder.layers"), config, &CLIP, false)?,
            post_norm: layer_norm(&m.pp("post_layernorm"), c, config.eps)?,
            pooling: Pooling::Probe(Box::new(Probe::load(&m.pp("head"), config)?)),
            embed_dim: c,
        })
    }

    /// The side of the square image that the tower takes.
    pub fn image_size(&self) -> usize {
        self.image_size
    }
    /// Features of the embedding.
    pub fn embed_dim(&self) -> usize {
        self.embed_dim
    }

    /// Projected image features (B, D), not normalised, of pixels (B, 3, S, S); both in f32.
    pub fn forward(&self, pixels: &Value) -> Result<Value> {
        let (_, channels, h, w) = pixels.tensor().dims4()?;
        let s = self.image_size;
        if channels != 3 || h != s || w != s {
            bail!("the vision tower takes 3x{s}x{s} pixels, got {channels}x{h}x{w}");
        }
        computed_in(self.positions.dtype(), pixels, |pixels| self.features(pixels))
    }

    /// [`Self::forward`] in the number format of the weights.
    fn features(&self, pixels: &Value) -> Result<Value> {
        let (b, _, s, _) = pixels.tensor().dims4()?;
        let (patch, count) = (self.patch_size, (s / self.patch_size).pow(2));
        let embedded = self.patch_embedding.forward(&patches(pixels, patch)?)?;
        let c = embedded.dims()[2];
        // an image's tokens are one row here, so that the class token goes in front without a kernel of its own
        let embedded = embedded.reshape((b, count * c))?;
        match &self.pooling {
            Pooling::ClassToken { class_embedding, pre_norm, projection } => {
                let class = Value::from(class_embedding.expand((b, c))?.contiguous()?);
                let tokens = class.concat_last(&embedded)?.add_channels(&self.positions)?.reshape((b, 1 + count, c))?;
                let pooled = self.transformer.forward_to(pre_norm.forward(&tokens)?, 0, 1, &[])?.reshape((b, c))?;
                Ok(projection.forward(&self.post_norm.forward(&pooled)?)?)
            }
            Pooling::Probe(probe) => {
                let tokens = embedded.add_channels(&self.positions)?.reshape((b, count, c))?;
                probe.forward(&self.post_norm.forward(&self.transformer.forward(tokens)?)?)
            }
        }
    }
}
