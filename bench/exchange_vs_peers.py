"""Puts the rows of exchange-vs-peers.sh together: per peer and case the best and the median microseconds.

    exchange_vs_peers.py ROWS.jsonl RESULT.json

A case was run several times, in turns with the others: the best is the best of all its runs, the median the
smallest median of a run, since other work on the machine can only add to it.
"""
import json
import os
import platform
import subprocess
import sys
import time


def cpu_model():
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def congestion_control():
    """Who paces the connections of all sides, unless they choose for themselves."""
    with open("/proc/sys/net/ipv4/tcp_congestion_control") as file:
        return file.read().strip()


def main(rows_path, result_path):
    with open(rows_path) as lines:
        rows = [json.loads(line) for line in lines]
    cases = {}
    for row in rows:
        case = cases.setdefault((row["procs"], row["pair_bytes"]), {})
        best, median = case.get(row["peer"], (float("inf"), float("inf")))
        case[row["peer"]] = (min(best, row["us_best"]), min(median, row["us_median"]))
    table = []
    for (procs, pair_bytes), peers in sorted(cases.items()):
        line = {"procs": procs, "pair_bytes": pair_bytes}
        for peer, (best, median) in sorted(peers.items()):
            gb_per_s = procs * (procs - 1) * pair_bytes / median / 1e3
            line[peer] = {"us_best": best, "us_median": median, "gb_per_s": round(gb_per_s, 2)}
        table.append(line)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    loads = [row["load"] for row in rows]
    result = {
        "what": "microseconds of one all-to-all between processes of one machine, as long as its slowest rank; "
                "every rank writes its buffers anew before each round",
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "cpu": {"model": cpu_model(), "logical_processors": os.cpu_count(), "kernel": platform.release()},
        "tcp_congestion_control": congestion_control(),
        "load": {"least": min(loads), "most": max(loads)},
        # Real-time priority, the same for all sides, keeps other work of a busy machine away from the cores.
        "real_time_priority": os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR),
        "runs": len(rows),
        "cases": table,
    }
    with open(result_path, "w") as out:
        json.dump(result, out, indent=1)
        out.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
