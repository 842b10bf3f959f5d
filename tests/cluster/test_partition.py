"""A cluster over several (virtual) hosts, and the network between them torn apart: real interfaces, real kernels.

Every group of workers lives in a network namespace of its own; etcd, coordinator and router are on the outside. One link
goes down and up again.
"""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
import urllib.request

import openai
import pytest

from load import Load
from server import BINARY, MODEL_DIR, free_port

NAME = f"hx{os.getpid() % 10000}"
NET = f"10.{os.getpid() % 200 + 20}.77"
HOSTS = {"a": 2, "b": 2}  # workers per namespace


def why_not():
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "there is no `ip`; install iproute2"
    probe = subprocess.run(["ip", "netns", "add", f"{NAME}probe"], capture_output=True, text=True)
    if probe.returncode:
        return f"network namespaces are refused here: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", f"{NAME}probe"], check=True)
    probe = subprocess.run(["ip", "link", "add", f"{NAME}p", "type", "bridge"], capture_output=True, text=True)
    if probe.returncode:
        return f"bridges are refused here: {probe.stderr.strip()}"
    subprocess.run(["ip", "link", "del", f"{NAME}p"], check=True)
    return None


REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


class Hosts:
    """A bridge that is this host, with one namespace on each of its ports."""

    made = 0

    def __init__(self):
        # The kernel takes its time to remove interfaces, so no two clusters have the same.
        Hosts.made += 1
        self.name = f"{NAME}{Hosts.made}"
        self.bridge = f"{self.name}br"
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{NET}.1/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        for number, host in enumerate(HOSTS):
            space, outside = f"{self.name}{host}", f"{self.name}{host}o"
            ip("netns", "add", space)
            ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", outside, "master", self.bridge, "up")
            ip("-n", space, "addr", "add", f"{NET}.{number + 2}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")

    def link(self, host, state):
        ip("link", "set", f"{self.name}{host}o", state)

    def isolate(self, state):
        """Keeps the namespaces from each other (`on`), though this host reaches them all; or not (`off`)."""
        for host in HOSTS:
            ip("link", "set", f"{self.name}{host}o", "type", "bridge_slave", "isolated", state)

    def remove(self):
        for host in HOSTS:
            ip("netns", "del", f"{self.name}{host}", check=False)
        ip("link", "del", self.bridge, check=False)


class Cluster:
    """etcd, a coordinator and a router on this host, workers in the namespaces. Like `Server`, for `Load`."""

    def __init__(self, hosts):
        self.hosts = hosts
        self.folder = tempfile.TemporaryDirectory()
        self.processes = []
        etcd, peer, coordinator, port = free_port(), free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)
        urls = [f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{peer}"]
        self.start(
            ["etcd", "--data-dir", f"{self.folder.name}/etcd", "--log-level", "error", "--name", "herd", "--listen-client-urls", urls[0]]
            + ["--advertise-client-urls", urls[0], "--listen-peer-urls", urls[1], "--initial-advertise-peer-urls", urls[1]]
            + ["--initial-cluster", f"herd={urls[1]}"]
        )
        self.start([BINARY, "coordinator", "--listen", f"{NET}.1:{coordinator}", "--etcd", urls[0], "--workers", str(sum(HOSTS.values())), "--redundancy", "1"])
        at = f"http://{NET}.1:{coordinator}"
        for number, (host, workers) in enumerate(HOSTS.items()):
            inside = ["ip", "netns", "exec", f"{hosts.name}{host}", BINARY, "worker", "--coordinator", at, "--model", MODEL_DIR]
            for _ in range(workers):
                self.start([*inside, "--listen", f"{NET}.{number + 2}:0", "--threads", "1", "--sequences", "64"])
        self.start([BINARY, "router", "--model", MODEL_DIR, "--listen", f"127.0.0.1:{port}", "--coordinator", at, "--sequences", "64"])

    def start(self, command):
        log = open(pathlib.Path(self.folder.name) / f"{len(self.processes)}.log", "w", encoding="utf-8")
        self.processes.append(subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT))
        log.close()

    def logs(self):
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(pathlib.Path(self.folder.name).glob("*.log")))

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as reply:
            return reply.read().decode()

    def router(self):
        return json.loads(self.get("/status"))["router"]

    def stop(self):
        self.client.close()
        for process in reversed(self.processes):
            process.kill()
        for process in self.processes:
            process.wait(20)
        self.folder.cleanup()


@pytest.fixture
def cluster():
    hosts = Hosts()
    try:
        running = Cluster(hosts)
        try:
            yield running
        finally:
            # Shown if the test fails.
            print(running.logs())
            running.stop()
    finally:
        hosts.remove()


def hosts_of(load):
    return sorted(member["address"].split(":")[0] for member in load.serving())


EVERYBODY = [f"{NET}.{number + 2}" for number, workers in enumerate(HOSTS.values()) for _ in range(workers)]


@pytest.fixture
def load(cluster):
    """A load on a cluster that serves with all its workers."""

    def answers():
        try:
            return json.loads(cluster.get("/status"))["epoch"] > 0 and cluster.router()["ready"]
        except (OSError, KeyError, TypeError):
            return False

    Load.until(answers, "the cluster serves", 60)
    load = Load(cluster)
    Load.until(lambda: hosts_of(load) == EVERYBODY, "all workers serve at their own addresses")
    return load


def check_epochs(load, after):
    status = load.status()
    assert status["epoch"] > after
    epochs = [change["epoch"] for change in status["changes"]]
    assert epochs == sorted(set(epochs)), "no epoch has two views"


def test_side_with_the_leader_goes_on_and_the_other_one_joins_again(cluster, load):
    for host, left in [("b", EVERYBODY[:2]), ("a", EVERYBODY[2:])]:
        epoch = load.status()["epoch"]

        def tear():
            cluster.hosts.link(host, "down")
            load.until(lambda: hosts_of(load) == left, "one side is left")

        load.during(tear)
        # It stays so while the network does, and requests are answered by one side alone.
        assert hosts_of(load) == left
        status = load.status()
        assert status["epoch"] > epoch and [c["leader"] for c in status["coordinators"]].count(True) == 1
        load.during(lambda: (cluster.hosts.link(host, "up"), time.sleep(0.2)))
        Load.until(lambda: hosts_of(load) == EVERYBODY, "the other side has joined again", 60)
        check_epochs(load, status["epoch"])
        # Those who come back serve streams, and spoil none.
        load.during(lambda: None)


def test_workers_that_only_each_other_do_not_reach_part_at_once(cluster, load):
    epoch = load.status()["epoch"]

    def tear():
        cluster.hosts.isolate("on")
        load.until(lambda: len(set(hosts_of(load))) == 1, "one side is left")

    load.during(tear)
    left, status = hosts_of(load), load.status()
    assert len(left) == 2
    parted = [change for change in status["changes"] if change["epoch"] > epoch]
    failed, lost = parted[:2]
    assert "step failed" in failed["cause"] and "do not reach each other" in lost["cause"], parted
    # The others ask to come back while the network is still torn, and change nothing.
    load.during(lambda: time.sleep(5))
    assert hosts_of(load) == left, load.status()["changes"]
    cluster.hosts.isolate("off")
    Load.until(lambda: hosts_of(load) == EVERYBODY, "the other side has joined again", 60)
    check_epochs(load, status["epoch"])
    load.during(lambda: None)
