//! A program of the user's that stays open and answers lines.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow};

use crate::config::{shown, shown_lines};

/// The longest answer, in bytes.
const LONGEST: u64 = 16 << 20;
/// As much of what the program wrote to stderr is kept for an error, in bytes.
const LAST_WORDS: usize = 2000;
/// How long a program may take to end when nobody asks any more.
const FAREWELL: Duration = Duration::from_secs(5);

/// How long a program may think, and how often it is started again.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For an answer.
    pub answer: Duration,
    /// For the first answer of a program that was just started: it may have a model to load.
    pub first_answer: Duration,
    /// Of one question.
    pub restarts: usize,
}

/// A program that takes a line on its stdin and answers with a line on its stdout, again and again.
pub struct Program {
    /// The program and its arguments.
    words: Vec<String>,
    limits: Limits,
    /// `None` after a failure, until the next question.
    running: Mutex<Option<Running>>,
}

impl Program {
    /// Starts it, so that it can load while others do.
    ///
    /// # Errors
    /// There is no such program.
    pub fn start(words: &[String], limits: Limits) -> Result<Self> {
        let running = Mutex::new(Some(Running::start(words)?));
        Ok(Self { words: words.to_vec(), limits, running })
    }

    /// The answer to a line. A program that ends or is silent for too long is started again and asked once more.
    ///
    /// # Errors
    /// It failed each time: says how, with the end of what it wrote to stderr.
    pub fn ask(&self, question: &str) -> Result<String> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut restarts = 0;
        loop {
            let mut program = match running.take() {
                Some(program) => program,
                None => Running::start(&self.words)?,
            };
            let failure = match program.ask(question, &self.limits) {
                Ok(answer) => {
                    *running = Some(program);
                    return Ok(answer);
                }
                Err(failure) => program.last_words(failure),
            };
            if restarts == self.limits.restarts {
                return Err(failure);
            }
            restarts += 1;
            note!("warning: {}; it is started again", shown_lines(failure.to_string()));
        }
    }

    /// What the program is called in messages.
    pub fn name(&self) -> String {
        name(&self.words)
    }
}

fn name(words: &[String]) -> String {
    format!("the program `{}`", shown(words.join(" ")))
}

/// Why there is no answer.
struct Failure {
    why: String,
    /// It has closed its stdout, so that its status is worth waiting for.
    is_ending: bool,
}

/// One life of the program. Its group of processes is its own: Ctrl-C, which lets a run finish its step, must not end it.
struct Running {
    name: String,
    child: Child,
    questions: Option<Sender<String>>,
    answers: Receiver<std::io::Result<String>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
    has_answered: bool,
}

impl Running {
    fn start(words: &[String]) -> Result<Self> {
        let name = name(words);
        let (program, arguments) = words.split_first().context("no program is named")?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let (mut stdin, stdout) = (child.stdin.take().context("no stdin")?, child.stdout.take().context("no stdout")?);
        let mut stderr = child.stderr.take().context("no stderr")?;
        // a program that does not read must not hold up whoever writes: each pipe has a thread
        let (questions, to_ask) = channel::<String>();
        std::thread::spawn(move || {
            to_ask.iter().all(|line| stdin.write_all(line.as_bytes()).and_then(|()| stdin.flush()).is_ok())
        });
        let (to_tell, answers) = channel();
        std::thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            while let Some(line) = next_line(&mut stdout).transpose() {
                if to_tell.send(line).is_err() {
                    break;
                }
            }
        });
        let stderr = std::thread::spawn(move || {
            let (mut kept, mut piece) = (Vec::new(), [0; 4096]);
            while let Ok(length @ 1..) = stderr.read(&mut piece) {
                kept.extend_from_slice(&piece[..length]);
                kept.drain(..kept.len().saturating_sub(LAST_WORDS));
            }
            kept
        });
        Ok(Self { name, child, questions: Some(questions), answers, stderr: Some(stderr), has_answered: false })
    }

    fn ask(&mut self, question: &str, limits: &Limits) -> Result<String, Failure> {
        if let Ok(Ok(line)) = self.answers.try_recv() {
            let line = shown(line.chars().take(60).collect::<String>());
            let why = format!("wrote `{line}` without being asked: only answers belong on its stdout");
            return Err(Failure { why, is_ending: false });
        }
        // where this fails the program has ended, and so has its stdout
        let _ = self.questions.as_ref().map(|questions| questions.send(format!("{question}\n")));
        let (limit, key) = match self.has_answered {
            true => (limits.answer, "timeout"),
            false => (limits.first_answer, "start_timeout"),
        };
        let (why, is_ending) = match self.answers.recv_timeout(limit) {
            Ok(Ok(answer)) => {
                self.has_answered = true;
                return Ok(answer);
            }
            Ok(Err(error)) => (format!("gave no answer that can be read: {error}"), true),
            Err(RecvTimeoutError::Timeout) => {
                (format!("gave no answer within {} s (`{key}`)", limit.as_secs_f64()), false)
            }
            Err(RecvTimeoutError::Disconnected) => ("gave no answer".to_owned(), true),
        };
        Err(Failure { why, is_ending })
    }

    /// Ends the program, and says what it said.
    fn last_words(mut self, Failure { why, is_ending }: Failure) -> Error {
        let status = if is_ending { self.wait(FAREWELL) } else { None };
        let status = status.map_or(String::new(), |status| format!(" and ended ({status})"));
        self.kill();
        // another process may hold the pipe
        let said = self.stderr.take().filter(|thread| wait_until(FAREWELL, || thread.is_finished()));
        let said = said.and_then(|thread| thread.join().ok()).unwrap_or_default();
        let said = shown_lines(String::from_utf8_lossy(&said).replace('\r', "\n"));
        let said = match said.trim() {
            "" => "; it wrote nothing to stderr".to_owned(),
            said => format!("; its stderr ends with\n{said}"),
        };
        anyhow!("{} {why}{status}{said}", self.name)
    }

    fn wait(&mut self, limit: Duration) -> Option<std::process::ExitStatus> {
        let mut status = None;
        wait_until(limit, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        status
    }

    fn kill(&mut self) {
        #[cfg(unix)]
        if let Ok(group) = i32::try_from(self.child.id())
            && matches!(self.child.try_wait(), Ok(None))
        {
            // SAFETY: `kill` touches no memory of this process. The child is not waited for yet, so its number is not another's,
            // and it is the head of a group of its own (`process_group` in `start`).
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // the end of its stdin tells it
        self.questions = None;
        self.wait(FAREWELL);
        self.kill();
    }
}

/// A line, without its end; `None` at the end.
fn next_line(from: &mut impl BufRead) -> std::io::Result<Option<String>> {
    let mut line = Vec::new();
    from.take(LONGEST).read_until(b'\n', &mut line)?;
    match line.pop() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned())),
        Some(last) => {
            line.push(last);
            let start: String = String::from_utf8_lossy(&line).chars().take(60).collect();
            Err(std::io::Error::other(format!("the line `{}` has no end", shown(start))))
        }
    }
}

/// Whether it comes true in time.
fn wait_until(limit: Duration, mut is: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if is() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    /// A shell script with these limits, in milliseconds.
    fn script(text: &str, answer: u64, first_answer: u64, restarts: usize) -> Program {
        let [answer, first_answer] = [answer, first_answer].map(Duration::from_millis);
        let words = ["sh", "-c", text].map(str::to_owned);
        Program::start(&words, Limits { answer, first_answer, restarts }).unwrap()
    }

    const PATIENT: u64 = 60_000;

    #[test]
    fn a_program_stays_open_and_answers_each_line() {
        let program = script("n=0; while read -r q; do n=$((n+1)); echo \"$n $q\"; done", PATIENT, PATIENT, 0);
        assert_eq!(["a", "b c", "{\"x\": 1}"].map(|q| program.ask(q).unwrap()), ["1 a", "2 b c", "3 {\"x\": 1}"]);
    }

    #[test]
    fn a_program_that_ends_is_started_again_and_asked_once_more() {
        let folder = tempfile::tempdir().unwrap();
        let lives = folder.path().join("lives");
        // answers twice in each life
        let text =
            format!("echo x >> '{0}'; read -r q; echo 1 $q; read -r q; echo 2 $q; read -r q; exit 3", lives.display());
        let program = script(&text, PATIENT, PATIENT, 1);
        assert_eq!(["a", "b", "c", "d"].map(|q| program.ask(q).unwrap()), ["1 a", "2 b", "1 c", "2 d"]);
        assert_eq!(std::fs::read_to_string(lives).unwrap(), "x\nx\n");
    }

    #[test]
    fn a_failure_says_what_the_program_wrote_to_stderr() {
        for (text, limits, parts) in [
            (
                "echo 'no such model' >&2; exit 3",
                (PATIENT, PATIENT),
                ["gave no answer", "exit status: 3", "no such model"],
            ),
            ("read q; printf half", (PATIENT, PATIENT), ["`half` has no end", "exit status: 0", "nothing to stderr"]),
            ("echo loading >&2; sleep 60", (PATIENT, 100), ["within 0.1 s (`start_timeout`)", "loading", "loading"]),
            ("read q; echo 1; sleep 60", (100, PATIENT), ["within 0.1 s (`timeout`)", "nothing", "stderr"]),
            // neither reads nor writes, and its child holds the pipes open
            ("sleep 60 & sleep 60", (100, 100), ["within 0.1 s", "nothing", "stderr"]),
        ] {
            let program = script(text, limits.0, limits.1, 0);
            let long = "q".repeat(100_000); // more than a pipe takes
            let error = std::iter::repeat_with(|| program.ask(&long)).find_map(Result::err).unwrap().to_string();
            assert!(error.starts_with("the program `sh -c "), "{error}");
            for part in parts {
                assert!(error.contains(part), "{text}: {error}");
            }
        }
    }

    #[test]
    fn a_line_that_nobody_asked_for_is_shown() {
        let program = script("read q; echo 1; echo Loading; sleep 60", PATIENT, PATIENT, 0);
        assert_eq!(program.ask("a").unwrap(), "1");
        std::thread::sleep(Duration::from_secs(2)); // it comes at some time
        let error = program.ask("b").unwrap_err().to_string();
        assert!(error.contains("wrote `Loading` without being asked"), "{error}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let limits = Limits { answer: FAREWELL, first_answer: FAREWELL, restarts: 0 };
        let error = Program::start(&["no/such-program".to_owned(), "-x".to_owned()], limits).err().unwrap();
        assert_eq!(error.to_string(), "starting the program `no/such-program -x`");
    }
}
