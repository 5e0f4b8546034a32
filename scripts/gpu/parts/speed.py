"""Decode and prefill beside PyTorch and JAX, taking turns on the GPU in one run.

Every program gets its weights from the same configuration, random and in f16; times do not depend on
their values. Peers live in processes of their own, prepared once and then asked for a measurement a
round (`benches/peers`); kiln is `kiln bench`, started anew each round. Figures are medians over the
rounds, `kiln/peer` is how many times as many tokens a second kiln makes.
"""

import importlib.util
import json
import queue
import subprocess
import sys
import threading
from pathlib import Path

from . import facts
from .common import Failed, median, short

QUICK_MODELS = ["opt-125m", "opt-1.3b"]
MODELS = [*QUICK_MODELS, "opt-2.7b", "opt-6.7b"]
BATCHES = [1, 8, 64]
PREFILL_BUCKETS = "16,64,128,256,512,1024,2048"
KV_BLOCK = 16
ROUNDS = 5
QUICK_ROUNDS = 3
PREPARE_TIMEOUT_S = 900
QUICK_PREPARE_TIMEOUT_S = 130
MEASURE_TIMEOUT_S = 120


def models(context):
    """(name or directory, configuration) of what is to be measured."""
    known = {config["name"]: config for config in json.loads(context.kilnc("configs", "--json"))}
    for model in context.models or (QUICK_MODELS if context.quick else MODELS):
        config = read_config(model) if Path(model).is_dir() else known.get(model)
        if not config or config["architecture"] != "opt" or model == "opt-350m":
            raise Failed(f"{model}: speed is compared on configurations of OPT with the norm before each block")
        yield model, config


def read_config(folder):
    """The entries of `kilnc configs --json` from an OPT checkpoint's config.json."""
    config = json.loads((Path(folder) / "config.json").read_text())
    return {
        "name": short(folder), "architecture": config["model_type"], "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"], "heads": config["num_attention_heads"], "ffn_size": config["ffn_dim"],
        "vocab_size": config["vocab_size"], "max_positions": config["max_position_embeddings"],
    }


def compile_bundle(context, model, config):
    """One bundle for all batches and lengths."""
    positions = config["max_positions"]
    buckets = [bucket for bucket in PREFILL_BUCKETS.split(",") if int(bucket) <= positions]
    batches = [str(batch) for batch in sorted({*BATCHES, *(context.batches or [])})]
    return context.compile(
        model, "--max-batch", batches[-1], "--decode-batch", ",".join(batches),
        "--prefill-buckets", ",".join(buckets), name="-".join(["speed", *batches]),
    )


def ceiling(context, report, name):
    """A limit of the machine: as the part `facts` measured it, or measured now."""
    if name not in context.ceilings:
        context.ceilings = facts.ceilings(context)
        for key, value in context.ceilings.items():
            report.fact(key, value)
    return context.ceilings.get(name)


# ---- bytes and operations that a step needs ----


def weight_bytes(config):
    """Of the matrices and biases that a decode step multiplies with, in f16; the head is tied."""
    c, f = config["hidden_size"], config["ffn_size"]
    layer = 4 * c * c + 2 * c * f + 5 * c + f
    return 2 * (config["layers"] * layer + config["vocab_size"] * c)


def kv_bytes(config, positions, element_bytes=2):
    """Of the keys and values of so many positions, in f16 unless said otherwise."""
    return element_bytes * 2 * config["layers"] * config["hidden_size"] * positions


def prefill_flops(config, tokens):
    """Of one causal prompt: linears, attention, and the head for its last token."""
    c, f = config["hidden_size"], config["ffn_size"]
    linears = 2 * (4 * c * c + 2 * c * f) * tokens
    attention = 2 * 2 * c * tokens * (tokens + 1) // 2
    return config["layers"] * (linears + attention) + 2 * c * config["vocab_size"]


def kv_cache_mb(context, config, batch, length):
    """Enough for a batch of so many positions each; kiln's own default fills the GPU."""
    positions = batch * (length + 2 * KV_BLOCK)
    return kv_bytes(config, positions, 2 if context.on_gpu else 4) // (1 << 20) + 16


# ---- peers ----


class Peer:
    """A worker of benches/peers, which is told what to prepare and asked for measurements."""

    def __init__(self, context, script, config):
        folder = Path(context.root) / "benches/peers"
        self.process = subprocess.Popen(
            [sys.executable, folder / script, "--device", "cuda" if context.on_gpu else "cpu", "--config", json.dumps(config)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        self.replies = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.replies.put(line)
        self.replies.put(None)

    def send(self, **request):
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # Its end is what the reply will be.

    def receive(self, timeout_s):
        """The reply, or {"error"}."""
        try:
            line = self.replies.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            return {"error": f"no answer in {timeout_s} s"}
        if line is None:
            self.replies.put(None)
            return {"error": f"ended with status {self.process.wait()}"}
        return json.loads(line)

    def close(self):
        self.process.kill()
        self.process.wait()


class Contest:
    """kiln and its peers at one model and size (batch or length): prepared, then measured in turn."""

    def __init__(self, context, report, phase, model, config, size):
        self.context, self.report, self.phase = context, report, phase
        self.model, self.config, self.size = model, config, size
        self.workers = []
        self.failed = {}

    def start(self):
        """Start the peers, which prepare while others do; without --quick one after the other, since
        what they tune they tune by measuring."""
        mode = "reduce-overhead" if self.context.quick else "max-autotune"
        self.worker("opt_torch.py", {"torch compiled": {"variant": "compiled", "mode": mode}, "torch eager": {"variant": "eager"}})
        if self.phase.jax and not (self.context.quick and self.config["hidden_size"] > 1024):
            self.worker("opt_jax.py", {"jax static": {}})

    def worker(self, script, variants):
        package = script.removeprefix("opt_").removesuffix(".py")
        if not importlib.util.find_spec(package):
            self.failed |= {who: f"Python has no package {package}" for who in variants}
            return
        peer = Peer(self.context, script, self.config)
        requests = {who: self.phase.request(self.size, self.config) | extra for who, extra in variants.items()}
        for request in requests.values():
            peer.send(do="prepare", **request)
        self.workers.append((peer, requests))
        if not self.context.quick:
            self.wait_for(peer, requests)

    def wait(self):
        for peer, requests in self.workers:
            self.wait_for(peer, requests)

    def wait_for(self, peer, requests):
        timeout_s = QUICK_PREPARE_TIMEOUT_S if self.context.quick else PREPARE_TIMEOUT_S
        for who in [who for who, request in requests.items() if not request.get("ready")]:
            reply = peer.receive(timeout_s)
            requests[who]["ready"] = True
            if "error" in reply:
                self.failed[who] = reply["error"]
                del requests[who]
            else:
                print(f"{self.name()}, {who}: prepared in {reply['seconds']:.0f} s {reply['note']}", flush=True)
                requests[who]["note"] = reply["note"]

    def run(self, bundle):
        """Measure in turns and report a row for each."""
        times = {}
        notes = {}
        kiln_reports = []
        for _ in range(QUICK_ROUNDS if self.context.quick else ROUNDS):
            if "kiln" not in self.failed:
                try:
                    kiln_reports.append(self.phase.kiln(self.context, self.config, bundle, self.size))
                    times.setdefault("kiln", []).append(self.phase.kiln_ms(kiln_reports[-1]))
                except Failed as error:
                    self.failed["kiln"] = str(error)
            for peer, requests in self.workers:
                for who, request in requests.items():
                    if who in self.failed:
                        continue
                    notes[who] = request["note"]
                    peer.send(do="measure", **request)
                    reply = peer.receive(MEASURE_TIMEOUT_S)
                    if "error" in reply:
                        self.failed[who] = reply["error"]
                    else:
                        times.setdefault(who, []).append(reply["ms"])
        self.close()
        rates = {}
        for who, rounds in times.items():
            tokens, figures = self.phase.figures(self.config, self.size, who, median(rounds), self.context.ceilings)
            rates[who] = tokens / median(rounds) * 1e3
            self.report.row(
                model=self.config["name"], **{self.phase.size_name: self.size}, who=who, ms=round(median(rounds), 4),
                **{"tokens/s": round(rates[who], 1)}, **figures,
                **({"kiln/peer": round(rates["kiln"] / rates[who], 2)} if "kiln" in rates else {}), note=notes.get(who, ""),
                rounds_ms=[round(ms, 4) for ms in rounds], **({"reports": kiln_reports} if who == "kiln" else {}),
            )
        for who, error in self.failed.items():
            self.report.row(model=self.config["name"], **{self.phase.size_name: self.size}, who=who, note=f"failed: {error[:300]}")
        # What a peer cannot do is no fault of kiln's.
        detail = self.failed.get("kiln") or f"{len(times['kiln'])} rounds"
        self.report.check(f"{self.name()}: kiln was measured", "kiln" not in self.failed, detail)

    def name(self):
        return f"{self.config['name']}, {self.phase.size_name} {self.size}"

    def close(self):
        for peer, _ in self.workers:
            peer.close()


def compete(context, report, phase):
    """All contests of a phase. With --quick peers of all contests prepare at once."""
    phase.check_ceiling(context, report)
    report.fact("torch compiled", "torch.compile " + ("default" if context.quick else "max-autotune") + " and a CUDA graph")
    entrants = [(model, config) for model, config in models(context)]
    contests = [
        Contest(context, report, phase, model, config, size)
        for model, config in entrants for size in phase.sizes(context, config)
    ]
    try:
        if context.quick:
            for contest in contests:
                contest.start()
        bundles = {}
        for contest in contests:
            bundles[contest.model] = compile_bundle(context, contest.model, contest.config)
        for contest in contests if context.quick else []:
            contest.wait()
        for contest in contests:
            if not context.quick:
                contest.start()
            contest.run(bundles[contest.model])
    finally:
        for contest in contests:
            contest.close()
