//! What a detector sees: how many things of a class, or whether there is one (controllable counts and concept removal of the
//! AlignProp paper, section 5, with objectives that have a gradient everywhere).

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor};

use super::preprocess::{Filter, Normaliser, Resizer};
use super::subject::Vocabulary;
use super::{Differentiable, Judge, Objective, Score, TapedImages};
use crate::config::{CountConfig, ObjectConfig, Prompt};
use crate::models::Source;
use crate::models::yolos::Yolos;
use crate::nn::Value;
use crate::nn::layers::{activation, detections};
use crate::ops::activation::Activation;
use crate::ops::detections::{Asked, Question};
use crate::ops::device::Compute;
use crate::ops::{Ledger, Number};

/// A detector with what an image needs in front of it and what its classes are called.
pub struct Detector {
    pub model: Yolos,
    words: Vocabulary,
    /// Of the short side, in pixels; `None`: the image's own.
    size: Option<usize>,
    resizer: Resizer,
    normaliser: Normaliser,
}

impl Detector {
    /// A folder or hub id in the layout of transformers. `size` is what an image's short side is resized to; without one the
    /// image keeps its size.
    ///
    /// # Errors
    /// It is none, or a file is missing.
    pub fn load(model: &str, size: Option<usize>, compute: &Compute) -> Result<Self> {
        let model = Yolos::load(&Source::open(model)?, compute)?;
        Ok(Self {
            words: Vocabulary::new(model.labels()),
            size,
            resizer: Resizer::new(Filter::Bilinear, compute.device()),
            normaliser: Normaliser::new(&model.pixels, compute.device())?,
            model,
        })
    }

    /// Normalised pixels (B, 3, H', W') of images (B, 3, H, W) in [-1, 1]. What is no multiple of the detector's patch becomes
    /// the next smaller one (by antialiased bilinear resizing).
    pub fn pixels(&self, images: &Value) -> Result<Value> {
        let x = activation(images, Activation::UnitRange)?;
        let (_, _, h, w) = x.tensor().dims4()?;
        let (patch, short) = (self.model.patch_size(), h.min(w));
        let side = |n: usize| {
            let n = self.size.map_or(n, |size| size * n / short);
            (n - n % patch).max(patch)
        };
        self.normaliser.apply(&self.resizer.resize(&x, side(h), side(w))?)
    }

    /// Logits (B, Q, classes + 1) of what is seen in images (B, 3, H, W) in [-1, 1].
    pub fn logits(&self, images: &Value) -> Result<Value> {
        self.model.logits(&self.model.tokens(&self.pixels(images)?)?)
    }

    /// Things of `class` that logits (Q, classes + 1) show with a probability above `threshold`, as transformers'
    /// post-processing counts them.
    fn detected(logits: &Tensor, class: usize, threshold: f64) -> Result<f64> {
        let rows = logits.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let is_seen = |z: &&Vec<f64>| {
            let (own, classes) = (z[class], &z[..z.len() - 1]);
            let probability = 1.0 / z.iter().map(|z| (z - own).exp()).sum::<f64>();
            probability > threshold && classes.iter().all(|z| *z <= own)
        };
        Ok(rows.iter().filter(is_seen).count() as f64)
    }
}

/// What is asked of an image.
#[derive(Clone, Copy)]
enum Ask {
    /// log P(as many as the prompt says)
    Number,
    /// log P(one or more)
    Presence,
    /// log P(none)
    Absence,
    /// How many on average.
    Expected,
    /// How many with a probability above this.
    Detected(f64),
}

struct Detection {
    detector: Arc<Detector>,
    /// The class; `None`: what the prompt says.
    class: Option<usize>,
    ask: Ask,
}

impl Detection {
    fn question(&self, prompt: &Prompt) -> Result<Question> {
        let Detector { words, model, .. } = &*self.detector;
        let class = self.class.map_or_else(|| words.class_of(prompt), Ok)?;
        let asked = match self.ask {
            Ask::Number => Asked::Exactly(words.count_of(prompt, class)?),
            Ask::Presence => Asked::AtLeastOne,
            Ask::Absence => Asked::Exactly(0),
            Ask::Expected | Ask::Detected(_) => Asked::Expected,
        };
        if let Asked::Exactly(n) = asked {
            let most = model.detections();
            ensure!(
                n <= most,
                "the prompt {:?} asks for {n} things, and the detector sees at most {most}",
                prompt.text
            );
        }
        Ok(Question { class, asked })
    }
}

impl Score for Detection {
    fn scores(&self, images: &TapedImages, prompts: &[Prompt], ledger: &mut Ledger) -> Result<Vec<Number>> {
        let Ask::Detected(threshold) = self.ask else {
            return Ok(ledger.numbers(self.on_tape(images, prompts)?.tensor())?);
        };
        let logits = images.detections(&self.detector)?;
        let count = |(row, prompt): (usize, &Prompt)| {
            let class = self.question(prompt)?.class;
            ledger.counted(&logits.tensor().get(row)?, move |logits| Detector::detected(logits, class, threshold))
        };
        prompts.iter().enumerate().map(count).collect()
    }

    fn check(&self, prompt: &Prompt) -> Result<()> {
        self.question(prompt).map(|_| ())
    }
}

impl Differentiable for Detection {
    fn on_tape(&self, images: &TapedImages, prompts: &[Prompt]) -> Result<Value> {
        let questions = prompts.iter().map(|prompt| self.question(prompt)).collect::<Result<Vec<_>>>()?;
        Ok(detections(&images.detections(&self.detector)?, &questions)?)
    }

    fn objective(&self) -> Objective {
        Objective::Maximize
    }
}

/// A reward's name, weight and judge.
type Named = (&'static str, f64, Judge);

/// log P(N = n), and what is only logged beside it.
pub(super) fn count(config: &CountConfig, detector: &Arc<Detector>) -> [Named; 3] {
    let judge = |ask| Detection { detector: detector.clone(), class: None, ask };
    [
        ("count", config.weight, Judge::differentiable(judge(Ask::Number))),
        ("count-expected", 0.0, Judge::Score(Box::new(judge(Ask::Expected)))),
        ("count-detected", 0.0, Judge::Score(Box::new(judge(Ask::Detected(config.threshold))))),
    ]
}

/// log P(N >= 1) or log P(N = 0), and what is only logged beside it.
///
/// # Errors
/// The detector does not know the object.
pub(super) fn object(config: &ObjectConfig, detector: &Arc<Detector>) -> Result<[Named; 3]> {
    let class = config.object.as_deref().map(|name| detector.words.class(name)).transpose();
    let class = class.context("reward.object.object")?;
    let judge = |ask| Detection { detector: detector.clone(), class, ask };
    let ask = if config.remove { Ask::Absence } else { Ask::Presence };
    Ok([
        ("object", config.weight, Judge::differentiable(judge(ask))),
        ("object-expected", 0.0, Judge::Score(Box::new(judge(Ask::Expected)))),
        ("object-detected", 0.0, Judge::Score(Box::new(judge(Ask::Detected(config.threshold))))),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_thing_is_seen_where_its_class_is_the_likeliest_and_above_the_threshold() {
        // two classes and none: probabilities of about 0.8, 0.45 (the likeliest), 0.4 (the other is likelier), 0.1
        let rows = [[2f32, 0.0, 0.0], [0.3, -0.2, 0.0], [0.0, 0.1, -0.5], [-2.0, 0.0, 0.0]];
        let logits = Tensor::new(&rows, &Device::Cpu).unwrap();
        for (threshold, expected) in [(0.9, 0.0), (0.5, 1.0), (0.3, 2.0)] {
            assert_eq!(Detector::detected(&logits, 0, threshold).unwrap(), expected, "{threshold}");
        }
    }
}
