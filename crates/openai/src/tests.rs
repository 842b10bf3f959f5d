//! Requests and the answers or refusals they get.

use crate::*;
use serde_json::{Value, json};

const DEFAULTS: Defaults =
    Defaults { temperature: 0.6, top_p: 0.9, top_k: 0, min_p: 0.0, vocab: 100 };

/// `base` with the fields of `more`.
fn body(base: Value, more: Value) -> Vec<u8> {
    let mut body = base.as_object().unwrap().clone();
    body.extend(more.as_object().unwrap().clone());
    serde_json::to_vec(&body).unwrap()
}

fn chat(more: Value) -> Result<ChatRequest, ApiError> {
    let base = json!({ "model": "m", "messages": [{ "role": "user", "content": "Hi" }] });
    ChatRequest::parse(&body(base, more), &DEFAULTS)
}

fn completion(more: Value) -> Result<CompletionRequest, ApiError> {
    CompletionRequest::parse(&body(json!({ "prompt": "Hi" }), more), &DEFAULTS)
}

#[test]
fn silent_request_gets_the_defaults() {
    let request = chat(json!({ "temperature": null, "unknown": 7, "user": "u" })).unwrap();
    let want = Options {
        model: Some("m".into()),
        sampling: Sampling {
            temperature: 0.6,
            top_p: 0.9,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            bias: vec![],
            seed: None,
            tokens_min: 0,
            logprobs: None,
        },
        tokens_max: None,
        stop: Stop { strings: vec![], tokens: vec![], include_in_output: false, ignore_eos: false },
        choices: 1,
        delivery: Delivery::Whole,
        skip_special_tokens: true,
    };
    assert_eq!(request.options, want);
    assert_eq!(request.ending, ChatEnding::Answer);
}

#[test]
fn every_field_arrives() {
    let request = chat(json!({
        "temperature": 2, "top_p": 1, "top_k": -1, "min_p": 0.5, "seed": -1, "n": 128,
        "presence_penalty": -2, "frequency_penalty": 1.5, "logit_bias": { "99": 100, "7": -100 },
        "logprobs": true, "top_logprobs": 20, "max_completion_tokens": 9, "max_tokens": 3,
        "min_tokens": 9, "stop": ["a", "bc"], "stop_token_ids": [5], "ignore_eos": true,
        "include_stop_str_in_output": true, "skip_special_tokens": false,
        "stream": true, "stream_options": { "include_usage": true },
    }));
    let options = request.unwrap().options;
    let sampling = Sampling {
        temperature: 2.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.5,
        presence_penalty: -2.0,
        frequency_penalty: 1.5,
        bias: vec![(7, -100.0), (99, 100.0)],
        seed: Some(u64::MAX),
        tokens_min: 9,
        logprobs: Some(20),
    };
    assert_eq!(options.sampling, sampling);
    assert_eq!((options.tokens_max, options.choices), (Some(9), 128));
    let strings = vec!["a".to_owned(), "bc".to_owned()];
    let stop = Stop { strings, tokens: vec![5], include_in_output: true, ignore_eos: true };
    assert_eq!(options.stop, stop);
    assert_eq!(options.delivery, Delivery::Stream(UsageEvent::Yes));
    assert!(!options.skip_special_tokens);
}

#[track_caller]
fn check_refused(result: Result<impl std::fmt::Debug, ApiError>, param: &str, message: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.kind.status(), 400);
    assert_eq!((error.param.as_deref(), error.message.as_str()), (Some(param), message));
}

#[test]
fn values_out_of_range_are_refused_with_the_range() {
    for (field, value, allowed) in [
        ("temperature", json!(-0.1), "a number from 0 to 2"),
        ("temperature", json!("hot"), "a number from 0 to 2"),
        ("top_p", json!(0), "a number above 0 and at most 1"),
        ("top_p", json!(1e-300), "a number above 0 and at most 1"),
        ("top_k", json!(-2), "0 or -1 (off) or a whole number above 0"),
        ("min_p", json!(1.1), "a number from 0 to 1"),
        ("seed", json!(1.5), "a whole number that fits 64 bits with sign"),
        ("seed", json!(u64::MAX), "a whole number that fits 64 bits with sign"),
        ("n", json!(0), "a whole number from 1 to 128"),
        ("n", json!(129), "a whole number from 1 to 128"),
        ("max_tokens", json!(0), "a whole number of at least 1"),
        ("presence_penalty", json!(2.1), "a number from -2 to 2"),
        ("frequency_penalty", json!(-2.1), "a number from -2 to 2"),
        ("top_logprobs", json!(21), "a whole number from 0 to 20"),
        ("logprobs", json!(1), "true or false"),
        ("stream", json!("yes"), "true or false"),
        ("stop", json!(""), "a string that is not empty, or up to 16 of them"),
        ("stop", json!(["a", ""]), "a string that is not empty, or up to 16 of them"),
        ("stop_token_ids", json!([100]), "up to 256 token ids from 0 to 99"),
        ("logit_bias", json!([]), "an object of token ids and numbers"),
        ("messages", json!([]), "an array of at least one message"),
    ] {
        let message = format!("`{field}` is {value}, but must be {allowed}; correct the field");
        check_refused(chat(json!({ field: value })), field, &message);
    }
    let stops: Vec<String> = (0..17).map(|n| n.to_string()).collect();
    assert!(chat(json!({ "stop": stops })).is_err());
    assert_eq!(chat(json!({ "stop": stops[1..] })).unwrap().options.stop.strings.len(), 16);
}

#[test]
fn bias_names_the_token_at_fault() {
    check_refused(
        chat(json!({ "logit_bias": { "100": 1 } })),
        "logit_bias",
        "`logit_bias` is \"100\", but must be keyed by token ids from 0 to 99; correct the field",
    );
    check_refused(
        chat(json!({ "logit_bias": { "9": 101 } })),
        "logit_bias.9",
        "`logit_bias.9` is 101, but must be a number from -100 to 100; correct the field",
    );
    assert!(chat(json!({ "logit_bias": { "-1": 0 } })).is_err());
    assert_eq!(
        chat(json!({ "logit_bias": { "7": 1, "07": 2 } })).unwrap().options.sampling.bias,
        [(7, 1.0)]
    );
}

#[test]
fn what_is_not_served_is_refused_not_ignored() {
    let tool = json!([{ "type": "function", "function": { "name": "f" } }]);
    for (field, value) in [
        ("tools", tool.clone()),
        ("functions", tool),
        ("tool_choice", json!("required")),
        ("response_format", json!({ "type": "json_object" })),
    ] {
        let error = chat(json!({ field: value })).unwrap_err();
        assert_eq!((error.kind, error.param.as_deref()), (ErrorKind::Unsupported, Some(field)));
        assert!(error.message.contains("not supported yet"), "{error}");
    }
    for value in [json!({ "tools": [] }), json!({ "response_format": { "type": "text" } })] {
        assert!(chat(value).is_ok());
    }
    for (field, value) in [("suffix", json!("x")), ("best_of", json!(2))] {
        let error = completion(json!({ field: value })).unwrap_err();
        assert_eq!((error.kind, error.param.as_deref()), (ErrorKind::Unsupported, Some(field)));
    }
    assert!(completion(json!({ "best_of": 2, "n": 2, "suffix": "" })).is_ok());
}

#[test]
fn combinations_that_contradict_themselves_are_refused() {
    for (value, field) in [
        (json!({ "top_logprobs": 3 }), "top_logprobs"),
        (json!({ "stream_options": { "include_usage": true } }), "stream_options"),
        (json!({ "min_tokens": 5, "max_tokens": 4 }), "min_tokens"),
        (json!({ "continue_final_message": true }), "continue_final_message"),
    ] {
        assert_eq!(chat(value).unwrap_err().param.as_deref(), Some(field));
    }
    let error = completion(json!({ "echo": true, "logprobs": 0 })).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("logprobs"));
    assert!(completion(json!({ "prompt": vec!["a"; 9], "n": 128 })).is_err());
}

fn messages(messages: Value) -> Result<Vec<Message>, ApiError> {
    chat(json!({ "messages": messages })).map(|request| request.messages)
}

#[test]
fn messages_become_roles_and_texts() {
    let got = messages(json!([
        { "role": "developer", "content": "d" },
        { "role": "user", "name": "n", "content": [
            { "type": "text", "text": "a " }, { "type": "text", "text": "b" },
        ] },
        { "role": "assistant", "content": null, "tool_calls": [] },
    ]));
    let message = |role, content: &str| Message { role, content: content.into() };
    assert_eq!(
        got.unwrap(),
        [message(Role::System, "d"), message(Role::User, "a b"), message(Role::Assistant, ""),]
    );
}

#[test]
fn broken_messages_are_refused_with_their_place() {
    for (message, param, part) in [
        (json!({ "role": "user" }), "messages[0].content", "null"),
        (json!({ "role": "boss", "content": "x" }), "messages[0].role", "boss"),
        (json!({ "content": "x" }), "messages[0].role", "null"),
        (json!("x"), "messages[0].role", "null"),
        (json!({ "role": "tool", "content": "x" }), "messages[0].role", "not supported yet"),
        (
            json!({ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }),
            "messages[0].content[0]",
            "not supported yet",
        ),
        (
            json!({ "role": "user", "content": [{ "type": "text" }] }),
            "messages[0].content[0].text",
            "null",
        ),
    ] {
        let error = messages(json!([message])).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param));
        assert!(error.message.contains(part), "{error}");
    }
}

#[test]
fn final_message_is_continued_only_if_the_assistant_s() {
    let continued = |role: &str, more: Value| {
        let base = json!({
            "messages": [{ "role": role, "content": "x" }], "continue_final_message": true
        });
        ChatRequest::parse(&body(base, more), &DEFAULTS)
    };
    assert_eq!(continued("assistant", json!({})).unwrap().ending, ChatEnding::Continue);
    assert!(continued("user", json!({})).is_err());
    assert!(continued("assistant", json!({ "add_generation_prompt": true })).is_err());
    let nothing = chat(json!({ "add_generation_prompt": false })).unwrap();
    assert_eq!(nothing.ending, ChatEnding::Nothing);
}

#[test]
fn prompts_come_in_four_forms() {
    let text = |text: &str| Prompt::Text(text.into());
    for (value, want) in [
        (json!("a"), vec![text("a")]),
        (json!(["a", "b"]), vec![text("a"), text("b")]),
        (json!([1, 99]), vec![Prompt::Tokens(vec![1, 99])]),
        (json!([[1], [2, 3]]), vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]),
    ] {
        assert_eq!(completion(json!({ "prompt": value })).unwrap().prompts, want);
    }
    for value in [json!([]), json!([[]]), json!([1, "a"]), json!([100]), json!([-1]), json!({})] {
        let error = completion(json!({ "prompt": value })).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("prompt"), "{value}");
    }
}

#[test]
fn zero_tokens_are_allowed_only_with_an_echo() {
    assert!(completion(json!({ "max_tokens": 0 })).is_err());
    let echo = completion(json!({ "max_tokens": 0, "echo": true })).unwrap();
    assert_eq!((echo.options.tokens_max, echo.echo), (Some(0), true));
}

#[test]
fn body_that_is_no_object_is_refused() {
    for (body, part) in [(&b"{"[..], "not valid JSON"), (b"[1]", "[1]"), (b"\xff", "JSON")] {
        let error = ChatRequest::parse(body, &DEFAULTS).unwrap_err();
        assert_eq!(error.kind.status(), 400);
        assert!(error.message.contains(part), "{error}");
    }
    let long = json!({ "messages": "é".repeat(1000) }).to_string();
    let error = ChatRequest::parse(long.as_bytes(), &DEFAULTS).unwrap_err();
    assert!(error.message.chars().count() < 200, "{error}");
}

#[test]
fn errors_look_like_openai_s() {
    let error = ApiError::of(ErrorKind::ModelNotFound, "model", "no `x` here");
    let want = json!({ "error": {
        "message": "no `x` here", "type": "invalid_request_error", "param": "model",
        "code": "model_not_found",
    } });
    assert_eq!(serde_json::from_str::<Value>(&error.json()).unwrap(), want);
    assert_eq!(error.kind.status(), 404);
    let full = ErrorKind::QueueFull { retry_after_s: 3 };
    assert_eq!((full.status(), full.retry_after_s()), (429, Some(3)));
}

#[test]
fn tokenize_takes_a_prompt_or_messages() {
    let parse = |value: Value| TokenizeRequest::parse(value.to_string().as_bytes());
    let prompt = parse(json!({ "prompt": "a" })).unwrap().input;
    assert_eq!(prompt, TokenizeInput::Prompt { text: "a".into(), add_special_tokens: true });
    assert!(parse(json!({ "messages": [{ "role": "user", "content": "a" }] })).is_ok());
    assert!(parse(json!({})).is_err());
    let parse = |value: Value| DetokenizeRequest::parse(value.to_string().as_bytes(), &DEFAULTS);
    assert_eq!(parse(json!({ "tokens": [3] })).unwrap().tokens, [3]);
    assert!(parse(json!({ "tokens": [100] })).is_err());
    assert!(parse(json!({})).is_err());
}

mod replies {
    use super::*;

    fn reply(endpoint: Endpoint, delivery: Delivery) -> Reply {
        Reply { endpoint, id: "id".into(), created: 7, model: "m".into(), delivery }
    }

    fn token(id: u32, bytes: &[u8], offset: usize) -> TokenLogprob {
        let text = |id, bytes: &[u8]| TokenText { id, bytes: Some(bytes.to_vec()) };
        TokenLogprob {
            token: text(id, bytes),
            logprob: -0.5,
            top: vec![
                Alternative { token: text(9, b"z"), logprob: -0.25 },
                Alternative { token: TokenText { id: 8, bytes: None }, logprob: f32::NEG_INFINITY },
            ],
            offset,
        }
    }

    fn piece() -> Piece {
        let logprobs = Some(vec![token(1, b"a", 0), token(2, b"\xc3", 1)]);
        Piece { text: "aé".into(), logprobs, finish: Some(FinishReason::Length) }
    }

    /// The events of a stream; the last one is not JSON.
    fn events(out: &[u8]) -> Vec<Value> {
        let text = std::str::from_utf8(out).unwrap();
        let events = text.split_terminator("\n\n").map(|event| {
            let data = event.strip_prefix("data: ").unwrap();
            if data == "[DONE]" { json!("done") } else { serde_json::from_str(data).unwrap() }
        });
        events.collect()
    }

    #[test]
    fn whole_chat_answer() {
        let reply = reply(Endpoint::Chat, Delivery::Whole);
        let body = reply.whole(vec![piece()], Usage::new(3, 2));
        let top = json!([
            { "token": "z", "logprob": -0.25, "bytes": [122] },
            { "token": "", "logprob": -9999.0, "bytes": null },
        ]);
        let want = json!({
            "id": "id", "object": "chat.completion", "created": 7, "model": "m",
            "choices": [{
                "index": 0,
                "message": { "role": "assistant", "content": "aé", "refusal": null },
                "logprobs": { "content": [
                    { "token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": top },
                    { "token": "\u{fffd}", "logprob": -0.5, "bytes": [195], "top_logprobs": top },
                ], "refusal": null },
                "finish_reason": "length",
            }],
            "usage": { "prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5 },
        });
        assert_eq!(serde_json::from_slice::<Value>(&body).unwrap(), want);
    }

    #[test]
    fn whole_completion_answer() {
        let reply = reply(Endpoint::Completions, Delivery::Whole);
        let plain = Piece { text: "b".into(), logprobs: None, finish: Some(FinishReason::Stop) };
        let body = reply.whole(vec![piece(), plain], Usage::new(3, 2));
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["object"], "text_completion");
        let broken = r"bytes:\xc3";
        let want = json!([
            {
                "index": 0, "text": "aé", "finish_reason": "length",
                "logprobs": {
                    "tokens": ["a", broken],
                    "token_logprobs": [-0.5, -0.5],
                    "top_logprobs": [
                        { "z": -0.25, "token_id:8": -9999.0, "a": -0.5 },
                        { "z": -0.25, "token_id:8": -9999.0, broken: -0.5 },
                    ],
                    "text_offset": [0, 1],
                },
            },
            { "index": 1, "text": "b", "finish_reason": "stop", "logprobs": null },
        ]);
        assert_eq!(body["choices"], want);
    }

    #[test]
    fn chat_stream_has_role_text_finish_usage_and_done() {
        let reply = reply(Endpoint::Chat, Delivery::Stream(UsageEvent::Yes));
        let mut out = Vec::new();
        let first = Piece { text: "a".into(), ..Piece::default() };
        let last = Piece { finish: Some(FinishReason::Stop), ..Piece::default() };
        reply.piece_events(1, Place::First, &first, &mut out);
        reply.piece_events(1, Place::Later, &last, &mut out);
        reply.done_events(Usage::new(3, 2), &mut out);
        let chunk = |choices: Value, usage: Value| {
            json!({
                "id": "id", "object": "chat.completion.chunk", "created": 7, "model": "m",
                "choices": choices, "usage": usage,
            })
        };
        let choice = |delta: Value, finish: Value| {
            let choice =
                json!([{ "index": 1, "delta": delta, "logprobs": null, "finish_reason": finish }]);
            chunk(choice, json!(null))
        };
        let usage = json!({ "prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5 });
        let want = [
            choice(json!({ "role": "assistant", "content": "" }), json!(null)),
            choice(json!({ "content": "a" }), json!(null)),
            choice(json!({}), json!("stop")),
            chunk(json!([]), usage),
            json!("done"),
        ];
        assert_eq!(events(&out), want);
    }

    #[test]
    fn completion_stream_without_usage_never_mentions_it() {
        let reply = reply(Endpoint::Completions, Delivery::Stream(UsageEvent::No));
        let mut out = Vec::new();
        reply.piece_events(0, Place::First, &piece(), &mut out);
        reply.done_events(Usage::new(3, 2), &mut out);
        let events = events(&out);
        assert_eq!(events.len(), 2);
        assert_eq!(events[0]["choices"][0]["text"], "aé");
        assert_eq!(events[0]["choices"][0]["finish_reason"], "length");
        assert_eq!(events[0].get("usage"), None);
    }

    #[test]
    fn joined_pieces_are_the_choice() {
        let mut whole = Piece { text: "a".into(), logprobs: Some(vec![]), finish: None };
        whole.append(piece());
        assert_eq!((whole.text.as_str(), whole.finish), ("aaé", Some(FinishReason::Length)));
        assert_eq!(whole.logprobs.unwrap().len(), 2);
    }
}
