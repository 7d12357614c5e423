//! The pre-norm transformer that CLIP's towers, ViTs and detectors are, over tokens (B, N, C).

use anyhow::{Result, bail};
use candle_core::Tensor;

use super::Weights;
use super::parameters::{layer_norm, linear};
use crate::nn::layers::{activation, dot_product_attention};
use crate::nn::{LayerNorm, Linear, Value};
use crate::ops::activation::Activation;
use crate::ops::attention::Heads;

pub(super) struct TowerConfig {
    pub width: usize,
    pub mlp: usize,
    pub layers: usize,
    pub heads: usize,
    pub act: Activation,
    pub eps: f64,
}

/// Where a layer's parameters are, under the layer's own prefix.
pub(super) struct Names {
    pub norm1: &'static str,
    pub qkv: Qkv,
    pub out: &'static str,
    pub norm2: &'static str,
    pub fc1: &'static str,
    pub fc2: &'static str,
}

/// The three projections of attention.
pub(super) enum Qkv {
    Apart([&'static str; 3]),
    /// In one matrix (3 C, C).
    Together(&'static str),
}

/// Those of transformers' CLIP and SigLIP.
pub(super) const CLIP: Names = Names {
    norm1: "layer_norm1",
    qkv: Qkv::Apart(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    out: "self_attn.out_proj",
    norm2: "layer_norm2",
    fc1: "mlp.fc1",
    fc2: "mlp.fc2",
};

/// Those of transformers' ViT and YOLOS.
pub(super) const VIT: Names = Names {
    norm1: "layernorm_before",
    qkv: Qkv::Apart(["attention.attention.query", "attention.attention.key", "attention.attention.value"]),
    out: "attention.output.dense",
    norm2: "layernorm_after",
    fc1: "intermediate.dense",
    fc2: "output.dense",
};

/// Those of timm's ViT, which BLIP has.
pub(super) const TIMM: Names = Names {
    norm1: "norm1",
    qkv: Qkv::Together("attn.qkv"),
    out: "attn.proj",
    norm2: "norm2",
    fc1: "mlp.fc1",
    fc2: "mlp.fc2",
};

pub(super) struct Transformer {
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
    /// `w` holds the layers as `0`, `1`, .. .
    ///
    /// # Errors
    /// A parameter is missing or of another shape.
    pub fn load(w: &Weights, config: &TowerConfig, names: &Names, causal: bool) -> Result<Self> {
        let layers = (0..config.layers).map(|i| Layer::load(&w.pp(i), config, names)).collect::<Result<_>>()?;
        Ok(Self { layers, heads: Heads { count: config.heads, causal }, act: config.act })
    }

    /// (B, N, C) -> (B, N, C).
    pub fn forward(&self, x: Value) -> Result<Value> {
        let tokens = x.dims()[1];
        self.forward_to(x, 0, tokens, &[])
    }

    /// Rows `first..first + rows` alone of what [`Self::forward`] gives, (B, N, C) -> (B, rows, C): in the last layer the
    /// others are keys and values and nothing else. `between[i]` (N · C), where there is one, is added behind layer i.
    pub fn forward_to(&self, x: Value, first: usize, rows: usize, between: &[Tensor]) -> Result<Value> {
        let whole = x.tensor().dims3()?;
        let all = rows == whole.1;
        let wanted = |x: &Value| if all { Ok(x.clone()) } else { x.narrow(1, first, rows) };
        let Some((last, layers)) = self.layers.split_last() else { return Ok(wanted(&x)?) };
        let mut hidden = x;
        for (i, layer) in layers.iter().enumerate() {
            let normed = layer.norm1.forward(&hidden)?;
            hidden = self.rest(layer, &hidden, &normed, &normed)?;
            if let Some(shift) = between.get(i) {
                hidden = hidden.reshape((whole.0, whole.1 * whole.2))?.add_channels(shift)?.reshape(whole)?;
            }
        }
        let normed = last.norm1.forward(&hidden)?;
        self.rest(last, &wanted(&hidden)?, &wanted(&normed)?, &normed)
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
    fn load(w: &Weights, config: &TowerConfig, names: &Names) -> Result<Self> {
        let (c, mlp, eps) = (config.width, config.mlp, config.eps);
        let [q, k, v] = match &names.qkv {
            Qkv::Apart(names) => names.map(|name| linear(&w.pp(name), c, c, true)),
            Qkv::Together(name) => thirds(&w.pp(name), "weight", "bias", c)?.map(Ok),
        };
        Ok(Self {
            norm1: layer_norm(&w.pp(names.norm1), c, eps)?,
            q: q?,
            k: k?,
            v: v?,
            out: linear(&w.pp(names.out), c, c, true)?,
            norm2: layer_norm(&w.pp(names.norm2), c, eps)?,
            fc1: linear(&w.pp(names.fc1), c, mlp, true)?,
            fc2: linear(&w.pp(names.fc2), mlp, c, true)?,
        })
    }
}

/// The projections to queries, keys and values that one matrix (3 C, C) with its bias holds.
pub(super) fn thirds(w: &Weights, weight: &str, bias: &str, c: usize) -> Result<[Linear; 3]> {
    let (weight, bias) = (w.get(weight, &[3 * c, c])?, w.get(bias, &[3 * c])?);
    let part =
        |i| Linear::new(&weight.narrow(0, i * c, c)?.contiguous()?, Some(bias.narrow(0, i * c, c)?.contiguous()?));
    Ok([part(0)?, part(1)?, part(2)?])
}

/// The squares of `side` pixels of images (B, 3, H, W), row by row: (B, H/side · W/side, 3 · side · side), as the flattened
/// kernel of a patch embedding has them.
///
/// # Errors
/// The image does not divide into such squares.
pub(super) fn patches(pixels: &Value, side: usize) -> Result<Value> {
    let (b, channels, h, w) = pixels.tensor().dims4()?;
    if channels != 3 || side == 0 || !h.is_multiple_of(side) || !w.is_multiple_of(side) {
        bail!("an image of {channels}x{h}x{w} does not divide into patches of 3x{side}x{side}");
    }
    let (rows, columns) = (h / side, w / side);
    let patches = pixels.reshape(vec![b, 3, rows, side, columns, side])?.permute(&[0, 2, 4, 1, 3, 5])?;
    Ok(patches.reshape((b, rows * columns, 3 * side * side))?)
}
