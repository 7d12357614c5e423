//! All factors in one launch (`ops/cuda/optim.cu`). What comes out are views of one stretch of device memory.

use candle_core::{DType, Device, Result, Tensor};

use crate::ops::cuda::{Kernel, pointer, unset};
use crate::ops::device::upload;

const THREADS: usize = 256;
/// Elements of a block.
const CHUNK: usize = 4 * THREADS;

/// Several lists of tensors of the same shapes, as the kernels read them.
pub(super) struct Table {
    /// (count, 6), i64: elements, place in the outputs, addresses of up to four inputs.
    rows: Tensor,
    shapes: Vec<Vec<usize>>,
    total: usize,
    chunks: usize,
    /// The inputs, which the addresses are of.
    inputs: Vec<Tensor>,
}

impl Table {
    /// # Errors
    /// A tensor that is not f32.
    pub(super) fn new(lists: &[&[Tensor]]) -> Result<Self> {
        let count = lists[0].len();
        let (mut rows, mut inputs, mut shapes) = (Vec::with_capacity(6 * count), Vec::new(), Vec::with_capacity(count));
        let (mut total, mut longest) = (0, 0);
        for index in 0..count {
            let n = lists[0][index].elem_count();
            rows.extend([n as i64, total as i64]);
            for slot in 0..4 {
                let Some(list) = lists.get(slot) else {
                    rows.push(0);
                    continue;
                };
                let input = &list[index];
                if input.dtype() != DType::F32 || input.elem_count() != n {
                    candle_core::bail!("{:?} {:?} among the LoRA factors, which are f32", input.dtype(), input.dims());
                }
                let input = input.contiguous()?;
                rows.push(pointer(&input)? as i64);
                inputs.push(input);
            }
            shapes.push(lists[0][index].dims().to_vec());
            total += n;
            longest = longest.max(n);
        }
        let rows = upload(&Tensor::from_vec(rows, (count, 6), &Device::Cpu)?, lists[0][0].device())?;
        Ok(Self { rows, shapes, total, chunks: longest.div_ceil(CHUNK), inputs })
    }

    /// One output of every tensor's size.
    fn output(&self) -> Result<Tensor> {
        unset(&self.inputs[0], self.total, DType::F32)
    }

    /// The output's tensors.
    fn views(&self, output: &Tensor) -> Result<Vec<Tensor>> {
        let mut place = 0;
        let view = |shape: &Vec<usize>| {
            let n = shape.iter().product();
            place += n;
            output.narrow(0, place - n, n)?.reshape(shape.as_slice())
        };
        self.shapes.iter().map(view).collect()
    }

    fn launch(&self, kernel: &mut Kernel) -> Result<()> {
        kernel.launch([self.chunks, self.shapes.len(), 1], THREADS, 0)
    }

    /// The next parameters, first and second moments, from (parameters, gradients, first, second moments).
    pub(super) fn adamw(&self, factors: &super::Factors) -> Result<[Vec<Tensor>; 3]> {
        let [p, m, v] = [self.output()?, self.output()?, self.output()?];
        let mut kernel = Kernel::of("optim", "adamw", &p)?;
        kernel.tensor(&p)?.tensor(&m)?.tensor(&v)?.typed(&self.rows, DType::I64)?;
        for factor in [
            factors.decay,
            factors.beta1,
            factors.beta2,
            factors.rest1,
            factors.rest2,
            factors.step_size,
            factors.root,
            factors.eps,
        ] {
            kernel.float(factor.into());
        }
        self.launch(&mut kernel)?;
        Ok([self.views(&p)?, self.views(&m)?, self.views(&v)?])
    }

    /// `first` of the first list plus `second` of the second, if there is one.
    pub(super) fn weighted_sum(&self, first: f64, second: f64) -> Result<Vec<Tensor>> {
        let out = self.output()?;
        let mut kernel = Kernel::of("optim", "weighted_sum", &out)?;
        kernel.tensor(&out)?.typed(&self.rows, DType::I64)?.float(first).float(second);
        self.launch(&mut kernel)?;
        self.views(&out)
    }

    /// The norm of all of the first list together, in f64.
    pub(super) fn norm(&self) -> Result<Tensor> {
        let n = self.chunks * self.shapes.len();
        let (parts, norm) = (unset(&self.rows, n, DType::F64)?, unset(&self.rows, 1, DType::F64)?);
        let mut kernel = Kernel::of("optim", "square_sums", &self.inputs[0])?;
        kernel.typed(&parts, DType::F64)?.typed(&self.rows, DType::I64)?;
        self.launch(&mut kernel)?;
        let mut kernel = Kernel::of("optim", "norm", &self.inputs[0])?;
        kernel.typed(&norm, DType::F64)?.typed(&parts, DType::F64)?.int(n).launch([1, 1, 1], THREADS, 0)?;
        Ok(norm)
    }

    /// The first list, scaled down to `max_norm` where its `norm` is more.
    pub(super) fn clipped(&self, norm: &Tensor, max_norm: f64) -> Result<Vec<Tensor>> {
        let out = self.output()?;
        let mut kernel = Kernel::of("optim", "clip", &out)?;
        kernel.tensor(&out)?.typed(&self.rows, DType::I64)?.typed(norm, DType::F64)?.float(max_norm);
        self.launch(&mut kernel)?;
        self.views(&out)
    }
}
