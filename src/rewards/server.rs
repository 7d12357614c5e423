//! Servers that are asked with JSON and may be slow, busy or gone for a moment.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Serialize;
use serde::de::IgnoredAny;
use ureq::Agent;
use ureq::http::Response;
use ureq::tls::TlsConfig;
use url::Url;

use crate::config::{ServerConfig, shown};
use crate::models::hub::{bare, is_loopback, root_certs_of_environment};

/// Without a connection for this long there is no server.
const CONNECT: Duration = Duration::from_secs(20);
/// The first pause before a question is asked again, doubled each time, and the longest.
const PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// An address that takes questions.
pub(super) struct Server {
    agent: Agent,
    url: Url,
    key: Option<String>,
    retries: usize,
    concurrency: usize,
}

/// Why there is no answer.
enum Failure {
    /// Another time there may be one, for a busy server after this long.
    Passing(String, Option<Duration>),
    Lasting(String),
}

impl Server {
    /// `key` is what the config calls this server. Asks nothing yet.
    ///
    /// # Errors
    /// The address is none, or the variable with the key is not set.
    pub fn new(config: &ServerConfig, key: &str) -> Result<Self> {
        let url = Url::parse(&config.url).ok().filter(|url| ["http", "https"].contains(&url.scheme()));
        let url = url.with_context(|| {
            format!(
                "{key}.url = \"{}\": give the address of the server, such as http://127.0.0.1:8000/",
                shown(&config.url)
            )
        })?;
        let secret = |name: &String| {
            std::env::var(name).with_context(|| format!("{key}.key_env names the variable {name}, which is not set"))
        };
        let settings = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("alignprop/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT))
            .timeout_global(Some(Duration::from_secs_f64(config.timeout)))
            .tls_config(TlsConfig::builder().root_certs(root_certs_of_environment()?).build());
        let settings = if is_loopback(&url) { settings.proxy(None) } else { settings };
        Ok(Self {
            agent: settings.build().into(),
            url,
            key: config.key_env.as_ref().map(secret).transpose()?,
            retries: config.retries,
            concurrency: config.concurrency,
        })
    }

    /// The address, for messages.
    pub fn name(&self) -> String {
        bare(&self.url)
    }

    /// Answers to many questions, some at a time, in order.
    ///
    /// # Errors
    /// The first that failed; the others that were under way are waited for.
    pub fn ask_all<T: Send>(&self, count: usize, ask: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
        let (next, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let work = || {
            let mut done = Vec::new();
            while failed.load(Ordering::Relaxed) == 0 {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    break;
                }
                let answer = ask(number);
                failed.fetch_add(usize::from(answer.is_err()), Ordering::Relaxed);
                done.push((number, answer));
            }
            done
        };
        let mut answers: Vec<(usize, Result<T>)> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.concurrency.min(count)).map(|_| scope.spawn(work)).collect();
            let joined = workers.into_iter().map(|worker| worker.join().map_err(|_| anyhow!("a thread panicked")));
            joined.collect::<Result<Vec<_>>>().map(|all| all.into_iter().flatten().collect())
        })?;
        answers.sort_by_key(|(number, _)| *number);
        let answers = answers.into_iter().map(|(_, answer)| answer).collect::<Result<Vec<T>>>()?;
        ensure!(answers.len() == count, "{} of {count} answers", answers.len());
        Ok(answers)
    }

    /// The answer to a question. What may pass (no connection, no answer in time, half of one, a busy server) is tried again.
    ///
    /// # Errors
    /// There is none: says why, and how often it was asked.
    pub fn ask(&self, question: &impl Serialize) -> Result<String> {
        let question = serde_json::to_string(question)?;
        let (mut pause, mut asked) = (PAUSE, 0);
        loop {
            asked += 1;
            match self.ask_once(&question) {
                Ok(answer) => return Ok(answer),
                Err(Failure::Passing(_, wanted)) if asked <= self.retries => {
                    std::thread::sleep(wanted.unwrap_or(pause).min(LONGEST_PAUSE));
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                Err(Failure::Passing(why, _)) if asked > 1 => bail!("{} {why} (asked {asked} times)", self.name()),
                Err(Failure::Passing(why, _)) => bail!("{} {why}", self.name()),
                Err(Failure::Lasting(why)) => bail!("{} {why}", self.name()),
            }
        }
    }

    fn ask_once(&self, question: &str) -> Result<String, Failure> {
        let mut request = self.agent.post(self.url.as_str()).content_type("application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let broken = |error: ureq::Error| match error {
            ureq::Error::Timeout(_) => Failure::Passing("gave no answer in time (`timeout`)".to_owned(), None),
            error => Failure::Passing(format!("cannot be asked: {error}"), None),
        };
        let mut answer = request.send(question).map_err(broken)?;
        let status = answer.status();
        let wanted = retry_after(&answer);
        let text = answer.body_mut().with_config().lossy_utf8(true).read_to_string().map_err(broken)?;
        let start = shown(text.chars().take(300).collect::<String>());
        match status.as_u16() {
            200..300 => {}
            408 | 425 | 429 | 500.. => {
                return Err(Failure::Passing(format!("answered with status {status}: {start}"), wanted));
            }
            _ => return Err(Failure::Lasting(format!("answered with status {status}: {start}"))),
        }
        // a server that breaks off without having announced a length
        let is_half = |error: serde_json::Error| error.is_eof();
        if serde_json::from_str::<IgnoredAny>(&text).is_err_and(is_half) {
            return Err(Failure::Passing(format!("answered with half of an answer: `{start}`"), None));
        }
        Ok(text)
    }
}

/// How long a busy server wants to be left alone.
fn retry_after(answer: &Response<ureq::Body>) -> Option<Duration> {
    let seconds: u64 = answer.headers().get("retry-after")?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}
