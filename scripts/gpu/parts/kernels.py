"""Every kernel of a step against what the GPU can do, beside PyTorch and cuBLASLt: `kiln-perf table`.

Kernels are timed by events, one after another. The tables go into DIR as they are, kernels-<model>.json and .txt.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

from . import common, speed

REPEAT = 100
QUICK_REPEAT = 20
# Positions of each sequence in decode: keys and values of the largest batch fit beside the largest model in 80 GB.
KV_LEN = 1024
LIBRARY = "libcublasLt.so*"
TOOLKITS = ["/usr/local/cuda/lib64", "/opt/cuda/lib64"]
# What kernels one after another may take of the step that they overlap in: events and launches cost small ones dear.
LEAST_OF_STEP, MOST_OF_STEP = 1 / 3, 4


def run(context, report):
    program = Path(context.program("kiln-perf"))
    if not program.is_file():
        report.check("kiln-perf is there", False, f"not in {program.parent}")
        return
    flags, environment = references(context, report)
    repeat = QUICK_REPEAT if context.quick else REPEAT
    models = list(speed.models(context))
    for model, config in models[:1] if context.quick else models:
        bundle = speed.compile_bundle(context, model, config)
        path = Path(context.results) / f"kernels-{config['name']}.json"
        positions = min(KV_LEN, config["max_positions"])
        command = [program, "table", bundle, "--device", context.device, "--kv-len", positions, "--repeat", repeat]
        text = common.run([*command, "-o", path, *flags], environment)
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
        table = json.loads(path.read_text(encoding="utf-8"))
        for row in rows(table):
            report.row(**row)
        for case, passed, detail in judge(table):
            report.check(case, passed, detail)


def references(context, report):
    """Flags of what else can be measured here, and the environment that finds it."""
    environment = dict(os.environ)
    if context.quick or not context.on_gpu:
        return [], environment
    flags = []
    if importlib.util.find_spec("torch"):
        flags += ["--reference", "torch", "--python", sys.executable]
    if folder := library_folder(sys.path, TOOLKITS):
        flags += ["--reference", "cublaslt"]
        folders = [folder, environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = ":".join(filter(None, folders))
    report.fact("cublaslt", folder or "not found")
    return flags, environment


def library_folder(packages, toolkits):
    """Where cuBLASLt lies: among NVIDIA's packages for Python, or in a toolkit; or None."""
    folders = [folder for path in packages for folder in sorted(Path(path or ".").glob("nvidia/*/lib"))]
    found = (folder for folder in [*folders, *map(Path, toolkits)] if any(folder.glob(LIBRARY)))
    return next(map(str, found), None)


def steps(table):
    """(model, step's name, step) of each step of a table."""
    for model in table["models"]:
        for step in model["steps"]:
            yield model["model"], f"{step['executable']} at {step['kv_len']}", step


def rows(table):
    """A row of the summary for each row of a table: times of one kernel."""
    for model, name, step in steps(table):
        for row in step["rows"]:
            us = row["time"]["median_us"]
            references = {
                f"{peer['name']} {peer['format']}": f"{peer['time']['median_us'] / us:.2f}x"
                for peer in row.get("references", []) if us
            }
            yield {
                "model": model, "step": name, "kernel": f"{row['spec']} {row['shapes']}", "count": row["count"],
                "us": round(us, 2), "GB/s": round(row["bytes"] / us / 1e3, 1) if us else "",
                "of limit": f"{row['floor_us'] / us:.0%}" if us else "", "of step": f"{row['share_of_step']:.0%}",
                **references,
            }


def judge(table):
    """(case, passed, detail) of each step: whether its times can be."""
    for model, name, step in steps(table):
        case = f"{model}, {name}"
        unmeasured = [row["spec"] for row in step["rows"] if not row["time"]["min_us"] > 0]
        yield f"{case}: every kernel takes time", not unmeasured, ", ".join(unmeasured)
        share = sum(row["count"] * row["time"]["median_us"] for row in step["rows"]) / step["time"]["median_us"]
        detail = f"{share:.0%} of the step of {step['time']['median_us']:.1f} us, remainder {step['remainder_us']:.1f} us"
        yield f"{case}: kernels sum to about the step", LEAST_OF_STEP < share < MOST_OF_STEP, detail
