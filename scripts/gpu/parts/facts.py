"""The machine, the programs, and what the machine can do at most.

The ceilings are those that the other parts compare with: `read_gb_per_s` of device memory and
`f16_tflops` of a large matrix product.
"""

import json
import os
import platform
import sys
from pathlib import Path

from . import common
from .common import Failed, median, tool

SMI_FIELDS = ["name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"]


def run(context, report):
    report.fact("processor", f"{processor()}, {os.cpu_count()} threads")
    report.fact("python", sys.version.split()[0])
    for program in ("kilnc", "kiln"):
        report.fact(program, common.run([context.program(program), "--version"]).strip())
    for package in ("torch", "transformers", "jax"):
        report.fact(package, version(package))
    if context.on_gpu:
        for name, value in gpu().items():
            report.fact(name, value)
    for name, value in ceilings(context).items():
        report.ceiling(name, value)
    if context.on_gpu:
        report.check("read bandwidth was measured", "read_gb_per_s" in report.result["ceilings"])


def ceilings(context):
    """What the memory and the tensor cores give at most, by every method that this machine offers."""
    found = {}
    if not context.on_gpu:
        return found
    methods = [nvcc_bandwidth, torch_ceilings]
    for method in methods:
        try:
            for name, value in method(context).items():
                found[name] = max(value, found.get(name, 0))
        except (Failed, ImportError, OSError, ValueError, RuntimeError) as error:
            print(f"{method.__name__}: {error}", file=sys.stderr)
    return found


def nvcc_bandwidth(context):
    if not (nvcc := tool("nvcc")):
        raise Failed("nvcc is not installed")
    program = context.path("bandwidth")
    common.run([nvcc, "-O3", "-arch=native", Path(__file__).parents[1] / "bandwidth.cu", "-o", program])
    measured = json.loads(common.run([program]))
    return {"read_gb_per_s": measured["read"], "copy_gb_per_s": measured["copy"]}


def torch_ceilings(context):
    """The same from PyTorch's own kernels, and an 8192^3 matrix product in f16."""
    import torch

    def seconds(work, repeats=9):
        times = []
        for _ in range(repeats + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return median(times[3:])

    device = context.device
    data = torch.zeros(1 << 30, dtype=torch.float32, device=device)
    other = torch.empty_like(data)
    size_bytes = data.numel() * 4
    read = size_bytes / seconds(lambda: torch.sum(data)) / 1e9
    copy = 2 * size_bytes / seconds(lambda: other.copy_(data)) / 1e9
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.float16, device=device) for _ in range(2))
    tflops = 2 * n**3 / seconds(lambda: a @ b, repeats=15) / 1e12
    return {"read_gb_per_s": round(read, 1), "copy_gb_per_s": round(copy, 1), "f16_tflops": round(tflops, 1)}


def gpu():
    output = common.run(["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"])
    return parse_smi(output)


def parse_smi(output):
    """{field: value} of the first GPU."""
    values = [value.strip() for value in output.splitlines()[0].split(",")]
    return {f"gpu {name}": value for name, value in zip(SMI_FIELDS, values)}


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def version(package):
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
