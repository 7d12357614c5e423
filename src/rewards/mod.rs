//! Differentiable rewards on images.
//!
//! A reward gives a score; its [`Objective`] turns a score into a loss. Several rewards add their weighted losses, and
//! each one's scores are reported. A new reward is one file here and one table in the config.

mod clip_head;
mod jpeg;
mod preprocess;
mod text_image;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};

use crate::config::RewardsConfig;
use crate::models::clip::Clip;
use crate::models::tokenizer::ClipTokenizer;
use crate::models::{Source, Weights};
use crate::nn::{Tape, Value};
use crate::ops::device::Compute;
use crate::ops::{Ledger, Number, Readings};

pub use jpeg::{jpeg_bytes, to_bytes};
pub use preprocess::{Filter, Preprocessor, resize_matrix};

/// A differentiable score of images.
pub trait Reward: Sync {
    /// Scores (B) of images (B, 3, H, W) in [-1, 1] for their prompts; higher is better.
    fn score(&self, images: &Value, prompts: &[String]) -> Result<Value>;

    /// The exact score of one image (1, 3, H, W), where `score` is a smooth stand-in for it: what is reported, while the
    /// loss is that of `score`.
    fn exact(&self, _image: &Tensor, _ledger: &mut Ledger) -> Result<Option<Number>> {
        Ok(None)
    }

    fn objective(&self) -> Objective;

    /// The embeddings (B, D) of images (B, 3, H, W) that the score is made from, of unit norm; `None` where the reward
    /// has none.
    fn embedding(&self, _images: &Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }
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
    pub reward: Box<dyn Reward>,
}

impl Weighted {
    fn loss(&self, score: f64) -> f64 {
        if self.weight == 0.0 {
            return 0.0;
        }
        self.weight * self.reward.objective().loss(self.cap.map_or(score, |cap| score.min(cap)))
    }

    /// d loss / d score, of scores in f64, on their device.
    fn slope(&self, scores: &Tensor) -> candle_core::Result<Tensor> {
        let slope = (self.reward.objective().slope(scores)? * self.weight)?;
        match self.cap {
            // 1 below the cap, 0 from there on
            Some(cap) => slope * (cap - scores)?.sign()?.relu()?,
            None => Ok(slope),
        }
    }
}

/// The rewards of an experiment.
pub struct Rewards(Vec<Weighted>);

/// What the rewards say of one image, known when the ledger is read: one score for each reward, in order.
pub struct Scores {
    /// Exact where the differentiated one is a stand-in.
    reported: Vec<Number>,
    /// What the loss is made of; anything where a reward is not trained.
    differentiated: Vec<Number>,
}

impl Scores {
    /// The scores as they are reported.
    pub fn get(&self, readings: &Readings) -> Vec<f64> {
        self.reported.iter().map(|score| readings.get(*score)).collect()
    }

    /// The weighted sum of the losses.
    pub fn loss(&self, rewards: &Rewards, readings: &Readings) -> f64 {
        rewards.loss(&self.differentiated.iter().map(|score| readings.get(*score)).collect::<Vec<_>>())
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
        let mut push = |name, weight, reward: Result<Box<dyn Reward>>| -> Result<()> {
            rewards.push(Weighted {
                name,
                weight,
                cap: None,
                reward: reward.with_context(|| format!("loading the reward `{name}`"))?,
            });
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
                text_image::clip_score(&c.model, c.tokenizer.as_deref(), c.preprocess, &mut towers, tokenizer),
            )?;
        }
        if let Some(c) = &config.pickscore {
            push(
                "pickscore",
                c.weight,
                text_image::clip_score(&c.model, c.tokenizer.as_deref(), c.preprocess, &mut towers, tokenizer),
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
        Ok(Self(rewards))
    }

    /// An aesthetic reward of the LAION predictor's shapes on `clip`, with the numbers of `weights` (f32): for measuring.
    pub fn aesthetic_shapes(clip: Clip, weights: &Weights, target: f64) -> Result<Self> {
        let reward = clip_head::aesthetic_shapes(Arc::new(clip), weights, target)?;
        Ok(Self(vec![Weighted { name: "aesthetic", weight: 1.0, cap: None, reward }]))
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

    /// The first embedding that a reward has for images (B, 3, H, W).
    pub fn embedding(&self, images: &Tensor) -> Result<Option<Tensor>> {
        for r in &self.0 {
            if let Some(embedding) = r.reward.embedding(images)? {
                return Ok(Some(embedding));
            }
        }
        Ok(None)
    }

    /// Scores of one image, (1, 3, H, W), without a gradient; exact where the gradient is that of a stand-in. Waits for a
    /// GPU.
    pub fn scores(&self, image: &Tensor, prompt: &str) -> Result<Vec<f64>> {
        let noted =
            |ledger: &mut Ledger| self.0.iter().map(|r| r.reported(image, prompt, ledger)).collect::<Result<Vec<_>>>();
        let (scores, readings) = Ledger::around(noted)?;
        Ok(scores.into_iter().map(|score| readings.get(score)).collect())
    }

    /// Scores of one image, and the gradient of `scale · loss` with respect to it, (1, 3, H, W).
    ///
    /// # Errors
    /// A score that is not finite, here or when the ledger is read.
    pub fn scores_and_gradient(
        &self,
        image: &Tensor,
        prompt: &str,
        scale: f64,
        ledger: &mut Ledger,
    ) -> Result<(Scores, Tensor)> {
        let prompts = [prompt.to_owned()];
        let mut scores = Scores { reported: Vec::new(), differentiated: Vec::new() };
        let mut d_image: Option<Tensor> = None;
        for r in &self.0 {
            if r.weight == 0.0 {
                scores.reported.push(r.reported(image, prompt, ledger)?);
                scores.differentiated.push(0.0.into());
                continue;
            }
            let tape = Tape::new();
            let leaf = tape.leaf(image);
            let score = r.reward.score(&leaf, &prompts)?;
            let value = scalar(&score, r.name, ledger)?;
            let cotangent =
                (r.slope(&score.tensor().to_dtype(DType::F64)?)? * scale)?.to_dtype(score.tensor().dtype())?;
            let gradient = tape
                .backward(&[(&score, &cotangent)])?
                .take(&leaf, &format!("the image from the reward `{}`", r.name))?;
            d_image = Some(match d_image {
                Some(sum) => (sum + gradient)?,
                None => gradient,
            });
            scores.reported.push(r.reward.exact(image, ledger)?.unwrap_or(value));
            scores.differentiated.push(value);
        }
        let d_image = match d_image {
            Some(d_image) => d_image,
            None => image.zeros_like()?,
        };
        Ok((scores, d_image))
    }
}

impl Weighted {
    /// The score of one image (1, 3, H, W), as it is reported.
    fn reported(&self, image: &Tensor, prompt: &str, ledger: &mut Ledger) -> Result<Number> {
        match self.reward.exact(image, ledger)? {
            Some(score) => Ok(score),
            None => scalar(&self.reward.score(&Value::constant(image), &[prompt.to_owned()])?, self.name, ledger),
        }
    }
}

/// The one score, which must be finite.
fn scalar(score: &Value, name: &'static str, ledger: &mut Ledger) -> Result<Number> {
    let count = score.tensor().elem_count();
    ensure!(count == 1, "the reward `{name}` gave {count} scores for one image");
    ledger.finite_number(score.tensor(), move |score| format!("the reward `{name}` gave {score}"))
}

/// CLIP models by their path, so that two rewards on one model share its weights.
struct Towers {
    /// Whether some reward on this model reads text.
    with_text: Vec<String>,
    loaded: HashMap<String, Arc<Clip>>,
    compute: Compute,
}

impl Towers {
    fn new(config: &RewardsConfig, compute: &Compute) -> Self {
        let with_text =
            [config.clip_score.as_ref().map(|c| c.model.clone()), config.pickscore.as_ref().map(|c| c.model.clone())];
        Self { with_text: with_text.into_iter().flatten().collect(), loaded: HashMap::new(), compute: compute.clone() }
    }

    fn get(&mut self, model: &str) -> Result<Arc<Clip>> {
        if let Some(clip) = self.loaded.get(model) {
            return Ok(clip.clone());
        }
        let text = self.with_text.iter().any(|wanted| wanted == model);
        let clip = Arc::new(Clip::load_transformers(&Source::open(model)?, text, &self.compute)?);
        self.loaded.insert(model.to_owned(), clip.clone());
        Ok(clip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Precision};
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
        let noted = |ledger: &mut Ledger| rewards.scores_and_gradient(&picture(), PROMPT, scale, ledger);
        let ((scores, d_image), readings) = Ledger::around(noted).unwrap();
        (scores.get(&readings), d_image)
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
            assert_eq!(rewards.scores(&picture(), PROMPT).unwrap(), found);
            assert_eq!(rewards.embedding(&picture()).unwrap().unwrap().dtype(), DType::F32);
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
