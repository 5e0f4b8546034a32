#!/usr/bin/env python3
"""OPT's decode step in plain JAX with static shapes: what padded serving starts from.

One jitted function takes weights, cache, tokens and position. The cache has the model's full length,
whatever is in it; attention reads all of it under a mask. The next token is chosen on the device and
fed to the next step without the host.

Answers the requests of worker.py. Shapes: B sequences, S positions of the cache, C hidden, F
feed-forward, H heads, D their size, V vocabulary. Matrices are (outputs, inputs), as checkpoints have them.
"""

import json
import os
import struct
import time
from functools import partial
from pathlib import Path

# Other peers hold memory beside this one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy

import worker

EPSILON = 1e-5
POSITION_OFFSET = 2  # OPT's table of positions begins with two rows that are never read


def main():
    device, config = worker.arguments(__doc__)
    dtype = jnp.float16 if device == "cuda" else jnp.float32
    jax.config.update("jax_platforms", device)
    weights = random_weights(config, dtype)
    worker.serve(lambda request: prepare(config, weights, dtype, request))


def prepare(config, weights, dtype, request):
    batch, prompt, steps = request["batch"], request["prompt"], request["steps"]
    step = jax.jit(partial(decode_step, config["heads"]), donate_argnums=(1, 2, 3))

    def measure():
        cache = empty_cache(config, batch, dtype)
        tokens = jnp.full((batch,), 5, jnp.int32)
        position = jnp.int32(prompt)
        cache, tokens, position, _ = step(weights, cache, tokens, position)
        jax.block_until_ready(tokens)
        start = time.perf_counter()
        for _ in range(steps):
            cache, tokens, position, _ = step(weights, cache, tokens, position)
        jax.block_until_ready(tokens)
        return (time.perf_counter() - start) * 1e3 / steps

    measure()
    return measure, f"cache of {config['max_positions']} positions"


def decode_step(heads, weights, cache, tokens, position):
    """Feed one token a sequence, at `position` in all: cache, next tokens (B,), position, logits (B, V)."""
    x = weights["tokens"][tokens] + weights["positions"][position + POSITION_OFFSET]  # (B, C)
    new_cache = []
    for layer, (keys, values) in zip(weights["layers"], cache):
        h = norm(x, layer["norm1"])
        q, k, v = (split_heads(linear(h, layer[name]), heads) for name in ("q", "k", "v"))  # (B, H, D)
        keys = jax.lax.dynamic_update_slice(keys, k[:, :, None], (0, 0, position, 0))  # (B, H, S, D)
        values = jax.lax.dynamic_update_slice(values, v[:, :, None], (0, 0, position, 0))
        new_cache.append((keys, values))
        x = x + linear(attention(q, keys, values, position), layer["out"])
        h = jax.nn.relu(linear(norm(x, layer["norm2"]), layer["up"]))
        x = x + linear(h, layer["down"])
    logits = jnp.einsum("bc,vc->bv", norm(x, weights["norm"]), weights["tokens"])
    return new_cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), position + 1, logits


def attention(q, keys, values, position):
    """(B, C) of one query a head over all S positions, those after `position` masked out."""
    scores = jnp.einsum("bhd,bhsd->bhs", q, keys, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
    scores = jnp.where(jnp.arange(keys.shape[2]) <= position, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bhs,bhsd->bhd", weights, values).reshape(q.shape[0], -1)


def linear(x, layer):
    weight, bias = layer
    return jnp.einsum("bk,nk->bn", x, weight) + bias


def norm(x, layer):
    weight, bias = layer
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = ((wide - mean) ** 2).mean(-1, keepdims=True)
    return ((wide - mean) * jax.lax.rsqrt(variance + EPSILON)).astype(x.dtype) * weight + bias


def split_heads(x, heads):
    return x.reshape(x.shape[0], heads, -1)


# ---- weights and cache ----


def empty_cache(config, batch, dtype):
    heads = config["heads"]
    shape = (batch, heads, config["max_positions"], config["hidden_size"] // heads)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config["layers"])]


def random_weights(config, dtype):
    keys = iter(jax.random.split(jax.random.key(0), 16 * (config["layers"] + 1)))
    normal = lambda *shape: 0.02 * jax.random.normal(next(keys), shape, dtype)
    return assemble(config, lambda name, *shape: jnp.ones(shape, dtype) if "norm.weight" in name else normal(*shape))


def checkpoint_weights(config, folder, dtype):
    """Those of a checkpoint directory with one safetensors file in f32."""
    data = (Path(folder) / "model.safetensors").read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_bytes])

    def tensor(name, *shape):
        entry = next(header[prefix + name] for prefix in ("model.decoder.", "decoder.") if prefix + name in header)
        assert entry["dtype"] == "F32" and tuple(entry["shape"]) == shape, (name, entry)
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        return jnp.asarray(numpy.frombuffer(data[begin:end], numpy.float32).reshape(shape), dtype)

    return assemble(config, tensor)


def assemble(config, tensor):
    """The tree of weights, each from `tensor(name, *shape)`."""
    c, f = config["hidden_size"], config["ffn_size"]

    def pair(name, *shape):
        return tensor(f"{name}.weight", *shape), tensor(f"{name}.bias", shape[0])

    def layer(index):
        at = f"layers.{index}"
        return {
            "norm1": pair(f"{at}.self_attn_layer_norm", c),
            **{name: pair(f"{at}.self_attn.{name}_proj", c, c) for name in ("q", "k", "v", "out")},
            "norm2": pair(f"{at}.final_layer_norm", c),
            "up": pair(f"{at}.fc1", f, c),
            "down": pair(f"{at}.fc2", c, f),
        }

    return {
        "tokens": tensor("embed_tokens.weight", config["vocab_size"], c),
        "positions": tensor("embed_positions.weight", config["max_positions"] + POSITION_OFFSET, c),
        "layers": [layer(index) for index in range(config["layers"])],
        "norm": pair("final_layer_norm", c),
    }


if __name__ == "__main__":
    main()
