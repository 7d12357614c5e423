//! CLIP (Radford et al. 2021): text and vision towers with their projections, from the layout of transformers or of
//! open_clip; and SigLIP. Frozen; images are differentiable. Inside, a tower computes in the number format of its weights; pixels and
//! embeddings are f32, and so is all that is made of them.

pub(super) mod open_clip;
mod pixels;
mod siglip;
mod towers;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor};
use serde::Deserialize;

pub use pixels::PixelStatistics;
pub use towers::{TextTower, VisionTower};

use super::transformer::TowerConfig;
use super::{Source, Weights};
use crate::nn::Value;
use crate::nn::layers::unit_norm;
use crate::ops::activation::Activation;
use crate::ops::device::Compute;

/// `config.json` of a transformers CLIPModel, or of one of its towers.
#[derive(Deserialize)]
struct TransformersConfig {
    model_type: Option<String>,
    projection_dim: Option<usize>,
    text_config: Option<TextConfig>,
    vision_config: Option<VisionConfig>,
}

/// `config.json` of a transformers CLIPTextModel, with its defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub max_position_embeddings: usize,
    pub vocab_size: usize,
    pub hidden_act: String,
    pub layer_norm_eps: f64,
    pub eos_token_id: u32,
    pub projection_dim: usize,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            vocab_size: 49408,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
            projection_dim: 512,
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
struct VisionConfig {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    image_size: usize,
    patch_size: usize,
    hidden_act: String,
    layer_norm_eps: f64,
    projection_dim: usize,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 224,
            patch_size: 32,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
            projection_dim: 512,
        }
    }
}

/// `open_clip_config.json` (its `model_cfg`, or that table itself).
#[derive(Clone, Debug, Deserialize)]
pub struct OpenClipConfig {
    embed_dim: usize,
    #[serde(default)]
    quick_gelu: bool,
    vision_cfg: OpenClipVision,
    text_cfg: OpenClipText,
}

#[derive(Clone, Debug, Deserialize)]
struct OpenClipVision {
    image_size: usize,
    layers: usize,
    width: usize,
    #[serde(default = "default_head_width")]
    head_width: usize,
    patch_size: usize,
    #[serde(default = "default_mlp_ratio")]
    mlp_ratio: f64,
}

#[derive(Clone, Debug, Deserialize)]
struct OpenClipText {
    #[serde(default = "default_context_length")]
    context_length: usize,
    vocab_size: usize,
    width: usize,
    heads: usize,
    layers: usize,
    #[serde(default = "default_mlp_ratio")]
    mlp_ratio: f64,
}

fn default_head_width() -> usize {
    64
}
fn default_mlp_ratio() -> f64 {
    4.0
}
fn default_context_length() -> usize {
    77
}

impl OpenClipConfig {
    /// ViT-H-14, the architecture of HPSv2 and of PickScore's original.
    pub fn vit_h_14() -> Self {
        Self {
            embed_dim: 1024,
            quick_gelu: false,
            vision_cfg: OpenClipVision {
                image_size: 224,
                layers: 32,
                width: 1280,
                head_width: 80,
                patch_size: 14,
                mlp_ratio: 4.0,
            },
            text_cfg: OpenClipText {
                context_length: 77,
                vocab_size: 49408,
                width: 1024,
                heads: 16,
                layers: 24,
                mlp_ratio: 4.0,
            },
        }
    }

    /// # Errors
    /// Not JSON, or not such a config.
    pub fn parse(text: &str) -> Result<Self> {
        let mut json: serde_json::Value = serde_json::from_str(text)?;
        if let Some(inner) = json.get_mut("model_cfg") {
            json = inner.take();
        }
        Ok(serde_json::from_value(json)?)
    }
}

/// Images and texts in one space.
pub struct Clip {
    pub vision: VisionTower,
    /// How the vision tower's pixels are normalised.
    pub pixels: PixelStatistics,
    /// Absent where only the vision tower was loaded.
    pub text: Option<TextTower>,
}

impl Clip {
    /// A transformers `CLIPModel` or `SiglipModel` folder; `text` says whether the text tower is wanted.
    pub fn load_transformers(source: &Source, text: bool, compute: &Compute) -> Result<Self> {
        let config: TransformersConfig = source.read_json("config.json")?;
        let weights = Weights::open(source, "model", None)?.on(compute);
        match config.model_type.as_deref() {
            Some("siglip" | "siglip_vision_model") => return siglip::load(source, &weights, text),
            Some(kind) if kind.starts_with("siglip2") => {
                bail!(
                    "{} is a SigLIP 2 of images of any shape (`{kind}`), which is not implemented: take one of a fixed size",
                    source.label()
                )
            }
            _ => {}
        }
        let vision_config = match config.vision_config {
            Some(vision) => vision,
            None => source.read_json("config.json")?, // a vision tower by itself
        };
        let projection = config.projection_dim.unwrap_or(vision_config.projection_dim);
        let vision = VisionTower::load(
            &weights,
            &vision_config.tower()?,
            vision_config.image_size,
            vision_config.patch_size,
            projection,
        )
        .with_context(|| format!("loading the vision tower of {}", source.label()))?;
        let text = match (text, config.text_config) {
            (false, _) => None,
            (true, None) => bail!("{} holds no text tower: its config.json has no text_config", source.label()),
            (true, Some(text)) => Some(
                TextTower::load(
                    &weights,
                    &text.tower()?,
                    text.vocab_size,
                    text.max_position_embeddings,
                    Some(projection),
                    text.eos(),
                )
                .with_context(|| format!("loading the text tower of {}", source.label()))?,
            ),
        };
        Ok(Self { vision, pixels: PixelStatistics::of_transformers(source)?, text })
    }

    /// The vision tower of CLIP ViT-L/14, 768 features, alone.
    pub fn vit_l_14_vision(weights: &Weights) -> Result<Self> {
        let config = VisionConfig {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            patch_size: 14,
            ..VisionConfig::default()
        };
        let vision = VisionTower::load(weights, &config.tower()?, config.image_size, config.patch_size, 768)?;
        Ok(Self { vision, pixels: PixelStatistics::OPENAI, text: None })
    }

    /// An open_clip model; `weights` has its `state_dict`'s keys.
    pub fn load_open_clip(weights: &Weights, config: &OpenClipConfig, pixels: PixelStatistics) -> Result<Self> {
        let act = if config.quick_gelu { Activation::QuickGelu } else { Activation::Gelu };
        let (v, t) = (&config.vision_cfg, &config.text_cfg);
        if v.head_width == 0 || t.heads == 0 || v.width % v.head_width != 0 || t.width % t.heads != 0 {
            bail!(
                "open_clip config: width {} with head_width {}, text width {} with {} heads",
                v.width,
                v.head_width,
                t.width,
                t.heads
            );
        }
        let vision = TowerConfig {
            width: v.width,
            mlp: (v.width as f64 * v.mlp_ratio) as usize,
            layers: v.layers,
            heads: v.width / v.head_width,
            act,
            eps: 1e-5,
        };
        let text = TowerConfig {
            width: t.width,
            mlp: (t.width as f64 * t.mlp_ratio) as usize,
            layers: t.layers,
            heads: t.heads,
            act,
            eps: 1e-5,
        };
        let mut names = open_clip::text(weights, t.layers)?;
        names.extend(open_clip::vision(weights, v.layers)?);
        names.extend(open_clip::projections());
        let weights = &weights.renamed(&names)?.on(weights.compute());
        Ok(Self {
            vision: VisionTower::load(weights, &vision, v.image_size, v.patch_size, config.embed_dim)?,
            pixels,
            text: Some(TextTower::load(weights, &text, t.vocab_size, t.context_length, Some(config.embed_dim), None)?),
        })
    }

    /// Whether it is a SigLIP, whose text tower reads other ids.
    pub fn is_siglip(&self) -> bool {
        self.text.as_ref().is_some_and(TextTower::is_siglip)
    }

    /// Unit text embeddings, (B, D) in f32, of token ids.
    ///
    /// # Errors
    /// The text tower was not loaded, or an id lies outside its vocabulary.
    pub fn text_embeds(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let tower = self.text.as_ref().context("this CLIP model was loaded without its text tower")?;
        Ok(unit_norm(&Value::from(tower.pooled(ids)?.to_dtype(DType::F32)?))?.into_tensor())
    }
}

fn activation(name: &str) -> Result<Activation> {
    Activation::from_name(name).with_context(|| {
        format!("hidden_act `{name}` is not known: quick_gelu, gelu, gelu_pytorch_tanh, relu, silu, tanh are")
    })
}

impl VisionConfig {
    fn tower(&self) -> Result<TowerConfig> {
        tower(
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            &self.hidden_act,
            self.layer_norm_eps,
        )
    }
}

impl TextConfig {
    fn tower(&self) -> Result<TowerConfig> {
        tower(
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            &self.hidden_act,
            self.layer_norm_eps,
        )
    }
    /// The id whose first place is pooled; `None`: the largest id, which transformers does for configs that say 2.
    fn eos(&self) -> Option<u32> {
        (self.eos_token_id != 2).then_some(self.eos_token_id)
    }
    /// The text tower alone, without a projection: a pipeline's text encoder.
    pub(super) fn load_encoder(&self, weights: &Weights) -> Result<TextTower> {
        TextTower::load(weights, &self.tower()?, self.vocab_size, self.max_position_embeddings, None, self.eos())
    }
}

fn tower(width: usize, mlp: usize, layers: usize, heads: usize, act: &str, eps: f64) -> Result<TowerConfig> {
    if heads == 0 || !width.is_multiple_of(heads) {
        bail!("config.json: {heads} attention heads for a hidden size of {width}");
    }
    Ok(TowerConfig { width, mlp, layers, heads, act: activation(act)?, eps })
}
