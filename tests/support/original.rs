//! The original layout of Stable Diffusion, written from a diffusers folder: the inverse of what the program does.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::read_tensors;

pub type Tensors = BTreeMap<String, Tensor>;

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// All tensors of a folder's safetensors files, however many.
pub fn component(folder: &Path) -> Tensors {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).flat_map(|p| read_tensors(&p)).collect()
}

/// A whole checkpoint with the tensors of a pipeline's folder, and what such files have besides.
pub fn checkpoint(model: &Path) -> Tensors {
    let unet_config = json(&model.join("unet/config.json"));
    let layers = unet_config["layers_per_block"].as_u64().unwrap() as usize;
    let is_xl = model.join("text_encoder_2").is_dir();
    let is_v2 = unet_config["use_linear_projection"] == true && !is_xl;
    let mut out = Tensors::new();
    let mut put = |prefix: &str, name: String, tensor: Tensor| {
        assert!(out.insert(format!("{prefix}{name}"), tensor).is_none(), "{prefix}{name} twice");
    };
    let attending: Vec<bool> = unet_config["up_block_types"]
        .as_array()
        .unwrap()
        .iter()
        .map(|kind| kind.as_str().unwrap().starts_with("CrossAttn"))
        .collect();
    for (name, tensor) in component(&model.join("unet")) {
        put("model.diffusion_model.", unet(&name, layers, &attending), tensor);
    }
    let levels = json(&model.join("vae/config.json"))["block_out_channels"].as_array().unwrap().len();
    for (name, tensor) in component(&model.join("vae")) {
        let is_projection = name.contains("mid_block.attentions") && name.ends_with("weight") && tensor.rank() == 2;
        let tensor = if is_projection { tensor.unsqueeze(2).unwrap().unsqueeze(3).unwrap() } else { tensor };
        put("first_stage_model.", vae(&name, levels), tensor);
    }
    let text = |folder: &str| -> Tensors {
        let named = component(&model.join(folder)).into_iter().map(|(name, tensor)| {
            let name = name.strip_prefix("text_model.").map(str::to_owned).unwrap_or(name);
            (name, tensor)
        });
        named.filter(|(name, _)| !name.ends_with("position_ids")).collect()
    };
    if is_v2 {
        for (name, tensor) in open_clip(text("text_encoder"), false) {
            put("cond_stage_model.model.", name, tensor);
        }
    } else {
        let clip = if is_xl { "conditioner.embedders.0.transformer" } else { "cond_stage_model.transformer" };
        for (name, tensor) in text("text_encoder") {
            put(&format!("{clip}.text_model."), name, tensor);
        }
        let ids = Tensor::arange(0i64, 77, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        put(&format!("{clip}.text_model.embeddings."), "position_ids".into(), ids);
    }
    if is_xl {
        for (name, tensor) in open_clip(text("text_encoder_2"), true) {
            put("conditioner.embedders.1.model.", name, tensor);
        }
    }
    let ones = Tensor::ones(1000, DType::F32, &Device::Cpu).unwrap();
    put("", "betas".into(), ones.clone());
    put("", "alphas_cumprod".into(), ones.clone());
    put("model_ema.", "decay".into(), ones.get(0).unwrap());
    put("first_stage_model.loss.", "logvar".into(), ones.get(1).unwrap());
    out
}

fn resnet(name: &str) -> String {
    let names = [
        ("norm1", "in_layers.0"),
        ("conv1", "in_layers.2"),
        ("time_emb_proj", "emb_layers.1"),
        ("norm2", "out_layers.0"),
        ("conv2", "out_layers.3"),
        ("conv_shortcut", "skip_connection"),
    ];
    let (new, old) = names.iter().find(|(new, _)| name.starts_with(new)).unwrap_or_else(|| panic!("{name}"));
    name.replacen(new, old, 1)
}

fn unet(name: &str, layers: usize, attending: &[bool]) -> String {
    for (new, old) in [
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
        ("mid_block.attentions.0", "middle_block.1"),
    ] {
        if let Some(rest) = name.strip_prefix(new) {
            return format!("{old}{rest}");
        }
    }
    if let Some(rest) = name.strip_prefix("mid_block.resnets.") {
        let (index, rest) = rest.split_once('.').unwrap();
        return format!("middle_block.{}.{}", 2 * index.parse::<usize>().unwrap(), resnet(rest));
    }
    let parts: Vec<&str> = name.splitn(5, '.').collect();
    let [side, block, kind, layer, rest] = parts[..] else { panic!("{name}") };
    let (block, layer): (usize, usize) = (block.parse().unwrap(), layer.parse().unwrap());
    let first = block * (layers + 1);
    match (side, kind) {
        ("down_blocks", "resnets") => format!("input_blocks.{}.0.{}", 1 + first + layer, resnet(rest)),
        ("down_blocks", "attentions") => format!("input_blocks.{}.1.{rest}", 1 + first + layer),
        ("down_blocks", "downsamplers") => {
            format!("input_blocks.{}.0.op.{}", first + layers + 1, rest.strip_prefix("conv.").unwrap())
        }
        ("up_blocks", "resnets") => format!("output_blocks.{}.0.{}", first + layer, resnet(rest)),
        ("up_blocks", "attentions") => format!("output_blocks.{}.1.{rest}", first + layer),
        ("up_blocks", "upsamplers") => {
            format!("output_blocks.{}.{}.{rest}", first + layers, 1 + usize::from(attending[block]))
        }
        _ => panic!("{name}"),
    }
}

fn vae(name: &str, levels: usize) -> String {
    if name.contains("quant_conv") {
        return name.to_owned();
    }
    let (side, rest) = name.split_once('.').unwrap();
    let rest = rest.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out");
    for (new, old) in [
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
        ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
        ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.query", "mid.attn_1.q"),
        ("mid_block.attentions.0.key", "mid.attn_1.k"),
        ("mid_block.attentions.0.value", "mid.attn_1.v"),
        ("mid_block.attentions.0.proj_attn", "mid.attn_1.proj_out"),
    ] {
        if let Some(tail) = rest.strip_prefix(new) {
            return format!("{side}.{old}{tail}");
        }
    }
    let parts: Vec<&str> = rest.splitn(5, '.').collect();
    let [blocks, block, kind, layer, tail] = parts[..] else { return format!("{side}.{rest}") };
    let block: usize = block.parse().unwrap();
    match (blocks, kind) {
        ("down_blocks", "resnets") => format!("{side}.down.{block}.block.{layer}.{tail}"),
        ("down_blocks", "downsamplers") => format!("{side}.down.{block}.downsample.{tail}"),
        ("up_blocks", "resnets") => format!("{side}.up.{}.block.{layer}.{tail}", levels - 1 - block),
        ("up_blocks", "upsamplers") => format!("{side}.up.{}.upsample.{tail}", levels - 1 - block),
        _ => panic!("{name}"),
    }
}

/// open_clip's tower: q, k and v in one matrix, a projection; where it is not `whole`, one more layer (which must not be read:
/// it is not a number).
fn open_clip(mut text: Tensors, whole: bool) -> Tensors {
    let projection = text.remove("text_projection.weight").map(|weight| weight.t().unwrap().contiguous().unwrap());
    let mut out = Tensors::new();
    let mut layers = 0;
    for (name, tensor) in &text {
        let fixed = [
            ("embeddings.token_embedding.weight", "token_embedding.weight"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("final_layer_norm.weight", "ln_final.weight"),
            ("final_layer_norm.bias", "ln_final.bias"),
        ];
        if let Some((_, old)) = fixed.iter().find(|(new, _)| new == name) {
            out.insert((*old).to_owned(), tensor.clone());
            continue;
        }
        let (layer, rest) = name.strip_prefix("encoder.layers.").unwrap().split_once('.').unwrap();
        layers = layers.max(layer.parse::<usize>().unwrap() + 1);
        let old = format!("transformer.resblocks.{layer}");
        if let Some(kind) = rest.strip_prefix("self_attn.q_proj.") {
            let part = |p: &str| text[&format!("encoder.layers.{layer}.self_attn.{p}_proj.{kind}")].clone();
            let joined = Tensor::cat(&[part("q"), part("k"), part("v")], 0).unwrap();
            out.insert(format!("{old}.attn.in_proj_{kind}"), joined);
        } else if !rest.contains("k_proj") && !rest.contains("v_proj") {
            let rest = rest
                .replace("layer_norm1", "ln_1")
                .replace("layer_norm2", "ln_2")
                .replace("self_attn.out_proj", "attn.out_proj")
                .replace("mlp.fc1", "mlp.c_fc")
                .replace("mlp.fc2", "mlp.c_proj");
            out.insert(format!("{old}.{rest}"), tensor.clone());
        }
    }
    let last = format!("transformer.resblocks.{}.", layers - 1);
    let copies: Vec<(String, Tensor)> = out
        .iter()
        .filter_map(|(name, tensor)| {
            let rest = name.strip_prefix(&last)?;
            Some((format!("transformer.resblocks.{layers}.{rest}"), tensor.affine(0.0, f64::NAN).unwrap()))
        })
        .collect();
    if !whole {
        out.extend(copies);
    }
    let width = out["positional_embedding"].dims()[1];
    let ones = || Tensor::ones((width, width), DType::F32, &Device::Cpu).unwrap();
    out.insert("text_projection".into(), projection.unwrap_or_else(ones));
    out.insert("logit_scale".into(), Tensor::new(1f32, &Device::Cpu).unwrap());
    out
}

pub fn save(tensors: &Tensors, metadata: &[(&str, &str)], path: &Path) {
    let metadata = metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    safetensors::serialize_to_file(tensors.iter().map(|(k, t)| (k.as_str(), t)), Some(metadata), path).unwrap();
}

/// As `torch.save({"state_dict": .., "global_step": ..}, path)`.
pub fn save_ckpt(tensors: &Tensors, global_step: Option<i32>, path: &Path) {
    let text = |s: &str| [b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat();
    let int = |n: usize| [b"J", &(n as i32).to_le_bytes()[..]].concat();
    let mut state = b"}(".to_vec();
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    for (number, (name, tensor)) in tensors.iter().enumerate() {
        let flat = tensor.flatten_all().unwrap();
        let (class, data): (&str, Vec<u8>) = match tensor.dtype() {
            DType::F16 => ("HalfStorage", bytes(flat.to_vec1::<half::f16>().unwrap().iter().map(|x| x.to_le_bytes()))),
            DType::BF16 => {
                ("BFloat16Storage", bytes(flat.to_vec1::<half::bf16>().unwrap().iter().map(|x| x.to_le_bytes())))
            }
            DType::I64 => ("LongStorage", bytes(flat.to_vec1::<i64>().unwrap().iter().map(|x| x.to_le_bytes()))),
            _ => ("FloatStorage", bytes(flat.to_vec1::<f32>().unwrap().iter().map(|x| x.to_le_bytes()))),
        };
        let tuple =
            |numbers: &[usize]| [b"(", &numbers.iter().flat_map(|&n| int(n)).collect::<Vec<_>>()[..], b"t"].concat();
        let shape = tensor.dims();
        let stride: Vec<usize> = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect();
        let storage = [
            b"(",
            &text("storage")[..],
            format!("ctorch\n{class}\n").as_bytes(),
            &text(&number.to_string()),
            &text("cpu"),
            &int(tensor.elem_count()),
            b"tQ",
        ]
        .concat();
        state.extend(
            [
                &text(name)[..],
                b"ctorch._utils\n_rebuild_tensor_v2\n(",
                &storage,
                b"K\0",
                &tuple(shape),
                &tuple(&stride),
                b"\x89ccollections\nOrderedDict\n)RtR",
            ]
            .concat(),
        );
        files.push((format!("archive/data/{number}"), data));
    }
    state.extend(b"u");
    let step = global_step.map_or(Vec::new(), |n| [&text("global_step")[..], &int(n as usize), b"s"].concat());
    let pickle = [b"\x80\x02}", &text("state_dict")[..], &state, b"s", &step, b"."].concat();
    files.insert(0, ("archive/data.pkl".into(), pickle));
    fs::write(path, zip(&files)).unwrap();
}

fn bytes<const N: usize>(parts: impl Iterator<Item = [u8; N]>) -> Vec<u8> {
    parts.flatten().collect()
}

/// A zip archive without compression; the checksums, which nobody reads, are 0.
pub fn zip(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in files {
        let offset = out.len() as u32;
        let size = (data.len() as u32).to_le_bytes();
        let mut fields = vec![20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        fields.extend([size, size].concat());
        fields.extend([name.len() as u8, 0, 0, 0]);
        out.extend([b"PK\x03\x04", &fields[..], name.as_bytes(), data].concat());
        directory
            .extend([b"PK\x01\x02\x14\x00", &fields[..], &[0; 10], &offset.to_le_bytes(), name.as_bytes()].concat());
    }
    let n = (files.len() as u16).to_le_bytes();
    let (size, offset) = (directory.len() as u32, out.len() as u32);
    out.extend([&directory[..], b"PK\x05\x06\0\0\0\0", &n, &n].concat());
    out.extend([&size.to_le_bytes()[..], &offset.to_le_bytes(), &[0, 0]].concat());
    out
}

/// A copy of a tiny pipeline, `factor` times as wide, with other numbers: of a size from which the number of heads and of
/// groups follow as in Stable Diffusion 1.x and 2.x.
pub fn widen(model: &Path, factor: usize, to: &Path) {
    super::copy_folder(model, to);
    let numbers = |config: &mut Value, keys: &[&str]| {
        for key in keys {
            let times = |n: &Value| Value::from(n.as_u64().unwrap() as usize * factor);
            config[*key] = match &config[*key] {
                Value::Array(list) => list.iter().map(times).collect(),
                one => times(one),
            };
        }
    };
    for (part, stem, keys) in [
        ("unet", "diffusion_pytorch_model", &["block_out_channels", "cross_attention_dim"][..]),
        ("vae", "diffusion_pytorch_model", &["block_out_channels"]),
        ("text_encoder", "model", &["hidden_size", "intermediate_size"]),
    ] {
        let folder = to.join(part);
        let wide: Tensors =
            component(&folder).iter().map(|(name, tensor)| (name.clone(), wider(name, tensor, factor))).collect();
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().is_some_and(|name| name != "config.json") {
                fs::remove_file(path).unwrap();
            }
        }
        save(&wide, &[("format", "pt")], &folder.join(format!("{stem}.safetensors")));
        let path = folder.join("config.json");
        let mut config = json(&path);
        numbers(&mut config, keys);
        if part == "text_encoder" {
            config["num_attention_heads"] = (config["hidden_size"].as_u64().unwrap() / 64).into();
        } else {
            config["norm_num_groups"] = 32.into();
        }
        if part == "unet" {
            let channels = config["block_out_channels"].as_array().unwrap();
            let heads: Value = channels.iter().map(|c| c.as_u64().unwrap() / 64).collect();
            config["attention_head_dim"] = if config["use_linear_projection"] == true { heads } else { 8.into() };
        }
        fs::write(path, config.to_string()).unwrap();
    }
}

/// Numbers of variance 1 / fan-in in a tensor whose inner axes are wider.
fn wider(name: &str, tensor: &Tensor, factor: usize) -> Tensor {
    if !tensor.dtype().is_float() {
        return tensor.clone();
    }
    let mut shape = tensor.dims().to_vec();
    let is_fixed = |axis: usize| {
        name.contains("quant_conv")
            || (axis == 0 && (name.contains("_embedding.weight") || name.contains("conv_out.")))
            || (axis == 1 && name.contains("conv_in."))
            || axis > 1
    };
    for (axis, size) in shape.iter_mut().enumerate() {
        *size *= if is_fixed(axis) { 1 } else { factor };
    }
    let is_norm = name.contains("norm");
    let fan_in = shape[1..].iter().product::<usize>().max(1);
    let seed = name.bytes().fold(7u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let mut state = seed;
    let values = (0..shape.iter().product::<usize>()).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
        match shape.len() {
            1 if is_norm && name.ends_with("weight") => 1.0 + 0.2 * x,
            1 => 0.1 * x,
            _ => x * (3.0 / fan_in as f32).sqrt(),
        }
    });
    let values: Vec<f32> = values.collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap()
}
