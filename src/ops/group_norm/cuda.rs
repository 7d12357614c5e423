use candle_core::{DType, Result, Tensor, bail};

use super::GroupNorm;
use crate::ops::cuda::{Kernel, aligned, unset};

/// Threads of a block, at most.
const THREADS: usize = 512;
/// Channels that a thread has where their number divides by it.
const VECTOR: usize = 8;
/// Chunks of an image, at most: each consumer adds all of them up.
const CHUNKS: usize = 128;
/// Blocks that fill a large GPU twice over.
const BLOCKS: usize = 264;

/// How the blocks of all four kernels divide x: (chunks of pixels, tiles of groups, images).
struct Plan {
    batch: usize,
    pixels: usize,
    channels: usize,
    groups: usize,
    /// Groups of a block.
    tile: usize,
    vector: bool,
    threads: usize,
    chunk_pixels: usize,
    chunks: usize,
}

impl Plan {
    fn new(tensors: &[&Tensor], norm: &GroupNorm) -> Result<Self> {
        let dims = tensors[0].dims();
        let (batch, channels, groups) = (dims[0], dims[dims.len() - 1], norm.groups);
        let pixels = tensors[0].elem_count() / (batch * channels).max(1);
        let per_group = channels / groups;
        let vector = channels.is_multiple_of(VECTOR) && channels <= THREADS * VECTOR && aligned(tensors)?;
        let tile = if vector { groups } else { groups.min((THREADS / per_group).max(1)) };
        let lanes = tile * per_group / if vector { VECTOR } else { 1 };
        if lanes > THREADS {
            bail!(
                "group norm on a GPU: {per_group} channels in a group; at most {THREADS}, or a multiple of 8 in all, up to \
                 {}",
                THREADS * VECTOR
            );
        }
        let threads = lanes.max(THREADS / lanes * lanes).next_multiple_of(32);
        let tiles = groups.div_ceil(tile);
        let rows = threads / lanes;
        let chunks = pixels.div_ceil(4 * rows).min((BLOCKS / (batch * tiles).max(1)).max(1)).clamp(1, CHUNKS);
        let chunk_pixels = pixels.div_ceil(chunks).max(1);
        let chunks = pixels.div_ceil(chunk_pixels);
        Ok(Self { batch, pixels, channels, groups, tile, vector, threads, chunk_pixels, chunks })
    }

    /// Room for two sums of every (image, group, chunk).
    fn partial(&self, like: &Tensor) -> Result<Tensor> {
        unset(like, 2 * self.batch * self.groups * self.chunks, DType::F32)
    }

    fn launch(&self, kernel: &mut Kernel) -> Result<()> {
        kernel.int(self.pixels).int(self.channels).int(self.channels / self.groups).int(self.tile);
        kernel.int(self.chunk_pixels).int(self.vector.into());
        // two sums of every number of a row of threads, four numbers of every group
        let shared = 4 * (2 * self.threads * if self.vector { VECTOR } else { 1 } + 4 * self.tile);
        kernel.launch([self.chunks, self.groups.div_ceil(self.tile), self.batch], self.threads, shared)
    }

    /// The sums that the statistics follow from.
    fn sums(&self, x: &Tensor) -> Result<Tensor> {
        let partial = self.partial(x)?;
        let mut kernel = Kernel::of("norm", "group_norm_sums", x)?;
        kernel.typed(&partial, DType::F32)?.tensor(x)?;
        self.launch(&mut kernel)?;
        Ok(partial)
    }
}

pub(super) fn group_norm_fwd(x: &Tensor, norm: &GroupNorm) -> Result<Tensor> {
    let y = unset(x, x.shape(), x.dtype())?;
    let plan = Plan::new(&[x, &y, &norm.weight, &norm.bias], norm)?;
    let partial = plan.sums(x)?;
    let mut kernel = Kernel::of("norm", "group_norm_apply", x)?;
    kernel.tensor(&y)?.tensor(x)?.tensor(&norm.weight)?.tensor(&norm.bias)?.typed(&partial, DType::F32)?;
    kernel.float(norm.eps).int(norm.silu.into());
    plan.launch(&mut kernel)?;
    Ok(y)
}

pub(super) fn group_norm_bwd(cotangent: &Tensor, x: &Tensor, norm: &GroupNorm) -> Result<Tensor> {
    let dx = unset(x, x.shape(), x.dtype())?;
    let plan = Plan::new(&[x, cotangent, &dx, &norm.weight, &norm.bias], norm)?;
    let partial = plan.sums(x)?;
    let d_partial = plan.partial(x)?;
    let mut kernel = Kernel::of("norm", "group_norm_bwd_sums", x)?;
    kernel.typed(&d_partial, DType::F32)?.tensor(cotangent)?.tensor(x)?.tensor(&norm.weight)?.tensor(&norm.bias)?;
    kernel.typed(&partial, DType::F32)?.float(norm.eps).int(norm.silu.into());
    plan.launch(&mut kernel)?;
    let mut kernel = Kernel::of("norm", "group_norm_bwd_apply", x)?;
    kernel.tensor(&dx)?.tensor(cotangent)?.tensor(x)?.tensor(&norm.weight)?.tensor(&norm.bias)?;
    kernel.typed(&partial, DType::F32)?.typed(&d_partial, DType::F32)?.float(norm.eps).int(norm.silu.into());
    plan.launch(&mut kernel)?;
    Ok(dx)
}
