"""compute-sanitizer over `kiln generate`: memory errors, races in shared memory, misused barriers."""

import json
import re
import subprocess

from .common import Skip, prompt_ids, tool

# kiln asks the driver for a kernel's parameters until there are none left, and checks all other calls itself.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": [], "synccheck": []}
QUICK_FIXTURES = ["tiny-opt"]
FIXTURES = ["tiny-opt", "tiny-opt-post", "tiny-opt-d80", "tiny-gpt2"]
# Below one block of the KV cache, above it, and over several; then enough steps to enter a new block.
PROMPT_LENGTHS = [1, 7, 40, 90]
NEW_TOKENS = 20
UNSUPPORTED = ["Device not supported", "device is not supported"]


def run(context, report):
    if not context.on_gpu:
        raise Skip("there is no GPU to sanitize")
    if not (sanitizer := tool("compute-sanitizer")):
        raise Skip("compute-sanitizer is not installed")
    no_graphs = ["--no-graphs"] if context.offers("generate", "--no-graphs") else []
    for fixture in QUICK_FIXTURES if context.quick else FIXTURES:
        bundle = context.compile(str(context.fixture(fixture)))
        requests = context.path("sanitizer.jsonl")
        lines = [
            json.dumps({"prompt_ids": prompt_ids(length, seed, 250), "max_new_tokens": NEW_TOKENS, "ignore_eos": True})
            for seed, length in enumerate(PROMPT_LENGTHS)
        ]
        requests.write_text("\n".join(lines) + "\n")
        command = [context.program("kiln"), "generate", bundle, "--json", "--input", requests, "--device", context.device]
        for name, flags in TOOLS.items():
            done = subprocess.run(
                [sanitizer, "--tool", name, *flags, *command, *no_graphs],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            )
            if any(text in done.stdout for text in UNSUPPORTED):
                raise Skip("compute-sanitizer does not support this device")
            errors = error_count(done.stdout)
            passed = errors == 0 and done.returncode == 0
            detail = "no summary" if errors is None else f"{errors} errors"
            if not passed:
                print(done.stdout[-20000:])
                detail += f", status {done.returncode}: {first_error(done.stdout)}"
            report.check(f"{name} {fixture}", passed, detail)


def error_count(output):
    """The errors that compute-sanitizer counted, or None where it came to no summary."""
    if found := re.search(r"ERROR SUMMARY: (\d+) error", output):
        return int(found[1])
    if found := re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", output):
        return int(found[1])
    return None


def first_error(output):
    """The first line that says what went wrong: the sanitizer's, or else kiln's own."""
    lines = [line.strip("= ").strip() for line in output.splitlines() if line.startswith("=========")]
    words = ("Invalid", "Error", "error", "hazard", "Barrier", "Race", "Program hit")
    said = [line for line in lines if any(word in line for word in words) and "SUMMARY" not in line]
    said += [line for line in output.splitlines() if line.startswith("error:")]
    return said[0] if said else ""
