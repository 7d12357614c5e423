//! A server on this machine that answers questions in JSON, with faults to choose.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::Value as Json;

/// What is done with a question instead of, or before, a whole answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    None,
    /// The connection is closed without a word.
    Dead,
    /// The announced half of the answer does not come.
    Half,
    /// Half of the answer comes, and no length was announced.
    HalfUnannounced,
    /// No answer for so many milliseconds.
    Slow(u64),
    Status(u16),
}

pub struct Server {
    pub url: String,
    /// The questions, and the heads of their requests.
    pub asked: Arc<Mutex<Vec<(String, Json)>>>,
    /// The most that were under way at a time.
    pub at_once: Arc<AtomicUsize>,
}

impl Server {
    /// Request `n`, counted from 0, meets `fault(n)`; `answer` makes the whole answer.
    pub fn start(
        fault: impl Fn(usize) -> Fault + Send + Sync + 'static,
        answer: impl Fn(&Json) -> String + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (under_way, at_once) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (seen, most, handlers) = (asked.clone(), at_once.clone(), Arc::new((fault, answer)));
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let (seen, most, under_way, handlers) =
                    (seen.clone(), most.clone(), under_way.clone(), handlers.clone());
                std::thread::spawn(move || {
                    most.fetch_max(under_way.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    let mut stream = stream.unwrap();
                    let (head, question) = read(&stream);
                    let whole = (handlers.1)(&question);
                    seen.lock().unwrap().push((head, question));
                    reply(&mut stream, (handlers.0)(number), &whole);
                    under_way.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { url, asked, at_once }
    }

    pub fn count(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

fn read(stream: &TcpStream) -> (String, Json) {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line.trim().is_empty() {
            break;
        }
        let lower = line.to_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        head += &lower;
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    (head, serde_json::from_slice(&body).unwrap())
}

fn reply(stream: &mut TcpStream, fault: Fault, whole: &str) {
    let status = if let Fault::Status(code) = fault { format!("{code} No") } else { "200 OK".to_owned() };
    let length = match fault {
        Fault::HalfUnannounced => String::new(),
        _ => format!("content-length: {}\r\n", whole.len()),
    };
    let sent = if matches!(fault, Fault::Half | Fault::HalfUnannounced) { &whole[..whole.len() / 2] } else { whole };
    match fault {
        Fault::Dead => return,
        Fault::Slow(milliseconds) => std::thread::sleep(std::time::Duration::from_millis(milliseconds)),
        _ => {}
    }
    // a client that has left is no matter here
    let _ = write!(stream, "HTTP/1.1 {status}\r\nconnection: close\r\nretry-after: 0\r\n{length}\r\n{sent}");
}
