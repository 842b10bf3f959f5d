//! Replaces, in texts of a request, the characters at the ends of special tokens.

use super::Conversation;
use crate::tokenizer::Tokenizer;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};

/// A private-use character for each character at the end of a special token.
pub(super) struct Guard {
    conceal: BTreeMap<char, char>,
    reveal: BTreeMap<char, char>,
}

impl Guard {
    /// `None` if no text of the conversation needs guarding.
    pub(super) fn new(
        tokenizer: &Tokenizer,
        template: &str,
        conversation: &Conversation,
    ) -> Option<Self> {
        let mut ends = BTreeSet::new();
        for text in tokenizer.special_texts() {
            let text = String::from_utf8_lossy(text);
            ends.extend(text.chars().next());
            ends.extend(text.chars().next_back());
        }
        let mut seen = BTreeSet::new();
        let note = &mut |text: &str| {
            seen.extend(text.chars());
            text.to_owned()
        };
        map_conversation(conversation, note);
        if ends.is_disjoint(&seen) {
            return None;
        }
        // A character that the request or the template uses itself could not be told from ours.
        // The two supplementary planes have more private-use characters than a request has
        // characters within its size limit, or than special tokens have ends.
        let mut free = ('\u{E000}'..='\u{F8FF}')
            .chain('\u{F0000}'..='\u{10FFFD}')
            .filter(|c| !seen.contains(c) && !template.contains(*c));
        let conceal: BTreeMap<char, char> = ends
            .into_iter()
            .map(|end| (end, free.next().expect("a request does not use all private characters")))
            .collect();
        let reveal = conceal.iter().map(|(&end, &private)| (private, end)).collect();
        Some(Self { conceal, reveal })
    }

    pub(super) fn conceal(&self, conversation: &Conversation) -> Conversation {
        map_conversation(conversation, &mut |text| replace(text, &self.conceal))
    }

    pub(super) fn reveal(&self, text: &str) -> String {
        replace(text, &self.reveal)
    }
}

fn replace(text: &str, with: &BTreeMap<char, char>) -> String {
    text.chars().map(|c| *with.get(&c).unwrap_or(&c)).collect()
}

fn map_conversation(
    conversation: &Conversation,
    change: &mut impl FnMut(&str) -> String,
) -> Conversation {
    let messages = conversation.messages.iter().map(|message| map_value(message, change));
    Conversation {
        messages: messages.collect(),
        tools: conversation.tools.as_ref().map(|tools| map_value(tools, change)),
        ending: conversation.ending,
        variables: map_object(&conversation.variables, change),
    }
}

/// Keys too: a tool's parameter names are the user's text.
fn map_object(
    map: &Map<String, Value>,
    change: &mut impl FnMut(&str) -> String,
) -> Map<String, Value> {
    map.iter().map(|(key, value)| (change(key), map_value(value, change))).collect()
}

fn map_value(value: &Value, change: &mut impl FnMut(&str) -> String) -> Value {
    match value {
        Value::String(text) => Value::String(change(text)),
        Value::Array(items) => items.iter().map(|item| map_value(item, change)).collect(),
        Value::Object(map) => Value::Object(map_object(map, change)),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}
