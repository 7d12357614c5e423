//! Scores of a vision-language model behind an OpenAI-compatible server (vLLM, llama.cpp, Ollama, ..): `[reward.vlm]` asks a
//! question of each picture, and its answer becomes a number.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::http::base64_pngs;
use super::server::Server;
use super::{Judge, Score, TapedImages};
use crate::config::{Prompt, ServerConfig, VlmAnswer, VlmConfig, shown};
use crate::ops::{Ledger, Number};

/// A model that answers questions of pictures.
pub(super) struct Chat {
    server: Server,
    model: String,
    max_tokens: usize,
}

impl Chat {
    pub fn new(server: &ServerConfig, model: &str, max_tokens: usize, key: &str) -> Result<Self> {
        Ok(Self { server: Server::new(server, key)?, model: model.to_owned(), max_tokens })
    }

    /// The answer to each image's question.
    ///
    /// # Errors
    /// The server gives none, or something else than an answer of a chat.
    pub fn answers(&self, images: &TapedImages, questions: &[String]) -> Result<Vec<String>> {
        let pictures = base64_pngs(images)?;
        self.server.ask_all(pictures.len(), |number| {
            let url = format!("data:image/png;base64,{}", pictures[number]);
            let content = json!([
                { "type": "text", "text": questions[number] },
                { "type": "image_url", "image_url": { "url": url } },
            ]);
            let answer = self.server.ask(&json!({
                "model": self.model,
                "messages": [{ "role": "user", "content": content }],
                "max_tokens": self.max_tokens,
                "temperature": 0,
            }))?;
            text_of(&answer).with_context(|| self.server.name())
        })
    }
}

/// The text of a completion, without what the model thought before.
fn text_of(answer: &str) -> Result<String> {
    #[derive(Deserialize)]
    struct Completion {
        choices: Vec<Choice>,
    }
    #[derive(Deserialize)]
    struct Choice {
        message: Message,
    }
    #[derive(Deserialize)]
    struct Message {
        content: Option<String>,
    }
    let start = || shown(answer.chars().take(300).collect::<String>());
    let completion: Completion = serde_json::from_str(answer)
        .with_context(|| format!("it answered `{}`, which is no completion of a chat", start()))?;
    let Some(Choice { message: Message { content: Some(text) } }) = completion.choices.into_iter().next() else {
        bail!("its completion `{}` has no text", start());
    };
    Ok(text.rsplit("</think>").next().unwrap_or_default().trim().to_owned())
}

struct Vlm {
    chat: Chat,
    question: String,
    answer: VlmAnswer,
    words: Vec<String>,
    otherwise: Option<f64>,
}

/// The score that the config describes.
pub(super) fn vlm(config: &VlmConfig) -> Result<Judge> {
    Ok(Judge::Score(Box::new(Vlm {
        chat: Chat::new(&config.server, &config.model, config.max_tokens, "reward.vlm.server")?,
        question: config.question.clone(),
        answer: config.answer,
        words: config.words.clone(),
        otherwise: config.otherwise,
    })))
}

impl Score for Vlm {
    fn scores(&self, images: &TapedImages, prompts: &[Prompt], _: &mut Ledger) -> Result<Vec<Number>> {
        let questions = prompts.iter().map(|prompt| fill(&self.question, prompt)).collect::<Result<Vec<_>>>()?;
        let answers = self.chat.answers(images, &questions)?;
        let score = |(answer, prompt): (&String, &Prompt)| Ok(self.score(answer, prompt)?.into());
        answers.iter().zip(prompts).map(score).collect()
    }

    fn is_elsewhere(&self) -> bool {
        true
    }
}

impl Vlm {
    fn score(&self, answer: &str, prompt: &Prompt) -> Result<f64> {
        let (score, wanted) = match self.answer {
            VlmAnswer::Number => (number(answer), "a number"),
            VlmAnswer::YesNo => (yes_or_no(answer), "yes or no"),
            VlmAnswer::Words => {
                let words = self.words.iter().map(|words| fill(words, prompt)).collect::<Result<Vec<_>>>()?;
                (Some(share(answer, &words)), "words")
            }
        };
        score.or(self.otherwise).with_context(|| {
            format!(
                "{}'s answer for `{prompt}` has not {wanted} in it: `{}`; word the question so that it has, or say what such an answer \
                 counts with `reward.vlm.otherwise`",
                self.chat.model,
                shown(answer)
            )
        })
    }
}

/// A text with `{prompt}` and the prompt's fields, `{count}`, filled in.
///
/// # Errors
/// The prompt has no such field.
pub(super) fn fill(text: &str, prompt: &Prompt) -> Result<String> {
    let (mut filled, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once('{') {
        filled += before;
        let name = after
            .split_once('}')
            .filter(|(name, _)| !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "_-".contains(c)));
        let Some((name, behind)) = name else {
            filled.push('{');
            rest = after;
            continue;
        };
        match prompt.fields.get(name) {
            _ if name == "prompt" => filled += &prompt.text,
            Some(Json::String(field)) => filled += field,
            Some(field) => filled += &field.to_string(),
            None => bail!(
                "`{}` asks for `{name}`, and the prompt `{prompt}` has no such field: it needs a file of prompts with fields (`prompts.file`)",
                shown(text)
            ),
        }
        rest = behind;
    }
    Ok(filled + rest)
}

/// The first number in a text.
fn number(text: &str) -> Option<f64> {
    let starts = text.char_indices().filter(|(_, c)| c.is_ascii_digit()).map(|(at, _)| at);
    let start = starts.min()?;
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let mut end = start + digits(&text[start..]);
    if let Some(fraction) = text[end..].strip_prefix('.') {
        end += match digits(fraction) {
            0 => 0,
            digits => 1 + digits,
        };
    }
    let before = text[..start].strip_suffix(['-', '\u{2212}']);
    let is_negative = before.is_some_and(|before| !before.ends_with(char::is_alphanumeric));
    let value: f64 = text[start..end].parse().ok()?;
    Some(if is_negative { -value } else { value })
}

/// 1 for yes, 0 for no, whichever comes first.
fn yes_or_no(text: &str) -> Option<f64> {
    words(text).iter().find_map(|word| match &**word {
        "yes" => Some(1.0),
        "no" => Some(0.0),
        _ => None,
    })
}

/// The share of the words that occur in a text; `two|2` is either.
fn share(text: &str, wanted: &[String]) -> f64 {
    let text = words(text);
    let occurs = |phrase: &str| {
        let phrase = words(phrase);
        !phrase.is_empty() && text.windows(phrase.len()).any(|window| window == phrase)
    };
    let found = wanted.iter().filter(|words| words.split('|').any(occurs)).count();
    found as f64 / wanted.len().max(1) as f64
}

/// In lower case, without what is between them.
fn words(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '\'');
    words.filter(|word| !word.is_empty()).map(str::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt() -> Prompt {
        let fields = [("count", json!(2)), ("object", json!("red fox")), ("a-b", json!(true))];
        let fields = fields.map(|(name, value)| (name.to_owned(), value)).into_iter().collect();
        Prompt { text: "two {foxes}".into(), fields }
    }

    #[test]
    fn questions_have_the_prompt_and_its_fields() {
        for (text, expected) in [
            ("Is this {prompt}?", "Is this two {foxes}?"),
            ("{count} of {object}, {a-b}", "2 of red fox, true"),
            ("{\"x\": {}} { count } {", "{\"x\": {}} { count } {"),
        ] {
            assert_eq!(fill(text, &prompt()).unwrap(), expected);
        }
        let error = fill("How many {animal}s?", &prompt()).unwrap_err().to_string();
        assert!(error.contains("asks for `animal`, and the prompt `two {foxes}` has no such field"), "{error}");
    }

    #[test]
    fn answers_become_numbers() {
        for (text, expected) in [
            ("7", Some(7.0)),
            ("**Score: 7.5/10.**", Some(7.5)),
            ("about -0.25, I think", Some(-0.25)),
            ("CLIP-4 gives \u{2212}3.", Some(4.0)),
            ("a \u{2212}3.", Some(-3.0)),
            ("3.", Some(3.0)),
            ("none", None),
            ("", None),
        ] {
            assert_eq!(number(text), expected, "{text}");
        }
        for (text, expected) in [
            ("Yes.", Some(1.0)),
            ("**no**, it does not; yes", Some(0.0)),
            ("I know nothing", None),
            ("The answer is: YES", Some(1.0)),
        ] {
            assert_eq!(yes_or_no(text), expected, "{text}");
        }
        let share =
            |text: &str, words: &[&str]| share(text, &words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>());
        assert_eq!(share("There are TWO red foxes.", &["two|2", "red foxes", "fox", "snow"]), 0.5);
        assert_eq!(share("2 dogs", &["two|2"]), 1.0);
        assert_eq!(share("sixx", &["six"]), 0.0);
    }

    #[test]
    fn the_text_of_a_completion_is_found_and_other_answers_are_shown() {
        let answer = |content: &str| {
            format!(r#"{{"id": 1, "choices": [{{"message": {{"role": "assistant", "content": {content}}}}}]}}"#)
        };
        assert_eq!(text_of(&answer(r#"" 7 ""#)).unwrap(), "7");
        assert_eq!(text_of(&answer(r#""<think>1 or 2?\n</think>\n\n3""#)).unwrap(), "3");
        for (answer, expected) in [
            (answer("null"), "has no text"),
            (r#"{"choices": []}"#.into(), "has no text"),
            (r#"{"scores": [1]}"#.into(), "`{\"scores\": [1]}`, which is no completion"),
            ("<html>".into(), "`<html>`, which is no completion"),
        ] {
            let error = format!("{:#}", text_of(&answer).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }
}
