//! The decoder of `AutoencoderKL`: latents to images, and the pullback of an image's cotangent.
//!
//! Only the decoder: training by reward never encodes an image.

use std::sync::LazyLock;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor};
use serde::Deserialize;

use super::parameters::{conv2d, from_inside, group_norm, linear, to_inside};
use super::staged::{Stage, Staged, Step, Trace};
use super::unet::Resnet;
use super::{Source, Weights};
use crate::config::Checkpointing;
use crate::lora::Adapters;
use crate::nn::layers::{dot_product_attention, upsample_nearest};
use crate::nn::lora::LoraGradients;
use crate::nn::{Conv2d, GroupNorm, Linear, LoraValues, Value};
use crate::ops::attention::Heads;
use crate::ops::device::Compute;

/// `vae/config.json`, with diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    #[serde(rename = "_class_name")]
    pub class_name: Option<String>,
    pub latent_channels: usize,
    pub out_channels: usize,
    pub block_out_channels: Vec<usize>,
    pub up_block_types: Vec<String>,
    pub layers_per_block: usize,
    pub norm_num_groups: usize,
    pub scaling_factor: f64,
    pub shift_factor: Option<f64>,
    pub latents_mean: Option<Vec<f64>>,
    pub use_post_quant_conv: bool,
    pub mid_block_add_attention: bool,
    pub act_fn: String,
    /// Whether f16 overflows in it, as it does in Stable Diffusion XL's own.
    pub force_upcast: bool,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            class_name: None,
            latent_channels: 4,
            out_channels: 3,
            block_out_channels: vec![64],
            up_block_types: vec!["UpDecoderBlock2D".into()],
            layers_per_block: 1,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
            act_fn: "silu".into(),
            force_upcast: true,
        }
    }
}

/// The eps of every norm in the decoder, as diffusers has it.
const EPS: f64 = 1e-6;

/// A frozen decoder.
pub struct Vae {
    config: VaeConfig,
    compute: Compute,
    stages: Staged<DecoderStage>,
}

enum DecoderStage {
    PostQuant(Linear),
    Conv(Conv2d),
    Resnet(Resnet),
    Attention(MidAttention),
    Upsample(Conv2d),
    Out(GroupNorm, Conv2d),
}

/// The one attention of the decoder, with a single head over all channels.
struct MidAttention {
    norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Stage for DecoderStage {
    type Inputs = ();

    fn forward(
        &self,
        hidden: &Value,
        _: Option<&Value>,
        _: Option<(usize, usize)>,
        (): &(),
        _: &LoraValues,
    ) -> Result<Value> {
        Ok(match self {
            Self::PostQuant(layer) => layer.forward(hidden)?,
            Self::Conv(conv) => conv.forward(hidden)?,
            Self::Resnet(resnet) => resnet.forward(hidden, None)?,
            Self::Attention(attention) => attention.forward(hidden)?,
            Self::Upsample(conv) => {
                let (_, h, w, _) = hidden.tensor().dims4()?;
                conv.forward(&upsample_nearest(hidden, 2 * h, 2 * w)?)?
            }
            Self::Out(norm, conv) => conv.forward(&norm.forward(hidden)?)?,
        })
    }
}

impl MidAttention {
    fn load(w: &Weights, channels: usize, groups: usize) -> Result<Self> {
        // the names of diffusers before 0.17, which the published Stable Diffusion 1.x autoencoders still have
        let old = w.contains("query.weight");
        let layer =
            |name: &str, old_name: &str| linear(&w.pp(if old { old_name } else { name }), channels, channels, true);
        Ok(Self {
            norm: group_norm(&w.pp("group_norm"), channels, groups, EPS, false)?,
            to_q: layer("to_q", "query")?,
            to_k: layer("to_k", "key")?,
            to_v: layer("to_v", "value")?,
            to_out: layer("to_out.0", "proj_attn")?,
        })
    }

    fn forward(&self, x: &Value) -> Result<Value> {
        let (b, h, w, c) = x.tensor().dims4()?;
        let tokens = self.norm.forward(x)?.reshape((b, h * w, c))?;
        let (q, k, v) = (self.to_q.forward(&tokens)?, self.to_k.forward(&tokens)?, self.to_v.forward(&tokens)?);
        let attended = dot_product_attention(&q, &k, &v, Heads { count: 1, causal: false })?;
        Ok(self.to_out.forward_onto(&attended, &x.reshape((b, h * w, c))?)?.reshape((b, h, w, c))?)
    }
}

impl Vae {
    /// Loads `config.json` and the decoder's weights of a `vae` folder.
    pub fn load(source: &Source, variant: Option<&str>, compute: &Compute) -> Result<Self> {
        let config: VaeConfig = source.read_json("config.json")?;
        let weights = Weights::open(source, "diffusion_pytorch_model", variant)?.on(compute);
        Self::new(config, &weights)
    }

    /// What a VAE of Stable Diffusion XL computes in where the rest does in `compute`: not in f16, unless its config says
    /// `force_upcast = false`.
    ///
    /// # Errors
    /// There is no `config.json`, or it cannot be read.
    pub(super) fn compute_of_xl(source: &Source, compute: &Compute) -> Result<Compute> {
        let config: VaeConfig = source.read_json("config.json")?;
        Ok(if compute.dtype() == DType::F16 && config.force_upcast { compute.in_f32() } else { compute.clone() })
    }

    pub fn new(config: VaeConfig, w: &Weights) -> Result<Self> {
        if let Some(class) = config.class_name.as_deref().filter(|class| *class != "AutoencoderKL") {
            bail!("vae/config.json: a {class} is not supported; Stable Diffusion has an AutoencoderKL");
        }
        if config.act_fn != "silu"
            || config.latents_mean.is_some()
            || config.shift_factor.is_some_and(|shift| shift != 0.0)
        {
            bail!(
                "vae/config.json: only the autoencoder of Stable Diffusion 1.x, 2.x and XL is supported (act_fn silu, no latents_mean, no shift_factor)"
            );
        }
        if let Some(other) = config.up_block_types.iter().find(|kind| *kind != "UpDecoderBlock2D") {
            bail!("vae/config.json: block type `{other}` is not supported (only UpDecoderBlock2D)");
        }
        if config.block_out_channels.is_empty() || config.block_out_channels.len() != config.up_block_types.len() {
            bail!(
                "vae/config.json: {} block_out_channels for {} up_block_types",
                config.block_out_channels.len(),
                config.up_block_types.len()
            );
        }
        let groups = config.norm_num_groups;
        let mut steps = Vec::new();
        let mut push =
            |name: &str, stage| steps.push(Step { name: name.to_owned(), stage, pops: false, pushes: false });
        let latent = config.latent_channels;
        if config.use_post_quant_conv {
            push("post_quant_conv", DecoderStage::PostQuant(linear(&w.pp("post_quant_conv"), latent, latent, true)?));
        }
        let d = w.pp("decoder");
        let resnet = |name: &str, inputs, outputs| {
            Resnet::load(&d.pp(name), inputs, outputs, None, groups, EPS).map(DecoderStage::Resnet)
        };
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let mut current = channels[0];
        push("conv_in", DecoderStage::Conv(conv2d(&d.pp("conv_in"), latent, current, 3, 1, 1)?));
        push("mid_block.resnets.0", resnet("mid_block.resnets.0", current, current)?);
        if config.mid_block_add_attention {
            push(
                "mid_block.attentions.0",
                DecoderStage::Attention(MidAttention::load(&d.pp("mid_block.attentions.0"), current, groups)?),
            );
        }
        push("mid_block.resnets.1", resnet("mid_block.resnets.1", current, current)?);
        for (block, outputs) in channels.iter().enumerate() {
            for layer in 0..=config.layers_per_block {
                let name = format!("up_blocks.{block}.resnets.{layer}");
                push(&name, resnet(&name, current, *outputs)?);
                current = *outputs;
            }
            if block + 1 < channels.len() {
                let name = format!("up_blocks.{block}.upsamplers.0.conv");
                push(&name, DecoderStage::Upsample(conv2d(&d.pp(&name), current, current, 3, 1, 1)?));
            }
        }
        let out = DecoderStage::Out(
            group_norm(&d.pp("conv_norm_out"), current, groups, EPS, true)?,
            conv2d(&d.pp("conv_out"), current, config.out_channels, 3, 1, 1)?,
        );
        push("conv_out", out);
        Ok(Self { config, compute: w.compute().clone(), stages: Staged { steps } })
    }

    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Pixels per latent along a side: 8 in Stable Diffusion.
    pub fn factor(&self) -> usize {
        1 << (self.config.block_out_channels.len() - 1)
    }

    /// Latents (B, C, h, w) in the UNet's scale -> images (B, 3, factor·h, factor·w), about [-1, 1], f32.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let z = (latents / self.config.scaling_factor)?;
        let image =
            self.stages.forward(to_inside(&z, &self.compute)?, &(), &Adapters::default()).context("in the VAE")?;
        Ok(from_inside(&image)?)
    }

    /// Decodes and keeps what the pullback needs.
    pub fn trace(&self, latents: &Tensor, checkpointing: Checkpointing) -> Result<DecodeTrace<'_>> {
        static NO_ADAPTERS: LazyLock<Adapters> = LazyLock::new(Adapters::default);
        let z = (latents / self.config.scaling_factor)?;
        let trace =
            self.stages.trace(to_inside(&z, &self.compute)?, &(), &NO_ADAPTERS, checkpointing).context("in the VAE")?;
        let image = from_inside(trace.output())?;
        Ok(DecodeTrace { trace, image, scaling_factor: self.config.scaling_factor, compute: &self.compute })
    }
}

/// A decoded image that can be pulled back once.
pub struct DecodeTrace<'a> {
    trace: Trace<'a, DecoderStage>,
    image: Tensor,
    scaling_factor: f64,
    compute: &'a Compute,
}

impl DecodeTrace<'_> {
    /// (B, 3, H, W), about [-1, 1].
    pub fn image(&self) -> &Tensor {
        &self.image
    }

    /// The gradient with respect to the latents of <cotangent, image>.
    pub fn pull(self, cotangent: &Tensor) -> Result<Tensor> {
        let mut no_adapters = LoraGradients::default();
        let dz = self.trace.pull(to_inside(cotangent, self.compute)?, &mut no_adapters).context("in the VAE")?;
        Ok((from_inside(&dz)? / self.scaling_factor)?)
    }
}
