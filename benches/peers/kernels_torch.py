"""Times PyTorch's kernels on the shapes of a table of `kiln-perf`: linear layers and attention, in f32 and bf16.

    {"threads", "repeat", "warm_up", "rotated_bytes", "shapes": [...]}  on standard input
    [[{"format", "us": [...]}, ...], ...]                               on standard output, a list a shape

Operands go round in copies that together are larger than the caches, whatever the rounds.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F


def linear(shape, dtype):
    """Gives the bytes of a copy, a maker of copies, and what is timed."""
    rows, n, k = shape["rows"], shape["n"], shape["k"]
    x = torch.full((rows, k), 0.5, dtype=dtype)
    return n * k * dtype.itemsize, lambda: torch.full((n, k), 0.01, dtype=dtype), lambda w: F.linear(x, w)


def attention(shape, dtype):
    sequences, queries, positions = shape["sequences"], shape["queries"], shape["positions"]
    heads, head_dim = shape["heads"], shape["head_dim"]
    q = torch.randn(sequences, heads, queries, head_dim).to(dtype)
    # A single query sees every position; a prompt has no past here.
    causal = queries > 1
    size = (2, sequences, heads, positions, head_dim)
    bytes_of_copy = 2 * sequences * heads * positions * head_dim * dtype.itemsize
    return (
        bytes_of_copy,
        lambda: torch.randn(size).to(dtype),
        lambda kv: F.scaled_dot_product_attention(q, kv[0], kv[1], is_causal=causal),
    )


def measure(request, shape, dtype):
    bytes_of_copy, make, run = {"linear": linear, "attention": attention}[shape["kind"]](shape, dtype)
    rounds = request["warm_up"] + request["repeat"]
    copies = [make() for _ in range(-(-request["rotated_bytes"] // bytes_of_copy))]
    times = []
    for turn in range(rounds):
        operand = copies[turn % len(copies)]
        start = time.perf_counter()
        run(operand)
        times.append((time.perf_counter() - start) * 1e6)
    return {"format": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype], "us": times[request["warm_up"] :]}


def main():
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    with torch.inference_mode():
        answers = [
            [measure(request, shape, dtype) for dtype in (torch.float32, torch.bfloat16)]
            for shape in request["shapes"]
        ]
    json.dump(answers, sys.stdout)


main()
