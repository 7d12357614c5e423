//! Lists of prompts on their way through the program, and what else a run must not lose sight of.

mod support;

use std::fs;
use std::path::Path;

use support::program::*;
use support::*;

#[test]
fn a_terminal_gets_no_commands_from_a_prompt() {
    let run = Experiment::trained(&["train.steps=1", "prompts.list=[\"a \\u001B[31mgreen yak\", \"a\\u009B2J mule\"]"]);
    let folder = run.folder.path();
    let table = succeeds(folder, &["eval", "--checkpoint", "run", "--seeds", "1"]);
    assert!(!table.contains(['\u{1b}', '\u{9b}']) && table.contains(r"a \u{1b}[31mgreen yak"), "{table}");
    // the report's file has the prompt as it is
    let report = fs::read_to_string(folder.join("run/eval/eval.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["rewards"][0]["per_prompt"][0]["prompt"], "a \u{1b}[31mgreen yak");
    // nor from a name in an error
    let error = assert_fails(folder, &["train", "--resume", "a\u{1b}[31mb"], &[r"a\u{1b}[31mb"]);
    assert!(!error.contains('\u{1b}'), "{error}");
}

/// A text of more tokens than a text encoder reads; the last word that it reads is `one`, the first lost `two`.
fn long() -> String {
    [vec!["one"; 75], vec!["two"; 5]].concat().join(" ")
}

/// The lines on stderr with this word.
fn warnings(folder: &Path, line: &[&str], word: &str) -> Vec<String> {
    let output = alignprop(folder).args(line).assert().success();
    let stderr = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    stderr.lines().filter(|line| line.starts_with("warning: ") && line.contains(word)).map(str::to_owned).collect()
}

#[test]
fn each_setting_with_texts_that_are_cut_is_warned_of_once() {
    let experiment = Experiment::new("tiny-sd15");
    let (folder, config, long) = (experiment.folder.path(), experiment.config(), long());
    let list = |key: &str| format!("{key}=['a cat', '{long}', '{long}!']");
    let negative = format!("sampler.negative_prompt={long}");
    let keys = ["prompts.list", "guard.prompts.list", "run.sample_prompts.list"].map(list);
    let mut line = vec!["train", "--dry-run", "--config", &config, "--set", "guard.every=1"];
    for setting in keys.iter().chain([&negative]) {
        line.extend(["--set", setting]);
    }
    let found = warnings(folder, &line, "the first 77");
    assert_eq!(found.len(), 4, "{found:?}");
    assert!(found[0].starts_with("warning: sampler.negative_prompt: `one one"), "{found:?}");
    for (found, key) in found[1..].iter().zip(["prompts", "guard.prompts", "run.sample_prompts"]) {
        assert!(
            found.starts_with(&format!("warning: {key}: 2 of 3 texts are cut")) && found.contains("`two`"),
            "{found}"
        );
    }
    // without guidance nobody reads the negative prompt
    line.extend(["--set", "sampler.guidance_scale=1"]);
    assert_eq!(warnings(folder, &line, "negative"), [""; 0]);

    experiment.train(&["train.steps=1"]).unwrap();
    fs::write(folder.join("long.txt"), &long).unwrap();
    let line = ["eval", "--checkpoint", "run", "--seeds", "1", "--prompts", "long.txt"];
    assert!(warnings(folder, &line, "the first 77")[0].starts_with("warning: --prompts: `one one"));
}

#[test]
fn a_run_goes_on_with_the_prompts_that_it_began_with() {
    let experiment = Experiment::new("tiny-sd15");
    let folder = experiment.folder.path();
    let (list, run) = (folder.join("list.csv"), experiment.run_folder());
    fs::write(&list, "prompt,count\na mule,1\na red yak,2\n").unwrap();
    let config = experiment.config();
    edit(
        Path::new(&config),
        "prompts.list = [\"a cat\", \"a red dog\", \"two foxes in the snow\"]",
        "prompts.file = 'list.csv'",
    );
    let guard = ["--set", "guard.every=1", "--set", "guard.prompts.list=['a cow']", "--set", "train.steps=4"];
    succeeds(folder, &[&["train", "--config", &config, "--stop-at", "1"], &guard[..]].concat());
    let kept = fs::read_to_string(run.join("prompts.jsonl")).unwrap();
    assert_eq!(kept, "{\"prompt\":\"a mule\",\"count\":\"1\"}\n{\"prompt\":\"a red yak\",\"count\":\"2\"}\n");
    assert_eq!(fs::read_to_string(run.join("guard-prompts.jsonl")).unwrap(), "{\"prompt\":\"a cow\"}\n");

    let resume = |step: &str, more: &[&str]| {
        let dir = text(&run);
        let elsewhere = folder.join("elsewhere");
        fs::create_dir_all(&elsewhere).unwrap();
        fs::write(elsewhere.join("list.csv"), "prompt\na horse\n").unwrap();
        let line = [&["train", "--resume", &dir, "--stop-at", step], more].concat();
        let output = alignprop(&elsewhere).args(line).assert().success();
        String::from_utf8(output.get_output().stderr.clone()).unwrap()
    };
    let changed = "has other prompts than when the run began";
    let said = resume("2", &[]);
    assert!(said.contains("on 2 prompts") && !said.contains(changed), "{said}");
    fs::write(&list, "prompt\na mule\na red yak\na goat\n").unwrap();
    let said = resume("3", &[]);
    assert!(said.contains("on 2 prompts") && said.matches(changed).count() == 1 && said.contains("list.csv"), "{said}");
    let table = succeeds(folder, &["eval", "--checkpoint", "run", "--seeds", "1"]);
    assert!(table.contains("a red yak") && !table.contains("a goat"), "{table}");
    fs::remove_file(&list).unwrap();
    assert!(resume("4", &[]).contains("on 2 prompts"));
    // a setting counts, and is kept
    let said = resume("4", &["--set", "prompts.file=list.csv"]);
    assert!(said.contains("on 1 prompts") && !said.contains(changed), "{said}");
    assert_eq!(fs::read_to_string(run.join("prompts.jsonl")).unwrap(), "{\"prompt\":\"a horse\"}\n");
}

#[test]
fn a_run_says_which_of_its_models_has_changed() {
    let experiment = Experiment::new("tiny-sd15");
    let folder = experiment.folder.path();
    copy_folder(&fixture("tiny-sd15/model"), &folder.join("base"));
    let config = experiment.config();
    succeeds(folder, &["train", "--config", &config, "--stop-at", "1", "--set", "model.path=base"]);
    let resume = ["train", "--resume", "run", "--dry-run"];
    assert_eq!(warnings(folder, &resume, "has changed"), [""; 0]);
    edit(&folder.join("base/scheduler/scheduler_config.json"), "\"beta_end\": 0.012", "\"beta_end\": 0.013");
    let found = warnings(folder, &resume, "has changed");
    assert!(found.len() == 1 && found[0].contains("base") && found[0].contains("scheduler_config.json"), "{found:?}");
    // another model is no changed one
    let other = format!("model.path={}", text(fixture("tiny-sd15/model")));
    assert_eq!(warnings(folder, &[&resume[..], &["--set", &other]].concat(), "has changed"), [""; 0]);
}
