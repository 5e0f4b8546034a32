"""Milliseconds of the prefill of one prompt at some lengths. See speed.py."""

from . import speed

LENGTHS = [128, 512, 2048]
QUICK_LENGTHS = [512]
# `kiln bench` generates at least two tokens, for which the model must have positions.
GENERATED = 2
size_name = "tokens"
jax = False


def run(context, report):
    import sys

    report.fact("prefill", "one prompt; the peers compute its last logits and keep no keys and values, which spares them writes")
    report.fact("share", "of the rate of an 8192^3 matrix product in f16")
    speed.compete(context, report, sys.modules[__name__])


def check_ceiling(context, report):
    if context.on_gpu:
        report.check("the matrix rate is known", speed.ceiling(context, report, "f16_tflops"))


def sizes(context, config):
    lengths = context.lengths or (QUICK_LENGTHS if context.quick else LENGTHS)
    return [length for length in lengths if length <= config["max_positions"]]


def kiln_length(config, length):
    """A prompt of all positions leaves none to generate: kiln's is two tokens shorter, its rate the same."""
    return min(length, config["max_positions"] - GENERATED)


def request(length, config):
    return {"phase": "prefill", "batch": 1, "prompt": length}


def kiln(context, config, bundle, length):
    return context.bench(
        bundle, prompt_len=kiln_length(config, length), gen_len=GENERATED, batch=1, repeat=8,
        kv_cache_mb=speed.kv_cache_mb(context, config, 1, length + GENERATED),
    )


def kiln_ms(found):
    return found["prefill"]["ms"]["median"]


def figures(config, length, who, ms, ceilings):
    """Tokens of a prefill, and the columns that only prefill has."""
    tokens = kiln_length(config, length) if who == "kiln" else length
    tflops = speed.prefill_flops(config, tokens) / ms / 1e9
    columns = {"TFLOP/s": round(tflops, 1)}
    if peak := ceilings.get("f16_tflops"):
        columns["share"] = f"{tflops / peak:.0%}"
    return tokens, columns
