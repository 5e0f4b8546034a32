#!/usr/bin/env python3
"""GPT-2 by llama.cpp, in F32, F16, BF16, Q8_0 (int8) and Q4_0 (int4, whose token table, also the head,
is Q6_K as llama.cpp makes it). Answers the requests of serving.py.
"""

import json

import llama_cpp
import numpy

import serving

FILE_TYPES = {
    "f32": llama_cpp.LLAMA_FTYPE_ALL_F32, "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16, "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
BATCH_TOKENS = 512
POSITIONS = 1024
POSITIONS_OF_MANY = 256  # The cache is reserved, and cleared, whole.

# GGUF's names of GPT-2's tensors; matrices, which the checkpoint has as (inputs, outputs), are turned.
TENSORS = {"wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight", "ln_f": "output_norm"}
LAYER_TENSORS = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}


def convert(args):
    hf_dir, folder, format = args.hf_dir, args.folder, args.format
    config = json.loads((hf_dir / "config.json").read_text())
    if config["model_type"] != "gpt2":
        raise serving.Unsupported(f"llama.cpp does not run {config['model_type'].upper()}")
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "f32.gguf"
    write_gguf(hf_dir, config, whole)
    if format != "f32":
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = FILE_TYPES[format]
        if llama_cpp.llama_model_quantize(str(whole).encode(), str(folder / f"{format}.gguf").encode(), options):
            raise RuntimeError("llama_model_quantize failed")
        whole.unlink()


def write_gguf(hf_dir, config, path):
    import gguf
    from safetensors.numpy import load_file

    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, tensor in load_file(hf_dir / "model.safetensors").items():
        if to := gguf_name(name.removeprefix("transformer.")):
            turned = tensor.T if name.startswith(("transformer.h.", "h.")) and tensor.ndim == 2 else tensor
            writer.add_tensor(to, numpy.ascontiguousarray(turned, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name):
    """None of the head, which is the token table, and of masks."""
    if name in TENSORS:
        return TENSORS[name]
    module, _, kind = name.rpartition(".")
    if module in TENSORS:
        return f"{TENSORS[module]}.{kind}"
    parts = module.split(".", 2)
    if parts[0] == "h" and len(parts) == 3 and parts[2] in LAYER_TENSORS:
        return f"blk.{parts[1]}.{LAYER_TENSORS[parts[2]]}.{kind}"
    return None


def load(args):
    return Llama(args.folder / f"{args.format}.gguf", args.threads)


class Llama(serving.System):
    """One context for each number of sequences, made when first asked for."""

    def __init__(self, path, threads):
        self.path, self.threads = path, threads
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path.name}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.contexts = {}
        self.context(1)
        self.weight_bytes = path.stat().st_size
        self.note = "keys and values in f16"
        self.versions = f"llama-cpp-python {llama_cpp.__version__}"

    def context(self, sequences):
        if sequences not in self.contexts:
            options = llama_cpp.llama_context_default_params()
            options.n_ctx = POSITIONS if sequences == 1 else sequences * POSITIONS_OF_MANY
            options.n_batch = options.n_ubatch = BATCH_TOKENS
            options.n_seq_max = sequences
            options.n_threads = options.n_threads_batch = self.threads
            context = llama_cpp.llama_init_from_model(self.model, options)
            self.contexts[sequences] = context, llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        return self.contexts[sequences]

    def generate(self, batch, prompt, steps):
        context, tokens = self.context(batch)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        rows = serving.prompt_rows(batch, prompt, self.vocab_size)
        past = 0

        def feed():
            nonlocal rows, past
            rows = [[token] for token in self.decode(context, tokens, rows, past)]
            past = past + (1 if past else prompt)

        return serving.timed_steps(feed, feed, steps)

    def decode(self, context, tokens, rows, past):
        """Feed so many tokens of each sequence; the next of each."""
        tokens.n_tokens = 0
        last = []
        for sequence, row in enumerate(rows):
            for at, token in enumerate(row):
                n = tokens.n_tokens
                tokens.token[n], tokens.pos[n], tokens.n_seq_id[n] = token, past + at, 1
                tokens.seq_id[n][0] = sequence
                tokens.logits[n] = at + 1 == len(row)
                tokens.n_tokens += 1
            last.append(tokens.n_tokens - 1)
        if status := llama_cpp.llama_decode(context, tokens):
            raise RuntimeError(f"llama_decode gives {status}")
        return [int(self.logits(context, at).argmax()) for at in last]

    def logits(self, context, at):
        return numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, at), shape=(self.vocab_size,))


if __name__ == "__main__":
    serving.main(__doc__, convert, load)
