//! What each of CLIP's towers puts around its transformer.

use anyhow::{Result, bail};
use candle_core::Tensor;

use crate::models::Weights;
use crate::models::parameters::layer_norm;
use crate::models::transformer::{CLIP, TowerConfig, Transformer, patches};
use crate::nn::{LayerNorm, Linear, Value, computed_in};

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
            transformer: Transformer::load(&m.pp("encoder.layers"), config, &CLIP, true)?,
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
            transformer: Transformer::load(&m.pp("encoder.layers"), config, &CLIP, false)?,
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
        let (patch, c) = (self.patch_size, self.class_embedding.dims()[1]);
        let count = (s / patch).pow(2);
        let embedded = self.patch_embedding.forward(&patches(pixels, patch)?)?.reshape((b, count * c))?;
        // an image's tokens are one row here, so that the class token goes in front without a kernel of its own
        let class = Value::from(self.class_embedding.expand((b, c))?.contiguous()?);
        let tokens = class.concat_last(&embedded)?.add_channels(&self.positions)?.reshape((b, 1 + count, c))?;
        let pooled = self.transformer.forward_to(self.pre_norm.forward(&tokens)?, 0, 1, &[])?.reshape((b, c))?;
        Ok(self.projection.forward(&self.post_norm.forward(&pooled)?)?)
    }
}
