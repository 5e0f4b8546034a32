#!/usr/bin/env python3
"""OPT and GPT-2 by transformers on PyTorch: eager, or its decode step compiled and frozen.

Formats f32, bf16 and int8 (dynamic quantization of all linears; the token table stays f32). --compiled
is torch.compile with a static cache as long as the run and weights frozen into the code, for decode; a
prompt is fed eagerly, which is no slower. Answers the requests of serving.py.
"""

import os
import sys

import serving

os.environ.setdefault("TORCHINDUCTOR_FREEZING", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import opt_torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}


def convert(args):
    if args.format not in DTYPES:
        raise serving.Unsupported(f"PyTorch is not measured in {args.format}")
    args.folder.mkdir(parents=True, exist_ok=True)


def load(args):
    torch.set_num_threads(args.threads)
    options = {"dtype": DTYPES[args.format], "local_files_only": True, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(args.hf_dir, **options).eval()
    system = Compiled(model) if args.compiled else Eager(model)
    system.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if args.format == "int8":
        system.weight_bytes = quantize(model)
        system.note = "dynamic quantization"
    system.versions = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
    return system


class Eager(serving.System):
    """transformers as it comes: a cache that grows."""

    def __init__(self, model):
        self.model = model

    @torch.inference_mode()
    def generate(self, batch, prompt, steps):
        ids = opt_torch.prompt_ids(self.model, batch, prompt)
        cache = tokens = None

        def first():
            nonlocal cache, tokens
            output = self.model(ids, use_cache=True, logits_to_keep=1)
            cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)

        def step():
            nonlocal cache, tokens
            output = self.model(tokens, past_key_values=cache, use_cache=True)
            cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)

        return serving.timed_steps(first, step, steps)


class Compiled(Eager):
    """Steps compiled for each batch when it is first asked for."""

    def __init__(self, model):
        super().__init__(model)
        self.steps = {}

    def generate(self, batch, prompt, steps):
        if not steps:
            return super().generate(batch, prompt, steps)
        if (batch, prompt, steps) not in self.steps:
            step, reset, _ = opt_torch.static_step(self.model, batch, prompt, prompt + steps)
            step, self.note = opt_torch.compiled(step, "default", reset)
            self.steps[batch, prompt, steps] = step, reset
        step, reset = self.steps[batch, prompt, steps]
        first_ms, _ = super().generate(batch, prompt, 0)
        reset()
        with torch.no_grad():
            return first_ms, serving.timed_steps(lambda: None, step, steps)[1]


def quantize(model):
    """Linears to int8; the bytes of their weights, scales left out."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                setattr(module, name, linear_of(child))
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    weight_bytes = sum(linear.weight.numel() for linear in linears)
    torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    return weight_bytes


def linear_of(conv):
    """GPT-2's matrices are (inputs, outputs)."""
    linear = torch.nn.Linear(*conv.weight.shape, device=conv.weight.device, dtype=conv.weight.dtype)
    linear.weight.data = conv.weight.data.T.contiguous()
    linear.bias.data = conv.bias.data
    return linear


if __name__ == "__main__":
    serving.main(__doc__, convert, load)
