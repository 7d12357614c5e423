//! What a picture was painted from, as training sets and other programs keep it beside or inside the picture.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value as Json};

use super::Picture;
use crate::config::decode;

/// The prompt of a picture: its list's, else that of a `.txt` of the same name, else what AUTOMATIC1111 or ComfyUI wrote into a PNG.
///
/// # Errors
/// The `.txt` is no text.
pub fn prompt_of(picture: &Picture) -> Result<Option<String>> {
    if picture.prompt.is_some() {
        return Ok(picture.prompt.clone());
    }
    if let Ok(bytes) = std::fs::read(picture.file.with_extension("txt")) {
        let words = decode(&bytes)?.split_whitespace().collect::<Vec<_>>().join(" ");
        if !words.is_empty() {
            return Ok(Some(words));
        }
    }
    Ok(text_in_png(&picture.file))
}

/// The prompt among the texts of a PNG; `None` where it has none, or is none.
pub fn text_in_png(path: &Path) -> Option<String> {
    let reader = png::Decoder::new(BufReader::new(File::open(path).ok()?)).read_info().ok()?;
    let info = reader.info();
    let latin = info.uncompressed_latin1_text.iter().map(|chunk| (&chunk.keyword, chunk.text.clone()));
    let compressed =
        info.compressed_latin1_text.iter().filter_map(|chunk| Some((&chunk.keyword, chunk.get_text().ok()?)));
    let unicode = info.utf8_text.iter().filter_map(|chunk| Some((&chunk.keyword, chunk.get_text().ok()?)));
    let texts: Vec<(&String, String)> = latin.chain(compressed).chain(unicode).collect();
    let text = |name: &str| texts.iter().find(|(keyword, _)| *keyword == name).map(|(_, text)| text.as_str());
    let prompt = text("parameters").map(of_parameters).or_else(|| of_workflow(text("prompt")?))?;
    let prompt = prompt.split_whitespace().collect::<Vec<_>>().join(" ");
    (!prompt.is_empty()).then_some(prompt)
}

/// AUTOMATIC1111's `parameters`: the prompt, `Negative prompt: ..` and `Steps: ..`, each from a line of its own.
fn of_parameters(text: &str) -> String {
    let is_next = |line: &str| line.starts_with("Negative prompt:") || line.starts_with("Steps: ");
    text.lines().take_while(|line| !is_next(line)).collect::<Vec<_>>().join(" ")
}

/// ComfyUI's graph: the text that the sampler's positive input leads back to.
fn of_workflow(text: &str) -> Option<String> {
    let nodes: Map<String, Json> = serde_json::from_str(text).ok()?;
    let link = |node: &Json, key: &str| Some(node.get("inputs")?.get(key)?.as_array()?.first()?.as_str()?.to_owned());
    // samplers first, then guiders and whatever else has a condition
    let (samplers, others): (Vec<_>, Vec<_>) = nodes.values().partition(|node| link(node, "latent_image").is_some());
    let condition = |node: &&Json| link(node, "positive").or_else(|| link(node, "conditioning"));
    let mut starts = samplers.iter().chain(&others).filter_map(condition);
    starts.find_map(|start| text_behind(&nodes, &start, DEEPEST))
}

/// Links that are followed.
const DEEPEST: usize = 32;

fn text_behind(nodes: &Map<String, Json>, id: &str, depth: usize) -> Option<String> {
    let inputs = nodes.get(id)?.get("inputs")?.as_object()?;
    let keys = [
        "text",
        "text_g",
        "string",
        "value",
        "prompt",
        "positive",
        "conditioning",
        "conditioning_1",
        "clip_l",
        "t5xxl",
    ];
    let inputs = keys.iter().filter_map(|key| inputs.get(*key));
    inputs.into_iter().find_map(|input| match input {
        Json::String(text) if !text.trim().is_empty() => Some(text.clone()),
        Json::Array(link) if depth > 0 => text_behind(nodes, link.first()?.as_str()?, depth - 1),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A PNG with these texts: before `|` the keyword, `u:` in front of one in Unicode, `z:` of a compressed one.
    fn png(path: &Path, texts: &[(&str, &str)]) {
        let mut encoder = png::Encoder::new(File::create(path).unwrap(), 1, 1);
        for (keyword, text) in texts {
            match keyword.split_at_checked(2) {
                Some(("u:", keyword)) => encoder.add_itxt_chunk(keyword.into(), (*text).into()),
                Some(("z:", keyword)) => encoder.add_ztxt_chunk(keyword.into(), (*text).into()),
                _ => encoder.add_text_chunk((*keyword).into(), (*text).into()),
            }
            .unwrap();
        }
        encoder.write_header().unwrap().write_image_data(&[9]).unwrap();
    }

    const GRAPH: &str = r#"{
        "3": {"class_type": "KSampler", "inputs": {"seed": 1, "latent_image": ["5", 0], "positive": ["9", 0], "negative": ["7", 0]}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["8", 0], "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "ugly", "clip": ["4", 1]}},
        "8": {"class_type": "PrimitiveString", "inputs": {"value": "a blue\nyak"}},
        "9": {"class_type": "ControlNetApply", "inputs": {"conditioning": ["6", 0], "strength": 1}}
    }"#;

    #[test]
    fn prompts_of_other_programs_are_found_in_png() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let found = |texts: &[(&str, &str)]| {
            png(&path, texts);
            text_in_png(&path)
        };
        let parameters = "a red cat,\nbest quality\nNegative prompt: ugly\nSteps: 20, Sampler: Euler a";
        let (cat, yak) = (Some("a red cat, best quality".to_owned()), Some("a blue yak".to_owned()));
        assert_eq!(found(&[("Software", "x"), ("parameters", parameters)]), cat);
        assert_eq!(found(&[("u:parameters", parameters)]), cat);
        assert_eq!(found(&[("z:parameters", parameters)]), cat);
        assert_eq!(found(&[("parameters", "a red cat, best quality\nSteps: 20")]), cat);
        assert_eq!(found(&[("prompt", GRAPH), ("workflow", "{}")]), yak);
        for other in [("parameters", "Steps: 3"), ("prompt", "a cat"), ("prompt", r#"{"1": 2}"#), ("Comment", "a cat")]
        {
            assert_eq!(found(&[other]), None, "{other:?}");
        }
        // a graph whose links lead in a circle
        let circle = r#"{"1": {"inputs": {"positive": ["2", 0]}}, "2": {"inputs": {"conditioning": ["2", 0]}}}"#;
        assert_eq!(found(&[("prompt", circle)]), None);
        std::fs::write(&path, "words").unwrap();
        assert_eq!(text_in_png(&path), None);
    }

    #[test]
    fn a_list_counts_before_a_text_beside_and_that_before_the_picture() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.png");
        png(&file, &[("parameters", "inside")]);
        let mut picture = Picture { file, prompt: None };
        assert_eq!(prompt_of(&picture).unwrap().as_deref(), Some("inside"));
        std::fs::write(folder.path().join("a.txt"), "beside\n").unwrap();
        assert_eq!(prompt_of(&picture).unwrap().as_deref(), Some("beside"));
        picture.prompt = Some("listed".into());
        assert_eq!(prompt_of(&picture).unwrap().as_deref(), Some("listed"));
        picture.prompt = None;
        std::fs::write(folder.path().join("a.txt"), b"\xff\x00").unwrap();
        assert!(prompt_of(&picture).is_err());
    }
}
