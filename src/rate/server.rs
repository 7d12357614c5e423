//! A server for one page on this machine: loopback only, behind a token that nobody can guess, one answer a connection.
//!
//! A page of another site cannot use it: it does not know the token, and the names in `Host` and `Origin` must be this
//! server's own. Nothing is looked up by a path of the request.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

/// What a request may have of each, in bytes.
const HEAD: usize = 8 << 10;
const BODY: usize = 4 << 10;

/// How long a request may take to arrive, and an answer to be taken.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connections at one time; more are closed.
const CONNECTIONS: usize = 32;

/// A request that passed the checks.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    /// Behind the token: `` for the page, `pair`, `picture/3`.
    pub path: String,
    pub body: Vec<u8>,
}

/// A request without its body.
struct Head {
    method: String,
    path: String,
    /// Where the body begins, and its bytes.
    start: usize,
    length: usize,
}

pub struct Response {
    pub status: u16,
    /// The `Content-Type`.
    pub kind: &'static str,
    pub body: Vec<u8>,
}

impl Response {
    pub fn new(status: u16, kind: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Self { status, kind, body: body.into() }
    }

    pub fn json(value: &serde_json::Value) -> Self {
        Self::new(200, "application/json", value.to_string())
    }

    /// A refusal in words.
    pub fn error(status: u16, words: &str) -> Self {
        Self::new(status, "text/plain; charset=utf-8", words)
    }
}

pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    token: String,
}

impl Server {
    /// On 127.0.0.1; port 0 is any that is free.
    ///
    /// # Errors
    /// The port is taken, or the system has no random numbers.
    pub fn bind(port: u16) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .with_context(|| format!("listening on 127.0.0.1:{port}: give another --port"))?;
        let mut token = [0u8; 16];
        getrandom::fill(&mut token).map_err(|error| anyhow!("no random numbers for a token: {error}"))?;
        let token = token.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { address: listener.local_addr()?, listener, token })
    }

    /// Where the page is.
    pub fn url(&self) -> String {
        format!("http://{}/{}/", self.address, self.token)
    }

    /// Answers requests until `done` holds behind an answer.
    ///
    /// # Errors
    /// No connection can be taken any more.
    pub fn run(&self, answer: impl Fn(&Request) -> Response + Sync, done: impl Fn() -> bool + Sync) -> Result<()> {
        let (open, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (open, stop, answer, done) = (&open, &stop, &answer, &done);
        std::thread::scope(|scope| {
            while !stop.load(Ordering::SeqCst) {
                let stream = match self.listener.accept() {
                    Ok((stream, _)) => stream,
                    // the client has left, or there are no more files to be had for a moment
                    Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                    Err(_) => {
                        std::thread::sleep(Duration::from_millis(50));
                        continue;
                    }
                };
                if open.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS {
                    open.fetch_sub(1, Ordering::SeqCst);
                    continue; // closes it
                }
                scope.spawn(move || {
                    self.serve(&stream, answer);
                    open.fetch_sub(1, Ordering::SeqCst);
                    if done() && !stop.swap(true, Ordering::SeqCst) {
                        // the loop waits for a connection
                        drop(TcpStream::connect(self.address));
                    }
                });
            }
        });
        Ok(())
    }

    fn serve(&self, stream: &TcpStream, answer: &impl Fn(&Request) -> Response) {
        let _ = stream.set_write_timeout(Some(PATIENCE));
        let response = match self.read(stream) {
            Ok(request) => answer(&request),
            Err(refused) => refused,
        };
        // whoever has gone needs no answer
        let _ = write(stream, &response);
        let _ = stream.shutdown(Shutdown::Write);
        // what was sent and not read must not reset the connection before the answer is taken
        let _ = stream.set_read_timeout(Some(Duration::from_millis(100)));
        let _ = { stream }.read(&mut [0; HEAD]);
    }

    fn read(&self, mut stream: &TcpStream) -> Result<Request, Response> {
        let deadline = Instant::now() + PATIENCE;
        let (mut bytes, mut chunk) = (Vec::new(), [0; 2048]);
        loop {
            if let Some(Head { method, path, start, length }) = self.head(&bytes)? {
                if bytes.len() >= start + length {
                    return Ok(Request { method, path, body: bytes[start..start + length].to_vec() });
                }
            } else if bytes.len() > HEAD {
                return Err(Response::error(431, "too long a head"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || stream.set_read_timeout(Some(left)).is_err() {
                return Err(Response::error(408, "too slow"));
            }
            match stream.read(&mut chunk) {
                Ok(0) => return Err(Response::error(400, "half a request")),
                Ok(n) => bytes.extend_from_slice(&chunk[..n]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Response::error(408, "too slow")),
            }
        }
    }

    /// Checks a whole head; nothing while some of it is missing.
    fn head(&self, bytes: &[u8]) -> Result<Option<Head>, Response> {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut parsed = httparse::Request::new(&mut headers);
        let start = match parsed.parse(bytes) {
            Ok(httparse::Status::Complete(start)) => start,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(_) => return Err(Response::error(400, "no request of HTTP/1")),
        };
        let all = |name: &str| {
            let values = parsed.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name));
            values.map(|header| String::from_utf8_lossy(header.value).trim().to_owned()).collect::<Vec<_>>()
        };
        let port = self.address.port();
        let own = [format!("127.0.0.1:{port}"), format!("localhost:{port}")];
        let hosts = all("host");
        if hosts.len() != 1 || !own.contains(&hosts[0]) {
            return Err(Response::error(403, "another host"));
        }
        if all("origin").iter().any(|origin| own.iter().all(|own| *origin != format!("http://{own}"))) {
            return Err(Response::error(403, "another site"));
        }
        let path = parsed.path.unwrap_or_default().strip_prefix('/').and_then(|path| path.strip_prefix(&*self.token));
        let Some(path) = path.and_then(|path| path.strip_prefix('/')) else {
            return Err(Response::error(
                404,
                "nothing is here: the address is the whole line that `alignprop rate` printed",
            ));
        };
        if !all("transfer-encoding").is_empty() {
            return Err(Response::error(411, "a body of no length"));
        }
        let length = match &*all("content-length") {
            [] => 0,
            [length] => length.parse().map_err(|_| Response::error(400, "no length"))?,
            _ => return Err(Response::error(400, "two lengths")),
        };
        if length > BODY {
            return Err(Response::error(413, "too long a body"));
        }
        let method = parsed.method.unwrap_or_default().to_owned();
        Ok(Some(Head { method, path: path.to_owned(), start, length }))
    }
}

fn write(mut stream: &TcpStream, response: &Response) -> std::io::Result<()> {
    // nothing from elsewhere, and this page nowhere else
    const POLICY: &str = "default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; \
                          script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let head = format!(
        "HTTP/1.1 {} \r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\nCache-Control: no-store\r\n\
         X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\nCross-Origin-Resource-Policy: same-origin\r\n\
         Content-Security-Policy: {POLICY}\r\n\r\n",
        response.status,
        response.kind,
        response.body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(&response.body)?;
    stream.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the server says to these bytes.
    fn said(server: &Server, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(server.address).unwrap();
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[test]
    fn only_requests_with_the_token_from_its_own_page_are_answered() {
        let server = Server::bind(0).unwrap();
        let (port, token, stop) = (server.address.port(), server.token.clone(), AtomicBool::new(false));
        assert_eq!(server.url(), format!("http://127.0.0.1:{port}/{token}/"));
        let echo = |request: &Request| {
            Response::new(
                200,
                "text/plain",
                format!("{} [{}] {}", request.method, request.path, String::from_utf8_lossy(&request.body)),
            )
        };
        std::thread::scope(|scope| {
            scope.spawn(|| server.run(echo, || stop.load(Ordering::SeqCst)).unwrap());
            let get = |path: &str, headers: &str| {
                said(&server, format!("GET {path} HTTP/1.1\r\n{headers}\r\n\r\n").as_bytes())
            };
            let own = format!("Host: 127.0.0.1:{port}");
            let answer = get(&format!("/{token}/picture/3"), &own);
            assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("GET [picture/3] "), "{answer}");
            assert!(answer.contains("Content-Security-Policy: default-src 'none'"), "{answer}");
            assert!(get(&format!("/{token}/"), &format!("Host: localhost:{port}")).ends_with("GET [] "));
            for (path, headers, status) in [
                (format!("/{token}/"), "Host: evil.example".to_owned(), 403),
                (format!("/{token}/"), format!("Host: evil.example:{port}"), 403),
                (format!("/{token}/"), "X: y".to_owned(), 403),
                (format!("/{token}/"), format!("{own}\r\nHost: evil.example"), 403),
                (format!("/{token}/"), format!("{own}\r\nOrigin: http://evil.example"), 403),
                ("/".to_owned(), own.clone(), 404),
                (format!("/{}/", "0".repeat(32)), own.clone(), 404),
                (format!("/../{token}/"), own.clone(), 404),
                ("/etc/passwd".to_owned(), own.clone(), 404),
                (format!("/{token}/"), format!("{own}\r\nContent-Length: 5000000000"), 413),
                (format!("/{token}/"), format!("{own}\r\nContent-Length: -1"), 400),
                (format!("/{token}/"), format!("{own}\r\nContent-Length: 1\r\nContent-Length: 2"), 400),
                (format!("/{token}/"), format!("{own}\r\nTransfer-Encoding: chunked"), 411),
                (format!("/{token}/"), format!("{own}\r\nX: {}", "y".repeat(9000)), 200),
            ] {
                let answer = get(&path, &headers);
                assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{path} {headers:.60}: {answer}");
                assert!(status == 200 || !answer.contains(&token), "{answer}");
            }
            assert!(said(&server, &[b'x'; 20_000]).starts_with("HTTP/1.1 4"));
            assert!(said(&server, &[0; 64]).starts_with("HTTP/1.1 400"));
            let post = format!(
                "POST /{token}/answer HTTP/1.1\r\n{own}\r\nOrigin: http://127.0.0.1:{port}\r\nContent-Length: 5\r\n\r\nhello"
            );
            assert!(said(&server, post.as_bytes()).ends_with("POST [answer] hello"));
            // many that say nothing: others are still answered when these have been given up
            let idle: Vec<TcpStream> =
                (0..CONNECTIONS + 8).map(|_| TcpStream::connect(server.address).unwrap()).collect();
            drop(idle);
            let start = Instant::now();
            while !get(&format!("/{token}/"), &own).starts_with("HTTP/1.1 200") {
                assert!(start.elapsed() < 4 * PATIENCE);
                std::thread::sleep(Duration::from_millis(50));
            }
            stop.store(true, Ordering::SeqCst);
            said(&server, b"GET / HTTP/1.1\r\n\r\n");
        });
    }
}
