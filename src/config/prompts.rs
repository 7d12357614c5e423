//! `[prompts]`: what the images are of.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// The prompt lists inside the program, by the name that `prompts.builtin` gives them.
const BUILTIN: [(&str, &str); 1] = [("animals", include_str!("../../assets/prompts/animals.txt"))];

/// The builtin that stands in when a config names no prompts.
const DEFAULT_BUILTIN: &str = "animals";

super::table! {
    /// `[prompts]`: at most one of the three; with none, `builtin = "animals"`.
    pub struct PromptsConfig {
        /// The prompts themselves; at least one.
        list: Option<Vec<String>> = None,
        /// A text file with one prompt per line. Empty lines and lines that start with `#` are skipped.
        file: Option<PathBuf> = None,
        /// A list inside the program: `animals`, the 45 simple animals of DDPO.
        builtin: Option<String> = None,
    }
}

impl PromptsConfig {
    /// The prompts, in order; at least one.
    pub fn load(&self) -> Result<Vec<String>> {
        self.validate()?;
        if let Some(list) = &self.list {
            return Ok(list.clone());
        }
        if let Some(path) = &self.file {
            return read_lines(path);
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

fn read_lines(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("reading the prompts from {} (prompts.file)", path.display()))?;
    let prompts = prompts_of(&text);
    ensure!(
        !prompts.is_empty(),
        "{} (prompts.file) has no prompt: put one on each line; empty lines and lines that start with # are skipped",
        path.display()
    );
    Ok(prompts)
}

fn prompts_of(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_animals_are_45_and_distinct() {
        let mut animals = PromptsConfig::default().load().unwrap();
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
        assert_eq!(prompts.load().unwrap(), ["a cat", "a dog"]);
        std::fs::write(&path, "# nothing\n\n").unwrap();
        assert!(prompts.load().unwrap_err().to_string().contains("prompts.txt (prompts.file) has no prompt"));
        std::fs::remove_file(&path).unwrap();
        assert!(prompts.load().unwrap_err().to_string().starts_with("reading the prompts from "));
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
