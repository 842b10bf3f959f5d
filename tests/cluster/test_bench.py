"""The exchange's benchmark, as its users call it; every rank compares what it got itself."""

import json
import subprocess

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
