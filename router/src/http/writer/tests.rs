//! Tokens of the toy model's tokenizer through the writer of one choice.

use super::*;
use model::tokenizer::Special;
use openai::{CompletionRequest, Options};
use serde_json::{Value, json};
use std::path::Path;

const EOT: u32 = 2008;

fn toy() -> ServedModel {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/toy-maverick");
    ServedModel::load(&dir, "toy".into()).unwrap()
}

fn options(served: &ServedModel, mut fields: Value) -> Options {
    fields["prompt"] = json!("x");
    let body = fields.to_string();
    CompletionRequest::parse(body.as_bytes(), &served.defaults).unwrap().options
}

/// The pieces' texts, each behind a `|`, and the finish reason.
fn written(fields: Value, text: &str, finish: Finish) -> String {
    let served = toy();
    let mut writer = Writer::new(&options(&served, fields));
    let mut out = String::new();
    let mut show = |piece: Piece| {
        out += &format!("|{}", piece.text);
        piece.finish.inspect(|reason| out += &format!(" {reason:?}")).is_some()
    };
    for token in served.tokenizer.encode(text, Special::Parse).unwrap() {
        let sampled = SampledToken { token, logprob: None, top: Vec::new() };
        if show(writer.token(&served, &sampled)) {
            return out;
        }
    }
    show(writer.end(&served, finish));
    out
}

#[track_caller]
fn check(fields: Value, text: &str, finish: Finish, want: &str) {
    assert_eq!(written(fields, text, finish), want);
}

#[test]
fn text_comes_token_by_token() {
    check(json!({}), "123", Finish::Length, "|1|2|3| Length");
    check(json!({}), "12", Finish::Stop { token: EOT }, "|1|2| Stop");
}

#[test]
fn character_waits_for_its_last_byte() {
    let out = written(json!({}), "1🙂2", Finish::Length);
    assert!(out.starts_with("|1||") && out.ends_with("|🙂|2| Length"), "{out}");
}

#[test]
fn stop_string_ends_the_choice_and_is_cut() {
    check(json!({ "stop": "23" }), "1234", Finish::Length, "|1|| Stop");
    let included = json!({ "stop": "23", "include_stop_str_in_output": true });
    check(included, "1234", Finish::Length, "|1||23 Stop");
}

#[test]
fn begun_stop_string_comes_out_at_the_end() {
    check(json!({ "stop": "234" }), "123", Finish::Stop { token: EOT }, "|1|||23 Stop");
}

#[test]
fn stop_strings_wait_for_min_tokens() {
    let fields = json!({ "stop": "2", "min_tokens": 3, "max_tokens": 9 });
    check(fields, "12324", Finish::Length, "|1|2|3| Stop");
}

#[test]
fn stop_token_is_text_only_if_the_request_named_it() {
    let stop = Finish::Stop { token: 18 };
    check(json!({ "stop_token_ids": [18] }), "1", stop, "|1| Stop");
    let included = json!({ "stop_token_ids": [18], "include_stop_str_in_output": true });
    check(included.clone(), "1", stop, "|1|3 Stop");
    let mut special = included;
    special["skip_special_tokens"] = json!(false);
    check(special, "1", Finish::Stop { token: EOT }, "|1| Stop");
}

#[test]
fn special_tokens_are_text_only_on_demand() {
    check(json!({}), "1<|eot|>2", Finish::Length, "|1||2| Length");
    let shown = json!({ "skip_special_tokens": false });
    check(shown, "1<|eot|>2", Finish::Length, "|1|<|eot|>|2| Length");
}

#[test]
fn logprobs_name_token_bytes_and_place() {
    let served = toy();
    let mut writer = Writer::new(&options(&served, json!({ "logprobs": 1 })));
    let sampled = |token| SampledToken { token, logprob: Some(-0.5), top: vec![(16, -0.25)] };
    let mut offsets = Vec::new();
    for token in [15, 16] {
        let piece = writer.token(&served, &sampled(token));
        offsets.extend(piece.logprobs.unwrap().into_iter().map(|entry| {
            assert_eq!(entry.top[0].token.bytes.as_deref(), Some(&b"1"[..]));
            (entry.token.bytes.unwrap(), entry.offset)
        }));
    }
    assert_eq!(offsets, [(b"0".to_vec(), 0), (b"1".to_vec(), 1)]);
    let end = writer.end(&served, Finish::Stop { token: EOT });
    assert_eq!((end.logprobs, writer.tokens()), (Some(vec![]), 3));
}
