//! Products with a frozen matrix, in both directions; every linear layer and convolution is one.
//!
//! ```text
//! y[m, n]  = bias[n] + sum_{t, c} x[source(m, t), c] W[n, t, c]         forward
//! dx[m, c] = sum_{t, n} dy[source'(m, t), n] W[n, t, c]                 backward
//! ```
//!
//! t is a tap: a linear layer has one, a 3x3 convolution nine.
//!
//! In f32 on a CPU with AVX-512 the matrix is packed once into panels that serve both directions (`panels`). Elsewhere
//! (f64, other CPUs) rows are gathered and the `gemm` crate multiplies (`gathered`).

mod gathered;
#[cfg(target_arch = "x86_64")]
pub(in crate::ops) mod panels;

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::{Host, Real};
#[cfg(target_arch = "x86_64")]
use panels::Panels;

/// Which rows of the source an output row reads, one for each tap.
pub(crate) trait Taps: Sync {
    fn count(&self) -> usize;
    /// Tells the source row of each tap of output row `row`, or `None` for zeros.
    fn sources(&self, row: usize, tell: impl FnMut(usize, Option<usize>));
}

/// A linear layer: row m reads row m.
pub(crate) struct Same;

impl Taps for Same {
    fn count(&self) -> usize {
        1
    }
    fn sources(&self, row: usize, mut tell: impl FnMut(usize, Option<usize>)) {
        tell(0, Some(row));
    }
}

/// W (outputs, taps, channels), immutable.
#[derive(Clone, Debug)]
pub(crate) struct Frozen {
    shape: (usize, usize, usize),
    store: Store,
}

#[derive(Clone, Debug)]
enum Store {
    #[cfg(target_arch = "x86_64")]
    Panels(Arc<Panels>),
    /// (taps, channels, outputs), contiguous.
    Plain(Tensor),
}

impl Frozen {
    /// From (outputs, taps, channels).
    pub(crate) fn new(weight: &Tensor) -> Result<Self> {
        let shape = weight.dims3()?;
        #[cfg(target_arch = "x86_64")]
        if weight.dtype() == candle_core::DType::F32 && weight.device().is_cpu() && crate::ops::tiles::available() {
            let weight = weight.contiguous()?;
            let panels = Panels::pack(&Host::<f32>::read(&weight)?, shape);
            return Ok(Self { shape, store: Store::Panels(Arc::new(panels)) });
        }
        Ok(Self { shape, store: Store::Plain(weight.permute((1, 2, 0))?.contiguous()?) })
    }

    /// y (rows, outputs) = bias + the product; x (_, channels), bias (outputs). What y held is overwritten.
    pub(crate) fn forward<T: Real>(
        &self,
        x: &[T],
        taps: &impl Taps,
        rows: usize,
        bias: Option<&[T]>,
        y: &mut [T],
    ) -> Result<()> {
        match &self.store {
            #[cfg(target_arch = "x86_64")]
            Store::Panels(panels) => match (T::as_f32(x), T::as_f32_mut(y)) {
                (Some(x), Some(y)) => panels.forward(x, taps, rows, bias.and_then(T::as_f32), y),
                _ => bail!("a product of {:?} with a matrix packed in f32", T::DTYPE),
            },
            Store::Plain(weight) => gathered::forward(&Host::<T>::read(weight)?, self.shape, x, taps, rows, bias, y),
        }
        Ok(())
    }

    /// dx (rows, channels), the product with the transpose; dy (_, outputs). What dx held is overwritten.
    pub(crate) fn backward<T: Real>(&self, dy: &[T], taps: &impl Taps, rows: usize, dx: &mut [T]) -> Result<()> {
        match &self.store {
            #[cfg(target_arch = "x86_64")]
            Store::Panels(panels) => match (T::as_f32(dy), T::as_f32_mut(dx)) {
                (Some(dy), Some(dx)) => panels.backward(dy, taps, rows, dx),
                _ => bail!("a product of {:?} with a matrix packed in f32", T::DTYPE),
            },
            Store::Plain(weight) => gathered::backward(&Host::<T>::read(weight)?, self.shape, dy, taps, rows, dx),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::Case;

    /// Rows in a circle, some of them missing: no structure that a kernel could rely on.
    struct Scattered {
        taps: usize,
        sources: usize,
    }

    impl Taps for Scattered {
        fn count(&self) -> usize {
            self.taps
        }
        fn sources(&self, row: usize, mut tell: impl FnMut(usize, Option<usize>)) {
            for tap in 0..self.taps {
                tell(tap, ((row + tap) % 3 != 1).then_some((row * 7 + tap * 5) % self.sources));
            }
        }
    }

    fn numbers(tensor: &Tensor) -> Vec<f64> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn to_f32(x: &[f64]) -> Vec<f32> {
        x.iter().map(|x| *x as f32).collect()
    }

    #[test]
    fn both_directions_are_the_sum_over_taps() {
        // every height of a tile, panels of 32 and 16 lanes, several tasks, many rows and few
        for (rows, outputs, taps, channels) in [
            (1, 1, 1, 1),
            (5, 16, 2, 3),
            (11, 17, 1, 13),
            (13, 33, 3, 5),
            (31, 48, 1, 25),
            (50, 64, 9, 7),
            (257, 100, 1, 64),
            (400, 40, 9, 37),
            (1500, 20, 2, 30),
            (70, 300, 4, 110),
        ] {
            let scattered = Scattered { taps, sources: 29 };
            let weight = Case::normal(&[outputs, taps, channels], 1);
            let (x, dy) = (Case::normal(&[29, channels], 2), Case::normal(&[29, outputs], 3));
            let bias = Case::normal(&[outputs], 4);
            let (w, x, dy, bias) = (numbers(&weight), numbers(&x), numbers(&dy), numbers(&bias));
            let (mut y, mut dx) = (vec![0f64; rows * outputs], vec![0f64; rows * channels]);
            for row in 0..rows {
                y[row * outputs..][..outputs].copy_from_slice(&bias);
                scattered.sources(row, |tap, source| {
                    let Some(source) = source else { return };
                    for n in 0..outputs {
                        for c in 0..channels {
                            let w = w[(n * taps + tap) * channels + c];
                            y[row * outputs + n] += x[source * channels + c] * w;
                            dx[row * channels + c] += dy[source * outputs + n] * w;
                        }
                    }
                });
            }
            let agree = |name: &str, found: Vec<f64>, expected: &[f64], tolerance: f64| {
                let size = expected.iter().fold(1e-9, |size: f64, x| size.max(x.abs()));
                for (found, expected) in found.iter().zip(expected) {
                    assert!(
                        (found - expected).abs() < tolerance * size,
                        "{name} of {rows}x{outputs}x{taps}x{channels}: {found} and {expected}"
                    );
                }
            };
            let frozen = Frozen::new(&weight).unwrap();
            let (mut found, mut d_found) = (vec![0f64; y.len()], vec![0f64; dx.len()]);
            frozen.forward(&x, &scattered, rows, Some(&bias), &mut found).unwrap();
            frozen.backward(&dy, &scattered, rows, &mut d_found).unwrap();
            agree("f64 forward", found, &y, 1e-12);
            agree("f64 backward", d_found, &dx, 1e-12);

            let frozen = Frozen::new(&weight.to_dtype(candle_core::DType::F32).unwrap()).unwrap();
            let (mut found, mut d_found) = (vec![0f32; y.len()], vec![0f32; dx.len()]);
            frozen.forward(&to_f32(&x), &scattered, rows, Some(&to_f32(&bias)), &mut found).unwrap();
            frozen.backward(&to_f32(&dy), &scattered, rows, &mut d_found).unwrap();
            let to_f64 = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<_>>();
            agree("f32 forward", to_f64(found), &y, 2e-6);
            agree("f32 backward", to_f64(d_found), &dx, 2e-6);
        }
    }
}
