//! What a prompt asks a detector for: a class, and how many things of it.
//!
//! Both come from the prompt's fields `object` and `count`, where it has them, else from its text: "three flat cats in the
//! snow" are 3 of the class `cat`. A number is the last one in front of the name, with nothing but adjectives between; a name in
//! the singular without one is 1.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};
use serde_json::Value as Json;

use crate::config::Prompt;

/// The names of a detector's classes, in the singular and in the plural.
pub struct Vocabulary {
    labels: Vec<String>,
    /// By lower-case words with a space between.
    forms: HashMap<String, Form>,
    /// Words of the longest name.
    longest: usize,
}

#[derive(Clone, Copy)]
struct Form {
    class: usize,
    plural: bool,
}

/// A name in a text.
struct Named {
    class: usize,
    count: Option<usize>,
}

impl Vocabulary {
    /// `labels` are the names of the classes by their numbers; `N/A` is none.
    pub fn new(labels: &[String]) -> Self {
        let named =
            || labels.iter().enumerate().filter(|(_, label)| *label != "N/A").map(|(i, l)| (i, words(l).join(" ")));
        let mut forms: HashMap<String, Form> = HashMap::new();
        for (class, name) in named() {
            forms.entry(name).or_insert(Form { class, plural: false });
        }
        for (class, name) in named() {
            for form in plurals(&name) {
                forms.entry(form).or_insert(Form { class, plural: true });
            }
        }
        let longest = forms.keys().map(|form| form.split(' ').count()).max().unwrap_or(0);
        Self { labels: labels.to_vec(), forms, longest }
    }

    /// The class of a name, whether it is in the singular or in the plural.
    ///
    /// # Errors
    /// There is none; says which there are.
    pub fn class(&self, name: &str) -> Result<usize> {
        let known = self.forms.get(&words(name).join(" "));
        Ok(known.with_context(|| format!("the detector knows no `{name}`: {}", self.known(name)))?.class)
    }

    /// The class that a prompt asks for.
    ///
    /// # Errors
    /// Neither its field `object` nor its text names one class.
    pub fn class_of(&self, prompt: &Prompt) -> Result<usize> {
        match prompt.fields.get("object") {
            Some(Json::String(name)) => {
                return self.class(name).with_context(|| format!("the field `object` of {:?}", prompt.text));
            }
            None | Some(Json::Null) => {}
            Some(other) => bail!("the field `object` of {:?} is {other}: it must be the name of a class", prompt.text),
        }
        let mut classes: Vec<usize> = self.named(&prompt.text).into_iter().map(|named| named.class).collect();
        classes.sort_unstable();
        classes.dedup();
        match classes[..] {
            [class] => Ok(class),
            [] => bail!(
                "no word of the prompt {:?} is a thing that the detector knows; name it in a field `object` of the prompt (a file \
                 of JSON lines): {}",
                prompt.text,
                self.known(&prompt.text)
            ),
            _ => bail!(
                "the prompt {:?} names several things ({}): say which one counts in a field `object` of the prompt (a file of \
                 JSON lines)",
                prompt.text,
                classes.iter().map(|class| &*self.labels[*class]).collect::<Vec<_>>().join(", ")
            ),
        }
    }

    /// How many things of `class` a prompt asks for.
    ///
    /// # Errors
    /// Neither its field `count` nor its text says so.
    pub fn count_of(&self, prompt: &Prompt, class: usize) -> Result<usize> {
        match prompt.fields.get("count") {
            None | Some(Json::Null) => {}
            Some(field) => {
                // the cells of a table are texts
                let number = field.as_u64().or_else(|| field.as_str().and_then(|text| text.trim().parse().ok()));
                let number = number.and_then(|number| usize::try_from(number).ok());
                return number.with_context(|| {
                    format!("the field `count` of {:?} is {field}: it must be a whole number, 0 or more", prompt.text)
                });
            }
        }
        let said =
            self.named(&prompt.text).into_iter().filter(|named| named.class == class).find_map(|named| named.count);
        said.with_context(|| {
            format!(
                "the prompt {:?} does not say how many of `{}`: write a number in front of it, or give the prompt a field `count` (a \
                 file of JSON lines)",
                prompt.text, self.labels[class]
            )
        })
    }

    /// The names in a text, from left to right.
    fn named(&self, text: &str) -> Vec<Named> {
        let words = words(text);
        let (mut found, mut start, mut free) = (Vec::new(), 0, 0);
        while start < words.len() {
            let longest = self.longest.min(words.len() - start);
            let name = (1..=longest).rev().find_map(|n| Some((n, self.forms.get(&words[start..start + n].join(" "))?)));
            let Some((length, form)) = name else {
                start += 1;
                continue;
            };
            let count = number_in_front(&words[free..start]).or((!form.plural).then_some(1));
            found.push(Named { class: form.class, count });
            start += length;
            free = start;
        }
        found
    }

    /// The names that there are, the nearest one to `given` first.
    fn known(&self, given: &str) -> String {
        const SHOWN: usize = 30;
        let mut names: Vec<&str> = self.labels.iter().map(String::as_str).filter(|label| *label != "N/A").collect();
        let near = |name: &&str| {
            let similar = given.split_whitespace().map(|word| strsim::normalized_levenshtein(word, name));
            similar.fold(0.0, f64::max)
        };
        names.sort_by(|a, b| near(b).total_cmp(&near(a)));
        let more = names.len().saturating_sub(SHOWN);
        names.truncate(SHOWN);
        let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("it knows {}{rest}", names.join(", "))
    }
}

/// Lower-case words, without what stands between them.
fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// The number in front of a name, given the words in front of it.
fn number_in_front(words: &[String]) -> Option<usize> {
    /// What ends a name's own words on the left.
    const ENDS: [&str; 16] = [
        "of", "in", "on", "at", "by", "with", "and", "or", "the", "from", "to", "near", "under", "over", "behind",
        "beside",
    ];
    words.iter().rev().take_while(|word| !ENDS.contains(&&***word)).find_map(|word| number(word))
}

fn number(word: &str) -> Option<usize> {
    const WORDS: [&str; 21] = [
        "no",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
        "twenty",
    ];
    match word {
        "a" | "an" => Some(1),
        "zero" => Some(0),
        word => WORDS.iter().position(|known| *known == word).or_else(|| word.parse().ok()),
    }
}

/// What the plural of a name may be.
fn plurals(name: &str) -> Vec<String> {
    const IRREGULAR: [(&str, &str); 9] = [
        ("person", "people"),
        ("man", "men"),
        ("child", "children"),
        ("mouse", "mice"),
        ("goose", "geese"),
        ("ox", "oxen"),
        ("foot", "feet"),
        ("tooth", "teeth"),
        ("die", "dice"),
    ];
    let mut plurals = vec![format!("{name}s"), format!("{name}es")];
    for (end, plural) in IRREGULAR.iter().chain(&[("y", "ies"), ("f", "ves"), ("fe", "ves")]) {
        plurals.extend(name.strip_suffix(end).map(|stem| format!("{stem}{plural}")));
    }
    plurals
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn vocabulary() -> Vocabulary {
        let labels = "N/A,person,cat,dog,hot dog,sheep,knife,butterfly,fox,traffic light,mouse,N/A";
        Vocabulary::new(&labels.split(',').map(str::to_owned).collect::<Vec<_>>())
    }

    fn prompt(text: &str, fields: Json) -> Prompt {
        let Json::Object(fields) = fields else { panic!("{fields}") };
        Prompt { text: text.to_owned(), fields }
    }

    #[test]
    fn a_text_says_what_and_how_many() {
        let vocabulary = vocabulary();
        for (text, label, count) in [
            ("three flat cats in the snow", "cat", 3),
            ("a cat", "cat", 1),
            ("cat", "cat", 1),
            ("A photo of the Dog", "dog", 1),
            ("a photo of 12 people", "person", 12),
            ("Two glossy, red butterflies.", "butterfly", 2),
            ("four hot-dogs", "hot dog", 4),
            ("seven traffic lights at night", "traffic light", 7),
            ("no foxes", "fox", 0),
            ("five sheep", "sheep", 5),
            ("a picture of two mice", "mouse", 2),
            ("six knives on a table", "knife", 6),
        ] {
            let prompt = Prompt::from(text);
            let class = vocabulary.class_of(&prompt).unwrap();
            assert_eq!(
                (&*vocabulary.labels[class], vocabulary.count_of(&prompt, class).unwrap()),
                (label, count),
                "{text}"
            );
        }
    }

    #[test]
    fn fields_count_before_the_text() {
        let vocabulary = vocabulary();
        for (text, fields, label, count) in [
            ("a cat and two dogs", json!({ "object": "dogs" }), "dog", 2),
            ("a cat and two dogs", json!({ "object": "cat" }), "cat", 1),
            ("a crowd", json!({ "object": "Person", "count": 7 }), "person", 7),
            ("cats", json!({ "count": "3" }), "cat", 3),
            ("two cats", json!({ "count": 0, "object": null }), "cat", 0),
        ] {
            let prompt = prompt(text, fields);
            let class = vocabulary.class_of(&prompt).unwrap();
            assert_eq!(
                (&*vocabulary.labels[class], vocabulary.count_of(&prompt, class).unwrap()),
                (label, count),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_missing_or_unknown_is_said() {
        let vocabulary = vocabulary();
        for (text, fields, message) in [
            ("three wugs", json!({}), "no word of the prompt \"three wugs\" is a thing that the detector knows"),
            ("", json!({}), "no word of the prompt \"\""),
            (
                "a cat and two dogs",
                json!({}),
                "names several things (cat, dog): say which one counts in a field `object`",
            ),
            ("a wug", json!({ "object": "wug" }), "the detector knows no `wug`: it knows"),
            ("a cat", json!({ "object": 3 }), "the field `object` of \"a cat\" is 3"),
            ("cats", json!({}), "the prompt \"cats\" does not say how many of `cat`"),
            ("a photo of cats", json!({}), "does not say how many of `cat`"),
            ("a cat", json!({ "count": -1 }), "the field `count` of \"a cat\" is -1: it must be a whole number"),
            ("a cat", json!({ "count": 1.5 }), "the field `count` of \"a cat\" is 1.5"),
            ("a cat", json!({ "count": "many" }), "the field `count` of \"a cat\" is \"many\""),
        ] {
            let prompt = prompt(text, fields);
            let asked = vocabulary.class_of(&prompt).and_then(|class| vocabulary.count_of(&prompt, class));
            let error = format!("{:#}", asked.unwrap_err());
            assert!(error.contains(message), "{error}");
        }
        let error = vocabulary.class("foxs and dgos").unwrap_err().to_string();
        assert!(error.contains("it knows dog") || error.contains("it knows fox"), "{error}");
    }
}
