//! SigLIP's tokenizer: a SentencePiece model of the unigram kind, from a `tokenizer.json`.

use anyhow::{Context, Result, anyhow, ensure};
use serde::Deserialize;
use serde_json::Value as Json;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::NFKC;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{Model, Tokenizer};

use super::Source;

/// Texts to as many ids as a text tower has positions.
pub struct SentencePieces {
    tokenizer: Tokenizer,
    length: usize,
    eos: u32,
    pad: u32,
}

/// What is taken from `tokenizer.json`: the steps before and after the model are always SigLIP's.
#[derive(Deserialize)]
struct File {
    model: Pieces,
}

#[derive(Deserialize)]
struct Pieces {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    unk_id: Option<usize>,
    /// With their log-probabilities. Other kinds of model have other lists.
    vocab: Json,
}

/// `tokenizer_config.json`.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Config {
    eos_token: Json,
    pad_token: Json,
}

impl SentencePieces {
    /// From a folder with `tokenizer.json` and, perhaps, `tokenizer_config.json`, for texts of `length` ids.
    ///
    /// # Errors
    /// A file is missing or malformed, or the model is of another kind (SigLIP 2 has Gemma's).
    pub fn load(source: &Source, length: usize) -> Result<Self> {
        Self::build(source, length).with_context(|| format!("loading the tokenizer from {}", source.label()))
    }

    fn build(source: &Source, length: usize) -> Result<Self> {
        ensure!(length > 0, "a text tower of no positions");
        let config: Config = match source.find("tokenizer_config.json")? {
            Some(_) => source.read_json("tokenizer_config.json")?,
            None => Config::default(),
        };
        let Pieces { kind, unk_id, vocab } = source.read_json::<File>("tokenizer.json")?.model;
        let kind = kind.as_deref().unwrap_or("of no kind");
        ensure!(
            kind == "Unigram",
            "tokenizer.json: its model is {kind}; the Unigram models of the first SigLIP are read"
        );
        let vocab: Vec<(String, f64)> = serde_json::from_value(vocab).context("tokenizer.json: its `vocab`")?;
        let sound = |(_, score): &(String, f64)| score.abs() < 1e6;
        ensure!(vocab.iter().all(sound), "tokenizer.json: a piece's log-probability is out of range");
        let model = Unigram::from(vocab, unk_id, false).map_err(|e| anyhow!("tokenizer.json: {e}"))?;
        let id = |named: &Json| {
            let name = named.as_str().or(named["content"].as_str()).unwrap_or("</s>");
            model.token_to_id(name).with_context(|| format!("the special token `{name}` has no id"))
        };
        // SigLIP pads with the end of the text
        let (eos, pad) = (id(&config.eos_token)?, id(&config.pad_token)?);
        let mut tokenizer = Tokenizer::new(model);
        // SentencePiece's own table (nmt_nfkc) differs from NFKC in a few control characters
        tokenizer.with_normalizer(Some(NFKC)).map_err(|e| anyhow!(e))?;
        tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::Always, true)));
        Ok(Self { tokenizer, length, eos, pad })
    }

    /// Pieces of the text in lower case and without punctuation, the end of the text, and padding.
    ///
    /// # Errors
    /// The tokenizer's.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let text: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let encoding = self.tokenizer.encode(text, false).map_err(|e| anyhow!(e))?;
        let mut ids: Vec<u32> = encoding.get_ids().iter().copied().take(self.length - 1).collect();
        ids.push(self.eos);
        ids.resize(self.length, self.pad);
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer of some pieces, of this kind, in a folder with this `tokenizer_config.json`.
    fn load(kind: &str, config: &str) -> Result<SentencePieces> {
        let folder = tempfile::tempdir().unwrap();
        let vocab: Vec<(&str, f64)> =
            vec![("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁cat", -1.5), ("s", -2.0), ("!", -3.0), ("▁", -4.0)];
        let json = serde_json::json!({ "version": "1.0", "model": { "type": kind, "unk_id": 1, "vocab": vocab } });
        std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        SentencePieces::load(&Source::open(folder.path().to_str().unwrap()).unwrap(), 4)
    }

    #[test]
    fn texts_are_cut_and_padded_to_the_positions_of_the_tower() {
        let pieces = load("Unigram", "{}").unwrap();
        for (text, ids) in
            [("A cats!", [2, 3, 4, 0]), ("a", [2, 0, 0, 0]), ("", [0; 4]), ("a  a, a. a a", [2, 2, 2, 0])]
        {
            assert_eq!(pieces.encode(text).unwrap(), ids, "{text}");
        }
        for (kind, config, message) in [
            ("BPE", "{}", "its model is BPE"),
            ("Unigram", r#"{"eos_token": {"content": "<end>"}}"#, "`<end>` has no id"),
        ] {
            let error = format!("{:#}", load(kind, config).err().unwrap());
            assert!(error.contains(message), "{error}");
        }
    }
}
