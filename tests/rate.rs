//! Choices in a browser, as the requests that its page makes.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use image::{Rgb, RgbImage};
use serde_json::{Value, json};
use support::program::*;
use support::read_tensors;

/// A running `rate`, which ends with the test.
struct Rate {
    child: Child,
    /// What it prints behind its address.
    stdout: BufReader<std::process::ChildStdout>,
    host: String,
    token: String,
}

impl Rate {
    fn start(folder: &Path, line: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_alignprop"))
            .current_dir(folder)
            .arg("rate")
            .args(line)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut url = String::new();
        stdout.read_line(&mut url).unwrap();
        let (host, token) = url.trim().strip_prefix("http://").and_then(|rest| rest.split_once('/')).unwrap();
        Self { child, stdout, host: host.to_owned(), token: token.trim_end_matches('/').to_owned() }
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, Vec<u8>) {
        let mut stream = TcpStream::connect(&self.host).unwrap();
        let (host, token, length) = (&self.host, &self.token, body.len());
        write!(stream, "{method} /{token}/{path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n{body}")
            .unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let head = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        let status = String::from_utf8_lossy(&answer[9..12]).parse().unwrap();
        (status, answer[head + 4..].to_vec())
    }

    fn state(&self, method: &str, path: &str, body: Value) -> Value {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (status, answer) = self.ask(method, path, &body);
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&answer));
        serde_json::from_slice(&answer).unwrap()
    }

    fn answer(&self, state: &Value, answer: &str) -> Value {
        self.state("POST", "answer", json!({ "id": state["pair"]["id"], "answer": answer }))
    }

    /// How red the left picture of a pair is, less the right one.
    fn redder(&self, state: &Value) -> i32 {
        let red = |side: &str| {
            let (status, bytes) = self.ask("GET", &format!("picture/{}", state["pair"][side]), "");
            assert_eq!(status, 200);
            i32::from(image::load_from_memory(&bytes).unwrap().to_rgb8().get_pixel(0, 0).0[0])
        };
        red("left") - red("right")
    }
}

impl Drop for Rate {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Pictures that are the redder the higher their number.
fn pictures(folder: &Path, count: u8, more: u8) {
    fs::create_dir_all(folder).unwrap();
    for i in 0..count {
        let noise = |k: u8| i.wrapping_mul(91).wrapping_add(k.wrapping_mul(57)) % 120;
        RgbImage::from_pixel(64, 64, Rgb([i * 3 + more, noise(1), noise(2)]))
            .save(folder.join(format!("{i}.png")))
            .unwrap();
    }
}

#[test]
fn choices_survive_a_kill_and_fit_learns_from_them() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    pictures(&at.join("pictures"), 60, 0);
    let line = ["pictures", "-o", "new/choices.jsonl"];
    let chosen = || fs::read_to_string(at.join("new/choices.jsonl")).unwrap().lines().count();
    let mut rate = Rate::start(at, &line);
    let (status, page) = rate.ask("GET", "", "");
    assert!(status == 200 && String::from_utf8(page).unwrap().contains("Which picture is better?"));
    let mut state = rate.state("GET", "pair", Value::Null);
    for i in 1..=90 {
        let answer = if rate.redder(&state) > 0 { "left" } else { "right" };
        let next = rate.answer(&state, answer);
        assert_eq!(next["chosen"], i);
        assert_eq!(chosen(), i, "on disk before it is answered");
        if i == 40 {
            // killed in the middle, and started again
            drop(rate);
            rate = Rate::start(at, &line);
            state = rate.state("GET", "pair", Value::Null);
            assert_eq!((&state["chosen"], &state["pair"]), (&40.into(), &next["pair"]));
        } else {
            state = next;
        }
    }
    // undo, equal, and a second page that is late
    let again = rate.state("POST", "undo", json!({}));
    assert_eq!((&again["chosen"], chosen()), (&89.into(), 89));
    let next = rate.answer(&again, "equal");
    assert!(next["words"].is_null() && chosen() == 90);
    let late = rate.answer(&again, "left");
    assert!(late["words"].as_str().unwrap().contains("another page") && chosen() == 90);
    assert_eq!(rate.answer(&late, "skip")["chosen"], 90);
    for (method, path, body, status) in [
        ("GET", "picture/60", "", 404),
        ("GET", "picture/../c.toml", "", 404),
        ("GET", "picture/-1", "", 404),
        ("POST", "answer", "words", 400),
        ("POST", "answer", "{\"id\": 1}", 400),
        ("DELETE", "", "", 405),
        ("POST", "answer", &"x".repeat(5000), 413),
    ] {
        assert_eq!(rate.ask(method, path, body).0, status, "{method} {path}");
    }
    drop(rate);

    let clip = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/emoji-clip");
    let clip = clip.to_str().unwrap();
    let stdout = succeeds(at, &["fit", "--choices", "new/choices.jsonl", "--clip", clip, "-o", "mine.safetensors"]);
    assert!(stdout.contains("90 choices between") && stdout.contains("1 of them draws"), "{stdout}");
    assert_eq!(read_tensors(&at.join("mine.safetensors"))["head.bias"].dims(), [1]);
}

#[test]
fn a_blind_test_says_who_has_won_when_all_was_seen() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    pictures(&at.join("base"), 12, 0);
    pictures(&at.join("tuned"), 12, 100);
    let line = ["--compare", "tuned", "base", "-o", "choices.jsonl"];
    let mut rate = Rate::start(at, &line);
    let mut state = rate.state("GET", "pair", Value::Null);
    for i in 0..12 {
        assert_eq!(state["total"], 12);
        let wanted = i % 4 != 3; // a quarter of the time the base is liked better
        let answer = if (rate.redder(&state) > 0) == wanted { "left" } else { "right" };
        state = rate.answer(&state, answer);
    }
    assert!(state["pair"].is_null());
    let mut words = String::new();
    rate.stdout.read_to_string(&mut words).unwrap();
    assert!(rate.child.wait().unwrap().success());
    assert!(
        words.contains("tuned was chosen 9 times, base 3 times") && words.contains("win rate of tuned: 0.750"),
        "{words}"
    );
    // and again from the file, without a page
    assert_eq!(succeeds(at, &[&["rate"][..], &line].concat()), words);
    assert_fails(at, &["rate", "--compare", "tuned", "absent"], &["absent"]);
    pictures(&at.join("one"), 1, 0);
    assert_fails(at, &["rate", "one"], &["two pictures at least"]);
}
