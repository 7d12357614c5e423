//! What people write, tokenizers, and a run's own files.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use alignprop::config::{Config, OptimizerConfig, PromptsConfig};
use alignprop::lora::formats;
use alignprop::models::Source;
use alignprop::models::sentence_pieces::SentencePieces;
use alignprop::models::tokenizer::ClipTokenizer;
use alignprop::models::word_pieces::WordPieces;
use alignprop::optim::AdamW;
use alignprop::pictures::{Rows, text_in_png};
use alignprop::report::Pairs;
use alignprop::report::html::{Contents, Status, page};
use alignprop::report::{Metrics, best, best_to_show};
use alignprop::rewards::Rewards;
use alignprop::training::adjoint_matching::Threshold;
use alignprop::training::advantages::PromptStatistics;
use alignprop::training::checkpoint::Checkpoint;
use alignprop::training::loss_scale::LossScale;
use anyhow::{Result, ensure};
use candle_core::DType;

use super::{MODEL, Reader, Shape, bytes_of, of_file, words};
use crate::support::{copy_folder, fixture, run, text};

/// Prompts in a file.
pub fn prompts(folder: &Path, extension: &str, shape: Shape, seed: &[u8]) -> Reader {
    let path = folder.join(format!("prompts.{extension}"));
    let config = PromptsConfig { file: Some(path.clone()), ..Default::default() };
    Reader {
        shape,
        seeds: vec![seed.to_vec()],
        words: words("prompt ~ count ~ \" ~ \"\" ~ , ~ \u{feff} ~ \r\n ~ \t ~ # ~ text ~ caption"),
        read: of_file(path, move |_| {
            let prompts = config.load()?;
            ensure!(!prompts.is_empty(), "prompts that are none");
            prompts.iter().for_each(|prompt| drop(prompt.to_string()));
            Ok(())
        }),
    }
}

/// A list of pictures with scores.
pub fn rows(folder: &Path, extension: &str, shape: Shape, seed: &[u8]) -> Reader {
    Reader {
        shape,
        seeds: vec![seed.to_vec()],
        words: words("file ~ score ~ prompt ~ ; ~ \t ~ \" ~ \"\" ~ null ~ true ~ 1e999 ~ nan ~ [] ~ {} ~ \u{feff}"),
        read: of_file(folder.join(format!("rows.{extension}")), |path| {
            let rows = Rows::read(path, &["file"])?;
            ensure!(!rows.rows.is_empty(), "rows that are none");
            for row in &rows.rows {
                row.number(&["score"])?;
                row.text(&["file"]).map(|name| rows.located(name));
                row.text(&["prompt"]);
            }
            Ok(())
        }),
    }
}

/// ComfyUI's graph in a PNG.
pub fn texts_in_png(folder: &Path) -> Reader {
    let path = folder.join("a.png");
    let graph =
        br#"{"3": {"inputs": {"latent_image": ["5", 0], "positive": ["6", 0]}}, "6": {"inputs": {"text": "a cat"}}}"#;
    Reader {
        shape: Shape::Json,
        seeds: vec![graph.to_vec()],
        words: words("positive ~ conditioning ~ inputs ~ text ~ 3 ~ 6 ~ latent_image"),
        read: Box::new(move |input| {
            let text = std::str::from_utf8(input)?;
            let mut encoder = png::Encoder::new(fs::File::create(&path)?, 1, 1);
            encoder.add_itxt_chunk("prompt".into(), text.into())?;
            encoder.write_header()?.write_image_data(&[9])?;
            ensure!(text_in_png(&path).is_some_and(|prompt| !prompt.trim().is_empty()), "no prompt");
            Ok(())
        }),
    }
}

/// What a head's file says of itself.
pub fn head_of_fit(folder: &Path) -> Reader {
    let path = folder.join("head.safetensors");
    let clip = text(fixture("tiny-sd15/clip"));
    let said = serde_json::json!({ "clip": clip, "preprocess": "clip-official", "layers": [{ "linear": "head" }] });
    let header = [("alignprop.head".to_owned(), said.to_string())].into();
    let tensors = [
        ("head.weight".to_owned(), super::zeros(&[1, 24]).unwrap()),
        ("head.bias".to_owned(), super::zeros(&[1]).unwrap()),
    ];
    alignprop::files::save_tensors(&path, &header, &tensors, DType::F32).unwrap();
    let config = format!("[reward.clip-head]\nclip = '{clip}'\nhead = '{}'", path.display());
    let config = Config::parse(&config, "x.toml", &[]).unwrap().reward;
    let tokenizer = Source::open(&text(fixture("tiny-sd15/model/tokenizer"))).unwrap();
    let tokenizer = std::sync::Arc::new(ClipTokenizer::load(&tokenizer).unwrap());
    Reader {
        shape: Shape::Safetensors,
        seeds: vec![fs::read(&path).unwrap()],
        words: words("alignprop.head ~ preprocess ~ squash ~ layers ~ linear ~ activation ~ relu ~ head"),
        read: of_file(path, move |_| Rewards::load(&config, &tokenizer).map(drop)),
    }
}

/// A config; its lines `--set key=value` are overrides.
pub fn config() -> Reader {
    let presets = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")).unwrap();
    let mut paths: Vec<PathBuf> = presets.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let mut seeds: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    let overrides = b"[optimizer]\nlr = 1e-4\n--set truncation={ rule = \"fixed\", k = 3 }\n--set run.dir=2024-01-01\n--set prompts.list=[\"a\"]\n";
    seeds.push(overrides.to_vec());
    Reader {
        shape: Shape::Text,
        seeds,
        words: words(
            "--set optimizer.lr=1e-3 ~ --set a.b.c.d=[[[1]]] ~ --set truncation.rule=steps ~ --set truncation.steps=[0,2] ~ --set = ~ --set model.path ~ [truncation] ~ rule = \"per-step\" ~ lo = 1 ~ hi = 9 ~ [reward.clip-head] ~ layers = [{ linear = \"a\" }] ~ [[guard]] ~ [a.b] ~ x.y.z = 1 ~ ''' ~ \"\"\" ~ 1979-05-27T07:32:00Z ~ 0x7fffffffffffffff ~ inf ~ -nan ~ [guard] ~ every = 0 ~ [regularization] ~ [run]",
        ),
        read: Box::new(|input| {
            let input = std::str::from_utf8(input)?;
            let (sets, lines): (Vec<&str>, Vec<&str>) = input.lines().partition(|line| line.starts_with("--set "));
            let sets: Vec<String> = sets.iter().map(|line| line["--set ".len()..].to_owned()).collect();
            let config = Config::parse(&lines.join("\n"), "x.toml", &sets)?;
            let again = Config::parse(&config.to_toml()?, "again.toml", &[]).expect("a resolved config is read again");
            assert_eq!(again, config);
            Ok(())
        }),
    }
}

const TEXTS: [&str; 3] = ["a photo of <x> cat, isn't it?", "<|endoftext|> ÉÀ \u{0} 12 <|startoftext|>", "! ! !!!"];

/// BERT's vocabulary.
pub fn word_pieces(folder: &Path) -> Reader {
    Reader {
        shape: Shape::Text,
        seeds: vec![bytes_of("tiny-imagereward/vocab.txt")],
        words: words("[UNK] ~ [CLS] ~ [SEP] ~ ## ~ ##s ~ \u{feff} ~ \r\n ~ \0"),
        read: of_file(folder.join("vocab.txt"), |path| {
            let pieces = WordPieces::load(path, &["[DEC]", "[ENC]"])?;
            TEXTS.iter().try_for_each(|text| pieces.encode(text, 35).map(drop))
        }),
    }
}

/// SigLIP's tokenizer.
pub fn sentence_pieces(folder: &Path) -> Reader {
    let seed = br#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":{"type":"Metaspace","replacement":"_","prepend_scheme":"always","split":true},"post_processor":null,"decoder":null,"model":{"type":"Unigram","unk_id":1,"vocab":[["</s>",0.0],["<unk>",0.0],["_a",-1.0],["s",-2.0],["_",-4.0]],"byte_fallback":false}}"#;
    let root = text(folder);
    Reader {
        shape: Shape::Json,
        seeds: vec![seed.to_vec()],
        words: words("BPE ~ WordPiece ~ merges ~ Replace ~ Precompiled ~ ByteLevel ~ Split ~ Sequence"),
        read: of_file(folder.join("tokenizer.json"), move |_| {
            let pieces = SentencePieces::load(&Source::open(&root)?, 8)?;
            TEXTS.iter().try_for_each(|text| pieces.encode(text).map(drop))
        }),
    }
}

/// One file of a tokenizer.
pub fn tokenizer(folder: &Path, set: &str, file: &str, shape: Shape) -> Reader {
    let from = format!("{set}/model/tokenizer");
    copy_folder(&fixture(&from), folder);
    let seeds = fs::read(folder.join(file)).into_iter().collect();
    let root = text(folder);
    let words = vec![
        "<|endoftext|>",
        "<|startoftext|>",
        "<x>",
        "",
        "a</w>",
        "a b",
        "added_tokens",
        "content",
        "lstrip",
        "single_word",
        "special",
        "normalized",
        "pad_token",
        "bos_token",
        "added_tokens_decoder",
        "model_max_length",
        "#version: 0.2",
        "\u{120}a",
    ];
    let read = of_file(folder.join(file), move |_| {
        let tokenizer = ClipTokenizer::load(&Source::open(&root)?)?;
        encode(&tokenizer, &TEXTS)
    });
    Reader { shape, seeds, words, read }
}

fn encode(tokenizer: &ClipTokenizer, texts: &[&str]) -> Result<()> {
    for text in texts {
        assert_eq!(tokenizer.encode(text)?.len(), tokenizer.max_length());
        assert_eq!(tokenizer.encode_open_clip(text)?.len(), 77);
        tokenizer.token_count(text)?;
    }
    Ok(())
}

/// The added tokens of old tokenizers.
pub fn added_tokens(folder: &Path) -> Reader {
    let mut reader = tokenizer(folder, "tiny-sd15", "added_tokens.json", Shape::Json);
    fs::write(folder.join("tokenizer_config.json"), "{}").unwrap();
    reader.seeds = vec![b"{\"<x>\": 1114, \"<|endoftext|>\": 1113}".to_vec()];
    reader
}

/// A prompt's own text.
pub fn prompt() -> Reader {
    let tokenizer = ClipTokenizer::load(&Source::open(&text(fixture(&format!("{MODEL}/tokenizer")))).unwrap()).unwrap();
    let cases: serde_json::Value = serde_json::from_slice(&bytes_of("tokenizer_cases.json")).unwrap();
    let prompts = cases.as_array().unwrap().iter().filter_map(|case| case["prompt"].as_str());
    Reader {
        shape: Shape::Text,
        seeds: prompts.map(|prompt| prompt.as_bytes().to_vec()).collect(),
        words: vec![
            "&amp;",
            "&#x110000;",
            "&#99999999999;",
            "&lt;",
            "&#0;",
            "<|endoftext|>",
            "ﬃ",
            "İ",
            "\u{300}\u{301}",
            "'S",
            "🦦",
            "\u{200d}",
            "½",
        ],
        read: Box::new(move |input| encode(&tokenizer, &[&String::from_utf8_lossy(input)])),
    }
}

/// What was measured in a run.
pub fn metrics(folder: &Path) -> Reader {
    let config = Config::default();
    let (dir, config_file) = (folder.to_owned(), folder.join("config.toml"));
    let line = |step: usize| {
        format!(
            "{{\"step\":{step},\"loss\":0.5,\"reward/hps\":{step},\"reward/hps_std\":0.1,\"sample/hps\":2.5,\"guard/hps\":1,\"guard_kl\":3,\"grad_norm\":1e-3,\"lr\":1e-4,\"seconds\":2.5,\"skipped\":1,\"cause\":\"x\"}}\n"
        )
    };
    Reader {
        shape: Shape::JsonLines,
        seeds: vec![(1..6).map(line).collect::<String>().into_bytes()],
        words: words("step ~ loss ~ sample/hps ~ guard/hps ~ reward/hps ~ ema/x ~ a/b/c ~ / ~ _std"),
        read: of_file(folder.join("metrics.jsonl"), move |path| {
            let mut metrics = Metrics::read(path)?;
            best(&metrics, |step| step % 2 == 0);
            best_to_show(&metrics, |name| name.is_empty());
            page(&Contents {
                dir: &dir,
                config: &config,
                config_file: &config_file,
                metrics: &metrics,
                status: &Status::Training,
                pairs: &Pairs::default(),
                resident_peak: None,
            })?;
            metrics.rewind(metrics.last_step() / 2)?;
            let again = Metrics::read(path)?;
            assert_eq!(again.last_step(), metrics.last_step());
            for (name, points) in metrics.all() {
                let same = points.iter().map(|(step, x)| (*step, x.to_bits()));
                assert!(again.history(name).iter().map(|(step, x)| (*step, x.to_bits())).eq(same), "{name}");
            }
            Ok(())
        }),
    }
}

/// The numbers of a checkpoint.
pub fn checkpoint_state(folder: &Path) -> Reader {
    let adapters = formats::load(&fixture("lora/diffusers")).unwrap().adapters;
    let optimizer = AdamW::new(&OptimizerConfig::default(), &adapters.tensors()).unwrap();
    let (loss_scale, statistics) = (LossScale::new(DType::F16), PromptStatistics::default());
    let state = Checkpoint { step: 3, adapters, optimizer, ema: None, loss_scale, statistics, matching: None };
    let root = state.save(folder, &HashMap::new()).unwrap();
    let file = root.join("state.json");
    Reader {
        shape: Shape::Json,
        seeds: vec![fs::read(&file).unwrap()],
        words: vec!["ema", "x"],
        read: of_file(file, move |_| Checkpoint::load(&root, &OptimizerConfig::default()).map(drop)),
    }
}

/// The latest rewards of a checkpoint's prompts.
pub fn checkpoint_statistics(folder: &Path) -> Reader {
    let adapters = formats::load(&fixture("lora/diffusers")).unwrap().adapters;
    let optimizer = AdamW::new(&OptimizerConfig::default(), &adapters.tensors()).unwrap();
    let mut statistics = PromptStatistics::default();
    let matching = Some(Threshold { steps: 3.0, value: 0.7 });
    statistics.advantages(&["a cat", "a dog", "a cat"], &[1.0, -2.5, 3.0], 4, 2);
    let state = Checkpoint { step: 3, adapters, optimizer, ema: None, loss_scale: None, statistics, matching };
    let root = state.save(folder, &HashMap::new()).unwrap();
    let file = root.join("statistics.safetensors");
    Reader {
        shape: Shape::Safetensors,
        seeds: vec![fs::read(&file).unwrap()],
        words: words("rewards. ~ rewards.a cat ~ matching.threshold ~ __metadata__ ~ F64 ~ F32 ~ BF16 ~ [0] ~ [2,1]"),
        read: of_file(file, move |_| {
            let state = Checkpoint::load(&root, &OptimizerConfig::default())?;
            state.statistics.clone().advantages(&["a cat"], &[1.0], 4, 2);
            Ok(())
        }),
    }
}

/// The config of another version's run, as the table of all runs shows it.
pub fn runs(folder: &Path) -> Reader {
    let all = folder.join("runs");
    for name in ["a", "b"] {
        fs::create_dir_all(all.join(name)).unwrap();
        fs::write(all.join(name).join("metrics.jsonl"), "{\"step\":1,\"loss\":2}\n").unwrap();
        fs::write(all.join(name).join("config.toml"), Config::default().to_toml().unwrap()).unwrap();
    }
    let (path, all) = (all.join("b/config.toml"), text(all));
    Reader {
        shape: Shape::Text,
        seeds: vec![fs::read(&path).unwrap()],
        words: words("[reward.hps] ~ weight = 0 ~ [[a.b]] ~ x.y.z = 1 ~ 1979-05-27T07:32:00Z ~ name = \"a\\u0000b\""),
        read: of_file(path, move |_| run(&["runs", &all]).map(drop)),
    }
}
