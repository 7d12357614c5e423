//! What a run computes on: a device, and the number format of weights and activations there.
//!
//! One process opens one device and uses it from one thread, on one stream.

#[cfg(feature = "cuda")]
pub(in crate::ops) mod cuda;

#[cfg(not(feature = "cuda"))]
mod absent;
#[cfg(not(feature = "cuda"))]
use absent as cuda;

use candle_core::{DType, Device, Result, Tensor};

use crate::config::Precision;

/// A device and the number format of weights and activations there.
#[derive(Clone, Debug)]
pub struct Compute {
    device: Device,
    format: Format,
    /// The rewards' towers may have another one than the pipeline.
    rewards: Format,
    /// Whether repeated evaluations are launched as CUDA graphs.
    graphs: bool,
}

#[derive(Clone, Copy, Debug)]
struct Format {
    dtype: DType,
    /// What weights are rounded to before they are stored in `dtype`.
    weights: DType,
}

impl Format {
    fn of(precision: Precision) -> Self {
        let dtype = match precision {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
            Precision::F16 => DType::F16,
        };
        Self { dtype, weights: dtype }
    }

    /// f32, with weights that are rounded as they are here.
    fn with_rounded_weights(self) -> Self {
        Self { dtype: DType::F32, weights: self.dtype }
    }
}

impl Compute {
    /// f32 on the CPU.
    pub fn cpu() -> Self {
        Self::new(Device::Cpu, Precision::F32)
    }

    fn new(device: Device, precision: Precision) -> Self {
        Self { device, format: Format::of(precision), rewards: Format::of(precision), graphs: false }
    }

    /// `device` is `cpu`, `cuda` or `cuda:N`; without a `precision` the device's own is taken (f32 on the CPU, bf16 on a
    /// GPU). `allow_tf32` lets matrix products and convolutions of f32 round their inputs to TF32 on a GPU.
    ///
    /// # Errors
    /// A GPU where this build has no kernels for one, or where there is no driver, no library or no such GPU. f16 or bf16
    /// on the CPU.
    pub fn open(device: &str, precision: Option<Precision>, allow_tf32: bool) -> anyhow::Result<Self> {
        let compute = Self::open_any(device, precision, allow_tf32)?;
        anyhow::ensure!(
            compute.device.is_cuda() || compute.dtype() == DType::F32,
            "precision {}: the CPU computes in f32 (half-precision weight files are read all the same); use --precision f32",
            compute.precision_name()
        );
        Ok(compute)
    }

    /// As [`Self::open`]; the CPU may have a half precision too. It computes in f32 and rounds what each operation gives,
    /// as a GPU would: slow, and good for seeing what the roundings do.
    ///
    /// # Errors
    /// As in [`Self::open`].
    pub fn open_any(device: &str, precision: Option<Precision>, allow_tf32: bool) -> anyhow::Result<Self> {
        let (device, default) = match device {
            "cpu" => (Device::Cpu, Precision::F32),
            name => {
                let ordinal = name.strip_prefix("cuda:").map_or(Ok(0), str::parse);
                let ordinal = ordinal.map_err(|_| anyhow::anyhow!("device `{name}`: must be cpu, cuda or cuda:N"))?;
                (cuda::open(name, ordinal, allow_tf32)?, Precision::Bf16)
            }
        };
        Ok(Self::new(device, precision.unwrap_or(default)))
    }

    /// With repeated evaluations as CUDA graphs, on a GPU.
    pub fn with_graphs(self, graphs: bool) -> Self {
        Self { graphs: graphs && self.device.is_cuda(), ..self }
    }

    /// Whether repeated evaluations are to be launched as CUDA graphs.
    pub fn graphs(&self) -> bool {
        self.graphs
    }

    /// The same with the rewards' towers in another precision; without one they have the pipeline's.
    ///
    /// # Errors
    /// f16 or bf16 on the CPU.
    pub fn with_rewards_in(self, precision: Option<Precision>) -> anyhow::Result<Self> {
        let Some(precision) = precision else { return Ok(self) };
        anyhow::ensure!(
            self.device.is_cuda() || precision == Precision::F32,
            "reward precision {}: the CPU computes in f32; use --reward-precision f32, or leave run.reward_precision out",
            Format::of(precision).dtype.as_str()
        );
        Ok(Self { rewards: Format::of(precision), ..self })
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Of weights and activations. Latents, scores, adapters and their gradients are f32 everywhere.
    pub fn dtype(&self) -> DType {
        self.format.dtype
    }

    /// The same device as the rewards' towers use it.
    pub fn for_rewards(&self) -> Self {
        Self { format: self.rewards, ..self.clone() }
    }

    /// The same device in f32: what is small or must be exact, such as the heads of rewards.
    pub fn in_f32(&self) -> Self {
        let f32 = Format::of(Precision::F32);
        Self { format: f32, rewards: f32, ..self.clone() }
    }

    /// The same device in f32, with weights that are rounded as they are here: shows what rounding the weights alone does.
    pub fn in_f32_with_rounded_weights(&self) -> Self {
        let (format, rewards) = (self.format.with_rounded_weights(), self.rewards.with_rounded_weights());
        Self { format, rewards, ..self.clone() }
    }

    /// `f32`, `bf16` or `f16`.
    pub fn precision_name(&self) -> &'static str {
        self.dtype().as_str()
    }

    pub fn precision(&self) -> Precision {
        match self.dtype() {
            DType::BF16 => Precision::Bf16,
            DType::F16 => Precision::F16,
            _ => Precision::F32,
        }
    }

    /// Whether the branches of guidance are one batch. A GPU is the better used the larger its launches are; CPU threads
    /// share two evaluations more evenly than the layers of one.
    pub fn batches_guidance(&self) -> bool {
        self.device.is_cuda() || self.dtype() != DType::F32
    }

    /// A tensor as weights are here.
    pub fn put(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.to_dtype(self.format.weights)?.to_dtype(self.format.dtype)?.to_device(&self.device)
    }

    /// `cpu`, or `NVIDIA H100 80GB HBM3, 79.1 of 79.6 GiB free`.
    pub fn describe(&self) -> String {
        if self.device.is_cpu() {
            return "cpu".to_owned();
        }
        let name = cuda::name(&self.device).unwrap_or_else(|_| "an unknown GPU".to_owned());
        match cuda::memory(&self.device) {
            Ok((free, total)) => format!("{name}, {:.1} of {:.1} GiB free", gib(free), gib(total)),
            Err(_) => name,
        }
    }

    /// The GPU's name; `None` for the CPU.
    pub fn gpu_name(&self) -> Option<String> {
        self.device.is_cuda().then(|| cuda::name(&self.device).unwrap_or_else(|_| "unknown".to_owned()))
    }

    /// Waits until everything that was asked of the device is done: before a clock is read.
    pub fn synchronize(&self) -> Result<()> {
        self.device.synchronize()
    }

    /// The counters of the GPU's memory; `None` on the CPU, whose allocator counts.
    pub fn gpu_memory(&self) -> Option<GpuMemory<'_>> {
        self.device.is_cuda().then_some(GpuMemory { device: &self.device })
    }
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// A tensor of f32 or i64 on `device`. Does not wait for a GPU, whatever its size: `Tensor::to_device` may.
pub fn upload(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    if tensor.device().is_cpu() && device.is_cuda() { cuda::upload(tensor, device) } else { tensor.to_device(device) }
}

/// What NVIDIA's libraries take when they are first used, and what is lost between blocks.
const SET_ASIDE: usize = 512 << 20;

/// The memory of one GPU, as its allocator counts it.
pub struct GpuMemory<'a> {
    device: &'a Device,
}

impl GpuMemory<'_> {
    /// Bytes that can still be had: free on the device, or kept by the allocator and not in use.
    ///
    /// # Errors
    /// The driver's.
    pub fn available(&self) -> Result<usize> {
        let counts = self.counts()?;
        Ok((cuda::memory(self.device)?.0 + counts.reserved.saturating_sub(counts.live)).saturating_sub(SET_ASIDE))
    }

    /// # Errors
    /// The driver's.
    pub fn counts(&self) -> Result<Counts> {
        self.device.synchronize()?;
        cuda::counts(self.device)
    }

    /// The peaks are what is in use now.
    ///
    /// # Errors
    /// The driver's.
    pub fn reset_peak(&self) -> Result<()> {
        self.device.synchronize()?;
        cuda::reset_peak(self.device)
    }
}

/// Bytes of a GPU's allocator.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// In use now.
    pub live: usize,
    /// In use at most, since the last reset.
    pub peak: usize,
    /// Taken from the device, in use or not.
    pub reserved: usize,
    /// The most that was taken from the device, since the last reset.
    pub reserved_peak: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_computes_in_f32() {
        let compute = Compute::open("cpu", None, false).unwrap();
        assert_eq!((compute.dtype(), compute.describe().as_str()), (DType::F32, "cpu"));
        for precision in [Precision::Bf16, Precision::F16] {
            let message = Compute::open("cpu", Some(precision), false).unwrap_err().to_string();
            assert!(message.contains("use --precision f32"), "{message}");
            assert!(Compute::open_any("cpu", Some(precision), false).is_ok());
        }
    }

    #[test]
    fn rewards_have_the_precision_of_the_run_or_their_own() {
        let run = Compute::open_any("cpu", Some(Precision::Bf16), false).unwrap();
        let rewards = |compute: &Compute| (compute.dtype(), compute.for_rewards().dtype());
        assert_eq!(rewards(&run), (DType::BF16, DType::BF16));
        assert_eq!(rewards(&run.clone().with_rewards_in(None).unwrap()), (DType::BF16, DType::BF16));
        assert_eq!(rewards(&run.clone().with_rewards_in(Some(Precision::F32)).unwrap()), (DType::BF16, DType::F32));
        let message = run.clone().with_rewards_in(Some(Precision::F16)).unwrap_err().to_string();
        assert!(message.contains("reward precision f16") && message.contains("--reward-precision f32"), "{message}");

        // f32 throughout, with the weights of each rounded as theirs were
        let third = Tensor::new(&[1f32 / 3.0], &Device::Cpu).unwrap();
        let kept = |compute: &Compute| compute.put(&third).unwrap().to_vec1::<f32>().unwrap()[0];
        let rounded = run.with_rewards_in(Some(Precision::F32)).unwrap().in_f32_with_rounded_weights();
        assert_eq!(rewards(&rounded), (DType::F32, DType::F32));
        assert_eq!([kept(&rounded), kept(&rounded.for_rewards())], [0.333_984_38, 1.0 / 3.0]);
    }

    #[test]
    fn no_gpu_is_an_error_that_says_what_is_missing() {
        let Err(error) = Compute::open("cuda:63", None, false) else {
            panic!("no machine has 64 GPUs");
        };
        let message = format!("{error:#}");
        assert!(message.contains("cuda:63") && message.contains("--device cpu"), "{message}");
    }
}
