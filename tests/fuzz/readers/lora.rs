//! LoRA files.

use std::fs;
use std::path::Path;

use alignprop::lora::Adapters;
use alignprop::lora::formats::{self, save};
use alignprop::models::Source;
use alignprop::models::unet::Unet;
use alignprop::ops::device::Compute;
use candle_core::{DType, Device, Tensor};

use super::models::PICKLE_WORDS;
use super::{MODEL, Reader, Shape, bytes_of, of_file, words, zeros};
use crate::support::{copy_folder, fixture, listing, original, run, text};

const LAYER: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";

/// Tensors and a header's strings.
type Contents<'a> = (Vec<(String, &'a Tensor)>, &'a [(&'a str, &'a str)]);

/// Adapters of one layer in every spelling.
fn lora_seeds(folder: &Path, extra: usize) -> Vec<Vec<u8>> {
    let (a, b) = (Tensor::ones((2, 8), DType::F32, &Device::Cpu).unwrap(), zeros(&[8, 2]).unwrap());
    let alpha = Tensor::new(2f32, &Device::Cpu).unwrap();
    let kohya = format!("lora_unet_{}", LAYER.replace('.', "_"));
    let config = r#"{"unet.lora_alpha": 4, "unet.r": 2, "unet.alpha_pattern": {"to_q": 1}, "unet.use_rslora": true}"#;
    let path = folder.join(format!("seed{extra}.safetensors"));
    let files: [Contents; 5] = [
        (
            vec![(format!("unet.{LAYER}.lora_A.weight"), &a), (format!("unet.{LAYER}.lora_B.weight"), &b)],
            &[("lora_adapter_metadata", config)],
        ),
        (
            vec![
                (format!("base_model.model.{LAYER}.lora_A.default.weight"), &a),
                (format!("base_model.model.{LAYER}.lora_B.default.weight"), &b),
            ],
            &[],
        ),
        (
            vec![
                (format!("{kohya}.lora_down.weight"), &a),
                (format!("{kohya}.lora_up.weight"), &b),
                (format!("{kohya}.alpha"), &alpha),
            ],
            &[("ss_network_dim", "2")],
        ),
        (
            vec![
                ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight".into(), &a),
                ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_up.weight".into(), &b),
            ],
            &[],
        ),
        (
            vec![
                ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight".into(), &a),
                ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight".into(), &b),
            ],
            &[],
        ),
    ];
    let write = |(tensors, metadata): Contents| {
        original::save(&tensors.into_iter().map(|(name, tensor)| (name, tensor.clone())).collect(), metadata, &path);
        fs::read(&path).unwrap()
    };
    files.map(write).to_vec()
}

const LORA_WORDS: [&str; 24] = [
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "text_encoder.x.lora_A.weight",
    "unet.conv_in.lora_A.weight",
    "lora_unet_.lora_down.weight",
    "lora_unet_up_blocks_3_attentions_99999999999999999999_to_q.alpha",
    ".lora_A.weight",
    "unet.down_blocks.0.attentions.0.proj_in.lora.up.weight",
    "lora_magnitude_vector",
    "hada_w1_a",
    "dora_scale",
    "alpha",
    "lora_unet_output_blocks_11_1_proj_out.lora_up.weight",
    "lora_unet_middle_block_1_proj_in.lora_up.weight",
    "é.lora_B.weight",
    "lora_unet_input_blocks_0_0.lora_down.weight",
    "lora_unet_output_blocks_18446744073709551615_1_proj_in.alpha",
    "F16",
    "I64",
    "transformer.single.lora_A.weight",
    "lora_adapter_metadata",
    "__metadata__",
    "{\"r\":1}",
    "unet..processor.to_q_lora.down.weight",
    ".",
];

/// An adapter, as safetensors or as a pickle.
pub fn file(safetensors: bool, folder: &Path) -> Reader {
    let again = folder.join("again.safetensors");
    let read = move |path: &Path| {
        let loaded = formats::load(path)?;
        loaded.warn(path);
        // what was read can be written, and is then the same
        save(&loaded.adapters, &loaded.metadata, &again)?;
        let second = formats::load(&again)?;
        let names =
            |adapters: &Adapters| adapters.named_tensors().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(&second.adapters), names(&loaded.adapters));
        Ok(())
    };
    if safetensors {
        let (seeds, words) = (lora_seeds(folder, 0), LORA_WORDS.to_vec());
        return Reader { shape: Shape::Safetensors, seeds, words, read: of_file(folder.join("x.safetensors"), read) };
    }
    let tensors = [("lora_A", zeros(&[2, 8])), ("lora_B", zeros(&[8, 2]))];
    let tensors = tensors.map(|(part, tensor)| (format!("unet.{LAYER}.{part}.weight"), tensor.unwrap())).into();
    let seed = folder.join("seed.bin");
    original::save_ckpt(&tensors, None, &seed);
    let words = PICKLE_WORDS.iter().chain(&LORA_WORDS).copied().collect();
    let seeds = vec![fs::read(seed).unwrap()];
    Reader { shape: Shape::Pickle, seeds, words, read: of_file(folder.join("pytorch_lora_weights.bin"), read) }
}

/// peft's config beside an adapter.
pub fn adapter_config(folder: &Path) -> Reader {
    copy_folder(&fixture("lora/peft"), folder);
    let path = folder.join("adapter_model.safetensors");
    let words = words(
        "unet.lora_alpha ~ lora_alpha ~ alpha_pattern ~ rank_pattern ~ use_rslora ~ use_dora ~ bias ~ all ~ init_lora_weights ~ pissa ~ modules_to_save ~ r ~ to_q",
    );
    Reader {
        shape: Shape::Json,
        seeds: vec![bytes_of("lora/peft/adapter_config.json")],
        words,
        read: of_file(folder.join("adapter_config.json"), move |_| formats::load(&path).map(drop)),
    }
}

/// Whole commands: their output is there and can be read, or nothing is.
pub fn commands(folder: &Path) -> Reader {
    let out = folder.join("out");
    let read = move |path: &Path| {
        let (from, part) = (text(path), format!("{}=0.5", text(path)));
        let files = ["soup.safetensors", "kohya.safetensors", "peft"].map(|name| out.join(name));
        let [soup, kohya, peft] = files.each_ref().map(text);
        let lines: [&[&str]; 3] = [
            &["soup", &part, &part, "-o", &soup],
            &["export", &from, "--format", "kohya", "--out", &kohya],
            &["export", &from, "--format", "peft", "--out", &peft],
        ];
        let mut result = Ok(());
        for (line, file) in lines.iter().zip(&files) {
            let _ = fs::remove_dir_all(&out);
            fs::create_dir_all(&out)?;
            match run(line) {
                Ok(_) => drop(formats::load(file).unwrap()),
                Err(error) => {
                    assert_eq!(listing(&out), [""; 0], "what {line:?} left");
                    result = Err(error);
                }
            }
        }
        result
    };
    let (seeds, words) = (lora_seeds(folder, 1), LORA_WORDS.to_vec());
    Reader { shape: Shape::Safetensors, seeds, words, read: of_file(folder.join("x.safetensors"), read) }
}

/// A pipeline with the adapter folded in: the folder is there and can be read, or nothing is.
pub fn merged(folder: &Path) -> Reader {
    let (out, model) = (folder.join("out"), text(fixture(MODEL)));
    let read = move |path: &Path| {
        formats::load(path)?;
        let _ = fs::remove_dir_all(&out);
        fs::create_dir_all(&out)?;
        let merged = out.join("merged");
        let (from, to) = (text(path), text(&merged));
        let done = run(&["export", &from, "--format", "merged", "--model", &model, "--out", &to]);
        match &done {
            Ok(_) => drop(Unet::load(&Source::open(&to)?.sub("unet"), None, &Compute::cpu()).unwrap()),
            Err(_) => assert_eq!(listing(&out), [""; 0], "what the export left"),
        }
        done.map(drop)
    };
    let (seeds, words) = (lora_seeds(folder, 2), LORA_WORDS.to_vec());
    Reader { shape: Shape::Safetensors, seeds, words, read: of_file(folder.join("x.safetensors"), read) }
}
