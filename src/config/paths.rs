//! The local files that a config names.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Config, PromptsConfig, RewardsConfig};
use crate::files::is_carried;

impl Config {
    /// The same config with whole paths for local files, so that it means the same from another folder. A name that may be a
    /// repository's on the hub is a path where there is such a file or folder; that of a file that the program carries stays.
    ///
    /// # Errors
    /// The current folder is gone.
    pub fn with_whole_paths(mut self) -> Result<Self> {
        let is_local = |path: &Path| path.exists() && !is_carried(path);
        for path in self.files().into_iter().filter(|path| is_local(path)) {
            *path = whole(path)?;
        }
        for name in self.models().into_iter().filter(|name| is_local(Path::new(name))) {
            // a config cannot hold a path that is not Unicode
            if let Ok(path) = whole(Path::new(name))?.into_os_string().into_string() {
                *name = path;
            }
        }
        Ok(self)
    }

    /// The models and heads that are files or folders here.
    pub fn local_models(&self) -> Vec<String> {
        let names = self.clone().models().into_iter().map(std::mem::take).collect::<Vec<_>>();
        names.into_iter().filter(|name| Path::new(name).exists()).collect()
    }

    fn files(&mut self) -> Vec<&mut PathBuf> {
        let lists = [Some(&mut self.prompts), self.guard.prompts.as_mut(), self.run.sample_prompts.as_mut()];
        let lists = lists.into_iter().flatten().filter_map(|PromptsConfig { file, .. }| file.as_mut());
        lists.chain(self.lora.init_from.as_mut()).collect()
    }

    fn models(&mut self) -> Vec<&mut String> {
        let mut names = vec![&mut self.model.path];
        names.extend([self.model.config.as_mut(), self.model.tokenizer.as_mut()].into_iter().flatten());
        for rewards in [&mut self.reward, &mut self.guard.reward] {
            let RewardsConfig {
                aesthetic,
                clip_head,
                hps,
                clip_score,
                pickscore,
                image_reward,
                count,
                object,
                command,
                ..
            } = rewards;
            // of a command the files: its script, not a word that happens to be a folder's name, nor a program of `PATH`
            let words = command.iter_mut().flat_map(|reward| reward.program.iter_mut().enumerate());
            let is_file = |(place, word): &(usize, &mut String)| {
                Path::new(word.as_str()).is_file() && (*place > 0 || word.contains(std::path::is_separator))
            };
            names.extend(words.filter(is_file).map(|(_, word)| word));
            names.extend(aesthetic.iter_mut().flat_map(|reward| [&mut reward.clip, &mut reward.head]));
            names.extend(clip_head.iter_mut().flat_map(|reward| reward.clip.iter_mut().chain([&mut reward.head])));
            if let Some(reward) = hps {
                names.extend([&mut reward.model, &mut reward.file]);
                names.extend([reward.config.as_mut(), reward.tokenizer.as_mut()].into_iter().flatten());
            }
            if let Some(reward) = clip_score {
                names.push(&mut reward.model);
                names.extend(reward.tokenizer.as_mut());
            }
            if let Some(reward) = pickscore {
                names.push(&mut reward.model);
                names.extend(reward.tokenizer.as_mut());
            }
            if let Some(reward) = image_reward {
                names.extend([&mut reward.model, &mut reward.file]);
                names.extend(reward.vocab.as_mut());
            }
            names.extend(count.as_mut().map(|reward| &mut reward.model));
            names.extend(object.as_mut().map(|reward| &mut reward.model));
        }
        names
    }
}

fn whole(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("where is {}?", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_files_get_whole_paths_and_names_of_repositories_stay() {
        // `src` is a folder beside this crate's Cargo.toml, where tests run
        let text = "model = { path = 'src', tokenizer = 'no/such' }\nlora.init_from = 'build.rs'\nprompts.file = 'LICENSE'\n\
                    guard = { prompts.file = '/p', reward.hps.model = 'src/config' }\nreward.aesthetic.head = 'Cargo.toml'\n\
                    reward.command.program = ['LICENSE', 'build.rs', 'src', '--x']";
        let config = Config::parse(text, "test", &[]).unwrap().with_whole_paths().unwrap();
        let here = std::env::current_dir().unwrap();
        let at = |name: &str| here.join(name).into_os_string().into_string().unwrap();
        assert_eq!((config.model.path, config.model.tokenizer.as_deref()), (at("src"), Some("no/such")));
        assert_eq!(
            (config.prompts.file, config.lora.init_from),
            (Some(here.join("LICENSE")), Some(here.join("build.rs")))
        );
        assert_eq!(config.guard.prompts.unwrap().file.as_deref(), Some(Path::new("/p")));
        assert_eq!(config.guard.reward.hps.unwrap().model, at("src/config"));
        assert_eq!(config.reward.aesthetic.unwrap().head, at("Cargo.toml"));
        assert_eq!(config.reward.command.unwrap().program, ["LICENSE", &at("build.rs"), "src", "--x"]);
    }
}
