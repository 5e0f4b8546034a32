"""kiln-conformance: every kernel of the device against the CPU's, with graphs and without.

Models are compiled and run by a process each, several at a time.
"""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path

from . import common

ELEMENTS = ["f16", "bf16"]
# Of a model; one that hangs is stopped, and what it had said is kept.
TIMEOUT_S = 300
QUICK_TIMEOUT_S = 60


def run(context, report):
    program = Path(context.program("kiln-conformance"))
    if not program.is_file():
        report.check("kiln-conformance is there", False, f"not in {program.parent}")
        return
    subjects = common.run([program, "--list"]).split()
    flags = [[], ["--no-graphs"]] if context.on_gpu else [[]]
    count = 0
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        jobs = [pool.submit(model, context, program, *job) for job in product(subjects, ELEMENTS, flags)]
        for job in as_completed(jobs):
            name, cases, status = job.result()
            count += len(cases)
            report.check_all(cases)
            report.check(f"{name}: ends with the status of its cases", *judge(cases, status))
    report.fact("cases", count)


def model(context, program, subject, element, flags):
    """Name, cases and status of one model; the status is text where there is none."""
    name = " ".join([subject, element, *flags])
    command = [program, "--device", context.device, "--json", "--only", subject, "--dtype", element, *flags]
    try:
        timeout = QUICK_TIMEOUT_S if context.quick else TIMEOUT_S
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
        output, status = done.stdout, done.returncode
        print(done.stderr, end="", flush=True)
    except subprocess.TimeoutExpired as stopped:
        output, status = (stopped.stdout or b"").decode(errors="replace"), f"stopped after {timeout} s"
    cases = [case for line in output.splitlines() if (case := parse(line))]
    for case in cases:
        case["case"] = " ".join([case["case"], *flags])
    return name, cases, status


def judge(cases, status):
    """Whether a status is that of such cases, and what to say of it."""
    passed = all(case["passed"] for case in cases)
    return bool(cases) and status in (0, 1) and (status == 0) == passed, f"status {status}, {len(cases)} cases"


def parse(line):
    """The case of a line {"case", "passed", "detail"}, or None for any other line."""
    try:
        value = json.loads(line)
        return {"case": str(value["case"]), "passed": value["passed"] is True, "detail": str(value.get("detail") or "")}
    except (ValueError, KeyError, TypeError):
        return None
