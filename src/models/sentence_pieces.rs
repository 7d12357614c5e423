//! The tokenizers of SigLIP: SentencePiece models as `tokenizer.json`.

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde_json::Value as Json;
use tokenizers::Tokenizer;

use super::Source;

/// Texts to as many ids as a text tower has positions.
pub struct SentencePieces {
    tokenizer: Tokenizer,
    length: usize,
    eos: u32,
    pad: u32,
    /// Whether punctuation is taken out, as the first SigLIP's tokenizer does.
    without_punctuation: bool,
}

/// `tokenizer_config.json`.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Config {
    tokenizer_class: Option<String>,
    eos_token: Json,
    pad_token: Json,
}

impl SentencePieces {
    /// From a folder with `tokenizer.json` and `tokenizer_config.json`, for texts of `length` ids.
    ///
    /// # Errors
    /// A file is missing or malformed.
    pub fn load(source: &Source, length: usize) -> Result<Self> {
        Self::build(source, length).with_context(|| format!("loading the tokenizer from {}", source.label()))
    }

    fn build(source: &Source, length: usize) -> Result<Self> {
        ensure!(length > 0, "a text tower of no positions");
        let config: Config = match source.find("tokenizer_config.json")? {
            Some(_) => source.read_json("tokenizer_config.json")?,
            None => Config::default(),
        };
        let mut tokenizer = Tokenizer::from_file(source.require("tokenizer.json")?).map_err(|e| anyhow!(e))?;
        // both are done here
        tokenizer.with_truncation(None).map_err(|e| anyhow!(e))?;
        tokenizer.with_padding(None);
        let id = |named: &Json, default: &str| {
            let name = named.as_str().or(named["content"].as_str()).unwrap_or(default);
            tokenizer.token_to_id(name).with_context(|| format!("the special token `{name}` has no id"))
        };
        // the first SigLIP pads with the end of the text, Gemma's tokenizer with a token of its own
        let kind = config.tokenizer_class.as_deref().unwrap_or("SiglipTokenizer");
        let (eos, pad) = match kind {
            "SiglipTokenizer" => ("</s>", "</s>"),
            kind if kind.starts_with("Gemma") => ("<eos>", "<pad>"),
            other => bail!("its `tokenizer_class` is {other}; SiglipTokenizer and GemmaTokenizer are known"),
        };
        let (eos, pad) = (id(&config.eos_token, eos)?, id(&config.pad_token, pad)?);
        Ok(Self { eos, pad, length, without_punctuation: kind == "SiglipTokenizer", tokenizer })
    }

    /// Lower-case pieces, the end of the text, and padding.
    ///
    /// # Errors
    /// The tokenizer's.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let kept = |c: &char| !(self.without_punctuation && c.is_ascii_punctuation());
        let text: String = text.to_lowercase().chars().filter(kept).collect();
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

    /// A tokenizer of five pieces in a folder with this `tokenizer_config.json`.
    fn load(config: &str) -> Result<SentencePieces> {
        let folder = tempfile::tempdir().unwrap();
        let vocab: Vec<(&str, f64)> =
            vec![("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁cat", -1.5), ("s", -2.0), ("!", -3.0), ("▁", -4.0)];
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "post_processor": null, "decoder": null, "normalizer": null,
            "added_tokens": [], "pre_tokenizer": { "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true },
            "model": { "type": "Unigram", "unk_id": 1, "vocab": vocab, "byte_fallback": false },
        });
        std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        SentencePieces::load(&Source::open(folder.path().to_str().unwrap()).unwrap(), 4)
    }

    #[test]
    fn texts_are_cut_and_padded_to_the_positions_of_the_tower() {
        let pieces = load("{}").unwrap();
        for (text, ids) in
            [("A cats!", [2, 3, 4, 0]), ("a", [2, 0, 0, 0]), ("", [0; 4]), ("a  a, a. a a", [2, 2, 2, 0])]
        {
            assert_eq!(pieces.encode(text).unwrap(), ids, "{text}");
        }
        let error = format!("{:#}", load(r#"{"tokenizer_class": "T5Tokenizer"}"#).err().unwrap());
        assert!(error.contains("T5Tokenizer"), "{error}");
        let error = format!("{:#}", load(r#"{"eos_token": {"content": "<end>"}}"#).err().unwrap());
        assert!(error.contains("`<end>` has no id"), "{error}");
    }
}
