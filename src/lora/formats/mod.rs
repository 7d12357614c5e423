//! LoRA files: what diffusers, peft, its older attention processors and kohya's scripts write is read; diffusers', peft's
//! and kohya's format are written.
//!
//! | [`Format`]  | the two factors of a layer `...attn1.to_q`                                                   |
//! |-------------|----------------------------------------------------------------------------------------------|
//! | `Diffusers` | `unet.(..)attn1.to_q.lora_A.weight`, `lora_B`; or `lora.down.weight`, `lora.up.weight`       |
//! | `Peft`      | the same without `unet.`, or with `base_model.model.`; an adapter's name (`lora_A.default.`) is dropped |
//! | `AttnProcs` | `(..)attn1.processor.to_q_lora.down.weight`, `up`; `to_out_lora` is the layer `to_out.0`     |
//! | `Kohya`     | `lora_unet_(..)_attn1_to_q.lora_down.weight`, `lora_up`, `alpha`; or with the original names of the blocks (`input_blocks`) |
//!
//! **Alpha.** Without a word about it alpha is the rank (the product counts once). diffusers, from 0.35 on, keeps
//! peft's `LoraConfig` as JSON in the safetensors header under `lora_adapter_metadata` (`unet.lora_alpha`,
//! `unet.alpha_pattern`); peft keeps it in `adapter_config.json` beside the file; kohya's scripts store a scalar
//! `<layer>.alpha` in the tensors. All three are read, the scalar first. Each writer uses the way of its format: diffusers
//! refuses `.alpha` tensors beside its own keys. A diffusers before 0.35 ignores the header and takes alpha = rank.
//!
//! **Layers.** A LoRA may adapt the linear layers and 1x1 convolutions of the UNet's transformers. Adapters of text
//! encoders are left out and named; those of resnets and samplers (LoCon), and other kinds than LoRA, are errors.

mod keys;
mod lora_config;
mod write;

use std::{
    collections::{BTreeMap, HashMap},
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail};
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;

use super::{Adapters, Factor};
use crate::files::{Header, pickle};
use crate::ops::is_finite;
use keys::{Key, Part};
use lora_config::AlphaRule;
pub use write::{Generation, KohyaHeader, save, save_diffusers, save_kohya, save_peft};

/// Where diffusers looks for the `LoraConfig` in a safetensors header.
const CONFIG_KEY: &str = "lora_adapter_metadata";

/// What a folder may hold, best first.
const FILE_NAMES: [&str; 5] = [
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
    "pytorch_model.bin",
];

/// A LoRA as it was found in a file.
#[derive(Clone, Debug)]
pub struct LoadedLora {
    pub adapters: Adapters,
    /// The free strings of a safetensors header.
    pub metadata: HashMap<String, String>,
    pub format: Format,
    /// The keys of the text encoder's adapters, which are not supported; sorted.
    pub ignored: Vec<String>,
    /// The keys of words of textual inversion (`bundle_emb`), which are not supported either; sorted.
    pub embeddings: Vec<String>,
}

/// How the keys of a LoRA file are spelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Diffusers,
    Peft,
    AttnProcs,
    Kohya,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Diffusers => "diffusers",
            Self::Peft => "peft",
            Self::AttnProcs => "attention processors",
            Self::Kohya => "kohya",
        })
    }
}

/// Reads a LoRA from a file, safetensors or a PyTorch pickle, or from a folder that holds one under its usual name.
///
/// The factors become f32 on the CPU; the 1x1 kernels of a convolution become matrices.
///
/// # Errors
/// The file is absent or damaged, has a key that is not understood, half of a pair, or nothing for the UNet.
pub fn load(path: &Path) -> Result<LoadedLora> {
    let file = find_file(path)?;
    read(&file).with_context(|| format!("reading the LoRA file {}", file.display()))
}

impl LoadedLora {
    /// Says what of the file at `path` is not used.
    pub fn warn(&self, path: &Path) {
        if !self.ignored.is_empty() {
            note!(
                "warning: {}: {} text-encoder tensors are ignored, only the UNet is adapted",
                path.display(),
                self.ignored.len()
            );
        }
        if let Some(first) = self.embeddings.first() {
            note!(
                "warning: {}: {} tensors of bundled embeddings (`{first}`) are ignored: prompts have no words of textual inversion here",
                path.display(),
                self.embeddings.len()
            );
        }
    }
}

// ---------------------------------------------------------------------------------------------------- reading

fn find_file(path: &Path) -> Result<PathBuf> {
    if !path.exists() {
        bail!("there is no LoRA file {}; check the path", path.display());
    }
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    match FILE_NAMES.iter().map(|name| path.join(name)).find(|file| file.is_file()) {
        Some(file) => Ok(file),
        None => bail!(
            "no LoRA in the folder {}: looked for {}; name the file if it is called otherwise",
            path.display(),
            FILE_NAMES.join(", ")
        ),
    }
}

fn read(file: &Path) -> Result<LoadedLora> {
    let bytes = fs::read(file)?;
    let (tensors, mut metadata) = if pickle::is_archive(&bytes) {
        note!(
            "warning: {} is a pickle: its tensors are read and no code in it runs; other programs do run it, so prefer {}",
            file.display(),
            file.with_extension("safetensors").display()
        );
        (read_pickle(&bytes)?, HashMap::new())
    } else {
        read_safetensors(&bytes, file)?
    };
    metadata.remove("format");
    let alphas = match metadata.remove(CONFIG_KEY) {
        Some(config) => AlphaRule::parse(&config, file).with_context(|| format!("in the header's `{CONFIG_KEY}`"))?,
        None => read_adapter_config(file)?,
    };
    let Grouped { layers, format, ignored, embeddings } = group_by_layer(tensors)?;
    alphas.warn_of_unused(layers.keys(), file);
    let factors: Vec<Factor> =
        layers.into_iter().map(|(module, parts)| parts.into_factor(module, &alphas)).collect::<Result<_>>()?;
    for factor in &factors {
        if !factor.alpha.is_finite() || !is_finite(&factor.a)? || !is_finite(&factor.b)? {
            bail!(
                "not a number: the factors of `{}` are not finite; the training that made this file had failed",
                factor.module
            );
        }
    }
    Ok(LoadedLora { adapters: Adapters::new(factors)?, metadata, format, ignored, embeddings })
}

/// The tensors and the header's strings.
fn read_safetensors(bytes: &[u8], file: &Path) -> Result<(HashMap<String, Tensor>, HashMap<String, String>)> {
    let header = Header::read(bytes).map_err(|what| anyhow!("it {what}"))?;
    header.warn(&file.display());
    let tensors = header.tensors.into_iter().map(|(key, info)| {
        let range = header.data + info.data_offsets.0..header.data + info.data_offsets.1;
        let values = tensor_of(&key, &bytes[range], info.dtype, &info.shape)?;
        Ok((key, values))
    });
    Ok((tensors.collect::<Result<_>>()?, header.texts))
}

fn read_pickle(bytes: &[u8]) -> Result<HashMap<String, Tensor>> {
    let archive = pickle::read(bytes).context("it cannot be read; save it as safetensors with Python")?;
    let tensors = archive.tensors.into_iter().map(|(key, tensor)| {
        let values = tensor_of(&key, &tensor.bytes(bytes), tensor.dtype, &tensor.shape)?;
        Ok((key, values))
    });
    tensors.collect()
}

fn tensor_of(key: &str, bytes: &[u8], dtype: Dtype, shape: &[usize]) -> Result<Tensor> {
    let ours = DType::try_from(dtype)
        .ok()
        .with_context(|| format!("`{key}` holds {dtype:?}; expected f16, bf16, f32 or f64"))?;
    Ok(Tensor::from_raw_buffer(bytes, ours, shape, &Device::Cpu)?)
}

/// peft's `adapter_config.json`, which lies beside an `adapter_model` file.
fn read_adapter_config(file: &Path) -> Result<AlphaRule> {
    let config = file.with_file_name("adapter_config.json");
    let of_peft = file.file_stem().is_some_and(|stem| stem == "adapter_model");
    if !of_peft || !config.is_file() {
        return Ok(AlphaRule::default());
    }
    let read = || AlphaRule::parse(&fs::read_to_string(&config)?, &config);
    read().with_context(|| format!("reading {}", config.display()))
}

/// The tensors of each layer, how their keys are spelled, and the keys that are left out.
struct Grouped {
    layers: BTreeMap<String, Parts>,
    format: Format,
    ignored: Vec<String>,
    embeddings: Vec<String>,
}

fn group_by_layer(tensors: HashMap<String, Tensor>) -> Result<Grouped> {
    let (mut layers, mut formats) = (BTreeMap::<String, Parts>::new(), Vec::new());
    let (mut ignored, mut embeddings) = (Vec::new(), Vec::new());
    let sorted: BTreeMap<String, Tensor> = tensors.into_iter().collect();
    for (key, tensor) in sorted {
        let (format, module, part) = match keys::parse(&key) {
            Key::Unet { format, module, part } => (format, module, part),
            Key::TextEncoder => {
                ignored.push(key);
                continue;
            }
            Key::Embedding => {
                embeddings.push(key);
                continue;
            }
            Key::Other(kind) => bail!("the key `{key}` is not of a plain LoRA but of {kind}, which is not supported"),
            Key::Unknown => bail!(
                "the key `{key}` is not understood: the formats read are diffusers (`unet.<layer>.lora_A.weight`), \
                 peft (`<layer>.lora_A.weight`), kohya (`lora_unet_<layer>.lora_down.weight`) and attention processors \
                 (`<layer>.processor.to_q_lora.down.weight`)"
            ),
        };
        if ["resnets.", "samplers."].iter().any(|part| module.contains(part))
            || ["conv_in", "conv_out", "time_embedding"].iter().any(|name| module.starts_with(name))
        {
            bail!(
                "the key `{key}` adapts `{module}` (LoCon): only the layers of the UNet's transformers can be adapted, \
                 which are attention, ff, proj_in and proj_out"
            );
        }
        formats.push(format);
        let slot = layers.entry(module).or_default().slot(part);
        if let Some((other, _)) = slot {
            bail!("`{other}` and `{key}` are the same factor of the same layer; keep one adapter per file");
        }
        *slot = Some((key, tensor));
    }
    match formats.first() {
        Some(&format) => Ok(Grouped { layers, format, ignored, embeddings }),
        None if ignored.is_empty() && embeddings.is_empty() => bail!("the file holds no tensor"),
        None if ignored.is_empty() => bail!(
            "the file holds words of textual inversion only (`{}`); only adapters of the UNet are supported",
            embeddings[0]
        ),
        None => bail!(
            "the file adapts the text encoder only ({} tensors); only adapters of the UNet are supported",
            ignored.len()
        ),
    }
}

/// The tensors found for one layer, with their keys.
#[derive(Default)]
struct Parts {
    a: Option<(String, Tensor)>,
    b: Option<(String, Tensor)>,
    alpha: Option<(String, Tensor)>,
}

impl Parts {
    fn slot(&mut self, part: Part) -> &mut Option<(String, Tensor)> {
        match part {
            Part::A => &mut self.a,
            Part::B => &mut self.b,
            Part::Alpha => &mut self.alpha,
        }
    }

    fn into_factor(self, module: String, alphas: &AlphaRule) -> Result<Factor> {
        let ((key_a, a), (key_b, b)) = match (self.a, self.b) {
            (Some(a), Some(b)) => (a, b),
            (Some((key, _)), None) => bail!("`{key}` has no partner: the lora_B (up) factor of `{module}` is missing"),
            (None, Some((key, _))) => {
                bail!("`{key}` has no partner: the lora_A (down) factor of `{module}` is missing")
            }
            (None, None) => bail!("an alpha without factors for the layer `{module}`"),
        };
        let convolution = a.rank() == 4;
        let (a, b) = (matrix(&key_a, &a)?, matrix(&key_b, &b)?);
        let alpha = match self.alpha {
            Some((key, alpha)) => scalar(&alpha).with_context(|| format!("`{key}` is not a number"))?,
            None => alphas.alpha(&module, a.dims()[0]),
        };
        Ok(Factor { convolution, ..Factor::new(module, a, b, alpha)? })
    }
}

/// (rows, columns) or (rows, columns, 1, 1) -> (rows, columns) in f32.
fn matrix(key: &str, tensor: &Tensor) -> Result<Tensor> {
    if !tensor.dtype().is_float() {
        bail!("`{key}` holds {:?}; expected f16, bf16, f32 or f64", tensor.dtype());
    }
    let (rows, columns) = match tensor.dims() {
        [rows, columns] | [rows, columns, 1, 1] => (*rows, *columns),
        shape => {
            bail!("`{key}` has the shape {shape:?}; only linear layers and 1x1 convolutions can be adapted (no LoCon)")
        }
    };
    Ok(tensor.reshape((rows, columns))?.to_dtype(DType::F32)?.contiguous()?)
}

fn scalar(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.to_dtype(DType::F64)?.reshape(())?.to_scalar()?)
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value};

    use super::*;

    const Q: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
    const OUT: &str = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0";

    /// 0, 1, 2, ... of the given shape.
    fn count(shape: &[usize]) -> Tensor {
        let n = shape.iter().product::<usize>();
        Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap().reshape(shape).unwrap()
    }

    fn factor(module: &str, rank: usize, alpha: f64) -> Factor {
        Factor::new(module, count(&[rank, 6]), (count(&[5, rank]) * -0.5).unwrap(), alpha).unwrap()
    }

    fn write(folder: &Path, name: &str, tensors: &[(&str, Tensor)], header: &[(&str, &str)]) -> PathBuf {
        let path = folder.join(name);
        let header = header.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect::<HashMap<_, _>>();
        safetensors::serialize_to_file(
            tensors.iter().map(|(k, t)| (*k, t)),
            (!header.is_empty()).then_some(header),
            &path,
        )
        .unwrap();
        path
    }

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn error(path: &Path) -> String {
        format!("{:#}", load(path).unwrap_err())
    }

    #[test]
    fn a_saved_file_reads_back_with_ranks_alphas_and_metadata() {
        let folder = folder();
        let path = folder.path().join("pytorch_lora_weights.safetensors");
        let adapters =
            Adapters::new(vec![factor(Q, 2, 8.0), factor(OUT, 3, 8.0), factor("mid_block.x.to_k", 2, 0.3)]).unwrap();
        let metadata = HashMap::from([
            ("reward".to_owned(), "aesthetic \"v2\"\n".to_owned()),
            ("seed".to_owned(), "7".to_owned()),
        ]);
        save(&adapters, &metadata, &path).unwrap();
        for place in [folder.path(), &path] {
            let lora = load(place).unwrap();
            assert_eq!((lora.format, lora.metadata, lora.ignored), (Format::Diffusers, metadata.clone(), vec![]));
            assert_eq!(lora.adapters.factors().len(), 3);
            for (read, written) in lora.adapters.factors().iter().zip(adapters.factors()) {
                assert_eq!((&read.module, read.alpha, read.rank()), (&written.module, written.alpha, written.rank()));
                assert_eq!((values(&read.a), values(&read.b)), (values(&written.a), values(&written.b)));
            }
        }
    }

    #[test]
    fn equal_input_gives_equal_bytes_and_no_litter() {
        let folder = folder();
        let (x, y) = (folder.path().join("x"), folder.path().join("y"));
        let adapters = Adapters::new(vec![factor(Q, 2, 2.0), factor(OUT, 3, 3.0)]).unwrap();
        let metadata: HashMap<_, _> = (0..20).map(|i| (format!("k{i}"), "v".to_owned())).collect();
        save(&adapters, &metadata, &x).unwrap();
        save(&adapters, &metadata.clone().into_iter().collect(), &y).unwrap();
        save(&adapters, &metadata, &y).unwrap(); // over an old one
        assert_eq!(fs::read(x).unwrap(), fs::read(y).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn nothing_to_save_is_an_error() {
        let error = save(&Adapters::default(), &HashMap::new(), Path::new("x")).unwrap_err();
        assert!(format!("{error:#}").contains("no adapter"), "{error:#}");
    }

    #[test]
    fn half_precision_kernels_and_scalar_alphas_are_read() {
        let folder = folder();
        let half = |shape: &[usize], dtype| count(shape).to_dtype(dtype).unwrap();
        let tensors = [
            ("unet.conv.lora.down.weight", half(&[2, 6, 1, 1], DType::F16)),
            ("unet.conv.lora.up.weight", half(&[5, 2, 1, 1], DType::BF16)),
            ("unet.conv.alpha", Tensor::new(1f32, &Device::Cpu).unwrap()),
            ("text_encoder.layers.0.lora_A.weight", count(&[2, 6])),
            ("bundle_emb.word.string_to_param.*", count(&[1, 6])),
        ];
        // The scalar counts before the header.
        let lora = load(&write(folder.path(), "x.safetensors", &tensors, &[(CONFIG_KEY, r#"{"unet.lora_alpha": 9}"#)]))
            .unwrap();
        let conv = lora.adapters.get("conv").unwrap();
        assert_eq!((conv.a.dims(), conv.b.dims(), conv.alpha, conv.scale()), (&[2, 6][..], &[5, 2][..], 1.0, 0.5));
        assert_eq!((conv.a.dtype(), values(&conv.b)), (DType::F32, (0..10).map(|x| x as f32).collect()));
        assert_eq!(lora.ignored, ["text_encoder.layers.0.lora_A.weight"]);
        assert_eq!(lora.embeddings, ["bundle_emb.word.string_to_param.*"]);
    }

    #[test]
    fn a_header_with_values_that_are_no_texts_keeps_its_alpha() {
        let folder = folder();
        let tensors = [("unet.m.lora_A.weight", count(&[2, 6])), ("unet.m.lora_B.weight", count(&[5, 2]))];
        let config = r#"{"unet.lora_alpha": 8}"#;
        let path = write(folder.path(), "x.safetensors", &tensors, &[(CONFIG_KEY, config)]);
        let bytes = fs::read(&path).unwrap();
        // the config as an object and not as its text
        let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let mut header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        header["__metadata__"][CONFIG_KEY] = serde_json::from_str(config).unwrap();
        header["__metadata__"]["steps"] = 3.into();
        let header = serde_json::to_vec(&header).unwrap();
        let odd = [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + length..]].concat();
        fs::write(&path, odd).unwrap();
        let lora = load(&path).unwrap();
        assert_eq!((lora.adapters.get("m").unwrap().alpha, &*lora.metadata["steps"]), (8.0, "3"));
    }

    #[test]
    fn alpha_is_the_rank_if_nothing_says_otherwise() {
        let folder = folder();
        let tensors = [
            ("a.attn1.processor.to_out_lora.down.weight", count(&[4, 6])),
            ("a.attn1.processor.to_out_lora.up.weight", count(&[5, 4])),
        ];
        let lora = load(&write(folder.path(), "x.safetensors", &tensors, &[])).unwrap();
        assert_eq!((lora.format, lora.adapters.get("a.attn1.to_out.0").unwrap().alpha), (Format::AttnProcs, 4.0));
    }

    #[test]
    fn the_config_of_peft_gives_alpha() {
        let folder = folder();
        let tensors = ["a.to_q", "b.to_q", "b.to_k"]
            .map(|m| {
                [
                    (format!("base_model.model.{m}.lora_A.weight"), count(&[4, 6])),
                    (format!("base_model.model.{m}.lora_B.weight"), count(&[5, 4])),
                ]
            })
            .concat();
        let tensors: Vec<_> = tensors.iter().map(|(k, t)| (k.as_str(), t.clone())).collect();
        write(folder.path(), "adapter_model.safetensors", &tensors, &[]);
        let alphas = |config: &str| {
            fs::write(folder.path().join("adapter_config.json"), config).unwrap();
            let lora = load(folder.path()).unwrap();
            assert_eq!(lora.format, Format::Peft);
            ["a.to_q", "b.to_q", "b.to_k"].map(|module| lora.adapters.get(module).unwrap().alpha)
        };
        assert_eq!(alphas(r#"{"r": 4, "lora_alpha": 8, "alpha_pattern": null}"#), [8.0, 8.0, 8.0]);
        assert_eq!(alphas(r#"{"lora_alpha": 8, "alpha_pattern": {"^a\\.to_q": 1, "to_q": 2}}"#), [1.0, 2.0, 8.0]);
        assert_eq!(alphas(r#"{"lora_alpha": 8, "use_rslora": true}"#), [16.0, 16.0, 16.0]);
        assert_eq!(
            alphas(r#"{"lora_alpha": 8, "alpha_pattern": {"^_orig_mod\\.a.to_q": 1, "none": 3}}"#),
            [1.0, 8.0, 8.0]
        );
        fs::write(folder.path().join("adapter_config.json"), r#"{"lora_alpha": 8, "alpha_pattern": {"to_(q|k)": 2}}"#)
            .unwrap();
        assert!(error(folder.path()).contains("regular expression"), "{}", error(folder.path()));
    }

    #[test]
    fn settings_by_which_an_adapter_is_no_plain_lora_are_refused_by_name() {
        let folder = folder();
        let tensors = [("m.to_q.lora_A.weight", count(&[2, 6])), ("m.to_q.lora_B.weight", count(&[5, 2]))];
        write(folder.path(), "adapter_model.safetensors", &tensors, &[]);
        let peft = |key: &str, value: &str| {
            let config = format!(r#"{{"peft_type": "LORA", "lora_alpha": 4, "{key}": {value}}}"#);
            fs::write(folder.path().join("adapter_config.json"), config).unwrap();
            load(folder.path()).map(|_| ()).map_err(|e| format!("{e:#}"))
        };
        let diffusers = |key: &str, value: &str| {
            let config = format!(r#"{{"unet.lora_alpha": 4, "unet.{key}": {value}}}"#);
            load(&write(folder.path(), "x.safetensors", &tensors, &[(CONFIG_KEY, &config)]))
                .map(|_| ())
                .map_err(|e| format!("{e:#}"))
        };
        for (key, value) in [
            ("init_lora_weights", r#""pissa""#),
            ("init_lora_weights", r#""pissa_niter_16""#),
            ("init_lora_weights", r#""olora""#),
            ("init_lora_weights", r#""loftq""#),
            ("init_lora_weights", r#""corda""#),
            ("use_dora", "true"),
            ("use_qalora", "true"),
            ("use_bdlora", r#"{"nblocks": 2}"#),
            ("lora_bias", "true"),
            ("layer_replication", "[[0, 4], [2, 5]]"),
            ("modules_to_save", r#"["conv_in"]"#),
            ("peft_type", r#""ADALORA""#),
        ] {
            for (error, file) in [(peft(key, value), "adapter_config.json"), (diffusers(key, value), "x.safetensors")] {
                let error = error.unwrap_err();
                assert!(error.contains(&format!("`{key}` = ")) && error.contains(file), "{error}");
            }
        }
        for (key, value) in [
            ("init_lora_weights", "true"),
            ("init_lora_weights", "false"),
            ("init_lora_weights", r#""gaussian""#),
            ("init_lora_weights", r#""eva""#),
            ("use_dora", "false"),
            ("use_rslora", "true"),
            ("bias", r#""none""#),
            ("bias", r#""lora_only""#),
            ("modules_to_save", "null"),
            ("layer_replication", "[]"),
            ("lora_dropout", "0.1"),
        ] {
            assert_eq!((peft(key, value), diffusers(key, value)), (Ok(()), Ok(())), "{key} {value}");
        }
        // of another part of the pipeline
        let config = r#"{"unet.lora_alpha": 4, "text_encoder.use_dora": true}"#;
        load(&write(folder.path(), "y.safetensors", &tensors, &[(CONFIG_KEY, config)])).unwrap();
    }

    #[test]
    fn bad_files_say_what_is_wrong() {
        let folder = folder();
        let file = |tensors: &[(&str, Tensor)]| error(&write(folder.path(), "x.safetensors", tensors, &[]));
        let (a, b) = (("unet.m.lora_A.weight", count(&[2, 6])), ("unet.m.lora_B.weight", count(&[5, 2])));
        let cases = [
            (file(&[]), "no tensor"),
            (file(std::slice::from_ref(&a)), "lora_B (up) factor of `m` is missing"),
            (file(std::slice::from_ref(&b)), "`unet.m.lora_B.weight` has no partner"),
            (file(&[("unet.m.alpha", count(&[1]))]), "alpha without factors"),
            (
                file(&[a.clone(), b.clone(), ("unet.m.lora.up.weight", count(&[5, 2]))]),
                "the same factor of the same layer",
            ),
            (file(&[a.clone(), b.clone(), ("what", count(&[1]))]), "the key `what` is not understood"),
            (file(&[a.clone(), b.clone(), ("unet.m.alpha", count(&[2]))]), "`unet.m.alpha` is not a number"),
            (file(&[a.clone(), ("unet.m.lora_B.weight", count(&[5, 3]))]), "do not fit together"),
            (file(&[a.clone(), ("unet.m.lora_B.weight", count(&[5, 2, 3, 3]))]), "1x1 convolutions"),
            (file(&[("text_encoder.m.lora_A.weight", count(&[2, 6]))]), "text encoder only"),
            (file(&[("bundle_emb.word.string_to_param.*", count(&[1, 6]))]), "textual inversion only"),
            (error(&folder.path().join("absent")), "absent"),
        ];
        for (error, wanted) in cases {
            assert!(error.contains(wanted), "expected {wanted:?} in {error:?}");
        }
        let empty = tempfile::tempdir().unwrap();
        assert!(error(empty.path()).contains("pytorch_lora_weights.safetensors"));
    }

    #[test]
    fn damaged_files_are_errors_at_every_length() {
        let folder = folder();
        let path = folder.path().join("x.safetensors");
        save(&Adapters::new(vec![factor(Q, 2, 2.0)]).unwrap(), &HashMap::new(), &path).unwrap();
        let bytes = fs::read(&path).unwrap();
        for length in (0..bytes.len()).step_by(7) {
            fs::write(&path, &bytes[..length]).unwrap();
            assert!(error(&path).contains("truncated"), "{}", error(&path));
        }
        for (garbage, word) in [
            (&b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"[..], "Git LFS"),
            (b"<html>404</html>", "web page"),
            (b"{\"error\": \"not found\"}", "JSON"),
        ] {
            fs::write(&path, garbage).unwrap();
            assert!(error(&path).contains(word) && !error(&path).contains("truncated"), "{}", error(&path));
        }
        for garbage in [&b"PK\x03\x04 no archive"[..], b"\x80\x02}q", b"<html>404</html>"] {
            fs::write(&path, garbage).unwrap();
            assert!(error(&path).contains("x.safetensors"));
        }
    }
}
