"""The exchange's benchmark, as its users call it; every rank compares what it got itself."""

import json
import os
import pathlib
import subprocess
import time

from server import BINARY


def test_exchange_is_timed_between_processes():
    command = [BINARY, "bench", "exchange", "--ranks", "2,3", "--bytes", "10240,1310720", "--seconds", "0.005", "--bind"]
    done = subprocess.run([str(part) for part in command], check=True, timeout=300, text=True, capture_output=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    cases = [(ranks, each, transport) for ranks in (2, 3) for each in (10240, 1310720) for transport in ("tcp", "shm")]
    assert [(line["procs"], line["pair_bytes"], line["transport"]) for line in lines] == cases
    for line in lines:
        assert 0 < line["us_best"] <= line["us_median"] <= line["us_p90"]
        crossing = line["procs"] * (line["procs"] - 1) * line["pair_bytes"]
        # Both are rounded, to 0.1 us and to 0.001 GB/s.
        gigabytes, seconds = crossing / 1e9, line["us_median"] / 1e6
        slack = 0.06e-6 * gigabytes / seconds**2 + 0.0006
        assert abs(line["GBs_cross_median"] - gigabytes / seconds) <= slack


def processors(ranks):
    """The processors that each rank's process may use; none while one of them has not bound itself."""
    children = pathlib.Path(f"/proc/{ranks.pid}/task/{ranks.pid}/children").read_text().split()
    status = [pathlib.Path(f"/proc/{child}/status").read_text() for child in children]
    allowed = [next(line.split()[1] for line in text.splitlines() if line.startswith("Cpus_allowed_list")) for text in status]
    return sorted(allowed) if all(one.isdigit() for one in allowed) else []


def test_ranks_are_bound_to_a_processor_each():
    command = [str(BINARY), "bench", "exchange", "--ranks", "2", "--bytes", "1310720", "--seconds", "1", "--transport", "tcp", "--bind"]
    free = [str(one) for one in sorted(os.sched_getaffinity(0))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as ranks:
        while len(bound := processors(ranks)) != 2:
            assert ranks.poll() is None, "the ranks were never bound"
            time.sleep(0.01)
    assert ranks.returncode == 0
    assert bound == sorted((free + free)[:2])
