#!/usr/bin/env bash
# llama.cpp on a herd-made checkpoint: builds it once under target/peers, converts once, then runs bench/llama_cpp.py.
#
#   bench/llama-cpp.sh MODEL_DIR (time|logits) [options of llama_cpp.py]
#   bench/llama-cpp.sh MODEL_DIR prepare        only build and convert
set -euo pipefail

if (($# < 2)); then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
model=$(realpath "$1")
command=$2
shift 2

cd "$(dirname "$0")/.."
peers=$PWD/target/peers
venv=$peers/llama-venv
mkdir -p "$peers"

# The wheel on PyPI is generic code; a fair rival is compiled for this processor.
if [[ ! -e $venv/complete ]]; then
    for tool in cmake ninja g++; do
        command -v "$tool" >/dev/null || {
            echo "llama-cpp.sh: $tool is missing (apt-get install cmake ninja-build g++ python3-venv)" >&2
            exit 1
        }
    done
    echo "llama-cpp.sh: building llama.cpp, about ten minutes" >&2
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet numpy==2.4.6 gguf==0.19.0 >&2
    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DGGML_LLAMAFILE=ON" \
        CMAKE_BUILD_PARALLEL_LEVEL="${HERD_BENCH_JOBS:-2}" \
        "$venv/bin/pip" install --quiet --no-binary llama-cpp-python llama-cpp-python==0.3.36 >&2
    touch "$venv/complete"
fi

# One file per checkpoint path and content stamp, so that another seed or shape is not mistaken for this one.
stamp=$(cd "$model" && stat -c '%n %s %Y' config.json ./*.safetensors | sha256sum | cut -c1-16)
gguf=$peers/$(basename "$model")-$stamp.gguf
if [[ ! -e $gguf ]]; then
    echo "llama-cpp.sh: converting $model" >&2
    "$venv/bin/python" bench/llama_cpp.py convert "$model" "$gguf" >&2
fi

[[ $command == prepare ]] && exit 0
# Without passive waiting two threads on a busy machine spend their time in spin barriers.
# llama.cpp logs to stderr; stdout is one JSON object per line.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
OMP_WAIT_POLICY=passive "$venv/bin/python" bench/llama_cpp.py "$command" "$gguf" "$@" 2>"$log" || {
    tail -n 20 "$log" >&2
    exit 1
}
