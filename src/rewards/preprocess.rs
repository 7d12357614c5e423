//! From an image to the pixels of a CLIP tower or a detector: differentiably for images in the making, and from the bytes of
//! pictures as the packages do it whose scores are published.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use image::RgbImage;
use rayon::prelude::*;

use super::bytes;
use crate::config::Preprocess;
use crate::models::clip::{Clip, PixelStatistics};
use crate::nn::layers::activation;
use crate::nn::{Linear, Value};
use crate::ops::activation::Activation;
use crate::ops::device::upload;

/// From images (B, 3, H, W) in [-1, 1] to normalised pixels (B, 3, side, side), in f32.
pub struct Preprocessor {
    method: Preprocess,
    side: usize,
    resizer: Resizer,
    normaliser: Normaliser,
}

impl Preprocessor {
    /// For images on `device` and a tower that takes `side` by `side` pixels, normalised by `pixels`.
    ///
    /// # Errors
    /// The device's.
    pub fn new(method: Preprocess, side: usize, pixels: &PixelStatistics, device: &Device) -> Result<Self> {
        let filter = match method {
            Preprocess::ClipOfficial | Preprocess::Hpsv2Official => Filter::Bicubic,
            Preprocess::Alignprop | Preprocess::Squash => Filter::Bilinear,
        };
        let (resizer, normaliser) = (Resizer::new(filter, device), Normaliser::new(pixels, device)?);
        Ok(Self { method, side, resizer, normaliser })
    }

    /// For the tower of `clip`.
    ///
    /// # Errors
    /// The device's.
    pub fn of(clip: &Clip, method: Preprocess, device: &Device) -> Result<Self> {
        Self::new(method, clip.vision.image_size(), &clip.pixels, device)
    }

    pub fn device(&self) -> &Device {
        &self.resizer.device
    }

    /// With what belongs to the tower, all that decides the pixels.
    pub fn method(&self) -> Preprocess {
        self.method
    }

    /// The pixels of images.
    pub fn apply(&self, images: &Value) -> Result<Value> {
        let (mut x, side) = (activation(images, Activation::UnitRange)?, self.side);
        let (_, _, h, w) = x.tensor().dims4()?;
        let (height, width) = self.resized(h, w);
        x = self.resizer.resize(&x, height, width)?;
        if self.resizer.filter == Filter::Bicubic && (h, w) != (height, width) {
            // bicubic overshoots; an 8-bit image cannot
            x = activation(&x.affine(2.0, -1.0)?, Activation::UnitRange)?;
        }
        if height > side || width > side {
            x = x.narrow(2, crop(height, side), side)?.narrow(3, crop(width, side), side)?;
        } else if height < side || width < side {
            x = pad(&x, side, side)?;
        }
        self.normaliser.apply(&x)
    }

    /// The pixels (N, 3, side, side) of N pictures of any sizes. The methods of published scores resize bytes, as PIL does.
    ///
    /// # Errors
    /// A picture is so narrow that its other side would be enlarged out of all proportion.
    pub fn of_pictures(&self, pictures: &[RgbImage]) -> Result<Tensor> {
        let (side, device) = (self.side, &self.resizer.device);
        if matches!(self.method, Preprocess::Alignprop | Preprocess::Squash) {
            let pixels = pictures.iter().map(|picture| {
                let (width, height) = picture.dimensions();
                ensure!(
                    width.max(height) / width.min(height).max(1) <= 64,
                    "a picture of {width}x{height} pixels is too narrow for this preprocessing"
                );
                Ok(self.apply(&Value::from(bytes::to_tensor(picture, device)?))?.into_tensor())
            });
            return Ok(Tensor::cat(&pixels.collect::<Result<Vec<_>>>()?, 0)?);
        }
        let squares: Vec<RgbImage> = pictures.par_iter().map(|picture| self.square(picture)).collect();
        let planes: Vec<f32> = squares.par_iter().flat_map_iter(bytes::planes).collect();
        let pixels = upload(&Tensor::from_vec(planes, (pictures.len(), 3, side, side), &Device::Cpu)?, device)?;
        Ok(self.normaliser.apply(&pixels.into())?.into_tensor())
    }

    /// [`Self::of_pictures`] up to the normalisation.
    fn square(&self, picture: &RgbImage) -> RgbImage {
        let (h, w) = (picture.height() as usize, picture.width() as usize);
        let (height, width) = self.resized(h, w);
        let window = |n: usize| if n > self.side { crop(n, self.side)..crop(n, self.side) + self.side } else { 0..n };
        let resized = bytes::resize(picture, (width, height), (window(width), window(height)), self.resizer.filter);
        let side = self.side as u32;
        if resized.dimensions() == (side, side) {
            return resized;
        }
        let mut square = RgbImage::new(side, side);
        let (left, top) = ((side - resized.width()) / 2, (side - resized.height()) / 2);
        image::imageops::replace(&mut square, &resized, left.into(), top.into());
        square
    }

    /// The height and width that an image is resized to; what is more than the square's is cropped, what is less padded.
    fn resized(&self, h: usize, w: usize) -> (usize, usize) {
        let side = self.side;
        match self.method {
            Preprocess::Alignprop | Preprocess::ClipOfficial => {
                // torchvision's resize of the short side
                let short = h.min(w);
                let scaled = |n: usize| if n == short { side } else { side * n / short };
                (scaled(h), scaled(w))
            }
            Preprocess::Hpsv2Official => {
                // open_clip's resize of the longest side
                let scale = side as f64 / h.max(w) as f64;
                let scaled = |n: usize| ((n as f64 * scale).round_ties_even() as usize).clamp(1, side);
                (scaled(h), scaled(w))
            }
            Preprocess::Squash => (side, side),
        }
    }
}

/// From pixels in [0, 1] to those of a network: (x - mean) / std for each colour.
pub struct Normaliser {
    /// (1, 3, 1, 1)
    scale: Tensor,
    /// (1, 3, 1, 1)
    offset: Tensor,
}

impl Normaliser {
    /// For pixels on `device`.
    ///
    /// # Errors
    /// The device's.
    pub fn new(pixels: &PixelStatistics, device: &Device) -> Result<Self> {
        let per_channel = |values: [f32; 3]| Tensor::from_vec(values.to_vec(), (1, 3, 1, 1), device);
        let (scale, offset) = pixels.affine();
        Ok(Self { scale: per_channel(scale)?, offset: per_channel(offset)? })
    }

    /// (B, 3, H, W) -> (B, 3, H, W).
    pub fn apply(&self, x: &Value) -> Result<Value> {
        Ok(x.mul_constant(&self.scale)?.add_constant(&self.offset)?)
    }
}

/// Antialiased resampling of images.
pub struct Resizer {
    filter: Filter,
    device: Device,
    /// The matrices that took (inputs) to (outputs) so far: a run's images have one size.
    matrices: Mutex<HashMap<(usize, usize), Linear>>,
}

impl Resizer {
    /// For images on `device`.
    pub fn new(filter: Filter, device: &Device) -> Self {
        Self { filter, device: device.clone(), matrices: Mutex::default() }
    }

    /// (B, C, H, W) -> (B, C, height, width): one matrix product for each axis, so the gradient is their transpose.
    pub fn resize(&self, x: &Value, height: usize, width: usize) -> Result<Value> {
        let (_, _, h, w) = x.tensor().dims4()?;
        let mut x = x.clone();
        if w != width {
            x = self.matrix(w, width)?.forward(&x)?;
        }
        if h != height {
            x = x.permute(&[0, 1, 3, 2])?;
            x = self.matrix(h, height)?.forward(&x)?;
            x = x.permute(&[0, 1, 3, 2])?;
        }
        Ok(x)
    }

    /// torchvision's resize of the short side, then its centre crop: (B, C, H, W) -> (B, C, side, side).
    pub fn short_side_and_centre(&self, x: &Value, side: usize) -> Result<Value> {
        let (_, _, h, w) = x.tensor().dims4()?;
        let short = h.min(w);
        let [height, width] = [h, w].map(|n| if n == short { side } else { side * n / short });
        let x = self.resize(x, height, width)?;
        Ok(x.narrow(2, crop(height, side), side)?.narrow(3, crop(width, side), side)?)
    }

    /// Made once, and uploaded once where images are on a GPU.
    fn matrix(&self, inputs: usize, outputs: usize) -> Result<Linear> {
        let mut matrices = self.matrices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = matrices.get(&(inputs, outputs)) {
            return Ok(made.clone());
        }
        let matrix = upload(&resize_matrix(inputs, outputs, self.filter)?, &self.device)?;
        let made = Linear::new(&matrix, None)?;
        if matrices.len() >= MOST_MATRICES {
            matrices.clear(); // files of many sizes
        }
        matrices.insert((inputs, outputs), made.clone());
        Ok(made)
    }
}

/// Matrices that are kept.
const MOST_MATRICES: usize = 32;

/// Where torchvision's centre crop of `side` begins.
fn crop(n: usize, side: usize) -> usize {
    ((n - side) as f64 / 2.0).round_ties_even() as usize
}

/// Zeros around the image, as evenly as it goes.
fn pad(x: &Value, height: usize, width: usize) -> Result<Value> {
    let (_, _, h, w) = x.tensor().dims4()?;
    let (top, left) = ((height - h) / 2, (width - w) / 2);
    let y =
        x.tensor().pad_with_zeros(2, top, height - h - top)?.pad_with_zeros(3, left, width - w - left)?.contiguous()?;
    Ok(Value::step([x], y, move |d| Ok([Some(d.narrow(2, top, h)?.narrow(3, left, w)?.contiguous()?)])))
}

/// An interpolation kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Filter {
    Bilinear,
    /// Keys' cubic with a = -1/2, as PIL has it.
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }
    fn weight(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Self::Bilinear => (1.0 - x).max(0.0),
            Self::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
            Self::Bicubic => 0.0,
        }
    }
}

/// Antialiased resampling of one axis as a matrix (outputs, inputs): PyTorch's `interpolate(antialias=True)` and PIL's.
pub fn resize_matrix(inputs: usize, outputs: usize, filter: Filter) -> candle_core::Result<Tensor> {
    let mut matrix = vec![0f32; outputs * inputs];
    for (row, (first, weights)) in matrix.chunks_mut(inputs).zip(taps(inputs, outputs, 0..outputs, filter)) {
        for (slot, weight) in row[first..].iter_mut().zip(weights) {
            *slot = weight as f32;
        }
    }
    Tensor::from_vec(matrix, (outputs, inputs), &Device::Cpu)
}

/// For each output of `window` the inputs that it is a sum of: the first of them, and their weights.
///
/// The kernel is stretched by the scale where the image shrinks, centred on the output pixel, cut off at the image's
/// border and normalised.
pub(super) fn taps(
    inputs: usize,
    outputs: usize,
    window: Range<usize>,
    filter: Filter,
) -> impl Iterator<Item = (usize, Vec<f64>)> {
    let scale = inputs as f64 / outputs as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    window.map(move |i| {
        let center = scale * (i as f64 + 0.5);
        let first = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(inputs);
        let mut weights: Vec<f64> = (first..end).map(|j| filter.weight((j as f64 - center + 0.5) / stretch)).collect();
        let total: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= total);
        (first, weights)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Tape;
    use crate::ops::testing::{Case, relative_error};
    use candle_core::DType;

    const METHODS: [Preprocess; 4] =
        [Preprocess::Alignprop, Preprocess::ClipOfficial, Preprocess::Hpsv2Official, Preprocess::Squash];

    #[test]
    fn a_constant_image_stays_constant() {
        for (n, m) in [(64, 224), (224, 224), (513, 224), (7, 3), (1, 5)] {
            for filter in [Filter::Bilinear, Filter::Bicubic] {
                let sums = resize_matrix(n, m, filter).unwrap().sum(1).unwrap().to_vec1::<f32>().unwrap();
                assert!(sums.iter().all(|s| (s - 1.0).abs() < 1e-5), "{n} -> {m}: {sums:?}");
            }
        }
    }

    #[test]
    fn halving_averages_with_the_stretched_triangle() {
        let row = resize_matrix(8, 4, Filter::Bilinear).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(row[1], [0.0, 0.125, 0.375, 0.375, 0.125, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn every_method_gives_a_square_with_a_gradient() {
        for method in METHODS {
            for (h, w) in [(20, 31), (31, 20), (16, 16), (8, 8), (100, 3)] {
                let images = (Case::normal(&[1, 3, h, w], 1) * 0.3).unwrap().to_dtype(DType::F32).unwrap();
                let tape = Tape::new();
                let leaf = tape.leaf(&images);
                let preprocessor = Preprocessor::new(method, 16, &PixelStatistics::OPENAI, &Device::Cpu).unwrap();
                let pixels = preprocessor.apply(&leaf).unwrap();
                assert_eq!(pixels.dims(), [1, 3, 16, 16]);
                let d = Case::normal(&[1, 3, 16, 16], 2).to_dtype(DType::F32).unwrap();
                let gradient = tape.backward(&[(&pixels, &d)]).unwrap().take(&leaf, "image").unwrap();
                // a finite difference along the gradient itself; the map is linear away from the clamps
                let step = (&gradient * 1e-3).unwrap();
                let value = |x: Tensor| {
                    let p = preprocessor.apply(&Value::from(x)).unwrap().into_tensor();
                    (p * &d).unwrap().to_dtype(DType::F64).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
                };
                let numeric = (value((&images + &step).unwrap()) - value((&images - &step).unwrap())) / 2e-3;
                let analytic = f64::from(gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
                assert!((numeric / analytic - 1.0).abs() < 1e-2, "{method:?} {h}x{w}: {numeric} and {analytic}");
            }
        }
    }

    #[test]
    fn what_is_kept_of_one_size_does_not_change_another() {
        for method in METHODS {
            let new = || Preprocessor::new(method, 16, &PixelStatistics::OPENAI, &Device::Cpu).unwrap();
            let kept = new();
            for (h, w) in [(20, 31), (31, 20), (20, 31), (24, 24)] {
                let images = Value::from(Case::normal(&[1, 3, h, w], 1).to_dtype(DType::F32).unwrap());
                let pixels = |preprocessor: &Preprocessor| preprocessor.apply(&images).unwrap().into_tensor();
                assert_eq!(relative_error(&pixels(&kept), &pixels(&new())), 0.0, "{method:?} {h}x{w}");
            }
        }
    }

    #[test]
    fn alignprop_leaves_an_image_of_the_right_size_alone() {
        let images = (Case::normal(&[1, 3, 16, 16], 1) * 0.2).unwrap().to_dtype(DType::F32).unwrap();
        let preprocessor =
            Preprocessor::new(Preprocess::Alignprop, 16, &PixelStatistics::OPENAI, &Device::Cpu).unwrap();
        let pixels = preprocessor.apply(&Value::constant(&images)).unwrap().into_tensor();
        let mean = Tensor::new(&[0.481_454_66f32, 0.457_827_5, 0.408_210_73], &Device::Cpu)
            .unwrap()
            .reshape((1, 3, 1, 1))
            .unwrap();
        let std = Tensor::new(&[0.268_629_55f32, 0.261_302_6, 0.275_777_1], &Device::Cpu)
            .unwrap()
            .reshape((1, 3, 1, 1))
            .unwrap();
        let expected = images
            .affine(0.5, 0.5)
            .unwrap()
            .clamp(0f32, 1.0)
            .unwrap()
            .broadcast_sub(&mean)
            .unwrap()
            .broadcast_div(&std)
            .unwrap();
        assert!(relative_error(&pixels, &expected) < 1e-6);
    }

    #[test]
    fn pictures_give_the_pixels_of_images_but_for_rounding_to_bytes() {
        for method in METHODS {
            let preprocessor = Preprocessor::new(method, 16, &PixelStatistics::OPENAI, &Device::Cpu).unwrap();
            let sizes = [(20, 31), (31, 20), (16, 16), (8, 9), (100, 13)];
            let pictures: Vec<RgbImage> = sizes.iter().map(|&(w, h)| smooth(w, h)).collect();
            let together = preprocessor.of_pictures(&pictures).unwrap();
            for (i, picture) in pictures.iter().enumerate() {
                let image = Value::from(bytes::to_tensor(picture, &Device::Cpu).unwrap());
                let expected = preprocessor.apply(&image).unwrap().into_tensor();
                let found = together.narrow(0, i, 1).unwrap();
                let largest = (found - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                // one step of 1/255 at a deviation of 0.26; two passes round
                assert!(largest < 0.02, "{method:?} {:?}: {largest}", picture.dimensions());
            }
        }
        let narrow = RgbImage::new(1, 3000);
        let preprocessor = |method| Preprocessor::new(method, 16, &PixelStatistics::OPENAI, &Device::Cpu).unwrap();
        assert!(preprocessor(Preprocess::Squash).of_pictures(std::slice::from_ref(&narrow)).is_err());
        preprocessor(Preprocess::ClipOfficial).of_pictures(&[narrow]).unwrap();
    }

    /// A picture without sharp edges.
    fn smooth(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let wave = |n: u32, phase: f64| (127.0 + 100.0 * (f64::from(n) / 5.0 + phase).sin()) as u8;
            image::Rgb([wave(x, 0.0), wave(y, 1.0), wave(x + y, 2.0)])
        })
    }
}
