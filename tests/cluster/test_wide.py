"""A checkpoint in Maverick's proportions: 128 experts per MoE layer, of which every worker can hold but a part.

Random weights, 0.4 GB. Memory for the experts decides here, unlike with the toy model: copies are made out of other
members' memory, and a worker that joins takes a part of all of them.
"""

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from chaos import Run
from load import Load
from server import BINARY, ROOT, Server

WORKERS = 4
EXPERTS = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "wide"
    command = [BINARY, "synth", "--config", ROOT / "bench" / "wide-maverick.json", "--tokenizer", ROOT / "models" / "toy-maverick", "--out", folder]
    subprocess.run([str(part) for part in command], check=True, timeout=120, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wide(model):
    with Server("--processes", "--model", str(model), "--sequences", "16", "--rebalance-s", "0") as running:
        load = Load(running, model="wide", streams=12, tokens=60)
        load.until_serving(WORKERS)
        yield load


def held(load):
    return sorted(member["experts"] for member in load.serving())


def test_killed_worker_leaves_its_experts_to_the_others(wide, tmp_path):
    load = wide
    layers = 4
    assert sum(held(load)) == 2 * layers * EXPERTS and max(held(load)) <= 1.1 * min(held(load))
    epoch = load.status()["epoch"]
    run = Run(load.cluster, tmp_path, 'kind = "kill"\ntarget = "worker"\nafter_s = [0.3, 0.5]', with_links=False, tokens=250).check()
    assert run.report["streams"] == 12
    load.until_serving(WORKERS)
    changes = [change for change in load.status()["changes"] if change["epoch"] > epoch]
    lost = next(change for change in changes if " lost: " in change["cause"])
    assert lost["expert_loads"] == 0, "every expert had a second copy, so the streams wait for none"

    def whole():
        return sum(held(load)) == 2 * layers * EXPERTS and max(held(load)) <= 1.1 * min(held(load))

    load.until(whole, "the copies are made again, and the worker that was started again holds its part")


def background_seconds(pid):
    """Processor time of the threads that send and take experts; they give way to those of steps."""
    seconds = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name, spent = (task / "comm").read_text().strip(), (task / "schedstat").read_text().split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue  # other threads come and go
        if name == "background":
            assert os.getpriority(os.PRIO_PROCESS, int(task.name)) == min(19, os.getpriority(os.PRIO_PROCESS, pid) + 10)
            seconds += int(spent) / 1e9
    return seconds


def test_worker_joins_and_is_drained_under_load(wide, model):
    load = wide
    before = {member["pid"]: background_seconds(member["pid"]) for member in load.serving()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [BINARY, "worker", "--coordinator", load.coordinators(), "--model", model, "--sequences", "16", "--experts-port", port]
    log = model.parent / "joined.log"
    with open(log, "w", encoding="utf-8") as out:
        joined = subprocess.Popen([str(part) for part in command], stdout=out, stderr=subprocess.STDOUT)
    try:
        load.until_serving(WORKERS + 1)
        worker, experts = next((m["worker"], m["experts"]) for m in load.serving() if m["pid"] == joined.pid)
        assert experts >= 0.9 * min(held(load)), "it takes its part of the experts"
        sent = {pid: background_seconds(pid) - seconds for pid, seconds in before.items()}
        assert 0.005 < max(sent.values()), f"they come from a port of their own, served by threads of their own: {sent}"
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        second = subprocess.run([str(part) for part in command], timeout=60, text=True, capture_output=True)
        assert second.returncode == 1 and f"cannot listen on 127.0.0.1:{port} for experts" in second.stderr, second.stderr
        drained = [str(BINARY), "--log", "error", "drain", str(worker), "--url", load.cluster.url]
        load.during(lambda: subprocess.run(drained, check=True, timeout=60))
        assert joined.wait(30) == 0
        load.until_serving(WORKERS)
    finally:
        joined.kill()
        joined.wait()
    change = next(c for c in load.status()["changes"] if f"w{worker} joined" in c["cause"])
    assert change["expert_loads"] > 0 and change["given_up"] is None


def small(model):
    """Flags of a worker that can hold some 50 of the 128 experts."""
    return ["--model", str(model), "--sequences", "16", "--memory-mib", "180", "--kv-mib", "16"]


def test_streams_wait_until_there_is_memory_for_all_experts_again(model):
    with Server("--processes", "--workers", "3", "--no-restart", "--rebalance-s", "0", *small(model)) as running:
        load = Load(running, model="wide", streams=12, tokens=60)
        load.until_serving(3)
        assert 4 * EXPERTS <= sum(held(load)) < 2 * 4 * EXPERTS, "no room for all second copies"
        victim = load.serving()[0]
        another = []

        def lose_one_and_start_another():
            os.kill(victim["pid"], signal.SIGKILL)
            load.until(lambda: load.status().get("waiting"), "it says what it waits for")
            waiting = load.status()["waiting"]
            assert re.search(r"the memory of 2 workers holds \d+ experts of each MoE layer, which has 128; start another worker", waiting), waiting
            command = [str(BINARY), "--log", "error", "worker", "--coordinator", load.coordinators(), *small(model)]
            another.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))

        try:
            load.during(lose_one_and_start_another)
            assert load.status()["waiting"] is None
            load.until_serving(3)
            refused = subprocess.run([str(BINARY), "drain", str(load.serving()[0]["worker"]), "--url", running.url], timeout=60, text=True, capture_output=True)
            assert refused.returncode == 1 and "start another worker, or give them more" in refused.stderr, refused.stderr
        finally:
            for process in another:
                process.kill()
                process.wait()


@pytest.mark.parametrize("role", [["up"], ["worker", "--coordinator", "http://127.0.0.1:1"]])
def test_too_little_memory_is_refused_with_the_numbers(model, role):
    command = [str(BINARY), *role, "--model", str(model), "--kv-mib", "8", "--memory-mib", "10"]
    done = subprocess.run(command, timeout=60, text=True, capture_output=True)
    assert done.returncode == 2 and "--memory-mib" in done.stderr and "MiB" in done.stderr, done.stderr
