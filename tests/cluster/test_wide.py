"""A checkpoint in Maverick's proportions: 128 experts per MoE layer, of which every worker can hold but a part.

Random weights, 0.4 GB. Memory for the experts decides here, unlike with the toy model: copies are made out of other
members' memory, and a worker that joins takes a part of all of them.
"""

import subprocess

import pytest

from chaos import Run
from load import Load
from server import BINARY, ROOT, Server

WORKERS = 4
EXPERTS = 128


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "wide"
    command = [BINARY, "synth", "--config", ROOT / "bench" / "wide-maverick.json", "--tokenizer", ROOT / "models" / "toy-maverick", "--out", folder]
    subprocess.run([str(part) for part in command], check=True, timeout=120, capture_output=True)
    with Server("--processes", "--model", str(folder), "--sequences", "16", "--rebalance-s", "0") as running:
        load = Load(running, model="wide", streams=12, tokens=60)
        load.until_serving(WORKERS)
        yield load, folder


def held(load):
    return sorted(member["experts"] for member in load.serving())


def test_killed_worker_leaves_its_experts_to_the_others(wide, tmp_path):
    load, _ = wide
    layers = 4
    assert sum(held(load)) == 2 * layers * EXPERTS and max(held(load)) <= 1.1 * min(held(load))
    epoch = load.status()["epoch"]
    run = Run(load.cluster, tmp_path, 'kind = "kill"\ntarget = "worker"\nafter_s = [0.5, 1.0]', with_links=False, tokens=60).check()
    assert run.report["streams"] == 12
    load.until_serving(WORKERS)
    changes = [change for change in load.status()["changes"] if change["epoch"] > epoch]
    lost = next(change for change in changes if " lost: " in change["cause"])
    assert lost["expert_loads"] == 0, "every expert had a second copy, so the streams wait for none"

    def whole():
        return sum(held(load)) == 2 * layers * EXPERTS and max(held(load)) <= 1.1 * min(held(load))

    load.until(whole, "the copies are made again, and the worker that was started again holds its part")


def test_worker_joins_and_is_drained_under_load(wide):
    load, folder = wide
    coordinator = next(c["url"] for c in load.status()["coordinators"] if c["leader"])
    command = [BINARY, "worker", "--coordinator", coordinator, "--model", folder, "--sequences", "16"]
    log = folder.parent / "joined.log"
    with open(log, "w", encoding="utf-8") as out:
        joined = subprocess.Popen([str(part) for part in command], stdout=out, stderr=subprocess.STDOUT)
    try:
        load.until_serving(WORKERS + 1)
        worker, experts = next((m["worker"], m["experts"]) for m in load.serving() if m["pid"] == joined.pid)
        assert experts >= 0.9 * min(held(load)), "it takes its part of the experts"
        drained = [str(BINARY), "--log", "error", "drain", str(worker), "--url", load.cluster.url]
        load.during(lambda: subprocess.run(drained, check=True, timeout=60))
        assert joined.wait(30) == 0
        load.until_serving(WORKERS)
    finally:
        joined.kill()
        joined.wait()
    change = next(c for c in load.status()["changes"] if f"w{worker} joined" in c["cause"])
    assert change["expert_loads"] > 0 and change["given_up"] is None
