#!/usr/bin/env bash
# The CPU engine beside llama.cpp on one checkpoint: alternating runs, best of each case, one result file.
#
#   bench/engine-vs-llama.sh MODEL_DIR [ROUNDS]        writes bench/results/engine-cpu.json
#
# Make the checkpoint with:  herd synth --config bench/mini-maverick.json --out MODEL_DIR
# Run it on quiet cores: the file records the load before each run, and a busy machine makes both sides meaningless.
set -euo pipefail

if (($# < 1)); then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
model=$(realpath "$1")
rounds=${2:-3}

cd "$(dirname "$0")/.."
cargo build --release --package herd >&2
bench/llama-cpp.sh "$model" prepare
python3 bench/engine_vs_llama.py "$model" --rounds "$rounds" --output bench/results/engine-cpu.json
