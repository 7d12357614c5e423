//! The prompts of a run. They are read when it begins, and its folder keeps them: what the config names may change.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value as Json};

use crate::config::{Config, Prompt, PromptsConfig, concerns};
use crate::files::write_bytes;
use crate::rewards::Rewards;
use crate::sampling::Sampler;

/// The keys of the lists, and the files that keep them.
const TRAINING: (&str, &str) = ("prompts", "prompts.jsonl");
const GUARD: (&str, &str) = ("guard.prompts", "guard-prompts.jsonl");
const SAMPLES: (&str, &str) = ("run.sample_prompts", "sample-prompts.jsonl");

/// The lists of a run, those of the guard and of the sample grids where they are lists of their own.
pub struct PromptLists {
    pub training: Vec<Prompt>,
    guard: Option<Vec<Prompt>>,
    samples: Option<Vec<Prompt>>,
}

impl PromptLists {
    /// Those that the config names.
    ///
    /// # Errors
    /// A list cannot be read or is empty.
    pub fn load(config: &Config) -> Result<Self> {
        let own = |list: Option<&PromptsConfig>, (key, _)| {
            list.map(PromptsConfig::load).transpose().with_context(|| format!("in {key}"))
        };
        let guard = config.guard.prompts.as_ref().filter(|_| config.guard.every > 0);
        Ok(Self {
            training: config.prompts.load()?,
            guard: own(guard, GUARD)?,
            samples: own(config.run.sample_prompts.as_ref(), SAMPLES)?,
        })
    }

    /// What the guard's images are of.
    pub fn guard(&self) -> &[Prompt] {
        self.guard.as_ref().unwrap_or(&self.training)
    }

    /// What the sample grids are of.
    pub fn samples(&self) -> &[Prompt] {
        self.samples.as_ref().unwrap_or(&self.training)
    }

    fn named(&self) -> impl Iterator<Item = ((&'static str, &'static str), &Vec<Prompt>)> {
        let own = [(GUARD, &self.guard), (SAMPLES, &self.samples)];
        let own = own.into_iter().filter_map(|(name, list)| Some((name, list.as_ref()?)));
        std::iter::once((TRAINING, &self.training)).chain(own)
    }

    /// Warns of each list with prompts that the text encoder does not read to their end.
    ///
    /// # Errors
    /// A prompt cannot be tokenized.
    pub fn warn_of_cut(&self, sampler: &Sampler) -> Result<()> {
        self.named().try_for_each(|((key, _), list)| sampler.warn_of_cut(key, list))
    }

    /// Whether each list's prompts say what the rewards ask of them.
    ///
    /// # Errors
    /// Names the list, the reward and the prompt.
    pub fn check(&self, rewards: &Rewards) -> Result<()> {
        self.named().try_for_each(|((key, _), list)| rewards.check(list).with_context(|| format!("in {key}")))
    }

    /// Writes the lists into the run's folder, as JSON lines.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        for ((_, file), list) in self.named() {
            let lines: String = list.iter().map(|prompt| line(prompt) + "\n").collect();
            write_bytes(&dir.join(file), lines.as_bytes())?;
        }
        Ok(())
    }
}

fn line(prompt: &Prompt) -> String {
    let mut object = Map::from_iter([("prompt".to_owned(), Json::from(&*prompt.text))]);
    object.extend(prompt.fields.clone());
    Json::Object(object).to_string()
}

/// Lets the lists of a run's config be those that its folder keeps, but for those that a setting is about.
pub fn take_kept(config: &mut Config, dir: &Path, settings: &[String]) {
    let lists = [
        (TRAINING, Some(&mut config.prompts)),
        (GUARD, config.guard.prompts.as_mut()),
        (SAMPLES, config.run.sample_prompts.as_mut()),
    ];
    for ((key, file), list) in lists {
        let file = dir.join(file);
        if let Some(list) = list
            && file.is_file()
            && !settings.iter().any(|setting| concerns(setting, key))
        {
            list.kept = Some(file);
        }
    }
}
