"""Runs the fault scenarios at full length on a cluster of real processes and writes what clients saw.

Needs a release binary, etcd and nothing else; scripts/chaos-full builds and calls it. Every scenario gets a cluster of
its own. Figures are those of `herd chaos`: a stall is the longest time between two pieces of one stream, since the fault.
"""

import argparse
import json
import os
import pathlib
import platform
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[1]
HERD = ROOT / "target" / "release" / "herd"
SCENARIOS = ["freeze-workers", "kill-leader", "kill-leader-and-worker", "kill-workers"]
STREAMS = 40  # of the parts that this file loads itself
WORKERS = 4
PEACE_S = 8  # load before the first fault
OUTAGE_S = 60


class Cluster:
    def __init__(self, *flags):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [HERD, "--log", "warn", "up", "--processes", "--sequences", "80", "--rebalance-s", "0", "--listen", f"127.0.0.1:{port}", *flags]
        # In the session of the workers that join: Linux shares processors out by session first, and loading gives way within one.
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0)

    def __enter__(self):
        self.until(WORKERS)
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise

    def status(self):
        with urllib.request.urlopen(f"{self.url}/status", timeout=10) as reply:
            return json.load(reply)

    def members(self):
        try:
            return [member for member in self.status().get("members", []) if member["state"] == "serving"]
        except OSError:
            return []

    def until(self, workers):
        deadline = time.monotonic() + 180
        while len(self.members()) != workers:
            assert time.monotonic() < deadline, f"{workers} workers do not serve"
            time.sleep(0.05)

    def child(self, name):
        """The pid of a role, which is a child of `herd up`."""
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return next(int(pid) for pid in children.split() if pathlib.Path(f"/proc/{pid}/comm").read_text().strip() == name)

    def join(self, model):
        # All of them: any may lead when the worker is ready.
        coordinator = ",".join(coordinator["url"] for coordinator in self.status()["coordinators"])
        command = [HERD, "--log", "error", "worker", "--coordinator", coordinator, "--model", model, "--sequences", "80"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def herd(self, *arguments):
        return subprocess.run([HERD, "--log", "error", *arguments, "--url", self.url], check=True, capture_output=True, text=True, timeout=120).stdout


def synthetic(name):
    """A random checkpoint of the shape in bench/NAME.json, made when it is first needed: mini-maverick has 3 GB, wide-maverick 0.4."""
    folder = ROOT / "target" / name
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        # Every token shall be text, or a stall could not be seen.
        config = json.loads((ROOT / "bench" / f"{name}.json").read_text())
        config |= {"vocab_size": 2048, "bos_token_id": 2000, "eos_token_id": 2001, "pad_token_id": 2018}
        partial.with_suffix(".json").write_text(json.dumps(config))
        subprocess.run([HERD, "synth", "--config", partial.with_suffix(".json"), "--tokenizer", ROOT / "models" / "toy-maverick", "--out", partial], check=True)
        partial.rename(folder)
    return folder


class Load:
    """Greedy streams, one after the other, of which every text must always be the same."""

    def __init__(self, cluster, skewed, model="toy-maverick", tokens=200, streams=STREAMS):
        self.url, self.skewed = f"{cluster.url}/v1/chat/completions", skewed
        self.model, self.tokens = model, tokens
        self.ended, self.gaps, self.texts, self.errors, self.different = False, [], {}, [], 0
        self.threads = [threading.Thread(target=self.run, args=(number,), daemon=True) for number in range(streams)]
        for thread in self.threads:
            thread.start()

    def run(self, number):
        kind = number % 4 if self.skewed else number
        while not self.ended:
            try:
                text = self.stream("What is 17 + 25?" if self.skewed and kind else f"Tell a long story about Carlos and number {kind}.")
            except (OSError, RuntimeError) as error:
                self.errors.append(str(error))
                continue
            if self.texts.setdefault(kind, text) != text:
                self.different += 1

    def stream(self, prompt):
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": self.tokens, "temperature": 0, "stream": True, "ignore_eos": True}
        request = urllib.request.Request(self.url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
        pieces, last = [], None
        with urllib.request.urlopen(request, timeout=120) as reply:
            for line in reply:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                now = time.monotonic()
                if last:
                    self.gaps.append((now, now - last))
                last = now
                pieces.append(event["choices"][0]["delta"].get("content") or "" if event["choices"] else "")
        return "".join(pieces)

    def end(self):
        self.ended = True
        for thread in self.threads:
            thread.join()
        return {"streams_ended": len(self.texts), "failed": len(self.errors), "different": self.different}

    def within(self, since, until):
        return sorted(gap for at, gap in self.gaps if since <= at < until)

    def gap_p99(self, since, until):
        gaps = self.within(since, until)
        return round(gaps[int(len(gaps) * 0.99)], 4)

    def gap_max(self, since, until):
        return round(self.within(since, until)[-1], 4)


def scenario(name, rounds, model=ROOT / "models" / "toy-maverick"):
    flags = ["--rounds", str(rounds)] if rounds else []
    with Cluster("--model", model) as cluster, tempfile.TemporaryDirectory() as report:
        command = [HERD, "--log", "error", "chaos", ROOT / "bench" / "chaos" / f"{name}.toml", "--url", cluster.url, "--report", report, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        peace = json.loads((pathlib.Path(report) / "report.json").read_text())["in_peace"]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    p50, p99 = ([row[f"stall_{part}_s"] for row in rows] for part in ("p50", "p99"))
    detect = [change["detect_ms"] for row in rows for change in row["changes"] if change["detect_ms"] is not None]
    first = [change["first_token_ms"] for row in rows for change in row["changes"] if change["first_token_ms"] is not None and " lost" in change["cause"]]
    return {
        "scenario": name,
        "model": model.name,
        "exit_code": done.returncode,
        "rounds": len(rows),
        "streams_lost": sum(row["lost"] for row in rows),
        "streams_different": sum(row["different"] for row in rows),
        "stall_p50_s": {"median": statistics.median(p50), "worst_round": max(p50)},
        "stall_p99_s": {"median": statistics.median(p99), "worst_round": max(p99)},
        "stall_max_s": max(row["stall_max_s"] for row in rows),
        # Of a round without a fault: some tokens have no text, so a client waits for the next ones.
        "in_peace": {f"stall_{part}_s": peace[f"stall_{part}_s"] for part in ("p50", "p99", "max")},
        "detect_ms_median": statistics.median(detect) if detect else None,
        "decision_to_first_token_ms_median": round(statistics.median(first), 1) if first else None,
    }


def join_and_drain(cycles, model=ROOT / "models" / "toy-maverick", **load):
    with Cluster("--model", model) as cluster:
        load = Load(cluster, skewed=False, model=model.name, **load)
        time.sleep(PEACE_S)
        start = time.monotonic()
        for _ in range(cycles):
            joined = cluster.join(model)
            cluster.until(WORKERS + 1)
            time.sleep(0.5)
            worker = next(member["worker"] for member in cluster.members() if member["pid"] == joined.pid)
            cluster.herd("drain", str(worker))
            assert joined.wait(60) == 0
            cluster.until(WORKERS)
        end = time.monotonic()
        time.sleep(3)
        changes = cluster.status()["changes"]
        outcome = load.end()
    return {
        "scenario": "join-and-drain",
        "model": model.name,
        "cycles": cycles,
        **outcome,
        "gap_p99_s": {"before": load.gap_p99(0, start), "during": load.gap_p99(start, end)},
        "gap_max_s": {"before": load.gap_max(0, start), "during": load.gap_max(start, end)},
        "view_changes": len(changes),
    }


def shares(window_s):
    """Every expert twice: the shares of its copies level a skewed load by themselves."""
    with Cluster("--spare-experts", "0") as cluster:
        load = Load(cluster, skewed=True)
        time.sleep(2 * window_s + 1)
        status, outcome = cluster.status(), load.end()
    rows = status["load"]["rows"]
    hottest = sum(max(layer) * len(layer) / sum(layer) for layer in rows) / len(rows)
    return {
        "scenario": "shares",
        **outcome,
        "hottest_expert_over_mean": round(hottest, 3),
        "shares_told": status["shares"]["told"],
        "measured_max_over_mean": round(status["load"]["fullest"], 3),
        "view_changes": len(status["changes"]) - 1,
    }


def rebalance(window_s):
    """Every expert once, and a place to spare: experts must move to level a skewed load."""
    with Cluster("--redundancy", "0", "--spare-experts", "1") as cluster:
        load = Load(cluster, skewed=True)
        time.sleep(2 * window_s + 1)
        before, start = cluster.status()["load"]["fullest"], time.monotonic()
        answer = json.loads(cluster.herd("rebalance", "--json"))
        moved = time.monotonic() + 2
        time.sleep(2 * window_s + 1)
        after, end = cluster.status()["load"]["fullest"], time.monotonic()
        outcome = load.end()
    return {
        "scenario": "rebalance",
        **outcome,
        "planned": {"before": round(answer["before"], 3), "after": round(answer["after"], 3), "outcome": answer["outcome"]},
        "measured_max_over_mean": {"before": round(before, 3), "after": round(after, 3)},
        "gap_p99_s": {"before": load.gap_p99(0, start), "during": load.gap_p99(start, moved), "after": load.gap_p99(moved, end)},
    }


def etcd_outage(model=ROOT / "models" / "toy-maverick"):
    """etcd stands still: nobody may notice but a worker that wants to join, which waits and then does."""
    with Cluster() as cluster:
        load = Load(cluster, skewed=False)
        time.sleep(PEACE_S)
        etcd, start = cluster.child("etcd"), time.monotonic()
        os.kill(etcd, signal.SIGSTOP)
        try:
            joined = cluster.join(model)
            time.sleep(OUTAGE_S)
            members, end = len(cluster.members()), time.monotonic()
        finally:
            os.kill(etcd, signal.SIGCONT)
        cluster.until(WORKERS + 1)
        waited = time.monotonic() - end
        outcome = load.end()
        joined.terminate()
        joined.wait(30)
    return {
        "scenario": "etcd-outage",
        **outcome,
        "seconds": OUTAGE_S,
        "gap_p99_s": {"before": load.gap_p99(0, start), "during": load.gap_p99(start, end)},
        "gap_max_s": {"before": load.gap_max(0, start), "during": load.gap_max(start, end)},
        "members_at_its_end": members,
        "joined_after_it_s": round(waited, 2),
    }


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, help="of every scenario, instead of its own")
    arguments.add_argument("--output", type=pathlib.Path, default=ROOT / "bench" / "results" / "chaos.json")
    arguments = arguments.parse_args()
    results = []
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    machine = {"cpu": cpu, "cores": os.cpu_count(), "model": "toy-maverick", "workers": WORKERS}
    version = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()

    def note(result):
        print(json.dumps(result), flush=True)
        results.append(result)
        # After every part: a run that is cut short is not lost.
        document = {"command": "scripts/chaos-full", "commit": version, "machine": machine, "results": results}
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")

    note(shares(10))
    note(rebalance(10))
    note(etcd_outage())
    note(join_and_drain(arguments.rounds or 20))
    for name in SCENARIOS:
        note(scenario(name, arguments.rounds))
    note(scenario("kill-workers", arguments.rounds or 10, synthetic("wide-maverick")))
    note(join_and_drain(arguments.rounds or 5, model=synthetic("mini-maverick"), tokens=48, streams=16))
    note(scenario("kill-workers-large", arguments.rounds, synthetic("mini-maverick")))


if __name__ == "__main__":
    main()
