//! Changes of valid inputs: of bytes and words whatever they are, and of the parts that a format has.

use serde_json::{Value, json};

/// SplitMix64 (Steele et al. 2014).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// What an input consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Text,
    Json,
    /// JSON on each line.
    JsonLines,
    /// A length, a JSON header, data.
    Safetensors,
    /// A zip archive with a pickle.
    Pickle,
}

const NUMBERS: [&str; 22] = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "77",
    "255",
    "256",
    "65536",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "18446744073709551615",
    "1e30",
    "-1e308",
    "1e-320",
    "0.5",
    "nan",
];

const BYTES: [u8; 14] = [0, 1, 0x0a, 0x20, b'"', b'{', b'[', b'(', b'.', b'}', 0x7f, 0x80, 0xc3, 0xff];

/// A changed input: mostly one of `seeds` with some changes, where `words` are what the format may say.
pub fn change(rng: &mut Rng, shape: Shape, seeds: &[Vec<u8>], words: &[&str]) -> Vec<u8> {
    let seed = rng.pick(seeds).clone();
    if rng.one_in(3) {
        return of_bytes(rng, seed, seeds, words);
    }
    let changed = match shape {
        Shape::Text => Some(of_lines(rng, &seed, words)),
        Shape::Json => of_json(rng, &seed, words),
        Shape::JsonLines => of_json_lines(rng, &seed, words),
        Shape::Safetensors => of_safetensors(rng, &seed, words),
        Shape::Pickle => Some(of_pickle(rng, &seed, words)),
    };
    match changed {
        Some(changed) if rng.one_in(8) => of_bytes(rng, changed, seeds, words),
        Some(changed) => changed,
        None => of_bytes(rng, seed, seeds, words),
    }
}

fn of_bytes(rng: &mut Rng, mut x: Vec<u8>, seeds: &[Vec<u8>], words: &[&str]) -> Vec<u8> {
    for _ in 0..=rng.below(4) {
        let at = rng.below(x.len() + 1);
        let end = (at + 1 + rng.below(16)).min(x.len());
        match rng.below(11) {
            0 => x.truncate(at),
            1 if at < x.len() => x[at] ^= 1 << rng.below(8),
            2 if at < x.len() => x[at] = *rng.pick(&BYTES),
            3 => x.insert(at, *rng.pick(&BYTES)),
            4 => drop(x.drain(at..end)),
            5 => drop(x.splice(at..at, x[at..end].to_vec().repeat(1 + rng.below(40)))),
            6 if !words.is_empty() => drop(x.splice(at..at, rng.pick(words).bytes())),
            7 => number_in(rng, &mut x, at),
            8 => {
                // a length in binary
                let value = *rng.pick(&[0u64, 1, 8, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 40, u64::MAX]);
                let width = *rng.pick(&[1, 2, 4, 8]);
                let end = (at + width).min(x.len());
                drop(x.splice(at..end, value.to_le_bytes()[..width].to_vec()));
            }
            9 => {
                let other = rng.pick(seeds);
                let from = rng.below(other.len() + 1);
                x.truncate(at);
                x.extend_from_slice(&other[from..]);
            }
            _ => drop(
                x.splice(
                    at..at,
                    rng.pick(&["[", "{\"a\":", "(", "- ", "a: {", "&a [*a,", "a.", "[[a.", "&amp;", "- - "])
                        .repeat(rng.below(3000))
                        .bytes(),
                ),
            ),
        }
    }
    x
}

/// Another number in place of the first one behind `at`.
fn number_in(rng: &mut Rng, x: &mut Vec<u8>, at: usize) {
    let Some(start) = (at..x.len()).find(|i| x[*i].is_ascii_digit()) else { return };
    let end = (start..x.len()).find(|i| !x[*i].is_ascii_digit()).unwrap_or(x.len());
    x.splice(start..end, rng.pick(&NUMBERS).bytes());
}

fn of_lines(rng: &mut Rng, seed: &[u8], words: &[&str]) -> Vec<u8> {
    let mut lines: Vec<Vec<u8>> = seed.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    for _ in 0..=rng.below(5) {
        let (at, other) = (rng.below(lines.len()), rng.below(lines.len()));
        match rng.below(6) {
            0 if lines.len() > 1 => drop(lines.remove(at)),
            1 => lines.insert(at, lines[other].clone()),
            2 => lines.swap(at, other),
            3 => number_in(rng, &mut lines[at], 0),
            4 if !words.is_empty() => lines.insert(at, rng.pick(words).as_bytes().to_vec()),
            _ => {
                let value = lines[at].iter().position(|byte| b"=:".contains(byte)).map_or(0, |i| i + 1);
                lines[at].truncate(value);
                lines[at].extend(scalar(rng, words).to_string().bytes());
            }
        }
    }
    lines.join(&b'\n')
}

fn scalar(rng: &mut Rng, words: &[&str]) -> Value {
    match rng.below(9) {
        0 => Value::Null,
        1 => json!(rng.one_in(2)),
        2 => json!(""),
        3 => json!([]),
        4 => json!({}),
        5 => json!("é\u{0}\u{fffd}".repeat(rng.below(2000))),
        6 if !words.is_empty() => json!(rng.pick(words)),
        _ => serde_json::from_str(rng.pick::<&str>(&NUMBERS)).unwrap_or(json!("NaN")),
    }
}

/// A text in place of which something is written that serde_json would not write.
const PLACE: &str = "<here>";

fn of_json(rng: &mut Rng, seed: &[u8], words: &[&str]) -> Option<Vec<u8>> {
    let mut json: Value = serde_json::from_slice(seed).ok()?;
    for _ in 0..=rng.below(3) {
        change_json(rng, &mut json, words);
    }
    let text = json.to_string();
    let odd = match rng.below(4) {
        0 => format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000)),
        1 => "NaN".into(),
        2 => "1".repeat(400),
        _ => "{\"a\":1,\"a\":2}".into(),
    };
    Some(text.replace(&format!("\"{PLACE}\""), &odd).into_bytes())
}

/// One change at a place of the tree, the deeper the rarer.
fn change_json(rng: &mut Rng, json: &mut Value, words: &[&str]) {
    let deeper = !rng.one_in(6);
    match json {
        Value::Object(map) if deeper && !map.is_empty() => {
            let key = map.keys().nth(rng.below(map.len())).cloned().unwrap_or_default();
            match rng.below(9) {
                0 => drop(map.shift_remove(&key)),
                1 if !words.is_empty() => {
                    let value = map.shift_remove(&key).unwrap_or_default();
                    map.insert(rng.pick(words).to_string(), value);
                }
                2 if !words.is_empty() => drop(map.insert(rng.pick(words).to_string(), scalar(rng, words))),
                3 => {
                    let value = map.shift_remove(&key).unwrap_or_default();
                    map.insert(other_key(rng, &key), value);
                }
                4 => {
                    let others: Vec<Value> = map.values().cloned().collect();
                    map.insert(key, rng.pick(&others).clone());
                }
                _ => map.get_mut(&key).into_iter().for_each(|value| change_json(rng, value, words)),
            }
        }
        Value::Array(list) if deeper && !list.is_empty() => {
            let at = rng.below(list.len());
            match rng.below(6) {
                0 => drop(list.remove(at)),
                1 => list.insert(at, list[at].clone()),
                2 => list.insert(at, scalar(rng, words)),
                _ => change_json(rng, &mut list[at], words),
            }
        }
        other => *other = if rng.one_in(20) { json!(PLACE) } else { scalar(rng, words) },
    }
}

/// A key that is nearly this one.
fn other_key(rng: &mut Rng, key: &str) -> String {
    let mut parts: Vec<&str> = key.split_inclusive(['.', '_']).collect();
    let (at, other) = (rng.below(parts.len().max(1)), rng.below(parts.len().max(1)));
    match rng.below(4) {
        _ if parts.is_empty() => {}
        0 => drop(parts.remove(at)),
        1 => parts.insert(at, parts[other]),
        2 => parts.swap(at, other),
        _ => parts[at] = rng.pick::<&str>(&NUMBERS),
    }
    parts.concat()
}

fn of_json_lines(rng: &mut Rng, seed: &[u8], words: &[&str]) -> Option<Vec<u8>> {
    let mut lines: Vec<Vec<u8>> = seed.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    for _ in 0..=rng.below(3) {
        let at = rng.below(lines.len());
        match rng.below(4) {
            0 if lines.len() > 1 => drop(lines.remove(at)),
            1 => lines.insert(at, lines[at].clone()),
            _ => lines[at] = of_json(rng, &lines[at], words)?,
        }
    }
    Some(lines.join(&b'\n'))
}

fn of_safetensors(rng: &mut Rng, seed: &[u8], words: &[&str]) -> Option<Vec<u8>> {
    let length = u64::from_le_bytes(seed.get(..8)?.try_into().ok()?) as usize;
    let (header, data) = (seed.get(8..length.checked_add(8)?)?, &seed[8 + length..]);
    let (header, mut data) = (of_json(rng, header, words)?, data.to_vec());
    match rng.below(8) {
        0 => data.truncate(rng.below(data.len() + 1)),
        1 => data.extend(vec![0; rng.below(64)]),
        _ => {}
    }
    let length = if rng.one_in(20) { rng.next() } else { header.len() as u64 };
    Some([&length.to_le_bytes()[..], &header, &data].concat())
}

/// The pickle of an archive that is not compressed, changed in place or made anew; or the archive's bytes.
fn of_pickle(rng: &mut Rng, seed: &[u8], words: &[&str]) -> Vec<u8> {
    let start = seed.windows(2).position(|pair| pair == [0x80, 2]);
    let end = seed.windows(4).skip(4).position(|four| four == b"PK\x03\x04").map(|i| i + 4);
    let (Some(start), Some(end)) = (start, end) else { return of_bytes(rng, seed.to_vec(), &[seed.to_vec()], words) };
    if start >= end {
        return of_bytes(rng, seed.to_vec(), &[seed.to_vec()], words);
    }
    let pickle = seed[start..end].to_vec();
    let made = opcodes(rng, words);
    let pickle = if rng.one_in(2) { made } else { of_bytes(rng, pickle, &[made], words) };
    crate::support::original::zip(&[("archive/data.pkl".into(), pickle), ("archive/data/0".into(), vec![0; 24])])
}

/// A walk over pickle's opcodes, with arguments as they should be, mostly.
fn opcodes(rng: &mut Rng, words: &[&str]) -> Vec<u8> {
    const PLAIN: &[u8] = b"(().)]}Nldtesua0210bRo\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94Q";
    const GLOBALS: [&str; 6] = [
        "ctorch._utils\n_rebuild_tensor_v2\n",
        "ccollections\nOrderedDict\n",
        "ctorch\nFloatStorage\n",
        "ctorch\nHalfStorage\n",
        "ctorch._utils\n_rebuild_parameter\n",
        "cos\nsystem\n",
    ];
    let mut out = vec![0x80, *rng.pick(&[2, 2, 2, 3, 4, 5])];
    for _ in 0..rng.below(60) {
        match rng.below(12) {
            0 => out.extend(rng.pick(&GLOBALS).bytes()),
            1 => out.extend([b'K', *rng.pick(&BYTES)]),
            2 => out.extend([&b"J"[..], &(rng.next() as u32 >> rng.below(32)).to_le_bytes()].concat()),
            3 => out.extend([b'q', rng.below(4) as u8]),
            4 => out.extend([b'h', rng.below(4) as u8]),
            5 => out.extend([&b"r"[..], &(rng.next() as u32 >> rng.below(32)).to_le_bytes()].concat()),
            6 => {
                let width = rng.below(10);
                out.extend([&[0x8a, width as u8][..], &vec![*rng.pick(&BYTES); width]].concat());
            }
            7 | 8 => {
                let word = if words.is_empty() { "w" } else { *rng.pick(words) };
                let length = if rng.one_in(10) { rng.next() as u32 } else { word.len() as u32 };
                match rng.below(3) {
                    0 => out.extend([&[0x8c, word.len() as u8][..], word.as_bytes()].concat()),
                    1 => out.extend([b"B", &length.to_le_bytes()[..], word.as_bytes()].concat()),
                    _ => out.extend([b"X", &length.to_le_bytes()[..], word.as_bytes()].concat()),
                }
            }
            9 => out.extend(
                [&[*rng.pick(b"\x95\x8e\x8d\x96G")][..], &(rng.next() >> rng.below(64)).to_le_bytes()].concat(),
            ),
            _ => out.extend(vec![*rng.pick(PLAIN); if rng.one_in(30) { 1 + rng.below(5000) } else { 1 }]),
        }
    }
    out.push(b'.');
    out
}
