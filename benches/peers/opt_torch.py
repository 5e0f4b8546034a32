#!/usr/bin/env python3
"""OPT by transformers on PyTorch: eager, and compiled with a static cache inside a CUDA graph.

Random weights in f16, made on the GPU. The static cache is as long as the run needs and no longer.
The compiled step chooses the next token, feeds it and advances the position by itself, so a graph is
replayed without work of the host; this spares more than torch.compile's own "reduce-overhead" does.
Answers the requests of worker.py.
"""

import time

import torch
from transformers import AutoModelForCausalLM, OPTConfig, StaticCache

import worker

WARM_UP = 3
PREFILLS = 10  # a measurement


def main():
    device, config = worker.arguments(__doc__)
    model = make_model(config, device)
    worker.serve(lambda request: prepare(model, request))


def prepare(model, request):
    compiled = request["variant"] == "compiled"
    if request["phase"] == "prefill":
        work, notes = prefill(model, request, compiled)
        return lambda: timed(model.device, work, PREFILLS), notes
    return decode_compiled(model, request) if compiled else decode_eager(model, request)


def make_model(config, device):
    opt = OPTConfig(
        vocab_size=config["vocab_size"], hidden_size=config["hidden_size"], num_hidden_layers=config["layers"],
        ffn_dim=config["ffn_size"], num_attention_heads=config["heads"], word_embed_proj_dim=config["hidden_size"],
        max_position_embeddings=config["max_positions"],
    )
    dtype = torch.float16 if device == "cuda" else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(opt, dtype=dtype, attn_implementation="sdpa").eval()


# ---- decode ----


def decode_eager(model, request):
    """transformers as it comes: a cache that grows, a step launched kernel by kernel."""
    batch, prompt, steps = request["batch"], request["prompt"], request["steps"]

    @torch.inference_mode()
    def measure():
        output = model(prompt_ids(model, batch, prompt), use_cache=True, logits_to_keep=1)
        cache, tokens = output.past_key_values, output.logits.argmax(-1)
        del output

        def step():
            nonlocal cache, tokens
            output = model(tokens, past_key_values=cache, use_cache=True)
            cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)

        return timed(model.device, step, steps)

    return measure, ""


def decode_compiled(model, request):
    batch, prompt, steps = request["batch"], request["prompt"], request["steps"]
    step, reset, _ = static_step(model, batch, prompt, prompt + steps)
    step, note = compiled(step, request["mode"], reset)
    step, graph_note = captured(model.device, step, reset)

    def measure():
        reset()
        return timed(model.device, step, steps)

    return measure, note + graph_note


@torch.no_grad()
def static_step(model, batch, prompt, length):
    """A step on static tensors, what sets it back to the end of a prompt, and the tensors.

    The state is the token (B, 1) to be fed and its position (1, 1).
    """
    tokens = torch.full((batch, 1), 5, device=model.device)
    position = torch.full((1, 1), prompt, device=model.device)
    places = torch.arange(length, device=model.device)
    cache = StaticCache(config=model.config, max_cache_len=length)
    # Allocates the cache outside of compiled code, which then knows its addresses as fixed.
    ids = prompt_ids(model, batch, prompt)
    causal = (places <= torch.arange(prompt, device=model.device)[:, None]).view(1, 1, prompt, length)
    model(ids, attention_mask=causal, position_ids=torch.arange(prompt, device=model.device)[None],
          past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def step():
        mask = (places <= position).view(1, 1, 1, length)
        output = model(
            tokens, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        tokens.copy_(output.logits.argmax(-1))
        position.add_(1)
        return output.logits

    def reset():
        position.fill_(prompt)
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)

    reset()
    return step, reset, (tokens, position, cache)


# ---- prefill ----


def prefill(model, request, compile_it):
    """One pass over a prompt to its last logits; keys and values are not kept."""
    ids = prompt_ids(model, request["batch"], request["prompt"])
    result = torch.empty(request["batch"], 1, model.config.vocab_size, dtype=model.dtype, device=model.device)

    @torch.no_grad()
    def work():
        result.copy_(model(ids, use_cache=False, logits_to_keep=1).logits)

    if not compile_it:
        return work, ""
    work, note = compiled(work, request["mode"], lambda: None)
    work, graph_note = captured(model.device, work, lambda: None)
    return work, note + graph_note


# ---- compiling, capturing, timing ----


def compiled(work, mode, reset):
    """Compiled without a break where that works; the CUDA graph is captured around it."""
    inductor_mode = "max-autotune-no-cudagraphs" if mode == "max-autotune" else "default"
    for fullgraph in (True, False):
        function = torch.compile(work, mode=inductor_mode, fullgraph=fullgraph, dynamic=False)
        reset()
        try:
            function()
        except Exception as error:
            if not fullgraph:
                raise
            failure = f"{type(error).__name__}"
            continue
        reset()
        return function, inductor_mode + ("" if fullgraph else f", with graph breaks ({failure})")


def captured(device, work, reset):
    """The work as a CUDA graph; itself on the CPU, or where it cannot be captured."""
    if device.type != "cuda":
        return work, ", no CUDA graph"
    reset()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    reset()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except Exception as error:
        return work, f", no CUDA graph ({type(error).__name__})"
    reset()
    return graph.replay, ", CUDA graph"


def timed(device, work, times):
    """Milliseconds of one of so many calls in a row."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with torch.no_grad():
        synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        synchronize()
        return (time.perf_counter() - start) * 1e3 / times


def prompt_ids(model, batch, length):
    return (torch.arange(batch * length, device=model.device).view(batch, length) * 7919) % (model.config.vocab_size - 4) + 4


if __name__ == "__main__":
    main()
