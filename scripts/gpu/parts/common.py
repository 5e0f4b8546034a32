"""What all parts share: where things are, the kiln programs, the result of a part."""

import dataclasses
import json
import shutil
import struct
import subprocess
from pathlib import Path


class Skip(Exception):
    """A part cannot run here; the message says why."""


class Failed(Exception):
    """A program that had to succeed did not."""


class Report:
    """The result of a part; the file is rewritten with every entry."""

    def __init__(self, part, path):
        self.path = Path(path)
        self.result = {"part": part, "status": "running", "reason": "", "facts": {}, "ceilings": {}, "checks": [], "rows": []}

    def fact(self, name, value):
        self.result["facts"][name] = value
        self.write(f"{name}: {value}")

    def ceiling(self, name, value):
        """A measured limit of the machine that other parts compare with."""
        self.result["ceilings"][name] = value
        self.fact(name, value)

    def check(self, case, passed, detail=""):
        self.check_all([{"case": case, "passed": bool(passed), "detail": detail}])

    def check_all(self, checks):
        """Adds checks {"case", "passed", "detail"}."""
        self.result["checks"] += checks
        words = {True: "pass", False: "FAIL"}
        self.write("\n".join(f"{words[check['passed']]}  {check['case']}  {check['detail']}" for check in checks))

    def row(self, **values):
        self.result["rows"].append(values)
        shown = ", ".join(f"{key} {value}" for key, value in values.items() if not isinstance(value, (dict, list)))
        self.write(shown)

    def end(self, status, reason):
        self.result |= {"status": status, "reason": reason}
        self.write()

    def write(self, line=None):
        if line:
            print(line, flush=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.result), encoding="utf-8")
        part.replace(self.path)


@dataclasses.dataclass
class Context:
    """What the command line asked for; paths are text, so that it travels as JSON."""

    bin: str
    root: str
    scratch: str
    results: str
    device: str = "cuda:0"
    quick: bool = False
    models: list | None = None
    batches: list | None = None
    lengths: list | None = None
    ceilings: dict = dataclasses.field(default_factory=dict)

    def to_json(self):
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text):
        return Context(**json.loads(text))

    @property
    def on_gpu(self):
        return self.device != "cpu"

    def path(self, name):
        return Path(self.scratch) / name

    def fixture(self, name):
        return Path(self.root) / "tests/fixtures" / name

    def program(self, name):
        return str(Path(self.bin) / name)

    # ---- the kiln programs ----

    def kilnc(self, *arguments):
        return run([self.program("kilnc"), *arguments])

    def kiln(self, *arguments):
        """A command of kiln on the device of this check; its standard output."""
        return run([self.program("kiln"), *arguments, "--device", self.device])

    def compile(self, model, *flags, name=None, target=None):
        """The bundle of a configuration with random weights, or of a checkpoint directory.

        Made once for a scratch folder, model and `name`.
        """
        bundle = self.path(f"{Path(model).name}{'-' + name if name else ''}.kiln")
        if not bundle.exists():
            dummy = [] if Path(model).is_dir() else ["--dummy-weights"]
            target = target or ("native" if self.on_gpu else "cpu")
            self.kilnc("compile", model, *dummy, "--target", target, "--weights", "f16", "-o", bundle, *flags)
        return bundle

    def export(self, model, seed=0):
        """A checkpoint directory that transformers reads."""
        if Path(model).is_dir():
            return Path(model)
        folder = self.path(f"{model}-checkpoint")
        if not folder.exists():
            self.kilnc("export", model, "--dummy-weights", "--dummy-seed", seed, "-o", folder)
        return folder

    def generate(self, bundle, requests, *flags, logits=False):
        """Results of `kiln generate --json`, and the logits as {"logits.<i>": (shape, bytes)}."""
        lines = self.path("requests.jsonl")
        lines.write_text("".join(json.dumps(request) + "\n" for request in requests), encoding="utf-8")
        tensors = self.path("logits.safetensors")
        if logits:
            flags = (*flags, "--output-logits", tensors)
        output = self.kiln("generate", bundle, "--json", "--input", lines, *flags)
        results = [json.loads(line) for line in output.splitlines()]
        if not logits:
            return results
        return results, read_safetensors(tensors)

    def offers(self, command, flag):
        return flag in run([self.program("kiln"), command, "--help"])

    def bench(self, bundle, **flags):
        """The report of `kiln bench --json`."""
        arguments = [text for key, value in flags.items() for text in (f"--{key.replace('_', '-')}", str(value))]
        return json.loads(self.kiln("bench", bundle, "--json", *arguments))


def run(command, environment=None):
    """Standard output of a program that must succeed."""
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-3:]
        raise Failed(f"{' '.join(map(short, command))} ended with status {done.returncode}: {' / '.join(last)}")
    return done.stdout


def short(word):
    """Paths by their last part, for messages."""
    return Path(word).name if "/" in word else word


def tool(name):
    """Path of a CUDA tool, or None."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin:/opt/cuda/bin")


def read_safetensors(path):
    """{name: (shape, bytes)} of a safetensors file."""
    data = Path(path).read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_bytes])
    base = 8 + header_bytes
    return {
        name: (entry["shape"], data[base + entry["data_offsets"][0] : base + entry["data_offsets"][1]])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def prompt_ids(length, seed=0, vocabulary=50000):
    """Token ids that look arbitrary and are the same every time; the special ones are left out."""
    return [4 + (position * 7919 + seed * 104729) % (vocabulary - 4) for position in range(length)]


def median(values):
    values = sorted(values)
    middle = len(values) // 2
    return (values[middle] + values[-1 - middle]) / 2
