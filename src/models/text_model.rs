//! Encoders of text, forward only: BERT and DeBERTa-v2 of candle-transformers, with their tokenizers.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{Device, Module, Tensor};
use candle_nn::{Conv1d, Conv1dConfig, LayerNorm, VarBuilder, conv1d, layer_norm};
use candle_transformers::models::{bert, debertav2};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value as Json;
use tokenizers::{Tokenizer, TruncationParams};

use super::borrowed::var_builder;
use super::{Source, Weights};

/// Of a table of positions; what lies beyond is a damaged file.
const MOST_POSITIONS: usize = 1 << 16;

/// A tokenizer and the first layers of an encoder.
pub struct TextModel {
    tokenizer: Tokenizer,
    vocab_size: usize,
    encoder: Encoder,
}

enum Encoder {
    Bert(Box<bert::BertModel>),
    Deberta(Box<Deberta>),
}

impl TextModel {
    /// A folder or repository in transformers' layout (`config.json`, weights, `tokenizer.json`), cut to its first `layers`.
    ///
    /// # Errors
    /// A file is missing or damaged, the model is another than BERT or DeBERTa-v2, or has fewer layers.
    pub fn load(source: &Source, layers: usize) -> Result<Self> {
        Self::build(source, layers).with_context(|| format!("loading the text model from {}", source.label()))
    }

    fn build(source: &Source, layers: usize) -> Result<Self> {
        let mut config: Json = source.read_json("config.json")?;
        let shape: Dimensions = serde_json::from_value(config.clone()).context("config.json")?;
        let kind = shape.model_type.as_str();
        ensure!(
            matches!(kind, "bert" | "deberta-v2"),
            "its model_type is `{kind}`; BERT (`bert`) and DeBERTa-v2 or -v3 (`deberta-v2`) can be read"
        );
        shape.check(layers)?;
        config["num_hidden_layers"] = layers.into();
        let weights = Weights::open(source, "model", None)?;
        // a model with a head keeps its encoder under a name
        let name = if kind == "bert" { "bert" } else { "deberta" };
        let inside = weights.pp(name);
        let weights = if inside.contains("embeddings.word_embeddings.weight") { inside } else { weights };
        let encoder = match kind {
            "bert" => {
                let config = serde_json::from_value(config).context("config.json")?;
                Encoder::Bert(Box::new(bert::BertModel::load(var_builder(&weights), &config)?))
            }
            _ => Encoder::Deberta(Box::new(Deberta::load(&weights, config)?)),
        };
        let tokenizer = tokenizer(source, shape.max_position_embeddings)?;
        Ok(Self { tokenizer, vocab_size: shape.vocab_size, encoder })
    }

    /// The ids of a text, special tokens at both ends and cut to the model's length, and the model's last hidden state (T, D) of
    /// each.
    ///
    /// # Errors
    /// The tokenizer has ids that the model has not.
    pub fn encode(&self, text: &str) -> Result<(Vec<u32>, Tensor)> {
        let encode = || self.tokenizer.encode(text, true).map_err(|e| anyhow!(e));
        let ids = panics_are_errors(encode).context("encoding with tokenizer.json")?.get_ids().to_vec();
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.vocab_size) {
            bail!(
                "the tokenizer gives the id {id}, and the model has {}: they do not belong together",
                self.vocab_size
            );
        }
        ensure!(!ids.is_empty(), "the tokenizer gives no ids for `{text}`: it adds no [CLS] and [SEP]");
        let tensor = Tensor::new(&*ids, &Device::Cpu)?.unsqueeze(0)?;
        let hidden = match &self.encoder {
            Encoder::Bert(bert) => bert.forward(&tensor, &tensor.zeros_like()?, None)?,
            Encoder::Deberta(deberta) => deberta.forward(&tensor)?,
        };
        Ok((ids, hidden.squeeze(0)?))
    }
}

/// `tokenizer.json`, cut to what `tokenizer_config.json` and the model's positions allow.
fn tokenizer(source: &Source, positions: usize) -> Result<Tokenizer> {
    #[derive(Deserialize, Default)]
    struct Limits {
        model_max_length: Option<f64>,
    }
    let Some(file) = source.find("tokenizer.json")? else {
        let path = Path::new("tokenizer.json");
        bail!(
            "there is no {} beside it, only the slow tokenizer's files perhaps: `AutoTokenizer.from_pretrained(\"{}\").save_pretrained(FOLDER)` \
             of transformers makes one",
            path.display(),
            source.label()
        );
    };
    let mut tokenizer = read_tokenizer(&file)?;
    let limits = match source.find("tokenizer_config.json")? {
        Some(_) => source.read_json("tokenizer_config.json")?,
        None => Limits::default(),
    };
    // "no limit" is 1e30 there
    let max_length = limits.model_max_length.map_or(positions, |n| positions.min(n as usize));
    ensure!(max_length > 2, "tokenizer_config.json: model_max_length leaves no room for text");
    tokenizer.with_padding(None);
    tokenizer.with_truncation(Some(TruncationParams { max_length, ..Default::default() })).map_err(|e| anyhow!(e))?;
    Ok(tokenizer)
}

/// # Errors
/// It cannot be read, or is no tokenizer.
pub(super) fn read_tokenizer(file: &Path) -> Result<Tokenizer> {
    let read = || -> Result<Tokenizer> {
        let bytes = std::fs::read(file)?;
        serde_json::from_slice::<IgnoredAny>(&bytes)?;
        panics_are_errors(|| Tokenizer::from_bytes(&bytes).map_err(|e| anyhow!(e)))
    };
    read().with_context(|| format!("reading {}", file.display()))
}

/// The tokenizers crate panics on some damaged files: on numbers beyond u64, on templates whose pieces are missing.
fn panics_are_errors<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    caught.unwrap_or_else(|_| bail!("it is damaged: the tokenizers crate cannot make sense of it"))
}

/// What candle-transformers would divide by or allocate without looking.
#[derive(Deserialize)]
struct Dimensions {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    max_position_embeddings: usize,
    #[serde(default)]
    conv_kernel_size: Option<usize>,
    #[serde(default)]
    conv_groups: Option<usize>,
    #[serde(default)]
    position_buckets: Option<i64>,
    #[serde(default)]
    max_relative_positions: Option<i64>,
    #[serde(default)]
    attention_head_size: Option<usize>,
}

impl Dimensions {
    fn check(&self, layers: usize) -> Result<()> {
        let Self { hidden_size, num_attention_heads: heads, num_hidden_layers, .. } = *self;
        ensure!(
            heads > 0 && hidden_size > 0 && hidden_size.is_multiple_of(heads),
            "config.json: hidden_size {hidden_size} does not divide into {heads} heads"
        );
        for (key, value, most) in [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", hidden_size, 1 << 16),
            ("intermediate_size", self.intermediate_size, 1 << 20),
            ("max_position_embeddings", self.max_position_embeddings, MOST_POSITIONS),
            ("attention_head_size", self.attention_head_size.unwrap_or(hidden_size / heads), 1 << 16),
            ("conv_groups", self.conv_groups.unwrap_or(1), 1 << 16),
        ] {
            ensure!((1..=most).contains(&value), "config.json: {key} is {value}");
        }
        let relative = [self.position_buckets, self.max_relative_positions].into_iter().flatten();
        for value in relative {
            ensure!((-1..=MOST_POSITIONS as i64).contains(&value), "config.json: relative positions up to {value}");
        }
        if let Some(size @ 1..) = self.conv_kernel_size {
            ensure!(size % 2 == 1 && size < 1024, "config.json: conv_kernel_size {size} is not a small odd number");
        }
        ensure!(
            (1..=num_hidden_layers).contains(&layers),
            "{layers} layers are asked for, and the model has {num_hidden_layers}"
        );
        Ok(())
    }
}

/// DeBERTa-v2. candle-transformers does not compute the convolution that deberta-v2-xlarge has beside its first layer, so that one
/// is here, between two of its encoders: one of the first layer, one of the others.
struct Deberta {
    embeddings: debertav2::DebertaV2Embeddings,
    first: debertav2::DebertaV2Encoder,
    convolution: Option<Convolution>,
    others: debertav2::DebertaV2Encoder,
}

impl Deberta {
    fn load(weights: &Weights, config: Json) -> Result<Self> {
        let whole: debertav2::Config = serde_json::from_value(config).context("config.json")?;
        let plain = |layers| debertav2::Config { num_hidden_layers: layers, conv_kernel_size: None, ..whole.clone() };
        let all = var_builder(weights);
        let shifted = var_builder(weights).rename_f(next_layer);
        Ok(Self {
            embeddings: debertav2::DebertaV2Embeddings::load(all.pp("embeddings"), &whole)?,
            first: debertav2::DebertaV2Encoder::load(all.pp("encoder"), &plain(1))?,
            convolution: Convolution::load(all.pp("encoder.conv"), &whole)?,
            others: debertav2::DebertaV2Encoder::load(shifted.pp("encoder"), &plain(whole.num_hidden_layers - 1))?,
        })
    }

    fn forward(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        let mask = ids.ones_like()?;
        let x = self.embeddings.forward(Some(ids), None, None, Some(&mask), None)?;
        let mut y = self.first.forward(&x, &mask, None, None)?;
        if let Some(convolution) = &self.convolution {
            y = convolution.forward(&x, &y)?;
        }
        self.others.forward(&y, &mask, None, None)
    }
}

/// `encoder.layer.0.x` is that of the file's layer 1.
fn next_layer(name: &str) -> String {
    let shifted = || {
        let (number, rest) = name.strip_prefix("encoder.layer.")?.split_once('.')?;
        Some(format!("encoder.layer.{}.{rest}", number.parse::<usize>().ok()? + 1))
    };
    shifted().unwrap_or_else(|| name.to_owned())
}

/// norm(y + act(conv(x))) over the tokens; x goes into the first layer and y comes out of it.
struct Convolution {
    conv: Conv1d,
    norm: LayerNorm,
    act: fn(&Tensor) -> candle_core::Result<Tensor>,
}

impl Convolution {
    fn load(vb: VarBuilder, config: &debertav2::Config) -> Result<Option<Self>> {
        let Some(size @ 1..) = config.conv_kernel_size else { return Ok(None) };
        let act = match config.conv_act.as_deref() {
            None | Some("tanh") => Tensor::tanh,
            Some("gelu") => Tensor::gelu_erf,
            Some("relu") => Tensor::relu,
            Some(other) => bail!("config.json: conv_act is `{other}`; gelu, relu and tanh can be computed"),
        };
        let hidden = config.hidden_size;
        let groups = config.conv_groups.unwrap_or(1);
        let shape = Conv1dConfig { padding: (size - 1) / 2, groups, ..Default::default() };
        ensure!(hidden.is_multiple_of(groups), "config.json: {groups} conv_groups do not divide {hidden}");
        let norm = layer_norm(hidden, config.layer_norm_eps, vb.pp("LayerNorm"))?;
        Ok(Some(Self { conv: conv1d(hidden, hidden, size, shape, vb.pp("conv"))?, norm, act }))
    }

    fn forward(&self, x: &Tensor, y: &Tensor) -> candle_core::Result<Tensor> {
        let x = self.conv.forward(&x.transpose(1, 2)?.contiguous()?)?.transpose(1, 2)?.contiguous()?;
        self.norm.forward(&(y + (self.act)(&x)?)?)
    }
}
