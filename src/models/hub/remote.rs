//! Requests to the hub, or to a mirror of it: no more is asked of a server than `huggingface_hub` asks.
//!
//! Ranges serve to go on with a download that broke off, and are not needed; a commit, an ETag or a length that the first
//! answer leaves out is done without.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;
use ureq::http::{Request, Response};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};
use url::{Host, Url};

/// Redirects that are followed.
const HOPS: usize = 10;
/// How often in a row a download may break off without having come further.
const TRIES: usize = 5;
/// Without a byte for this long a connection counts as broken.
const SILENCE: Duration = Duration::from_secs(60);
/// Without a connection for this long there is no server.
const CONNECT: Duration = Duration::from_secs(20);

/// Why a server gives nothing.
#[derive(Clone, Debug)]
pub enum Failure {
    /// It knows the repository and the revision, and no such file.
    NoSuchFile,
    /// It answers with an error: the status, and the hub's words where it has some.
    Status(u16, String),
    /// It does not answer, or not as a hub does.
    Broken(String),
}

impl std::error::Error for Failure {}

impl Failure {
    /// The server knows who asks and what for, and says no.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Status(401 | 403 | 404, _) | Self::NoSuchFile)
    }

    /// A mirror may have the files of a repository, and no list of them.
    pub fn may_have_files(&self) -> bool {
        matches!(self, Self::Status(code, _) if ![401, 403].contains(code))
    }

    fn of(url: &Url, answer: &Response<Body>) -> Self {
        let code = answer.status().as_u16();
        if code == 404 && header(answer, "x-error-code").as_deref() == Some("EntryNotFound") {
            return Self::NoSuchFile;
        }
        let said = header(answer, "x-error-message").map_or(String::new(), |said| format!(": {said}"));
        Self::Status(code, format!("{}{said}", bare(url)))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::NoSuchFile => write!(f, "the hub has no such file"),
            Self::Status(code, said) if self.is_refusal() => write!(
                f,
                "the hub refused it (status {code}, {said}): it does not exist, has no such revision, or is private or gated"
            ),
            Self::Status(code, said) => write!(f, "the hub could not be reached (status {code}, {said})"),
            Self::Broken(cause) => write!(f, "the hub could not be reached ({cause})"),
        }
    }
}

/// A repository's files at a revision.
#[derive(Debug)]
pub struct Listing {
    pub commit: Option<String>,
    pub files: HashSet<String>,
}

/// What a server says of a file.
#[derive(Debug)]
pub struct About {
    url: Url,
    pub commit: Option<String>,
    /// A name of the file's bytes.
    pub etag: Option<String>,
    size: Option<u64>,
}

impl About {
    /// Takes what an answer adds. The hub describes the file before it redirects to where the bytes are; what is not marked as
    /// being about the file counts in the last answer alone.
    fn learn(&mut self, answer: &Response<Body>, last: bool) {
        let etag = |name: &str| header(answer, name).and_then(|etag| name_of_bytes(&etag));
        let number = |name: &str| header(answer, name)?.parse().ok();
        self.commit = self.commit.take().or_else(|| header(answer, "x-repo-commit").filter(|commit| is_name(commit)));
        self.etag = self.etag.take().or_else(|| etag("x-linked-etag"));
        self.size = self.size.or_else(|| number("x-linked-size"));
        if last {
            self.etag = self.etag.take().or_else(|| etag("etag"));
            self.size = self.size.or_else(|| number("content-length").filter(|_| !is_encoded(answer)));
        }
    }

    fn is_complete(&self) -> bool {
        self.commit.is_some() && self.etag.is_some() && self.size.is_some()
    }
}

/// Whether a server is this machine, which no proxy reaches.
pub fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

/// One server, and who asks.
#[derive(Debug)]
pub struct Client {
    endpoint: Url,
    token: Option<String>,
    agent: OnceLock<Agent>,
}

impl Client {
    /// # Errors
    /// The endpoint is no address.
    pub fn new(endpoint: &str, token: Option<String>) -> Result<Self> {
        let url = Url::parse(endpoint).ok().filter(|url| ["http", "https"].contains(&url.scheme()));
        let endpoint = url.with_context(|| {
            format!("HF_ENDPOINT is `{endpoint}`; it has to be the address of a hub, such as https://hub.example.org")
        })?;
        Ok(Self { endpoint, token, agent: OnceLock::new() })
    }

    pub fn endpoint(&self) -> &str {
        self.endpoint.as_str()
    }

    fn agent(&self) -> Result<&Agent, Failure> {
        if let Some(agent) = self.agent.get() {
            return Ok(agent);
        }
        let config = Agent::config_builder()
            // redirects are followed here: a token must not go along
            .max_redirects(0)
            .http_status_as_error(false)
            .user_agent(concat!("alignprop/", env!("CARGO_PKG_VERSION")))
            // the length and the ETag are those of the file itself
            .accept_encoding("identity")
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(SILENCE))
            .tls_config(TlsConfig::builder().root_certs(root_certs_of_environment()?).build());
        Ok(self.agent.get_or_init(|| config.build().into()))
    }

    /// An address below the endpoint.
    fn url<'a>(&'a self, parts: impl IntoIterator<Item = &'a str>) -> Url {
        let mut url = self.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(parts);
        }
        url
    }

    /// One answer, which may be a redirect.
    fn ask(&self, method: &str, url: &Url, from: u64) -> Result<Response<Body>, Failure> {
        let broken = |error: &dyn fmt::Display| Failure::Broken(format!("{}: {error}", bare(url)));
        let mut request = Request::builder().method(method).uri(url.as_str());
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        if let Some(token) = self.token.as_ref().filter(|_| url.origin() == self.endpoint.origin()) {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(()).map_err(|error| broken(&error))?;
        let agent = self.agent()?;
        let mut request = agent.configure_request(request);
        if is_loopback(url) {
            request = request.proxy(None);
        }
        let answer = agent.run(request.build()).map_err(|error| broken(&error))?;
        let good = answer.status().is_success() || next(url, &answer).is_some();
        if good { Ok(answer) } else { Err(Failure::of(url, &answer)) }
    }

    /// The answer behind all redirects.
    fn get(&self, url: &Url, from: u64) -> Result<Response<Body>, Failure> {
        let mut at = url.clone();
        for _ in 0..=HOPS {
            let answer = self.ask("GET", &at, from)?;
            match next(&at, &answer) {
                Some(next) => at = next,
                None => return Ok(answer),
            }
        }
        Err(Failure::Broken(format!("{}: it redirects again and again", bare(url))))
    }

    /// # Errors
    /// There is no such repository, no list, or no server.
    pub fn list(&self, id: &str, revision: &str) -> Result<Listing, Failure> {
        let url = self.url(["api", "models"].into_iter().chain(id.split('/')).chain(["revision", revision]));
        let broken = |error: &dyn fmt::Display| Failure::Broken(format!("{}: {error}", bare(&url)));
        let mut text = String::new();
        let mut body = self.get(&url, 0)?.into_body().into_reader();
        body.read_to_string(&mut text).map_err(|error| broken(&error))?;
        // something else than a list: a server that answers every address with its start page
        let info: Value = serde_json::from_str(&text).map_err(|_| Failure::Status(200, "no list of files".into()))?;
        let names = info["siblings"].as_array().into_iter().flatten();
        Ok(Listing {
            commit: info["sha"].as_str().filter(|commit| is_name(commit)).map(str::to_owned),
            files: names.filter_map(|file| file["rfilename"].as_str()).map(str::to_owned).collect(),
        })
    }

    /// What the server says of a file.
    ///
    /// # Errors
    /// It refuses, or there is no server.
    pub fn about(&self, id: &str, revision: &str, file: &str) -> Result<About, Failure> {
        let url = self.url(id.split('/').chain(["resolve", revision]).chain(file.split('/')));
        let mut about = About { url: url.clone(), commit: None, etag: None, size: None };
        let mut at = url;
        for hop in 0..=HOPS {
            let answer = match self.ask("HEAD", &at, 0) {
                Err(Failure::Status(405 | 501, _)) => self.ask("GET", &at, 0)?,
                // a signed address may be good for a GET alone
                Err(_) if hop > 0 => break,
                answer => answer?,
            };
            let next = next(&at, &answer);
            about.learn(&answer, next.is_none());
            match next {
                Some(next) if !about.is_complete() => at = next,
                _ => break,
            }
        }
        Ok(about)
    }

    /// Writes a file's bytes to `path`, going on with what is there of it already.
    ///
    /// # Errors
    /// The server breaks off again and again, or the disk is full; what came stays, to go on with.
    pub fn fetch(&self, about: &About, path: &Path) -> Result<()> {
        let writing = || format!("writing {}", path.display());
        let mut file = File::options().create(true).append(true).open(path).with_context(writing)?;
        // how much of it came is known to be right only where its length is known
        if about.size.is_none() {
            file.set_len(0).with_context(writing)?;
        }
        let bar = bar(about);
        let (mut furthest, mut tries) = (0, 0);
        while let Err(stop) = self.go_on(about, &mut file, &bar) {
            let failure = match stop {
                Stop::Disk(error) => return Err(error).with_context(writing),
                Stop::Server(failure) => failure,
            };
            let have = file.metadata().with_context(writing)?.len();
            tries = if have > furthest { 1 } else { tries + 1 };
            furthest = furthest.max(have);
            if tries == TRIES || failure.is_refusal() {
                return Err(failure.into());
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        bar.finish_and_clear();
        file.sync_all().with_context(writing)?;
        let have = file.metadata().with_context(writing)?.len();
        if let Some(size) = about.size.filter(|size| *size != have) {
            std::fs::remove_file(path).with_context(writing)?;
            bail!("{} gave {have} bytes and had announced {size}; ask whoever runs the server", bare(&about.url));
        }
        Ok(())
    }

    /// One request of the rest of a file.
    fn go_on(&self, about: &About, file: &mut File, bar: &ProgressBar) -> Result<(), Stop> {
        let broken = |cause: &dyn fmt::Display| Stop::Server(Failure::Broken(format!("{}: {cause}", bare(&about.url))));
        let mut have = file.metadata()?.len();
        if about.size == Some(have) {
            return Ok(());
        }
        if about.size.is_none_or(|size| have > size) {
            file.set_len(0)?;
            have = 0;
        }
        let answer = match self.get(&about.url, have) {
            // no such range: from the beginning, the next time
            Err(failure @ Failure::Status(416, _)) => {
                file.set_len(0)?;
                return Err(Stop::Server(failure));
            }
            answer => answer.map_err(Stop::Server)?,
        };
        // a server without ranges gives the whole file
        if have > 0 && !gives_rest(&answer, have) {
            file.set_len(0)?;
            have = 0;
            if answer.status() == 206 {
                return Err(broken(&"it gives another range than was asked for"));
            }
        }
        if is_encoded(&answer) {
            return Err(broken(&"it compresses the file, which nobody asked for"));
        }
        let chunked = header(&answer, "transfer-encoding").is_some_and(|how| how.to_lowercase().contains("chunked"));
        if about.size.is_none() && !chunked && answer.body().content_length().is_none() {
            return Err(broken(
                &"it tells no length of the file (no Content-Length), so that nobody could see whether all of it came",
            ));
        }
        bar.set_position(have);
        let mut body = answer.into_body().into_reader();
        let mut chunk = vec![0; 1 << 16];
        loop {
            let read = match body.read(&mut chunk) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(broken(&error)),
            };
            file.write_all(&chunk[..read])?;
            bar.inc(read as u64);
        }
        let have = file.metadata()?.len();
        if about.size.is_some_and(|size| have < size) {
            return Err(broken(&format_args!("it broke off after {have} bytes")));
        }
        Ok(())
    }
}

/// Why a download ended early.
enum Stop {
    Server(Failure),
    Disk(std::io::Error),
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Disk(error)
    }
}

/// The certificates that servers are known by.
///
/// # Errors
/// A variable names a file that cannot be read or holds none.
pub fn root_certs_of_environment() -> Result<RootCerts, Failure> {
    root_certs(|name| std::env::var(name).ok())
}

/// The certificates of a company's own authority, from the file that Python reads them from; else those of the web.
fn root_certs(variable: impl Fn(&str) -> Option<String>) -> Result<RootCerts, Failure> {
    let named = |name| Some((name, variable(name).filter(|file| Path::new(file).is_file())?));
    let Some((name, file)) = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"].into_iter().find_map(named)
    else {
        return Ok(RootCerts::WebPki);
    };
    let pem = std::fs::read(&file).map_err(|error| Failure::Broken(format!("{name}: {file}: {error}")))?;
    let certificates: Vec<_> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(Failure::Broken(format!("{name}: {file} holds no certificate")));
    }
    Ok(certificates.into())
}

fn bar(about: &About) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(about.size, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} ({eta})") {
        bar.set_style(style);
    }
    bar.set_message(about.url.path().rsplit('/').next().unwrap_or_default().to_owned());
    bar
}

fn header(answer: &Response<Body>, name: &str) -> Option<String> {
    Some(answer.headers().get(name)?.to_str().ok()?.trim().to_owned())
}

/// Where a redirect goes.
fn next(from: &Url, answer: &Response<Body>) -> Option<Url> {
    let to = header(answer, "location").filter(|_| answer.status().is_redirection())?;
    from.join(&to).ok().filter(|url| ["http", "https"].contains(&url.scheme()))
}

fn is_encoded(answer: &Response<Body>) -> bool {
    header(answer, "content-encoding").is_some_and(|encoding| !encoding.eq_ignore_ascii_case("identity"))
}

/// Whether the answer goes on behind the `have` bytes that are there.
fn gives_rest(answer: &Response<Body>, have: u64) -> bool {
    let begins = |range: String| range.starts_with(&format!("bytes {have}-"));
    answer.status() == 206 && header(answer, "content-range").is_some_and(begins)
}

/// Without what follows the path, which may be a signature.
pub fn bare(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.into()
}

/// Whether it can be the name of a file of the cache.
fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) && !text.starts_with('.')
}

/// An ETag as Python names blobs: without `W/` and quotes; one that is no name counts as absent.
fn name_of_bytes(etag: &str) -> Option<String> {
    let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
    is_name(etag).then(|| etag.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_keeps_the_path_of_the_endpoint_and_quotes_names() {
        let client = Client::new("http://mirror:81/hf/", None).unwrap();
        let url = client.url(["o", "n", "resolve", "refs/pr/1", "a b", "c#1.bin"]);
        assert_eq!(url.as_str(), "http://mirror:81/hf/o/n/resolve/refs%2Fpr%2F1/a%20b/c%231.bin");
        assert_eq!(bare(&Url::parse("http://cdn/a?Signature=x").unwrap()), "http://cdn/a");
    }

    #[test]
    fn the_certificates_of_a_company_are_read_where_python_reads_them() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("company.pem");
        let read = |name| root_certs(|asked| (asked == name).then(|| file.display().to_string()));
        assert!(matches!(read("SSL_CERT_FILE").unwrap(), RootCerts::WebPki));
        std::fs::write(&file, "no certificate").unwrap();
        assert!(read("SSL_CERT_FILE").unwrap_err().to_string().contains("SSL_CERT_FILE"));
        let one = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
        std::fs::write(&file, one.repeat(2)).unwrap();
        assert!(matches!(read("REQUESTS_CA_BUNDLE").unwrap(), RootCerts::Specific(both) if both.len() == 2));
    }

    #[test]
    fn an_etag_is_a_name_or_nothing() {
        assert_eq!(name_of_bytes("W/\"5f-a1\"").as_deref(), Some("5f-a1"));
        assert_eq!(name_of_bytes("\"a1\"").as_deref(), Some("a1"));
        assert_eq!((name_of_bytes("\"../a\""), name_of_bytes("\"\"")), (None, None));
    }
}
