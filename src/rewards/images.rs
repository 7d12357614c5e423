//! Images as rewards see them: what several of them ask of the same images is computed once.

use std::cell::RefCell;
use std::sync::Arc;

use anyhow::Result;
use candle_core::Tensor;

use super::{Detector, Preprocessor};
use crate::config::Preprocess;
use crate::models::clip::Clip;
use crate::nn::Value;

/// A batch of images (B, 3, H, W) in [-1, 1], and what CLIP towers and detectors have found in them so far.
///
/// A tower runs once for each way of preprocessing, however many rewards read its features, and a detector once. Where the images are on a
/// tape, so are the features: their cotangents are summed there, and go back through the tower once too.
pub struct TapedImages {
    images: Value,
    features: RefCell<Vec<Features>>,
    /// Logits (B, Q, classes + 1).
    detections: RefCell<Vec<(Arc<Detector>, Value)>>,
}

struct Features {
    clip: Arc<Clip>,
    preprocess: Preprocess,
    /// (B, D)
    value: Value,
}

impl TapedImages {
    /// Images on a tape, or constant ones, which are only scored.
    pub fn new(images: Value) -> Self {
        Self { images, features: RefCell::default(), detections: RefCell::default() }
    }

    pub fn value(&self) -> &Value {
        &self.images
    }
    pub fn tensor(&self) -> &Tensor {
        self.images.tensor()
    }

    /// Projected features (B, D) of CLIP's image tower, not normalised, in f32.
    pub fn features(&self, clip: &Arc<Clip>, preprocessor: &Preprocessor) -> Result<Value> {
        let preprocess = preprocessor.method();
        let same = |known: &&Features| Arc::ptr_eq(&known.clip, clip) && known.preprocess == preprocess;
        if let Some(known) = self.features.borrow().iter().find(same) {
            return Ok(known.value.clone());
        }
        let value = clip.vision.forward(&preprocessor.apply(&self.images)?)?;
        self.features.borrow_mut().push(Features { clip: clip.clone(), preprocess, value: value.clone() });
        Ok(value)
    }

    /// Logits (B, Q, classes + 1) of what a detector sees.
    pub fn detections(&self, detector: &Arc<Detector>) -> Result<Value> {
        if let Some((_, known)) = self.detections.borrow().iter().find(|(known, _)| Arc::ptr_eq(known, detector)) {
            return Ok(known.clone());
        }
        let logits = detector.logits(&self.images)?;
        self.detections.borrow_mut().push((detector.clone(), logits.clone()));
        Ok(logits)
    }

    /// The same images as constants, with the features that are known: nothing made of them is recorded.
    pub(super) fn off_tape(&self) -> Self {
        let constant = |known: &Features| Features {
            clip: known.clip.clone(),
            preprocess: known.preprocess,
            value: Value::constant(known.value.tensor()),
        };
        let features = self.features.borrow().iter().map(constant).collect();
        let seen = self.detections.borrow();
        let detections = seen.iter().map(|(detector, x)| (detector.clone(), Value::constant(x.tensor()))).collect();
        Self {
            images: Value::constant(self.tensor()),
            features: RefCell::new(features),
            detections: RefCell::new(detections),
        }
    }
}
