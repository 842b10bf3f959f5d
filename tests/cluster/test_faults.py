"""Real processes, real etcd, real signals: no stream is lost and no token changes."""

import os
import random
import signal
import subprocess
import time

from server import BINARY, MODEL_DIR

KILLS = int(os.environ.get("HERD_TEST_KILLS", "4"))
CYCLES = int(os.environ.get("HERD_TEST_CYCLES", "2"))
WORKERS = 4


def test_killed_workers_lose_no_stream_and_change_no_token(load):
    dice = random.Random(7)
    for _ in range(KILLS):
        load.until_serving(WORKERS)
        victim = dice.choice(load.serving())
        epoch = load.status()["epoch"]
        load.during(lambda: os.kill(victim["pid"], signal.SIGKILL))
        assert load.status()["epoch"] > epoch
        assert victim["pid"] not in [member["pid"] for member in load.serving()]


def test_sequences_of_a_killed_worker_go_on_from_copies_of_their_rows(load):
    def computed(action):
        names = [f"herd_tokens_{what}_total" for what in ("restored", "prefilled")]
        before = [load.counter(name) for name in names]
        load.during(action)
        return [load.counter(name) - count for name, count in zip(names, before)]

    load.until_serving(WORKERS)
    victim = load.serving()[1]
    kept = []

    def kill():
        # A quarter of the streams lives on the victim, and the others keep copies of them.
        load.until(lambda: all(member["backup_tokens"] for member in load.serving()), "every worker keeps copies")
        kept.extend(member["backup_tokens"] for member in load.serving())
        os.kill(victim["pid"], signal.SIGKILL)

    restored, prompts = computed(lambda: None)
    assert (restored, prompts > 0) == (0, True)
    restored, prefilled = computed(kill)
    assert restored > 0.5 * sum(kept) / WORKERS, f"{restored} of {kept}"
    # What the copies lacked: some tokens of each stream.
    again = prefilled - prompts
    assert again < 8 * load.streams / WORKERS < restored, f"{again} were computed again, {restored} restored"
    load.until(lambda: not any(member["backup_tokens"] for member in load.serving()), "no copies are counted on of what has ended")


def test_frozen_worker_is_left_behind_and_comes_back(load):
    load.until_serving(WORKERS)
    victim = load.serving()[0]

    def freeze():
        os.kill(victim["pid"], signal.SIGSTOP)
        load.until(lambda: victim["worker"] not in [m["worker"] for m in load.serving()], "it is left behind")

    try:
        load.during(freeze)
    finally:
        os.kill(victim["pid"], signal.SIGCONT)
    load.until_serving(WORKERS)
    assert victim["pid"] in [member["pid"] for member in load.serving()], "it has registered again"


def test_killed_leader_is_replaced_and_the_view_stands(load):
    load.until_serving(WORKERS)
    before = load.status()
    leader = before["leader"]
    load.during(lambda: os.kill(leader, signal.SIGKILL))
    load.until(lambda: load.status().get("leader") not in (None, leader), "another one leads")
    load.until_serving(WORKERS)
    assert load.status()["epoch"] == before["epoch"], "the new leader adopts the view"
    # And it does its work.
    victim = load.serving()[1]
    load.during(lambda: os.kill(victim["pid"], signal.SIGKILL))


def test_leader_and_worker_killed_at_once_cost_no_more_than_the_worker(load):
    """Nobody waits for the leader's lease, nor for the dead to register with its successor."""
    load.until_serving(WORKERS)
    # A leader that has just been replaced stands by again when its supervisor has started it.
    load.until(lambda: len(load.status()["coordinators"]) == 2, "a coordinator stands by")
    time.sleep(1)
    leader, victim = load.status()["leader"], load.serving()[0]

    def kill():
        os.kill(leader, signal.SIGKILL)
        os.kill(victim["pid"], signal.SIGKILL)

    gaps = load.during(kill)
    print(f"the longest stall was {gaps[-1]:.2f} s")
    assert gaps[-1] < 4, "by patience alone it takes more than 5 s"
    load.until_serving(WORKERS)
    assert load.status()["leader"] != leader


def test_frozen_etcd_stops_nothing_and_membership_waits(load):
    load.until_serving(WORKERS)
    etcd = load.pid("etcd")
    os.kill(etcd, signal.SIGSTOP)
    try:
        load.during(lambda: time.sleep(1))
        load.during(lambda: time.sleep(1))
    finally:
        os.kill(etcd, signal.SIGCONT)
    # The leader's lease may have run out meanwhile: then a leader is elected and adopts the view.
    load.until_serving(WORKERS)
    victim = load.serving()[0]
    load.during(lambda: os.kill(victim["pid"], signal.SIGKILL))
    load.until_serving(WORKERS)


def test_worker_that_is_late_while_etcd_is_away_is_waited_for(load):
    load.until_serving(WORKERS)
    etcd, before, victim = load.pid("etcd"), load.status()["epoch"], load.serving()[-1]

    def stop_both():
        os.kill(etcd, signal.SIGSTOP)
        os.kill(victim["pid"], signal.SIGSTOP)
        time.sleep(1.6)
        os.kill(victim["pid"], signal.SIGCONT)

    try:
        # No view without the worker could count before etcd is back, so giving it up would help nobody.
        gaps = load.during(stop_both)
        assert gaps[-1] > 1.5, "the streams waited for the worker"
        assert load.status()["epoch"] == before
    finally:
        os.kill(victim["pid"], signal.SIGCONT)
        os.kill(etcd, signal.SIGCONT)
    load.until_serving(WORKERS)
    assert load.status()["epoch"] == before


def test_join_and_drain_under_load(load):
    load.until_serving(WORKERS)
    restored = load.counter("herd_tokens_restored_total")
    for cycle in range(CYCLES):
        command = [str(BINARY), "--log", "error", "worker", "--coordinator", load.coordinators(), "--model", str(MODEL_DIR)]
        # Who keeps no copies still has others keep some of its own sequences.
        keeps = cycle % 2 == 0
        command += [] if keeps else ["--backup-mib", "0"]
        joined = []

        def join():
            joined.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            load.until_serving(WORKERS + 1)

        load.during(join)
        victim = next(member for member in load.serving() if member["pid"] == joined[0].pid)

        def drain():
            def kept():
                return {member["worker"]: member["backup_tokens"] for member in load.serving()}

            load.until(lambda: any(tokens for worker, tokens in kept().items() if keeps == (worker == victim["worker"])), "copies are kept")
            assert keeps or kept()[victim["worker"]] == 0
            done = subprocess.run(
                [str(BINARY), "--log", "error", "drain", str(victim["worker"]), "--url", load.cluster.url], timeout=60, check=True, text=True, capture_output=True
            )
            assert f"worker {victim['worker']} has left" in done.stdout

        load.during(drain)
        assert joined[0].wait(60) == 0, "a drained worker ends well"
        load.until_serving(WORKERS)
    assert load.counter("herd_tokens_restored_total") > restored, "sequences of drained workers go on from copies"


def test_what_cannot_be_drained_is_said(load):
    done = subprocess.run([str(BINARY), "drain", "9999", "--url", load.cluster.url], timeout=60, text=True, capture_output=True)
    assert done.returncode == 1
    assert "worker 9999 is not drained: w9999 is no member" in done.stderr
