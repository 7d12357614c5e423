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

    /// Launches over all rows with `per_row` numbers of shared memory for each row and rank.
    fn launch(&self, kernel: &mut Kernel, tensors: &[&Tensor], per_row: usize) -> Result<()> {
        kernel.typed(self.a, DType::F32)?.typed(self.b, DType::F32)?;
        kernel.int(self.rows).int(self.inputs).int(self.outputs).int(self.rank).float(self.scale);
        kernel.int(self.tall().into()).int(self.vector(tensors)?.into());
        let rows = WARPS * if self.tall() { 4 } else { 1 };
        kernel.launch([self.rows.div_ceil(rows), 1, 1], 32 * WARPS, TILE_BYTES + 4 * per_row * rows * self.rank)
    }
}

pub(super) fn lora_fwd(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64, y: &Tensor) -> Result<Tensor> {
    let lora = Lora::new(x, a, b, scale)?;
    let out = unset(y, y.shape(), y.dtype())?;
    let mut kernel = Kernel::of("lora", "lora_fwd", x)?;
    kernel.tensor(&out)?.tensor(y)?.tensor(x)?;
    lora.launch(&mut kernel, &[&out, y, x], 1)?;
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
    let mut kernel = Kernel::of("lora", "lora_bwd", x)?;
    kernel.tensor(&d_x)?.typed(&low, DType::F32)?.typed(&d_low, DType::F32)?.tensor(cotangent)?.tensor(x)?;
    lora.launch(&mut kernel, &[&d_x, cotangent, x], 2)?;

    // a share of 256 rows is enough work for a block; few rows are one share
    let share = rows.div_ceil(rows.div_ceil(256).clamp(1, 64)).max(1);
    let shares = rows.div_ceil(share);
    let parts = unset(x, (shares, rank * (inputs + outputs)), DType::F32)?;
    let mut kernel = Kernel::of("lora", "lora_factors", x)?;
    kernel
        .typed(&parts, DType::F32)?
        .tensor(x)?
        .tensor(cotangent)?
        .typed(&low, DType::F32)?
        .typed(&d_low, DType::F32)?;
    kernel.int(rows).int(inputs).int(outputs).int(rank).int(share).int(lora.vector(&[x, cotangent])?.into());
    let tiles = inputs.div_ceil(256) + outputs.div_ceil(256);
    kernel.launch([tiles, rank.div_ceil(8), shares], 32 * WARPS, 0)?;

    let (d_a, d_b) = (unset(a, a.shape(), DType::F32)?, unset(b, b.shape(), DType::F32)?);
    let mut kernel = Kernel::of("lora", "lora_sum", &d_a)?;
    kernel.typed(&d_a, DType::F32)?.typed(&d_b, DType::F32)?.typed(&parts, DType::F32)?;
    kernel.int(inputs).int(outputs).int(rank).int(shares).float(scale);
    kernel.launch([(rank * (inputs + outputs)).div_ceil(256), 1, 1], 256, 0)?;
    Ok((d_x, d_a, d_b))
}
