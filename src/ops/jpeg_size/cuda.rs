use candle_core::{DType, Result, Tensor};

use super::{BEND, BLOCK, COMPONENTS, DC_BITS, HEADER, cosine_basis, dims};
use crate::ops::cuda::{Kernel, unset};

/// Parts of the sum over an image's coefficients.
const PARTS: usize = 64;

/// Numbers of `struct Jpeg` of ops/cuda/jpeg.cu, in its order.
fn constants(like: &Tensor) -> Result<Tensor> {
    let mut all: Vec<f64> = cosine_basis().into_iter().flatten().collect();
    all.extend(COMPONENTS[..2].iter().flat_map(|component| component.steps.map(f64::from)));
    all.extend(COMPONENTS.iter().flat_map(|component| component.weights()));
    all.extend(COMPONENTS.iter().map(|component| component.ac_bits));
    all.extend(COMPONENTS.iter().map(|component| component.ac_nonzero));
    all.extend([BEND, HEADER, BLOCK, DC_BITS]);
    let n = all.len();
    Tensor::from_vec(all, n, like.device())
}

/// 8x8 blocks of an image's three planes.
fn blocks(h: usize, w: usize) -> usize {
    let luma = 4 * h.div_ceil(16) * w.div_ceil(16);
    luma + luma / 2
}

/// The coefficients, (B, blocks, 64) in f64.
fn coefficients(pixels: &Tensor, constants: &Tensor) -> Result<Tensor> {
    let (batch, h, w) = dims(pixels)?;
    let u = unset(pixels, (batch, blocks(h, w), 64), DType::F64)?;
    let kernel = Kernel::of("jpeg", "jpeg_coefficients", pixels)?.output("u", &u).input("pixels", pixels);
    kernel.input("jpeg", constants).int("h", h).int("w", w).launch([blocks(h, w), batch, 1], 64, 0)?;
    Ok(u)
}

pub(super) fn jpeg_size_fwd(pixels: &Tensor) -> Result<Tensor> {
    let (batch, h, w) = dims(pixels)?;
    let constants = constants(pixels)?;
    let u = coefficients(pixels, &constants)?;
    let parts = unset(pixels, (batch, PARTS), DType::F64)?;
    let kernel = Kernel::of("jpeg", "jpeg_bytes", pixels)?.output("parts", &parts).input("u", &u);
    let kernel = kernel.input("jpeg", &constants).int("blocks", blocks(h, w)).int("h", h).int("w", w);
    kernel.launch([PARTS, batch, 1], 256, 0)?;
    let sizes = unset(pixels, batch, pixels.dtype())?;
    let kernel = Kernel::of("jpeg", "jpeg_total", pixels)?.output("sizes", &sizes).input("parts", &parts);
    kernel.input("jpeg", &constants).int("count", PARTS).launch([batch, 1, 1], 64, 0)?;
    Ok(sizes)
}

pub(super) fn jpeg_size_bwd(cotangent: &Tensor, pixels: &Tensor) -> Result<Tensor> {
    let (batch, h, w) = dims(pixels)?;
    let constants = constants(pixels)?;
    let u = coefficients(pixels, &constants)?;
    let d = unset(pixels, u.shape(), DType::F64)?;
    let kernel = Kernel::of("jpeg", "jpeg_slopes", pixels)?.output("d", &d).input("u", &u);
    let kernel = kernel.input("cotangent", cotangent).input("jpeg", &constants);
    kernel.int("h", h).int("w", w).launch([blocks(h, w), batch, 1], 64, 0)?;
    let gradient = unset(pixels, pixels.shape(), pixels.dtype())?;
    let kernel = Kernel::of("jpeg", "jpeg_gather", pixels)?.output("gradient", &gradient).input("d", &d);
    let kernel = kernel.input("jpeg", &constants).int("batch", batch).int("h", h).int("w", w);
    kernel.launch([(batch * h * w).div_ceil(256), 1, 1], 256, 0)?;
    Ok(gradient)
}
