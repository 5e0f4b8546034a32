#!/usr/bin/env python3
"""OPT and GPT-2 by CTranslate2, in f32, bf16 and int8. Answers the requests of serving.py."""

import json
import time

import ctranslate2

import serving

TYPES = {"f32": "float32", "bf16": "bfloat16", "int8": "int8"}


def convert(args):
    check(args.format)
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(args.hf_dir)).convert(str(args.folder), quantization=TYPES[args.format], force=True)


def check(format):
    if format not in TYPES:
        raise serving.Unsupported(f"CTranslate2 has no {format} on the CPU")
    if TYPES[format] not in ctranslate2.get_supported_compute_types("cpu"):
        raise serving.Unsupported(f"CTranslate2 would compute {TYPES[format]} in float32 on this processor")


def load(args):
    check(args.format)
    return CTranslate2(args.folder, TYPES[args.format], args.threads)


class CTranslate2(serving.System):
    def __init__(self, folder, compute_type, threads):
        self.generator = ctranslate2.Generator(str(folder), device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=threads)
        self.weight_bytes = serving.file_bytes(folder, "model.bin")
        self.note = f"computes in {self.generator.compute_type}"
        self.versions = f"CTranslate2 {ctranslate2.__version__}"
        self.words = json.loads((folder / "vocabulary.json").read_text())

    def generate(self, batch, prompt, steps):
        rows = serving.prompt_rows(batch, prompt, len(self.words))
        prompts = [[self.words[token] for token in row] for row in rows]
        last_at = [0.0] * (steps + 1)

        def arrived(result):
            last_at[result.step] = time.perf_counter()
            return False

        start = time.perf_counter()
        self.generator.generate_batch(
            prompts, max_batch_size=batch, beam_size=1, sampling_topk=1, min_length=steps + 1, max_length=steps + 1,
            include_prompt_in_result=False, callback=arrived,
        )
        if not all(last_at):
            raise RuntimeError(f"tokens of {sum(map(bool, last_at))} steps, not {steps + 1}")
        return (last_at[0] - start) * 1e3, (last_at[-1] - last_at[0]) * 1e3 / steps if steps else None


if __name__ == "__main__":
    serving.main(__doc__, convert, load)
