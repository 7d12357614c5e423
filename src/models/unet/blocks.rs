//! The stages of the UNet and of the VAE's decoder.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Result;
use candle_core::Tensor;

use crate::models::Weights;
use crate::models::parameters::{conv2d, group_norm, layer_norm, linear};
use crate::models::staged::Stage;
use crate::nn::layers::upsample_nearest;
use crate::nn::{Attention, Conv2d, FeedForward, GroupNorm, LayerNorm, Linear, LoraValues, Value};
use crate::ops::attention::Heads;
use crate::ops::replay::Replay;

/// What one evaluation's stages share.
#[derive(Clone)]
pub(super) struct Evaluation {
    /// SiLU of the time embedding, (1, time_dim), or one for each image, (B, time_dim).
    pub time: Tensor,
    pub text: Text,
}

/// What the cross-attentions attend to.
#[derive(Clone)]
pub struct Text {
    /// Prompt embeddings, (B, tokens, D).
    pub(super) context: Tensor,
    /// What is added to the time embedding, (B, time_dim); Stable Diffusion XL's.
    pub(super) added: Option<Tensor>,
    /// The keys and values that each attention, by its module, makes of them under some adapters; empty where a gradient
    /// is to reach those adapters.
    pub(super) projected: Arc<HashMap<String, (Tensor, Tensor)>>,
    /// The evaluation with this text under those adapters as a GPU's graph, once it was recorded.
    pub(super) replay: Option<Arc<Replay>>,
}

pub(super) enum UnetStage {
    Conv(Conv2d),
    Resnet(Resnet),
    Transformer(Transformer),
    /// To the size of the next skip connection, then a convolution.
    Upsample(Conv2d),
    Out(GroupNorm, Conv2d),
}

impl Stage for UnetStage {
    type Inputs = Evaluation;

    fn forward(
        &self,
        hidden: &Value,
        skip: Option<&Value>,
        next_skip: Option<(usize, usize)>,
        inputs: &Evaluation,
        lora: &LoraValues,
    ) -> Result<Value> {
        let joined;
        let hidden = match skip {
            Some(skip) => {
                joined = hidden.concat_last(skip)?;
                &joined
            }
            None => hidden,
        };
        Ok(match self {
            Self::Conv(conv) => conv.forward(hidden)?,
            Self::Resnet(resnet) => resnet.forward(hidden, Some(&inputs.time))?,
            Self::Transformer(transformer) => transformer.forward(hidden, &inputs.text, lora)?,
            Self::Upsample(conv) => {
                let (_, h, w, _) = hidden.tensor().dims4()?;
                let (height, width) = next_skip.unwrap_or((2 * h, 2 * w));
                conv.forward(&upsample_nearest(hidden, height, width)?)?
            }
            Self::Out(norm, conv) => conv.forward(&norm.forward(hidden)?)?,
        })
    }
}

/// `ResnetBlock2D`: norm, SiLU, conv, time, norm, SiLU, conv, and the input around them.
pub(crate) struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Linear>,
}

impl Resnet {
    pub(crate) fn load(
        w: &Weights,
        inputs: usize,
        outputs: usize,
        time_dim: Option<usize>,
        groups: usize,
        eps: f64,
    ) -> Result<Self> {
        Ok(Self {
            norm1: group_norm(&w.pp("norm1"), inputs, groups, eps, true)?,
            conv1: conv2d(&w.pp("conv1"), inputs, outputs, 3, 1, 1)?,
            time_emb_proj: time_dim.map(|dim| linear(&w.pp("time_emb_proj"), dim, outputs, true)).transpose()?,
            norm2: group_norm(&w.pp("norm2"), outputs, groups, eps, true)?,
            conv2: conv2d(&w.pp("conv2"), outputs, outputs, 3, 1, 1)?,
            conv_shortcut: (inputs != outputs)
                .then(|| linear(&w.pp("conv_shortcut"), inputs, outputs, true))
                .transpose()?,
        })
    }

    /// x (B, H, W, C); `time` is SiLU of the time embedding, (1, time_dim) or (B, time_dim).
    pub(crate) fn forward(&self, x: &Value, time: Option<&Tensor>) -> Result<Value> {
        let mut hidden = self.conv1.forward(&self.norm1.forward(x)?)?;
        if let (Some(proj), Some(time)) = (&self.time_emb_proj, time) {
            let shift = proj.forward(&Value::constant(time))?.into_tensor();
            hidden = hidden.add_channels(&shift)?;
        }
        let hidden = self.norm2.forward(&hidden)?;
        Ok(match &self.conv_shortcut {
            Some(shortcut) => self.conv2.forward_onto(&hidden, &shortcut.forward(x)?)?,
            None => self.conv2.forward_onto(&hidden, x)?,
        })
    }
}

/// `Transformer2DModel`: pixels as tokens.
pub(super) struct Transformer {
    /// The name that adapters know it by: `down_blocks.0.attentions.0`.
    module: String,
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<TransformerBlock>,
    proj_out: Linear,
}

/// `BasicTransformerBlock`: attention to itself, attention to the text, feed-forward.
struct TransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff: FeedForward,
}

impl Transformer {
    pub(super) fn load(
        w: &Weights,
        module: &str,
        channels: usize,
        context: usize,
        heads: usize,
        depth: usize,
        groups: usize,
    ) -> Result<Self> {
        let inner = heads * (channels / heads);
        if inner == 0 {
            anyhow::bail!("unet/config.json: {heads} attention heads for {channels} channels in `{module}`");
        }
        let blocks = (0..depth).map(|i| {
            let name = format!("transformer_blocks.{i}");
            let (w, module) = (w.pp(&name), format!("{module}.{name}"));
            let attention = |name: &str, context: usize| -> Result<Attention> {
                let w = w.pp(name);
                Ok(Attention {
                    module: format!("{module}.{name}"),
                    to_q: linear(&w.pp("to_q"), inner, inner, false)?,
                    to_k: linear(&w.pp("to_k"), context, inner, false)?,
                    to_v: linear(&w.pp("to_v"), context, inner, false)?,
                    to_out: linear(&w.pp("to_out.0"), inner, inner, true)?,
                    heads: Heads { count: heads, causal: false },
                })
            };
            Ok(TransformerBlock {
                norm1: layer_norm(&w.pp("norm1"), inner, 1e-5)?,
                attn1: attention("attn1", inner)?,
                norm2: layer_norm(&w.pp("norm2"), inner, 1e-5)?,
                attn2: attention("attn2", context)?,
                norm3: layer_norm(&w.pp("norm3"), inner, 1e-5)?,
                ff: FeedForward {
                    module: format!("{module}.ff"),
                    proj: linear(&w.pp("ff.net.0.proj"), inner, 8 * inner, true)?,
                    out: linear(&w.pp("ff.net.2"), 4 * inner, inner, true)?,
                },
            })
        });
        Ok(Self {
            module: module.to_owned(),
            norm: group_norm(&w.pp("norm"), channels, groups, 1e-6, false)?,
            proj_in: linear(&w.pp("proj_in"), channels, inner, true)?,
            blocks: blocks.collect::<Result<_>>()?,
            proj_out: linear(&w.pp("proj_out"), inner, channels, true)?,
        })
    }

    /// The layers that adapters may change, with the names that they know them by.
    pub(super) fn adaptable(&self) -> Vec<(String, &Linear)> {
        let mut layers = vec![(format!("{}.proj_in", self.module), &self.proj_in)];
        for block in &self.blocks {
            for attention in [&block.attn1, &block.attn2] {
                let Attention { module, to_q, to_k, to_v, to_out, .. } = attention;
                let named = [("to_q", to_q), ("to_k", to_k), ("to_v", to_v), ("to_out.0", to_out)];
                layers.extend(named.map(|(name, layer)| (format!("{module}.{name}"), layer)));
            }
            let FeedForward { module, proj, out } = &block.ff;
            layers.extend([(format!("{module}.net.0.proj"), proj), (format!("{module}.net.2"), out)]);
        }
        layers.push((format!("{}.proj_out", self.module), &self.proj_out));
        layers
    }

    /// The keys and values of a context, (B, tokens, D), with the modules of the attentions that they are for.
    pub(super) fn project(
        &self,
        context: &Value,
        lora: &LoraValues,
    ) -> impl Iterator<Item = Result<(String, (Tensor, Tensor))>> {
        self.blocks.iter().map(move |block| {
            let (k, v) = block.attn2.keys_and_values(context, lora)?;
            Ok((block.attn2.module.clone(), (k.into_tensor(), v.into_tensor())))
        })
    }

    fn forward(&self, x: &Value, text: &Text, lora: &LoraValues) -> Result<Value> {
        let (b, h, w, c) = x.tensor().dims4()?;
        let tokens = self.norm.forward(x)?.reshape((b, h * w, c))?;
        let mut hidden = lora.forward(&format!("{}.proj_in", self.module), &self.proj_in, &tokens, None)?;
        for TransformerBlock { norm1, attn1, norm2, attn2, norm3, ff } in &self.blocks {
            let normed = norm1.forward(&hidden)?;
            hidden = attn1.forward_onto(&normed, &attn1.keys_and_values(&normed, lora)?, &hidden, lora)?;
            let keys_and_values = match text.projected.get(&attn2.module) {
                Some((k, v)) => (Value::constant(k), Value::constant(v)),
                None => attn2.keys_and_values(&Value::constant(&text.context), lora)?,
            };
            hidden = attn2.forward_onto(&norm2.forward(&hidden)?, &keys_and_values, &hidden, lora)?;
            hidden = ff.forward_onto(&norm3.forward(&hidden)?, &hidden, lora)?;
        }
        let residual = x.reshape((b, h * w, c))?;
        let module = format!("{}.proj_out", self.module);
        Ok(lora.forward(&module, &self.proj_out, &hidden, Some(&residual))?.reshape((b, h, w, c))?)
    }
}
