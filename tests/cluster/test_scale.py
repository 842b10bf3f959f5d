"""More and fewer workers, and the experts' load, while streams run."""

import json
import subprocess
import threading

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


def fullest_if_even(rows, placement):
    """What the fullest worker would have had as a multiple of the mean, averaged over the layers."""
    worst = []
    for layer, holders in zip(rows, placement):
        ranks = [0.0] * WORKERS
        for count, of in zip(layer, holders):
            for rank in of:
                ranks[rank] += count / len(of)
        worst.append(max(ranks) * WORKERS / sum(ranks))
    return sum(worst) / len(worst)


def test_shares_of_the_copies_follow_the_load(load):
    """Every expert has two copies. Which of them serves a row changes while the streams run, and no token does."""
    load.until_serving(WORKERS)
    epoch = load.status()["epoch"]
    is_over = threading.Event()

    def same_again_and_again(_):
        """All streams want the same few experts."""
        texts = set()
        while not is_over.is_set():
            answer = load.cluster.client.chat.completions.create(
                model=load.model,
                messages=[{"role": "user", "content": "What is 17 + 25?"}],
                max_tokens=100,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            texts.add(answer.choices[0].message.content)
        return texts

    running = [load.pool.submit(same_again_and_again, number) for number in range(load.streams)]
    try:
        # One that began before may end first; the next one but one is of this load and its shares alone.
        for _ in range(3):
            before = load.status()["load"]
            load.until(lambda: load.status()["load"] != before, "a window ends")
        after = load.status()
    finally:
        is_over.set()
    assert len(set().union(*(texts.result(60) for texts in running))) == 1
    assert after["epoch"] == epoch, "nothing else has changed"
    placement, parts = after["placement"], after["shares"]["parts"]
    assert [[len(of) for of in layer] for layer in parts] == [[len(of) for of in layer] for layer in placement]
    assert all(abs(sum(of) - 1) < 0.01 for layer in parts for of in layer)
    fullest, if_even = after["load"]["fullest"], fullest_if_even(after["load"]["rows"], placement)
    assert fullest - 1 < (if_even - 1) / 2, f"the fullest worker has {fullest} of the mean, with equal shares {if_even}"
