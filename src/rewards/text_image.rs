//! How well an image suits its prompt: the cosine of two CLIP embeddings (HPSv2, CLIP score, PickScore).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;

use super::{Differentiable, Fallback, Judge, Objective, Preprocessor, Score, TapedImages, Towers};
use crate::config::{HpsConfig, Preprocess, Prompt};
use crate::models::clip::{Clip, OpenClipConfig, PixelStatistics};
use crate::models::hub::resolve_file;
use crate::models::sentence_pieces::SentencePieces;
use crate::models::tokenizer::ClipTokenizer;
use crate::models::{Source, Weights};
use crate::nn::Value;
use crate::nn::layers::unit_norm;
use crate::ops::device::Compute;
use crate::ops::{Ledger, Number};

/// Cosine of image and prompt.
struct TextImage {
    clip: Arc<Clip>,
    words: Words,
    preprocessor: Preprocessor,
    /// Embeddings of the prompts seen so far: a run has few prompts and asks for each many times.
    embedded: Mutex<HashMap<String, Tensor>>,
}

/// A prompt's way to ids.
enum Words {
    Clip(Arc<ClipTokenizer>),
    /// open_clip pads with zeros.
    OpenClip(Arc<ClipTokenizer>),
    Siglip(Box<SentencePieces>),
}

impl Words {
    fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        match self {
            Self::Clip(tokenizer) => tokenizer.encode(prompt),
            Self::OpenClip(tokenizer) => tokenizer.encode_open_clip(prompt),
            Self::Siglip(pieces) => pieces.encode(prompt),
        }
    }
}

impl TextImage {
    fn new(clip: Arc<Clip>, words: Words, preprocess: Preprocess, compute: &Compute) -> Result<Self> {
        let vocabulary = clip.text.as_ref().context("the model has no text tower")?.vocab_size();
        if let Words::Clip(tokenizer) | Words::OpenClip(tokenizer) = &words {
            ensure!(
                tokenizer.vocab_size() == vocabulary,
                "the reward model reads {vocabulary} token ids and the tokenizer has {}: set its `tokenizer` to a tokenizer.json of the reward model",
                tokenizer.vocab_size()
            );
        }
        let preprocessor = Preprocessor::of(&clip, preprocess, compute.device())?;
        Ok(Self { clip, words, preprocessor, embedded: Mutex::default() })
    }

    fn text(&self, prompt: &str) -> Result<Tensor> {
        let mut embedded = self.embedded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(embedding) = embedded.get(prompt) {
            return Ok(embedding.clone());
        }
        let embedding = self.clip.text_embeds(&[self.words.encode(prompt)?])?;
        embedded.insert(prompt.to_owned(), embedding.clone());
        Ok(embedding)
    }
}

impl Score for TextImage {
    fn scores(&self, images: &TapedImages, prompts: &[Prompt], ledger: &mut Ledger) -> Result<Vec<Number>> {
        Ok(ledger.numbers(self.on_tape(images, prompts)?.tensor())?)
    }

    fn reads_prompts(&self) -> bool {
        true
    }

    fn embedding(&self, images: &TapedImages) -> Result<Option<Tensor>> {
        Ok(Some(unit_norm(&images.features(&self.clip, &self.preprocessor)?)?.into_tensor()))
    }
}

impl Differentiable for TextImage {
    fn on_tape(&self, images: &TapedImages, prompts: &[Prompt]) -> Result<Value> {
        let image = unit_norm(&images.features(&self.clip, &self.preprocessor)?)?;
        let text = prompts.iter().map(|prompt| self.text(&prompt.text)).collect::<Result<Vec<_>>>()?;
        let text = Tensor::cat(&text, 0)?;
        Ok(row_dots(&image, &text)?)
    }

    fn objective(&self) -> Objective {
        Objective::OneMinus
    }
}

/// <x_i, t_i> for each row, t constant: (B, D), (B, D) -> (B).
fn row_dots(x: &Value, t: &Tensor) -> candle_core::Result<Value> {
    let y = (x.tensor() * t)?.sum(1)?;
    let t = t.clone();
    Ok(Value::step([x], y, move |d| Ok([Some(t.broadcast_mul(&d.unsqueeze(1)?)?)])))
}

/// HPSv2: an open_clip model, from a `.pt` with a `state_dict` or from safetensors.
pub(super) fn hps(config: &HpsConfig, pipeline_tokenizer: Fallback, compute: &Compute) -> Result<Judge> {
    let (file, source) = model_file(&config.model, &config.file)?;
    let weights = Weights::open_file(&file)?.on(compute);
    let architecture = match &config.config {
        Some(path) => Some(Path::new(path).to_owned()),
        None => source.find("open_clip_config.json")?,
    };
    let (architecture, pixels) = match architecture {
        None => (OpenClipConfig::vit_h_14(), None),
        Some(path) => {
            let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let place = || format!("{} is no open_clip config", path.display());
            let pixels = PixelStatistics::parse_open_clip(&text).with_context(place)?;
            (OpenClipConfig::parse(&text).with_context(place)?, pixels)
        }
    };
    let pixels = pixels.map_or_else(|| PixelStatistics::of_open_clip(&source), Ok)?;
    let clip = Arc::new(Clip::load_open_clip(&weights, &architecture, pixels)?);
    let tokenizer = tokenizer(config.tokenizer.as_deref(), None, pipeline_tokenizer)?;
    Ok(Judge::differentiable(TextImage::new(clip, Words::OpenClip(tokenizer), config.preprocess, compute)?))
}

/// The weights, and what lies beside them: `file` in the folder or repository `model`, or alone where one of the two is a path.
pub(super) fn model_file(model: &str, file: &str) -> Result<(PathBuf, Source)> {
    let is_path = |text: &str| Path::new(text).is_file() || text.starts_with(['/', '.', '~']);
    let folder = Path::new(model);
    let alone =
        if folder.is_file() { Some(model) } else { Some(file).filter(|file| !folder.is_dir() && is_path(file)) };
    let Some(alone) = alone else {
        let source = Source::open(model)?;
        return Ok((source.require(file)?, source));
    };
    let file = resolve_file(alone, "")?;
    let folder = Source::open(&folder_of(&file))?;
    Ok((file, folder))
}

fn folder_of(file: &Path) -> String {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    folder.to_string_lossy().into_owned()
}

/// A transformers CLIPModel or SiglipModel: CLIP score, PickScore.
pub(super) fn clip_score(
    model: &str,
    own_tokenizer: Option<&str>,
    preprocess: Preprocess,
    towers: &mut Towers,
    pipeline_tokenizer: Fallback,
) -> Result<Judge> {
    let clip = towers.get(model)?;
    let words = match clip.text.as_ref().filter(|_| clip.is_siglip()) {
        Some(text) => Words::Siglip(Box::new(SentencePieces::load(
            &Source::open(own_tokenizer.unwrap_or(model))?,
            text.length(),
        )?)),
        None => Words::Clip(tokenizer(own_tokenizer, Some(&Source::open(model)?), pipeline_tokenizer)?),
    };
    Ok(Judge::differentiable(TextImage::new(clip, words, preprocess, &towers.compute)?))
}

/// The tokenizer that the config names, else the one beside the model, else the pipeline's.
fn tokenizer(named: Option<&str>, beside: Option<&Source>, pipeline: Fallback) -> Result<Arc<ClipTokenizer>> {
    if let Some(named) = named {
        // a tokenizer.json is loaded with the folder that it lies in
        let path = Path::new(named);
        let folder = if path.is_file() { folder_of(path) } else { named.to_owned() };
        return Ok(Arc::new(ClipTokenizer::load(&Source::open(&folder)?)?));
    }
    for source in beside.into_iter().flat_map(|s| [s.clone(), s.sub("tokenizer")]) {
        if source.find("tokenizer.json")?.is_some() || source.find("vocab.json")?.is_some() {
            return Ok(Arc::new(ClipTokenizer::load(&source)?));
        }
    }
    pipeline()
}
