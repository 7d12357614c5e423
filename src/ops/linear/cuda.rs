use candle_core::{DType, Result, Tensor, bail};

use super::rows_of;
use crate::ops::cuda::{Kernel, aligned, unset};

const WARPS: usize = 8;
/// A tile of a factor in shared memory: 8 ranks of 512 numbers in f32.
const TILE_BYTES: usize = 8 * 512 * 4;
/// Largest rank: what remains of 99 KB of shared memory, twice, for 8 rows.
const LARGEST_RANK: usize = 1024;

struct Lora<'a> {
    a: &'a Tensor,
    b: &'a Tensor,
    rows: usize,
    inputs: usize,
    outputs: usize,
    rank: usize,
    scale: f64,
}

impl<'a> Lora<'a> {
    fn new(x: &Tensor, a: &'a Tensor, b: &'a Tensor, scale: f64) -> Result<Self> {
        let ((rows, inputs), (rank, _), (outputs, _)) = (rows_of(x)?, a.dims2()?, b.dims2()?);
        if rank > LARGEST_RANK {
            bail!("LoRA on CUDA: rank {rank}, at most {LARGEST_RANK}");
        }
        Ok(Self { a, b, rows, inputs, outputs, rank, scale })
    }

    /// Four rows a warp where there are enough of them and their part of the shared memory is small.
    fn tall(&self) -> bool {
        self.rows >= 2048 && self.rank <= 128
    }

    fn vector(&self, tensors: &[&Tensor]) -> Result<bool> {
        Ok(self.inputs.is_multiple_of(4) && self.outputs.is_multiple_of(4) && aligned(tensors)?)
    }

    fn sizes(&self, kernel: Kernel) -> Kernel {
        kernel.int("rows", self.rows).int("in", self.inputs).int("width", self.outputs).int("rank", self.rank)
    }

    /// Launches over all rows with `per_row` numbers of shared memory for each row and rank.
    fn launch(&self, kernel: Kernel, tensors: &[&Tensor], per_row: usize) -> Result<()> {
        let kernel = self.sizes(kernel.input("a", self.a).input("b", self.b)).float("scale", self.scale);
        let kernel = kernel.flag("tall", self.tall()).flag("vector", self.vector(tensors)?);
        let rows = WARPS * if self.tall() { 4 } else { 1 };
        kernel.launch([self.rows.div_ceil(rows), 1, 1], 32 * WARPS, TILE_BYTES + 4 * per_row * rows * self.rank)
    }
}

pub(super) fn lora_fwd(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64, y: &Tensor) -> Result<Tensor> {
    let lora = Lora::new(x, a, b, scale)?;
    let out = unset(y, y.shape(), y.dtype())?;
    let kernel = Kernel::of("lora", "lora_fwd", x)?.output("out", &out).input("y", y).input("x", x);
    lora.launch(kernel, &[&out, y, x], 1)?;
    Ok(out)
}

pub(super) fn lora_bwd(
    cotangent: &Tensor,
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<(Tensor, Tensor, Tensor)> {
    let lora = Lora::new(x, a, b, scale)?;
    let Lora { rows, inputs, outputs, rank, .. } = lora;
    let d_x = unset(x, x.shape(), x.dtype())?;
    let (low, d_low) = (unset(x, (rows, rank), DType::F32)?, unset(x, (rows, rank), DType::F32)?);
    let kernel = Kernel::of("lora", "lora_bwd", x)?.output("d_x", &d_x).output("low", &low).output("d_low", &d_low);
    lora.launch(kernel.input("d_y", cotangent).input("x", x), &[&d_x, cotangent, x], 2)?;

    // a share of 256 rows is enough work for a block; few rows are one share
    let share = rows.div_ceil(rows.div_ceil(256).clamp(1, 64)).max(1);
    let shares = rows.div_ceil(share);
    let parts = unset(x, (shares, rank * (inputs + outputs)), DType::F32)?;
    let kernel = Kernel::of("lora", "lora_factors", x)?.output("parts", &parts).input("x", x).input("d_y", cotangent);
    let kernel = lora.sizes(kernel.input("low", &low).input("d_low", &d_low));
    let kernel = kernel.int("share", share).flag("vector", lora.vector(&[x, cotangent])?);
    let tiles = inputs.div_ceil(256) + outputs.div_ceil(256);
    kernel.launch([tiles, rank.div_ceil(8), shares], 32 * WARPS, 0)?;

    let (d_a, d_b) = (unset(a, a.shape(), DType::F32)?, unset(b, b.shape(), DType::F32)?);
    let kernel = Kernel::of("lora", "lora_sum", &d_a)?.output("d_a", &d_a).output("d_b", &d_b).input("parts", &parts);
    let kernel = kernel.int("in", inputs).int("width", outputs).int("rank", rank).int("shares", shares);
    let kernel = kernel.float("scale", scale);
    kernel.launch([(rank * (inputs + outputs)).div_ceil(256), 1, 1], 256, 0)?;
    Ok((d_x, d_a, d_b))
}
