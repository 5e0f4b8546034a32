"""kiln-conformance: every kernel of the device against the CPU's."""

import json
import subprocess
from pathlib import Path


def run(context, report):
    program = Path(context.program("kiln-conformance"))
    if not program.is_file():
        report.check("kiln-conformance is there", False, f"not in {program.parent}")
        return
    process = subprocess.Popen(
        [program, "--device", context.device, "--json"], stdout=subprocess.PIPE, text=True, errors="replace"
    )
    # Read as they come: what a hang leaves behind says where it hung.
    for line in process.stdout:
        case = parse(line)
        if case:
            report.check(case["case"], case["passed"], case["detail"])
    status = process.wait()
    cases = report.result["checks"]
    report.fact("cases", len(cases))
    all_passed = all(case["passed"] for case in cases)
    report.check("kiln-conformance ends with the status of its cases", cases and (status == 0) == all_passed, f"status {status}")


def parse(line):
    """The case of a line {"case", "passed", "detail"}, or None for any other line."""
    try:
        value = json.loads(line)
        return {"case": str(value["case"]), "passed": value["passed"] is True, "detail": str(value.get("detail") or "")}
    except (ValueError, KeyError, TypeError):
        return None
