#!/usr/bin/env bash
# The exchange beside other all-to-alls on this machine: alternating runs, one result file.
#
#   bench/exchange-vs-peers.sh [ROUNDS] [SECONDS] [RESULT]      writes bench/results/exchange-cpu.json
#
# Peers: Open MPI through shared memory and over TCP, gloo through torch.distributed, and copies through shared
# memory without any protocol, which no exchange can beat. Programs are built and torch is installed below $PEERS.
# Run it on quiet cores: the file records the load before each run, and a busy machine makes all sides meaningless.
set -euo pipefail

rounds=${1:-3}
seconds=${2:-0.5}
result=${3:-bench/results/exchange-cpu.json}
sizes="10240 81920 1310720 10485760"
cd "$(dirname "$0")/.."
peers=${PEERS:-${TMPDIR:-/tmp}/herd-peers}
herd=${HERD:-}
mkdir -p "$peers"

if [[ -z $herd ]]; then
    cargo build --release --package herd >&2
    herd=${CARGO_TARGET_DIR:-target}/release/herd
fi
if ! command -v mpicc >/dev/null; then
    apt-get install -y --no-install-recommends openmpi-bin libopenmpi-dev >&2
fi
if [[ ! -x $peers/venv/bin/python ]]; then
    python3 -m venv "$peers/venv"
    "$peers/venv/bin/pip" install --quiet torch==2.15.0 numpy >&2
fi
cc -O3 -march=native bench/peers/all_to_all_memory.c -o "$peers/memory"
mpicc -O3 -march=native bench/peers/all_to_all_mpi.c -o "$peers/mpi"

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
rows=$peers/exchange.jsonl
: >"$rows"

# Ranks outnumber the cores, so Open MPI may yield; every rival is asked for its best. Ranks are bound to processors in turn,
# since unbound ones gather on one at times, for whole runs; but not those of gloo, whose threads need the others.
mpi() {
    mpirun -n "$1" --oversubscribe --use-hwthread-cpus --map-by hwthread --bind-to hwthread:overload-allowed --mca mpi_yield_when_idle 1 --mca pml ob1 "${@:2}" \
        "$peers/mpi" "$seconds" $sizes 2>>"$peers/errors.log"
}
note() {
    local load
    load=$(cut -d' ' -f1 /proc/loadavg)
    sed -n 's/^{\(.*\)}$/{"peer":"'"$1"'","load":'"$load"',\1}/p' | tee -a "$rows" >&2
}

for ((round = 0; round < rounds; round++)); do
    for ranks in 2 4 8; do
        ours=(bench exchange --ranks "$ranks" --bytes "${sizes// /,}" --seconds "$seconds" --bind)
        "$herd" "${ours[@]}" --transport shm | note herd-shm
        mpi "$ranks" --mca btl self,vader | note openmpi-shm
        "$herd" "${ours[@]}" --transport tcp | note herd-tcp
        mpi "$ranks" --mca btl self,tcp --mca btl_tcp_if_include lo | note openmpi-tcp
        "$peers/memory" "$ranks" "$seconds" $sizes | note memory
        "$peers/venv/bin/python" bench/peers/all_to_all_gloo.py "$ranks" "$seconds" $sizes \
            2>>"$peers/errors.log" | note gloo
    done
done
python3 bench/exchange_vs_peers.py "$rows" "$result"
