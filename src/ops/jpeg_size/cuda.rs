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
    let mut kernel = Kernel::of("jpeg", "jpeg_coefficients", pixels)?;
    kernel.typed(&u, DType::F64)?.tensor(pixels)?.typed(constants, DType::F64)?.int(h).int(w);
    kernel.launch([blocks(h, w), batch, 1], 64, 0)?;
    Ok(u)
}

pub(super) fn jpeg_size_fwd(pixels: &Tensor) -> Result<Tensor> {
    let (batch, h, w) = dims(pixels)?;
    let constants = constants(pixels)?;
    let u = coefficients(pixels, &constants)?;
    let parts = unset(pixels, (batch, PARTS), DType::F64)?;
    let mut kernel = Kernel::of("jpeg", "jpeg_bytes", pixels)?;
    kernel.typed(&parts, DType::F64)?.typed(&u, DType::F64)?.typed(&constants, DType::F64)?;
    kernel.int(blocks(h, w)).int(h).int(w).launch([PARTS, batch, 1], 256, 0)?;
    let sizes = unset(pixels, batch, pixels.dtype())?;
    let mut kernel = Kernel::of("jpeg", "jpeg_total", pixels)?;
    kernel.tensor(&sizes)?.typed(&parts, DType::F64)?.typed(&constants, DType::F64)?.int(PARTS);
    kernel.launch([batch, 1, 1], 64, 0)?;
    Ok(sizes)
}

pub(super) fn jpeg_size_bwd(cotangent: &Tensor, pixels: &Tensor) -> Result<Tensor> {
    let (batch, h, w) = dims(pixels)?;
    let constants = constants(pixels)?;
    let u = coefficients(pixels, &constants)?;
    let d = unset(pixels, u.shape(), DType::F64)?;
    let mut kernel = Kernel::of("jpeg", "jpeg_slopes", pixels)?;
    kernel.typed(&d, DType::F64)?.typed(&u, DType::F64)?.tensor(cotangent)?.typed(&constants, DType::F64)?;
    kernel.int(h).int(w).launch([blocks(h, w), batch, 1], 64, 0)?;
    let gradient = unset(pixels, pixels.shape(), pixels.dtype())?;
    let mut kernel = Kernel::of("jpeg", "jpeg_gather", pixels)?;
    kernel.tensor(&gradient)?.typed(&d, DType::F64)?.typed(&constants, DType::F64)?.int(batch).int(h).int(w);
    kernel.launch([(batch * h * w).div_ceil(256), 1, 1], 256, 0)?;
    Ok(gradient)
}
