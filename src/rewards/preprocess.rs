//! From a generated image to the pixels of a CLIP tower or a detector, differentiably.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use candle_core::{Device, Tensor};

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
            Preprocess::Hpsv2Official => Filter::Bicubic,
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

    /// With what belongs to the tower, all that decides the pixels.
    pub fn method(&self) -> Preprocess {
        self.method
    }

    /// The pixels of images.
    pub fn apply(&self, images: &Value) -> Result<Value> {
        let (x, side) = (activation(images, Activation::UnitRange)?, self.side);
        let (_, _, h, w) = x.tensor().dims4()?;
        let x = match self.method {
            Preprocess::Alignprop => self.resizer.short_side_and_centre(&x, side)?,
            Preprocess::Hpsv2Official => {
                // open_clip's resize of the longest side, bicubic, and black around it
                let scale = side as f64 / h.max(w) as f64;
                let scaled = |n: usize| ((n as f64 * scale).round_ties_even() as usize).clamp(1, side);
                let x = self.resizer.resize(&x, scaled(h), scaled(w))?;
                // bicubic overshoots; an 8-bit image cannot
                let x = activation(&x.affine(2.0, -1.0)?, Activation::UnitRange)?;
                pad(&x, side, side)?
            }
            Preprocess::Squash => self.resizer.resize(&x, side, side)?,
        };
        self.normaliser.apply(&x)
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
        let long = |n: usize| if n == short { side } else { side * n / short };
        let x = self.resize(x, long(h), long(w))?;
        let offset = |n: usize| ((n - side) as f64 / 2.0).round_ties_even() as usize;
        Ok(x.narrow(2, offset(long(h)), side)?.narrow(3, offset(long(w)), side)?)
    }

    /// Made once, and uploaded once where images are on a GPU.
    fn matrix(&self, inputs: usize, outputs: usize) -> Result<Linear> {
        let mut matrices = self.matrices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = matrices.get(&(inputs, outputs)) {
            return Ok(made.clone());
        }
        let matrix = upload(&resize_matrix(inputs, outputs, self.filter)?, &self.device)?;
        let made = Linear::new(&matrix, None)?;
        matrices.insert((inputs, outputs), made.clone());
        Ok(made)
    }
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
///
/// The kernel is stretched by the scale where the image shrinks, centred on the output pixel, cut off at the image's
/// border and normalised.
pub fn resize_matrix(inputs: usize, outputs: usize, filter: Filter) -> candle_core::Result<Tensor> {
    let scale = inputs as f64 / outputs as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let mut matrix = vec![0f32; outputs * inputs];
    for (i, row) in matrix.chunks_mut(inputs).enumerate() {
        let center = scale * (i as f64 + 0.5);
        let first = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(inputs);
        let weights: Vec<f64> = (first..end).map(|j| filter.weight((j as f64 - center + 0.5) / stretch)).collect();
        let total: f64 = weights.iter().sum();
        for (slot, weight) in row[first..end].iter_mut().zip(weights) {
            *slot = (weight / total) as f32;
        }
    }
    Tensor::from_vec(matrix, (outputs, inputs), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Tape;
    use crate::ops::testing::{Case, relative_error};
    use candle_core::DType;

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
        for method in [Preprocess::Alignprop, Preprocess::Hpsv2Official, Preprocess::Squash] {
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
        for method in [Preprocess::Alignprop, Preprocess::Hpsv2Official, Preprocess::Squash] {
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
}
