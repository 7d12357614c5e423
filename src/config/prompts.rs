//! `[prompts]`: what the images are of.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::prompt_file::{self, Found};
use super::text::shown;

/// What an image is asked to show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// What the model is given.
    pub text: String,
    /// What a score may read beside the text: a number of things, an object, an answer. From a file of objects or a table.
    pub fields: Map<String, Json>,
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self { text, fields: Map::new() }
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl AsRef<str> for Prompt {
    fn as_ref(&self) -> &str {
        &self.text
    }
}

/// As a message or a table shows it.
impl std::fmt::Display for Prompt {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&shown(&self.text))
    }
}

/// The prompt lists inside the program, by the name that `prompts.builtin` gives them.
const BUILTIN: [(&str, &str); 1] = [("animals", include_str!("../../assets/prompts/animals.txt"))];

/// The builtin that stands in when a config names no prompts.
const DEFAULT_BUILTIN: &str = "animals";

super::table! {
    /// `[prompts]`: at most one of the three; with none, `builtin = "animals"`.
    pub struct PromptsConfig {
        /// The prompts themselves; at least one.
        list: Option<Vec<String>> = None,
        /// A text file with one prompt per line; empty lines and lines that start with `#` are skipped. Or JSON lines
        /// (`.jsonl`), a JSON list (`.json`) or a table with a heading (`.csv`, `.tsv`): the text is the key or column
        /// `prompt` (or `text`, or `caption`), any others are fields, which scores may read.
        file: Option<PathBuf> = None,
        /// A list inside the program: `animals`, the 45 simple animals of DDPO.
        builtin: Option<String> = None,
        /// The file in which a run keeps these prompts since it began; they count, whatever the others say now.
        #[serde(skip)]
        kept: Option<PathBuf> = None,
    }
}

impl PromptsConfig {
    /// The prompts, in order; at least one. Warns of what a file has that may not be meant, and of one that has changed under
    /// a run.
    ///
    /// # Errors
    /// There is more than one source, or it cannot be read or has no prompt.
    pub fn load(&self) -> Result<Vec<Prompt>> {
        self.validate()?;
        if let Some(kept) = &self.kept {
            return self.load_kept(kept);
        }
        let found = self.find()?;
        let file = self.file.as_deref().unwrap_or(Path::new("")).display();
        found.warnings.iter().for_each(|warning| note!("warning: {file}: {warning}"));
        Ok(found.prompts)
    }

    fn load_kept(&self, kept: &Path) -> Result<Vec<Prompt>> {
        let prompts = prompt_file::read(kept)?.prompts;
        // a source that is gone is no loss
        if self.find().is_ok_and(|now| now.prompts != prompts) {
            note!(
                "warning: {} has other prompts than when the run began, which are in {} and count; give the new ones by --set",
                self.file.as_deref().unwrap_or(Path::new("its config")).display(),
                kept.display()
            );
        }
        Ok(prompts)
    }

    fn find(&self) -> Result<Found> {
        if let Some(list) = &self.list {
            return Ok(Found { prompts: list.iter().cloned().map(Prompt::from).collect(), ..Default::default() });
        }
        if let Some(path) = &self.file {
            return prompt_file::read(path);
        }
        let lines = prompt_file::lines(builtin(self.builtin.as_deref().unwrap_or(DEFAULT_BUILTIN))?);
        Ok(Found { prompts: lines.prompts, ..Default::default() })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_animals_are_45_and_distinct() {
        let animals = PromptsConfig::default().load().unwrap();
        let mut animals: Vec<String> = animals.into_iter().map(|prompt| prompt.text).collect();
        assert_eq!((animals.len(), animals[0].as_str(), animals[44].as_str()), (45, "cat", "kangaroo"));
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
    fn json_lines_give_texts_with_fields() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("counts.jsonl");
        let prompts = PromptsConfig { file: Some(path.clone()), ..Default::default() };
        std::fs::write(
            &path,
            "{\"count\": 2, \"prompt\": \"two cats\", \"of\": [\"cat\"]}\n\n{\"prompt\": \"# a dog\"}\r\n",
        )
        .unwrap();
        let loaded = prompts.load().unwrap();
        assert_eq!(loaded.iter().map(Prompt::to_string).collect::<Vec<_>>(), ["two cats", "# a dog"]);
        assert_eq!(Json::Object(loaded[0].fields.clone()), serde_json::json!({ "count": 2, "of": ["cat"] }));
        assert_eq!(loaded[1], "# a dog".into());
        for (line, problem) in [
            ("{\"prompt\": \"a", "not JSON (EOF while parsing a string"),
            ("[\"a cat\"]", "neither a text nor an object: write {\"prompt\": "),
            ("{\"prmpt\": \"a cat\"}", "no `prompt`: it is the text of the prompt"),
            ("{\"prompt\": 2}", "`prompt` is 2: it must be a text"),
        ] {
            std::fs::write(&path, format!("{{\"prompt\": \"good\"}}\n\n{line}\n")).unwrap();
            let error = format!("{:#}", prompts.load().unwrap_err());
            let start = format!("{}, line 3 (prompts.file): {problem}", path.display());
            assert!(error.starts_with(&start), "{error}");
        }
        std::fs::write(&path, "\n").unwrap();
        assert!(prompts.load().unwrap_err().to_string().contains("counts.jsonl (prompts.file) has no prompt"));
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
