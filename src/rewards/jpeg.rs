//! How well an image compresses: minus its size as a JPEG file (Black et al. 2023, DDPO), or plus.
//!
//! A file's size has no gradient. The loss is that of a smooth stand-in, `ops::jpeg_size`; the scores that are shown are
//! sizes of files.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor};
use jpeg_encoder::{ChromaSubsamplingMethod, ColorType, Encoder, SamplingFactor};

use super::{Differentiable, Judge, Objective, Score, TapedImages};
use crate::config::Prompt;
use crate::nn::Value;
use crate::nn::layers::{activation, jpeg_size};
use crate::ops::activation::{Activation, activation_fwd};
use crate::ops::{Ledger, Number};

/// PIL's and DDPO's. The tables of `ops::jpeg_size` are of this quality.
const QUALITY: u8 = 95;

struct Jpeg {
    /// Of a kilobyte of 1000 bytes, as in DDPO: -1 where small files are wanted, 1 where large ones are.
    per_kilobyte: f64,
}

impl Score for Jpeg {
    fn scores(&self, images: &TapedImages, _prompts: &[Prompt], ledger: &mut Ledger) -> Result<Vec<Number>> {
        let score = |row: usize| {
            let per_kilobyte = self.per_kilobyte;
            let size = move |pixels: &Tensor| Ok(per_kilobyte * encode(pixels)?.len() as f64 / 1000.0);
            ledger.counted(&to_pixels(&images.image(row)?)?, size)
        };
        (0..images.batch()?).map(score).collect()
    }
}

impl Differentiable for Jpeg {
    fn on_tape(&self, images: &TapedImages, _prompts: &[Prompt]) -> Result<Value> {
        let bytes = jpeg_size(&activation(images.value()?, Activation::UnitRange)?)?;
        Ok(bytes.affine(self.per_kilobyte / 1000.0, 0.0)?)
    }

    fn is_stand_in(&self) -> bool {
        true
    }

    fn objective(&self) -> Objective {
        Objective::Maximize
    }
}

/// Minus the kilobytes.
pub(super) fn compressibility() -> Judge {
    Judge::differentiable(Jpeg { per_kilobyte: -1.0 })
}

/// The kilobytes.
pub(super) fn incompressibility() -> Judge {
    Judge::differentiable(Jpeg { per_kilobyte: 1.0 })
}

/// One image (3, H, W) in [-1, 1] as a JPEG file of quality 95: 4:2:0, the standard's tables, as PIL writes it.
///
/// # Errors
/// More than 65535 pixels along a side, which the format does not have.
pub fn jpeg_bytes(image: &Tensor) -> Result<Vec<u8>> {
    encode(&to_pixels(image)?)
}

/// 8-bit pixels (H, W, 3) as a file.
fn encode(pixels: &Tensor) -> Result<Vec<u8>> {
    let (height, width, _) = pixels.dims3()?;
    let side = |n: usize| u16::try_from(n).with_context(|| format!("a JPEG of {width}x{height} pixels"));
    let mut file = Vec::new();
    let mut encoder = Encoder::new(&mut file, QUALITY);
    encoder.set_sampling_factor(SamplingFactor::F_2_2);
    encoder.set_chroma_subsampling_method(ChromaSubsamplingMethod::Average);
    encoder.encode(&pixels.flatten_all()?.to_vec1()?, side(width)?, side(height)?, ColorType::Rgb)?;
    Ok(file)
}

/// One image (3, H, W) in [-1, 1] as 8-bit pixels, (H, W, 3), rounded as diffusers rounds.
pub fn to_bytes(image: &Tensor) -> Result<Vec<u8>> {
    Ok(to_pixels(image)?.flatten_all()?.to_vec1()?)
}

/// [`to_bytes`] where the image is.
fn to_pixels(image: &Tensor) -> Result<Tensor> {
    let (channels, _, _) = image.dims3()?;
    ensure!(channels == 3, "an image of {channels} channels");
    let unit = activation_fwd(&image.permute((1, 2, 0))?.contiguous()?, Activation::UnitRange)?;
    Ok((unit * 255.0)?.round()?.to_dtype(DType::U8)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Tape;
    use crate::ops::testing::Case;
    use candle_core::{DType, Device};

    /// Noise, blurred noise and waves of several strengths and sizes, (1, 3, H, W).
    fn pictures() -> Vec<Tensor> {
        let mut pictures = Vec::new();
        for seed in 0..60u64 {
            let (h, w) = [(64, 64), (64, 64), (50, 37), (96, 32)][seed as usize % 4];
            let strength = 0.02 + 0.6 * (seed as f64 * 0.618).fract();
            let mut x = (Case::normal(&[1, 3, h, w], seed) * strength).unwrap();
            for _ in 0..seed % 3 * 2 {
                // a box of 2x2, its border repeated
                let shifted = |x: &Tensor, axis: usize| {
                    let n = x.dim(axis).unwrap();
                    let rest = x.narrow(axis, 1, n - 1).unwrap();
                    Tensor::cat(&[rest, x.narrow(axis, n - 1, 1).unwrap()], axis).unwrap()
                };
                x = ((&x + shifted(&x, 2)).unwrap() * 0.5).unwrap();
                x = ((&x + shifted(&x, 3)).unwrap() * 0.5).unwrap();
            }
            if seed % 5 == 0 {
                let wave: Vec<f64> = (0..w).map(|i| (i as f64 * 0.05 * (seed + 1) as f64).sin()).collect();
                x = x.broadcast_add(&Tensor::from_vec(wave, (1, 1, 1, w), &Device::Cpu).unwrap()).unwrap();
            }
            pictures.push(x.to_dtype(DType::F32).unwrap());
        }
        pictures
    }

    /// The reported score.
    fn exact(reward: &Jpeg, image: &Tensor) -> f64 {
        let images = TapedImages::new(Value::constant(image));
        let (scores, readings) = Ledger::around(|ledger| reward.scores(&images, &[], ledger)).unwrap();
        readings.get(scores[0])
    }

    const SMALL: Jpeg = Jpeg { per_kilobyte: -1.0 };
    const LARGE: Jpeg = Jpeg { per_kilobyte: 1.0 };

    /// The differentiated score, (1).
    fn stand_in(reward: &Jpeg, image: &Value) -> Value {
        reward.on_tape(&TapedImages::new(image.clone()), &[]).unwrap()
    }

    fn pearson(pairs: &[(f64, f64)]) -> f64 {
        let n = pairs.len() as f64;
        let mean = |f: &dyn Fn(&(f64, f64)) -> f64| pairs.iter().map(f).sum::<f64>() / n;
        let (mx, my) = (mean(&|p| p.0), mean(&|p| p.1));
        let covariance = mean(&|p| (p.0 - mx) * (p.1 - my));
        covariance / (mean(&|p| (p.0 - mx).powi(2)) * mean(&|p| (p.1 - my).powi(2))).sqrt()
    }

    #[test]
    fn the_stand_in_follows_the_size_of_the_file() {
        let smooth =
            |x: &Tensor| f64::from(stand_in(&SMALL, &Value::constant(x)).tensor().to_vec1::<f32>().unwrap()[0]);
        let pairs: Vec<(f64, f64)> = pictures().iter().map(|x| (exact(&SMALL, x), smooth(x))).collect();
        let correlation = pearson(&pairs);
        assert!(correlation > 0.995, "Pearson {correlation}");
        for (exact, smooth) in &pairs {
            assert!((smooth / exact - 1.0).abs() < 0.15, "{exact} kB and {smooth} kB");
        }
        // and where sizes are near each other
        let small: Vec<_> = pairs.into_iter().filter(|(exact, _)| *exact > -3.0).collect();
        assert!(small.len() > 10 && pearson(&small) > 0.98, "{} pictures, Pearson {}", small.len(), pearson(&small));
    }

    #[test]
    fn following_the_gradient_makes_the_file_smaller_or_larger() {
        let gradient = |reward: &Jpeg, x: &Tensor| {
            let tape = Tape::new();
            let leaf = tape.leaf(x);
            let score = stand_in(reward, &leaf);
            tape.backward(&[(&score, &score.tensor().ones_like().unwrap())]).unwrap().take(&leaf, "x").unwrap()
        };
        let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let followed = |reward: &Jpeg, x: &Tensor| {
            (0..20).fold(x.clone(), |x, _| {
                let d = gradient(reward, &x);
                (&x + (&d * f64::from(0.01 * norm(&x) / norm(&d))).unwrap()).unwrap()
            })
        };
        let kilobytes = |x: &Tensor| exact(&LARGE, x);
        for x in &pictures()[1..5] {
            let (less, now, more) = (kilobytes(&followed(&SMALL, x)), kilobytes(x), kilobytes(&followed(&LARGE, x)));
            assert!(less < 0.98 * now && now < 0.98 * more, "{less}, {now} and {more} kB");
        }
    }

    #[test]
    fn the_file_is_a_jpeg_of_the_image() {
        let x = pictures()[1].squeeze(0).unwrap();
        let picture = image::load_from_memory(&jpeg_bytes(&x).unwrap()).unwrap().to_rgb8();
        assert_eq!(picture.dimensions(), (64, 64));
        let error: f64 =
            picture.iter().zip(to_bytes(&x).unwrap()).map(|(a, b)| (f64::from(*a) - f64::from(b)).abs()).sum();
        assert!(error / 64.0 / 64.0 / 3.0 < 30.0, "{error}");
    }
}
