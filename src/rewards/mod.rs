//! Scores of images, and rewards: scores that can be differentiated.
//!
//! A [`Score`] judges finished images. A [`Differentiable`] one can also be put on a tape; its [`Objective`] turns the score
//! into a loss. The weighted losses of an experiment's rewards add up, and each one's scores are reported. A score without a
//! gradient is reported beside them with a weight of 0.

mod clip_head;
mod images;
mod jpeg;
mod preprocess;
mod text_image;

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};

use crate::config::{Preprocess, Prompt, RewardsConfig};
use crate::models::Weights;
use crate::models::clip::Clip;
use crate::models::tokenizer::ClipTokenizer;
use crate::nn::{Tape, Value};
use crate::ops::device::Compute;
use crate::ops::{Ledger, Number, Readings};

use images::Towers;
pub use images::{Images, Tower};
pub use jpeg::{jpeg_bytes, to_bytes};
pub use preprocess::{Filter, Preprocessor, resize_matrix};

/// Judges finished images.
pub trait Score: Send + Sync {
    /// One score for each image, known when the ledger is read; higher is better. `prompts` has one for each image.
    ///
    /// # Errors
    /// A score that is not finite, here or when the ledger is read.
    fn scores(&self, images: &Images, prompts: &[Prompt], ledger: &mut Ledger) -> Result<Vec<Number>>;

    /// The embeddings (B, D) that the score is made from, of unit norm; `None` where it is made from none.
    fn embedding(&self, _images: &Images) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

/// A score that can be put on a tape.
pub trait Differentiable: Score {
    /// Scores (B) of images that may be on a tape.
    fn on_tape(&self, images: &Images, prompts: &[Prompt]) -> Result<Value>;

    fn objective(&self) -> Objective;

    /// Whether what [`Self::on_tape`] gives is a smooth stand-in for [`Score::scores`], which are reported.
    fn is_stand_in(&self) -> bool {
        false
    }
}

/// How a reward judges.
pub enum Judge {
    Differentiable(Box<dyn Differentiable>),
    /// Without a gradient.
    Score(Box<dyn Score>),
}

impl Judge {
    fn score(&self) -> &dyn Score {
        match self {
            Self::Differentiable(reward) => reward.as_ref(),
            Self::Score(score) => score.as_ref(),
        }
    }
}

/// Notes scores (B), which must be finite.
fn noted(name: &'static str, scores: &Value, images: &Images, ledger: &mut Ledger) -> Result<Vec<Number>> {
    let (count, wanted) = (scores.tensor().elem_count(), images.count());
    ensure!(count == wanted, "`{name}` gave {count} scores for {wanted} images");
    let note = |row| {
        let score = scores.tensor().get(row)?;
        ledger.finite_number(&score, move |score| format!("the reward `{name}` gave {score}"))
    };
    (0..count).map(note).collect()
}

/// From a score to a loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Objective {
    /// `|score - target|`
    Target(f64),
    /// `-score`
    Maximize,
    /// `1 - score`, for cosines.
    OneMinus,
}

impl Objective {
    pub fn loss(self, score: f64) -> f64 {
        match self {
            Self::Target(target) => (score - target).abs(),
            Self::Maximize => -score,
            Self::OneMinus => 1.0 - score,
        }
    }
    /// d loss / d score, of scores in f64, on their device.
    pub fn slope(self, scores: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Target(target) => (scores - target)?.sign(),
            Self::Maximize | Self::OneMinus => scores.ones_like()?.neg(),
        }
    }
    fn of(target: Option<f64>) -> Self {
        target.map_or(Self::Maximize, Self::Target)
    }
}

/// One reward of an experiment.
pub struct Weighted {
    /// The kind: `aesthetic`, `hps`, ...
    pub name: &'static str,
    /// Factor of its loss; 0 is scored and not trained.
    pub weight: f64,
    /// The score from which on the loss pulls no more.
    pub cap: Option<f64>,
    pub judge: Judge,
}

impl Weighted {
    /// The reward, where it is trained.
    fn trained(&self) -> Option<&dyn Differentiable> {
        match &self.judge {
            Judge::Differentiable(reward) if self.weight != 0.0 => Some(reward.as_ref()),
            _ => None,
        }
    }

    fn loss(&self, score: f64) -> f64 {
        let capped = self.cap.map_or(score, |cap| score.min(cap));
        self.trained().map_or(0.0, |reward| self.weight * reward.objective().loss(capped))
    }

    /// d loss / d score, of scores in f64, on their device.
    fn slope(&self, objective: Objective, scores: &Tensor) -> candle_core::Result<Tensor> {
        let slope = (objective.slope(scores)? * self.weight)?;
        match self.cap {
            // 1 below the cap, 0 from there on
            Some(cap) => slope * (cap - scores)?.sign()?.relu()?,
            None => Ok(slope),
        }
    }
}

/// The rewards of an experiment.
pub struct Rewards(Vec<Weighted>);

/// The scores of one image, known when the ledger is read: one for each reward, in order.
#[derive(Clone)]
pub struct ImageScores(Vec<ImageScore>);

#[derive(Clone, Copy)]
struct ImageScore {
    reported: Number,
    /// What the loss is made of, where the reward is trained.
    differentiated: Option<Number>,
}

impl ImageScores {
    /// The scores as they are reported.
    pub fn get(&self, readings: &Readings) -> Vec<f64> {
        self.0.iter().map(|score| readings.get(score.reported)).collect()
    }

    /// The weighted sum of the losses.
    pub fn loss(&self, rewards: &Rewards, readings: &Readings) -> f64 {
        let losses = rewards.0.iter().zip(&self.0);
        losses.filter_map(|(reward, score)| Some(reward.loss(readings.get(score.differentiated?)))).sum()
    }
}

/// Images with their scores; the backward pass of their losses can be run once.
pub struct Judged<'a> {
    /// One for each image.
    scores: Vec<ImageScores>,
    tape: Tape,
    /// On the tape.
    images: Value,
    /// The rewards that are trained, with their scores (B) on the tape.
    trained: Vec<(&'a Weighted, Objective, Value)>,
}

impl Judged<'_> {
    /// One for each image.
    pub fn scores(&self) -> &[ImageScores] {
        &self.scores
    }

    /// d (scale · sum of the images' losses) / d images, (B, 3, H, W); zeros where nothing is trained.
    ///
    /// # Errors
    /// No gradient reached the images.
    pub fn pull(self, scale: f64) -> Result<Tensor> {
        if self.trained.is_empty() {
            return Ok(self.images.tensor().zeros_like()?);
        }
        let cotangent = |(reward, objective, score): &(&Weighted, Objective, Value)| {
            let slope = reward.slope(*objective, &score.tensor().to_dtype(DType::F64)?)?;
            (slope * scale)?.to_dtype(score.tensor().dtype())
        };
        let cotangents = self.trained.iter().map(cotangent).collect::<candle_core::Result<Vec<_>>>()?;
        let outputs: Vec<_> = self.trained.iter().map(|(.., score)| score).zip(&cotangents).collect();
        Ok(self.tape.backward(&outputs)?.take(&self.images, "the image from its rewards")?)
    }
}

impl Rewards {
    /// Loads what the config names, for the CPU.
    ///
    /// `tokenizer` stands in for a reward model that has none beside it.
    ///
    /// # Errors
    /// Names the reward and the file.
    pub fn load(config: &RewardsConfig, tokenizer: &Arc<ClipTokenizer>) -> Result<Self> {
        Self::load_on(config, tokenizer, &Compute::cpu())
    }

    /// As [`Self::load`], for another device. The towers compute in `compute`'s precision for rewards, all else in f32.
    ///
    /// # Errors
    /// As there.
    pub fn load_on(config: &RewardsConfig, tokenizer: &Arc<ClipTokenizer>, compute: &Compute) -> Result<Self> {
        let compute = &compute.for_rewards();
        let mut towers = Towers::new(config, compute);
        let mut rewards: Vec<Weighted> = Vec::new();
        let mut push = |name, weight, reward: Result<Box<dyn Differentiable>>| -> Result<()> {
            let judge = Judge::Differentiable(reward.with_context(|| format!("loading the reward `{name}`"))?);
            rewards.push(Weighted { name, weight, cap: None, judge });
            Ok(())
        };
        if let Some(c) = &config.aesthetic {
            push("aesthetic", c.weight, clip_head::aesthetic(c, &mut towers))?;
        }
        if let Some(c) = &config.clip_head {
            push("clip-head", c.weight, clip_head::clip_head(c, &mut towers))?;
        }
        if let Some(c) = &config.hps {
            push("hps", c.weight, text_image::hps(c, tokenizer, compute))?;
        }
        if let Some(c) = &config.clip_score {
            push(
                "clip-score",
                c.weight,
                text_image::clip_score(
                    "clip-score",
                    &c.model,
                    c.tokenizer.as_deref(),
                    c.preprocess,
                    &mut towers,
                    tokenizer,
                ),
            )?;
        }
        if let Some(c) = &config.pickscore {
            push(
                "pickscore",
                c.weight,
                text_image::clip_score(
                    "pickscore",
                    &c.model,
                    c.tokenizer.as_deref(),
                    c.preprocess,
                    &mut towers,
                    tokenizer,
                ),
            )?;
        }
        if let Some(c) = &config.compressibility {
            push("compressibility", c.weight, Ok(jpeg::compressibility()))?;
        }
        if let Some(c) = &config.incompressibility {
            push("incompressibility", c.weight, Ok(jpeg::incompressibility()))?;
        }
        if rewards.is_empty() {
            bail!(
                "no reward is configured: add a table such as [reward.aesthetic], or --set reward.aesthetic.target=10"
            );
        }
        Self::new(rewards)
    }

    /// These rewards.
    ///
    /// # Errors
    /// One without a gradient has a weight.
    pub fn new(rewards: Vec<Weighted>) -> Result<Self> {
        for Weighted { name, weight, judge, .. } in &rewards {
            ensure!(
                *weight == 0.0 || matches!(judge, Judge::Differentiable(_)),
                "reward.{name}.weight = {weight}: this score has no gradient to train with; set it to 0, so that it is reported"
            );
        }
        Ok(Self(rewards))
    }

    /// An aesthetic reward of the LAION predictor's shapes on `clip`, with the numbers of `weights` (f32): for measuring.
    pub fn aesthetic_shapes(clip: Clip, weights: &Weights, target: f64) -> Result<Self> {
        let tower = Tower::new(Arc::new(clip), Preprocess::Alignprop, weights.compute())?;
        let judge = Judge::Differentiable(clip_head::aesthetic_shapes(tower, weights, target)?);
        Self::new(vec![Weighted { name: "aesthetic", weight: 1.0, cap: None, judge }])
    }

    pub fn names(&self) -> Vec<&'static str> {
        self.0.iter().map(|r| r.name).collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Weighted> {
        self.0.iter()
    }

    /// The weighted loss of the given scores.
    pub fn loss(&self, scores: &[f64]) -> f64 {
        self.0.iter().zip(scores).map(|(r, score)| r.loss(*score)).sum()
    }

    /// The weighted sum of the given scores.
    pub fn total(&self, scores: &[f64]) -> f64 {
        self.0.iter().zip(scores).map(|(r, score)| r.weight * score).sum()
    }

    /// Caps scores by their kinds: above its cap a score has no gradient.
    pub fn with_caps(mut self, caps: &BTreeMap<String, f64>) -> Self {
        for reward in &mut self.0 {
            reward.cap = caps.get(reward.name).copied();
        }
        self
    }

    /// The first embedding (B, D) that a reward has for images (B, 3, H, W).
    pub fn embedding(&self, images: &Images) -> Result<Option<Tensor>> {
        for r in &self.0 {
            if let Some(embedding) = r.judge.score().embedding(images)? {
                return Ok(Some(embedding));
            }
        }
        Ok(None)
    }

    /// The scores of images with their prompts, `[image][reward]`, without a gradient; exact where the gradient is that of a
    /// stand-in. Waits for a GPU.
    ///
    /// # Errors
    /// A score that is not finite.
    pub fn scores(&self, images: &Images, prompts: &[Prompt]) -> Result<Vec<Vec<f64>>> {
        let by_reward = |ledger: &mut Ledger| {
            self.0.iter().map(|r| r.judge.score().scores(images, prompts, ledger)).collect::<Result<Vec<_>>>()
        };
        let (by_reward, readings) = Ledger::around(by_reward)?;
        let of = |image: usize| by_reward.iter().map(|scores| readings.get(scores[image])).collect();
        Ok((0..images.count()).map(of).collect())
    }

    /// Scores images (B, 3, H, W) with their prompts, and records what the backward pass of their losses needs: all rewards
    /// that are trained on one tape.
    ///
    /// # Errors
    /// A score that is not finite, here or when the ledger is read. A reward whose score does not depend on the images.
    pub fn judge(&self, images: &Tensor, prompts: &[Prompt], ledger: &mut Ledger) -> Result<Judged<'_>> {
        let tape = Tape::new();
        let leaf = tape.leaf(images);
        let taped = Images::from(leaf.clone());
        let (mut trained, mut by_reward) = (Vec::new(), Vec::with_capacity(self.0.len()));
        // first those that are trained, whose towers then serve the others too
        for r in &self.0 {
            by_reward.push(match r.trained() {
                Some(reward) => {
                    let score = reward.on_tape(&taped, prompts)?;
                    ensure!(score.is_on_tape(), "no gradient goes from the reward `{}` to the image", r.name);
                    let differentiated = noted(r.name, &score, &taped, ledger)?;
                    trained.push((r, reward.objective(), score));
                    Some(differentiated)
                }
                None => None,
            });
        }
        let detached = taped.detached();
        let mut scores = vec![ImageScores(Vec::with_capacity(self.0.len())); taped.count()];
        for (r, differentiated) in self.0.iter().zip(by_reward) {
            let reported = match (&differentiated, r.trained()) {
                (Some(scores), Some(reward)) if !reward.is_stand_in() => scores.clone(),
                _ => r.judge.score().scores(&detached, prompts, ledger)?,
            };
            for (image, (of_image, reported)) in scores.iter_mut().zip(reported).enumerate() {
                let differentiated = differentiated.as_ref().map(|scores| scores[image]);
                of_image.0.push(ImageScore { reported, differentiated });
            }
        }
        Ok(Judged { scores, tape, images: leaf, trained })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Precision};
    use crate::models::Source;
    use crate::ops::is_finite;
    use crate::ops::testing::{Case, relative_error};

    const PROMPT: &str = "a 3d cat at sunset";

    /// The embedded rewards, a cosine and a head, in one precision.
    fn embedded(precision: Precision) -> Rewards {
        let settings = ["reward.aesthetic.clip='assets/emoji-aesthetic'", "reward.aesthetic.weight=0.01"];
        let head = "reward.aesthetic.head='assets/emoji-aesthetic/aesthetic_head.safetensors'";
        let settings: Vec<String> = settings.into_iter().chain([head]).map(String::from).collect();
        let config = Config::parse(include_str!("../../configs/emoji.toml"), "emoji.toml", &settings).unwrap();
        let source = Source::open("assets/emoji-sd").unwrap().sub("tokenizer");
        let compute = Compute::open_any("cpu", Some(precision), false).unwrap();
        Rewards::load_on(&config.reward, &Arc::new(ClipTokenizer::load(&source).unwrap()), &compute).unwrap()
    }

    /// A picture of blocks, (1, 3, 64, 64).
    fn picture() -> Tensor {
        let blocks = (Case::normal(&[1, 3, 8, 8], 1) * 0.4).unwrap().to_dtype(DType::F32).unwrap();
        blocks.upsample_nearest2d(64, 64).unwrap()
    }

    fn judged(rewards: &Rewards, scale: f64) -> (Vec<f64>, Tensor) {
        let (judged, readings) =
            Ledger::around(|ledger| rewards.judge(&picture(), &[Prompt::from(PROMPT)], ledger)).unwrap();
        (judged.scores()[0].get(&readings), judged.pull(scale).unwrap())
    }

    #[test]
    fn towers_in_half_precision_score_and_pull_as_in_f32() {
        let (scores, d_image) = judged(&embedded(Precision::F32), 1.0);
        for (precision, bound, d_bound) in [(Precision::Bf16, 2e-2, 1e-1), (Precision::F16, 2e-3, 2e-2)] {
            let rewards = embedded(precision);
            let (found, d_found) = judged(&rewards, 1.0);
            for (found, expected) in found.iter().zip(&scores) {
                let error = (found - expected).abs(); // a cosine, and a score from 0 to 9
                assert!(error > 0.0 && error < bound, "{precision:?}: {found} for {expected}");
            }
            assert_eq!(d_found.dtype(), DType::F32);
            let error = relative_error(&d_found, &d_image);
            assert!(error > 1e-4 && error < d_bound, "{precision:?}: {error}");
            // what is reported beside training is scored by the same towers
            let images = Images::from(Value::from(picture()));
            assert_eq!(rewards.scores(&images, &[Prompt::from(PROMPT)]).unwrap(), [found]);
            assert_eq!(rewards.embedding(&images).unwrap().unwrap().dtype(), DType::F32);
        }
    }

    #[test]
    fn the_gradient_of_a_small_or_scaled_loss_has_the_same_bits() {
        let bits = |d: &Tensor| d.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for precision in [Precision::Bf16, Precision::F16] {
            let rewards = embedded(precision);
            let (_, d_image) = judged(&rewards, 1.0);
            // a mean over a large batch; a loss scale
            for scale in [f64::powi(2.0, -30), 65536.0] {
                let (_, scaled) = judged(&rewards, scale);
                assert_eq!(bits(&(scaled * (1.0 / scale)).unwrap()), bits(&d_image), "{precision:?}, {scale}");
            }
            assert!(!is_finite(&judged(&rewards, 1e45).1).unwrap(), "{precision:?}");
        }
    }
}
