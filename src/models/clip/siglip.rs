//! SigLIP (Zhai et al. 2023) in transformers' layout: CLIP's towers without a class token and without a causal mask; an image is
//! what a learned query finds in it, a text is its last position.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::{Clip, PixelStatistics, TextTower, VisionTower, tower};
use crate::models::{Source, Weights};

/// `config.json` of a `SiglipModel`, or of its vision tower.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    text_config: TextConfig,
    vision_config: Option<VisionConfig>,
}

#[derive(Deserialize)]
#[serde(default)]
struct TextConfig {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    max_position_embeddings: usize,
    vocab_size: usize,
    hidden_act: String,
    layer_norm_eps: f64,
    /// Of the embedding; `None`: as the hidden states.
    projection_size: Option<usize>,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            max_position_embeddings: 64,
            vocab_size: 32_000,
            hidden_act: "gelu_pytorch_tanh".into(),
            layer_norm_eps: 1e-6,
            projection_size: None,
        }
    }
}

#[derive(Deserialize)]
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
    vision_use_head: bool,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 224,
            patch_size: 16,
            hidden_act: "gelu_pytorch_tanh".into(),
            layer_norm_eps: 1e-6,
            vision_use_head: true,
        }
    }
}

/// The model in a folder; `text` says whether the text tower is wanted.
///
/// # Errors
/// A file is missing or of another model.
pub(super) fn load(source: &Source, weights: &Weights, text: bool) -> Result<Clip> {
    let Config { text_config, vision_config } = source.read_json("config.json")?;
    let v = match vision_config {
        Some(vision) => vision,
        None => source.read_json("config.json")?, // a vision tower by itself
    };
    ensure!(
        v.vision_use_head,
        "{}: a SigLIP without its pooling head (`vision_use_head`) has no embedding",
        source.label()
    );
    let config = tower(
        v.hidden_size,
        v.intermediate_size,
        v.num_hidden_layers,
        v.num_attention_heads,
        &v.hidden_act,
        v.layer_norm_eps,
    )?;
    let vision = VisionTower::load_siglip(weights, &config, v.image_size, v.patch_size)
        .with_context(|| format!("loading the vision tower of {}", source.label()))?;
    let read_text = || {
        let t = &text_config;
        let config = tower(
            t.hidden_size,
            t.intermediate_size,
            t.num_hidden_layers,
            t.num_attention_heads,
            &t.hidden_act,
            t.layer_norm_eps,
        )?;
        let dim = t.projection_size.unwrap_or(t.hidden_size);
        TextTower::load_siglip(weights, &config, t.vocab_size, t.max_position_embeddings, dim)
            .with_context(|| format!("loading the text tower of {}", source.label()))
    };
    let text = text.then(read_text).transpose()?;
    Ok(Clip { vision, pixels: PixelStatistics::of_siglip(source)?, text })
}
