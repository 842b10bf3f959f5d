#!/usr/bin/env python3
"""One rank of eight of Maverick in PyTorch, bf16: microseconds of its parts, and decode steps added up from them.

    maverick_rank_torch.py [--seconds S]      one JSON object on stdout

What herd's `bench engine --random bench/maverick-rank-of-8.json` runs as a whole is measured here part by part, the fastest
way that PyTorch has for each, captured in CUDA graphs, over so many copies of the weights that none comes out of a cache. A
step is the sum of the parts' medians over all layers: no exchange, no sampling, no gap between kernels. So it flatters
PyTorch. Its experts' weights are bf16, twice as many bytes as herd's: what it has for FP8 weights wants FP8 activations,
too, which are other numbers. That is measured beside it, as `ms_per_step_fp8`.

Exit status: 3 without PyTorch or a GPU.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time

HIDDEN, HEADS, KV_HEADS, HEAD, VOCAB = 5120, 40, 8, 128, 202048
DENSE, EXPERT, EXPERTS, LAYERS = 16384, 8192, 16, 48
# Sequences: how many of a rank's 16 experts have rows when eight such ranks decode, each with one row per sequence.
STREAMS = {1: 1, 8: 6, 32: 14, 64: 16}
# A little less than a chunk of attention, so that sequences that go on stay in their first one.
CONTEXTS = (1024, 7680)
# Bytes that a pass over all copies reads at least: more than any second-level cache holds.
PASS_BYTES = 512 << 20

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    print("no PyTorch on this machine", file=sys.stderr)
    sys.exit(3)


def values(*shape, scale=0.02):
    return torch.empty(*shape, device="cuda", dtype=torch.bfloat16).normal_(0, scale)


def microseconds(calls, repeats=7):
    """Median time of one of some calls that are captured one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    graph.replay()
    taken = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) * 1e3 / len(calls))
    del kept
    return statistics.median(taken)


def copies(bytes_each):
    return max(2, math.ceil(PASS_BYTES / bytes_each))


def best(*ways):
    """Of those ways that this PyTorch has; None if it has none of them."""
    taken = []
    for way in ways:
        try:
            taken.append(microseconds(way))
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            print(f"skipped: {str(error).splitlines()[0]}", file=sys.stderr)
    return min(taken, default=None)


def projections(rows):
    qkv = (HEADS + 2 * KV_HEADS) * HEAD
    weights = [(values(qkv, HIDDEN), values(HIDDEN, HEADS * HEAD)) for _ in range(copies((qkv + HEADS * HEAD) * HIDDEN * 2))]
    x, y = values(rows, HIDDEN), values(rows, HEADS * HEAD)
    return microseconds([lambda w=w: (F.linear(x, w[0]), F.linear(y, w[1])) for w in weights])


def mlp(rows, width):
    weights = [(values(2 * width, HIDDEN), values(HIDDEN, width)) for _ in range(copies(3 * width * HIDDEN * 2))]
    x = values(rows, HIDDEN)

    def run(gate_up, down):
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    return microseconds([lambda w=w: run(*w) for w in weights])


def router(rows):
    weights = [values(128, HIDDEN) for _ in range(copies(128 * HIDDEN * 2))]
    x = values(rows, HIDDEN)
    return microseconds([lambda w=w: torch.sigmoid(torch.topk(F.linear(x, w), 1).values.float()) for w in weights])


def small(rows):
    """Both norms, residual additions and rotary embedding of a layer."""
    x, residual, heads, weight = values(rows, HIDDEN), values(rows, HIDDEN), values(rows, HEADS + KV_HEADS, HEAD), values(HIDDEN)
    cos, sin = values(rows, 1, HEAD // 2), values(rows, 1, HEAD // 2)

    def run():
        first = F.rms_norm(x, (HIDDEN,), weight, 1e-5)
        a, b = heads[..., ::2], heads[..., 1::2]
        return first, torch.stack((a * cos - b * sin, a * sin + b * cos), -1), F.rms_norm(x + residual, (HIDDEN,), weight, 1e-5) + residual

    return microseconds([run] * 20)


def head(rows):
    weight, x = values(VOCAB, HIDDEN), values(rows, HIDDEN)
    return microseconds([lambda: F.linear(x, weight)] * 2)


def attention(rows, context):
    bytes_each = 2 * rows * KV_HEADS * context * HEAD * 2
    caches = [(values(rows, KV_HEADS, context, HEAD), values(rows, KV_HEADS, context, HEAD)) for _ in range(copies(bytes_each))]
    q = values(rows, HEADS, 1, HEAD)
    grouped = q.view(rows, KV_HEADS, HEADS // KV_HEADS, HEAD)
    return best(
        [lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in caches],
        [lambda k=k, v=v: F.scaled_dot_product_attention(grouped, k, v) for k, v in caches],
    )


def experts(rows, active):
    gate_up = [values(EXPERTS, 2 * EXPERT, HIDDEN) for _ in range(2)]
    down = [values(EXPERTS, HIDDEN, EXPERT) for _ in range(2)]
    chosen = sorted(random.Random(rows).sample(range(EXPERTS), min(active, rows)))
    counts = [0] * EXPERTS
    for row in range(rows):
        counts[chosen[row % len(chosen)]] += 1
    x = values(rows, HIDDEN)

    def rotated(shift):
        return [counts[(expert + shift) % EXPERTS] for expert in range(EXPERTS)]

    def grouped(copy, counts):
        ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)

        def run():
            gate, up = torch._grouped_mm(x, gate_up[copy].transpose(-2, -1), offs=ends).chunk(2, -1)
            return torch._grouped_mm(F.silu(gate) * up, down[copy].transpose(-2, -1), offs=ends)

        return run

    def one_by_one(copy, counts):
        def run():
            begin, out = 0, []
            for expert, count in enumerate(counts):
                if count:
                    gate, up = F.linear(x[begin : begin + count], gate_up[copy][expert]).chunk(2, -1)
                    out.append(F.linear(F.silu(gate) * up, down[copy][expert]))
                    begin += count
            return out

        return run

    def scaled(values):
        """FP8 with a scale per row."""
        scale = values.abs().amax(-1).clamp_min(1e-12).float() / 448
        return (values / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale

    narrow = []

    def grouped_fp8(copy, counts):
        if not narrow:
            narrow.extend([[scaled(gate_up[i]), scaled(down[i])] for i in range(2)])
        (first, first_scale), (second, second_scale) = narrow[copy]
        ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)

        def product(x, weights, weights_scale):
            rows, rows_scale = scaled(x)
            return torch._scaled_grouped_mm(rows, weights.transpose(-2, -1), rows_scale, weights_scale, offs=ends, out_dtype=torch.bfloat16)

        def run():
            gate, up = product(x, first, first_scale).chunk(2, -1)
            return product(F.silu(gate) * up, second, second_scale)

        return run

    cases = [(copy, rotated(shift)) for shift in (range(0, EXPERTS, 4) if active < 6 else (0,)) for copy in (0, 1)]
    wide = best([grouped(*case) for case in cases], [one_by_one(*case) for case in cases])
    try:
        fp8 = [grouped_fp8(*case) for case in cases]
    except (RuntimeError, AttributeError) as error:
        print(f"skipped: {str(error).splitlines()[0]}", file=sys.stderr)
        return wide, None
    return wide, best(fp8)


def matrix_rate():
    """FLOP/s of a large product in bf16."""
    a, b = values(8192, 8192, scale=1), values(8192, 8192, scale=1)
    return 2 * 8192**3 / (microseconds([lambda: a @ b] * 4) / 1e6)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150, help="no case begins later")
    until = time.monotonic() + parser.parse_args().seconds
    if not torch.cuda.is_available():
        print("no GPU", file=sys.stderr)
        sys.exit(3)
    torch.manual_seed(7)
    torch.set_grad_enabled(False)
    result = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "matrix_tflops": matrix_rate() / 1e12, "steps": []}
    for streams, active in STREAMS.items():
        parts = {
            "attn_proj": LAYERS * projections(streams),
            "dense_mlp": LAYERS / 2 * mlp(streams, DENSE),
            "shared_expert": LAYERS / 2 * mlp(streams, EXPERT),
            "router": LAYERS / 2 * router(streams),
            "norm_rope_residual": LAYERS * small(streams),
            "lm_head": head(streams),
        }
        torch.cuda.empty_cache()
        wide, fp8 = experts(streams, active)
        parts["routed_experts"] = LAYERS / 2 * wide
        for context in CONTEXTS:
            torch.cuda.empty_cache()
            if until < time.monotonic():
                break
            all_parts = {**parts, "attention": LAYERS * attention(streams, context)}
            ms = {name: round(us / 1e3, 3) for name, us in all_parts.items()}
            step = {"streams": streams, "context": context, "ms": ms, "ms_per_step": round(sum(ms.values()), 3)}
            if fp8 is not None:
                step["ms_per_step_fp8"] = round(step["ms_per_step"] - ms["routed_experts"] + LAYERS / 2 * fp8 / 1e3, 3)
            result["steps"].append(step)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
