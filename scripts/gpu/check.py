"""Run the parts of the GPU check, each in a process of its own with a time limit.

    scripts/gpu/check DIR [--quick] [--only PART,...] [--models MODEL,...]

DIR receives three files, rewritten whenever a part has news, so that a run that is cut short leaves
what it found: summary.md (tables), summary.json (everything measured, by part), log.txt (all output);
and, of the part kernels, a table of each model as kiln-perf writes it: kernels-<model>.json and .txt.

The programs kilnc, kiln, kiln-conformance and kiln-perf are taken from --bin, scripts/gpu/bin or target/release.
Exit status: 0 all parts passed or were skipped with a reason, 1 a part failed, 2 wrong usage.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from parts import PARTS, summary
from parts.common import Context

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
QUICK_MINUTES = 9.5


def main():
    if sys.version_info < (3, 11):
        sys.exit(f"this is Python {sys.version.split()[0]}; scripts/gpu/check needs 3.11, KILN_PYTHON names another interpreter")
    args = arguments()
    bin_dir = programs(args.bin)
    args.dir.mkdir(parents=True, exist_ok=True)
    scratch = args.scratch.resolve() if args.scratch else Path(tempfile.mkdtemp(prefix="kiln-gpu-"))
    scratch.mkdir(parents=True, exist_ok=True)
    context = Context(
        bin=str(bin_dir), root=str(ROOT), scratch=str(scratch), results=str(args.dir.resolve()), device=args.device,
        quick=args.quick, models=args.models, batches=args.batches, lengths=args.lengths,
    )
    minutes = args.minutes or (QUICK_MINUTES if args.quick else None)
    try:
        with open(args.dir / "log.txt", "w", buffering=1, encoding="utf-8") as log:
            results = Check(args.dir, context, log, minutes).run(args.only)
    finally:
        if not args.scratch:
            shutil.rmtree(scratch, ignore_errors=True)
    sys.exit(any(result["status"] == "failed" for result in results))


def arguments():
    parser = argparse.ArgumentParser(
        prog="scripts/gpu/check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = lambda text: [name for name in text.split(",") if name]
    numbers = lambda text: [int(number) for number in names(text)]
    parser.add_argument("dir", type=Path, help="where the results go")
    parser.add_argument("--only", type=names, metavar="PART,...", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"fewer models and lengths, {QUICK_MINUTES} minutes in all")
    parser.add_argument("--models", type=names, metavar="MODEL,...", help="in place of each part's own; a checkpoint directory too")
    parser.add_argument("--batches", type=numbers, metavar="N,...", help="of decode (default: 1,8,64; quick: 1,8)")
    parser.add_argument("--lengths", type=numbers, metavar="N,...", help="of prefill (default: 128,512,2048; quick: 512)")
    parser.add_argument("--minutes", type=float, help="for all parts together; what is left over is not started")
    parser.add_argument("--bin", type=Path, metavar="DIR", help="folder of the built programs")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="folder for bundles, kept for the next run")
    # `cpu` runs everything that needs no GPU, to try these scripts themselves.
    parser.add_argument("--device", default="cuda:0", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.only = args.only or list(PARTS)
    args.models = args.models and [str(Path(name).resolve()) if Path(name).is_dir() else name for name in args.models]
    if unknown := [name for name in args.only if name not in PARTS]:
        parser.error(f"no part is called {unknown[0]}; there are {', '.join(PARTS)}")
    return args


def programs(given):
    """The folder that holds kilnc and kiln."""
    candidates = [given] if given else [HERE / "bin", ROOT / "target/release"]
    for folder in candidates:
        if (folder / "kilnc").is_file() and (folder / "kiln").is_file():
            return folder.resolve()
    print(f"kilnc and kiln are not in {' or '.join(map(str, candidates))}; --bin names their folder", file=sys.stderr)
    sys.exit(2)


class Check:
    """The parts in turn; summaries are written as they go."""

    def __init__(self, folder, context, log, minutes):
        self.folder, self.context, self.log = folder, context, log
        self.start = time.monotonic()
        self.deadline = self.start + 60 * minutes if minutes else None
        self.results = []

    def run(self, names):
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, lambda number, _: sys.exit(128 + number))
        for name in names:
            self.results.append(result := {"part": name, "status": "running", "elapsed_s": 0.0})
            self.part(name, result)
            self.say(f"{name}: {result['status']}{': ' + result['reason'] if result.get('reason') else ''}")
            self.write()
        self.say(f"results are in {self.folder}")
        return self.results

    def part(self, name, result):
        """Run one part to its end or its limit; `result` is filled in place."""
        start = time.monotonic()
        limit = PARTS[name].quick_limit_s if self.context.quick else PARTS[name].limit_s
        if self.deadline:
            limit = min(limit, self.deadline - start)
        if limit < 5:
            result |= {"status": "failed", "reason": "not started: the time for all parts was used up"}
            return
        if name != "facts":
            facts = next((r for r in self.results if r["part"] == "facts"), {})
            self.context.ceilings = facts.get("ceilings", {})
        found = Path(self.context.scratch) / f"{name}.result.json"
        found.unlink(missing_ok=True)
        command = [sys.executable, "-m", "parts", name, self.context.to_json(), str(found)]
        self.say(f"{name}: at most {limit:.0f} s")
        # A group of its own: what a part starts is stopped with it.
        process = subprocess.Popen(
            command, cwd=HERE, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", process_group=0,
        )
        readers = [threading.Thread(target=self.copy, args=(name, pipe, loud), daemon=True)
                   for pipe, loud in ((process.stdout, True), (process.stderr, False))]
        for reader in readers:
            reader.start()
        seen, late = None, False
        try:
            while process.poll() is None:
                late = time.monotonic() - start > limit
                if late:
                    break
                time.sleep(0.25)
                if found.exists() and (now := found.stat().st_mtime_ns) != seen:
                    seen = now
                    self.read(found, result)
                    result["elapsed_s"] = round(time.monotonic() - start, 1)
                    self.write()
        finally:
            stop_group(process)
        for reader in readers:
            reader.join(timeout=5)
        result |= {"status": "failed", "reason": f"ended with status {process.returncode} and no result"}
        self.read(found, result)
        if late:
            result |= {"status": "failed", "reason": f"stopped after {limit:.0f} s"}
        elif result["status"] == "running":
            result |= {"status": "failed", "reason": f"ended with status {process.returncode} before its end; see log.txt"}
        result["elapsed_s"] = round(time.monotonic() - start, 1)

    def read(self, path, result):
        try:
            result |= json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass

    def copy(self, name, pipe, loud):
        """A part says its progress on standard output; what libraries say only goes to the log."""
        for line in pipe:
            if loud:
                self.say(f"{name}: {line.rstrip()}")
            else:
                self.log.write(line)

    def say(self, text):
        line = f"[{time.monotonic() - self.start:6.1f} s] {text}"
        print(line, file=sys.stderr, flush=True)
        self.log.write(line + "\n")

    def write(self):
        record = {"quick": self.context.quick, "device": self.context.device,
                  "elapsed_s": round(time.monotonic() - self.start, 1), "parts": self.results}
        replace(self.folder / "summary.json", json.dumps(record, indent=1) + "\n")
        replace(self.folder / "summary.md", summary.markdown(record))


def stop_group(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def replace(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    main()
