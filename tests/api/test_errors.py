"""Refusals: the right status, an OpenAI-style error that names the parameter, and a server that goes on."""

import json

import openai
import pytest

from prompts import SUM, SUM_ANSWER


@pytest.fixture(autouse=True)
def server_lives_on(server, ask):
    """After every refusal here the same process answers, and nothing of the refused request is left."""
    yield
    assert server.process.poll() is None
    assert ask(SUM).choices[0].message.content == SUM_ANSWER
    server.wait_until_idle(2)


def refusal(call, kind):
    with pytest.raises(kind) as caught:
        call()
    body = caught.value.body
    assert isinstance(body.get("message"), str) and body["message"], body
    assert isinstance(body.get("type"), str), body
    return body


def test_an_unknown_model_is_not_found(client):
    def call():
        client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": SUM}])

    body = refusal(call, openai.NotFoundError)
    assert (body["code"], body["param"]) == ("model_not_found", "model")
    assert "no-such-model" in body["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("text", [b"{", b"", b"[]", b"\xff\xfe", b'{"model": 3}'])
def test_bad_json_is_refused(server, path, text):
    status, body, _ = server.post(path, text)
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error" and body["error"]["message"]


def test_an_unknown_path_is_not_found(server):
    with pytest.raises(openai.NotFoundError):
        server.client.get("/no-such-path", cast_to=object)


@pytest.mark.parametrize(
    "param, value",
    [
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("top_p", 0),
        ("top_p", 1.5),
        ("n", 0),
        ("n", 1000),
        ("max_tokens", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("top_logprobs", 21),
        ("stop", ["a", ""]),
        ("stop", 5),
        ("logit_bias", {"99999": 1}),
        ("logit_bias", {"5": 101}),
    ],
)
def test_values_out_of_range_name_the_parameter(server, model, param, value):
    request = {"model": model, "messages": [{"role": "user", "content": SUM}], "max_tokens": 5, param: value}
    if param == "top_logprobs":
        request["logprobs"] = True
    status, body, _ = server.post("/v1/chat/completions", json.dumps(request).encode())
    assert status == 400, body
    # A fault inside an object is named with its key.
    assert body["error"]["param"].split(".")[0] == param
    assert body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("messages", [[], [{"role": "wizard", "content": "hi"}]])
def test_messages_without_sense_are_refused(server, model, messages):
    status, body, _ = server.post("/v1/chat/completions", json.dumps({"model": model, "messages": messages}).encode())
    assert status == 400
    assert body["error"]["message"]


def test_token_ids_outside_the_vocabulary_are_refused(complete):
    body = refusal(lambda: complete([2000, 2048], max_tokens=1), openai.BadRequestError)
    assert body["param"] == "prompt"


def test_an_empty_prompt_of_ids_is_refused(server, model):
    status, body, _ = server.post("/v1/completions", json.dumps({"model": model, "prompt": []}).encode())
    assert (status, body["error"]["param"]) == (400, "prompt")


def test_a_prompt_beyond_the_context_is_refused(ask):
    body = refusal(lambda: ask("What is 17 + 25? " * 400), openai.BadRequestError)
    assert body["code"] == "context_length_exceeded"
    assert "1024" in body["message"]


def test_an_image_is_refused_for_now(client, model):
    pixel = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": pixel}}]

    def call():
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": parts}])

    assert "not supported yet" in refusal(call, openai.BadRequestError)["message"]
