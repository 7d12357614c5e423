//! Weights, and the configs of models.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use alignprop::config::{AestheticConfig, ModelConfig, RewardsConfig, SamplerKind};
use alignprop::diffusion::{DdimSchedule, Solver};
use alignprop::files;
use alignprop::lora::Adapters;
use alignprop::models::clip::{Clip, OpenClipConfig, PixelStatistics};
use alignprop::models::image_reward::ImageReward;
use alignprop::models::text_encoder::TextEncoder;
use alignprop::models::tokenizer::ClipTokenizer;
use alignprop::models::unet::Unet;
use alignprop::models::vae::Vae;
use alignprop::models::yolos::Yolos;
use alignprop::models::{Source, Weights};
use alignprop::nn::tape::Value;
use alignprop::ops::device::Compute;
use alignprop::rewards::Rewards;
use anyhow::Result;
use candle_core::DType;

use super::{MODEL, Reader, Shape, bytes_of, of_file, of_json, words, zeros};
use crate::support::{copy_folder, fixture, original, text};

/// A weight file.
pub fn safetensors(folder: &Path) -> Reader {
    let seeds = vec![small_safetensors(folder)];
    let words = words("F16 ~ BF16 ~ F8_E4M3 ~ F4 ~ I64 ~ BOOL ~ dtype ~ shape ~ data_offsets ~ __metadata__");
    Reader { shape: Shape::Safetensors, seeds, words, read: of_file(folder.join("x.safetensors"), all_weights) }
}

/// A pickled state dict.
pub fn pickle(folder: &Path) -> Reader {
    Reader {
        shape: Shape::Pickle,
        seeds: pickles(folder),
        words: PICKLE_WORDS.to_vec(),
        read: of_file(folder.join("x.ckpt"), |path| {
            let bytes = fs::read(path)?;
            let found = files::pickle::read(&bytes);
            found.iter().flat_map(|found| found.tensors.values()).for_each(|tensor| drop(tensor.bytes(&bytes)));
            all_weights(path)
        }),
    }
}

/// Reads every tensor of a weight file in all ways.
fn all_weights(path: &Path) -> Result<()> {
    let weights = Weights::open_file(path)?;
    weights.metadata();
    for name in weights.names() {
        weights.stored(&name)?;
        weights.bytes(&name)?;
        // an error: not of a float type
        let _ = weights.get_any(&name);
    }
    Ok(())
}

fn small_safetensors(folder: &Path) -> Vec<u8> {
    let tensor = |shape: &[usize], dtype| zeros(shape).unwrap().to_dtype(dtype).unwrap();
    let tensors = [
        ("a.weight", tensor(&[2, 3], DType::F32)),
        ("a.bias", tensor(&[3], DType::F16)),
        ("b", tensor(&[2, 1, 1, 2], DType::BF16)),
        ("n", tensor(&[], DType::I64)),
    ];
    let path = folder.join("seed.safetensors");
    original::save(&tensors.map(|(name, tensor)| (name.to_owned(), tensor)).into(), &[("format", "pt")], &path);
    fs::read(path).unwrap()
}

pub const PICKLE_WORDS: [&str; 12] = [
    "state_dict",
    "model",
    "module.w",
    "w",
    "0",
    "cpu",
    "storage",
    "global_step",
    "ctorch\nFloatStorage\n",
    "tQ",
    "\u{89}",
    "archive/data/0",
];

fn pickles(folder: &Path) -> Vec<Vec<u8>> {
    let tensor = |shape: &[usize]| zeros(shape).unwrap();
    let one = original::Tensors::from([("w".to_owned(), tensor(&[2, 3]))]);
    let two = original::Tensors::from([("module.w".to_owned(), tensor(&[2, 3])), ("module.b".to_owned(), tensor(&[]))]);
    let of = |tensors: &original::Tensors, step| {
        let path = folder.join("seed.ckpt");
        original::save_ckpt(tensors, step, &path);
        fs::read(path).unwrap()
    };
    vec![of(&one, None), of(&two, Some(875_000))]
}

/// A UNet's config.
pub fn unet(folder: &Path) -> Reader {
    let read = |source: &Source| {
        let unet = Unet::load(source, None, &Compute::cpu())?;
        let (x, embeds) = (zeros(&[1, 4, 8, 8])?, zeros(&[1, 3, 24])?);
        unet.forward(&x, 500.0, &embeds, &Adapters::default()).map(drop)
    };
    let words =
        words("dual_cross_attention ~ CrossAttnDownBlock2D ~ DownBlock2D ~ UpBlock2D ~ gelu ~ num_attention_heads");
    Reader { words, ..of_json(folder, &format!("{MODEL}/unet"), "config.json", read) }
}

/// A VAE's config.
pub fn vae(folder: &Path) -> Reader {
    of_json(folder, &format!("{MODEL}/vae"), "config.json", |source| {
        Vae::load(source, None, &Compute::cpu())?.decode(&zeros(&[1, 4, 8, 8])?).map(drop)
    })
}

/// A text encoder's config.
pub fn text_encoder(folder: &Path) -> Reader {
    of_json(folder, &format!("{MODEL}/text_encoder"), "config.json", |source| {
        TextEncoder::load(source, None, &Compute::cpu())?.forward(&[vec![3; 77]]).map(drop)
    })
}

/// The config of transformers' CLIP.
pub fn clip(folder: &Path) -> Reader {
    of_json(folder, "tiny-sd15/clip", "config.json", |source| {
        let clip = Clip::load_transformers(source, true, &Compute::cpu())?;
        clip.text_embeds(&[vec![3; 77]])?;
        // a picture of any size that the program could be asked for
        let side = clip.vision.image_size().min(4096);
        clip.vision.forward(&Value::constant(&zeros(&[1, 3, side, side])?)).map(drop)
    })
}

/// The config of transformers' YOLOS.
pub fn detector(folder: &Path) -> Reader {
    of_json(folder, "tiny-yolos/model", "config.json", |source| {
        let yolos = Yolos::load(source, &Compute::cpu())?;
        let side = yolos.patch_size().min(64);
        yolos.logits(&yolos.tokens(&Value::constant(&zeros(&[1, 3, side, 2 * side])?))?).map(drop)
    })
}

/// The config of ImageReward's text encoder.
pub fn image_reward(folder: &Path) -> Reader {
    of_json(folder, "tiny-imagereward", "med_config.json", |source| {
        let weights = Weights::open_file(&source.require("model.safetensors")?)?;
        let model = ImageReward::load(&weights, source)?;
        let side = model.image_size();
        model.scores(&Value::constant(&zeros(&[1, 3, side, side])?), &[vec![2, 5, 3]]).map(drop)
    })
}

/// The config of transformers' SigLIP.
pub fn siglip(folder: &Path) -> Reader {
    of_json(folder, "tiny-siglip/model", "config.json", |source| {
        let clip = Clip::load_transformers(source, true, &Compute::cpu())?;
        clip.text_embeds(&[vec![3; 6]])?;
        let side = clip.vision.image_size().min(4096);
        clip.vision.forward(&Value::constant(&zeros(&[1, 3, side, side])?)).map(drop)
    })
}

/// How a CLIP's pixels are prepared.
pub fn preprocessor(folder: &Path) -> Reader {
    let seed = br#"{"image_mean":[0.48,0.45,0.40],"image_std":[0.26,0.26,0.27],"do_normalize":true,"size":{"shortest_edge":224}}"#;
    copy_folder(&fixture("tiny-sd15/clip"), folder);
    let root = text(folder);
    Reader {
        shape: Shape::Json,
        seeds: vec![seed.to_vec()],
        words: words("do_rescale ~ do_resize ~ rescale_factor ~ crop_size ~ height"),
        read: of_file(folder.join("preprocessor_config.json"), move |_| {
            let source = Source::open(&root)?;
            PixelStatistics::of_transformers(&source)?.affine();
            PixelStatistics::of_open_clip(&source)?.affine();
            Ok(())
        }),
    }
}

/// A scheduler's config.
pub fn scheduler(folder: &Path) -> Reader {
    fs::create_dir_all(folder.join("scheduler")).unwrap();
    let root = text(folder);
    Reader {
        shape: Shape::Json,
        seeds: vec![bytes_of(&format!("{MODEL}/scheduler/scheduler_config.json"))],
        words: words(
            "trained_betas ~ linear ~ squaredcos_cap_v2 ~ trailing ~ linspace ~ rescale_betas_zero_snr ~ thresholding ~ use_karras_sigmas ~ final_sigmas_type ~ sigma_min",
        ),
        read: of_file(folder.join("scheduler/scheduler_config.json"), move |_| {
            let source = Source::open(&root)?;
            let x = zeros(&[1, 4, 2, 2])?;
            for kind in [SamplerKind::EulerAncestral, SamplerKind::Dpmpp2m] {
                let solver = Solver::load(&source, kind, None, 7)?;
                solver.steps.iter().try_for_each(|step| step.apply(&x, &x, Some(&x), Some(&x)).map(drop))?;
            }
            let schedule = DdimSchedule::load(&source, 7, 0.5)?;
            schedule.steps().iter().try_for_each(|step| step.apply(&x, &x, Some(&x)).map(drop))?;
            Ok(())
        }),
    }
}

/// The index of sharded weights.
pub fn shards_index(folder: &Path) -> Reader {
    let index = "diffusion_pytorch_model.safetensors.index.json";
    let read = |source: &Source| Weights::open(source, "diffusion_pytorch_model", None).map(drop);
    Reader {
        words: vec!["../x", "/etc/passwd", "config.json"],
        ..of_json(folder, &format!("{MODEL}/unet"), index, read)
    }
}

/// The config of an open_clip model.
pub fn open_clip(folder: &Path) -> Reader {
    copy_folder(&fixture("tiny-sd15/hps"), folder);
    let weights = Weights::open_file(&folder.join("model.safetensors")).unwrap();
    let pixels = Arc::new(Source::open(&text(fixture("tiny-sd15/hps"))).unwrap());
    Reader {
        shape: Shape::Json,
        seeds: vec![bytes_of("tiny-sd15/hps/open_clip_config.json")],
        words: words("model_cfg ~ preprocess_cfg ~ mean ~ std ~ timm_model_name ~ hf_model_name ~ mlp_ratio ~ layers"),
        read: Box::new(move |input| {
            let text = std::str::from_utf8(input)?;
            // an error: not of a normalisation
            let _ = PixelStatistics::parse_open_clip(text);
            let config = OpenClipConfig::parse(text)?;
            let clip = Clip::load_open_clip(&weights, &config, PixelStatistics::of_open_clip(&pixels)?)?;
            clip.text_embeds(&[vec![3; 77]]).map(drop)
        }),
    }
}

/// A pipeline in one file, or the config beside it.
pub fn single_file(folder: &Path, of_yaml: bool) -> Reader {
    let model = folder.join("model.safetensors");
    original::save(&original::checkpoint(&fixture(MODEL)), &[], &model);
    let config = ModelConfig {
        config: Some(text(fixture(MODEL))),
        tokenizer: Some(text(fixture(&format!("{MODEL}/tokenizer")))),
        ..ModelConfig::at(text(&model))
    };
    if !of_yaml {
        let words = words(
            "v_pred ~ edm_mean ~ modelspec.prediction_type ~ v ~ F16 ~ model.diffusion_model.input_blocks.1.1.norm.weight",
        );
        let seeds = vec![fs::read(&model).unwrap()];
        let read = of_file(model, move |_| Source::pipeline(&config).map(drop));
        return Reader { shape: Shape::Safetensors, seeds, words, read };
    }
    let seeds: [&[u8]; 4] = [
        b"model:\n  base_learning_rate: 1.0e-04\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: \"v\"\n    linear_start: 0.00085\n    unet_config:\n      target: x\n      params:\n        attention_resolutions: [ 4, 2, 1 ]\n",
        b"base: &base\n  parameterization: v\nmodel:\n  params:\n    <<: *base\n    timesteps: 1000\n",
        b"---\nmodel: {\"params\": {\"parameterization\": >-\n  v\n }}\n",
        b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\nmodel:\n  params:\n    parameterization: eps\n",
    ];
    Reader {
        shape: Shape::Text,
        seeds: seeds.map(<[u8]>::to_vec).to_vec(),
        words: vec![
            "&a",
            "*a",
            "<<: *base",
            "- ",
            "!!binary x",
            "!tag",
            "? ",
            "|",
            ">-",
            "%YAML 1.2",
            "---",
            "...",
            "e: &e [*d,*d,*d,*d,*d,*d,*d]",
            "f: [*e,*e,*e,*e,*e,*e,*e]",
            "parameterization: v",
        ],
        read: of_file(model.with_extension("yaml"), move |_| Source::pipeline(&config).map(drop)),
    }
}

/// A reward's head on the embedding of a CLIP.
pub fn aesthetic_head(folder: &Path) -> Reader {
    let path = folder.join("head.safetensors");
    let aesthetic = AestheticConfig { clip: text(fixture("tiny-sd15/clip")), head: text(&path), ..Default::default() };
    let config = RewardsConfig { aesthetic: Some(aesthetic), ..Default::default() };
    let tokenizer = Source::open(&text(fixture(MODEL))).unwrap().sub("tokenizer");
    let tokenizer = Arc::new(ClipTokenizer::load(&tokenizer).unwrap());
    Reader {
        shape: Shape::Safetensors,
        seeds: vec![bytes_of("tiny-sd15/aesthetic_head.safetensors")],
        words: words("layers.0.weight ~ layers.7.bias ~ layers.9.weight ~ F16 ~ F64 ~ I64 ~ mlp.0.weight"),
        read: of_file(path, move |_| Rewards::load(&config, &tokenizer).map(drop)),
    }
}
