//! A sequence of kernels that a GPU starts by itself: a CUDA graph.
//!
//! What `run` launches is recorded once and launched again with other numbers in the same places: inputs are copied into
//! buffers of the recording, and the result out of one. Memory that is taken while recording is the graph's own and all
//! given back before its end. Nothing may wait, or bring numbers from the host, while it is recorded.

#[cfg(feature = "cuda")]
pub use cuda::Replay;

#[cfg(not(feature = "cuda"))]
pub use absent::Replay;

#[cfg(feature = "cuda")]
mod cuda {
    use std::sync::{Mutex, PoisonError};

    use anyhow::{Context, Result, ensure};
    use candle_core::{Error, Shape, Tensor};
    use cudarc::driver::{CudaGraph, result, sys};

    use crate::ops::cuda::{device, pointer, unset};
    use crate::ops::{flops, gemm};

    /// A recorded computation of one tensor from others.
    pub struct Replay {
        inputs: Vec<Tensor>,
        output: Tensor,
        graph: Mutex<Graph>,
        /// Of one launch.
        flops: u64,
        /// What the kernels read beside the inputs.
        _keep: Vec<Tensor>,
    }

    struct Graph(CudaGraph);
    // SAFETY: a graph is used by one thread at a time, which the mutex sees to.
    unsafe impl Send for Graph {}

    impl Replay {
        /// Records `run`, which gives a tensor of shape `output` and the first input's type from tensors like `inputs`.
        /// Whatever it computes with for the first time (plans, workspaces) must have been made before. `keep` are tensors
        /// that it reads and that may be dropped before this is.
        ///
        /// # Errors
        /// `run`'s own, a call in it that cannot be recorded, and the driver's.
        pub fn capture(
            inputs: &[&Tensor],
            output: impl Into<Shape>,
            keep: Vec<Tensor>,
            run: impl FnOnce(&[Tensor]) -> Result<Tensor>,
        ) -> Result<Self> {
            let stream = device(inputs[0])?.cuda_stream();
            let output = unset(inputs[0], output, inputs[0].dtype())?;
            let inputs: Vec<Tensor> = inputs.iter().map(|input| input.copy()).collect::<candle_core::Result<_>>()?;
            let before = flops();
            stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(Error::wrap)?;
            let recorded = run(&inputs).and_then(|y| copy(&y, &output));
            let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(Error::wrap);
            recorded.context("recording a CUDA graph")?;
            let graph = Graph(graph?.context("the driver recorded no CUDA graph")?);
            let flops = flops() - before;
            gemm::count_flops(flops.wrapping_neg()); // recorded, not done
            Ok(Self { inputs, output, graph: Mutex::new(graph), flops, _keep: keep })
        }

        /// The result for these inputs, of the shapes and types that were recorded.
        ///
        /// # Errors
        /// Other inputs than those, and the driver's.
        pub fn run(&self, inputs: &[&Tensor]) -> Result<Tensor> {
            ensure!(
                inputs.len() == self.inputs.len(),
                "{} inputs for a recording with {}",
                inputs.len(),
                self.inputs.len()
            );
            for (from, to) in inputs.iter().zip(&self.inputs) {
                copy(from, to)?;
            }
            self.graph.lock().unwrap_or_else(PoisonError::into_inner).0.launch().map_err(Error::wrap)?;
            gemm::count_flops(self.flops);
            Ok(self.output.copy()?)
        }
    }

    fn copy(from: &Tensor, to: &Tensor) -> Result<()> {
        ensure!(
            from.dims() == to.dims() && from.dtype() == to.dtype(),
            "{:?} of {:?} where {:?} of {:?} was recorded",
            from.dims(),
            from.dtype(),
            to.dims(),
            to.dtype()
        );
        let bytes = from.elem_count() * from.dtype().size_in_bytes();
        let stream = device(from)?.cuda_stream();
        // SAFETY: both are contiguous, of this many bytes, and freed in the stream's order.
        unsafe { result::memcpy_dtod_async(pointer(to)?, pointer(from)?, bytes, stream.cu_stream()) }
            .map_err(Error::wrap)?;
        Ok(())
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::ops::sum::add;
        use crate::ops::testing::gpus;

        #[test]
        fn a_recording_gives_what_its_kernels_give() {
            for compute in gpus() {
                let tensor =
                    |values: [f32; 4]| compute.put(&Tensor::new(&values, &candle_core::Device::Cpu).unwrap()).unwrap();
                let (x, other) = (tensor([1.0, 2.0, 3.0, 4.0]), tensor([0.5, 0.25, 8.0, 16.0]));
                // memory of the graph's own is taken and given back twice
                let run = |x: &Tensor, y: &Tensor| add(&add(&add(x, y)?, y)?, x);
                run(&x, &other).unwrap(); // loads the kernel
                let replay = Replay::capture(&[&x, &other], 4, Vec::new(), |t| Ok(run(&t[0], &t[1])?)).unwrap();
                for inputs in [[&x, &other], [&other, &x], [&x, &x]] {
                    let found = replay.run(&inputs).unwrap().to_dtype(candle_core::DType::F32).unwrap();
                    let expected = run(inputs[0], inputs[1]).unwrap().to_dtype(candle_core::DType::F32).unwrap();
                    assert_eq!(found.to_vec1::<f32>().unwrap(), expected.to_vec1::<f32>().unwrap());
                }
                assert!(replay.run(&[&x]).is_err());
                let error = Replay::capture(&[&x], 4, Vec::new(), |t| {
                    t[0].to_device(&candle_core::Device::Cpu)?; // waits
                    Ok(t[0].clone())
                });
                assert!(error.is_err());
                // and the device is as it was
                assert_eq!(
                    add(&x, &x).unwrap().to_dtype(candle_core::DType::F32).unwrap().to_vec1::<f32>().unwrap()[3],
                    8.0
                );
            }
        }
    }
}

#[cfg(not(feature = "cuda"))]
mod absent {
    use anyhow::{Result, bail};
    use candle_core::{Shape, Tensor};

    /// The twin of a CUDA graph in a build without GPU kernels: there is none.
    pub enum Replay {}

    impl Replay {
        /// # Errors
        /// Always.
        pub fn capture(
            _: &[&Tensor],
            _: impl Into<Shape>,
            _: Vec<Tensor>,
            _: impl FnOnce(&[Tensor]) -> Result<Tensor>,
        ) -> Result<Self> {
            bail!("this build has no GPU kernels")
        }

        /// Never called.
        pub fn run(&self, _: &[&Tensor]) -> Result<Tensor> {
            match *self {}
        }
    }
}
