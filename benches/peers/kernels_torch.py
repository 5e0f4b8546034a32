"""Times PyTorch's kernels on the shapes of a table of `kiln-perf`: linear layers and attention, in bf16 and, on a CPU, in
f32, on a GPU in f16.

    {"device", "threads", "repeat", "warm_up", "rotated_bytes", "shapes": [...]}  on standard input
    [[{"format", "us": [...]}, ...], ...]                                         on standard output, a list a shape

Operands go round in copies that together are larger than the caches, whatever the rounds.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F

FORMATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FORMATS_OF = {"cpu": ["f32", "bf16"], "cuda": ["f16", "bf16"]}
# A GPU is given something else to do for about 10 ms, while so many products and their events are enqueued behind it.
BUSY_CYCLES = 20_000_000
QUEUED = 64


def linear(shape, dtype):
    """Gives the bytes of a copy, a maker of copies, and what is timed."""
    rows, n, k = shape["rows"], shape["n"], shape["k"]
    x = torch.randn(rows, k).to(dtype)
    return n * k * dtype.itemsize, lambda: torch.randn(n, k, dtype=dtype), lambda w: F.linear(x, w)


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


def times_on_cpu(run, operands):
    times = []
    for operand in operands:
        start = time.perf_counter()
        run(operand)
        times.append(time.perf_counter() - start)
    return times


def times_on_gpu(run, operands):
    """From one event to the next, of products that wait in the queue: an idle GPU would wait for the host in between."""
    times = []
    for first in range(0, len(operands), QUEUED):
        queued = operands[first : first + QUEUED]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(queued) + 1)]
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)
        events[0].record()
        for operand, event in zip(queued, events[1:]):
            run(operand)
            event.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(end) / 1e3 for start, end in zip(events, events[1:])]
    return times


def measure(request, shape, name):
    bytes_of_copy, make, run = {"linear": linear, "attention": attention}[shape["kind"]](shape, FORMATS[name])
    copies = [make() for _ in range(-(-request["rotated_bytes"] // bytes_of_copy))]
    rounds = [copies[turn % len(copies)] for turn in range(request["warm_up"] + request["repeat"])]
    # What is prepared on first use is not timed, and nothing is enqueued behind it.
    times_of = times_on_gpu if torch.device(request["device"]).type == "cuda" else times_on_cpu
    times_of(run, rounds[: request["warm_up"]])
    return {"format": name, "us": [1e6 * seconds for seconds in times_of(run, rounds[request["warm_up"] :])]}


def main():
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    device = torch.device(request["device"])
    torch.set_default_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with torch.inference_mode():
        answers = [
            [measure(request, shape, name) for name in FORMATS_OF[device.type]] for shape in request["shapes"]
        ]
    json.dump(answers, sys.stdout)


main()
