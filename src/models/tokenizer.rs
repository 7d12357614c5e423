//! CLIP's tokenizer: byte-level BPE, with the ids, padding and truncation of transformers' `CLIPTokenizer` (for the
//! text encoder of a pipeline) and of open_clip (for rewards).

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{self, Lowercase, NFC, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, Encoding, Model, NormalizedString, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    SplitDelimiterBehavior, Tokenizer,
};

use crate::models::hub::Source;

/// The context length of every open_clip text tower that a reward here uses.
const OPEN_CLIP_LENGTH: usize = 77;

/// Prompts to token ids.
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    /// open_clip's splitting into words, which knows no special tokens but its own two.
    open_clip: Sequence,
    max_length: usize,
    bos: u32,
    eos: u32,
    pad: u32,
}

impl ClipTokenizer {
    /// From `tokenizer.json`, else `vocab.json` and `merges.txt`, with `tokenizer_config.json` and
    /// `special_tokens_map.json`. As in transformers 5, only the vocabulary, the merges and the added tokens are taken
    /// from `tokenizer.json`: the steps before and after BPE are always CLIP's.
    ///
    /// # Errors
    /// When a file is missing or malformed, or a special token has no id.
    pub fn load(source: &Source) -> Result<Self> {
        Self::build(source).with_context(|| format!("loading the tokenizer from {}", source.label()))
    }

    fn build(source: &Source) -> Result<Self> {
        let (vocab, merges, file_tokens) = read_bpe(source)?;
        let config: Config = match source.find("tokenizer_config.json")? {
            Some(_) => source.read_json("tokenizer_config.json")?,
            None => Config::default(),
        };
        let (named, added) = special_tokens(source, &config, file_tokens)?;
        for token in &named {
            let known = vocab.contains_key(&token.content) || added.values().any(|a| a.content == token.content);
            ensure!(known, "the special token `{}` is not in the vocabulary", token.content);
        }
        let [bos, eos, unk, pad] = &named;

        let bpe = BPE::builder().vocab_and_merges(vocab, merges).end_of_word_suffix("</w>".into());
        let bpe = bpe.unk_token(unk.content.clone()).build().map_err(|e| anyhow!(e))?;
        let mut tokenizer = Tokenizer::new(bpe);
        let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(|e| anyhow!(e))?;
        let steps = vec![NFC.into(), spaces.into(), Lowercase.into()];
        tokenizer.with_normalizer(Some(normalizers::Sequence::new(steps))).map_err(|e| anyhow!(e))?;
        tokenizer.with_pre_tokenizer(Some(words(r"<\|startoftext\|>|<\|endoftext\|>", true)?));
        let new = named.iter().filter(|t| added.values().all(|a| a.content != t.content));
        tokenizer.add_special_tokens(added.values().chain(new).cloned()).map_err(|e| anyhow!(e))?;

        let id = |token: &AddedToken| {
            tokenizer.token_to_id(&token.content).with_context(|| format!("`{}` has no id", token.content))
        };
        for (&wanted, token) in &added {
            let found = id(token)?;
            ensure!(found == wanted, "the added token `{}` gets id {found}, its file says {wanted}", token.content);
        }
        let (bos, eos, pad) = (id(bos)?, id(eos)?, id(pad)?);
        let open_clip = words("<start_of_text>|<end_of_text>", false)?;
        Ok(Self { tokenizer, open_clip, max_length: config.max_length()?, bos, eos, pad })
    }

    /// The length of every encoded prompt, `bos` and `eos` included.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Number of ids, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// What prompts are padded with: end-of-text in Stable Diffusion 1.x, `!` in 2.x.
    pub fn pad_id(&self) -> u32 {
        self.pad
    }

    /// End of text: where CLIP's pooled embedding is read.
    pub fn eos_id(&self) -> u32 {
        self.eos
    }

    /// Start of text.
    pub fn bos_id(&self) -> u32 {
        self.bos
    }

    /// `bos`, tokens, `eos`, padding: always `max_length` ids; a long prompt loses its end and keeps `eos`.
    ///
    /// # Errors
    /// When the BPE model fails, which a vocabulary with an unknown token does not.
    pub fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        Ok(self.framed(self.ids(prompt)?, self.max_length, self.pad))
    }

    /// The 77 ids that open_clip's tokenizer gives: the same merges, its own cleaning, padded with 0, no special
    /// meaning for the pad token's text.
    ///
    /// Of the repairs that open_clip runs first (ftfy), quotes, ligatures, wide and control characters are done here;
    /// the guessing of wrongly decoded text ("mojibake") is not, nor HTML's rare named entities.
    ///
    /// # Errors
    /// As [`ClipTokenizer::encode`].
    pub fn encode_open_clip(&self, prompt: &str) -> Result<Vec<u32>> {
        let mut words = PreTokenizedString::from(clean(prompt));
        self.open_clip.pre_tokenize(&mut words).map_err(|e| anyhow!(e))?;
        let mut ids = Vec::new();
        for (word, ..) in words.get_splits(OffsetReferential::Original, OffsetType::None) {
            match word {
                "<start_of_text>" => ids.push(self.bos),
                "<end_of_text>" => ids.push(self.eos),
                word => {
                    let tokens = self.tokenizer.get_model().tokenize(word).map_err(|e| anyhow!(e))?;
                    ids.extend(tokens.iter().map(|token| token.id));
                }
            }
        }
        Ok(self.framed(ids, OPEN_CLIP_LENGTH, 0))
    }

    /// How many ids [`ClipTokenizer::encode`] would need, `bos` and `eos` included: a prompt is cut when this is more
    /// than `max_length`.
    ///
    /// # Errors
    /// As [`ClipTokenizer::encode`].
    pub fn token_count(&self, prompt: &str) -> Result<usize> {
        Ok(self.ids(prompt)?.len() + 2)
    }

    /// The first word of a prompt that [`ClipTokenizer::encode`] leaves out, wholly or in part.
    ///
    /// # Errors
    /// As [`ClipTokenizer::encode`].
    pub fn first_lost<'a>(&self, prompt: &'a str) -> Result<Option<&'a str>> {
        let encoding = self.encoding(prompt)?;
        let Some((token, _)) = encoding.get_offsets().get(self.max_length - 2) else { return Ok(None) };
        let before = &prompt[..prompt.floor_char_boundary(*token)];
        let start = before.trim_end_matches(|c: char| !c.is_whitespace()).len();
        Ok(prompt[start..].split_whitespace().next())
    }

    fn ids(&self, prompt: &str) -> Result<Vec<u32>> {
        Ok(self.encoding(prompt)?.get_ids().to_vec())
    }

    fn encoding(&self, prompt: &str) -> Result<Encoding> {
        self.tokenizer.encode(prompt, false).map_err(|e| anyhow!(e)).context("tokenizing a prompt")
    }

    fn framed(&self, mut ids: Vec<u32>, length: usize, pad: u32) -> Vec<u32> {
        ids.truncate(length - 2);
        ids.insert(0, self.bos);
        ids.push(self.eos);
        ids.resize(length, pad);
        ids
    }
}

/// Splits into special tokens, contractions, letters, single digits and runs of anything else, as byte-level text.
fn words(special: &str, case_sensitive: bool) -> Result<Sequence> {
    let flag = if case_sensitive { "" } else { "(?i)" };
    let pattern = format!(r"{flag}{special}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+");
    let split = Split::new(SplitPattern::Regex(pattern), SplitDelimiterBehavior::Removed, true);
    // transformers leaves the byte-level step its own regex, open_clip has none.
    let bytes = ByteLevel::new(false, true, case_sensitive);
    Ok(Sequence::new(vec![split.map_err(|e| anyhow!(e))?.into(), bytes.into()]))
}

/// The part of `tokenizer_config.json` and `special_tokens_map.json` that decides ids.
#[derive(Default, Deserialize)]
struct Config {
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    unk_token: Option<Token>,
    pad_token: Option<Token>,
    added_tokens_decoder: Option<BTreeMap<u32, Token>>,
    model_max_length: Option<f64>,
}

impl Config {
    fn max_length(&self) -> Result<usize> {
        match self.model_max_length {
            // transformers writes 1e30 for "no limit"; CLIP's position table has 77 rows.
            None | Some(1e6..) => Ok(77),
            Some(n) if n >= 2.0 => Ok(n as usize),
            Some(n) => bail!("tokenizer_config.json: `model_max_length` is {n}; it must leave room for bos and eos"),
        }
    }
}

/// A token as transformers writes it: its text, or its text with rules.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Rules {
        content: String,
        #[serde(default)]
        single_word: bool,
        #[serde(default)]
        lstrip: bool,
        #[serde(default)]
        rstrip: bool,
        normalized: Option<bool>,
        #[serde(default)]
        special: bool,
    },
}

impl Token {
    /// `special`: whether the token has a role (bos, eos, unk, pad) that makes it special.
    fn added(self, special: bool) -> AddedToken {
        match self {
            Self::Text(text) => AddedToken::from(text, special),
            Self::Rules { content, single_word, lstrip, rstrip, normalized, special: written } => {
                let special = special || written;
                let token = AddedToken::from(content, special).single_word(single_word).lstrip(lstrip).rstrip(rstrip);
                token.normalized(normalized.unwrap_or(!special))
            }
        }
    }
}

/// The bos, eos, unk and pad tokens, and the added tokens by id, in transformers' order of precedence.
fn special_tokens(
    source: &Source,
    config: &Config,
    file_tokens: BTreeMap<u32, Token>,
) -> Result<([AddedToken; 4], BTreeMap<u32, AddedToken>)> {
    let mut map = Config::default();
    let mut added = config.added_tokens_decoder.clone().unwrap_or_default();
    let legacy = config.added_tokens_decoder.is_none();
    if legacy && source.find("special_tokens_map.json")?.is_some() {
        map = source.read_json("special_tokens_map.json")?;
    }
    if legacy && source.find("added_tokens.json")?.is_some() {
        let ids: BTreeMap<String, u32> = source.read_json("added_tokens.json")?;
        added.extend(ids.into_iter().map(|(text, id)| (id, Token::Text(text))));
    }
    if legacy {
        added.extend(file_tokens);
    }
    let roles = [
        (map.bos_token, &config.bos_token, "<|startoftext|>"),
        (map.eos_token, &config.eos_token, "<|endoftext|>"),
        (map.unk_token, &config.unk_token, "<|endoftext|>"),
        (source.pad_token().map(|text| Token::Text(text.into())).or(map.pad_token), &config.pad_token, "<|endoftext|>"),
    ];
    let named = roles.map(|(first, second, default)| {
        first.or_else(|| second.clone()).unwrap_or_else(|| Token::Text(default.into())).added(true)
    });
    let added = added.into_iter().map(|(id, token)| {
        let plain = token.clone().added(false);
        let has_role = named.iter().any(|n| n.content == plain.content);
        (id, if has_role { token.added(true) } else { plain })
    });
    let added = added.collect();
    Ok((named, added))
}

/// Vocabulary, merges, and the added tokens of a `tokenizer.json`.
fn read_bpe(source: &Source) -> Result<(Vocab, Merges, BTreeMap<u32, Token>)> {
    #[derive(Deserialize)]
    struct File {
        model: Bpe,
        #[serde(default)]
        added_tokens: Vec<Added>,
    }
    #[derive(Deserialize)]
    struct Bpe {
        vocab: Vocab,
        merges: Vec<Merge>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Merge {
        Line(String),
        Pair(String, String),
    }
    #[derive(Deserialize)]
    struct Added {
        id: u32,
        #[serde(flatten)]
        token: Token,
    }
    let pair = |line: &str, n: usize, file: &str| match line.split_once(' ') {
        Some((a, b)) if !b.contains(' ') => Ok((a.to_owned(), b.to_owned())),
        _ => Err(anyhow!("{file}: merge {n} is `{line}`, not two tokens")),
    };
    let (vocab, merges, added) = if source.find("tokenizer.json")?.is_some() {
        let file: File = source.read_json("tokenizer.json")?;
        let merges = file.model.merges.into_iter().enumerate().map(|(n, merge)| match merge {
            Merge::Line(line) => pair(&line, n, "tokenizer.json"),
            Merge::Pair(a, b) => Ok((a, b)),
        });
        let added = file.added_tokens.into_iter().map(|a| (a.id, a.token)).collect();
        (file.model.vocab, merges.collect::<Result<Merges>>()?, added)
    } else {
        let (Some(_), Some(path)) = (source.find("vocab.json")?, source.find("merges.txt")?) else {
            return Err(source.missing("a tokenizer (`tokenizer.json`, or `vocab.json` and `merges.txt`)"));
        };
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let lines = text.lines().filter(|line| !line.starts_with("#version") && !line.is_empty());
        let merges = lines.enumerate().map(|(n, line)| pair(line, n, "merges.txt"));
        (source.read_json("vocab.json")?, merges.collect::<Result<_>>()?, BTreeMap::new())
    };
    // The BPE builder indexes by these lengths and panics on a merge that makes no token.
    for (n, (a, b)) in merges.iter().enumerate() {
        let token = [a, b].into_iter().chain([&format!("{a}{b}")]).find(|t| !vocab.contains_key(*t)).cloned();
        if let Some(token) = token {
            bail!("merge {n} (`{a} {b}`) needs `{token}`, which the vocabulary lacks; do the two belong together?");
        }
    }
    Ok((vocab, merges, added))
}

/// What open_clip does to a prompt before splitting: ftfy, HTML entities twice, single spaces, lower case.
fn clean(prompt: &str) -> String {
    let text = if prompt.contains('<') { prompt.to_owned() } else { unescape(prompt) };
    let mut text = NormalizedString::from(plain_characters(&text));
    text.nfc();
    let text = unescape(&unescape(text.get()));
    text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase()
}

/// The bytes 0x80 to 0x9f in Windows-1252, where the control characters of these numbers come from.
const WINDOWS_1252: &str = "€\u{81}‚ƒ„…†‡ˆ‰Š‹Œ\u{8d}Ž\u{8f}\u{90}‘’“”•–—˜™š›œ\u{9d}žŸ";

fn windows_1252(c: char) -> char {
    match c {
        '\u{80}'..='\u{9f}' => WINDOWS_1252.chars().nth(c as usize - 0x80).unwrap_or(c),
        c => c,
    }
}

/// ftfy's replacements of single characters: Latin ligatures, full- and half-width forms, curly quotes, controls.
fn plain_characters(text: &str) -> String {
    #[rustfmt::skip]
    const LIGATURES: [(char, &str); 22] = [
        ('Ĳ', "IJ"), ('ĳ', "ij"), ('ŉ', "'n"), ('Ǳ', "DZ"), ('ǲ', "Dz"), ('ǳ', "dz"), ('Ǆ', "DŽ"), ('ǅ', "Dž"),
        ('ǆ', "dž"), ('Ǉ', "LJ"), ('ǈ', "Lj"), ('ǉ', "lj"), ('Ǌ', "NJ"), ('ǋ', "Nj"), ('ǌ', "nj"), ('ﬀ', "ff"),
        ('ﬁ', "fi"), ('ﬂ', "fl"), ('ﬃ', "ffi"), ('ﬄ', "ffl"), ('ﬅ', "ſt"), ('ﬆ', "st"),
    ];
    let mut out = String::with_capacity(text.len());
    for c in text.chars().map(windows_1252) {
        match c {
            '\u{2bc}' | '\u{2018}'..='\u{201b}' => out.push('\''),
            '\u{201c}'..='\u{201f}' => out.push('"'),
            '\0'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}' | '\u{206a}'..='\u{206f}' => {}
            '\u{feff}' | '\u{fff9}'..='\u{fffc}' => {}
            '\u{3000}' | '\u{ff01}'..='\u{ffef}' => {
                let mut narrow = NormalizedString::from(c.to_string());
                out.push_str(narrow.nfkc().get());
            }
            c => match LIGATURES.iter().find(|(ligature, _)| *ligature == c) {
                Some((_, letters)) => out.push_str(letters),
                None => out.push(c),
            },
        }
    }
    out
}

/// Python's `html.unescape` for numbers and the names that occur in prompts.
fn unescape(text: &str) -> String {
    let mut parts = text.split('&');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (replacement, used) = entity(part).unwrap_or(("&".into(), 0));
        out.push_str(&replacement);
        out.push_str(&part[used..]);
    }
    out
}

/// The entity that the text after an `&` starts with: what it stands for, and how many bytes it took.
fn entity(text: &str) -> Option<(String, usize)> {
    /// Name, replacement, whether HTML allows it without its semicolon.
    #[rustfmt::skip]
    const NAMES: [(&str, &str, bool); 14] = [
        ("amp", "&", true), ("lt", "<", true), ("gt", ">", true), ("quot", "\"", true), ("nbsp", "\u{a0}", true),
        ("copy", "©", true), ("reg", "®", true), ("apos", "'", false), ("lsquo", "‘", false), ("rsquo", "’", false),
        ("ldquo", "“", false), ("rdquo", "”", false), ("ndash", "–", false), ("mdash", "—", false),
    ];
    let Some(number) = text.strip_prefix('#') else {
        return NAMES.iter().find_map(|(name, replacement, bare)| match text.strip_prefix(name)?.strip_prefix(';') {
            Some(_) => Some((replacement.to_string(), name.len() + 1)),
            None => bare.then(|| (replacement.to_string(), name.len())),
        });
    };
    let (digits, radix) = number.strip_prefix(['x', 'X']).map_or((number, 10), |hex| (hex, 16));
    let length = digits.chars().take_while(|c| c.is_digit(radix)).count();
    let (digits, rest) = digits.split_at(length);
    let used = text.len() - rest.strip_prefix(';').unwrap_or(rest).len();
    if digits.is_empty() {
        return None;
    }
    let code = u32::from_str_radix(digits, radix).unwrap_or(u32::MAX);
    let c = char::from_u32(code).filter(|&c| c != '\0').map_or('\u{fffd}', windows_1252);
    let dropped = c.is_control() && !['\t', '\n', '\u{c}', '\r'].contains(&c);
    Some((if dropped { String::new() } else { c.to_string() }, used))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use std::path::Path;

    const BOS: u32 = 22;
    const EOS: u32 = 23;

    /// 10 characters, the same at the end of a word, two merges, bos and eos.
    fn tiny_vocab() -> serde_json::Value {
        let characters = ["!", "a", "c", "t", "o", "4", "k", "'", "s", "<"];
        let ends = characters.map(|c| format!("{c}</w>"));
        let tokens = characters.iter().map(|c| c.to_string()).chain(ends);
        let tokens = tokens.chain(["ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"].map(String::from));
        tokens.zip(0..).map(|(token, id)| (token, serde_json::Value::from(id))).collect()
    }

    fn folder(files: &[(&str, String)]) -> (tempfile::TempDir, Source) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let source = Source::open(dir.path().to_str().unwrap()).unwrap();
        (dir, source)
    }

    fn tiny(more: &[(&str, String)]) -> Result<ClipTokenizer> {
        let merges = "#version: 0.2\nc a\nca t</w>\n".to_owned();
        let files = [&[("vocab.json", tiny_vocab().to_string()), ("merges.txt", merges)], more].concat();
        ClipTokenizer::load(&folder(&files).1)
    }

    fn config(pad: &str) -> (&'static str, String) {
        ("tokenizer_config.json", format!(r#"{{"pad_token": "{pad}", "model_max_length": 8}}"#))
    }

    #[test]
    fn the_first_lost_word_is_where_a_prompt_is_cut() {
        let tokenizer = tiny(&[config("<|endoftext|>")]).unwrap();
        let lost = |prompt| tokenizer.first_lost(prompt).unwrap();
        assert_eq!(lost("cat cat cat cat cat cat"), None);
        assert_eq!(lost("cat cat cat cat cat\u{a0}cat a! cat"), Some("a!"));
        assert_eq!(lost("cat cat cat cat cat a!4 cat"), Some("a!4")); // its first token is read
    }

    #[test]
    fn words_become_merged_ids_between_bos_and_eos() {
        let tokenizer = tiny(&[config("<|endoftext|>")]).unwrap();
        assert_eq!(tokenizer.encode("A  cat").unwrap(), [BOS, 11, 21, EOS, EOS, EOS, EOS, EOS]);
        assert_eq!(tokenizer.encode("4k! cat's").unwrap(), [BOS, 15, 16, 10, 21, 7, 18, EOS]);
        assert_eq!(tokenizer.token_count("A  cat").unwrap(), 4);
        assert_eq!((tokenizer.vocab_size(), tokenizer.max_length(), tokenizer.pad_id()), (24, 8, EOS));
    }

    #[test]
    fn a_long_prompt_is_cut_and_keeps_eos() {
        let tokenizer = tiny(&[config("<|endoftext|>")]).unwrap();
        let prompt = "cat ".repeat(90);
        assert_eq!(tokenizer.encode(&prompt).unwrap(), [BOS, 21, 21, 21, 21, 21, 21, EOS]);
        assert_eq!(tokenizer.token_count(&prompt).unwrap(), 92);
        let ids = tokenizer.encode_open_clip(&prompt).unwrap();
        assert_eq!((ids.len(), ids[75], ids[76]), (77, 21, EOS));
    }

    #[test]
    fn a_pad_token_that_is_a_character_is_special_in_prompts_but_not_for_open_clip() {
        // special_tokens_map.json wins over the config, as in the files of Stable Diffusion 2.1.
        let map = ("special_tokens_map.json", r#"{"pad_token": "!"}"#.to_owned());
        let tokenizer = tiny(&[config("<|endoftext|>"), map]).unwrap();
        assert_eq!(tokenizer.encode("4k! a").unwrap(), [BOS, 15, 16, 0, 11, EOS, 0, 0]);
        assert_eq!(tokenizer.encode_open_clip("4k! a").unwrap()[..7], [BOS, 15, 16, 10, 11, EOS, 0]);
        assert_eq!((tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id()), (0, BOS, EOS));
    }

    #[test]
    fn a_tokenizer_json_gives_the_same_ids_without_a_second_bos() {
        let post = serde_json::json!({"type": "RobertaProcessing", "sep": ["<|endoftext|>", EOS], "cls": ["<|startoftext|>", BOS],
            "trim_offsets": false, "add_prefix_space": false});
        let pad = serde_json::json!({"id": 0, "content": "!", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true});
        for merges in [serde_json::json!(["c a", "ca t</w>"]), serde_json::json!([["c", "a"], ["ca", "t</w>"]])] {
            let file = serde_json::json!({"added_tokens": [pad], "post_processor": post,
                "model": {"type": "BPE", "vocab": tiny_vocab(), "merges": merges}});
            let tokenizer =
                ClipTokenizer::load(&folder(&[("tokenizer.json", file.to_string()), config("!")]).1).unwrap();
            assert_eq!(tokenizer.encode("4k! cat").unwrap(), [BOS, 15, 16, 0, 21, EOS, 0, 0]);
        }
    }

    #[test]
    fn broken_tokenizers_are_errors() {
        let error = |result: Result<ClipTokenizer>| format!("{:#}", result.err().unwrap());
        let e = error(ClipTokenizer::load(&folder(&[]).1));
        assert!(e.contains("merges.txt") && e.contains("tokenizer.json"), "{e}");
        let e = error(tiny(&[("merges.txt", "c a\nk 4 4".into())]));
        assert!(e.contains("merge 1") && e.contains("k 4 4"), "{e}");
        let e = error(tiny(&[("merges.txt", "cat</w> cat</w>".into())]));
        assert!(e.contains("merge 0") && e.contains("cat</w>cat</w>"), "{e}");
        assert!(error(tiny(&[config("<pad>")])).contains("`<pad>` is not in the vocabulary"));
        assert!(error(tiny(&[("vocab.json", "{\n1}".into())])).contains("vocab.json"));
    }

    #[test]
    fn open_clip_cleans_prompts_as_python_does() {
        for (prompt, cleaned) in [
            ("  R&amp;B &lt;b&gt;\t&quot;x&quot; ", "r&b <b> \"x\""),
            ("&amp;amp;lt; AT&T &#39;&#x27; a&b;", "< at&t '' a&b;"),
            ("“curly” cat’s ﬁne ǆ", "\"curly\" cat's fine dž"),
            ("ＦＵＬＬ　ｗｉｄｔｈ ｶﾞ", "full width ガ"),
            ("ctrl\u{7}\u{b}char \u{feff}cafe\u{301}", "ctrlchar café"),
            ("&#146;&#0;&#7;&#xZ;&#", "'\u{fffd}&#xz;&#"),
        ] {
            assert_eq!(clean(prompt), cleaned, "{prompt}");
        }
        let tokenizer = tiny(&[]).unwrap();
        let ids = tokenizer.encode_open_clip("<start_of_text> !<end_of_text>").unwrap();
        // Only a word that begins like a special token is one: `!<` comes first.
        assert_eq!((ids[1], ids[2], ids[3]), (BOS, 0, 19));
    }

    #[test]
    fn the_ids_equal_those_of_transformers_and_open_clip() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/reference");
        for variant in ["sd15", "sd21"] {
            let Ok(parts) = candle_core::safetensors::load(root.join(variant).join("parts.safetensors"), &Device::Cpu)
            else {
                return eprintln!("skipped: no reference in {}", root.display());
            };
            let model = Source::open(root.join(variant).join("model").to_str().unwrap()).unwrap();
            let tokenizer = ClipTokenizer::load(&model.sub("tokenizer")).unwrap();
            let expected = |name: &str| parts[name].to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
            for (i, prompt) in ["a cat", "A photo of an astronaut riding a horse, 4k!", "otter"].iter().enumerate() {
                assert_eq!(tokenizer.encode(prompt).unwrap(), expected("input_ids")[i], "{variant}: {prompt}");
                assert_eq!(tokenizer.encode("").unwrap(), expected("uncond_ids")[i], "{variant}");
                assert_eq!(
                    tokenizer.encode_open_clip(prompt).unwrap(),
                    expected("open_clip_ids")[i],
                    "{variant}: {prompt}"
                );
            }
        }
    }
}
