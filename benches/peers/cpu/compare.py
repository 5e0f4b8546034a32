#!/usr/bin/env python3
"""kiln and its peers on the CPU, taking turns in one run: decode, prefill, first token, memory, load.

    benches/peers/cpu/compare.py --out DIR --commit ID [--models opt-125m,gpt2] [--peers kiln,openvino]
        [--formats f32,16bit,int8,int4] [--rounds 3] [--threads 2] [--batch 1,8] [--prepare]

The peers' environments come from scripts/peer-env, kiln's programs from `cargo build --release`. Models
have random weights. With --prepare, models are converted and code is compiled and cached, and nothing
is measured; what is still missing is prepared in a measuring run too.

For each model and class of formats all systems are loaded; in each round each is measured in turn, the
read bandwidth before it; again where other programs took much of the processor meanwhile. Those
that wait are stopped, so that none of their threads spins. A model and class is a file in DIR,
`<model>-<class>.json`, with every run; summary.md there is made from all such files, so a comparison may
be run in parts.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import queue
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path

sys.dont_write_bytecode = True

import figures

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
PROMPT, STEPS, PREFILL = 32, 32, 512

# What is measured of each class: peer and format.
CLASSES = {
    "f32": [("kiln", "f32"), ("ctranslate2", "f32"), ("openvino", "f32"), ("openvino", "f32-bf16"), ("torch", "f32"), ("torch-compiled", "f32"),
            ("llama", "f32")],
    "16bit": [("kiln", "bf16"), ("kiln", "bf16-a16"), ("ctranslate2", "bf16"), ("openvino", "f16"), ("torch", "bf16"), ("torch-compiled", "bf16"),
              ("llama", "bf16"), ("llama", "f16")],
    "int8": [("kiln", "int8"), ("kiln", "int8-a8"), ("ctranslate2", "int8"), ("openvino", "int8"), ("torch", "int8"), ("llama", "int8")],
    "int4": [("kiln", "int4"), ("kiln", "int4-a8"), ("openvino", "int4"), ("llama", "int4")],
}
# kiln's formats that round activations too: of weights and of activations.
NARROW = {"bf16-a16": ("bf16", "bf16"), "int8-a8": ("int8", "int8"), "int4-a8": ("int4", "int8")}
PEERS = ["kiln", "ctranslate2", "openvino", "torch", "torch-compiled", "llama"]
# Of the parameters in f32, what a system may hold at most while it loads.
LOAD_PEAK = {"f32": 1.5, "16bit": 1.0, "int8": 1.2, "int4": 0.6}
CLOCK_HZ = os.sysconf("SC_CLK_TCK")
# A turn in which others and the host took more than this part of the processor is tried again, and the
# least disturbed of at most so many tries counts.
DISTURBED = 0.05
TRIES = 3
LOAD_TIMEOUT_S = 900
MEASURE_TIMEOUT_S = 300


class Failed(Exception):
    """A system has no figure; the message is the reason that the table gives."""


def main():
    args = arguments()
    # Workers that are stopped would outlive a driver that is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        for name in args.formats:
            prepared, failed = prepare(args, model, name)
            if not args.prepare:
                record = compare(args, model, name, prepared, failed)
                (args.out / f"{model}-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
                summarize(args.out)
            elif compiled := [system for system in prepared if system[0] == "torch-compiled"]:
                with contextlib.closing(Contest(args, model, name, failed)) as contest:
                    contest.load(compiled)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: text.split(",")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="unknown", help="of kiln, for the record")
    parser.add_argument("--models", type=words, default=["opt-125m", "gpt2"])
    parser.add_argument("--peers", type=words, default=PEERS)
    parser.add_argument("--formats", type=words, default=list(CLASSES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=2, help="of each measurement in a round, after one that is not counted")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=lambda text: [int(word) for word in text.split(",")], default=[1, 8])
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--bin", type=Path, default=ROOT / "target/release", help="folder of kiln and kilnc")
    parser.add_argument("--envs", type=Path, default=ROOT / ".build/peers", help="folder of the peers' environments")
    parser.add_argument("--work", type=Path, default=ROOT / ".build/peers/models", help="folder for models in all forms")
    args = parser.parse_args()
    for given, known in ((args.peers, PEERS), (args.formats, CLASSES)):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(known)}")
    return args


# ---- models in the form of each system ----


def prepare(args, model, name):
    """The systems of a class whose model is there or was made now, and why others have none."""
    prepared, failed = [], {}
    for peer, format in CLASSES[name]:
        if peer not in args.peers:
            continue
        try:
            if peer == "kiln":
                bundle(args, model, format)
            else:
                converted(args, model, peer, format)
            prepared.append((peer, format))
        except Failed as error:
            print(f"{model}, {peer} {format}: {error}", flush=True)
            failed[f"{peer} {format}"] = str(error)
    return prepared, failed


def bundle(args, model, format):
    folder = args.work / model / f"{format}.kiln"
    if not folder.exists():
        print(f"{model}: compiling {format}", flush=True)
        weights, activations = NARROW.get(format, (format, None))
        narrow = ["--activations", activations] if activations else []
        run([args.bin / "kilnc", "compile", model, "--dummy-weights", "--target", "cpu", "--weights", weights, *narrow, "-o", folder])
    return folder


def converted(args, model, peer, format):
    """A folder with the peer's form of a model; a refusal is kept beside it."""
    folder = args.work / model / f"{peer}-{format}"
    done, refusal = folder.with_suffix(".done"), folder.with_suffix(".refused")
    if refusal.exists():
        raise Failed(refusal.read_text())
    if not done.exists():
        print(f"{model}: converting for {peer} {format}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            run(worker(args, peer, "convert", checkpoint(args, model), folder, format), worker_environment(args))
        except Failed as error:
            if "unsupported: " in str(error):
                reason = str(error).split("unsupported: ", 1)[1]
                refusal.write_text(reason)
                raise Failed(reason) from None
            raise
        done.touch()
    return folder


def checkpoint(args, model):
    """A checkpoint directory with a tokenizer of one word a token, which some converters ask for."""
    folder = args.work / model / "checkpoint"
    if not (folder / "tokenizer.json").exists():
        run([args.bin / "kilnc", "export", model, "--dummy-weights", "-o", folder])
        config = json.loads((folder / "config.json").read_text())
        special = config["eos_token_id"]
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", **{f"{kind}_token": f"t{special}" for kind in ("bos", "eos", "unk", "pad")},
        }))
        (folder / "tokenizer.json").write_text(json.dumps(word_tokenizer(config["vocab_size"], special)))
    return folder


def word_tokenizer(vocab_size, special):
    added = {"id": special, "content": f"t{special}", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [added], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {f"t{token}": token for token in range(vocab_size)}, "unk_token": f"t{special}"},
    }


# ---- taking turns ----


def compare(args, model, name, prepared, failed):
    """The record of a model and class."""
    record = {
        "model": model, "class": name, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": args.commit, "threads": args.threads, "machine": machine(),
        "lengths": {"prompt": PROMPT, "steps": args.steps, "prefill": PREFILL, "batches": args.batch, "runs": args.runs},
    }
    with contextlib.closing(Contest(args, model, name, failed)) as contest:
        contest.load(prepared)
        rounds = [contest.round() for _ in range(args.rounds)]
        contest.ask_memory()
    return record | {"systems": contest.facts, "failed": contest.failed, "rounds": rounds}


class Contest:
    """The systems of a class, loaded and warm; those that fail leave with a reason."""

    def __init__(self, args, model, name, failed):
        self.args, self.model, self.name = args, model, f"{model} {name}"
        self.need_bytes = LOAD_PEAK[name] * 4 * parameters(args, model)
        self.failed, self.facts, self.systems = dict(failed), {}, {}

    def load(self, prepared):
        args, model = self.args, self.model
        for peer, format in prepared:
            system = f"{peer} {format}"
            try:
                if peer == "kiln":
                    self.systems[system] = Kiln(args, bundle(args, model, format))
                    self.facts[system] = self.systems[system].facts
                    continue
                if self.need_bytes > available_bytes():
                    raise Failed("not enough memory beside the others")
                command = worker(args, peer, "serve", checkpoint(args, model), converted(args, model, peer, format), format)
                found = self.systems[system] = Worker(command, worker_environment(args))
                loaded = found.ask(LOAD_TIMEOUT_S, do="load")
                self.facts[system] = loaded | {"load_ms": [loaded["load_ms"]]}
                for measurement in self.measurements():
                    found.ask(LOAD_TIMEOUT_S, **measurement | {"runs": 0})
            except Failed as error:
                self.fail(system, error)
        print(f"{self.name}: {', '.join(self.systems)} loaded", flush=True)

    def measurements(self):
        """What a round asks of each system."""
        common = {"do": "measure", "runs": self.args.runs}
        decode = [common | {"batch": batch, "prompt": PROMPT, "steps": self.args.steps} for batch in self.args.batch]
        return [*decode, common | {"batch": 1, "prompt": PREFILL, "steps": 0}]

    def round(self):
        result = {"read_gb_per_s": [], "measured": {}}
        for system in list(self.systems):
            tries = []
            while not tries or (disturbance(tries[-1]) > DISTURBED and len(tries) < TRIES):
                result["read_gb_per_s"].append(read_bandwidth(self.args))
                try:
                    tries.append(self.measure(system))
                except Failed as error:
                    self.fail(system, error)
                    break
            if tries:
                result["measured"][system] = min(tries, key=disturbance)
        return result

    def measure(self, system):
        """A turn of a system, and what part of the processor's time others and the host took in it."""
        before = processor_seconds(self.systems)
        *decode, prefill = [self.systems[system].ask(MEASURE_TIMEOUT_S, **measurement) for measurement in self.measurements()]
        took = {name: after - before[name] for name, after in processor_seconds(self.systems).items()}
        others, stolen = (round(max(took[name], 0) / took["all"], 3) for name in ("others", "stolen"))
        print(f"{self.name}, {system}: {statistics.median(decode[0]['step_ms']):.1f} ms a step, prefill "
              f"{statistics.median(prefill['first_ms']):.0f} ms; others {others:.0%}, stolen {stolen:.0%}", flush=True)
        by_batch = {str(batch): runs for batch, runs in zip(self.args.batch, decode)}
        return {"decode": by_batch, "prefill": prefill, "others": others, "stolen": stolen}

    def ask_memory(self):
        for system, found in list(self.systems.items()):
            try:
                self.facts[system]["peak_bytes"] = found.ask(MEASURE_TIMEOUT_S, do="memory")["peak_bytes"]
            except Failed as error:
                self.fail(system, error)

    def fail(self, system, error):
        print(f"{self.name}, {system}: {error}", flush=True)
        self.failed[system] = str(error)
        if found := self.systems.pop(system, None):
            found.close()

    def close(self):
        for system in self.systems.values():
            system.close()


class Kiln:
    """`kiln bench`, started for each measurement."""

    def __init__(self, args, bundle):
        self.args, self.bundle = args, bundle
        self.facts = {"weight_bytes": 0, "load_ms": [], "peak_bytes": 0, "versions": run([args.bin / "kiln", "--version"]).strip()}

    def ask(self, timeout_s, **request):
        if request["do"] == "memory":
            return {"peak_bytes": self.facts["peak_bytes"]}
        report = bench(
            self.args, self.bundle, "--prompt-len", request["prompt"], "--gen-len", max(request["steps"] + 1, 2),
            "--batch", request["batch"], "--repeat", request["runs"],
        )
        facts = self.facts
        facts["weight_bytes"] = report["decode_step"]["weight_bytes"]
        facts["peak_bytes"] = max(facts["peak_bytes"], report["memory"]["peak_resident_bytes"])
        facts["load_ms"].append(report["load_ms"])
        facts["note"] = f"weights {report['weights']}" + (f", activations {report['activations']}" if report["activations"] else "")
        steps = [report["decode_step"]["ms"]["median"]] if request["steps"] else []
        return {"first_ms": [report["prefill"]["ms"]["median"]], "step_ms": steps, "report": report}

    def processor_seconds(self):
        return 0  # Counted with the ended children.

    def close(self):
        pass


class Worker:
    """A peer's process, stopped except while it is asked."""

    def __init__(self, command, environment):
        self.log = []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        self.replies = queue.Queue()
        self.readers = [threading.Thread(target=read, daemon=True) for read in (self.read, self.read_log)]
        for reader in self.readers:
            reader.start()

    def read(self):
        with self.process.stdout as lines:
            for line in lines:
                self.replies.put(line)
        self.replies.put(None)

    def read_log(self):
        with self.process.stderr as lines:
            for line in lines:
                self.log = [*self.log[-9:], line.strip()]

    def ask(self, timeout_s, **request):
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.replies.get(timeout=timeout_s)
        except OSError:
            line = None
        except queue.Empty:
            raise Failed(f"no answer in {timeout_s} s") from None
        if line is None:
            status = self.process.wait()
            self.readers[1].join(timeout=5)
            raise Failed(f"ended with status {status}: {' / '.join(self.log[-2:])}")
        self.process.send_signal(signal.SIGSTOP)
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply

    def processor_seconds(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK_HZ

    def close(self):
        self.process.kill()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        for reader in self.readers:
            reader.join()
        self.process.wait()


# ---- programs and the machine ----


def worker(args, peer, do, hf_dir, folder, format):
    """The command of with_PEER.py in the peer's environment."""
    environment, _, compiled = peer.partition("-")
    python = args.envs / environment / "bin/python"
    if not python.exists():
        raise Failed(f"no environment: scripts/peer-env {environment}")
    command = [python, HERE / f"with_{environment}.py", do, hf_dir, folder, format, "--threads", args.threads]
    return [str(word) for word in [*command, *(["--compiled"] if compiled else [])]]


def worker_environment(args):
    return os.environ | {
        "OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(args.work / "inductor"),
    }


def bench(args, bundle, *options):
    command = [args.bin / "kiln", "bench", bundle, "--device", "cpu", "--threads", args.threads, "--json", *options]
    return json.loads(run(command))


def read_bandwidth(args):
    """GB/s that as many threads read from a large buffer now."""
    report = bench(args, ROOT / "runtime/examples/tiny.kiln", "--prompt-len", 4, "--gen-len", 2, "--repeat", 2)
    return report["read_bandwidth_gb_per_s"]["median"]


def run(command, environment=None):
    """Standard output of a program that must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        last = " / ".join(done.stderr.strip().splitlines()[-2:])
        raise Failed(f"{Path(command[0]).name} {command[1]} ended with status {done.returncode}: {last}")
    return done.stdout


def parameters(args, model):
    known = {config["name"]: config["parameters"] for config in json.loads(run([args.bin / "kilnc", "configs", "--json"]))}
    return known[model]


def available_bytes():
    return meminfo()["MemAvailable"]


def disturbance(turn):
    return turn["others"] + turn["stolen"]


def processor_seconds(systems):
    """Of all cores since they started: all, what the host withheld, and what programs but these took."""
    user, nice, system, idle, wait, irq, soft_irq, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    busy = (user + nice + system + irq + soft_irq) / CLOCK_HZ
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = sum(os.times()[:2]) + ended.ru_utime + ended.ru_stime + sum(found.processor_seconds() for found in systems.values())
    return {"all": busy + (idle + wait + stolen) / CLOCK_HZ, "stolen": stolen / CLOCK_HZ, "others": busy - own}


def meminfo():
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def machine():
    fields = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    cpu = {name.strip(): value.strip() for name, value in reversed(fields)}
    isa = [name for name in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile") if name in cpu.get("flags", "").split()]
    return {
        "processor": f"{cpu.get('model name', platform.machine())} (family {cpu.get('cpu family')}, model {cpu.get('model')}; {', '.join(isa)})",
        "cores": os.cpu_count(), "memory_gib": meminfo()["MemTotal"] / 2**30, "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
    }


def summarize(folder):
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    records = [record for record in records if record.get("class") in CLASSES]
    if records:
        (folder / "summary.md").write_text(figures.markdown(records))


if __name__ == "__main__":
    main()
