"""Two routers over one etcd: one leads, one stands by; killed and frozen leaders."""

import concurrent.futures
import json
import os
import pathlib
import re
import signal
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest

from load import Load
from server import Server

STREAMS = 20
TOKENS = 120
TAKE_OVER_MAX_S = 10  # of a frozen one: a lease of 2 s, a second's grace, and a busy machine
FROZEN_S = 5


def get(url, path):
    """(status, parsed body, headers)"""
    try:
        with urllib.request.urlopen(url + path, timeout=10) as reply:
            return reply.status, json.loads(reply.read()), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


class Routers:
    def __init__(self, server):
        self.server = server
        log = self.log()
        self.urls = [server.url, re.search(r"^router 1: (http://\S+) stands by$", log, re.MULTILINE).group(1)]
        self.names = ["router", "router 1"]
        self.clients = [openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) for url in self.urls]

    def log(self):
        self.server.log.flush()
        return pathlib.Path(self.server.log.name).read_text(errors="replace")

    def pid(self, index):
        return int(re.findall(rf"^{self.names[index]}: pid (\d+)$", self.log(), re.MULTILINE)[-1])

    def serves(self, index):
        try:
            return get(self.urls[index], "/health")[0] == 200
        except OSError:
            return False

    def leader(self):
        Load.until(lambda: self.serves(0) or self.serves(1), "a router serves", TAKE_OVER_MAX_S)
        return 0 if self.serves(0) else 1

    def until_standby(self, index):
        def stands_by():
            try:
                status, _, _ = get(self.urls[index], "/health")
                routers = get(self.urls[index], "/status")[1]["routers"]
            except OSError:
                return False
            return status == 503 and len(routers) == 2

        Load.until(stands_by, f"{self.names[index]} stands by", 30)

    def stream(self, index, seed, started=None):
        """The text of one seeded stream; raises what its client sees."""
        pieces = []
        chunks = self.clients[index].chat.completions.create(
            model="toy-maverick",
            messages=[{"role": "user", "content": f"Tell a long story about Carlos and number {seed}."}],
            max_tokens=TOKENS,
            temperature=0.7,
            seed=seed,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                pieces.append(chunk.choices[0].delta.content)
                if started:
                    started.release()
        return "".join(pieces)

    def all(self, index):
        with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
            return list(pool.map(lambda seed: self.stream(index, seed), range(STREAMS)))

    def disturbed(self, index, action):
        """Runs all streams at a router and calls `action` when every one is on its way: their texts, or their errors."""
        started = [threading.Semaphore(0) for _ in range(STREAMS)]

        def one(seed):
            try:
                return self.stream(index, seed, started[seed])
            except (openai.OpenAIError, OSError, Exception) as error:  # httpx's own errors have no common base with openai's
                return error

        pool = concurrent.futures.ThreadPoolExecutor(STREAMS)
        running = [pool.submit(one, seed) for seed in range(STREAMS)]
        for stream in started:
            assert stream.acquire(timeout=60), "a stream does not start"
        action()
        return running


@pytest.fixture(scope="module")
def routers():
    with Server("--processes", "--sequences", "64", "--routers", "2") as server:
        yield Routers(server)


@pytest.fixture(scope="module")
def peace(routers):
    return routers.all(routers.leader())


def test_standby_names_the_leader_and_serves_nothing(routers):
    leader = routers.leader()
    standby = 1 - leader
    routers.until_standby(standby)
    said = f"this router stands by; {routers.urls[leader]} serves"
    status, body, headers = get(routers.urls[standby], "/health")
    assert (status, body["error"]["message"], headers["Retry-After"]) == (503, said, "1")
    with pytest.raises(openai.InternalServerError) as refused:
        routers.stream(standby, 0)
    assert (refused.value.status_code, refused.value.body["message"], refused.value.body["code"]) == (503, said, "not_ready")
    assert refused.value.response.headers["Retry-After"] == "1"
    for index in (leader, standby):
        known = get(routers.urls[index], "/status")[1]["routers"]
        leading = [router["address"] for router in known if router["leader"]]
        assert leading == [routers.urls[leader].removeprefix("http://")]


def test_killed_leader_is_replaced_within_seconds_and_texts_are_equal(routers, peace):
    leader = routers.leader()
    standby = 1 - leader
    routers.until_standby(standby)
    killed = routers.pid(leader)
    running = routers.disturbed(leader, lambda: os.kill(killed, signal.SIGKILL))
    at = time.monotonic()
    outcomes = [stream.result(60) for stream in running]
    # A stream may be complete before the last one has begun.
    unseen = [seed for seed, outcome in enumerate(outcomes) if not isinstance(outcome, Exception) and outcome != peace[seed]]
    assert not unseen, f"clients of a killed router see it, but not those of {unseen}"
    assert any(isinstance(outcome, Exception) for outcome in outcomes), "the kill came too late"
    Load.until(lambda: routers.serves(standby), "the standby serves", TAKE_OVER_MAX_S)
    print(f"took over in {time.monotonic() - at:.1f} s")
    assert routers.all(standby) == peace
    # The supervisor has started it again, and it does not take the lead back.
    routers.until_standby(leader)
    assert routers.pid(leader) != killed
    assert routers.serves(standby)


def test_frozen_leader_comes_back_and_is_refused(routers, peace):
    leader = routers.leader()
    standby = 1 - leader
    routers.until_standby(standby)
    zombie = routers.pid(leader)
    running = routers.disturbed(leader, lambda: os.kill(zombie, signal.SIGSTOP))
    frozen = time.monotonic()
    try:
        Load.until(lambda: routers.serves(standby), "the standby serves", TAKE_OVER_MAX_S)
        later = routers.disturbed(standby, lambda: None)
        time.sleep(max(0, frozen + FROZEN_S - time.monotonic()))
    finally:
        os.kill(zombie, signal.SIGCONT)
    assert [stream.result(60) for stream in later] == peace, "nothing that the zombie did shows"
    outcomes = [stream.result(60) for stream in running]
    for seed, outcome in enumerate(outcomes):
        # A stream that was complete before the freeze may have been read late.
        if outcome != peace[seed]:
            assert "this router does not lead any more; retry at " + routers.urls[standby] in str(outcome), outcome
    assert any(isinstance(outcome, Exception) for outcome in outcomes), "the freeze came too late"
    routers.until_standby(leader)
    assert routers.pid(leader) == zombie, "it lives on as a standby"
    assert routers.all(standby) == peace


def test_zombie_that_cannot_ask_etcd_is_stopped_by_the_workers(routers, peace):
    """It wakes when another one leads and etcd is away, so that nothing but the workers can tell it."""
    leader = routers.leader()
    standby = 1 - leader
    routers.until_standby(standby)
    zombie, etcd = routers.pid(leader), int(re.search(r"^etcd: pid (\d+)$", routers.log(), re.MULTILINE).group(1))
    running = routers.disturbed(leader, lambda: os.kill(zombie, signal.SIGSTOP))
    try:
        Load.until(lambda: routers.serves(standby), "the standby serves", TAKE_OVER_MAX_S)
        later = routers.disturbed(standby, lambda: os.kill(etcd, signal.SIGSTOP))
        os.kill(zombie, signal.SIGCONT)
        # It stands by without knowing who leads: only a worker can have told it.
        Load.until(lambda: "this router stands by; no router leads yet" in health(routers, leader), "a worker refuses the zombie")
        assert [stream.result(60) for stream in later] == peace, "nothing that the zombie did shows"
        assert not routers.serves(leader)
    finally:
        os.kill(zombie, signal.SIGCONT)
        os.kill(etcd, signal.SIGCONT)
    for stream in running:
        stream.result(60)
    # The lease may have run out in the frozen etcd: then both of them stood for election again.
    leader = routers.leader()
    routers.until_standby(1 - leader)
    assert routers.all(leader) == peace


def health(routers, index):
    try:
        return str(get(routers.urls[index], "/health")[1])
    except OSError:
        return ""


def test_leader_that_drains_is_not_taken_for_dead(routers, peace):
    """Its streams end well, though it takes no more; then the other one leads. It is not started again, so this comes last."""
    leader = routers.leader()
    standby = 1 - leader
    routers.until_standby(standby)
    said = []

    def stop():
        os.kill(routers.pid(leader), signal.SIGTERM)
        Load.until(lambda: not routers.serves(leader), "the router drains", 10)
        said.append(get(routers.urls[leader], "/health"))
        with pytest.raises(openai.InternalServerError) as refused:
            routers.stream(leader, 0)
        said.append(refused.value.body["message"])

    running = routers.disturbed(leader, stop)
    assert [stream.result(60) for stream in running] == peace
    assert said[0][0] == 503 and "drains" in said[0][1]["error"]["message"], said
    assert "drain" in said[1], said
    Load.until(lambda: routers.serves(standby), "the standby serves", TAKE_OVER_MAX_S)
