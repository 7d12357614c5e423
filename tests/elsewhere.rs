//! Scores and gradients of programs and servers, right and wrong ones.
#![cfg(unix)]

mod support;

use std::fs::File;
use std::io::{Write, stdin};
use std::sync::Arc;

use alignprop::config::{
    AestheticConfig, CommandConfig, HttpConfig, Prompt, RewardsConfig, ServerConfig, VlmAnswer, VlmConfig,
};
use alignprop::diffusion::{Noise, Stream};
use alignprop::models::Source;
use alignprop::models::tokenizer::ClipTokenizer;
use alignprop::nn::Tape;
use alignprop::ops::Ledger;
use alignprop::rewards::{Judge, Rewards, TapedImages};
use anyhow::Result;
use candle_core::{Device, Tensor};
use serde_json::{Value as Json, json};
use support::server::{Fault, Server};
use support::{Experiment, distance, fixture, norm, numbers, text};

fn tokenizer() -> Arc<ClipTokenizer> {
    let source = Source::open(&text(fixture("tiny-sd15/model"))).unwrap();
    Arc::new(ClipTokenizer::load(&source.sub("tokenizer")).unwrap())
}

fn aesthetic() -> RewardsConfig {
    let clip = text(fixture("tiny-sd15/clip"));
    let head = text(fixture("tiny-sd15/aesthetic_head.safetensors"));
    RewardsConfig { aesthetic: Some(AestheticConfig { clip, head, ..Default::default() }), ..Default::default() }
}

/// Images (B, 3, 40, 32) of blocks.
fn images(batch: u64) -> Tensor {
    let blocks = Noise::new(1).normal_batch(Stream::Latents, 0, 0..batch, (3, 10, 8)).unwrap();
    (blocks.upsample_nearest2d(40, 32).unwrap() * 0.4).unwrap()
}

/// What starts [`the_program`] with a fault: this test's own binary, whose stdout is the test harness's, so answers go to file
/// 3.
fn program(fault: &str) -> Vec<String> {
    let shell = "FAULT=\"$1\" exec \"$0\" --exact the_program --ignored --nocapture 3>&1 1>&2";
    let binary = text(std::env::current_exe().unwrap());
    [&["sh", "-c", shell][..], &[&binary, fault]].concat().iter().map(|word| (*word).to_owned()).collect()
}

/// A reward program as a user would write it: the aesthetic reward of this crate, or with a fault.
#[test]
#[ignore = "needs a test that starts it as its program"]
fn the_program() {
    let Ok(fault) = std::env::var("FAULT") else { return };
    let rewards = Rewards::load(&aesthetic(), &tokenizer()).unwrap();
    let Some(Judge::Differentiable(reward)) = rewards.iter().next().map(|r| &r.judge) else { panic!() };
    let mut out = File::options().write(true).open("/dev/fd/3").unwrap();
    for (number, line) in stdin().lines().enumerate() {
        let question: Json = serde_json::from_str(&line.unwrap()).unwrap();
        let prompts = question["prompts"].as_array().unwrap().len();
        let answer = match &question["images"] {
            Json::String(file) => {
                let images = candle_core::safetensors::load(file, &Device::Cpu).unwrap()["images"].clone();
                let (tape, images) = (Tape::new(), images.affine(2.0, -1.0).unwrap());
                let leaf = tape.leaf(&images);
                let scores = reward.on_tape(&TapedImages::new(leaf.clone()), &[]).unwrap();
                if let Some(place) = question["gradients"].as_str() {
                    let ones = scores.tensor().ones_like().unwrap();
                    let gradients = tape.backward(&[(&scores, &ones)]).unwrap().take(&leaf, "images").unwrap();
                    let gradients = match &*fault {
                        "negative" => gradients.affine(-2.0, 0.0),
                        "twice" => gradients.affine(4.0, 0.0),
                        "of another shape" => gradients.narrow(2, 1, 39),
                        "not a number" => gradients.affine(f64::NAN, 0.0),
                        _ => gradients.affine(2.0, 0.0),
                    };
                    let name = if fault == "of another name" { "grads" } else { "gradients" };
                    if fault != "none" {
                        candle_core::safetensors::save(&[(name, gradients.unwrap())].into(), place).unwrap();
                    }
                }
                numbers(scores.tensor()).into_iter().map(f64::from).collect::<Vec<_>>()
            }
            // the mean of the first picture's red, and the prompt's count
            Json::Array(files) => {
                let score = |(i, file): (usize, &Json)| {
                    let picture = image::open(file.as_str().unwrap()).unwrap().to_rgb8();
                    let red = picture.pixels().map(|p| f64::from(p.0[0])).sum::<f64>() / 255.0;
                    let count = question["fields"][i]["count"].as_f64().unwrap_or(0.0);
                    red / f64::from(picture.width() * picture.height()) + 10.0 * count
                };
                files.iter().enumerate().map(score).collect()
            }
            _ => panic!("{question}"),
        };
        let whole = json!({ "scores": answer }).to_string();
        match &*fault {
            "slow" => std::thread::sleep(std::time::Duration::from_secs(60)),
            "dead" => panic!("out of memory, for example"),
            "dead in the end" if number == 3 => panic!("out of memory, for example"),
            "half" => {
                write!(out, "{}", &whole[..whole.len() / 2]).unwrap();
                return;
            }
            _ => {}
        }
        let line = match &*fault {
            "wrong" => "Loading checkpoint shards: 100%".to_owned(),
            "too few" => json!({ "scores": &answer[..prompts - 1] }).to_string(),
            "NaN" => whole.replacen(&answer[0].to_string(), "NaN", 1),
            "error" => json!({ "error": "no such picture" }).to_string(),
            _ => whole,
        };
        writeln!(out, "{line}").unwrap();
    }
}

fn of(command: CommandConfig) -> Rewards {
    let config = RewardsConfig { command: Some(command), ..Default::default() };
    Rewards::load(&config, &tokenizer()).unwrap()
}

fn faulty(fault: &str, gradient: bool) -> CommandConfig {
    CommandConfig { program: program(fault), gradient, timeout: 60.0, restarts: 0, ..Default::default() }
}

/// Scores of two images, and the gradient of their sum.
fn judged(rewards: &Rewards) -> Result<(Vec<f64>, Vec<f32>)> {
    let judge = |ledger: &mut Ledger| {
        let judged = rewards.judge(&images(2), &["a cat".into(), "a dog".into()], ledger)?;
        Ok((judged.scores().to_vec(), numbers(&judged.pull(1.0)?)))
    };
    let ((scores, gradient), readings) = Ledger::around(judge)?;
    Ok((scores.iter().map(|scores| scores.get(&readings)[0]).collect(), gradient))
}

#[test]
fn a_program_scores_pictures_by_their_prompts_and_fields() {
    let count = |text: &str, count: u64| Prompt {
        text: text.to_owned(),
        fields: serde_json::Map::from_iter([("count".to_owned(), count.into())]),
    };
    let rewards = of(faulty("", false));
    let scores = rewards.scores(&images(2), &[count("two cats", 2), "a \"dog\"\n".into()]).unwrap();
    let red = |row: usize| {
        let pixels = numbers(&images(2).get(row).unwrap().get(0).unwrap());
        let sum = pixels.iter().map(|x| f64::from((((x * 0.5 + 0.5).clamp(0.0, 1.0)) * 255.0).round())).sum::<f64>();
        sum / 255.0 / pixels.len() as f64
    };
    assert!((scores[0][0] - 20.0 - red(0)).abs() < 1e-6 && (scores[1][0] - red(1)).abs() < 1e-6, "{scores:?}");
    // it cannot be trained as it is, and says what to do
    let message = rewards.judge(&images(1), &["a cat".into()], &mut Ledger::default()).err().unwrap().to_string();
    assert!(message.contains("`command` has no gradient"), "{message}");
}

#[test]
fn a_program_with_gradients_is_the_reward_that_it_computes() {
    let builtin = Rewards::load(&aesthetic(), &tokenizer()).unwrap();
    let (scores, gradient) = judged(&of(faulty("", true))).unwrap();
    let (expected, of_builtin) = judged(&builtin).unwrap();
    for (score, expected) in scores.iter().zip(&expected) {
        assert!((score - expected).abs() < 1e-5, "{scores:?} for {expected:?}");
    }
    let apart: f32 = gradient.iter().zip(&of_builtin).map(|(x, y)| (x - y).powi(2)).sum();
    let size: f32 = of_builtin.iter().map(|x| x.powi(2)).sum();
    assert!(size > 0.0 && (apart / size).sqrt() < 1e-5, "{apart} of {size}");
    // without its gradient it is the same score
    let scored = of(faulty("", true)).scores(&images(2), &["a cat".into(), "a dog".into()]).unwrap();
    assert!((scored[1][0] - scores[1]).abs() < 1e-6, "{scored:?} for {scores:?}");
}

#[test]
fn a_run_with_a_program_trains_as_one_with_the_reward_that_it_computes() {
    let words: Vec<String> = program("dead in the end").iter().map(|word| format!("'''{word}'''")).collect();
    let command = format!("reward={{ command = {{ program = [{}], gradient = true, target = 2 }} }}", words.join(", "));
    // a death in the middle is no matter: the program is started again
    let trained = Experiment::trained(&[&command]);
    let builtin = Experiment::trained(&["reward.aesthetic.target=2"]);
    assert!(norm(&builtin.first_gradients()) > 0.0);
    let apart = distance(&trained.first_gradients(), &builtin.first_gradients());
    assert!(apart < 1e-4, "{apart}");
    let apart = distance(&trained.adapters(2), &builtin.adapters(2));
    assert!(apart < 1e-4, "{apart}");
    let [found, expected] =
        [trained.metric("reward/command"), builtin.metric("reward/aesthetic")].map(|metric| metric[1]);
    assert!((found - expected).abs() < 1e-5, "{found} for {expected}");
}

#[test]
fn faults_of_a_program_are_told_apart() {
    for (fault, gradient, parts) in [
        ("dead", false, ["gave no answer and ended", "its stderr ends with", "out of memory, for example"]),
        ("half", false, ["{\"sc", "has no end", "exit status: 0"]),
        (
            "wrong",
            false,
            ["it answered `Loading checkpoint shards: 100%`", "{\"scores\": [..]} was expected", "the program `sh -c"],
        ),
        ("too few", false, ["it gave 1 scores for 2 pictures", "the program", "sh"]),
        ("error", false, ["it answered with an error: no such picture", "the program", "sh"]),
        ("NaN", false, ["the reward `command` gave NaN", "", ""]),
        (
            "negative",
            true,
            [
                "returns gradients that are not those of its scores",
                "by the gradient it should be",
                "check_gradient = false",
            ],
        ),
        ("twice", true, ["returns gradients that are not those of its scores", "by the gradient it should be", ""]),
        ("none", true, ["left no gradients of its scores", "there is no file", "-gradients.safetensors"]),
        (
            "of another shape",
            true,
            ["left no gradients of its scores", "has shape [1, 3, 39, 32], expected [1, 3, 40, 32]", ""],
        ),
        ("of another name", true, ["left no gradients of its scores", "the nearest key is `grads`", ""]),
    ] {
        let rewards = of(faulty(fault, gradient));
        let error = match gradient {
            true => judged(&rewards).err(),
            false => rewards.scores(&images(2), &["a cat".into(), "a dog".into()]).err(),
        };
        let error = format!("{:#}", error.unwrap_or_else(|| panic!("{fault}")));
        for part in parts {
            assert!(error.contains(part), "{fault}: {error}");
        }
    }
    let slow = CommandConfig { start_timeout: 2.0, ..faulty("slow", false) };
    let error = of(slow).scores(&images(1), &["a cat".into()]).unwrap_err().to_string();
    assert!(error.contains("gave no answer within 2 s (`start_timeout`)"), "{error}");
    // the check can be left out, and then the gradient counts as it is
    let (_, gradient) = judged(&of(CommandConfig { check_gradient: false, ..faulty("twice", true) })).unwrap();
    let (_, of_builtin) = judged(&Rewards::load(&aesthetic(), &tokenizer()).unwrap()).unwrap();
    let largest = |values: &[f32]| values.iter().fold(0f32, |most, x| most.max(x.abs()));
    assert!((largest(&gradient) / largest(&of_builtin) - 2.0).abs() < 1e-3);
    // a gradient that is not a number is for the step to find, which can be skipped
    let (_, gradient) = judged(&of(faulty("not a number", true))).unwrap();
    assert!(gradient.iter().all(|x| x.is_nan()));
}

fn prompts(count: usize) -> Vec<Prompt> {
    let prompt = |number: usize| Prompt {
        text: format!("picture {number}"),
        fields: serde_json::Map::from_iter([("count".to_owned(), number.into())]),
    };
    (0..count).map(prompt).collect()
}

/// Scores a picture as its prompt's `count`, and looks whether it is a PNG.
fn counts(question: &Json) -> String {
    let pictures = question["images"].as_array().unwrap();
    assert!(pictures.iter().all(|png| png.as_str().unwrap().starts_with("iVBORw0KGgo")));
    let fields = question["fields"].as_array().unwrap().iter();
    json!({ "scores": fields.map(|fields| fields["count"].clone()).collect::<Vec<_>>() }).to_string()
}

fn on(server: &Server, change: impl FnOnce(&mut HttpConfig)) -> Rewards {
    let mut http = HttpConfig { batch: 2, ..Default::default() };
    http.server = ServerConfig { url: server.url.clone(), timeout: 60.0, ..Default::default() };
    change(&mut http);
    Rewards::load(&RewardsConfig { http: Some(http), ..Default::default() }, &tokenizer()).unwrap()
}

/// The scores of seven pictures.
fn seven(rewards: &Rewards) -> Result<Vec<f64>> {
    let images = images(1).repeat((7, 1, 1, 1)).unwrap();
    Ok(rewards.scores(&images, &prompts(7))?.into_iter().map(|scores| scores[0]).collect())
}

const SEVEN: [f64; 7] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0];

#[test]
fn a_server_scores_pictures_some_at_a_time_and_in_order() {
    let server = Server::start(|number| Fault::Slow(if number == 0 { 2000 } else { 1000 }), counts);
    assert_eq!(seven(&on(&server, |http| http.server.concurrency = 3)).unwrap(), SEVEN);
    assert_eq!((server.count(), server.at_once.load(std::sync::atomic::Ordering::SeqCst)), (4, 3));
    let asked = server.asked.lock().unwrap();
    let longest = asked.iter().map(|(_, question)| question["images"].as_array().unwrap().len()).max();
    assert_eq!(longest, Some(2));
    assert!(!asked[0].0.contains("authorization"), "{}", asked[0].0);
}

#[test]
fn faults_that_may_pass_are_tried_again() {
    for fault in
        [Fault::Dead, Fault::Half, Fault::HalfUnannounced, Fault::Slow(8000), Fault::Status(503), Fault::Status(429)]
    {
        let server = Server::start(move |number| if number < 2 { fault } else { Fault::None }, counts);
        let timeout = if matches!(fault, Fault::Slow(_)) { 2.0 } else { 60.0 };
        let patient = |http: &mut HttpConfig| (http.server.timeout, http.server.concurrency) = (timeout, 1);
        assert_eq!(seven(&on(&server, patient)).unwrap(), SEVEN, "{fault:?}");
        assert_eq!(server.count(), 4 + 2, "{fault:?}");
    }
}

#[test]
fn faults_that_stay_are_errors_that_say_what_came() {
    for (fault, asked, expected) in [
        (Fault::Dead, 2, "cannot be asked"),
        (Fault::Half, 2, "cannot be asked"),
        (Fault::HalfUnannounced, 2, "answered with half of an answer: `{\"scor"),
        (Fault::Slow(8000), 2, "gave no answer in time (`timeout`)"),
        (Fault::Status(500), 2, "answered with status 500"),
        (Fault::Status(404), 1, "answered with status 404"),
    ] {
        let server = Server::start(move |_| fault, counts);
        let timeout = if matches!(fault, Fault::Slow(_)) { 0.5 } else { 60.0 };
        let hasty = |http: &mut HttpConfig| (http.server.timeout, http.server.retries) = (timeout, 1);
        let error = on(&server, hasty).scores(&images(1), &prompts(1)).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(&server.url), "{fault:?}: {error}");
        assert_eq!(server.count(), asked, "{fault:?}");
        assert_eq!(error.contains("(asked 2 times)"), asked == 2, "{error}");
    }
    for (answer, expected) in [
        ("<html>no</html>", "it answered `<html>no</html>`, where {\"scores\": [..]} was expected"),
        (r#"{"scores": [1]}"#, "it gave 1 scores for 2 pictures"),
        (r#"{"scores": [1, NaN]}"#, "the reward `http` gave NaN"),
        (r#"{"error": "no"}"#, "it answered with an error: no"),
    ] {
        let server = Server::start(|_| Fault::None, |_| answer.to_owned());
        let error = format!("{:#}", on(&server, |_| ()).scores(&images(2), &prompts(2)).unwrap_err());
        assert!(error.contains(expected), "{error}");
        assert_eq!(server.count(), 1);
    }
    let nobody = |http: &mut HttpConfig| {
        http.server.url = "http://127.0.0.1:1/".to_owned();
        http.server.retries = 0;
    };
    let server = Server::start(|_| Fault::None, counts);
    let error = on(&server, nobody).scores(&images(1), &prompts(1)).unwrap_err().to_string();
    assert!(error.starts_with("http://127.0.0.1:1/ cannot be asked"), "{error}");
    let mut config = HttpConfig::default();
    for (url, key, expected) in [
        ("no address", None, "reward.http.server.url = \"no address\": give the address"),
        (
            "http://a/",
            Some("NO_SUCH_VARIABLE_HERE"),
            "reward.http.server.key_env names the variable NO_SUCH_VARIABLE_HERE",
        ),
    ] {
        config.server = ServerConfig { url: url.to_owned(), key_env: key.map(str::to_owned), ..Default::default() };
        let rewards = RewardsConfig { http: Some(config.clone()), ..Default::default() };
        let error = format!("{:#}", Rewards::load(&rewards, &tokenizer()).err().unwrap());
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_vision_language_model_is_asked_and_its_answers_become_scores() {
    let answer = |question: &Json| {
        let content = &question["messages"][0]["content"];
        let text = content[0]["text"].as_str().unwrap();
        let image = content[1]["image_url"]["url"].as_str().unwrap();
        assert!(image.starts_with("data:image/png;base64,iVBORw0KGgo") && question["model"] == "a-model");
        let said = match text {
            "How many in \"picture 1\"?" => "There are 3 of them.",
            "Is this picture 1, with 1?" => "**Yes**, it is.",
            "What is it?" => "A picture of one cat",
            _ => "I cannot tell.",
        };
        json!({ "choices": [{ "message": { "role": "assistant", "content": said } }] }).to_string()
    };
    let server = Server::start(|_| Fault::None, answer);
    let score = |vlm: VlmConfig| -> Result<f64> {
        let server = ServerConfig { url: server.url.clone(), ..Default::default() };
        let vlm = VlmConfig { server, model: "a-model".into(), ..vlm };
        let rewards = Rewards::load(&RewardsConfig { vlm: Some(vlm), ..Default::default() }, &tokenizer()).unwrap();
        Ok(rewards.scores(&images(1), &prompts(2)[1..])?[0][0])
    };
    let asking = |question: &str, answer| VlmConfig { question: question.into(), answer, ..Default::default() };
    assert_eq!(score(asking("How many in \"{prompt}\"?", VlmAnswer::Number)).unwrap(), 3.0);
    assert_eq!(score(asking("Is this {prompt}, with {count}?", VlmAnswer::YesNo)).unwrap(), 1.0);
    let words = ["{count}|one", "dog", "a picture", "cat"].map(str::to_owned).to_vec();
    assert_eq!(score(VlmConfig { words, ..asking("What is it?", VlmAnswer::Words) }).unwrap(), 0.75);
    // without an answer
    let lost = asking("Is it so?", VlmAnswer::YesNo);
    let error = score(lost.clone()).unwrap_err().to_string();
    assert!(error.contains("a-model's answer for `picture 1` has not yes or no in it: `I cannot tell.`"), "{error}");
    assert_eq!(score(VlmConfig { otherwise: Some(0.5), ..lost }).unwrap(), 0.5);
    let error = score(asking("How many {animal}s?", VlmAnswer::Number)).unwrap_err().to_string();
    assert!(error.contains("no such field"), "{error}");
}

/// The example of docs/rewards.md on the CLIP of a built-in reward.
#[test]
#[ignore = "needs Python with torch, torchvision, transformers and safetensors, as `python3` or as ALIGNPROP_PYTHON"]
fn the_example_in_pytorch_gives_the_gradients_of_the_reward_that_is_built_in() {
    let python = std::env::var("ALIGNPROP_PYTHON").unwrap_or("python3".into());
    let (clip, tokenizer) = (text(fixture("tiny-sd15/clip")), text(fixture("tiny-sd15/model/tokenizer")));
    let program = format!("['{python}', 'docs/rewards/reward.py', '{clip}', '{tokenizer}']");
    let of_program = format!("reward={{ command = {{ program = {program}, gradient = true }} }}");
    let built_in = format!("reward={{ clip-score = {{ model = '{clip}', tokenizer = '{tokenizer}' }} }}");
    let [of_program, built_in] = [of_program, built_in].map(|reward| Experiment::trained(&[&reward]));
    let apart = distance(&of_program.first_gradients(), &built_in.first_gradients());
    assert!(norm(&built_in.first_gradients()) > 0.0 && apart < 1e-4, "{apart}");
    let apart = distance(&of_program.adapters(2), &built_in.adapters(2));
    assert!(apart < 1e-4, "{apart}");
}
