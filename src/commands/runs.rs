//! `alignprop runs DIR`: the runs in a folder side by side.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use comfy_table::{ContentArrangement, Table, presets};

use crate::cli::RunsArgs;
use crate::config::shown;
use crate::report::chart::{duration, short};
use crate::report::{Best, Metrics, best_to_show, names};
use crate::training::run_folder::RunFolder;

/// Folders below the given one that are searched.
const DEPTH: usize = 4;

pub fn run(args: &RunsArgs) -> Result<()> {
    ensure!(args.dir.is_dir(), "{} is no folder: name the one that your runs are in", args.dir.display());
    let folders = find(&args.dir);
    ensure!(
        !folders.is_empty(),
        "{} holds no run: a run is a folder with config.toml and metrics.jsonl, which `alignprop train` writes",
        args.dir.display()
    );
    let runs: Vec<Run> = folders.iter().map(|folder| Run::read(folder, &args.dir)).collect();
    say!("{}", table(&runs));
    Ok(())
}

/// The run folders below `dir`, through links too, each once: the name that needs no link counts.
fn find(dir: &Path) -> Vec<PathBuf> {
    let mut runs = BTreeMap::new();
    // how deep a folder was searched already: links may lead there again, or up
    let mut searched = BTreeMap::new();
    let mut open = VecDeque::from([(dir.to_owned(), DEPTH)]);
    while let Some((dir, depth)) = open.pop_front() {
        // what cannot be read is passed over
        let Ok(real) = dir.canonicalize() else { continue };
        if searched.get(&real).is_some_and(|before| *before >= depth) {
            continue;
        }
        searched.insert(real.clone(), depth);
        if is_run(&dir) {
            runs.entry(real).or_insert(dir);
        } else if depth > 0 {
            let mut inside: Vec<PathBuf> = dir.read_dir().into_iter().flatten().flatten().map(|e| e.path()).collect();
            inside.sort();
            for path in inside.into_iter().filter(|path| path.is_dir()) {
                match path.is_symlink() {
                    true => open.push_back((path, depth - 1)),
                    false => open.push_front((path, depth - 1)),
                }
            }
        }
    }
    let mut folders: Vec<PathBuf> = runs.into_values().collect();
    folders.sort();
    folders
}

fn is_run(dir: &Path) -> bool {
    dir.join("metrics.jsonl").is_file() || (dir.join("config.toml").is_file() && dir.join("checkpoints").is_dir())
}

/// What is known of one run; whatever of it cannot be read is absent.
struct Run {
    name: String,
    /// Every setting by its full key, as TOML; empty where config.toml cannot be read.
    settings: BTreeMap<String, String>,
    /// Why config.toml cannot be read.
    complaint: Option<String>,
    /// Optimizer steps done.
    steps: usize,
    seconds: f64,
    best: Option<Best>,
}

impl Run {
    fn read(folder: &Path, below: &Path) -> Self {
        let name = folder.strip_prefix(below).unwrap_or(folder).display().to_string();
        let name = if name.is_empty() { folder.display().to_string() } else { name };
        let mut run = Self { name, settings: BTreeMap::new(), complaint: None, steps: 0, seconds: 0.0, best: None };
        match std::fs::read_to_string(folder.join("config.toml")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => run.complaint = Some("no config.toml".into()),
            Err(error) => run.complaint = Some(format!("config.toml: {error}")),
            // as a table of anything: another version may know other keys
            Ok(text) => match text.parse::<toml::Table>() {
                Ok(table) => flatten("", &toml::Value::Table(table), &mut run.settings),
                Err(error) => run.complaint = Some(format!("config.toml: {}", error.message())),
            },
        }
        let metrics = match Metrics::read(&RunFolder::at(folder).metrics_file()) {
            Ok(metrics) => metrics,
            Err(error) => {
                run.complaint.get_or_insert(format!("metrics.jsonl: {}", error.root_cause()));
                return run;
            }
        };
        run.steps = metrics.last_step();
        run.seconds = metrics.history(names::SECONDS).iter().map(|(_, seconds)| seconds).sum();
        let untrained = |kind: &str| {
            let weight = run.settings.get(&format!("reward.{kind}.weight"));
            weight.is_some_and(|weight| weight.parse() == Ok(0.0))
        };
        run.best = best_to_show(&metrics, untrained);
        run
    }
}

/// Settings by their full keys.
fn flatten(prefix: &str, value: &toml::Value, settings: &mut BTreeMap<String, String>) {
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&key, value, settings);
            }
        }
        value => {
            settings.insert(prefix.to_owned(), value.to_string());
        }
    }
}

/// The settings in which the runs differ, for each run.
fn differences(runs: &[Run]) -> Vec<String> {
    let readable: Vec<&Run> = runs.iter().filter(|run| run.complaint.is_none()).collect();
    let mut keys: Vec<&String> = readable.iter().flat_map(|run| run.settings.keys()).collect();
    keys.sort();
    keys.dedup();
    keys.retain(|key| {
        let values: BTreeSet<_> = readable.iter().map(|run| run.settings.get(*key)).collect();
        // of a reward that only some runs have, its weight says enough
        let detail = key.starts_with("reward.") && !key.ends_with(".weight");
        let different = if detail { values.iter().flatten().count() } else { values.len() };
        *key != "run.dir" && different > 1
    });
    let of = |run: &Run| match &run.complaint {
        Some(complaint) => complaint.clone(),
        None => {
            let set = keys.iter().filter_map(|key| Some(format!("{key}={}", run.settings.get(*key)?)));
            set.collect::<Vec<_>>().join(" ")
        }
    };
    runs.iter().map(of).collect()
}

fn table(runs: &[Run]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["run", "steps", "time", "best", "of", "at step", "settings that differ"]);
    for (run, settings) in runs.iter().zip(differences(runs)) {
        let total = run.settings.get("train.steps").map_or("?", String::as_str);
        let (score, metric, step) = match &run.best {
            Some(best) => (short(best.score), best.metric.clone(), best.step.to_string()),
            None => ("-".into(), "-".into(), "-".into()),
        };
        let time = if run.seconds > 0.0 { duration(run.seconds) } else { "-".to_owned() };
        let row = [run.name.clone(), format!("{}/{total}", run.steps), time, score, metric, step, settings];
        table.add_row(row.map(shown));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn runs_are_found_and_compared_and_broken_ones_are_shown() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, file: &str, text: &str| {
            let dir = folder.path().join(name);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join(file), text).unwrap();
        };
        let config = |lr: &str| {
            format!(
                "[optimizer]\nlr = {lr}\n[train]\nsteps = 9\n[run]\ndir = 'x{lr}'\n[reward.clip-score]\nweight = 0.0\n"
            )
        };
        write("a", "config.toml", &config("0.1"));
        write(
            "a",
            "metrics.jsonl",
            concat!(
                r#"{"step":1,"loss":1.0,"reward/hps":0.9,"seconds":60.0}"#,
                "\n",
                r#"{"step":1,"sample/clip-score":0.9,"sample/hps":0.2,"sample/loss":9.0}"#,
                "\n",
                r#"{"step":2,"loss":1.0,"reward/hps":0.8,"seconds":120.0}"#,
                "\n",
                r#"{"step":2,"sample/hps":0.1,"sample/loss":8.0}"#,
                "\n",
                r#"{"step":3,"samp"#,
            ),
        );
        write("deep/b", "config.toml", &(config("0.2") + "[reward.hps]\nfile = 'h'\nweight = 2.0\n"));
        write("deep/b", "metrics.jsonl", "");
        write("broken", "config.toml", "lr = = 3");
        write("broken", "metrics.jsonl", r#"{"step":4,"guard/held_out":0.5,"sample/hps":0.7}"#);
        write("headless", "metrics.jsonl", "no json at all");
        write("other", "notes.txt", "");

        let runs: Vec<Run> = find(folder.path()).iter().map(|f| Run::read(f, folder.path())).collect();
        let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
        assert_eq!(names, ["a", "broken", "deep/b", "headless"]);

        let a = &runs[0];
        assert_eq!((a.steps, a.seconds), (2, 180.0));
        let best = a.best.as_ref().unwrap();
        assert_eq!((best.metric.as_str(), best.score, best.step), ("sample/loss", 8.0, 2));
        assert_eq!(runs[1].best.as_ref().unwrap().metric, "guard/held_out");
        assert!(runs[2].best.is_none() && runs[3].best.is_none());

        let settings = differences(&runs);
        assert_eq!(settings[0], "optimizer.lr=0.1");
        assert_eq!(settings[2], "optimizer.lr=0.2 reward.hps.weight=2.0");
        assert!(settings[1].starts_with("config.toml: ") && settings[3] == "no config.toml", "{settings:?}");
        let text = table(&runs).to_string();
        assert!(text.contains("2/9") && text.contains("3.0 min") && text.contains("4/?"), "{text}");
    }

    #[cfg(unix)]
    #[test]
    fn linked_runs_are_found_each_once_whatever_the_links_lead_to() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for run in ["scratch/one", "scratch/deep/two", "runs/own", "runs/a/b/c/d/five"] {
            fs::create_dir_all(at(run)).unwrap();
            fs::write(at(run).join("metrics.jsonl"), "").unwrap();
        }
        for (target, link) in [
            ("scratch/one", "runs/0-linked"),
            ("scratch/one", "runs/linked-again"),
            ("scratch/deep", "runs/folder"),
            ("runs/own", "runs/0-own-again"),
            ("runs", "runs/a/up"),
            ("gone", "runs/dead"),
            ("runs/a/b/c", "runs/z"),
        ] {
            symlink(at(target), at(link)).unwrap();
        }
        let found = find(&at("runs"));
        let names: Vec<_> = found.iter().map(|run| run.strip_prefix(at("runs")).unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["0-linked", "folder/two", "own", "z/d/five"]);
        // the folder may be a link itself
        symlink(at("runs"), at("link")).unwrap();
        assert_eq!(find(&at("link")).len(), 4);
    }
}
