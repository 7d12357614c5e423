//! The program killed, interrupted, out of disk: what is on disk then, and that the run goes on to the same bytes.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use alignprop::diffusion::noise::below;
use alignprop::diffusion::{Noise, Stream};
use alignprop::training::lock::RunLock;
use support::*;

/// All that chance decides, with a moving average, a guard and old checkpoints that go.
const SETTINGS: [&str; 12] = [
    "train.steps=6",
    "train.gradient_accumulation_steps=2",
    "sampler.eta=1.0",
    "truncation.rule=uniform",
    "optimizer.lr_schedule=cosine",
    "regularization.ema_decay=0.9",
    "regularization.kl_weight=0.1",
    "guard.every=2",
    "guard.num_prompts=1",
    "run.sample_every=3",
    "run.num_samples=1",
    "run.keep_checkpoints=2",
];

const FINAL: [&str; 2] = ["pytorch_lora_weights.safetensors", "pytorch_lora_weights_ema.safetensors"];

fn experiment() -> Experiment {
    Experiment::new("tiny-sd15")
}

/// The program, told to train this experiment from its start, or to go on with it.
fn command(experiment: &Experiment, resume: bool, set: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_alignprop"));
    command.current_dir(experiment.folder.path()).env("HF_HUB_OFFLINE", "1");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let config = experiment.config();
    let line: &[&str] = if resume { &["train", "--resume", "run"] } else { &["train", "--config", &config] };
    command.args(with_settings(line, set));
    command
}

fn start(experiment: &Experiment, resume: bool) -> Child {
    command(experiment, resume, if resume { &[] } else { &SETTINGS }).spawn().unwrap()
}

/// Whether the run has been started as far as it can be resumed.
fn begun(experiment: &Experiment) -> bool {
    experiment.run_folder().join("config.toml").is_file()
}

/// Waits until `condition` holds, or the process ends.
fn wait_for(child: &mut Child, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() && child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < Duration::from_secs(300), "it does not happen");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn stderr(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(!text.contains("panicked"), "{text}");
    text
}

fn send(child: &Child, signal: &str) {
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(status.success(), "kill {signal}");
}

/// The uninterrupted run.
fn whole() -> Experiment {
    let experiment = experiment();
    let output = command(&experiment, false, &SETTINGS).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    experiment
}

/// The same bytes of every file that the run ends with, and the same metrics; nothing unfinished beside them.
fn assert_same_end(one: &Experiment, whole: &Experiment) {
    for name in FINAL {
        let read = |run: &Experiment| fs::read(run.run_folder().join(name)).unwrap();
        assert!(read(one) == read(whole), "{name} differs");
    }
    assert_eq!(one.metrics(), whole.metrics());
    assert_eq!(listing(&one.run_folder()), listing(&whole.run_folder()));
    assert_eq!(one.checkpoints(), whole.checkpoints());
    for checkpoint in one.checkpoints() {
        for file in listing(&one.run_folder().join("checkpoints").join(&checkpoint)) {
            let path = Path::new("checkpoints").join(&checkpoint).join(&file);
            let read = |run: &Experiment| fs::read(run.run_folder().join(&path)).unwrap();
            assert!(read(one) == read(whole), "{} differs", path.display());
        }
    }
}

// ---------------------------------------------------------------------------------------------------- killed

#[test]
fn a_run_that_is_killed_at_any_moment_ends_in_the_same_bytes() {
    let started = Instant::now();
    let whole = whole();
    let length = started.elapsed();
    let mut rng = Noise::new(11).generator(Stream::Prompts, 0, 0);
    for _ in 0..2 {
        let experiment = experiment();
        let mut kills = 0;
        loop {
            let mut child = start(&experiment, begun(&experiment));
            // the longer it takes, the later it is killed: every run gets to its end
            let until = length.mul_f64((0.1 + below(&mut rng, 1000) as f64 / 1000.0) * (1.0 + 0.2 * f64::from(kills)));
            let started = Instant::now();
            wait_for(&mut child, || started.elapsed() > until);
            if let Some(status) = child.try_wait().unwrap() {
                let output = child.wait_with_output().unwrap();
                assert!(status.success(), "{}", stderr(&output));
                break;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
            // what is there is whole: every checkpoint can be read
            for checkpoint in experiment.checkpoints().iter().filter(|name| name.starts_with("step-")) {
                let files = listing(&experiment.run_folder().join("checkpoints").join(checkpoint));
                assert_eq!(files.len(), 4, "{checkpoint}: {files:?}");
            }
        }
        assert_same_end(&experiment, &whole);
    }
}

#[test]
fn a_run_that_is_killed_while_it_writes_a_checkpoint_goes_on() {
    let whole = whole();
    let experiment = experiment();
    let checkpoints = experiment.run_folder().join("checkpoints");
    for step in [0, 2, 3] {
        let mut child = start(&experiment, begun(&experiment));
        let unfinished = checkpoints.join(format!(".unfinished-step-{step:06}"));
        wait_for(&mut child, || unfinished.exists());
        child.kill().unwrap();
        child.wait().unwrap();
        let complete = checkpoints.join(format!("step-{step:06}"));
        assert!(unfinished.exists() || complete.exists());
    }
    // as if it had been killed between the two renames that replace a checkpoint
    let last = experiment.checkpoints().into_iter().rfind(|name| name.starts_with("step-")).unwrap();
    fs::rename(checkpoints.join(&last), checkpoints.join(format!(".replaced-{last}"))).unwrap();
    let output = command(&experiment, true, &[]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same_end(&experiment, &whole);
}

/// Killed before the first checkpoint: there is a config and nothing else.
#[test]
fn a_run_without_a_checkpoint_starts_again() {
    let whole = whole();
    let experiment = experiment();
    let mut child = start(&experiment, false);
    wait_for(&mut child, || begun(&experiment));
    child.kill().unwrap();
    child.wait().unwrap();
    let checkpoints = experiment.run_folder().join("checkpoints");
    if checkpoints.exists() {
        fs::remove_dir_all(checkpoints).unwrap();
    }
    fs::remove_file(experiment.run_folder().join("metrics.jsonl")).ok();
    let output = command(&experiment, true, &[]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same_end(&experiment, &whole);
}

/// What each writer leaves when it is killed in the middle, now and in earlier versions.
#[test]
fn what_a_killed_process_leaves_goes_when_the_run_is_resumed() {
    let whole = whole();
    let experiment = experiment();
    let stopped = command(&experiment, false, &SETTINGS).args(["--stop-at", "3"]).output().unwrap();
    assert!(stopped.status.success(), "{}", stderr(&stopped));
    let run = experiment.run_folder();
    for file in [
        ".unfinished-a1B2c3",
        ".run-a1B2c3",
        ".lora-a1B2c3",
        "samples/.unfinished-a1B2c3",
        "samples/.picture-a1B2c3",
        "checkpoints/.unfinished-a1B2c3",
        "run.lock",
    ] {
        fs::write(run.join(file), "half").unwrap();
    }
    for folder in [".unfinished-folder", "checkpoints/.unfinished-step-000004", "checkpoints/.removed"] {
        fs::create_dir_all(run.join(folder).join("folder")).unwrap();
        fs::write(run.join(folder).join("folder/file"), "half").unwrap();
    }
    let events = fs::read_dir(run.join("tensorboard")).unwrap().next().unwrap().unwrap().path();
    let before = fs::read(&events).unwrap();
    let output = command(&experiment, true, &[]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same_end(&experiment, &whole);
    assert_eq!(listing(&run.join("samples")), listing(&whole.run_folder().join("samples")));
    assert!(fs::read(events).unwrap() == before);
}

// ---------------------------------------------------------------------------------------------------- two at once

/// Every file below a folder with its bytes.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.append(&mut contents(&path)),
            false => drop(found.insert(path.clone(), fs::read(path).unwrap())),
        }
    }
    found
}

#[test]
fn a_second_process_is_refused_and_the_first_goes_on_undisturbed() {
    let experiment = experiment();
    // one step that takes long: nothing is written meanwhile
    let long = ["train.steps=2", "train.gradient_accumulation_steps=100000", "run.sample_every=0"];
    let mut first = command(&experiment, false, &long).spawn().unwrap();
    wait_for(&mut first, || experiment.checkpoint(0).is_dir());
    std::thread::sleep(Duration::from_millis(100));
    let before = contents(&experiment.run_folder());
    // it is refused before it looks for the model
    let elsewhere = ["model.path=no/such/model"];
    for (resume, set) in [(true, &[][..]), (true, &elsewhere), (false, &long[..]), (false, &elsewhere)] {
        let mut second = command(&experiment, resume, set).spawn().unwrap();
        let started = Instant::now();
        wait_for(&mut second, || started.elapsed() > Duration::from_secs(60));
        if second.try_wait().unwrap().is_none() {
            for mut child in [second, first] {
                child.kill().unwrap();
                child.wait().unwrap();
            }
            panic!("a second process trains the run");
        }
        let output = second.wait_with_output().unwrap();
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{message}");
        let id = format!("another process (id {})", first.id());
        for words in [&id, "is training the run in ", "run;", "wait until it has ended"] {
            assert!(message.contains(words), "`{words}` is not in {message}");
        }
    }
    // whoever only reads is let in
    for line in [&["runs", "."][..], &["eval", "--checkpoint", "run", "--seeds", "1", "--out", "judged"]] {
        let mut reader = Command::new(env!("CARGO_BIN_EXE_alignprop"));
        let output = reader.current_dir(experiment.folder.path()).args(line).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
    }
    assert!(first.try_wait().unwrap().is_none(), "the first one goes on");
    assert!(contents(&experiment.run_folder()) == before);

    // the lock ends with its process
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(experiment.run_folder().join("run.lock").exists());
    let output = command(&experiment, true, &["train.gradient_accumulation_steps=1"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!experiment.run_folder().join("run.lock").exists());
}

/// Two that start in the same new folder: the second one finds nothing there but the lock.
#[test]
fn a_run_is_not_started_in_a_folder_that_another_process_has_just_taken() {
    let experiment = experiment();
    let first = RunLock::take_new(&experiment.run_folder()).unwrap();
    let output = command(&experiment, false, &SETTINGS).output().unwrap();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains(&format!("another process (id {})", std::process::id())), "{message}");
    assert_eq!(listing(&experiment.run_folder()), ["run.lock"]);
    drop(first);
    assert!(!experiment.run_folder().exists());
}

// ---------------------------------------------------------------------------------------------------- interrupted

#[cfg(unix)]
#[test]
fn an_interrupt_finishes_the_step_saves_and_says_how_to_go_on() {
    let whole = whole();
    let experiment = experiment();
    for (signal, code, step) in [("-INT", 130, 1), ("-TERM", 143, 3)] {
        let mut child = start(&experiment, begun(&experiment));
        wait_for(&mut child, || experiment.checkpoint(step).is_dir());
        send(&child, signal);
        let output = child.wait_with_output().unwrap();
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{message}");
        assert!(message.contains("go on with `alignprop train --resume "), "{message}");
        let resume = message.split('`').find(|part| part.starts_with("alignprop train")).unwrap();
        // the command names the folder that can be resumed
        assert!(resume.ends_with("run"), "{resume}");
        // the finished step is saved, and it is the last one of the metrics
        let done = experiment.metrics().last().unwrap()["step"].as_u64().unwrap() as usize;
        assert!(experiment.checkpoint(done).is_dir(), "{:?}", experiment.checkpoints());
        assert!(done >= step && message.contains(&format!("stopped after step {done} of 6, saved")), "{message}");
        assert!(!experiment.checkpoints().iter().any(|name| name.starts_with('.')));
        assert!(!experiment.run_folder().join(FINAL[0]).exists());
    }
    let output = command(&experiment, true, &[]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same_end(&experiment, &whole);
}

#[cfg(unix)]
#[test]
fn a_second_interrupt_stops_at_once_with_nothing_half_written() {
    let experiment = experiment();
    // one step that takes long
    let long = ["train.steps=2", "train.gradient_accumulation_steps=100000"];
    let mut child = command(&experiment, false, &long).spawn().unwrap();
    wait_for(&mut child, || experiment.checkpoint(0).is_dir());
    send(&child, "-INT");
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "the first one finishes the step");
    send(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert_eq!(experiment.checkpoints(), ["step-000000"]);
    let shorter = ["train.gradient_accumulation_steps=1"];
    let output = command(&experiment, true, &shorter).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

#[cfg(unix)]
#[test]
fn what_terminals_and_clusters_send_finishes_the_step_and_saves_however_often_it_comes() {
    let whole = whole();
    let signals =
        [("-HUP", libc::SIGHUP), ("-USR1", libc::SIGUSR1), ("-USR2", libc::SIGUSR2), ("-XCPU", libc::SIGXCPU)];
    for (name, signal) in signals {
        let experiment = experiment();
        let mut child = start(&experiment, false);
        wait_for(&mut child, || experiment.checkpoint(1).is_dir());
        // a shell and the system both tell of a closed terminal
        send(&child, name);
        let _ = Command::new("kill").args([name, &child.id().to_string()]).output();
        let output = child.wait_with_output().unwrap();
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(128 + signal), "{message}");
        let done = experiment.metrics().last().unwrap()["step"].as_u64().unwrap() as usize;
        assert!(experiment.checkpoint(done).is_dir(), "{:?}", experiment.checkpoints());
        assert!(message.contains(&format!("stopped after step {done} of 6, saved")), "{message}");
        let output = command(&experiment, true, &[]).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        assert_same_end(&experiment, &whole);
    }
}

#[cfg(unix)]
#[test]
fn a_closed_terminal_is_ignored_by_whoever_was_told_to() {
    let whole = whole();
    let experiment = experiment();
    let stopped = command(&experiment, false, &SETTINGS).args(["--stop-at", "1"]).output().unwrap();
    assert!(stopped.status.success(), "{}", stderr(&stopped));
    // as nohup does
    let mut shell = Command::new("bash");
    shell.current_dir(experiment.folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    shell.args(["-c", "trap '' HUP && exec \"$0\" train --resume run", env!("CARGO_BIN_EXE_alignprop")]);
    let mut child = shell.spawn().unwrap();
    wait_for(&mut child, || experiment.checkpoint(2).is_dir());
    send(&child, "-HUP");
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same_end(&experiment, &whole);
}

// ---------------------------------------------------------------------------------------------------- nobody reads

#[cfg(unix)]
#[test]
fn a_run_whose_output_nobody_reads_trains_to_its_end() {
    use std::io::{BufRead, BufReader};
    let whole = whole();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let never = experiment();
    let mut closed = command(&never, false, &SETTINGS);
    let status = closed.stdout(writer.try_clone().unwrap()).stderr(writer).status().unwrap();
    assert_eq!(status.code(), Some(0));
    assert_same_end(&never, &whole);

    let leaves = experiment();
    let mut child = start(&leaves, false);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("model"));
    drop((lines, child.stdout.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_same_end(&leaves, &whole);

    // what is asked for and cannot be said: a list ends quietly, or says why it is not whole
    let runs = |stdout: Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_alignprop"));
        let output = command.args(["runs", &text(whole.run_folder())]).stdout(stdout).output().unwrap();
        (output.status.code(), stderr(&output))
    };
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert_eq!(runs(writer.into()), (Some(0), String::new()));
    if let Ok(full) = fs::File::options().write(true).open("/dev/full") {
        let (code, message) = runs(full.try_clone().unwrap().into());
        assert!(code == Some(1) && message.contains("stdout") && message.contains("No space"), "{code:?} {message}");
        // a training is in its files
        let full_disk = experiment();
        let output = command(&full_disk, false, &SETTINGS).stdout(full).output().unwrap();
        assert!(output.status.success() && stderr(&output).contains("No space"), "{}", stderr(&output));
        assert_same_end(&full_disk, &whole);
    }
}

// ---------------------------------------------------------------------------------------------------- no disk

/// A limit on the size of a file stands in for a full disk: the write fails in the middle.
#[cfg(unix)]
#[test]
fn a_write_that_fails_leaves_the_last_good_checkpoint() {
    let whole = whole();
    let experiment = experiment();
    let stopped = command(&experiment, false, &SETTINGS).args(["--stop-at", "2"]).output().unwrap();
    assert!(stopped.status.success(), "{}", stderr(&stopped));
    let (kept, bytes) = (experiment.lora_file(2), fs::read(experiment.lora_file(2)).unwrap());

    // in KiB: enough for the adapters, too little for the optimizer's moments, which are twice as many
    let limit = bytes.len().div_ceil(1024) + 1;
    assert!(
        fs::metadata(experiment.checkpoint(2).join("optimizer.safetensors")).unwrap().len() as usize > limit * 1024
    );
    let limited = format!("ulimit -f {limit} && trap '' XFSZ && exec \"$0\" train --resume run");
    let mut shell = Command::new("bash");
    shell.current_dir(experiment.folder.path()).args(["-c", &limited, env!("CARGO_BIN_EXE_alignprop")]);
    let output = shell.output().unwrap();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    for words in ["step-000003", "the last good checkpoint is run/checkpoints/step-000002", "--resume run", "too large"]
    {
        assert!(message.contains(words), "`{words}` is not in {message}");
    }
    assert!(fs::read(kept).unwrap() == bytes);
    assert!(!experiment.checkpoint(3).exists());
    let output = command(&experiment, true, &[]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same_end(&experiment, &whole);
}

#[cfg(unix)]
#[test]
fn a_run_folder_that_vanishes_is_an_error_and_not_made_again() {
    let experiment = experiment();
    let mut child = start(&experiment, false);
    wait_for(&mut child, || experiment.checkpoint(2).is_dir());
    fs::rename(experiment.run_folder(), experiment.path("elsewhere")).unwrap();
    let output = child.wait_with_output().unwrap();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains(&text(experiment.run_folder())), "{message}");
    assert!(!experiment.run_folder().exists());
    // and what was there goes on from where it is now
    fs::rename(experiment.path("elsewhere"), experiment.run_folder()).unwrap();
    let output = command(&experiment, true, &[]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same_end(&experiment, &whole());
}

#[cfg(unix)]
#[test]
fn a_folder_that_cannot_be_written_to_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let experiment = experiment();
    let folder = experiment.path("locked");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(folder.join("probe"), "").is_ok() {
        eprintln!("skipped: this user may write everywhere");
        return;
    }
    let output = command(&experiment, false, &["run.dir=locked/run"]).output().unwrap();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("locked/run"), "{message}");
}
