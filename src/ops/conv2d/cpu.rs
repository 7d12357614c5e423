use candle_core::{Result, Tensor, bail};

use super::{Kernel, Weight};
use crate::ops::frozen::Taps;
use crate::ops::{Host, Real, buffer, tensor_from};

/// Which source pixel a tap reads: `position` along one axis of the destination, `None` outside the image.
#[derive(Clone, Copy)]
struct Axis {
    source: usize,
    destination: usize,
    taps: usize,
    stride: usize,
    padding: usize,
    transposed: bool,
}

impl Axis {
    fn tap(&self, position: usize, offset: usize) -> Option<usize> {
        if self.transposed {
            // the source pixels i with s i + u - p = position
            let shifted = (position + self.padding).checked_sub(offset)?;
            (shifted % self.stride == 0 && shifted / self.stride < self.source).then_some(shifted / self.stride)
        } else {
            let shifted = (position * self.stride + offset).checked_sub(self.padding)?;
            (shifted < self.source).then_some(shifted)
        }
    }
}

/// The taps of a pixel, counted over batch, row, column.
struct Window {
    y: Axis,
    x: Axis,
}

impl Window {
    /// From the sides (height, width) of what is read to those of what is written.
    fn new(kernel: &Kernel, source: (usize, usize), destination: (usize, usize), transposed: bool) -> Self {
        let axis = |source, destination, taps| Axis {
            source,
            destination,
            taps,
            stride: kernel.stride,
            padding: kernel.padding,
            transposed,
        };
        let (kh, kw) = kernel.sides;
        Self { y: axis(source.0, destination.0, kh), x: axis(source.1, destination.1, kw) }
    }
}

impl Taps for Window {
    fn count(&self) -> usize {
        self.y.taps * self.x.taps
    }
    fn sources(&self, row: usize, mut tell: impl FnMut(usize, Option<usize>)) {
        let (line, j) = (row / self.x.destination, row % self.x.destination);
        let (b, i) = (line / self.y.destination, line % self.y.destination);
        for u in 0..self.y.taps {
            let line = self.y.tap(i, u).map(|k| (b * self.y.source + k) * self.x.source);
            for v in 0..self.x.taps {
                tell(u * self.x.taps + v, line.zip(self.x.tap(j, v)).map(|(line, l)| line + l));
            }
        }
    }
}

pub(super) fn conv2d_fwd<T: Real>(x: &Tensor, kernel: &Kernel) -> Result<Tensor> {
    let (batch, height, width, _) = x.dims4()?;
    let (kh, kw) = kernel.sides;
    let (out_h, out_w) = (kernel.out_side(height, kh)?, kernel.out_side(width, kw)?);
    let x = Host::<T>::read(x)?;
    let bias = kernel.bias.as_ref().map(Host::<T>::read).transpose()?;
    let window = Window::new(kernel, (height, width), (out_h, out_w), false);
    let rows = batch * out_h * out_w;
    let mut y = buffer(rows * kernel.outputs);
    match &kernel.weight {
        Weight::Taps(weight) => weight.forward(&x, &window, rows, bias.as_deref(), &mut y)?,
        #[cfg(target_arch = "x86_64")]
        Weight::Winograd(winograd) => match (T::as_f32(&x), T::as_f32_mut(&mut y)) {
            (Some(x), Some(y)) => winograd.forward(x, (batch, height, width), bias.as_deref().and_then(T::as_f32), y),
            _ => bail!("a convolution of {:?} with a kernel packed in f32", T::DTYPE),
        },
        Weight::Device(weight) => bail!("a kernel on {:?} with activations in host memory", weight.device().location()),
    }
    tensor_from(y, (batch, out_h, out_w, kernel.outputs))
}

pub(super) fn conv2d_bwd<T: Real>(cotangent: &Tensor, kernel: &Kernel, height: usize, width: usize) -> Result<Tensor> {
    let (batch, out_h, out_w, _) = cotangent.dims4()?;
    let dy = Host::<T>::read(cotangent)?;
    let window = Window::new(kernel, (out_h, out_w), (height, width), true);
    let rows = batch * height * width;
    let mut dx = buffer(rows * kernel.inputs);
    match &kernel.weight {
        Weight::Taps(weight) => weight.backward(&dy, &window, rows, &mut dx)?,
        #[cfg(target_arch = "x86_64")]
        Weight::Winograd(winograd) => match (T::as_f32(&dy), T::as_f32_mut(&mut dx)) {
            (Some(dy), Some(dx)) => winograd.backward(dy, (batch, height, width), dx),
            _ => bail!("a convolution of {:?} with a kernel packed in f32", T::DTYPE),
        },
        Weight::Device(weight) => bail!("a kernel on {:?} with activations in host memory", weight.device().location()),
    }
    tensor_from(dx, (batch, height, width, kernel.inputs))
}
