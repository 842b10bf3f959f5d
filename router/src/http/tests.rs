//! The front door over a fake cluster, as clients see it: bytes over TCP.

mod client;

use super::ServedModel;
use crate::engine::tests::fake::next_token;
use client::{Reply, Server};
use model::tokenizer::SkipSpecial;
use serde_json::{Value, json};

/// The text that the fake cluster writes behind `prompt`.
fn text_behind(served: &ServedModel, prompt: &[u32], seed: u64, tokens: usize) -> String {
    let mut history = prompt.to_vec();
    for _ in 0..tokens {
        history.push(next_token(&history, seed, &[]));
    }
    served.tokenizer.decode(&history[prompt.len()..], SkipSpecial::Yes)
}

fn completion(more: Value) -> Value {
    with(json!({ "model": "org/toy", "prompt": [1, 2, 3], "seed": 5, "max_tokens": 8 }), more)
}

fn chat(more: Value) -> Value {
    let messages = json!([{ "role": "user", "content": "Hi" }]);
    with(json!({ "messages": messages, "seed": 5, "max_tokens": 8 }), more)
}

fn with(mut base: Value, more: Value) -> Value {
    base.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    base
}

/// The texts of a stream's choices.
fn streamed(reply: &Reply, choices: usize) -> Vec<String> {
    let mut texts = vec![String::new(); choices];
    for choice in reply.events().iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        let text = choice["text"].as_str().or(choice["delta"]["content"].as_str());
        let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
        texts[index].push_str(text.unwrap_or_default());
    }
    texts
}

#[tokio::test]
async fn completion_is_the_engine_s_text() {
    let server = Server::ready().await;
    let reply = server.post("/v1/completions", completion(json!({}))).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let body = reply.json();
    assert_eq!(body["choices"][0]["text"], text_behind(&server.served, &[1, 2, 3], 5, 8));
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    let usage = json!({ "prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11 });
    assert_eq!(body["usage"], usage);
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
}

#[tokio::test]
async fn choices_come_by_prompt_with_seeds_of_their_own() {
    let server = Server::ready().await;
    let request = completion(json!({ "prompt": [[1, 2], [7]], "n": 2, "echo": true }));
    let whole = server.post("/v1/completions", request.clone()).await.json();
    let texts: Vec<&str> =
        whole["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    let echoed = |prompt: &[u32]| {
        let echo = server.served.tokenizer.decode(prompt, SkipSpecial::Yes);
        echo + &text_behind(&server.served, prompt, 5, 8)
    };
    assert_eq!((texts[0], texts[2]), (&*echoed(&[1, 2]), &*echoed(&[7])));
    assert_ne!(texts[0], texts[1]);
    assert_eq!(whole["usage"]["prompt_tokens"], 3);

    let stream = server.post("/v1/completions", with(request, json!({ "stream": true }))).await;
    assert_eq!(streamed(&stream, 4), texts);
}

#[tokio::test]
async fn chat_streams_role_text_reason_and_usage() {
    let server = Server::ready().await;
    let whole = server.post("/v1/chat/completions", chat(json!({}))).await.json();
    let usage = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let reply = server.post("/v1/chat/completions", chat(usage)).await;
    let events = reply.events();
    assert_eq!(events[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    assert_eq!(streamed(&reply, 1), [whole["choices"][0]["message"]["content"].as_str().unwrap()]);
    let [.., end, usage] = &events[..] else { panic!("too few events") };
    assert_eq!(end["choices"][0]["finish_reason"], "length");
    assert_eq!(usage["usage"], whole["usage"]);
    assert!(events.iter().all(|event| event["id"] == events[0]["id"]));
}

#[tokio::test]
async fn stop_string_ends_the_sequence_too() {
    let server = Server::ready().await;
    let text = text_behind(&server.served, &[1, 2, 3], 5, 150);
    let stop: String = text.chars().skip(3).take(2).collect();
    let request = completion(json!({ "stop": stop, "max_tokens": 150 }));
    let body = server.post("/v1/completions", request).await.json();
    let choice = &body["choices"][0];
    let want = text.split(&stop).next().unwrap();
    assert_eq!((choice["text"].as_str(), &choice["finish_reason"]), (Some(want), &json!("stop")));
    server.until("idle", |engine| engine.status_json()["streams"] == 0).await;
}

#[track_caller]
fn check_refused(reply: &Reply, status: u16, code: &str, part: &str) {
    assert_eq!(reply.status, status, "{}", reply.body);
    let error = &reply.json()["error"];
    assert_eq!(error["code"], code);
    assert!(error["message"].as_str().unwrap().contains(part), "{error}");
    assert!(reply.head.contains("content-type: application/json"));
    assert_eq!(matches!(status, 429 | 503), reply.head.contains("retry-after: "), "{}", reply.head);
}

#[tokio::test]
async fn refusals_are_error_objects() {
    let server = Server::ready().await;
    let (chats, completions) = ("/v1/chat/completions", "/v1/completions");
    check_refused(&server.get("/v2/x").await, 404, "not_found", "GET /v2/x");
    let wrong_method = server.get(completions).await;
    check_refused(&wrong_method, 405, "method_not_allowed", "GET");
    assert!(wrong_method.head.contains("allow: post"), "{}", wrong_method.head);
    check_refused(&server.request("POST", chats, b"{").await, 400, "invalid_value", "JSON");
    check_refused(&server.request("POST", chats, b"").await, 400, "invalid_value", "JSON");
    let model = json!({ "model": "other" });
    let unknown = server.post(chats, chat(model)).await;
    check_refused(&unknown, 404, "model_not_found", "use `org/toy`");
    check_refused(&server.get("/v1/models/other").await, 404, "model_not_found", "org/toy");
    let long = server.post(completions, completion(json!({ "prompt": vec![1; 200] }))).await;
    check_refused(&long, 400, "context_length_exceeded", "200 tokens");
    let empty = json!({ "prompt": "", "add_special_tokens": false });
    check_refused(
        &server.post(completions, completion(empty)).await,
        400,
        "invalid_value",
        "token",
    );
}

#[tokio::test]
async fn body_over_the_limit_is_refused() {
    let server = Server::ready().await;
    // Just over, so that the server has read nearly all of it when it answers and closes.
    let body = vec![b' '; super::BODY_BYTES_MAX + 1];
    let reply = server.request("POST", "/v1/completions", &body).await;
    check_refused(&reply, 413, "request_too_large", "33554432");
}

#[tokio::test]
async fn long_body_is_served_all_the_same() {
    let server = Server::ready().await;
    let request = completion(json!({ "user": "x".repeat(100_000) }));
    assert_eq!(server.post("/v1/completions", request).await.status, 200);
}

#[tokio::test]
async fn answer_ends_where_the_context_does() {
    let server = Server::ready().await;
    for tokens_max in [json!(5000), json!(null)] {
        let request = completion(json!({ "prompt": vec![1; 190], "max_tokens": tokens_max }));
        let body = server.post("/v1/completions", request).await.json();
        assert_eq!(body["usage"]["completion_tokens"], 10, "{body}");
        assert_eq!(body["choices"][0]["finish_reason"], "length");
    }
}

#[tokio::test]
async fn without_a_cluster_clients_are_asked_to_wait() {
    let server = Server::start(64).await;
    check_refused(&server.get("/health").await, 503, "not_ready", "try again");
    let reply = server.post("/v1/completions", completion(json!({}))).await;
    check_refused(&reply, 503, "not_ready", "try again");
}

#[tokio::test]
async fn full_queue_refuses_all_choices_and_frees_them() {
    let server = Server::start(2).await;
    server.cluster.publish(1, 1, 64);
    server.until("ready", |engine| engine.is_ready()).await;
    let reply = server.post("/v1/completions", completion(json!({ "n": 60 }))).await;
    check_refused(&reply, 429, "rate_limit_exceeded", "retry in");
    server.until("idle", |engine| engine.status_json()["streams"] == 0).await;
    assert_eq!(server.post("/v1/completions", completion(json!({}))).await.status, 200);
}

/// Every step fails meanwhile, so that sequences neither end nor die by themselves.
#[tokio::test]
async fn client_that_leaves_cancels_its_sequences() {
    for stream in [true, false] {
        let server = Server::ready().await;
        server.cluster.script.faults.lock().unwrap().extend(1..100_000);
        let body = completion(json!({ "stream": stream, "n": 2 })).to_string();
        let connection = server.send("POST", "/v1/completions", body.as_bytes()).await;
        server.until("two sequences", |engine| engine.status_json()["streams"] == 2).await;
        drop(connection);
        server.until("none", |engine| engine.status_json()["streams"] == 0).await;
        server.cluster.script.faults.lock().unwrap().clear();
        assert_eq!(server.post("/v1/completions", completion(json!({}))).await.status, 200);
    }
}

#[tokio::test]
async fn sequence_that_cannot_go_on_ends_with_an_error() {
    for stream in [true, false] {
        let server = Server::ready().await;
        server.cluster.script.faults.lock().unwrap().extend(1..100_000);
        let request = completion(json!({ "stream": stream, "prompt": vec![1; 100] }));
        let shrink = async {
            server.until("a sequence", |engine| engine.status_json()["streams"] == 1).await;
            server.cluster.publish(2, 1, 10);
        };
        let (reply, ()) = tokio::join!(server.post("/v1/completions", request), shrink);
        let error = if stream { reply.events()[0].clone() } else { reply.json() };
        assert_eq!(reply.status, if stream { 200 } else { 500 });
        assert_eq!(error["error"]["code"], "internal_error", "{error}");
    }
}

#[tokio::test]
async fn panic_of_one_request_harms_no_other() {
    let server = Server::ready().await;
    // The fake front's metrics panic.
    check_refused(&server.get("/metrics").await, 500, "internal_error", "panicked");
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test]
async fn checkpoint_without_a_template_serves_completions() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/toy-maverick");
    let mut served = ServedModel::load(&dir, "org/toy".into()).unwrap();
    served.template = None;
    let server = Server::over(served, 64).await;
    server.cluster.publish(1, 1, 64);
    server.until("ready", |engine| engine.is_ready()).await;
    let reply = server.post("/v1/chat/completions", chat(json!({}))).await;
    check_refused(&reply, 400, "invalid_value", "/v1/completions");
    assert_eq!(server.post("/v1/completions", completion(json!({}))).await.status, 200);
}

#[tokio::test]
async fn models_and_status_say_what_is_served() {
    let server = Server::ready().await;
    let models = server.get("/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], "org/toy");
    assert_eq!(models["data"][0]["max_model_len"], 200);
    assert_eq!(server.get("/v1/models/org/toy").await.json(), models["data"][0]);
    let status = server.get("/status").await.json();
    assert_eq!((&status["workers"], &status["router"]["ready"]), (&json!([]), &json!(true)));
}

#[tokio::test]
async fn tokens_of_a_text_and_back() {
    let server = Server::ready().await;
    let text = "<|header_start|>Grüße";
    let request = json!({ "prompt": text, "return_token_strs": true });
    let body = server.post("/tokenize", request).await.json();
    let tokens = body["tokens"].as_array().unwrap();
    assert_eq!((&tokens[0], &tokens[1]), (&json!(2000), &json!(2005)));
    assert_eq!(body["count"], tokens.len());
    assert_eq!(body["token_strs"][1], "<|header_start|>");
    let back = server.post("/detokenize", json!({ "tokens": tokens[1..] })).await.json();
    assert_eq!(back["prompt"], text);
    let messages = json!({ "messages": [{ "role": "user", "content": "Hi" }] });
    let count = server.post("/tokenize", messages).await.json()["count"].clone();
    let whole = server.post("/v1/chat/completions", chat(json!({}))).await.json();
    assert_eq!(count, whole["usage"]["prompt_tokens"]);
}
