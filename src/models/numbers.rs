//! The numbers of tensors: of a file's bytes, or made of nothing.

use anyhow::{Result, bail};
use candle_core::{Device, Tensor};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

/// Uniform numbers that depend on the seed and the key.
pub(super) fn random(seed: u64, key: &str, shape: &[usize]) -> Result<Tensor> {
    const CHUNK: usize = 1 << 14;
    let start = key
        .bytes()
        .fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let fan_in = shape.iter().skip(1).product::<usize>().max(1);
    let (center, spread) = match shape {
        [_] if key.ends_with("weight") => (1.0, 0.1),
        [_] => (0.0, 0.1),
        _ => (0.0, (3.0 / fan_in as f32).sqrt()),
    };
    let mut values = vec![0f32; shape.iter().product()];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        let mut state = start.wrapping_add((chunk as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        for value in values {
            // splitmix64
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            *value = center + spread * ((z >> 40) as f32 / (1u32 << 23) as f32 - 1.0);
        }
    });
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Little-endian floats of any width as f32. f64 is rounded to nearest; the others convert without loss.
pub(super) fn to_f32(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>> {
    /// Elements per task: large against the cost of a task, small against the second-level cache.
    const CHUNK: usize = 1 << 15;
    /// From the bytes of a chunk to its values.
    type Convert = fn(&[u8], &mut [f32]);
    /// The bit patterns of a chunk of 16-bit floats.
    fn bits(bytes: &[u8]) -> Vec<u16> {
        bytes.as_chunks().0.iter().map(|&b| u16::from_le_bytes(b)).collect()
    }
    let (width, convert): (usize, Convert) = match dtype {
        Dtype::F16 => (2, |bytes, out| bits(bytes).reinterpret_cast::<f16>().convert_to_f32_slice(out)),
        Dtype::BF16 => (2, |bytes, out| bits(bytes).reinterpret_cast::<bf16>().convert_to_f32_slice(out)),
        Dtype::F32 => (4, |bytes, out| {
            out.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, &b)| *x = f32::from_le_bytes(b));
        }),
        Dtype::F64 => (8, |bytes, out| {
            out.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, &b)| *x = f64::from_le_bytes(b) as f32);
        }),
        other => bail!("it has type {other:?}; weights are f16, bf16, f32 or f64"),
    };
    let mut values = vec![0.0; bytes.len() / width];
    values.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * width)).for_each(|(out, bytes)| convert(bytes, out));
    Ok(values)
}
