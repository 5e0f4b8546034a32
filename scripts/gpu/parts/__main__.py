"""One part in its own process: `python3 -m parts NAME CONTEXT RESULT_FILE`, run by check.py."""

import importlib
import sys
import traceback

from .common import Context, Report, Skip

OURS = ("parts", "reference", "compare", "worker", "opt_torch", "opt_jax")


def main():
    name, context, path = sys.argv[1:]
    report = Report(name, path)
    try:
        importlib.import_module(f"parts.{name}").run(Context.from_json(context), report)
    except Skip as skip:
        report.end("skipped", str(skip))
    except ModuleNotFoundError as error:
        traceback.print_exc()
        own = (error.name or "").split(".")[0] in OURS
        report.end("failed" if own else "skipped", f"Python has no package {error.name}")
    except Exception as error:
        traceback.print_exc()
        report.end("failed", f"{type(error).__name__}: {error}"[:2000])
    else:
        failed = sum(not check["passed"] for check in report.result["checks"])
        report.end("failed" if failed else "passed", f"{failed} of {len(report.result['checks'])} checks" if failed else "")


if __name__ == "__main__":
    main()
