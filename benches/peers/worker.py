"""How a peer is asked for measurements: one JSON object a line, each answered by one.

    {"do": "prepare", ...what to measure}  ->  {"seconds", "note"}  built, compiled, warmed up
    {"do": "measure", ...the same}         ->  {"ms"}               a step or prefill, median of some runs

Anything that goes wrong is answered as {"error"}, and the worker goes on. What libraries print goes to
standard error.
"""

import argparse
import json
import os
import statistics
import sys
import time
import traceback


def arguments(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--config", required=True, help="an entry of `kilnc configs --json`")
    args = parser.parse_args()
    return args.device, json.loads(args.config)


def serve(prepare):
    """Answer requests until standard input ends.

    `prepare(request)` gives (measure, note), where `measure()` runs some steps and gives milliseconds a
    step.
    """
    prepared = {}

    def handle(request):
        key = json.dumps({name: request.get(name) for name in ("phase", "variant", "batch", "prompt")})
        if request["do"] != "prepare":
            return {"ms": settled(prepared[key])}
        start = time.perf_counter()
        prepared[key], note = prepare(request)
        prepared[key]()
        return {"seconds": time.perf_counter() - start, "note": note}

    answer(handle)


def answer(handle):
    """Answer each line of standard input with `handle(request)`, or with its error."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            reply = handle(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")


def settled(measure):
    """The median of at least three runs within about a second, after one that wakes the clocks."""
    measure()
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < 1:
        times.append(measure())
    return statistics.median(times)
