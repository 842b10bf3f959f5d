"""Many clients at once, clients that leave, and a full queue."""

import concurrent.futures
import json
import threading
import time

import pytest

from prompts import SUM, SUM_ANSWER, STORY, text_of
from server import Server

STREAMS = 64
LEAVE_MAX_S = 2  # until nothing of a client that left is computed any more


def questions():
    """64 different requests of unlike lengths; every fourth is sampled, so that its seed matters."""
    for i in range(STREAMS):
        content = STORY if i % 8 == 0 else f"What is {10 + i} + {90 - i}?"
        sampling = {"temperature": 1.2, "seed": i} if i % 4 == 1 else {"temperature": 0}
        yield {"content": content, "max_tokens": 20 + i, "extra_body": {"ignore_eos": i % 3 == 0}, **sampling}


def test_64_streams_at_once_equal_one_after_the_other(server, ask):
    alone = [text_of(ask(stream=True, **question)) for question in questions()]
    with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        barrier = threading.Barrier(STREAMS)

        def together(question):
            barrier.wait(30)
            return text_of(ask(stream=True, **question))

        crowd = list(pool.map(together, list(questions())))
    assert crowd == alone
    assert len(set(alone)) > STREAMS // 2, "the questions have mostly the same answer"
    server.wait_until_idle(LEAVE_MAX_S)


LONG = {"max_tokens": 900, "stream": True, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def leave_max_s(server, ask):
    """The limit for freeing a stream, but less than half of what its whole answer takes: else finishing would pass for leaving."""
    server.wait_until_idle(LEAVE_MAX_S)
    start = time.monotonic()
    text_of(ask(STORY, **LONG))
    return min(LEAVE_MAX_S, (time.monotonic() - start) / 2)


def test_a_client_that_leaves_frees_its_stream(server, ask, leave_max_s):
    stream = ask(STORY, **LONG)
    for _ in range(3):
        next(stream)
    assert server.router()["streams"] == 1
    stream.close()
    server.wait_until_idle(leave_max_s)
    assert ask(SUM).choices[0].message.content == SUM_ANSWER


def test_many_clients_that_leave_free_everything(server, ask, leave_max_s):
    streams = [ask(STORY, n=2, **LONG) for _ in range(8)]
    for stream in streams:
        next(stream)
    assert server.router()["streams"] >= 8
    for stream in streams:
        stream.close()
    server.wait_until_idle(leave_max_s)


def test_metrics_are_prometheus_text(server, ask):
    ask(SUM)
    text = server.get("/metrics")
    samples = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert samples and all(len(line.rsplit(" ", 1)) == 2 for line in samples)
    assert "# TYPE" in text
    for line in samples:
        float(line.rsplit(" ", 1)[1])


@pytest.fixture(scope="module")
def narrow():
    """One running sequence and two waiting per rank, so that a handful of clients fills it."""
    with Server("--dtype", "f32", "--workers", "1", "--queue", "2", "--sequences", "1") as running:
        yield running


def test_a_full_queue_refuses_with_retry_after(narrow):
    request = {
        "model": "toy-maverick",
        "messages": [{"role": "user", "content": STORY}],
        "temperature": 0,
        "max_tokens": 600,
        "ignore_eos": True,
    }
    body = json.dumps(request).encode()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda _: narrow.post("/v1/chat/completions", body), range(16)))
    statuses = [status for status, _, _ in replies]
    assert set(statuses) == {200, 429}, statuses
    texts = {reply["choices"][0]["message"]["content"] for status, reply, _ in replies if status == 200}
    assert len(texts) == 1
    for status, reply, headers in replies:
        if status == 429:
            assert int(headers["Retry-After"]) >= 1
            assert reply["error"]["message"]
    narrow.wait_until_idle(LEAVE_MAX_S)
    status, reply, _ = narrow.post("/v1/chat/completions", json.dumps({**request, "max_tokens": 5}).encode())
    assert status == 200
