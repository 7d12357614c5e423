//! The readers of files that come from elsewhere, each as a function of the bytes of one file: an error is as good as a
//! value, and what was read must then be usable.

mod lora;
mod models;
mod texts;

use std::fs;
use std::path::{Path, PathBuf};

use alignprop::models::Source;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use super::mutate::Shape;
use super::support::{copy_folder, fixture, text};

type Read = Box<dyn Fn(&[u8]) -> Result<()>>;

pub struct Reader {
    pub shape: Shape,
    pub seeds: Vec<Vec<u8>>,
    /// What the format may say.
    pub words: Vec<&'static str>,
    /// Reads one input, and uses what it gave.
    pub read: Read,
}

const MODEL: &str = "tiny-sd15/model";

/// The reader of this name, with a folder of its own.
pub fn reader(name: &str, folder: &Path) -> Reader {
    fs::create_dir_all(folder).unwrap();
    let prompts = |extension, shape, seed| texts::prompts(folder, extension, shape, seed);
    let tokenizer = |set, file, shape| texts::tokenizer(folder, set, file, shape);
    match name {
        "safetensors" => models::safetensors(folder),
        "pickle" => models::pickle(folder),
        "lora" | "lora-pickle" => lora::file(name == "lora", folder),
        "adapter-config" => lora::adapter_config(folder),
        "lora-commands" => lora::commands(folder),
        "lora-merged" => lora::merged(folder),
        "unet-config" => models::unet(folder),
        "vae-config" => models::vae(folder),
        "text-encoder-config" => models::text_encoder(folder),
        "clip-config" => models::clip(folder),
        "open-clip-config" => models::open_clip(folder),
        "preprocessor-config" => models::preprocessor(folder),
        "scheduler-config" => models::scheduler(folder),
        "detector-config" => models::detector(folder),
        "image-reward-config" => models::image_reward(folder),
        "siglip-config" => models::siglip(folder),
        "siglip-tokenizer" => texts::sentence_pieces(folder),
        "word-pieces" => texts::word_pieces(folder),
        "aesthetic-head" => models::aesthetic_head(folder),
        "shards-index" => models::shards_index(folder),
        "yaml" => models::single_file(folder, true),
        "single-file" => models::single_file(folder, false),
        "prompts-txt" => prompts("txt", Shape::Text, b"# mine\na cat\r\n\n  a dog  \n"),
        "prompts-jsonl" => prompts(
            "jsonl",
            Shape::JsonLines,
            b"{\"prompt\": \"two cats\", \"count\": 2}\n\n{\"prompt\": \"# a dog\"}\r\n",
        ),
        "prompts-json" => prompts("json", Shape::Json, b"[\"a cat\", {\"prompt\": \"two dogs\", \"count\": 2}]"),
        "prompts-csv" => prompts("csv", Shape::Text, b"prompt,count\na cat,1\n\"two \"\"dogs\"\", wet\",2\n"),
        "rows-csv" => texts::rows(folder, "csv", Shape::Text, b"file,score,prompt\na.png,1.5,a cat\n\"b,c.png\",-2,\n"),
        "rows-jsonl" => texts::rows(
            folder,
            "jsonl",
            Shape::JsonLines,
            b"{\"file\": \"a.png\", \"score\": 1.5}\n\n{\"file\": \"b.png\", \"score\": \"2\", \"prompt\": \"a cat\"}\r\n",
        ),
        "texts-in-png" => texts::texts_in_png(folder),
        "head-of-fit" => texts::head_of_fit(folder),
        "config" => texts::config(),
        "tokenizer-json" => tokenizer("tiny-sd21", "tokenizer.json", Shape::Json),
        "tokenizer-config" => tokenizer("tiny-sd15", "tokenizer_config.json", Shape::Json),
        "special-tokens" => tokenizer("tiny-sd15", "special_tokens_map.json", Shape::Json),
        "added-tokens" => texts::added_tokens(folder),
        "vocab" => tokenizer("tiny-sd15", "vocab.json", Shape::Json),
        "merges" => tokenizer("tiny-sd15", "merges.txt", Shape::Text),
        "prompt" => texts::prompt(),
        "metrics" => texts::metrics(folder),
        "runs" => texts::runs(folder),
        "checkpoint-state" => texts::checkpoint_state(folder),
        "checkpoint-statistics" => texts::checkpoint_statistics(folder),
        other => panic!("there is no reader `{other}`: {}", super::NAMES.join(", ")),
    }
}

/// A list in which ` ~ ` stands between the words.
fn words(list: &'static str) -> Vec<&'static str> {
    list.split(" ~ ").collect()
}

fn bytes_of(path: &str) -> Vec<u8> {
    fs::read(fixture(path)).unwrap()
}

/// A file in `folder` into which each input is written before `read` looks at it.
fn of_file(path: PathBuf, read: impl Fn(&Path) -> Result<()> + 'static) -> Read {
    Box::new(move |input| {
        // a new file: an old one may still be mapped
        let _ = fs::remove_file(&path);
        fs::write(&path, input)?;
        read(&path)
    })
}

/// A reader of one JSON file in a copy of a folder of the fixtures.
fn of_json(folder: &Path, from: &str, file: &str, read: impl Fn(&Source) -> Result<()> + 'static) -> Reader {
    copy_folder(&fixture(from), folder);
    let root = folder.to_owned();
    let read = of_file(folder.join(file), move |_| read(&Source::open(&text(&root))?));
    Reader { shape: Shape::Json, seeds: vec![bytes_of(&format!("{from}/{file}"))], words: vec![], read }
}

fn zeros(shape: &[usize]) -> candle_core::Result<Tensor> {
    Tensor::zeros(shape, DType::F32, &Device::Cpu)
}
