//! Images as rewards see them: what several of them ask of the same images is computed once.

use std::cell::RefCell;
use std::io::Cursor;
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::Tensor;
use image::{ImageFormat, RgbImage};

use super::{Preprocessor, to_bytes};
use crate::config::Preprocess;
use crate::models::clip::Clip;
use crate::nn::Value;

/// One image (3, H, W) in [-1, 1] as a PNG file, rounded as diffusers rounds.
pub(super) fn png_bytes(image: &Tensor) -> Result<Vec<u8>> {
    let (_, height, width) = image.dims3()?;
    let picture =
        RgbImage::from_raw(width as u32, height as u32, to_bytes(image)?).context("an image without pixels")?;
    let mut file = Cursor::new(Vec::new());
    picture.write_to(&mut file, ImageFormat::Png)?;
    Ok(file.into_inner())
}

/// A batch of images (B, 3, H, W) in [-1, 1], and the features that CLIP towers have found in them so far.
///
/// A tower runs once for each way of preprocessing, however many rewards read its features. Where the images are on a
/// tape, so are the features: their cotangents are summed there, and go back through the tower once too.
pub struct TapedImages {
    images: Value,
    features: RefCell<Vec<Features>>,
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
        Self { images, features: RefCell::default() }
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

    /// The same images as constants, with the features that are known: nothing made of them is recorded.
    pub(super) fn off_tape(&self) -> Self {
        let constant = |known: &Features| Features {
            clip: known.clip.clone(),
            preprocess: known.preprocess,
            value: Value::constant(known.value.tensor()),
        };
        let features = self.features.borrow().iter().map(constant).collect();
        Self { images: Value::constant(self.tensor()), features: RefCell::new(features) }
    }
}
