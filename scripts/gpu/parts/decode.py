"""Milliseconds of a decode step at some batch sizes. See speed.py."""

from . import speed

QUICK_BATCHES = [1, 8]
PROMPT = 128
STEPS = 64
size_name = "batch"
jax = True


def run(context, report):
    import sys

    report.fact("lengths", f"{PROMPT} tokens of prompt, {STEPS} steps; 'ms' is of one step")
    report.fact("share", "of the read bandwidth: bytes of the weights and of the positions that exist, over the time")
    report.fact("jax static", "keys and values of the model's full length, attended to with a mask")
    speed.compete(context, report, sys.modules[__name__])


def check_ceiling(context, report):
    if context.on_gpu:
        report.check("the read bandwidth is known", speed.ceiling(context, report, "read_gb_per_s"))


def sizes(context, config):
    return context.batches or (QUICK_BATCHES if context.quick else speed.BATCHES)


def lengths(config):
    """Prompt and steps that fit into the model's positions."""
    steps = min(STEPS, config["max_positions"] // 2)
    return min(PROMPT, config["max_positions"] - steps), steps


def request(batch, config):
    prompt, steps = lengths(config)
    return {"phase": "decode", "batch": batch, "prompt": prompt, "steps": steps}


def kiln(context, config, bundle, batch):
    prompt, steps = lengths(config)
    return context.bench(
        bundle, prompt_len=prompt, gen_len=steps, batch=batch, repeat=8,
        kv_cache_mb=speed.kv_cache_mb(context, config, batch, prompt + steps),
    )


def kiln_ms(found):
    return found["decode_step"]["ms"]["median"]


def figures(config, batch, who, ms, ceilings):
    """Tokens of a step, and the columns that only decode has."""
    prompt, steps = lengths(config)
    positions = batch * (prompt + steps / 2)
    gb_per_s = (speed.weight_bytes(config) + speed.kv_bytes(config, positions)) / ms / 1e6
    columns = {"GB/s": round(gb_per_s, 1)}
    if read := ceilings.get("read_gb_per_s"):
        columns["share"] = f"{gb_per_s / read:.0%}"
    return batch, columns
