//! The program as a process of its own.

use std::path::Path;

use assert_cmd::Command;

/// The program in this folder, cut off from the hub and from the user's cache.
pub fn alignprop(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_alignprop"));
    command.current_dir(folder).env("HF_HUB_OFFLINE", "1").env("HF_HOME", folder.join("no-cache"));
    for name in
        ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "http_proxy", "https_proxy", "all_proxy"]
    {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    command
}

/// What a failed command says: one `error:` on stderr with all of `words`, exit code 1, no panic, nothing on stdout.
pub fn assert_fails<S: AsRef<str>>(folder: &Path, line: &[S], words: &[&str]) -> String {
    assert_command_fails(alignprop(folder).args(line.iter().map(AsRef::as_ref)), words)
}

pub fn assert_command_fails(command: &mut Command, words: &[&str]) -> String {
    let output = command.assert().code(1).stdout("");
    let stderr = String::from_utf8(output.get_output().stderr.clone()).unwrap();
    let message = &stderr[stderr.find("error: ").unwrap_or_else(|| panic!("no `error:` in {stderr}"))..];
    assert!(!stderr.contains("panicked"), "{stderr}");
    for word in words {
        assert!(message.contains(word), "`{word}` is not in:\n{message}");
    }
    message.to_owned()
}

pub fn succeeds<S: AsRef<str>>(folder: &Path, line: &[S]) -> String {
    let output = alignprop(folder).args(line.iter().map(AsRef::as_ref)).assert().success();
    String::from_utf8(output.get_output().stdout.clone()).unwrap()
}
