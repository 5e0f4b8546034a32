#!/usr/bin/env python3
"""Time of a prefill in f32, kiln against transformers on PyTorch, in turn on the same threads.

    prefill.py HF_DIR BUNDLE --kiln target/release/kiln [--tokens 512] [--rounds 7] [--threads 2]

HF_DIR comes from `kilnc export`, BUNDLE from `kilnc compile --weights f32` of the same model. Both
compute the whole prompt and the logits of its last position. Each round times one after the other;
the figure is the ratio of the medians. Prints JSON.
"""

import argparse
import json
import statistics
import subprocess
import time

import torch
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dir")
    parser.add_argument("bundle")
    parser.add_argument("--kiln", default="target/release/kiln")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.hf_dir, dtype=torch.float32, local_files_only=True).eval()
    ids = torch.arange(5, 5 + args.tokens).unsqueeze(0)
    with torch.inference_mode():
        model(ids, logits_to_keep=1)
        times = {"torch_ms": [], "kiln_ms": []}
        for _ in range(args.rounds):
            start = time.perf_counter()
            model(ids, logits_to_keep=1)
            times["torch_ms"].append((time.perf_counter() - start) * 1e3)
            times["kiln_ms"].append(kiln_prefill_ms(args))
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = {name: min(values) for name, values in times.items()}
    print(json.dumps({
        "tokens": args.tokens,
        "threads": args.threads,
        "torch": torch.__version__,
        "median": medians,
        "best": best,
        "kiln_over_torch": medians["kiln_ms"] / medians["torch_ms"],
        "kiln_over_torch_best": best["kiln_ms"] / best["torch_ms"],
        "rounds": times,
    }, indent=1))


def kiln_prefill_ms(args):
    """One measured prefill after a warm-up, in a process of its own."""
    command = [args.kiln, "bench", args.bundle, "--prompt-len", str(args.tokens), "--gen-len", "2",
               "--repeat", "1", "--threads", str(args.threads), "--json"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return report["prefill"]["ms"]["median"]


if __name__ == "__main__":
    main()
