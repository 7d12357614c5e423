//! `alignprop rate`: choices between pictures, in a browser on this machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value as Json, json};

use crate::cli::RateArgs;
use crate::files::{check_writable, make_folder_of};
use crate::pictures;
use crate::rate::{Answer, Request, Response, Server, Session, Tally};

const PAGE: &str = include_str!("../rate/page.html");

pub fn run(args: &RateArgs) -> Result<()> {
    check_writable(&args.output)?;
    let mut session = match &*args.compare {
        [first, second] => {
            let (first, second) = (by_name(first)?, by_name(second)?);
            make_folder_of(&args.output)?;
            Session::blind(&first, &second, &args.output, args.seed)?
        }
        _ => {
            let pictures = pictures::collect(&args.pictures)?.into_iter().map(|picture| picture.file).collect();
            make_folder_of(&args.output)?;
            Session::new(pictures, &args.output, args.seed)?
        }
    };
    if let Some(tally) = session.result() {
        return say_result(args, tally);
    }
    let server = Server::bind(args.port)?;
    say!("{}", server.url());
    note!(
        "open this address in a browser on this machine; each choice is in {} at once; Ctrl-C ends",
        args.output.display()
    );
    let session = Mutex::new(session);
    let locked = || session.lock().unwrap_or_else(PoisonError::into_inner);
    server.run(|request| answer(&mut locked(), request), || locked().result().is_some())?;
    let tally = locked().result().unwrap_or_default();
    say_result(args, tally)
}

/// The pictures of a folder by their names in it.
fn by_name(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let pictures = pictures::collect(&[folder.to_owned()])?.into_iter();
    let named = pictures.map(|picture| {
        let name = picture.file.strip_prefix(folder).unwrap_or(&picture.file).to_string_lossy().into_owned();
        (name, picture.file)
    });
    Ok(named.collect())
}

fn answer(session: &mut Session, request: &Request) -> Response {
    let mut respond = || -> Result<Response> {
        Ok(match (&*request.method, &*request.path) {
            ("GET", "") => Response::new(200, "text/html; charset=utf-8", PAGE),
            ("GET", "pair") => state(session, None),
            ("GET", path) => match path.strip_prefix("picture/").and_then(|place| session.picture(place.parse().ok()?))
            {
                Some(file) => picture(file)?,
                None => Response::error(404, "there is no such page"),
            },
            ("POST", "answer") => {
                #[derive(Deserialize)]
                struct Given {
                    id: u64,
                    answer: Answer,
                }
                let Ok(Given { id, answer }) = serde_json::from_slice(&request.body) else {
                    return Ok(Response::error(
                        400,
                        "an answer is {\"id\": 0, \"answer\": \"left\"}, or right, equal, skip",
                    ));
                };
                let taken = session.answer(id, answer)?;
                state(session, (!taken).then_some("That pair was answered on another page."))
            }
            ("POST", "undo") => {
                let undone = session.undo()?;
                state(session, (!undone).then_some("There is nothing to undo."))
            }
            _ => Response::error(405, "there is no such request"),
        })
    };
    respond().unwrap_or_else(|error| {
        note!("warning: {error:#}");
        Response::error(500, &format!("{error:#}"))
    })
}

/// What the page shows.
fn state(session: &mut Session, words: Option<&str>) -> Response {
    let pair = session.next().map(|pair| json!({ "id": pair.id, "left": pair.left, "right": pair.right }));
    let pair = pair.unwrap_or(Json::Null);
    Response::json(&json!({ "pair": pair, "chosen": session.chosen(), "total": session.total(), "words": words }))
}

fn picture(file: &Path) -> Result<Response> {
    let bytes = std::fs::read(file).with_context(|| format!("reading the picture {}", file.display()))?;
    Ok(match image::guess_format(&bytes) {
        Ok(format) => Response::new(200, format.to_mime_type(), bytes),
        Err(_) => Response::error(415, &format!("{} is no picture", file.display())),
    })
}

fn say_result(args: &RateArgs, tally: Tally) -> Result<()> {
    let [first, second] = &*args.compare else { return Ok(()) };
    let Tally { first: wins, second: losses, draws } = tally;
    say!("{} was chosen {wins} times, {} {losses} times, neither {draws} times", first.display(), second.display());
    match tally.win_rate() {
        Some((rate, low, high)) => {
            say!("win rate of {}: {rate:.3}, 95% interval {low:.3} to {high:.3}, without draws", first.display());
        }
        None => say!("there is no win rate: nothing but draws"),
    }
    Ok(())
}
