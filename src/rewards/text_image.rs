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
use crate::models::tokenizer::ClipTokenizer;
use crate::models::{Source, Weights};
use crate::nn::Value;
use crate::nn::layers::unit_norm;
use crate::ops::device::Compute;
use crate::ops::{Ledger, Number};

/// Cosine of image and prompt.
struct TextImage {
    clip: Arc<Clip>,
    tokenizer: Arc<ClipTokenizer>,
    /// open_clip pads with zeros.
    open_clip: bool,
    preprocessor: Preprocessor,
    /// Embeddings of the prompts seen so far: a run has few prompts and asks for each many times.
    embedded: Mutex<HashMap<String, Tensor>>,
}

impl TextImage {
    fn new(
        clip: Arc<Clip>,
        tokenizer: Arc<ClipTokenizer>,
        open_clip: bool,
        preprocess: Preprocess,
        compute: &Compute,
    ) -> Result<Self> {
        let vocabulary = clip.text.as_ref().context("the model has no text tower")?.vocab_size();
        ensure!(
            tokenizer.vocab_size() == vocabulary,
            "the reward model reads {vocabulary} token ids and the tokenizer has {}: set its `tokenizer` to a tokenizer.json of the reward model",
            tokenizer.vocab_size()
        );
        let preprocessor = Preprocessor::of(&clip, preprocess, compute.device())?;
        Ok(Self { clip, tokenizer, open_clip, preprocessor, embedded: Mutex::default() })
    }

    fn text(&self, prompt: &str) -> Result<Tensor> {
        let mut embedded = self.embedded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(embedding) = embedded.get(prompt) {
            return Ok(embedding.clone());
        }
        let ids =
            if self.open_clip { self.tokenizer.encode_open_clip(prompt)? } else { self.tokenizer.encode(prompt)? };
        let embedding = self.clip.text_embeds(&[ids])?;
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
    let (file, source) = hps_file(config)?;
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
    Ok(Judge::differentiable(TextImage::new(clip, tokenizer, true, config.preprocess, compute)?))
}

/// The weights, and what lies beside them: `file` in the folder or repository `model`, or alone where one of the two is a path.
fn hps_file(config: &HpsConfig) -> Result<(PathBuf, Source)> {
    let is_path = |text: &str| Path::new(text).is_file() || text.starts_with(['/', '.', '~']);
    let model = Path::new(&config.model);
    let alone = if model.is_file() {
        Some(&config.model)
    } else {
        Some(&config.file).filter(|file| !model.is_dir() && is_path(file))
    };
    let Some(alone) = alone else {
        let source = Source::open(&config.model)?;
        return Ok((source.require(&config.file)?, source));
    };
    let file = resolve_file(alone, "")?;
    let folder = Source::open(&folder_of(&file))?;
    Ok((file, folder))
}

fn folder_of(file: &Path) -> String {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    folder.to_string_lossy().into_owned()
}

/// A transformers CLIPModel: CLIP score, PickScore.
pub(super) fn clip_score(
    model: &str,
    own_tokenizer: Option<&str>,
    preprocess: Preprocess,
    towers: &mut Towers,
    pipeline_tokenizer: Fallback,
) -> Result<Judge> {
    let clip = towers.get(model)?;
    let tokenizer = tokenizer(own_tokenizer, Some(&Source::open(model)?), pipeline_tokenizer)?;
    Ok(Judge::differentiable(TextImage::new(clip, tokenizer, false, preprocess, &towers.compute)?))
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
