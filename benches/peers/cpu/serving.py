"""What the workers of the CPU peers share: their command line and the requests that they answer.

    with_PEER.py convert HF_DIR FOLDER FORMAT            write the peer's own form of a model
    with_PEER.py serve HF_DIR FOLDER FORMAT              answer requests, one JSON object a line

    {"do": "load"}                                   ->  {"load_ms", "weight_bytes", "note", "versions"}
    {"do": "measure", "batch", "prompt", "steps", "runs"}
                                                     ->  {"first_ms": [...], "step_ms": [...]}
    {"do": "memory"}                                 ->  {"peak_bytes"}

A run feeds `batch` prompts of `prompt` tokens at once and chooses each one's next token greedily, in
`first_ms`; then `steps` tokens more a sequence, one after another whatever they are, in `step_ms` each
(none of 0 steps). One run that is not counted goes before; where it takes long it counts, alone. Weight
bytes are those that the peer keeps for a step. The lines travel as in ../worker.py.
"""

import argparse
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import worker

LONG_RUN_S = 6


class Unsupported(Exception):
    """The peer does not have this format, model or processor; the message says which."""


def main(description, convert, load):
    """`convert(args)` with what the command line says; `load(args)` gives a System."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["convert", "serve"])
    parser.add_argument("hf_dir", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("format")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="the form that the peer compiles itself")
    args = parser.parse_args()
    if args.do == "convert":
        try:
            convert(args)
        except Unsupported as error:
            sys.exit(f"unsupported: {error}")
    else:
        serve(lambda: load(args))


class System:
    """A loaded model: `generate(batch, prompt, steps)` gives (first_ms, step_ms)."""

    weight_bytes = 0
    note = ""
    versions = ""


def serve(load):
    system = None

    def handle(request):
        nonlocal system
        if request["do"] == "load":
            start = time.perf_counter()
            system = load()
            load_ms = (time.perf_counter() - start) * 1e3
            return {"load_ms": load_ms, "weight_bytes": system.weight_bytes, "note": system.note, "versions": system.versions}
        if request["do"] == "memory":
            return {"peak_bytes": peak_bytes()}
        size = request["batch"], request["prompt"], request["steps"]
        start = time.perf_counter()
        runs = [system.generate(*size)]
        if request["runs"] and time.perf_counter() - start < LONG_RUN_S:
            runs = [system.generate(*size) for _ in range(request["runs"])]
        return {"first_ms": [first for first, _ in runs], "step_ms": [step for _, step in runs if step is not None]}

    worker.answer(handle)


def peak_bytes():
    """The most memory that was resident since the program started (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def timed_steps(first, step, steps):
    """Milliseconds of `first()`, and of one of so many calls of `step()` after it."""
    start = time.perf_counter()
    first()
    middle = time.perf_counter()
    for _ in range(steps):
        step()
    end = time.perf_counter()
    return (middle - start) * 1e3, (end - middle) * 1e3 / steps if steps else None


def prompt_rows(batch, length, vocab_size):
    """Token ids that differ, none of the first four, among which are OPT's special ones."""
    return [[(at * 7919) % (vocab_size - 4) + 4 for at in range(row * length, (row + 1) * length)] for row in range(batch)]


def file_bytes(folder, *patterns):
    return sum(path.stat().st_size for pattern in patterns for path in Path(folder).glob(pattern))
