//! Every kernel on a GPU against the CPU, in each number format; where there is no GPU the tests say so and compare nothing.
//! The kernels' arithmetic itself is checked without a GPU by `tools/cuda/emulate.sh`.

use candle_core::{DType, Device, Result, Tensor};

use super::Kernel;
use crate::ops::activation::{Activation, activation_bwd, activation_fwd};
use crate::ops::attention::{Heads, attention_bwd, attention_fwd};
use crate::ops::concat::{concat_last_bwd, concat_last_fwd};
use crate::ops::device::upload;
use crate::ops::geglu::{geglu_bwd, geglu_fwd};
use crate::ops::group_norm::{GroupNorm, group_norm_bwd, group_norm_fwd};
use crate::ops::jpeg_size::{jpeg_size_bwd, jpeg_size_fwd};
use crate::ops::layer_norm::{LayerNorm, layer_norm_bwd, layer_norm_fwd};
use crate::ops::linear::{lora_bwd, lora_fwd};
use crate::ops::sum::{add, add_channels};
use crate::ops::testing::{Case, gpu_tolerance, gpus, relative_error};
use crate::ops::upsample::{upsample_nearest_bwd, upsample_nearest_fwd};
use crate::ops::{Ledger, is_finite};

/// `run` on the GPU in each format, against the CPU in f32 on the same rounded numbers. Inputs from `factors` on are f32
/// everywhere.
fn compare(what: &str, inputs: &[Tensor], factors: usize, run: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>) {
    for compute in gpus() {
        let rounded = |(index, input): (usize, &Tensor)| {
            input.to_dtype(if index < factors { compute.dtype() } else { DType::F32 }).unwrap()
        };
        let rounded: Vec<Tensor> = inputs.iter().enumerate().map(rounded).collect();
        let on_cpu: Vec<Tensor> = rounded.iter().map(|input| input.to_dtype(DType::F32).unwrap()).collect();
        let on_gpu: Vec<Tensor> = rounded.iter().map(|input| input.to_device(compute.device()).unwrap()).collect();
        let (expected, found) = (run(&on_cpu).unwrap(), run(&on_gpu).unwrap());
        assert_eq!(expected.len(), found.len());
        for (index, (expected, found)) in expected.iter().zip(&found).enumerate() {
            let error = relative_error(&found.to_device(&Device::Cpu).unwrap(), expected);
            assert!(error < gpu_tolerance(&compute), "{what}: output {index} in {:?}: {error:.2e}", compute.dtype());
        }
    }
}

#[test]
fn elementwise_operations_agree_with_the_cpu() {
    for shape in [[1, 1, 2], [3, 7, 10], [2, 33, 64]] {
        let [x, d, e] = [1, 2, 3].map(|seed| Case::normal(&shape, seed));
        for function in [
            Activation::Relu,
            Activation::Silu,
            Activation::Gelu,
            Activation::QuickGelu,
            Activation::Tanh,
            Activation::Sigmoid,
            Activation::GeluTanh,
            Activation::UnitRange,
        ] {
            compare(&format!("{function:?}"), &[x.clone(), d.clone()], 2, |t| {
                Ok(vec![activation_fwd(&t[0], function)?, activation_bwd(&t[1], &t[0], function)?])
            });
        }
        compare("add", &[x.clone(), d.clone()], 2, |t| Ok(vec![add(&t[0], &t[1])?]));
        let shift = Case::normal(&shape[2..], 4);
        compare("add_channels", &[x.clone(), shift], 2, |t| Ok(vec![add_channels(&t[0], &t[1])?]));
        let half = Case::normal(&[shape[0], shape[1], shape[2] / 2], 5);
        compare("geglu", &[x.clone(), half], 2, |t| Ok(vec![geglu_fwd(&t[0])?, geglu_bwd(&t[1], &t[0])?]));
        compare("concat", &[x, e], 2, |t| {
            let y = concat_last_fwd(&t[0], &t[1])?;
            let (a, b) = concat_last_bwd(&y, shape[2] - 1, shape[2] + 1)?;
            Ok(vec![y, a, b])
        });
    }
    for (h, w, height, width, c) in [(3, 5, 6, 10, 8), (3, 5, 5, 9, 3)] {
        let (x, d) = (Case::normal(&[2, h, w, c], 1), Case::normal(&[2, height, width, c], 2));
        compare("upsample", &[x, d], 2, |t| {
            Ok(vec![upsample_nearest_fwd(&t[0], height, width)?, upsample_nearest_bwd(&t[1], h, w)?])
        });
    }
}

#[test]
fn norms_agree_with_the_cpu() {
    for (h, w, c, groups) in [(3, 5, 6, 3), (33, 40, 6, 2), (16, 16, 320, 32), (64, 64, 64, 32), (4, 4, 2560, 32)] {
        for silu in [false, true] {
            let x = [Case::normal(&[2, h, w, c], 3), Case::normal(&[2, h, w, c], 4)];
            let inputs = [x[0].clone(), x[1].clone(), Case::normal(&[c], 1), Case::normal(&[c], 2)];
            compare("group norm", &inputs, 4, |t| {
                let norm = GroupNorm { weight: t[2].clone(), bias: t[3].clone(), groups, eps: 1e-5, silu };
                Ok(vec![group_norm_fwd(&t[0], &norm)?, group_norm_bwd(&t[1], &t[0], &norm)?])
            });
        }
    }
    for (rows, c) in [(1, 5), (77, 64), (300, 320), (20, 1288)] {
        let x = [Case::normal(&[2, rows, c], 3), Case::normal(&[2, rows, c], 4)];
        let inputs = [x[0].clone(), x[1].clone(), Case::normal(&[c], 1), Case::normal(&[c], 2)];
        compare("layer norm", &inputs, 4, |t| {
            let norm = LayerNorm { weight: t[2].clone(), bias: t[3].clone(), eps: 1e-5 };
            Ok(vec![layer_norm_fwd(&t[0], &norm)?, layer_norm_bwd(&t[1], &t[0], &norm)?])
        });
    }
}

#[test]
fn attention_agrees_with_the_cpu() {
    // every size of the tiled kernels, splits of the queries, heads that are too large for tiles
    for (n, m, count, d, causal) in [
        (5, 7, 2, 3, false),
        (300, 77, 2, 8, false),
        (77, 77, 2, 32, true),
        (1024, 1024, 2, 40, false),
        (1024, 77, 2, 40, false),
        (257, 257, 2, 64, false),
        (257, 257, 1, 80, false),
        (70, 77, 1, 104, false),
        (256, 256, 2, 160, false),
        (64, 77, 2, 160, false),
        (200, 200, 2, 192, false),
        (90, 90, 1, 512, true),
    ] {
        let heads = Heads { count, causal };
        let (q, k) = ([2, n, count * d], [2, m, count * d]);
        let inputs = [Case::normal(&q, 1), Case::normal(&k, 2), Case::normal(&k, 3), Case::normal(&q, 4)];
        compare(&format!("attention {n}x{m}, {count} heads of {d}"), &inputs, 4, |t| {
            let (d_q, d_k, d_v) = attention_bwd(&t[3], &t[0], &t[1], &t[2], heads)?;
            Ok(vec![attention_fwd(&t[0], &t[1], &t[2], heads)?, d_q, d_k, d_v])
        });
    }
}

#[test]
fn lora_agrees_with_the_cpu() {
    for (rows, inputs, outputs, rank) in [(1, 3, 2, 1), (77, 768, 320, 4), (1024, 320, 320, 16), (1030, 322, 1280, 9)] {
        let x = [Case::normal(&[2, rows, inputs], 1), Case::normal(&[2, rows, outputs], 2)];
        let (y, a, b) = (x[1].clone(), Case::normal(&[rank, inputs], 3), Case::normal(&[outputs, rank], 4));
        compare(&format!("LoRA {rows}"), &[x[0].clone(), x[1].clone(), y, a, b], 3, |t| {
            let (d_x, d_a, d_b) = lora_bwd(&t[1], &t[0], &t[3], &t[4], 0.7)?;
            Ok(vec![lora_fwd(&t[0], &t[3], &t[4], 0.7, &t[2])?, d_x, d_a, d_b])
        });
    }
}

#[test]
fn jpeg_sizes_agree_with_the_cpu() {
    for (h, w) in [(16, 16), (33, 21)] {
        let pixels = Case::normal(&[2, 3, h, w], 1).tanh().unwrap().affine(0.5, 0.5).unwrap();
        compare("jpeg", &[pixels, Case::normal(&[2], 2)], 2, |t| {
            Ok(vec![jpeg_size_fwd(&t[0])?, jpeg_size_bwd(&t[1], &t[0])?])
        });
    }
}

#[test]
fn the_optimizer_agrees_with_the_cpu() {
    use crate::optim::{AdamW, add_all, clip_grad_norm, moving_average};
    let shapes: [&[usize]; 3] = [&[4, 320], &[320, 4], &[3]];
    let tensors = |seed| shapes.map(|shape| Case::normal(shape, seed));
    let inputs: Vec<Tensor> = tensors(1).into_iter().chain(tensors(2)).collect();
    compare("AdamW", &inputs, 0, |t| {
        let (parameters, mut gradients) = (&t[..3], t[3..].to_vec());
        let norm = clip_grad_norm(&mut gradients, 1.0).unwrap();
        let mut optimizer = AdamW::new(&Default::default(), parameters).unwrap();
        let mut next = optimizer.update(parameters, &gradients, 0.1).unwrap();
        next = optimizer.update(&next, &gradients, 0.1).unwrap();
        next.extend(moving_average(parameters, &gradients, 0.9).unwrap());
        next.extend(add_all(parameters, &gradients).unwrap());
        next.push(norm.to_dtype(DType::F32)?);
        Ok(next)
    });
}

#[test]
fn a_bad_number_is_found_on_a_gpu() {
    for compute in gpus() {
        let tensor = |bad: f32| {
            let mut data = vec![1f32; 200_000];
            data[123_456] = bad;
            let tensor = Tensor::from_vec(data, 200_000, &Device::Cpu).unwrap();
            tensor.to_dtype(compute.dtype()).unwrap().to_device(compute.device()).unwrap()
        };
        let (good, bad) = (tensor(2.0), tensor(f32::NAN));
        assert!(is_finite(&good).unwrap() && !is_finite(&bad).unwrap());
        assert!(!is_finite(&tensor(f32::INFINITY)).unwrap());
        let mut ledger = Ledger::default();
        let third = |ledger: &mut Ledger| ledger.number(&good.get(2).unwrap()).unwrap();
        let before = third(&mut ledger);
        ledger.finite(&good, |_| unreachable!()).unwrap();
        assert_eq!(ledger.read().unwrap().get(before), 1.0);
        let mut ledger = Ledger::default();
        ledger.finite(&good, |_| unreachable!()).unwrap();
        ledger.finite(&bad, |_| "the second".into()).unwrap();
        ledger.finite(&bad, |_| "the third".into()).unwrap();
        third(&mut ledger);
        assert_eq!(ledger.read().err().unwrap().to_string(), "not a number: the second");
    }
}

#[test]
fn what_is_uploaded_in_pieces_arrives_whole() {
    for compute in gpus() {
        for n in [1, 16_384, 16_385, 100_000] {
            let data: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let there = upload(&Tensor::from_vec(data.clone(), n, &Device::Cpu).unwrap(), compute.device()).unwrap();
            assert!(there.device().is_cuda() && there.to_vec1::<f32>().unwrap() == data);
        }
    }
}

#[test]
fn other_arguments_than_a_kernels_never_reach_a_gpu() {
    for compute in gpus() {
        let tensor = |dtype| Tensor::zeros(8, dtype, compute.device()).unwrap();
        let (x, y, other) = (tensor(compute.dtype()), tensor(compute.dtype()), tensor(DType::F64));
        let of = || Kernel::of("elementwise", "add", &x).unwrap();
        let says = |kernel: Kernel, expected: &str| {
            let message = kernel.launch_map(8).unwrap_err().to_string();
            assert!(message.contains("the CUDA kernel add_") && message.contains(expected), "{message}");
        };
        says(of().output("y", &y).input("b", &x).input("a", &x).int("n", 8), "takes `a` in place 2, it was given `b`");
        says(of().output("y", &y).input("a", &x).int("n", 8), "takes `b` in place 3, it was given `n`");
        says(of().input("y", &y).input("a", &x).input("b", &x).int("n", 8), "as `y` (place 1), it was given Input");
        says(of().output("y", &y).input("a", &other).input("b", &x).int("n", 8), "it was given Input(F64)");
        says(of().output("y", &y).input("a", &x).input("b", &x).float("n", 8.0), "takes Int as `n` (place 4)");
        says(of().output("y", &y).input("a", &x).input("b", &x).int("n", usize::MAX), "n");
        // a temporary lives until the launch
        of().output("y", &y).input("a", &x.affine(1.0, 2.0).unwrap()).input("b", &x).int("n", 8).launch_map(8).unwrap();
        assert_eq!(y.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap(), [2.0; 8]);
        assert!(of().output("y", &y).launch([1, usize::MAX, 1], 32, 0).is_err());
    }
}
