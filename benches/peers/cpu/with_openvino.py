#!/usr/bin/env python3
"""OPT and GPT-2 by OpenVINO: exported by optimum-intel, run by OpenVINO's own requests.

Formats f32, f16 (weights only), int8 and int4 (weights only, as optimum-intel makes them by default). Left alone,
OpenVINO computes in bf16 on processors that have it, whatever the weights: f32 is made to compute in f32, and f32-bf16
is f32 left alone.
The head is applied to the last position alone, as OpenVINO GenAI does it. Answers the requests of
serving.py.
"""

import subprocess
import sys
from pathlib import Path

import serving

WEIGHTS = {"f32": "fp32", "f32-bf16": "fp32", "f16": "fp16", "int8": "int8", "int4": "int4"}


def convert(args):
    if args.format not in WEIGHTS:
        raise serving.Unsupported(f"OpenVINO is not measured in {args.format}; its 16 bits are f16")
    if args.format == "f32-bf16":
        import openvino

        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise serving.Unsupported("OpenVINO computes in f32 on this processor")
    cli = Path(sys.executable).with_name("optimum-cli")
    subprocess.run(
        [cli, "export", "openvino", "--model", args.hf_dir, "--task", "text-generation-with-past",
         "--weight-format", WEIGHTS[args.format], args.folder],
        check=True,
    )


def load(args):
    return OpenVino(args.folder, args.threads, exact=args.format == "f32")


class OpenVino(serving.System):
    """One request of a model whose cache is its state."""

    def __init__(self, folder, threads, exact):
        import numpy
        import openvino

        self.numpy = numpy
        core = openvino.Core()
        model = core.read_model(folder / "openvino_model.xml")
        keep_last_position(openvino, model)
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        if exact:
            options["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = core.compile_model(model, "CPU", options)
        self.inputs = {name for port in compiled.inputs for name in port.get_names()}
        self.vocab_size = compiled.output(0).get_partial_shape()[2].get_length()
        self.request = compiled.create_infer_request()
        self.weight_bytes = serving.file_bytes(folder, "*.bin")
        hint = lambda name: compiled.get_property(name).to_string()
        self.note = f"computes in {hint('INFERENCE_PRECISION_HINT')}, keys and values in {hint('KV_CACHE_PRECISION')}"
        self.versions = f"OpenVINO {openvino.__version__}"

    def generate(self, batch, prompt, steps):
        np = self.numpy
        ids = np.array(serving.prompt_rows(batch, prompt, self.vocab_size), np.int64)
        self.request.reset_state()
        past = 0

        def feed():
            nonlocal ids, past
            length = past + ids.shape[1]
            inputs = {
                "input_ids": ids, "attention_mask": np.ones((batch, length), np.int64),
                "position_ids": np.broadcast_to(np.arange(past, length), ids.shape), "beam_idx": np.arange(batch, dtype=np.int32),
            }
            self.request.infer({name: value for name, value in inputs.items() if name in self.inputs}, share_inputs=True)
            past, ids = length, self.request.get_output_tensor(0).data[:, -1:].argmax(-1)

        return serving.timed_steps(feed, feed, steps)


def keep_last_position(openvino, model):
    """Cut the hidden states that the head multiplies to those of the last position."""
    from openvino import opset13 as ops

    node = model.get_results()[0]
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    number = lambda value: ops.constant([value], dtype="int64")
    last = ops.slice(node.input_value(0), number(-1), number(2**31), number(1), number(1))
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


if __name__ == "__main__":
    serving.main(__doc__, convert, load)
