//! A hub on this machine, for tests: one repository, `owner/name` at commit `c0`, with faults to choose.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::settings::Settings;

/// The one file that the server has.
pub const FILE: &str = "unet/config.json";
pub const BODY: &str = r#"{"a": 1, "b": "a text of some length"}"#;
pub const DEAD: &str = "http://127.0.0.1:1";

/// What a server leaves out or does otherwise.
#[derive(Clone, Default)]
pub struct Faults {
    pub no_commit: bool,
    pub no_etag: bool,
    pub etag: Option<&'static str>,
    pub no_ranges: bool,
    pub no_head: bool,
    /// The answer has no length and is sent in chunks.
    pub chunked: bool,
    /// Neither a length nor chunks.
    pub unframed: bool,
    /// The file's bytes are elsewhere: an address, or a path of the server.
    pub redirect: Option<String>,
    /// So many answers with the file end in the middle.
    pub truncated: usize,
    /// The status of the answer for the list.
    pub no_list: Option<u16>,
    /// The status of each answer.
    pub refuses: Option<u16>,
    /// The path below which the hub is.
    pub below: &'static str,
}

pub struct Server {
    pub endpoint: String,
    /// Heads of all requests, in lower case.
    pub asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub fn start(faults: &Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}{}", listener.local_addr().unwrap(), faults.below);
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (seen, mut faults) = (asked.clone(), faults.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let request = head_of(&mut stream);
                seen.lock().unwrap().push(request.to_lowercase());
                answer(&mut stream, &request, &mut faults);
            }
        });
        Self { endpoint, asked }
    }

    pub fn settings(&self, cache: &Path) -> Settings {
        Settings { endpoint: self.endpoint.clone(), cache: cache.into(), token: None, offline: false }
    }

    /// The requests whose head has this text.
    pub fn requests(&self, text: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|request| request.contains(text)).count()
    }
}

fn head_of(stream: &mut TcpStream) -> String {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) > 0 {
        request.push(byte[0]);
    }
    String::from_utf8(request).unwrap()
}

fn answer(stream: &mut TcpStream, request: &str, faults: &mut Faults) {
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap(), words.next().unwrap_or_default());
    let path = path.strip_prefix(faults.below).unwrap_or_default();
    let is_head = method == "HEAD";
    let mut reply = |status: &str, headers: &str, body: &str| {
        let body = if is_head { "" } else { body };
        // a client that has left is no matter here
        let _ = write!(stream, "HTTP/1.1 {status}\r\nconnection: close\r\n{headers}\r\n{body}");
    };
    let sized = |body: &str| format!("content-length: {}\r\n", body.len());
    let status = |code: u16| (format!("{code} No"), sized(""));
    if let Some(code) = faults.refuses {
        let (line, length) = status(code);
        return reply(&line, &format!("x-error-message: ask the owner\r\n{length}"), "");
    }
    if path == "/api/models/owner/name/revision/main" {
        if let Some(code) = faults.no_list {
            let (line, length) = status(code);
            return reply(&line, &length, "");
        }
        let list = format!(r#"{{"sha": "c0", "siblings": [{{"rfilename": "{FILE}"}}]}}"#);
        return reply("200 OK", &sized(&list), &list);
    }
    let moved = path.starts_with("/moved");
    if path.trim_start_matches("/moved") != format!("/owner/name/resolve/main/{FILE}") {
        return reply("404 No", &format!("x-error-code: EntryNotFound\r\n{}", sized("")), "");
    }
    if is_head && faults.no_head {
        return reply("405 No", &sized(""), "");
    }
    let mut headers = String::new();
    if !faults.no_commit && !moved {
        headers += "x-repo-commit: c0\r\n";
    }
    let etag = faults.etag.unwrap_or("\"e1\"");
    if let Some(to) = faults.redirect.as_ref().filter(|_| !moved) {
        headers += &format!("location: {to}/moved{path}\r\nx-linked-etag: {etag}\r\n{}", sized(""));
        return reply("302 Found", &headers, "");
    }
    if !faults.no_etag {
        headers += &format!("etag: {etag}\r\n");
    }
    let range = request.to_lowercase().split_once("range: bytes=").map(|(_, rest)| rest.to_owned());
    let from = range.filter(|_| !faults.no_ranges).and_then(|range| range.split('-').next()?.parse().ok()).unwrap_or(0);
    let body = &BODY[from..];
    let line = if from > 0 { "206 Partial Content" } else { "200 OK" };
    if from > 0 {
        headers += &format!("content-range: bytes {from}-{}/{}\r\n", BODY.len() - 1, BODY.len());
    }
    let cut = !is_head && faults.truncated > 0;
    if cut {
        faults.truncated -= 1;
    }
    let sent = if cut { &body[..body.len() / 2] } else { body };
    if faults.unframed {
        reply(line, &headers, sent);
    } else if faults.chunked {
        let end = if cut { "" } else { "0\r\n\r\n" };
        reply(
            line,
            &format!("{headers}transfer-encoding: chunked\r\n"),
            &format!("{:x}\r\n{sent}\r\n{end}", sent.len()),
        );
    } else {
        reply(line, &format!("{headers}{}", sized(body)), sent);
    }
}
