//! ImageReward: what people would think of an image for its prompt.

use anyhow::{Context, Result, ensure};

use super::preprocess::{Filter, Normaliser, Resizer};
use super::text_image::model_file;
use super::{Differentiable, Judge, Objective, Score, TapedImages};
use crate::config::{ImageRewardConfig, Prompt};
use crate::models::Weights;
use crate::models::clip::PixelStatistics;
use crate::models::hub::resolve_file;
use crate::models::image_reward::ImageReward;
use crate::models::word_pieces::WordPieces;
use crate::nn::Value;
use crate::nn::layers::activation;
use crate::ops::activation::Activation;
use crate::ops::device::Compute;
use crate::ops::{Ledger, Number};

/// Ids of a prompt; the original cuts and pads to as many.
const MAX_LENGTH: usize = 35;

/// The model with its tokenizer and what an image needs in front of it.
pub struct ImageJudge {
    pub model: ImageReward,
    words: WordPieces,
    resizer: Resizer,
    normaliser: Normaliser,
    objective: Objective,
}

impl ImageJudge {
    /// What the config names.
    ///
    /// # Errors
    /// A file is missing or of another model.
    pub fn load(config: &ImageRewardConfig, compute: &Compute) -> Result<Self> {
        let (file, beside) = model_file(&config.model, &config.file)?;
        let model = ImageReward::load(&Weights::open_file(&file)?.on(compute), &beside)?;
        let vocab = match &config.vocab {
            Some(named) => resolve_file(named, "vocab.txt")?,
            None => match beside.find("vocab.txt")? {
                Some(_) => beside.require("vocab.txt")?,
                None => resolve_file("google-bert/bert-base-uncased", "vocab.txt").context(
                    "ImageReward needs the vocabulary of bert-base-uncased: name the file as reward.image-reward.vocab",
                )?,
            },
        };
        // BLIP adds both, and ImageReward uses neither
        let words = WordPieces::load(&vocab, &["[DEC]", "[ENC]"])?;
        ensure!(
            words.vocab_size() == model.vocab_size(),
            "ImageReward reads {} token ids, and {} has {} with [DEC] and [ENC]: take the vocab.txt of bert-base-uncased",
            model.vocab_size(),
            vocab.display(),
            words.vocab_size()
        );
        Ok(Self {
            model,
            words,
            resizer: Resizer::new(Filter::Bicubic, compute.device()),
            normaliser: Normaliser::new(&PixelStatistics::OPENAI, compute.device())?,
            objective: Objective::of(config.target),
        })
    }

    /// The ids of a text.
    ///
    /// # Errors
    /// The tokenizer's.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        self.words.encode(text, MAX_LENGTH)
    }

    /// Pixels (B, 3, S, S) of images (B, 3, H, W) in [-1, 1], as ReFL makes them: short side by antialiased bicubic resizing,
    /// the centre, CLIP's statistics.
    pub fn pixels(&self, images: &Value) -> Result<Value> {
        let x = activation(images, Activation::UnitRange)?;
        self.normaliser.apply(&self.resizer.short_side_and_centre(&x, self.model.image_size())?)
    }
}

impl Score for ImageJudge {
    fn scores(&self, images: &TapedImages, prompts: &[Prompt], ledger: &mut Ledger) -> Result<Vec<Number>> {
        Ok(ledger.numbers(self.on_tape(images, prompts)?.tensor())?)
    }
}

impl Differentiable for ImageJudge {
    fn on_tape(&self, images: &TapedImages, prompts: &[Prompt]) -> Result<Value> {
        let ids = prompts.iter().map(|prompt| self.ids(&prompt.text)).collect::<Result<Vec<_>>>()?;
        self.model.scores(&self.pixels(images.value()?)?, &ids)
    }

    fn objective(&self) -> Objective {
        self.objective
    }
}

pub(super) fn image_reward(config: &ImageRewardConfig, compute: &Compute) -> Result<Judge> {
    Ok(Judge::differentiable(ImageJudge::load(config, compute)?))
}
