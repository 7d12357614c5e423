//! Lists of prompts on their way through the program.

mod support;

use std::fs;

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
