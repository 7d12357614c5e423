//! Names and sizes of the tiled kernels (`struct Sizes` of ops/cuda/attention.cuh), apart from them so that they are tested
//! where there is no GPU.

use candle_core::{DType, Result, bail};

/// Largest head of the tiled kernels.
pub(super) const LARGEST_HEAD: usize = 160;

/// The tiled kernels' names and sizes for one head dimension; `struct Sizes` of attention.cuh.
pub(super) struct Tiled {
    pub(super) module: &'static str,
    pub(super) names: [&'static str; 3],
    pub(super) threads: usize,
    pub(super) forward_rows: usize,
    pub(super) backward_rows: usize,
    pub(super) forward_bytes: usize,
    pub(super) backward_bytes: usize,
}

impl Tiled {
    /// # Errors
    /// `d` is more than [`LARGEST_HEAD`].
    pub(super) fn new(dtype: DType, d: usize) -> Result<Self> {
        macro_rules! names {
            ($($size:literal)*) => {
                [$(($size, [
                    concat!("attention_fwd_", $size),
                    concat!("attention_bwd_q_", $size),
                    concat!("attention_bwd_kv_", $size),
                ])),*]
            };
        }
        let Some((size, names)) = names!(16 32 48 64 80 128 160).into_iter().find(|(size, _)| d <= *size) else {
            bail!("no tiled attention for heads of {d} numbers");
        };
        let module = match dtype {
            DType::BF16 => "attention_bf16",
            DType::F16 => "attention_f16",
            _ => "attention_f32",
        };
        let half = dtype != DType::F32;
        let warps = if !half && size > 80 { 2 } else { 4 };
        let forward_tiles = if half && size <= 64 { 2 } else { 1 };
        let step = match (half, size <= 80) {
            (true, true) => 64,
            (true, false) | (false, true) => 32,
            (false, false) => 16,
        };
        let row_bytes = size * dtype.size_in_bytes() + 16;
        let scratch = |tiles: usize| if half { 0 } else { warps * 16 * tiles * (step + 4) * 4 };
        let (forward_rows, backward_rows) = (16 * forward_tiles * warps, 16 * warps);
        Ok(Self {
            module,
            names,
            threads: 32 * warps,
            forward_rows,
            backward_rows,
            forward_bytes: (forward_rows + 4 * step) * row_bytes + scratch(forward_tiles),
            backward_bytes: (2 * backward_rows + 4 * step) * row_bytes + scratch(1) + 16 * step,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `tools/cuda/check_attention.cpp` holds the kernels' own sizes against the same table.
    #[test]
    fn are_those_that_the_kernels_have() {
        let table = include_str!("../cuda/attention_sizes.txt");
        let mut lines = 0;
        for line in table.lines().filter(|line| !line.starts_with('#')) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let dtype = match words[0] {
                "f32" => DType::F32,
                "bf16" => DType::BF16,
                other => panic!("{other}"),
            };
            let numbers: Vec<usize> = words[1..].iter().map(|word| word.parse().unwrap()).collect();
            for d in [numbers[0] - 7, numbers[0]] {
                let tiled = Tiled::new(dtype, d).unwrap();
                assert_eq!(tiled.names[2], format!("attention_bwd_kv_{}", numbers[0]));
                let found =
                    [tiled.threads, tiled.forward_rows, tiled.backward_rows, tiled.forward_bytes, tiled.backward_bytes];
                assert_eq!(found, numbers[1..], "{line}");
            }
            lines += 1;
        }
        assert_eq!(lines, 14);
        assert!(Tiled::new(DType::BF16, LARGEST_HEAD + 1).is_err());
    }
}
