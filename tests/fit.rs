//! Heads from people's opinions of pictures.

mod support;

use std::fs;
use std::path::Path;

use alignprop::commands::verify::verify;
use image::{Rgb, RgbImage};
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::{Value, json};
use support::program::*;
use support::*;

/// A CLIP that knows colours.
fn clip() -> String {
    text(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/emoji-clip"))
}

/// Pictures `p0.png`.. of shapes on backgrounds; the warm ones have even numbers.
fn pictures(folder: &Path, count: u32) {
    for i in 0..count {
        let noise = |k: u32| (i * 97 + k * 61) * 131 % 100;
        let (strong, weak) = (150 + noise(1) as u8, noise(2) as u8);
        let background =
            if i.is_multiple_of(2) { [strong, noise(3) as u8 + 60, weak] } else { [weak, noise(3) as u8 + 60, strong] };
        let (x0, y0) = (8 + noise(4) % 24, 8 + noise(5) % 24);
        let shape = [noise(6) as u8 * 2, noise(7) as u8 * 2, noise(8) as u8 * 2];
        let inside = |x: u32, y: u32| (x0..x0 + 24).contains(&x) && (y0..y0 + 24).contains(&y);
        let picture = RgbImage::from_fn(64, 64, |x, y| Rgb(if inside(x, y) { shape } else { background }));
        picture.save(folder.join(format!("p{i}.png"))).unwrap();
    }
}

/// What `held out` says of a fit's output.
fn held_out(stdout: &str) -> f64 {
    let line = stdout.lines().find(|line| line.starts_with("held out")).unwrap_or_else(|| panic!("{stdout}"));
    line.split_whitespace().find_map(|word| word.parse().ok()).unwrap()
}

#[test]
fn heads_are_the_optimum_of_their_problem() {
    let report = verify(&fixture("fit"), None).unwrap();
    let failed: Vec<_> = report.rows.iter().filter(|row| !row.pass).collect();
    assert!(failed.is_empty() && report.rows.len() == 20, "{failed:?}");
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&fixture("fit"), folder.path());
    change_tensor(&folder.path().join("choices_0.001.safetensors"), "weight", |w| w * 1.001);
    let report = verify(folder.path(), None).unwrap();
    let failed: Vec<_> = report.rows.iter().filter(|row| !row.pass).map(|row| (&*row.case, &*row.what)).collect();
    assert_eq!(failed, [("choices_0.001", "weight")]);
}

#[test]
#[ignore = "needs ../shared/reference/fit"]
fn the_set_beside_the_repository_is_reproduced() {
    let report = verify(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/reference/fit"), None).unwrap();
    let failed: Vec<_> = report.rows.iter().filter(|row| !row.pass).collect();
    assert!(report.passed(), "{failed:?}");
}

#[test]
fn a_rule_is_learnt_from_every_kind_of_opinion() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let count = 60;
    pictures(at, count);
    let warm = |i: u32| i.is_multiple_of(2);
    let name = |i: u32| format!("p{i}.png");
    let list = |kind: bool| (0..count).filter(|i| warm(*i) == kind).map(name).collect::<Vec<_>>().join("\n");
    fs::write(at.join("warm.csv"), format!("file\n{}\n", list(true))).unwrap();
    fs::write(at.join("cold.csv"), format!("file\n{}\n", list(false))).unwrap();
    let scores: String = (0..count)
        .map(|i| format!("{},{}\n", name(i), if warm(i) { 7.0 } else { 3.0 } + 0.01 * f64::from(i)))
        .collect();
    fs::write(at.join("scores.csv"), format!("file,score\n{scores}")).unwrap();
    let pairs = (0..200).map(|i| (2 * (i * 7 % 30), 2 * (i * 11 % 30) + 1, i % 20 == 3));
    let choices: String = pairs
        .map(|(better, worse, draw)| {
            json!({"better": name(better), "worse": name(worse), "prompt": "x", "draw": draw}).to_string() + "\n"
        })
        .collect();
    fs::write(at.join("choices.jsonl"), choices).unwrap();

    let clip = clip();
    for (opinions, least) in [
        (&["--like", "warm.csv", "--dislike", "cold.csv"][..], 0.9),
        (&["--scores", "scores.csv"], 0.7),
        (&["--choices", "choices.jsonl"], 0.9),
    ] {
        let fit =
            [&["fit", "--clip", &clip, "-o", "mine.safetensors", "--embeddings", "vectors.safetensors"][..], opinions]
                .concat();
        let stdout = succeeds(at, &fit);
        assert!(held_out(&stdout) > least, "{stdout}");
        assert!(
            stdout.contains("chance") && stdout.contains("learning") && stdout.contains("mine.safetensors"),
            "{stdout}"
        );
        // the file is the whole configuration
        let line = [
            "score",
            "p0.png",
            "p1.png",
            "p2.png",
            "p3.png",
            "--format",
            "jsonl",
            "--set",
            "reward.clip-head.head=mine.safetensors",
        ];
        let stdout = succeeds(at, &line);
        let scores: Vec<f64> = stdout
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["clip-head"].as_f64().unwrap())
            .collect();
        assert!(scores[0].min(scores[2]) > scores[1].max(scores[3]), "{opinions:?}: {scores:?}");
        // the vectors that are kept give the same head to the byte
        let bytes = fs::read(at.join("mine.safetensors")).unwrap();
        for i in 0..count {
            fs::rename(at.join(name(i)), at.join(format!("gone{i}"))).unwrap();
        }
        succeeds(at, &fit);
        assert_eq!(fs::read(at.join("mine.safetensors")).unwrap(), bytes);
        for i in 0..count {
            fs::rename(at.join(format!("gone{i}")), at.join(name(i))).unwrap();
        }
    }
}

#[test]
fn opinions_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    pictures(at, 12);
    let clip = clip();
    let fit = |more: &[&str]| {
        [&["fit", "--clip", &clip, "-o", "mine.safetensors"][..], more]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    fs::write(at.join("s.csv"), "file,score\np0.png,1\np1.png,words\n").unwrap();
    fs::write(at.join("c.jsonl"), "{\"better\": \"p0.png\"}\n").unwrap();
    fs::write(at.join("same.csv"), "better,worse\np0.png,p0.png\n").unwrap();
    fs::write(at.join("few.csv"), "better,worse\np0.png,p1.png\n").unwrap();
    for (line, words) in [
        (&["--scores", "s.csv"][..], &["s.csv, row 3", "words"][..]),
        (&["--scores", "s.csv", "--column", "hps"], &["row 2", "`hps`", "--column"]),
        (&["--scores", "absent.csv"], &["absent.csv"]),
        (&["--choices", "c.jsonl"], &["c.jsonl, row 1", "`worse`"]),
        (&["--choices", "same.csv"], &["row 2", "itself"]),
        (&["--choices", "few.csv"], &["too few opinions"]),
        (&["--like", "p0.png", "p1.png", "--dislike", "p1.png"], &["p1.png is both"]),
        (&["--like", "p0.png", "--dislike", "p1.png"], &["too few opinions"]),
    ] {
        let output = alignprop(at).args(fit(line)).assert().code(1);
        let stderr = String::from_utf8(output.get_output().stderr.clone()).unwrap();
        assert!(words.iter().all(|word| stderr.contains(word)) && !stderr.contains("panicked"), "{line:?}: {stderr}");
        assert!(!at.join("mine.safetensors").exists());
    }
    alignprop(at).args(fit(&[])).assert().code(2).stderr(contains("--scores").and(contains("--choices")));
    // vectors of another tower
    fs::write(
        at.join("s.csv"),
        (0..12).map(|i| format!("p{i}.png,{i}\n")).fold("file,score\n".into(), |list: String, row| list + &row),
    )
    .unwrap();
    succeeds(at, &fit(&["--scores", "s.csv", "--embeddings", "v.safetensors"]));
    assert_fails(
        at,
        &fit(&["--scores", "s.csv", "--embeddings", "v.safetensors", "--preprocess", "squash"]),
        &["v.safetensors", "not of this tower"],
    );
}

#[test]
fn a_picture_that_cannot_be_read_takes_its_opinions_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    pictures(at, 40);
    fs::write(at.join("p4.png"), "words").unwrap();
    let list = (0..40).fold("file,score\n".to_owned(), |list, i| list + &format!("p{i}.png,{}\n", i % 2));
    fs::write(at.join("s.csv"), list).unwrap();
    let line = ["fit", "--clip", &clip(), "-o", "new/mine.safetensors", "--scores", "s.csv"];
    let output = alignprop(at).args(line).assert().success();
    output.stdout(contains("scores of 39 pictures")).stderr(contains("p4.png").count(1));
    assert!(at.join("new/mine.safetensors").exists());
}
