"""kiln in f16 against transformers in f32 on the same GPU.

transformers' own f16 run is measured against the same reference, so that kiln is judged by what f16
costs: its logits may deviate 1.5 times as much. The logits compared are those of every prompt
position and of every token that kiln generated, so prefill and decode both. Greedy ids must equal
the reference's up to the first near-tie: a step whose two best logits lie closer together than the
deviation reaches.
"""

import gc
import json
import sys

from .common import prompt_ids, short

QUICK_MODELS = ["opt-125m", "opt-350m", "gpt2"]
MODELS = [*QUICK_MODELS, "opt-2.7b"]
PROMPT_LENGTHS = [1, 6, 54]
NEW_TOKENS = 32
SEED = 1

# Of the largest logit: below it, kiln passes whatever transformers' f16 run does.
SMALL_DEVIATION = 5e-3
TIMES_F16 = 1.5


def run(context, report):
    import torch

    sys.path.insert(0, str(context.fixture("")))
    import compare
    import reference

    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for model in context.models or (QUICK_MODELS if context.quick else MODELS):
        checkpoint = context.export(model, SEED)
        bundle = context.compile(str(checkpoint), name="parity")
        vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
        prompts = [prompt_ids(length, seed, vocabulary) for seed, length in enumerate(PROMPT_LENGTHS)]
        requests = [{"prompt_ids": ids, "max_new_tokens": NEW_TOKENS, "ignore_eos": True} for ids in prompts]
        results, tensors = context.generate(bundle, requests, logits=True)
        found_ids = [result["choices"][0]["ids"] for result in results]
        found = [torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape)
                 for shape, data in (tensors[f"logits.{i}"] for i in range(len(prompts)))]
        # What was fed to kiln position by position, its own tokens included.
        fed = [(prompt + ids)[: len(rows)] for prompt, ids, rows in zip(prompts, found_ids, found)]

        f32 = reference.load(checkpoint, torch.float32, context.device)
        expected = [reference.prompt_pass(f32, ids)[0].cpu() for ids in fed]
        greedy = [reference.greedy(f32, prompt, NEW_TOKENS) for prompt in prompts]
        del f32
        f16 = reference.load(checkpoint, torch.float16, context.device)
        halves = [reference.prompt_pass(f16, ids)[0].float().cpu() for ids in fed]
        del f16
        gc.collect()
        if context.on_gpu:
            torch.cuda.empty_cache()

        for prompt, need, have, half, ids, (need_ids, gaps) in zip(prompts, expected, found, halves, found_ids, greedy):
            case = f"{short(model)}, prompt of {len(prompt)}"
            deviation, allowed, f16_deviation = judge_logits(compare.relative_deviation, need, have, half)
            report.check(
                f"{case}: logits", deviation <= allowed,
                f"{deviation:.2e} of the largest; transformers in f16 {f16_deviation:.2e}; allowed {allowed:.2e}",
            )
            step = compare.first_difference(ids, need_ids)
            # Two logits, each off by as much.
            reach = 2 * deviation * need.abs().max().item()
            report.check(f"{case}: greedy ids", *judge_ids(step, ids, need_ids, gaps, reach))



def judge_logits(relative_deviation, expected, found, half):
    """Deviation of kiln, what is allowed, deviation of transformers in f16."""
    if found.shape != expected.shape:
        return float("inf"), SMALL_DEVIATION, float("nan")
    f16 = relative_deviation(expected, half)
    return relative_deviation(expected, found), max(TIMES_F16 * f16, SMALL_DEVIATION), f16


def judge_ids(step, found, expected, gaps, reach):
    """Whether ids that first differ at `step` (None: nowhere) are right, and what to say of them."""
    if step is None:
        return True, f"{len(expected)} equal, smallest gap {min(gaps):.2g}"
    if step >= min(len(found), len(expected)):
        return False, f"{len(found)} ids in place of {len(expected)}"
    place = f"{step} equal, then the two best logits are {gaps[step]:.2g} apart"
    if gaps[step] <= reach:
        return True, f"near-tie: {place}, within the deviation's {reach:.2g}"
    return False, f"{place}, beyond the deviation's {reach:.2g}"
