//! Judges that run forward only, on models of candle-transformers: BERTScore, a captioner.

mod support;

use std::sync::Arc;

use alignprop::commands::verify::verify;
use alignprop::config::{BertscorePart, Prompt, RewardsConfig, ServerConfig, VlmBertscoreConfig};
use alignprop::models::Source;
use alignprop::models::captioner::Captioner;
use alignprop::models::tokenizer::ClipTokenizer;
use alignprop::rewards::{BertScore, Rewards};
use candle_core::{DType, Tensor};
use serde_json::json;
use support::server::{Fault, Server};
use support::{copy_folder, edit, fixture, read_tensors, text};

#[test]
fn bertscore_is_that_of_the_package() {
    let report = verify(&fixture("bertscore"), None).unwrap();
    let failed: Vec<_> = report.rows.iter().filter(|row| !row.pass).collect();
    assert!(report.passed() && report.rows.len() == 12, "{} rows, failed: {failed:?}", report.rows.len());
}

#[test]
fn a_set_with_other_numbers_fails() {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&fixture("bertscore"), folder.path());
    // without its convolution DeBERTa is another model
    edit(&folder.path().join("deberta/config.json"), "\"conv_kernel_size\": 3", "\"conv_kernel_size\": 0");
    let report = verify(folder.path(), None).unwrap();
    let failed: Vec<_> = report.rows.iter().filter(|row| !row.pass).map(|row| &*row.case).collect();
    assert!(failed.len() > 2 && failed.iter().all(|case| *case == "deberta"), "{failed:?}");
}

#[test]
fn what_is_wrong_with_a_scorer_is_said() {
    let error = |change: &dyn Fn(&std::path::Path)| {
        let folder = tempfile::tempdir().unwrap();
        copy_folder(&fixture("bertscore/bert"), folder.path());
        change(folder.path());
        format!("{:#}", BertScore::load(&text(folder.path()), Some(3)).err().expect("an error"))
    };
    let config = |path: &std::path::Path| path.join("config.json");
    for (found, expected) in [
        (error(&|path| std::fs::remove_file(path.join("tokenizer.json")).unwrap()), "save_pretrained"),
        (error(&|path| edit(&config(path), "\"bert\"", "\"deberta\"")), "its model_type is `deberta`; BERT"),
        (
            error(&|path| edit(&config(path), "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2")),
            "3 layers are asked for",
        ),
        (
            error(&|path| edit(&config(path), "\"num_attention_heads\": 3", "\"num_attention_heads\": 0")),
            "into 0 heads",
        ),
        (error(&|path| edit(&config(path), "\"hidden_size\": 24", "\"hidden_size\": 48")), "has shape"),
    ] {
        assert!(found.contains("loading the text model from") && found.contains(expected), "{found}");
    }
    let error = BertScore::load(&text(fixture("bertscore/bert")), None).err().unwrap().to_string();
    assert!(error.contains("give `layers`"), "{error}");
}

/// A picture of the fixture, (3, H, W) in [-1, 1].
fn picture(number: usize) -> Tensor {
    let bytes = read_tensors(&fixture("blip/pictures.safetensors"))[&format!("picture_{number}")].clone();
    bytes.to_dtype(DType::F32).unwrap().affine(2.0 / 255.0, -1.0).unwrap().permute((2, 0, 1)).unwrap()
}

fn captions() -> Vec<String> {
    serde_json::from_str(&std::fs::read_to_string(fixture("blip/captions.json")).unwrap()).unwrap()
}

fn described(captioner: &Captioner, number: usize, max_tokens: usize) -> String {
    let image = picture(number);
    let (_, height, width) = image.dims3().unwrap();
    captioner.describe(alignprop::rewards::to_bytes(&image).unwrap(), width, height, max_tokens).unwrap()
}

#[test]
fn a_captioner_describes_as_transformers_does() {
    let captioner = Captioner::load(&Source::open(&text(fixture("blip"))).unwrap()).unwrap();
    for (number, caption) in captions().iter().enumerate() {
        assert_eq!(described(&captioner, number, 11), *caption);
    }
    // the second does not depend on the first, and a limit is one
    let caption = &captions()[0];
    assert_eq!(described(&captioner, 0, 11), *caption);
    assert_eq!(described(&captioner, 0, 2), caption.split(' ').take(2).collect::<Vec<_>>().join(" "));
}

#[test]
fn a_caption_ends_where_the_model_says_so() {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&fixture("blip"), folder.path());
    let ids = read_tensors(&fixture("blip/pictures.safetensors"))["ids_1"].to_vec1::<i64>().unwrap();
    // behind [DEC] and two tokens
    let end = ids[3];
    assert!(!ids[1..3].contains(&end));
    let config = folder.path().join("config.json");
    edit(&config, "\"sep_token_id\": 3", &format!("\"sep_token_id\": {end}"));
    let captioner = Captioner::load(&Source::open(&text(folder.path())).unwrap()).unwrap();
    assert_eq!(described(&captioner, 1, 11), captions()[1].split(' ').take(2).collect::<Vec<_>>().join(" "));
    edit(&config, &format!("\"sep_token_id\": {end}"), "\"sep_token_id\": 3000");
    let error = format!("{:#}", Captioner::load(&Source::open(&text(folder.path())).unwrap()).err().unwrap());
    assert!(error.contains("special tokens are not in its vocabulary"), "{error}");
}

#[test]
fn the_reward_is_how_much_of_the_prompt_is_in_the_description() {
    let tokenizer = Source::open(&text(fixture("tiny-sd15/model"))).unwrap().sub("tokenizer");
    let tokenizer = Arc::new(ClipTokenizer::load(&tokenizer).unwrap());
    let scorer = BertScore::load(&text(fixture("bertscore/deberta")), Some(2)).unwrap();
    let prompts = ["a cat", "two dogs"].map(Prompt::from);
    let images = Tensor::stack(&[picture(0), picture(1)], 0).unwrap();
    let score = |config: VlmBertscoreConfig| -> Vec<f64> {
        let config = VlmBertscoreConfig {
            captioner: text(fixture("blip")),
            scorer: text(fixture("bertscore/deberta")),
            layers: Some(2),
            max_tokens: 11,
            ..config
        };
        let rewards = RewardsConfig { vlm_bertscore: Some(config), ..Default::default() };
        let rewards = Rewards::load(&rewards, &tokenizer).unwrap();
        rewards.scores(&images, &prompts).unwrap().into_iter().map(|scores| scores[0]).collect()
    };
    let of_captions: Vec<_> = captions()
        .iter()
        .zip(&prompts)
        .map(|(caption, prompt)| scorer.compare(caption, &format!("The image contains {prompt}")).unwrap())
        .collect();
    let recall: Vec<_> = of_captions.iter().map(|found| found.recall).collect();
    assert_eq!(score(VlmBertscoreConfig::default()), recall);
    let f1: Vec<_> = of_captions.iter().map(|found| found.f1).collect();
    assert_eq!(score(VlmBertscoreConfig { score: BertscorePart::F1, ..Default::default() }), f1);
    assert!(recall[0] != recall[1] && recall[0] != f1[0]);

    let server = Server::start(
        |_| Fault::None,
        |question| {
            let asked = question["messages"][0]["content"][0]["text"].as_str().unwrap();
            assert_eq!(asked, "Answer concisely: what is going on in this image?");
            json!({ "choices": [{ "message": { "content": "a dog on the beach" } }] }).to_string()
        },
    );
    let server = ServerConfig { url: server.url, ..Default::default() };
    let config = VlmBertscoreConfig {
        server: Some(server),
        model: "m".into(),
        reference: "{prompt}".into(),
        ..Default::default()
    };
    let expected = prompts.each_ref().map(|prompt| scorer.compare("a dog on the beach", &prompt.text).unwrap().recall);
    assert_eq!(score(config), expected);
}
