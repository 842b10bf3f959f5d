"""More and fewer workers, and the experts' load, while streams run."""

import json
import subprocess

from server import BINARY

WORKERS = 4


def herd(*arguments):
    done = subprocess.run([str(BINARY), "--log", "error", *arguments], timeout=90, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scale_down_and_up_under_load(load):
    load.until_serving(WORKERS)
    url = load.cluster.url
    youngest = max(member["worker"] for member in load.serving())
    said = []
    load.during(lambda: said.append(herd("scale", str(WORKERS - 1), "--url", url)))
    assert f"worker {youngest} has left the cluster" in said[0] and f"{WORKERS - 1} workers serve" in said[0]
    assert load.status()["workers_wanted"] == WORKERS - 1
    load.during(lambda: said.append(herd("scale", str(WORKERS), "--url", url)))
    assert "1 more must be started" in said[1] and f"{WORKERS} workers serve" in said[1]
    assert youngest not in [member["worker"] for member in load.serving()]


def test_scale_without_anybody_to_start_workers_says_what_is_missing(load):
    load.until_serving(WORKERS)
    url = load.cluster.url
    done = subprocess.run([str(BINARY), "scale", "0", "--url", url], timeout=60, text=True, capture_output=True)
    assert done.returncode == 2 and "0 is not in 1..=1024" in done.stderr


def test_rebalance_levels_what_the_experts_have_to_do(load):
    load.until_serving(WORKERS)
    before = load.status()["epoch"]
    answers = []
    load.during(lambda: answers.append(json.loads(herd("rebalance", "--json", "--url", load.cluster.url))))
    answer = answers[0]
    after = load.status()
    # The streams' load was counted; either levelling it is worth a view change, or it is level.
    assert answer["outcome"] in ("levelled", "level"), answer
    assert 1.0 <= answer["after"] <= answer["before"], answer
    if answer["outcome"] == "levelled":
        assert after["epoch"] >= answer["epoch"] > before
        change = next(change for change in after["changes"] if change["epoch"] == answer["epoch"])
        assert change["cause"] == "rebalance" and change["expert_loads"] > 0
    else:
        assert after["epoch"] == before
    rows = [member["rows"] for member in load.serving()]
    assert sum(rows) > 0 and 1.0 <= after["load"]["fullest"] <= WORKERS


def test_shares_of_the_copies_follow_the_load(load):
    """Every expert has two copies. Which of them serves a row changes while the streams run, and no token does."""
    load.until_serving(WORKERS)
    epoch = load.status()["epoch"]
    told = load.status()["shares"]["told"]

    def whole_window():
        """Until ten seconds of load were counted in which the shares followed."""
        before = load.status()["load"]
        load.until(lambda: load.status()["load"] != before, "a window ends")

    for _ in range(6):
        load.during(whole_window)
        after = load.status()
        if after["shares"]["told"] >= told + 2:
            break
    assert after["shares"]["told"] >= told + 2
    assert after["epoch"] == epoch, "nothing else has changed"
    placement, parts = after["placement"], after["shares"]["parts"]
    assert [[len(of) for of in layer] for layer in parts] == [[len(of) for of in layer] for layer in placement]
    assert all(abs(sum(of) - 1) < 0.01 for layer in parts for of in layer)
    uneven = [of for layer in parts for of in layer if len(of) == 2 and abs(of[0] - 0.5) > 0.1]
    assert uneven, parts
