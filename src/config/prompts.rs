//! `[prompts]`: what the images are of.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

/// The prompt lists inside the program, by the name that `prompts.builtin` gives them.
const BUILTIN: [(&str, &str); 1] = [("animals", include_str!("../../assets/prompts/animals.txt"))];

/// The builtin that stands in when a config names no prompts.
const DEFAULT_BUILTIN: &str = "animals";

/// What an image is asked to show.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Prompt {
    /// What the text encoder reads.
    #[serde(rename = "prompt")]
    pub text: String,
    /// What a score may read beside it: a number, an object, an answer.
    #[serde(flatten)]
    pub fields: Map<String, Json>,
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self { text: text.to_owned(), fields: Map::new() }
    }
}

super::table! {
    /// `[prompts]`: at most one of the three; with none, `builtin = "animals"`.
    pub struct PromptsConfig {
        /// The prompts themselves; at least one.
        list: Option<Vec<String>> = None,
        /// A text file with one prompt per line; empty lines and lines that start with `#` are skipped. Or a `.jsonl` file
        /// with one object per line: `prompt`, and other fields for scores that read them.
        file: Option<PathBuf> = None,
        /// A list inside the program: `animals`, the 45 simple animals of DDPO.
        builtin: Option<String> = None,
    }
}

impl PromptsConfig {
    /// The prompts, in order; at least one.
    pub fn load(&self) -> Result<Vec<Prompt>> {
        self.validate()?;
        if let Some(list) = &self.list {
            return Ok(list.iter().map(|text| Prompt::from(text.as_str())).collect());
        }
        if let Some(path) = &self.file {
            return read(path);
        }
        Ok(prompts_of(builtin(self.builtin.as_deref().unwrap_or(DEFAULT_BUILTIN))?))
    }

    /// Says the default aloud, so that a saved config names its prompts.
    pub(super) fn resolve(&mut self) {
        if self.list.is_none() && self.file.is_none() && self.builtin.is_none() {
            self.builtin = Some(DEFAULT_BUILTIN.to_string());
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        let given = [
            self.list.as_ref().map(|_| "prompts.list"),
            self.file.as_ref().map(|_| "prompts.file"),
            self.builtin.as_ref().map(|_| "prompts.builtin"),
        ];
        let given: Vec<&str> = given.into_iter().flatten().collect();
        ensure!(given.len() <= 1, "{} are both given: keep one source of prompts", given.join(" and "));
        if let Some(list) = &self.list {
            ensure!(!list.is_empty(), "prompts.list is empty: give at least one prompt");
        }
        if let Some(name) = &self.builtin {
            builtin(name)?;
        }
        Ok(())
    }
}

fn builtin(name: &str) -> Result<&'static str> {
    match BUILTIN.iter().find(|(known, _)| *known == name) {
        Some((_, text)) => Ok(text),
        None => {
            let known = BUILTIN.map(|(known, _)| format!("\"{known}\"")).join(", ");
            bail!(
                "prompts.builtin = \"{name}\" is not a list in the program: there is {known}; for your own use prompts.file"
            )
        }
    }
}

fn read(path: &Path) -> Result<Vec<Prompt>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("reading the prompts from {} (prompts.file)", path.display()))?;
    let is_json = path.extension().is_some_and(|extension| extension == "jsonl");
    let prompts = if is_json { records(&text, path)? } else { prompts_of(&text) };
    ensure!(
        !prompts.is_empty(),
        "{} (prompts.file) has no prompt: put one on each line; empty lines and lines that start with # are skipped",
        path.display()
    );
    Ok(prompts)
}

/// The records of a JSON-lines file.
fn records(text: &str, path: &Path) -> Result<Vec<Prompt>> {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let record = |(number, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| {
            let example = r#"{"prompt": "three cats", "count": 3}"#;
            format!("line {number} of {} (prompts.file) is no record such as {example}", path.display())
        })
    };
    lines.map(record).collect()
}

fn prompts_of(text: &str) -> Vec<Prompt> {
    let lines = text.lines().map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(Prompt::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_animals_are_45_and_distinct() {
        let animals = PromptsConfig::default().load().unwrap();
        let mut animals: Vec<&str> = animals.iter().map(|prompt| prompt.text.as_str()).collect();
        assert_eq!((animals.len(), animals[0], animals[44]), (45, "cat", "kangaroo"));
        animals.sort();
        animals.dedup();
        assert_eq!(animals.len(), 45);
    }

    #[test]
    fn a_file_gives_its_lines_without_comments() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.txt");
        std::fs::write(&path, "# mine\na cat\r\n\n  a dog  \n").unwrap();
        let prompts = PromptsConfig { file: Some(path.clone()), ..Default::default() };
        assert_eq!(prompts.load().unwrap(), ["a cat", "a dog"].map(Prompt::from));
        std::fs::write(&path, "# nothing\n\n").unwrap();
        assert!(prompts.load().unwrap_err().to_string().contains("prompts.txt (prompts.file) has no prompt"));
        std::fs::remove_file(&path).unwrap();
        assert!(prompts.load().unwrap_err().to_string().starts_with("reading the prompts from "));
    }

    #[test]
    fn a_file_of_records_gives_their_fields_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.jsonl");
        let prompts = PromptsConfig { file: Some(path.clone()), ..Default::default() };
        std::fs::write(
            &path,
            "{\"prompt\": \"# three cats\", \"count\": 3, \"of\": [\"cat\"]}\r\n\n{\"prompt\":\"a dog\"}",
        )
        .unwrap();
        let read = prompts.load().unwrap();
        assert_eq!(
            (read[0].text.as_str(), &read[0].fields["count"], read[0].fields.len()),
            ("# three cats", &3.into(), 2)
        );
        assert_eq!(read[1], Prompt::from("a dog"));
        for (bad, cause) in [("{\"count\": 3}", "missing field `prompt`"), ("a dog", "expected"), ("[1]", "invalid")] {
            std::fs::write(&path, format!("{{\"prompt\": \"a cat\"}}\n{bad}\n")).unwrap();
            let error = format!("{:#}", prompts.load().unwrap_err());
            assert!(
                error.contains("line 2 of ") && error.contains("prompts.jsonl") && error.contains(cause),
                "{error}"
            );
        }
    }

    #[test]
    fn one_source_that_exists() {
        let error = |prompts: PromptsConfig| prompts.load().unwrap_err().to_string();
        let list = Some(vec!["a cat".to_string()]);
        let both = PromptsConfig { list, builtin: Some("animals".into()), ..Default::default() };
        assert_eq!(error(both), "prompts.list and prompts.builtin are both given: keep one source of prompts");
        let empty = PromptsConfig { list: Some(Vec::new()), ..Default::default() };
        assert_eq!(error(empty), "prompts.list is empty: give at least one prompt");
        let unknown = PromptsConfig { builtin: Some("birds".into()), ..Default::default() };
        assert!(
            error(unknown)
                .starts_with("prompts.builtin = \"birds\" is not a list in the program: there is \"animals\"")
        );
    }
}
