//! Whatever bytes a file holds, its reader gives a value or an error: it does not panic, does not hang, takes no memory for
//! a length that is only claimed, and leaves nothing half-written.
//!
//! `cargo test --test fuzz` reads the inputs that once failed (`tests/fuzz/corpus/READER/`) and some changed ones, the same
//! each time. `just fuzz READER SECONDS` goes on for as long as it is told, keeps changing what reached new branches, and puts
//! inputs that fail into `target/fuzz/READER/`. Where the whole process ends (a stack that is used up, memory refused), the input is
//! the last `current` in `target/tmp/fuzz/READER/` or `target/fuzz/READER/`.

mod coverage;
mod memory;
mod mutate;
mod readers;
#[path = "../support/mod.rs"]
mod support;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};
use std::{fs, process, thread};

use coverage::Seen;
use memory::Need;
use mutate::{Rng, change};
use readers::{Reader, reader};

/// The most that a file of some KB may need: a single block, and all together.
const BLOCK: usize = 32 << 20;
const TOGETHER: usize = 96 << 20;

/// Of processor time; most inputs take a thousandth of a second.
const SLOW: Duration = Duration::from_secs(5);

/// Of waiting, after which the process ends.
const HANGS: Duration = Duration::from_secs(120);

thread_local! {
    /// Where the last panic of this thread was, and what it said.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
    /// Whether it is reading an input.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// What each thread reads now, since when, and where its bytes are.
static READING: Mutex<BTreeMap<String, (Instant, PathBuf)>> = Mutex::new(BTreeMap::new());

/// Panics are noted and not printed; an input that takes for ever ends the process.
fn watch() {
    static START: Once = Once::new();
    START.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if INSIDE.get() {
                PANIC.set(info.to_string());
            } else {
                before(info);
            }
        }));
        thread::spawn(|| {
            loop {
                thread::sleep(Duration::from_secs(1));
                let reading = READING.lock().unwrap();
                if let Some((name, (_, path))) = reading.iter().find(|(_, (since, _))| since.elapsed() > HANGS) {
                    println!("HANGS: {name} on {}", path.display());
                    process::abort();
                }
            }
        });
    });
}

fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock is one that Linux has, and `time` is written only.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// One reader at work.
struct Fuzz {
    name: String,
    folder: PathBuf,
    reader: Reader,
    /// Inputs that cannot be read but reached new branches.
    refused: Vec<Vec<u8>>,
    tried: usize,
    accepted: usize,
    /// What went wrong, with the first input that did it.
    failures: BTreeMap<String, PathBuf>,
}

impl Fuzz {
    fn new(name: &str, folder: &Path) -> Self {
        watch();
        let folder = folder.join(name);
        let _ = fs::remove_dir_all(folder.join("files"));
        let mut reader = reader(name, &folder.join("files"));
        reader.seeds.extend(corpus(name));
        Self {
            name: name.into(),
            folder,
            reader,
            refused: Vec::new(),
            tried: 0,
            accepted: 0,
            failures: BTreeMap::new(),
        }
    }

    fn read(&mut self, input: &[u8]) {
        let current = self.folder.join("current");
        // should the process end, the input is here
        fs::write(&current, input).unwrap();
        READING.lock().unwrap().insert(self.name.clone(), (Instant::now(), current));
        let start = thread_time();
        INSIDE.set(true);
        let (result, need) = memory::need(|| catch_unwind(AssertUnwindSafe(|| (self.reader.read)(input).is_ok())));
        INSIDE.set(false);
        let time = thread_time() - start;
        READING.lock().unwrap().remove(&self.name);
        self.tried += 1;
        self.accepted += usize::from(matches!(result, Ok(true)));
        let Need { largest, peak } = need;
        match result {
            Err(_) => self.fail(PANIC.with_borrow(Clone::clone), input),
            Ok(_) if largest > BLOCK + 64 * input.len() => self.fail("took one block of many MB".into(), input),
            Ok(_) if peak > TOGETHER + 64 * input.len() => self.fail("took many MB together".into(), input),
            Ok(_) if time > SLOW => self.fail("took many seconds".into(), input),
            Ok(_) => {}
        }
    }

    fn fail(&mut self, what: String, input: &[u8]) {
        // one input for each place is enough
        let place = what.split(":\n").next().unwrap_or_default().to_owned();
        if self.failures.contains_key(&place) {
            return;
        }
        let path = self.folder.join(format!("failure-{}", self.failures.len()));
        fs::write(&path, input).unwrap();
        println!("FAILED {}: {what}\n  the input: {}", self.name, path.display());
        self.failures.insert(place, path);
    }

    /// What is not changed: the seeds and what once failed.
    fn read_seeds(&mut self) {
        for seed in self.reader.seeds.clone() {
            self.read(&seed);
        }
    }

    /// Mostly of what can be read.
    fn changed(&self, rng: &mut Rng) -> Vec<u8> {
        let seeds = if self.refused.is_empty() || !rng.one_in(3) { &self.reader.seeds } else { &self.refused };
        change(rng, self.reader.shape, seeds, &self.reader.words)
    }

    fn assert_passed(&self) {
        assert!(self.failures.is_empty(), "{}: {:#?}", self.name, self.failures);
    }
}

/// Inputs that once failed.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
    support::listing(&folder).iter().map(|file| fs::read(folder.join(file)).unwrap()).collect()
}

/// A few seconds of one reader.
fn few_seconds(name: &str) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    let mut fuzz = Fuzz::new(name, &folder);
    let (start, mut rng) = (Instant::now(), Rng(7));
    fuzz.read_seeds();
    while fuzz.tried < 3000 && start.elapsed() < Duration::from_secs(2) {
        let input = fuzz.changed(&mut rng);
        fuzz.read(&input);
    }
    println!("{name}: {} inputs, {} of them read", fuzz.tried, fuzz.accepted);
    fuzz.assert_passed();
}

/// `FUZZ_READER` (or all in turn) for `FUZZ_SECONDS` each; `FUZZ_SEED` makes it another walk.
#[test]
#[ignore = "goes on for as long as it is told: just fuzz"]
fn for_hours() {
    let variable = |name: &str| std::env::var(name).ok();
    let number = |name: &str, default: u64| variable(name).map_or(default, |text| text.parse().unwrap());
    let seconds = Duration::from_secs(number("FUZZ_SECONDS", 60));
    let names = variable("FUZZ_READER").filter(|name| name != "all");
    let names = names.map_or(NAMES.map(String::from).to_vec(), |name| vec![name]);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz");
    let mut failed = Vec::new();
    for name in names {
        let mut fuzz = Fuzz::new(&name, &folder);
        let (start, mut rng) = (Instant::now(), Rng(number("FUZZ_SEED", 1)));
        let (mut seen, mut branches) = (Seen::default(), 0);
        branches += seen.new_branches(|| fuzz.read_seeds()).1;
        while start.elapsed() < seconds {
            let (input, accepted) = (fuzz.changed(&mut rng), fuzz.accepted);
            let new = seen.new_branches(|| fuzz.read(&input)).1;
            branches += new;
            if new > 0 && input.len() < 1 << 16 {
                let kept = if fuzz.accepted > accepted { &mut fuzz.reader.seeds } else { &mut fuzz.refused };
                kept.push(input);
            }
        }
        println!(
            "{name}: {} inputs, {} of them read, {} kept, {branches} branches, {} failures",
            fuzz.tried,
            fuzz.accepted,
            fuzz.reader.seeds.len() + fuzz.refused.len(),
            fuzz.failures.len()
        );
        failed.extend(fuzz.failures.into_values());
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

macro_rules! tests {
    ($($test:ident: $name:literal,)*) => {
        $(#[test]
        fn $test() {
            few_seconds($name);
        })*

        /// All readers.
        const NAMES: [&str; [$($name),*].len()] = [$($name),*];
    };
}

tests! {
    safetensors: "safetensors",
    pickle: "pickle",
    lora: "lora",
    lora_pickle: "lora-pickle",
    adapter_config: "adapter-config",
    lora_commands: "lora-commands",
    lora_merged: "lora-merged",
    aesthetic_head: "aesthetic-head",
    unet_config: "unet-config",
    vae_config: "vae-config",
    text_encoder_config: "text-encoder-config",
    clip_config: "clip-config",
    open_clip_config: "open-clip-config",
    preprocessor_config: "preprocessor-config",
    detector_config: "detector-config",
    image_reward_config: "image-reward-config",
    siglip_config: "siglip-config",
    siglip_tokenizer: "siglip-tokenizer",
    word_pieces: "word-pieces",
    scheduler_config: "scheduler-config",
    shards_index: "shards-index",
    yaml: "yaml",
    single_file: "single-file",
    prompts_txt: "prompts-txt",
    prompts_jsonl: "prompts-jsonl",
    prompts_json: "prompts-json",
    prompts_csv: "prompts-csv",
    rows_csv: "rows-csv",
    rows_jsonl: "rows-jsonl",
    texts_in_png: "texts-in-png",
    head_of_fit: "head-of-fit",
    config: "config",
    tokenizer_json: "tokenizer-json",
    tokenizer_config: "tokenizer-config",
    special_tokens: "special-tokens",
    added_tokens: "added-tokens",
    vocab: "vocab",
    merges: "merges",
    prompt: "prompt",
    metrics: "metrics",
    runs: "runs",
    checkpoint_state: "checkpoint-state",
    checkpoint_statistics: "checkpoint-statistics",
}
