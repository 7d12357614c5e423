//! A smooth stand-in for the size of an image as a JPEG file of quality 95 with 4:2:0 chroma.
//!
//! ```text
//! (r, g, b) -> (y, cb, cr), cb and cr averaged over 2x2 pixels, the border repeated to whole blocks of 16
//! C = D B Dᵗ for each 8x8 block B, D the orthonormal cosine transform;  u = C / q, q the step of the quantisation table
//! bits(u)  = 1/2 log2(1 + u²/s²)        about log2|u| of a large coefficient, smooth at 0
//! nz(u)    = u² / (u² + s²)             about 1 for a coefficient that is not rounded to zero
//! size     = header + block · blocks + Σ over AC of (a bits(u) + b nz(u)) + d Σ bits(u_DC - u_DC of the block to the left)
//!
//! d bits   = u / ((u² + s²) ln 2)       d nz = 2 u s² / (u² + s²)²
//! d_B      = Dᵗ (d_u / q) D             and every step before it is linear: its transpose
//! ```
//!
//! All in f64 inside: a sum over every coefficient, of differences of large numbers. The constants are least squares to libjpeg's sizes; `tools/fit_jpeg.py` fits them and measures the agreement.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{Host, Real, per_dtype, tensor_from};

/// s², in quantisation steps: what is below half a step is rounded to zero.
const BEND: f64 = 0.25;
/// Bytes of a file without pixels, and of each block's end.
const HEADER: f64 = 605.78;
const BLOCK: f64 = 0.5778;
/// Bytes for each unit of bits(u) of a DC difference.
const DC_BITS: f64 = 0.21987;

/// (r, g, b) in [0, 255] to one component, as JFIF has it.
struct Component {
    from_rgb: [f64; 3],
    /// Pixels of the image along one side of a pixel of the plane.
    stride: usize,
    /// The steps of quality 95: Annex K's tables scaled as libjpeg does.
    steps: [u8; 64],
    /// Bytes for each unit of bits(u) and of nz(u) of an AC coefficient.
    ac_bits: f64,
    ac_nonzero: f64,
}

const COMPONENTS: [Component; 3] = [
    Component { from_rgb: [0.299, 0.587, 0.114], stride: 1, steps: LUMA_STEPS, ac_bits: 0.15558, ac_nonzero: 0.3119 },
    Component { from_rgb: [-0.168_735_892, -0.331_264_108, 0.5], ..CHROMA },
    Component { from_rgb: [0.5, -0.418_687_589, -0.081_312_411], ..CHROMA },
];

const CHROMA: Component =
    Component { from_rgb: [0.0; 3], stride: 2, steps: CHROMA_STEPS, ac_bits: 0.34197, ac_nonzero: 0.042109 };

#[rustfmt::skip]
const LUMA_STEPS: [u8; 64] = [
    2, 1, 1, 2, 2, 4, 5, 6,
    1, 1, 1, 2, 3, 6, 6, 6,
    1, 1, 2, 2, 4, 6, 7, 6,
    1, 2, 2, 3, 5, 9, 8, 6,
    2, 2, 4, 6, 7, 11, 10, 8,
    2, 4, 6, 6, 8, 10, 11, 9,
    5, 6, 8, 9, 10, 12, 12, 10,
    7, 9, 10, 10, 11, 10, 10, 10,
];
#[rustfmt::skip]
const CHROMA_STEPS: [u8; 64] = [
    2, 2, 2, 5, 10, 10, 10, 10,
    2, 2, 3, 7, 10, 10, 10, 10,
    2, 3, 6, 10, 10, 10, 10, 10,
    5, 7, 10, 10, 10, 10, 10, 10,
    10, 10, 10, 10, 10, 10, 10, 10,
    10, 10, 10, 10, 10, 10, 10, 10,
    10, 10, 10, 10, 10, 10, 10, 10,
    10, 10, 10, 10, 10, 10, 10, 10,
];

/// Sizes in bytes (B) of pixels (B, 3, H, W) in [0, 1].
pub fn jpeg_size_fwd(pixels: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if pixels.device().is_cuda() {
        return cuda::jpeg_size_fwd(pixels);
    }
    per_dtype!(pixels, jpeg_size_fwd_cpu(pixels))
}

/// cotangent (B) -> gradient of the pixels (B, 3, H, W).
pub fn jpeg_size_bwd(cotangent: &Tensor, pixels: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if pixels.device().is_cuda() {
        return cuda::jpeg_size_bwd(cotangent, pixels);
    }
    per_dtype!(pixels, jpeg_size_bwd_cpu(cotangent, pixels))
}

fn jpeg_size_fwd_cpu<T: Real>(pixels: &Tensor) -> Result<Tensor> {
    let (batch, h, w) = dims(pixels)?;
    let data = Host::<T>::read(pixels)?;
    let sizes: Vec<T> = data
        .par_chunks(3 * h * w)
        .map(|image| {
            let bytes = COMPONENTS.iter().map(|component| Plane::of(image, h, w, component).bytes(component));
            T::lit(HEADER + bytes.sum::<f64>())
        })
        .collect();
    tensor_from(sizes, batch)
}

fn jpeg_size_bwd_cpu<T: Real>(cotangent: &Tensor, pixels: &Tensor) -> Result<Tensor> {
    let (batch, h, w) = dims(pixels)?;
    if cotangent.dims() != [batch] {
        bail!("jpeg_size: a cotangent of shape {:?} for {batch} images", cotangent.dims());
    }
    let (data, d) = (Host::<T>::read(pixels)?, Host::<T>::read(cotangent)?);
    let mut gradient = vec![T::zero(); batch * 3 * h * w];
    gradient.par_chunks_mut(3 * h * w).zip(data.par_chunks(3 * h * w)).zip(d.par_iter()).for_each(
        |((gradient, image), d)| {
            for component in &COMPONENTS {
                Plane::of(image, h, w, component).pull_back(component, d.f64(), gradient, h, w);
            }
        },
    );
    tensor_from(gradient, (batch, 3, h, w))
}

fn dims(pixels: &Tensor) -> Result<(usize, usize, usize)> {
    match pixels.dims() {
        &[batch, 3, h, w] if h > 0 && w > 0 => Ok((batch, h, w)),
        other => bail!("jpeg_size: pixels of shape {other:?}, not (B, 3, H, W)"),
    }
}

/// One component's coefficients in quantisation steps, each 8x8 block where its pixels were.
struct Plane {
    data: Vec<f64>,
    width: usize,
}

impl Plane {
    fn of<T: Real>(image: &[T], h: usize, w: usize, component: &Component) -> Self {
        let stride = component.stride;
        let (height, width) = (h.next_multiple_of(16) / stride, w.next_multiple_of(16) / stride);
        let mut plane = Self { data: vec![0.0; height * width], width };
        let weights = component.weights();
        // level shift: y is from -128 to 127; cb and cr are so by themselves
        let shift = if stride == 1 { -128.0 } else { 0.0 };
        for_each_source(height, width, stride, h, w, |to, from| {
            plane.data[to] += (0..3).map(|c| weights[c] * image[c * h * w + from].f64()).sum::<f64>();
        });
        plane.data.iter_mut().for_each(|x| *x += shift);
        let basis = cosine_basis();
        plane.each_block(|block| {
            sandwich(block, &basis);
            block.iter_mut().zip(component.steps).for_each(|(c, step)| *c /= f64::from(step));
        });
        plane
    }

    /// Bytes of this component's blocks.
    fn bytes(&self, component: &Component) -> f64 {
        let mut bytes = BLOCK * (self.data.len() / 64) as f64;
        for (at, u) in self.data.iter().enumerate() {
            bytes += if self.is_dc(at) {
                DC_BITS * bits(*u - self.dc_before(at))
            } else {
                component.ac_bits * bits(*u) + component.ac_nonzero * nonzero(*u)
            };
        }
        bytes
    }

    /// Adds `scale` times the gradient of [`Plane::bytes`] to that of the image.
    fn pull_back<T: Real>(&self, component: &Component, scale: f64, gradient: &mut [T], h: usize, w: usize) {
        let (a, b) = (scale * component.ac_bits, scale * component.ac_nonzero);
        let mut d = Self { data: vec![0.0; self.data.len()], width: self.width };
        for (at, u) in self.data.iter().enumerate() {
            if self.is_dc(at) {
                let slope = scale * DC_BITS * d_bits(*u - self.dc_before(at));
                d.data[at] += slope;
                if at % self.width != 0 {
                    d.data[at - 8] -= slope;
                }
            } else {
                d.data[at] = a * d_bits(*u) + b * d_nonzero(*u);
            }
        }
        let basis = transposed(&cosine_basis());
        d.each_block(|block| {
            block.iter_mut().zip(component.steps).for_each(|(c, step)| *c /= f64::from(step));
            sandwich(block, &basis);
        });
        let weights = component.weights();
        let height = d.data.len() / d.width;
        for_each_source(height, d.width, component.stride, h, w, |to, from| {
            (0..3).for_each(|c| gradient[c * h * w + from] += T::lit(weights[c] * d.data[to]));
        });
    }

    fn is_dc(&self, at: usize) -> bool {
        at.is_multiple_of(8) && (at / self.width).is_multiple_of(8)
    }

    /// The DC coefficient that the one at `at` is coded against: to the left, 0 for the first of a row.
    fn dc_before(&self, at: usize) -> f64 {
        if at.is_multiple_of(self.width) { 0.0 } else { self.data[at - 8] }
    }

    fn each_block(&mut self, transform: impl Fn(&mut [f64; 64])) {
        let mut block = [0.0; 64];
        for rows in self.data.chunks_mut(8 * self.width) {
            for left in (0..self.width).step_by(8) {
                for y in 0..8 {
                    block[8 * y..][..8].copy_from_slice(&rows[y * self.width + left..][..8]);
                }
                transform(&mut block);
                for y in 0..8 {
                    rows[y * self.width + left..][..8].copy_from_slice(&block[8 * y..][..8]);
                }
            }
        }
    }
}

impl Component {
    /// From pixels in [0, 1], a mean over the averaged ones.
    fn weights(&self) -> [f64; 3] {
        self.from_rgb.map(|weight| weight * 255.0 / (self.stride * self.stride) as f64)
    }
}

/// Calls `f(place in the plane, pixel in a channel)` for every pixel that is averaged; the image's border repeats.
fn for_each_source(height: usize, width: usize, stride: usize, h: usize, w: usize, mut f: impl FnMut(usize, usize)) {
    for y in 0..height * stride {
        let (row, from) = (y / stride * width, y.min(h - 1) * w);
        for x in 0..width * stride {
            f(row + x / stride, from + x.min(w - 1));
        }
    }
}

fn bits(u: f64) -> f64 {
    0.5 * (1.0 + u * u / BEND).log2()
}
fn d_bits(u: f64) -> f64 {
    u / ((u * u + BEND) * std::f64::consts::LN_2)
}
fn nonzero(u: f64) -> f64 {
    u * u / (u * u + BEND)
}
fn d_nonzero(u: f64) -> f64 {
    2.0 * BEND * u / (u * u + BEND).powi(2)
}

type Matrix = [[f64; 8]; 8];

/// D[k][n] = sqrt((1 or 2) / 8) cos(π (2n + 1) k / 16).
fn cosine_basis() -> Matrix {
    std::array::from_fn(|k| {
        let norm = if k == 0 { 0.125f64.sqrt() } else { 0.5 };
        std::array::from_fn(|n| norm * (std::f64::consts::PI * ((2 * n + 1) * k) as f64 / 16.0).cos())
    })
}

fn transposed(m: &Matrix) -> Matrix {
    std::array::from_fn(|i| std::array::from_fn(|j| m[j][i]))
}

/// B -> M B Mᵗ
fn sandwich(block: &mut [f64; 64], m: &Matrix) {
    let half: [f64; 64] = std::array::from_fn(|at| (0..8).map(|n| m[at / 8][n] * block[8 * n + at % 8]).sum());
    *block = std::array::from_fn(|at| (0..8).map(|n| half[at / 8 * 8 + n] * m[at % 8][n]).sum());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check};
    use candle_core::{DType, Device};

    #[test]
    fn agrees_with_autograd_and_finite_differences() {
        for (h, w) in [(16, 16), (5, 7), (17, 33), (8, 24), (32, 20)] {
            // in units of 0.02: a finite difference is far below a quantisation step; around zero: f32 loses little
            let pixels = |x: &Tensor| x.affine(0.02, 0.0);
            check(
                &[Case::normal(&[2, 3, h, w], 1)],
                |x| jpeg_size_fwd(&pixels(&x[0])?),
                |x, d| Ok(vec![(jpeg_size_bwd(d, &pixels(&x[0])?)? * 0.02)?]),
                |x| composed(&pixels(&x[0])?),
            );
        }
    }

    /// The same of candle's operations.
    fn composed(pixels: &Tensor) -> Result<Tensor> {
        let (batch, _, h, w) = pixels.dims4()?;
        let repeated = |n: usize| {
            let places: Vec<u32> = (0..n.next_multiple_of(16)).map(|i| i.min(n - 1) as u32).collect();
            Tensor::new(places, &Device::Cpu)
        };
        let padded = pixels.index_select(&repeated(h)?, 2)?.index_select(&repeated(w)?, 3)?;
        let basis = cosine_basis().concat();
        let basis = Tensor::from_vec(basis, (8, 8), &Device::Cpu)?.to_dtype(pixels.dtype())?;
        let mut size = Tensor::full(HEADER, batch, &Device::Cpu)?.to_dtype(pixels.dtype())?;
        for component in &COMPONENTS {
            let s = component.stride;
            let mut plane: Option<Tensor> = None;
            for (c, weight) in component.from_rgb.iter().enumerate() {
                let part = (padded.narrow(1, c, 1)? * (255.0 * weight))?;
                plane = Some(match plane {
                    Some(sum) => (sum + part)?,
                    None => part,
                });
            }
            let mut plane = plane.unwrap();
            if s == 1 {
                plane = (plane - 128.0)?;
            }
            let (rows, columns) = (padded.dim(2)? / s / 8, padded.dim(3)? / s / 8);
            let plane = plane.reshape((batch, rows * 8, s, columns * 8, s))?.mean(4)?.mean(2)?;
            let blocks = plane.reshape((batch, rows, 8, columns, 8))?.permute((0, 1, 3, 2, 4))?.contiguous()?;
            // along one axis and then the other
            let shape = blocks.shape().clone();
            let along =
                |x: &Tensor| x.reshape(((), 8))?.matmul(&basis.t()?)?.reshape(&shape)?.transpose(3, 4)?.contiguous();
            let u = along(&along(&blocks)?)?;
            let steps = component.steps.map(f64::from).to_vec();
            let u = u.broadcast_div(&Tensor::from_vec(steps, (8, 8), &Device::Cpu)?.to_dtype(u.dtype())?)?;
            let u = u.reshape((batch, rows, columns, 64))?;
            let bits = |u: &Tensor| ((u.sqr()? / BEND)? + 1.0)?.log()?.affine(0.5 / std::f64::consts::LN_2, 0.0);
            let total = |x: Tensor| x.flatten_from(1)?.sum(1);
            let ac = u.narrow(3, 1, 63)?;
            let nonzero = (ac.sqr()? / (ac.sqr()? + BEND)?)?;
            let dc = u.narrow(3, 0, 1)?;
            let before = dc.narrow(2, 0, columns - 1)?.pad_with_zeros(2, 1, 0)?;
            size = (size + (total(bits(&ac)?)? * component.ac_bits)?)?;
            size = (size + (total(nonzero)? * component.ac_nonzero)?)?;
            size = (size + (total(bits(&(dc - before)?)?)? * DC_BITS)?)?;
            size = (size + BLOCK * (rows * columns) as f64)?;
        }
        Ok(size)
    }

    #[test]
    fn a_flat_image_has_little_more_than_a_header_and_shapes_are_checked() {
        let gray = Tensor::full(0.5f32, (1, 3, 64, 64), &Device::Cpu).unwrap();
        let size = jpeg_size_fwd(&gray).unwrap().to_vec1::<f32>().unwrap()[0];
        assert!((600.0..720.0).contains(&size), "{size}");
        assert!(jpeg_size_fwd(&Tensor::zeros((1, 4, 8, 8), DType::F32, &Device::Cpu).unwrap()).is_err());
        assert!(jpeg_size_bwd(&Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap(), &gray).is_err());
    }
}
