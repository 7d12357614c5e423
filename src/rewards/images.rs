//! Images as rewards see them: what several of them ask of the same images is computed once.

use std::cell::{OnceCell, RefCell};
use std::io::Cursor;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use image::{ImageFormat, RgbImage};

use super::{Detector, Preprocessor, bytes, to_bytes};
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

/// A batch of images, and what CLIP towers and detectors have found in them so far.
///
/// The images are a tensor (B, 3, H, W) in [-1, 1], or pictures that exist, each of any size.
///
/// A tower runs once for each way of preprocessing, however many rewards read its features, and a detector once. Where the images are on a
/// tape, so are the features: their cotangents are summed there, and go back through the tower once too.
pub struct TapedImages {
    /// Made of the pictures where it is asked for.
    images: OnceCell<Value>,
    pictures: Vec<RgbImage>,
    features: RefCell<Vec<Features>>,
    /// Logits (B, Q, classes + 1).
    detections: RefCell<Vec<(Arc<Detector>, Value)>>,
    device: Device,
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
        let device = images.tensor().device().clone();
        Self {
            images: images.into(),
            pictures: Vec::new(),
            features: RefCell::default(),
            detections: RefCell::default(),
            device,
        }
    }

    /// Pictures of any sizes, which are only scored, with towers on `device`.
    pub fn of_pictures(pictures: Vec<RgbImage>, device: &Device) -> Self {
        let (features, detections) = Default::default();
        Self { images: OnceCell::new(), pictures, features, detections, device: device.clone() }
    }

    /// The pictures that [`Self::of_pictures`] was given.
    pub fn into_pictures(self) -> Vec<RgbImage> {
        self.pictures
    }

    /// (B, 3, H, W) in [-1, 1].
    ///
    /// # Errors
    /// They are pictures of several sizes.
    pub fn value(&self) -> Result<&Value> {
        if let Some(value) = self.images.get() {
            return Ok(value);
        }
        let size = self.pictures.first().map(RgbImage::dimensions);
        ensure!(
            self.pictures.iter().all(|picture| Some(picture.dimensions()) == size),
            "pictures of several sizes are no single batch"
        );
        let images = (0..self.pictures.len()).map(|i| self.image(i)).collect::<Result<Vec<_>>>()?;
        let images = Tensor::stack(&images, 0)?;
        Ok(self.images.get_or_init(|| Value::from(images)))
    }

    /// As [`Self::value`].
    ///
    /// # Errors
    /// As there.
    pub fn tensor(&self) -> Result<&Tensor> {
        Ok(self.value()?.tensor())
    }

    /// How many they are.
    ///
    /// # Errors
    /// The tensor is no batch of images.
    pub fn batch(&self) -> Result<usize> {
        match self.pictures.len() {
            0 => Ok(self.tensor()?.dims4()?.0),
            pictures => Ok(pictures),
        }
    }

    /// One image, (3, H, W) in [-1, 1]; of pictures too that have several sizes.
    ///
    /// # Errors
    /// There is no such image.
    pub fn image(&self, row: usize) -> Result<Tensor> {
        match self.pictures.get(row) {
            Some(picture) => Ok(bytes::to_tensor(picture, &self.device)?.squeeze(0)?),
            None => Ok(self.tensor()?.get(row)?),
        }
    }

    /// Projected features (B, D) of CLIP's image tower, not normalised, in f32.
    pub fn features(&self, clip: &Arc<Clip>, preprocessor: &Preprocessor) -> Result<Value> {
        let preprocess = preprocessor.method();
        let same = |known: &&Features| Arc::ptr_eq(&known.clip, clip) && known.preprocess == preprocess;
        if let Some(known) = self.features.borrow().iter().find(same) {
            return Ok(known.value.clone());
        }
        let value = clip.vision.forward(&self.pixels(preprocessor)?)?;
        self.features.borrow_mut().push(Features { clip: clip.clone(), preprocess, value: value.clone() });
        Ok(value)
    }

    /// What `preprocessor` makes of the images.
    pub fn pixels(&self, preprocessor: &Preprocessor) -> Result<Value> {
        match &*self.pictures {
            [] => preprocessor.apply(self.value()?),
            pictures => Ok(preprocessor.of_pictures(pictures)?.into()),
        }
    }

    /// Logits (B, Q, classes + 1) of what a detector sees.
    pub fn detections(&self, detector: &Arc<Detector>) -> Result<Value> {
        if let Some((_, known)) = self.detections.borrow().iter().find(|(known, _)| Arc::ptr_eq(known, detector)) {
            return Ok(known.clone());
        }
        let logits = match self.pictures.len() {
            0 => detector.logits(self.value()?)?,
            // each in its own size
            pictures => {
                let logits = |i| Ok(detector.logits(&self.image(i)?.unsqueeze(0)?.into())?.into_tensor());
                Tensor::cat(&(0..pictures).map(logits).collect::<Result<Vec<_>>>()?, 0)?.into()
            }
        };
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
        let images = self.images.get().map_or_else(OnceCell::new, |value| Value::constant(value.tensor()).into());
        let (pictures, device) = (self.pictures.clone(), self.device.clone());
        Self { images, pictures, features: RefCell::new(features), detections: RefCell::new(detections), device }
    }
}
