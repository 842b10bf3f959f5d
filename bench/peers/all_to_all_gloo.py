"""All-to-all of equal blocks with torch.distributed on gloo: a line of JSON per block size.

    all_to_all_gloo.py RANKS SECONDS BYTES...

Every rank has BYTES for every rank, itself included, and writes them anew before each round; a round takes as
long as its slowest rank.
"""
import json
import os
import socket
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WARM_ROUNDS, ROUNDS_MIN, ROUNDS_MAX = 5, 15, 4000


def measure(rank, ranks, block, seconds):
    source = torch.zeros(ranks * block, dtype=torch.uint8)
    target = torch.zeros_like(source)
    begin = time.perf_counter()
    for _ in range(WARM_ROUNDS):
        dist.all_to_all_single(target, source)
    rounds = int(seconds / ((time.perf_counter() - begin) / WARM_ROUNDS))
    rounds = torch.tensor([min(max(rounds, ROUNDS_MIN), ROUNDS_MAX)])
    dist.broadcast(rounds, 0)
    took = torch.zeros(int(rounds), dtype=torch.float64)
    for i in range(int(rounds)):
        source.fill_(rank + 1)
        dist.barrier()
        begin = time.perf_counter()
        dist.all_to_all_single(target, source)
        took[i] = time.perf_counter() - begin
        dist.barrier()  # who is done takes no core from who is not
    dist.all_reduce(took, dist.ReduceOp.MAX)
    assert [int(target[i * block]) for i in range(ranks)] == list(range(1, ranks + 1))
    if rank == 0:
        took = took.sort().values * 1e6
        best, median = round(took[0].item(), 1), round(took[len(took) // 2].item(), 1)
        line = {"procs": ranks, "pair_bytes": block, "iters": len(took), "us_best": best, "us_median": median}
        print(json.dumps(line), flush=True)


def work(rank, ranks, seconds, blocks, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    for block in blocks:
        measure(rank, ranks, block, seconds)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    ranks, seconds, blocks = int(sys.argv[1]), float(sys.argv[2]), [int(word) for word in sys.argv[3:]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (ranks, seconds, blocks, port), nprocs=ranks)
