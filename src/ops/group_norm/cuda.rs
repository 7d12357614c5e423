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

    /// Launches with the sizes, which all four kernels end with.
    fn launch(&self, kernel: Kernel) -> Result<()> {
        let kernel = kernel.int("pixels", self.pixels).int("channels", self.channels);
        let kernel = kernel.int("per_group", self.channels / self.groups).int("tile_groups", self.tile);
        let kernel = kernel.int("chunk_pixels", self.chunk_pixels).flag("vector", self.vector);
        // two sums of every number of a row of threads, four numbers of every group
        let shared = 4 * (2 * self.threads * if self.vector { VECTOR } else { 1 } + 4 * self.tile);
        kernel.launch([self.chunks, self.groups.div_ceil(self.tile), self.batch], self.threads, shared)
    }

    /// The sums that the statistics follow from.
    fn sums(&self, x: &Tensor) -> Result<Tensor> {
        let partial = self.partial(x)?;
        self.launch(Kernel::of("norm", "group_norm_sums", x)?.output("partial", &partial).input("x", x))?;
        Ok(partial)
    }
}

pub(super) fn group_norm_fwd(x: &Tensor, norm: &GroupNorm) -> Result<Tensor> {
    let y = unset(x, x.shape(), x.dtype())?;
    let plan = Plan::new(&[x, &y, &norm.weight, &norm.bias], norm)?;
    let partial = plan.sums(x)?;
    let kernel = Kernel::of("norm", "group_norm_apply", x)?.output("y", &y).input("x", x);
    let kernel = kernel.input("weight", &norm.weight).input("bias", &norm.bias).input("partial", &partial);
    plan.launch(kernel.float("eps", norm.eps).flag("silu", norm.silu))?;
    Ok(y)
}

pub(super) fn group_norm_bwd(cotangent: &Tensor, x: &Tensor, norm: &GroupNorm) -> Result<Tensor> {
    let dx = unset(x, x.shape(), x.dtype())?;
    let plan = Plan::new(&[x, cotangent, &dx, &norm.weight, &norm.bias], norm)?;
    let partial = plan.sums(x)?;
    let d_partial = plan.partial(x)?;
    let kernel = Kernel::of("norm", "group_norm_bwd_sums", x)?.output("d_partial", &d_partial);
    let kernel = kernel.input("dy", cotangent).input("x", x).input("weight", &norm.weight).input("bias", &norm.bias);
    plan.launch(kernel.input("partial", &partial).float("eps", norm.eps).flag("silu", norm.silu))?;
    let kernel = Kernel::of("norm", "group_norm_bwd_apply", x)?.output("dx", &dx);
    let kernel = kernel.input("dy", cotangent).input("x", x).input("weight", &norm.weight).input("bias", &norm.bias);
    let kernel = kernel.input("partial", &partial).input("d_partial", &d_partial);
    plan.launch(kernel.float("eps", norm.eps).flag("silu", norm.silu))?;
    Ok(dx)
}
