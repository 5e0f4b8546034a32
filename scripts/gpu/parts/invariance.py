"""What must be equal to the last bit: alone, together, in another order, with graphs and without,
twice. And a bundle for another architecture must be refused by name."""

import json
import math
import subprocess

from .common import prompt_ids, short

MODELS = ["opt-125m"]
PROMPT_LENGTHS = [1, 7, 16, 40, 64, 5, 33, 90]
NEW_TOKENS = 24
LONG_TOKENS = 1000


def run(context, report):
    import numpy

    for model in context.models or MODELS:
        bundle = context.compile(model)
        facts = json.loads(context.kilnc("inspect", bundle, "--json"))
        batches(context, report, bundle, facts["model"]["vocab_size"], short(model))
        long_run(context, report, bundle, facts, short(model), numpy)
    refusal(context, report)


def batches(context, report, bundle, vocabulary, model):
    requests = [
        {"prompt_ids": prompt_ids(length, seed, vocabulary), "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        for seed, length in enumerate(PROMPT_LENGTHS)
    ]
    together = outcomes(context, bundle, requests)

    def compare(case, found, places):
        different = [place for place, outcome in zip(places, found) if outcome != together[place]]
        rows = sum(len(outcome[0]) for outcome in found)
        detail = f"prompts {different} differ" if different else f"{len(found)} prompts, {rows} tokens, ids and bytes equal"
        report.check(f"{model}: {case}", not different and len(found) == len(places), detail)

    everyone = list(range(len(requests)))
    compare("together, again", outcomes(context, bundle, requests), everyone)
    alone = [outcomes(context, bundle, [request])[0] for request in requests]
    compare("alone", alone, everyone)
    order = everyone[::-1][3:] + everyone[::-1][:3]
    compare("permuted", outcomes(context, bundle, [requests[place] for place in order]), order)
    if context.offers("generate", "--no-graphs"):
        compare("without graphs", outcomes(context, bundle, requests, "--no-graphs"), everyone)


def outcomes(context, bundle, requests, *flags):
    """(ids, bytes of the logits) of each request."""
    results, tensors = context.generate(bundle, requests, *flags, logits=True)
    return [(result["choices"][0]["ids"], tensors[f"logits.{i}"][1]) for i, result in enumerate(results)]


def long_run(context, report, bundle, facts, model, numpy):
    """Many decode steps, twice: the same ids, and logits that are numbers."""
    prompt = prompt_ids(16, 3, facts["model"]["vocab_size"])
    steps = min(LONG_TOKENS, facts["limits"]["max_seq_len"] - len(prompt) - 1)
    request = {"prompt_ids": prompt, "max_new_tokens": steps, "ignore_eos": True}
    (ids, data), = outcomes(context, bundle, [request])
    (again,) = context.generate(bundle, [request])
    same = again["choices"][0]["ids"] == ids
    report.check(f"{model}: {steps} decode steps, twice", same and len(ids) == steps, f"{len(set(ids))} different ids")
    logits = numpy.frombuffer(data, dtype="<f4")
    finite = bool(numpy.isfinite(logits).all())
    largest = float(numpy.abs(logits).max()) if finite else math.nan
    report.check(f"{model}: logits of {steps} steps are finite", finite, f"largest {largest:.3g}")


def refusal(context, report):
    """A bundle for an architecture that is not this machine's."""
    bundle = context.compile(str(context.fixture("tiny-opt")), name="own")
    (own,) = [target["name"] for target in json.loads(context.kilnc("inspect", bundle, "--json"))["targets"]]
    other = "sm_120a" if own.startswith("sm_8") else "sm_80"
    emit_only = [] if context.on_gpu else ["--emit-only"]
    foreign = context.compile(str(context.fixture("tiny-opt")), *emit_only, name=other, target=other)
    done = subprocess.run(
        [context.program("kiln"), "generate", foreign, "--prompt-ids", "4,5,6", "--json", "--device", context.device],
        capture_output=True, text=True, errors="replace",
    )
    message = done.stderr.strip().splitlines()[-1:] or [""]
    report.check(
        f"a bundle for {other} is refused on {own}",
        done.returncode == 1 and names_both(done.stderr, own, other) and not done.stdout,
        f"status {done.returncode}: {message[0][:300]}",
    )


def names_both(message, own, other):
    """Whether both targets are named; `sm_90a` may be called `sm_90` or `compute capability 9.0` too."""
    digits = own.removeprefix("sm_").rstrip("a")
    own_names = {own, own.rstrip("a"), f"{digits[:-1]}.{digits[-1:]}"} if digits.isdigit() else {own}
    return other in message and any(name in message for name in own_names)
