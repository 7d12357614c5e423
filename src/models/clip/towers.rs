//! The transformer that all of CLIP's towers are, and what each puts around it.

use anyhow::{Result, bail};
use candle_core::Tensor;

use crate::models::Weights;
use crate::models::parameters::{layer_norm, linear};
use crate::nn::layers::{activation, dot_product_attention};
use crate::nn::{LayerNorm, Linear, Value, computed_in};
use crate::ops::activation::Activation;
use crate::ops::attention::Heads;

/// Whose key names the weights have.
#[derive(Clone, Copy, PartialEq)]
pub(in crate::models) enum Layout {
    Transformers,
    OpenClip,
}

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
    /// `w` is at `encoder` (transformers) or `transformer` (open_clip).
    fn load(w: &Weights, config: &TowerConfig, layout: Layout, causal: bool) -> Result<Self> {
        let layers = (0..config.layers).map(|i| Layer::load(w, i, config, layout)).collect::<Result<_>>()?;
        Ok(Self { layers, heads: Heads { count: config.heads, causal }, act: config.act })
    }

    /// (B, N, C) -> (B, N, C).
    fn forward(&self, x: Value) -> Result<Value> {
        self.through(&self.layers, x)
    }

    fn through(&self, layers: &[Layer], x: Value) -> Result<Value> {
        layers.iter().try_fold(x, |hidden, layer| {
            let normed = layer.norm1.forward(&hidden)?;
            self.rest(layer, &hidden, &normed, &normed)
        })
    }

    /// The first row alone of what [`Self::forward`] gives, (B, N, C) -> (B, 1, C): in the last layer the other rows are
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
    fn load(w: &Weights, index: usize, config: &TowerConfig, layout: Layout) -> Result<Self> {
        let (c, mlp, eps) = (config.width, config.mlp, config.eps);
        match layout {
            Layout::Transformers => {
                let w = w.pp(format!("layers.{index}"));
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
            Layout::OpenClip => {
                let w = w.pp(format!("resblocks.{index}"));
                let attention = w.pp("attn");
                // q, k and v in one matrix
                let (weight, bias) =
                    (attention.get("in_proj_weight", &[3 * c, c])?, attention.get("in_proj_bias", &[3 * c])?);
                let part = |i: usize| -> Result<Linear> {
                    Ok(Linear::new(&weight.narrow(0, i * c, c)?, Some(bias.narrow(0, i * c, c)?.contiguous()?))?)
                };
                Ok(Self {
                    norm1: layer_norm(&w.pp("ln_1"), c, eps)?,
                    q: part(0)?,
                    k: part(1)?,
                    v: part(2)?,
                    out: linear(&attention.pp("out_proj"), c, c, true)?,
                    norm2: layer_norm(&w.pp("ln_2"), c, eps)?,
                    fc1: linear(&w.pp("mlp.c_fc"), c, mlp, true)?,
                    fc2: linear(&w.pp("mlp.c_proj"), mlp, c, true)?,
                })
            }
        }
    }
}

/// A projection stored as a linear layer `<name>.weight` (D, C) by transformers, as a matrix `<name>` (C, D) by open_clip.
fn projection(
    w: &Weights,
    transformers_name: &str,
    open_clip_name: &str,
    layout: Layout,
    width: usize,
    dim: usize,
) -> Result<Linear> {
    let weight = match layout {
        Layout::Transformers => w.get(&format!("{transformers_name}.weight"), &[dim, width])?,
        Layout::OpenClip => w.get(open_clip_name, &[width, dim])?.t()?.contiguous()?,
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
    #[allow(clippy::too_many_arguments)]
    pub(in crate::models) fn load(
        w: &Weights,
        config: &TowerConfig,
        layout: Layout,
        vocabulary: usize,
        length: usize,
        projection_dim: Option<usize>,
        eos: Option<u32>,
    ) -> Result<Self> {
        let c = config.width;
        let (tokens, positions, encoder, norm) = match layout {
            Layout::Transformers => {
                // transformers 5 saves a text encoder without the prefix, older versions with it
                let m = if w.contains("text_model.embeddings.token_embedding.weight") {
                    w.pp("text_model")
                } else {
                    w.clone()
                };
                (
                    m.get("embeddings.token_embedding.weight", &[vocabulary, c])?,
                    m.get("embeddings.position_embedding.weight", &[length, c])?,
                    m.pp("encoder"),
                    m.pp("final_layer_norm"),
                )
            }
            Layout::OpenClip => (
                w.get("token_embedding.weight", &[vocabulary, c])?,
                w.get("positional_embedding", &[length, c])?,
                w.pp("transformer"),
                w.pp("ln_final"),
            ),
        };
        Ok(Self {
            tokens,
            positions,
            transformer: Transformer::load(&encoder, config, layout, true)?,
            final_norm: layer_norm(&norm, c, config.eps)?,
            projection: projection_dim
                .map(|dim| projection(w, "text_projection", "text_projection", layout, c, dim))
                .transpose()?,
            eos,
        })
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
        layout: Layout,
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
        match layout {
            Layout::Transformers => {
                let prefixed = w.contains("vision_model.embeddings.class_embedding");
                let m = if prefixed { w.pp("vision_model") } else { w.clone() };
                Ok(Self {
                    image_size,
                    patch_size,
                    patch_embedding: Linear::new(
                        &m.get("embeddings.patch_embedding.weight", &kernel)?.reshape(flat)?,
                        None,
                    )?,
                    class_embedding: m.get("embeddings.class_embedding", &[c])?.reshape((1, c))?,
                    positions: m.get("embeddings.position_embedding.weight", &[patches + 1, c])?.flatten_all()?,
                    pre_norm: layer_norm(&m.pp("pre_layrnorm"), c, config.eps)?, // sic
                    transformer: Transformer::load(&m.pp("encoder"), config, layout, false)?,
                    post_norm: layer_norm(&m.pp("post_layernorm"), c, config.eps)?,
                    projection: projection(w, "visual_projection", "", layout, c, dim)?,
                })
            }
            Layout::OpenClip => {
                let m = w.pp("visual");
                Ok(Self {
                    image_size,
                    patch_size,
                    patch_embedding: Linear::new(&m.get("conv1.weight", &kernel)?.reshape(flat)?, None)?,
                    class_embedding: m.get("class_embedding", &[c])?.reshape((1, c))?,
                    positions: m.get("positional_embedding", &[patches + 1, c])?.flatten_all()?,
                    pre_norm: layer_norm(&m.pp("ln_pre"), c, config.eps)?,
                    transformer: Transformer::load(&m.pp("transformer"), config, layout, false)?,
                    post_norm: layer_norm(&m.pp("ln_post"), c, config.eps)?,
                    projection: projection(&m, "", "proj", layout, c, dim)?,
                })
            }
        }
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
