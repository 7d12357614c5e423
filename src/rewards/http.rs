//! Scores of a server: `[reward.http]`, pictures in base64 and numbers back.

use anyhow::{Context, Result};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Serialize;
use serde_json::{Map, Value as Json};

use super::command::scores_of;
use super::images::png_bytes;
use super::server::Server;
use super::{Judge, Score, TapedImages};
use crate::config::{HttpConfig, Prompt};
use crate::ops::{Ledger, Number};

struct Http {
    server: Server,
    /// Pictures in one question.
    batch: usize,
}

/// What is posted; the answer is `{"scores": [..]}`, as that of a program.
#[derive(Serialize)]
struct Question<'a> {
    /// PNG files in base64.
    images: &'a [String],
    prompts: Vec<&'a str>,
    fields: Vec<&'a Map<String, Json>>,
}

/// The score that the config describes.
pub(super) fn http(config: &HttpConfig) -> Result<Judge> {
    let server = Server::new(&config.server, "reward.http.server")?;
    Ok(Judge::Score(Box::new(Http { server, batch: config.batch })))
}

impl Score for Http {
    fn scores(&self, images: &TapedImages, prompts: &[Prompt], _: &mut Ledger) -> Result<Vec<Number>> {
        let pictures = base64_pngs(images)?;
        let batches: Vec<_> = pictures.chunks(self.batch).zip(prompts.chunks(self.batch)).collect();
        let scores = self.server.ask_all(batches.len(), |number| {
            let (images, prompts) = batches[number];
            let (texts, fields) = prompts.iter().map(|p| (&*p.text, &p.fields)).unzip();
            let answer = self.server.ask(&Question { images, prompts: texts, fields })?;
            scores_of(&answer, prompts.len()).with_context(|| self.server.name())
        })?;
        Ok(scores.concat().into_iter().map(Number::from).collect())
    }

    fn is_elsewhere(&self) -> bool {
        true
    }
}

/// Each image as a PNG file in base64.
pub(super) fn base64_pngs(images: &TapedImages) -> Result<Vec<String>> {
    let encoded = |row| Ok(BASE64_STANDARD.encode(png_bytes(&images.image(row)?)?));
    (0..images.batch()?).map(encoded).collect()
}
