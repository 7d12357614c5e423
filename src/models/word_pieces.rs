//! BERT's tokenizer (WordPiece, lower case, accents stripped), with the ids of transformers' `BertTokenizer`.

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{AddedToken, Tokenizer};

/// Texts to ids, without padding.
pub struct WordPieces {
    tokenizer: Tokenizer,
    cls: u32,
    sep: u32,
}

impl WordPieces {
    /// From a `vocab.txt`; `added` are special tokens that come behind it, in order.
    ///
    /// # Errors
    /// The file cannot be read or lacks one of BERT's special tokens.
    pub fn load(vocab: &Path, added: &[&str]) -> Result<Self> {
        let place = || format!("reading the vocabulary {}", vocab.display());
        Self::build(vocab, added).with_context(place)
    }

    fn build(vocab: &Path, added: &[&str]) -> Result<Self> {
        const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
        let path = vocab.to_str().context("its path is not Unicode")?;
        let model = WordPiece::from_file(path).build().map_err(|e| anyhow!(e))?;
        let mut tokenizer = Tokenizer::new(model);
        let id = |tokenizer: &Tokenizer, token: &str| {
            tokenizer.token_to_id(token).with_context(|| format!("there is no {token}: it is no vocab.txt of BERT"))
        };
        SPECIAL.iter().try_for_each(|token| id(&tokenizer, token).map(drop))?;
        tokenizer.with_normalizer(Some(BertNormalizer::new(true, true, None, true))).map_err(|e| anyhow!(e))?;
        tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
        let special = SPECIAL.iter().chain(added).map(|token| AddedToken::from(*token, true));
        tokenizer.add_special_tokens(special).map_err(|e| anyhow!(e))?;
        let (cls, sep) = (id(&tokenizer, "[CLS]")?, id(&tokenizer, "[SEP]")?);
        Ok(Self { tokenizer, cls, sep })
    }

    /// With the special tokens.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// `[CLS] .. [SEP]`, cut to `length` ids in all.
    ///
    /// # Errors
    /// There is no room for both.
    pub fn encode(&self, text: &str, length: usize) -> Result<Vec<u32>> {
        ensure!(length >= 2, "{length} ids have no room for [CLS] and [SEP]");
        let encoding = self.tokenizer.encode(text, false).map_err(|e| anyhow!(e))?;
        let pieces = encoding.get_ids().iter().take(length - 2).copied();
        Ok(std::iter::once(self.cls).chain(pieces).chain([self.sep]).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(words: &str) -> Result<WordPieces> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vocab.txt");
        std::fs::write(&path, words.replace(' ', "\n")).unwrap();
        WordPieces::load(&path, &["[ENC]"])
    }

    #[test]
    fn texts_become_pieces_between_the_special_tokens() {
        let pieces = load("[PAD] [UNK] [CLS] [SEP] [MASK] a cafe cat ##s ! ##r 猫").unwrap();
        assert_eq!(pieces.vocab_size(), 13);
        for (text, ids) in [
            ("A Cat", &[2, 5, 7, 3][..]),
            ("cats!", &[2, 7, 8, 9, 3]),
            ("Café", &[2, 6, 3]),
            ("dog", &[2, 1, 3]),
            ("", &[2, 3]),
            ("a猫a", &[2, 5, 11, 5, 3]),
            ("[ENC] [enc]", &[2, 12, 1, 1, 1, 3]),
            ("a a a a a a", &[2, 5, 5, 5, 5, 3]),
        ] {
            assert_eq!(pieces.encode(text, 6).unwrap(), ids, "{text}");
        }
        assert!(pieces.encode("a", 1).is_err());
    }

    #[test]
    fn what_is_no_vocabulary_is_named() {
        let error = format!("{:#}", load("[PAD] [UNK] [CLS] a").err().unwrap());
        assert!(error.contains("vocab.txt") && error.contains("[SEP]"), "{error}");
    }
}
