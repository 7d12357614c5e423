//! Scores of images, and rewards, which are scores with a gradient.
//!
//! A [`Score`] judges finished images for their prompts. A [`Differentiable`] one can be put on the tape too; its
//! [`Objective`] turns a score into a loss. Several rewards add their weighted losses, on one tape, and each one's scores are
//! reported. A new one is one file here and one table in the config.

mod bytes;
mod clip_head;
mod command;
mod derivative;
mod detector;
mod http;
mod image_reward;
mod images;
mod jpeg;
mod preprocess;
mod program;
mod server;
mod subject;
mod text_image;
mod vlm;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};

use crate::config::{Prompt, RewardsConfig};
use crate::models::clip::Clip;
use crate::models::tokenizer::ClipTokenizer;
use crate::models::{Source, Weights};
use crate::nn::{Tape, Value};
use crate::ops::device::Compute;
use crate::ops::{Ledger, Number, Readings};

pub use clip_head::{Embedder, HeadFile, aesthetic_scores};
pub use detector::Detector;
pub use image_reward::ImageJudge;
pub use images::TapedImages;
pub use jpeg::{jpeg_bytes, to_bytes};
pub use preprocess::{Filter, Preprocessor, resize_matrix};

/// Judges a batch of finished images.
pub trait Score: Send + Sync {
    /// One score an image, higher is better, for the images' prompts, as many. What several scores ask of the images is
    /// computed once: [`TapedImages::features`].
    fn scores(&self, images: &TapedImages, prompts: &[Prompt], ledger: &mut Ledger) -> Result<Vec<Number>>;

    /// Whether a prompt says all that the score asks of it.
    ///
    /// # Errors
    /// Says what it does not.
    fn check(&self, _prompt: &Prompt) -> Result<()> {
        Ok(())
    }

    /// Whether it reads the prompts' texts.
    fn reads_prompts(&self) -> bool {
        false
    }

    /// Embeddings (B, D) of the images, of unit norm; `None` where the score has none.
    fn embedding(&self, _images: &TapedImages) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// Whether another program or machine computes it: then it needs no memory here, and is not asked when memory is measured.
    fn is_elsewhere(&self) -> bool {
        false
    }
}

/// A score that can also be put on the tape.
pub trait Differentiable: Score {
    /// Scores (B) of the images that are being differentiated.
    fn on_tape(&self, images: &TapedImages, prompts: &[Prompt]) -> Result<Value>;

    /// Whether `on_tape` is a smooth stand-in for `scores`, which are then reported while the loss is that of `on_tape`.
    fn is_stand_in(&self) -> bool {
        false
    }

    fn objective(&self) -> Objective;
}

/// What judges images: with a gradient, which can be trained, or without.
pub enum Judge {
    Differentiable(Box<dyn Differentiable>),
    Score(Box<dyn Score>),
}

impl Judge {
    fn differentiable(reward: impl Differentiable + 'static) -> Self {
        Self::Differentiable(Box::new(reward))
    }

    /// What both kinds can do.
    pub fn score(&self) -> &dyn Score {
        match self {
            Self::Differentiable(reward) => &**reward,
            Self::Score(score) => &**score,
        }
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
    pub judge: Judge,
}

impl Weighted {
    /// The reward that is trained, if it is.
    fn trained(&self) -> Option<&dyn Differentiable> {
        match &self.judge {
            Judge::Differentiable(reward) if self.weight != 0.0 => Some(&**reward),
            _ => None,
        }
    }

    /// A score without a gradient is maximised.
    fn loss(&self, score: f64) -> f64 {
        let capped = self.cap.map_or(score, |cap| score.min(cap));
        let objective = match &self.judge {
            Judge::Differentiable(reward) => reward.objective(),
            Judge::Score(_) => Objective::Maximize,
        };
        self.weight * objective.loss(capped)
    }

    /// d loss / d score of `reward`, of scores in f64, on their device.
    fn slope(&self, reward: &dyn Differentiable, scores: &Tensor) -> candle_core::Result<Tensor> {
        let slope = (reward.objective().slope(scores)? * self.weight)?;
        match self.cap {
            // 1 below the cap, 0 from there on
            Some(cap) => slope * (cap - scores)?.sign()?.relu()?,
            None => Ok(slope),
        }
    }

    /// One number an image, each of which must be finite.
    fn checked(&self, scores: Vec<Number>, batch: usize, ledger: &mut Ledger) -> Result<Vec<Number>> {
        let name = self.name;
        ensure!(scores.len() == batch, "the reward `{name}` gave {} scores for {batch} images", scores.len());
        for score in &scores {
            ledger.finite_number(*score, move |score| format!("the reward `{name}` gave {score}"))?;
        }
        Ok(scores)
    }

    /// The scores as they are reported.
    fn reported(&self, images: &TapedImages, prompts: &[Prompt], ledger: &mut Ledger) -> Result<Vec<Number>> {
        let scores = self.judge.score().scores(images, prompts, ledger)?;
        self.checked(scores, prompts.len(), ledger)
    }
}

/// The rewards of an experiment.
pub struct Rewards(Vec<Weighted>);

/// Where the tokenizer comes from of a reward model that has none beside it.
pub type Fallback<'a> = &'a dyn Fn() -> Result<Arc<ClipTokenizer>>;

/// What the rewards say of one image, known when the ledger is read: one score for each reward, in order.
#[derive(Clone)]
pub struct ImageScores {
    /// Exact where the differentiated one is a stand-in.
    reported: Vec<Number>,
    /// What the loss is made of; anything where a reward is not trained.
    differentiated: Vec<Number>,
}

impl ImageScores {
    /// The scores as they are reported.
    pub fn get(&self, readings: &Readings) -> Vec<f64> {
        self.reported.iter().map(|score| readings.get(*score)).collect()
    }

    /// The weighted sum of the losses.
    pub fn loss(&self, rewards: &Rewards, readings: &Readings) -> f64 {
        rewards.loss(&self.differentiated.iter().map(|score| readings.get(*score)).collect::<Vec<_>>())
    }
}

/// A batch of images with its scores, whose losses can be pulled back to the images.
pub struct Judged {
    tape: Tape,
    /// The images, (B, 3, H, W).
    images: Value,
    /// What is trained: scores (B), and d loss / d score in f64.
    trained: Vec<(Value, Tensor)>,
    scores: Vec<ImageScores>,
}

impl Judged {
    /// One an image.
    pub fn scores(&self) -> &[ImageScores] {
        &self.scores
    }

    /// The gradient of `scale · (sum of the images' losses)` with respect to the images, (B, 3, H, W).
    /// Zeros where nothing is trained.
    ///
    /// # Errors
    /// None reached the images.
    pub fn pull(self, scale: f64) -> Result<Tensor> {
        if self.trained.is_empty() {
            return Ok(self.images.tensor().zeros_like()?);
        }
        let mut outputs = Vec::with_capacity(self.trained.len());
        for (score, slope) in &self.trained {
            outputs.push((score, (slope * scale)?.to_dtype(score.tensor().dtype())?));
        }
        let outputs: Vec<(&Value, &Tensor)> = outputs.iter().map(|(score, cotangent)| (*score, cotangent)).collect();
        Ok(self.tape.backward(&outputs)?.take(&self.images, "the images from the rewards")?)
    }
}

impl Judged {
    /// The images moved against the rewards, as RSA-FT has it (arXiv 2603.21175): up the gradient of their own loss by `rho`, an L2
    /// distance over an image in [0, 1], which is half its distance in [-1, 1]. An image without a gradient stays.
    ///
    /// ```text
    /// y' = y + rho g / |g|       y = image / 2 + 1/2, g = d loss / d y
    /// ```
    ///
    /// # Errors
    /// As [`Self::pull`].
    pub fn moved_against(self, rho: f64) -> Result<Tensor> {
        let images = self.images.tensor().clone();
        let d_images = self.pull(1.0)?;
        let norm = d_images.to_dtype(DType::F64)?.sqr()?.sum_keepdim([1, 2, 3])?.sqrt()?.maximum(1e-30)?;
        let factor = norm.recip()?.affine(2.0 * rho, 0.0)?.to_dtype(d_images.dtype())?;
        Ok((images + d_images.broadcast_mul(&factor)?)?)
    }
}

impl IntoIterator for Rewards {
    type Item = Weighted;
    type IntoIter = std::vec::IntoIter<Weighted>;

    /// For putting loaded rewards together with others.
    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
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
        Self::load_with(config, &|| Ok(tokenizer.clone()), compute)
    }

    /// As [`Self::load_on`], where there may be no pipeline: `tokenizer` is called where a reward has none of its own.
    ///
    /// # Errors
    /// As there.
    pub fn load_with(config: &RewardsConfig, tokenizer: Fallback, compute: &Compute) -> Result<Self> {
        let compute = &compute.for_rewards();
        let mut towers = Towers::new(config, compute);
        let mut rewards: Vec<Weighted> = Vec::new();
        let mut push = |name, weight, judge: Result<Judge>| -> Result<()> {
            let judge = judge.with_context(|| format!("loading the reward `{name}`"))?;
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
        if let Some(c) = &config.image_reward {
            push("image-reward", c.weight, image_reward::image_reward(c, compute))?;
        }
        if let Some(c) = &config.count {
            let detector = towers.detector("count", &c.model, c.size)?;
            for (name, weight, judge) in detector::count(c, &detector) {
                push(name, weight, Ok(judge))?;
            }
        }
        if let Some(c) = &config.object {
            let detector = towers.detector("object", &c.model, c.size)?;
            for (name, weight, judge) in detector::object(c, &detector)? {
                push(name, weight, Ok(judge))?;
            }
        }
        if let Some(c) = &config.command {
            push("command", c.weight, command::command(c))?;
        }
        if let Some(c) = &config.http {
            push("http", c.weight, http::http(c))?;
        }
        if let Some(c) = &config.vlm {
            push("vlm", c.weight, vlm::vlm(c))?;
        }
        if rewards.is_empty() {
            bail!(
                "no reward is configured: add a table such as [reward.aesthetic], or --set reward.aesthetic.target=10"
            );
        }
        Ok(Self::new(rewards))
    }

    /// These scores and rewards.
    pub fn new(rewards: Vec<Weighted>) -> Self {
        Self(rewards)
    }

    /// An aesthetic reward of the LAION predictor's shapes on `clip`, with the numbers of `weights` (f32): for measuring.
    pub fn aesthetic_shapes(clip: Clip, weights: &Weights, target: f64) -> Result<Self> {
        let judge = clip_head::aesthetic_shapes(Arc::new(clip), weights, target)?;
        Ok(Self::new(vec![Weighted { name: "aesthetic", weight: 1.0, cap: None, judge }]))
    }

    pub fn names(&self) -> Vec<&'static str> {
        self.0.iter().map(|r| r.name).collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Weighted> {
        self.0.iter()
    }

    /// The weighted loss of the given scores; one that is not trained has a weight of 0.
    pub fn loss(&self, scores: &[f64]) -> f64 {
        self.0.iter().zip(scores).map(|(r, score)| r.loss(*score)).sum()
    }

    /// The weighted sum of the given scores.
    pub fn total(&self, scores: &[f64]) -> f64 {
        self.0.iter().zip(scores).map(|(r, score)| r.weight * score).sum()
    }

    /// Whether each prompt says all that the rewards ask of it.
    ///
    /// # Errors
    /// Names the reward and the prompt.
    pub fn check(&self, prompts: &[Prompt]) -> Result<()> {
        let check =
            |r: &Weighted, prompt| r.judge.score().check(prompt).with_context(|| format!("the reward `{}`", r.name));
        self.0.iter().try_for_each(|r| prompts.iter().try_for_each(|prompt| check(r, prompt)))
    }

    /// Caps scores by their kinds: above its cap a score has no gradient.
    pub fn with_caps(mut self, caps: &BTreeMap<String, f64>) -> Self {
        for reward in &mut self.0 {
            reward.cap = caps.get(reward.name).copied();
        }
        self
    }

    /// The names of the rewards that read the prompts' texts.
    pub fn that_read_prompts(&self) -> Vec<&'static str> {
        self.0.iter().filter(|r| r.judge.score().reads_prompts()).map(|r| r.name).collect()
    }

    /// The first embedding that a reward has for images (B, 3, H, W).
    pub fn embedding(&self, images: &Tensor) -> Result<Option<Tensor>> {
        let images = TapedImages::new(Value::constant(images));
        for r in &self.0 {
            if let Some(embedding) = r.judge.score().embedding(&images)? {
                return Ok(Some(embedding));
            }
        }
        Ok(None)
    }

    /// Scores of images (B, 3, H, W) without a gradient, `[image][reward]`; exact where the gradient is that of a stand-in.
    /// Waits for a GPU.
    ///
    /// # Errors
    /// A score that is not finite.
    pub fn scores(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Vec<f64>>> {
        self.scores_of(&TapedImages::new(Value::constant(images)), prompts)
    }

    /// As [`Self::scores`], of images or of pictures from files.
    ///
    /// # Errors
    /// As there, or a score does not judge pictures of several sizes at once.
    pub fn scores_of(&self, images: &TapedImages, prompts: &[Prompt]) -> Result<Vec<Vec<f64>>> {
        self.scores_by(images, prompts, |_| true)
    }

    /// [`Self::scores`] without what is computed elsewhere, as [`Self::judge_here`].
    ///
    /// # Errors
    /// As there.
    pub fn scores_here(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Vec<f64>>> {
        let images = TapedImages::new(Value::constant(images));
        self.scores_by(&images, prompts, |r| !r.judge.score().is_elsewhere())
    }

    fn scores_by(
        &self,
        images: &TapedImages,
        prompts: &[Prompt],
        counts: impl Fn(&Weighted) -> bool,
    ) -> Result<Vec<Vec<f64>>> {
        let batch = images.batch()?;
        ensure!(prompts.len() == batch, "{batch} images with {} prompts", prompts.len());
        let noted = |ledger: &mut Ledger| {
            let rewards = self.0.iter().filter(|r| counts(r));
            rewards.map(|r| r.reported(images, prompts, ledger)).collect::<Result<Vec<_>>>()
        };
        let (scores, readings) = Ledger::around(noted)?;
        let row = |image: usize| scores.iter().map(|reward| readings.get(reward[image])).collect();
        Ok((0..prompts.len()).map(row).collect())
    }

    /// How much an image's loss rises where it is moved against the rewards by `rho` ([`Judged::moved_against`]): RSA-FT's S1, for one
    /// reward of weight 1 the fall of its score. Large where a score is high for reasons that the next picture does not share.
    /// Waits for a GPU.
    ///
    /// # Errors
    /// As [`Self::judge`].
    pub fn sharpness(&self, image: &Tensor, prompt: &Prompt, rho: f64) -> Result<f64> {
        let prompt = std::slice::from_ref(prompt);
        let judged = |ledger: &mut Ledger| {
            let judged = self.judge(image, prompt, ledger)?;
            let plain = judged.scores()[0].clone();
            let moved = self.judge(&judged.moved_against(rho)?, prompt, ledger)?;
            Ok((plain, moved.scores()[0].clone()))
        };
        let ((plain, moved), readings) = Ledger::around(judged)?;
        Ok(moved.loss(self, &readings) - plain.loss(self, &readings))
    }

    /// Scores of images (B, 3, H, W) in [-1, 1], recorded for [`Judged::pull`]. What is trained shares one tape; what is not
    /// is not on it.
    ///
    /// # Errors
    /// A score that is not finite, here or when the ledger is read. A score without a gradient that has a weight.
    pub fn judge(&self, images: &Tensor, prompts: &[Prompt], ledger: &mut Ledger) -> Result<Judged> {
        self.judge_by(images, prompts, ledger, |_| true)
    }

    /// [`Self::judge`] without what is computed elsewhere ([`Score::is_elsewhere`]): for measuring what the others need.
    ///
    /// # Errors
    /// As there.
    pub fn judge_here(&self, images: &Tensor, prompts: &[Prompt], ledger: &mut Ledger) -> Result<Judged> {
        self.judge_by(images, prompts, ledger, |r| !r.judge.score().is_elsewhere())
    }

    fn judge_by(
        &self,
        images: &Tensor,
        prompts: &[Prompt],
        ledger: &mut Ledger,
        counts: impl Fn(&Weighted) -> bool,
    ) -> Result<Judged> {
        let batch = images.dims4()?.0;
        ensure!(prompts.len() == batch, "{batch} images with {} prompts", prompts.len());
        let rewards: Vec<&Weighted> = self.0.iter().filter(|r| counts(r)).collect();
        let (tape, mut trained) = (Tape::new(), Vec::new());
        let leaf = tape.leaf(images);
        let on_tape = TapedImages::new(leaf.clone());
        let mut differentiated: Vec<Option<Vec<Number>>> = Vec::with_capacity(rewards.len());
        for r in &rewards {
            let Some(reward) = r.trained() else {
                ensure!(
                    r.weight == 0.0,
                    "the reward `{}` has no gradient, and a weight of {}: set its weight to 0, and it is scored and not trained",
                    r.name,
                    r.weight
                );
                differentiated.push(None);
                continue;
            };
            let score = reward.on_tape(&on_tape, prompts)?;
            ensure!(
                score.is_on_tape(),
                "no gradient can reach the images from the reward `{}`: its score is cut off",
                r.name
            );
            let numbers = ledger.numbers(score.tensor())?;
            differentiated.push(Some(r.checked(numbers, batch, ledger)?));
            let slope = r.slope(reward, &score.tensor().to_dtype(DType::F64)?)?;
            trained.push((score, slope));
        }
        // the others come second: then the features of the towers that they share are known
        let constant = on_tape.off_tape();
        let mut scores: Vec<ImageScores> =
            (0..batch).map(|_| ImageScores { reported: Vec::new(), differentiated: Vec::new() }).collect();
        for (r, differentiated) in rewards.into_iter().zip(differentiated) {
            let reported = match &differentiated {
                Some(numbers) if !r.trained().is_some_and(|reward| reward.is_stand_in()) => numbers.clone(),
                _ => r.reported(&constant, prompts, ledger)?,
            };
            let differentiated = differentiated.unwrap_or_else(|| vec![0.0.into(); batch]);
            for (image, (reported, differentiated)) in scores.iter_mut().zip(reported.into_iter().zip(differentiated)) {
                image.reported.push(reported);
                image.differentiated.push(differentiated);
            }
        }
        Ok(Judged { tape, images: leaf, trained, scores })
    }
}

/// CLIP models and detectors by their path, so that two rewards on one model share its weights.
struct Towers {
    /// Whether some reward on this model reads text.
    with_text: Vec<String>,
    loaded: HashMap<String, Arc<Clip>>,
    /// By their path and the size of their images.
    detectors: HashMap<(String, Option<usize>), Arc<Detector>>,
    compute: Compute,
}

impl Towers {
    fn new(config: &RewardsConfig, compute: &Compute) -> Self {
        let with_text =
            [config.clip_score.as_ref().map(|c| c.model.clone()), config.pickscore.as_ref().map(|c| c.model.clone())];
        Self {
            with_text: with_text.into_iter().flatten().collect(),
            loaded: HashMap::new(),
            detectors: HashMap::new(),
            compute: compute.clone(),
        }
    }

    /// For the reward `name`.
    fn detector(&mut self, name: &str, model: &str, size: Option<usize>) -> Result<Arc<Detector>> {
        let key = (model.to_owned(), size);
        if let Some(detector) = self.detectors.get(&key) {
            return Ok(detector.clone());
        }
        let loaded = Detector::load(model, size, &self.compute);
        let detector = Arc::new(loaded.with_context(|| format!("loading the reward `{name}`"))?);
        self.detectors.insert(key, detector.clone());
        Ok(detector)
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
        let noted = |ledger: &mut Ledger| rewards.judge(&picture(), &[PROMPT.into()], ledger);
        let (judged, readings) = Ledger::around(noted).unwrap();
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
            assert_eq!(rewards.scores(&picture(), &[PROMPT.into()]).unwrap()[0], found);
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
