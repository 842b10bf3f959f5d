#!/usr/bin/env python3
"""Runs `herd bench engine` and llama.cpp in turn and keeps the best of each case. Called by engine-vs-llama.sh.

Both sides print one JSON object per line with `case` ("prefill", "decode", "decode-8", "decode-32"; a side may lack some)
and `tokens_per_s`. The result file holds every line of every round, so that the spread can be seen as well as the best.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUN_MAX_S = 900  # of one side in one round; llama.cpp needs about 30 s on quiet cores


def cpu():
    """Model name, logical processors and the instruction sets that decide between kernels."""
    fields = {}
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")
    return {
        "model": fields.get("model name", platform.processor() or platform.machine()),
        "logical_processors": os.cpu_count(),
        "instruction_sets": [flag for flag in wanted if flag in flags],
        "kernel": platform.release(),
    }


def run(command):
    load = os.getloadavg()[0]
    start = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=RUN_MAX_S, check=True)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    lines = [line for line in lines if "case" in line and "tokens_per_s" in line]
    if not lines:
        raise SystemExit(f"no line with `case` and `tokens_per_s` from: {' '.join(command)}\n{result.stdout}")
    return {"load_before": round(load, 2), "wall_s": round(time.monotonic() - start, 2), "lines": lines}


def best(rounds):
    figures = {}
    for round_ in rounds:
        for line in round_["lines"]:
            figures[line["case"]] = max(figures.get(line["case"], 0.0), line["tokens_per_s"])
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--herd", default="target/release/herd")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()

    sizes = ["--threads", str(args.threads), "--prompt", str(args.prompt), "--decode", str(args.decode)]
    commands = {
        "herd": [args.herd, "bench", "engine", "--model", args.model, "--dtype", "bf16", *sizes],
        "llama.cpp": ["bench/llama-cpp.sh", args.model, "time", *sizes],
    }
    rounds = {name: [] for name in commands}
    for number in range(args.rounds):
        # Who goes first alternates too, so that neither side always finds the caches and clocks of the other.
        order = list(commands) if number % 2 == 0 else list(reversed(commands))
        for name in order:
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
            rounds[name].append(run(commands[name]))

    figures = {name: best(runs) for name, runs in rounds.items()}
    ratio = {case: round(value / figures["llama.cpp"][case], 3) for case, value in figures["herd"].items() if case in figures["llama.cpp"]}
    config = json.loads((pathlib.Path(args.model) / "config.json").read_text())
    config = config.get("text_config", config)
    result = {
        "what": "tokens per second, best of the rounds; ratio = herd / llama.cpp, above 1 means herd is faster",
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "cpu": cpu(),
        "model": {key: config[key] for key in ("hidden_size", "num_hidden_layers", "num_local_experts", "vocab_size")},
        "threads": args.threads,
        "dtype": "bf16",
        "peer": "llama.cpp through llama-cpp-python 0.3.36, GGML_NATIVE, OMP_WAIT_POLICY=passive",
        "best_tokens_per_s": figures,
        "ratio": ratio,
        "rounds": rounds,
    }
    output = ROOT / args.output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"best_tokens_per_s": figures, "ratio": ratio, "cpu": result["cpu"]["model"]}))


if __name__ == "__main__":
    main()
