//! BLIP (Li et al. 2022) describes pictures: candle-transformers' captioner, forward only, with its processor and its greedy
//! search.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{D, Device, Module, Tensor};
use candle_transformers::models::{blip, blip_text};
use image::RgbImage;
use image::imageops::{FilterType, resize};
use serde::Deserialize;
use tokenizers::Tokenizer;

use super::borrowed::var_builder;
use super::clip::PixelStatistics;
use super::text_model::read_tokenizer;
use super::{Source, Weights};

/// A `BlipForConditionalGeneration` with its tokenizer.
pub struct Captioner {
    /// It keeps the keys and values of the text so far.
    model: Mutex<blip::BlipForConditionalGeneration>,
    tokenizer: Tokenizer,
    pixels: PixelStatistics,
    side: usize,
    positions: usize,
    bos: u32,
    eos: u32,
}

/// The parts of `config.json` that decide numbers; newer files leave out what is BLIP's default.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    vision_config: Vision,
    #[serde(default)]
    text_config: Text,
}

#[derive(Deserialize)]
#[serde(default)]
struct Vision {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    image_size: usize,
    patch_size: usize,
    hidden_act: candle_nn::Activation,
    layer_norm_eps: f64,
}

impl Default for Vision {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 384,
            patch_size: 16,
            hidden_act: candle_nn::Activation::Gelu,
            layer_norm_eps: 1e-5,
        }
    }
}

#[derive(Deserialize)]
#[serde(default)]
struct Text {
    vocab_size: usize,
    hidden_size: usize,
    encoder_hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    max_position_embeddings: usize,
    hidden_act: candle_nn::Activation,
    layer_norm_eps: f64,
    bos_token_id: u32,
    sep_token_id: u32,
}

impl Default for Text {
    fn default() -> Self {
        Self {
            vocab_size: 30524,
            hidden_size: 768,
            encoder_hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 512,
            hidden_act: candle_nn::Activation::Gelu,
            layer_norm_eps: 1e-12,
            bos_token_id: 30522,
            sep_token_id: 102,
        }
    }
}

impl Captioner {
    /// A folder or repository in transformers' layout.
    ///
    /// # Errors
    /// A file is missing or damaged, or the model is another one.
    pub fn load(source: &Source) -> Result<Self> {
        Self::build(source).with_context(|| format!("loading the captioner from {}", source.label()))
    }

    fn build(source: &Source) -> Result<Self> {
        let Config { vision_config: vision, text_config: text } = source.read_json("config.json")?;
        for (key, hidden, heads, layers) in [
            ("vision_config", vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers),
            ("text_config", text.hidden_size, text.num_attention_heads, text.num_hidden_layers),
        ] {
            ensure!(layers < 1000, "config.json: {key}: {layers} layers");
            ensure!(
                heads > 0 && hidden > 0 && hidden < 1 << 16 && hidden.is_multiple_of(heads),
                "config.json: {key}: hidden_size {hidden} does not divide into {heads} heads"
            );
        }
        let (side, patch) = (vision.image_size, vision.patch_size);
        ensure!(
            patch > 0 && patch <= side && side < 1 << 14,
            "config.json: an image of {side} pixels in patches of {patch}"
        );
        ensure!(
            (2..1 << 16).contains(&text.max_position_embeddings) && (1..1 << 24).contains(&text.vocab_size),
            "config.json: {} positions, {} tokens",
            text.max_position_embeddings,
            text.vocab_size
        );
        ensure!(
            [text.bos_token_id, text.sep_token_id].iter().all(|id| (*id as usize) < text.vocab_size),
            "config.json: the ids of its special tokens are not in its vocabulary"
        );
        let Some(file) = source.find("tokenizer.json")? else {
            return Err(source.missing("a tokenizer (`tokenizer.json`)"));
        };
        let tokenizer = read_tokenizer(&file)?;
        let weights = Weights::open(source, "model", None)?;
        let (positions, bos, eos) = (text.max_position_embeddings, text.bos_token_id, text.sep_token_id);
        let config = blip::Config {
            text_config: blip_text::Config {
                vocab_size: text.vocab_size,
                hidden_size: text.hidden_size,
                encoder_hidden_size: text.encoder_hidden_size,
                intermediate_size: text.intermediate_size,
                projection_dim: text.hidden_size,
                num_hidden_layers: text.num_hidden_layers,
                num_attention_heads: text.num_attention_heads,
                max_position_embeddings: positions,
                hidden_act: text.hidden_act,
                layer_norm_eps: text.layer_norm_eps,
                is_decoder: true,
            },
            vision_config: blip::VisionConfig {
                hidden_size: vision.hidden_size,
                intermediate_size: vision.intermediate_size,
                projection_dim: vision.hidden_size,
                num_hidden_layers: vision.num_hidden_layers,
                num_attention_heads: vision.num_attention_heads,
                image_size: side,
                patch_size: patch,
                hidden_act: vision.hidden_act,
                layer_norm_eps: vision.layer_norm_eps,
            },
            projection_dim: vision.hidden_size,
            image_text_hidden_size: vision.hidden_size,
        };
        let model = Mutex::new(blip::BlipForConditionalGeneration::new(&config, var_builder(&weights))?);
        let pixels = PixelStatistics::of_transformers(source)?;
        Ok(Self { model, tokenizer, pixels, side, positions, bos, eos })
    }

    /// A description of a picture of 8-bit RGB pixels in at most so many tokens: at each place the likeliest one.
    ///
    /// # Errors
    /// The pixels do not fill the picture.
    pub fn describe(&self, pixels: Vec<u8>, width: usize, height: usize, max_tokens: usize) -> Result<String> {
        let picture =
            RgbImage::from_raw(width as u32, height as u32, pixels).context("pixels that do not fill the picture")?;
        let ids = self.generate(&self.input(&picture)?, max_tokens)?;
        Ok(self.tokenizer.decode(&ids, true).map_err(|e| anyhow!(e))?.trim().to_owned())
    }

    /// (1, 3, side, side), both sides resized whatever the aspect ratio.
    fn input(&self, picture: &RgbImage) -> Result<Tensor> {
        let resized = resize(picture, self.side as u32, self.side as u32, FilterType::CatmullRom).into_raw();
        let (scale, offset) = self.pixels.affine();
        let pixels: Vec<f32> =
            resized.iter().zip((0..3).cycle()).map(|(x, c)| f32::from(*x) / 255.0 * scale[c] + offset[c]).collect();
        let pixels = Tensor::from_vec(pixels, (1, self.side, self.side, 3), &Device::Cpu)?;
        Ok(pixels.permute((0, 3, 1, 2))?.contiguous()?)
    }

    fn generate(&self, input: &Tensor, max_tokens: usize) -> Result<Vec<u32>> {
        let mut model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        model.reset_kv_cache();
        let image = model.vision_model().forward(input)?;
        let (mut ids, mut last) = (Vec::new(), self.bos);
        for _ in 0..max_tokens.min(self.positions - 1) {
            let logits = model.text_decoder().forward(&Tensor::new(&[[last]], &Device::Cpu)?, &image)?;
            last = logits.squeeze(0)?.squeeze(0)?.argmax(D::Minus1)?.to_scalar::<u32>()?;
            if last == self.eos {
                break;
            }
            ids.push(last);
        }
        Ok(ids)
    }
}
