//! The twin of `cuda.rs` in a build without GPU kernels.

use candle_core::{Device, Result, Tensor, bail};

use super::Counts;

const ABSENT: &str = "this build has no GPU kernels";

pub(super) fn open(name: &str, _ordinal: usize, _allow_tf32: bool) -> anyhow::Result<Device> {
    anyhow::bail!(
        "device `{name}`: this build computes on the CPU only; use --device cpu (or run.device = \"cpu\"), or build it with `--features cuda`"
    )
}

pub(super) fn upload(_: &Tensor, _: &Device) -> Result<Tensor> {
    bail!("{ABSENT}")
}

pub(super) fn name(_: &Device) -> Result<String> {
    bail!("{ABSENT}")
}

pub(super) fn memory(_: &Device) -> Result<(usize, usize)> {
    bail!("{ABSENT}")
}

pub(super) fn counts(_: &Device) -> Result<Counts> {
    bail!("{ABSENT}")
}

pub(super) fn reset_peak(_: &Device) -> Result<()> {
    bail!("{ABSENT}")
}
