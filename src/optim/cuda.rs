//! All factors in one launch (`ops/cuda/optim.cu`). What comes out are views of one stretch of device memory.

use candle_core::{DType, Result, Tensor};

use crate::ops::cuda::{Addresses, Kernel, unset};

const THREADS: usize = 256;
/// Elements of a block.
const CHUNK: usize = 4 * THREADS;

/// Several lists of tensors of the same shapes, as the kernels read them.
pub(super) struct Table {
    /// Of each tensor: elements, place in the outputs, addresses of up to four inputs.
    rows: Addresses,
    shapes: Vec<Vec<usize>>,
    total: usize,
    chunks: usize,
    /// The first input, whose type and device the outputs have.
    like: Tensor,
}

impl Table {
    /// # Errors
    /// A tensor that is not f32.
    pub(super) fn new(lists: &[&[Tensor]]) -> Result<Self> {
        let count = lists[0].len();
        let (mut rows, mut shapes) = (Vec::with_capacity(count), Vec::with_capacity(count));
        let (mut total, mut longest) = (0, 0);
        for index in 0..count {
            let n = lists[0][index].elem_count();
            let mut inputs = Vec::with_capacity(lists.len());
            for list in lists {
                let input = &list[index];
                if input.dtype() != DType::F32 || input.elem_count() != n {
                    candle_core::bail!("{:?} {:?} among the LoRA factors, which are f32", input.dtype(), input.dims());
                }
                inputs.push(input.contiguous()?);
            }
            rows.push(([n, total], inputs));
            shapes.push(lists[0][index].dims().to_vec());
            total += n;
            longest = longest.max(n);
        }
        let like = lists[0][0].clone();
        let rows = Addresses::new(rows, like.device())?;
        Ok(Self { rows, shapes, total, chunks: longest.div_ceil(CHUNK), like })
    }

    /// One output of every tensor's size.
    fn output(&self) -> Result<Tensor> {
        unset(&self.like, self.total, DType::F32)
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

    fn launch(&self, kernel: Kernel) -> Result<()> {
        kernel.launch([self.chunks, self.shapes.len(), 1], THREADS, 0)
    }

    /// The next parameters, first and second moments, from (parameters, gradients, first, second moments).
    pub(super) fn adamw(&self, factors: &super::Factors) -> Result<[Vec<Tensor>; 3]> {
        let [p, m, v] = [self.output()?, self.output()?, self.output()?];
        let kernel = Kernel::of("optim", "adamw", &p)?.output("p", &p).output("m", &m).output("v", &v);
        let kernel = kernel.addresses("table", &self.rows).float("decay", factors.decay.into());
        let kernel = kernel.float("beta1", factors.beta1.into()).float("beta2", factors.beta2.into());
        let kernel = kernel.float("rest1", factors.rest1.into()).float("rest2", factors.rest2.into());
        let kernel = kernel.float("step_size", factors.step_size.into()).float("root", factors.root.into());
        self.launch(kernel.float("eps", factors.eps.into()))?;
        Ok([self.views(&p)?, self.views(&m)?, self.views(&v)?])
    }

    /// `first` of the first list plus `second` of the second, if there is one.
    pub(super) fn weighted_sum(&self, first: f64, second: f64) -> Result<Vec<Tensor>> {
        let out = self.output()?;
        let kernel = Kernel::of("optim", "weighted_sum", &out)?.output("out", &out).addresses("table", &self.rows);
        self.launch(kernel.float("first", first).float("second", second))?;
        self.views(&out)
    }

    /// The norm of all of the first list together, in f64.
    pub(super) fn norm(&self) -> Result<Tensor> {
        let n = self.chunks * self.shapes.len();
        let (parts, norm) = (unset(&self.like, n, DType::F64)?, unset(&self.like, 1, DType::F64)?);
        let kernel = Kernel::of("optim", "square_sums", &self.like)?.output("parts", &parts);
        self.launch(kernel.addresses("table", &self.rows))?;
        let kernel = Kernel::of("optim", "norm", &self.like)?.output("norm", &norm).input("parts", &parts);
        kernel.int("n", n).launch([1, 1, 1], THREADS, 0)?;
        Ok(norm)
    }

    /// The first list, scaled down to `max_norm` where its `norm` is more.
    pub(super) fn clipped(&self, norm: &Tensor, max_norm: f64) -> Result<Vec<Tensor>> {
        let out = self.output()?;
        let kernel = Kernel::of("optim", "clip", &out)?.output("out", &out).addresses("table", &self.rows);
        self.launch(kernel.input("norm", norm).float("max_norm", max_norm))?;
        self.views(&out)
    }
}
