#!/usr/bin/env python3
"""Train the demo model: a small OPT that writes verse, stored as facebook/opt-* are.

    scripts/python-env
    .venv/bin/python models/demo/train.py tinyshakespeare.txt

TEXT is plain text whose paragraphs (speeches) are parted by blank lines. Its last tenth is held
out: neither the tokenizer nor the weights see it. The checkpoint that does best on it is kept.
Without --out the files in this folder are replaced.

    train.py TEXT --evaluate DIR      only measure the checkpoint in DIR on the held-out tenth
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

HERE = Path(__file__).resolve().parent

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in OPT
EOS = 2  # also opens every sequence
WINDOW = 512  # tokens in a sequence, the opening </s> included

CONFIG = {
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": EOS,
    "do_layer_norm_before": True,
    "dropout": 0.05,
    "eos_token_id": EOS,
    "ffn_dim": 1024,
    "hidden_size": 256,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": WINDOW,
    "model_type": "opt",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "5.23.0",
    "use_cache": True,
    "vocab_size": 1024,
    "word_embed_proj_dim": 256,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="TEXT", help="the text to learn from, UTF-8")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="measure this checkpoint and train nothing")
    parser.add_argument("--steps", type=int, default=1200, help="optimiser steps (default: 1200)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end sooner than --steps, after so long")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step, at least 512 (default: 1024)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="AdamW's, at its peak (default: 2e-3)")
    parser.add_argument("--muon-rate", type=float, default=2e-2, help="Muon's, at its peak (default: 2e-2)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights, windows and dropout (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    learned, held_out = split_text(args.text.read_text(encoding="utf-8"))
    if args.evaluate:
        report(args.evaluate, held_out)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(learned, args.out)
    train(learned, held_out, args)
    report(args.out, held_out)


def split_text(text):
    """The first nine tenths, up to a blank line, and the rest."""
    border = text.index("\n\n", len(text) * 9 // 10) + 2
    return text[:border], text[border:]


# ---- tokenizer ----


def train_tokenizer(text, out):
    """Byte-level BPE of CONFIG["vocab_size"] tokens: the special ones, all bytes, then merges."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], CONFIG["vocab_size"], special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.save_model(str(out))

    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    roles = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    special = {role: {"content": content} | flags for role, content in roles.items()}
    config = {"errors": "replace"} | {role: token | {"__type": "AddedToken"} for role, token in special.items()}
    config |= {"add_prefix_space": False, "add_bos_token": True, "special_tokens_map_file": None}
    config |= {"tokenizer_class": "GPT2Tokenizer"}
    write_json(out / "tokenizer_config.json", config)
    write_json(out / "special_tokens_map.json", special)
    write_json(out / "config.json", CONFIG)
    generation = {"_from_model_config": True, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": 1}
    write_json(out / "generation_config.json", generation | {"transformers_version": "5.23.0"})


def encode(text, folder):
    """The ids of a text, without the </s> that opens a prompt."""
    return torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"][1:])


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- training ----


def train(learned, held_out, args):
    ids, held_out_ids = encode(learned, args.out), encode(held_out, args.out)
    starts = line_starts(ids, encode("\n", args.out).item())
    model = new_model()
    print(f"{len(ids)} tokens, {len(starts)} lines, {sum(p.numel() for p in model.parameters())} parameters")

    # The layers' matrices go to Muon; tables, biases and norms to AdamW.
    matrices = [parameter for parameter in model.model.decoder.layers.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    muon = Muon(matrices, lr=args.muon_rate, weight_decay=0.05)
    groups = adamw.param_groups + muon.param_groups
    peaks = [group["lr"] for group in groups]
    begun, best = time.monotonic(), math.inf
    for step in range(args.steps):
        # The rate falls with the steps or with the time, whichever is further on.
        progress = max(step / args.steps, (time.monotonic() - begun) / (60 * args.minutes))
        for group, peak in zip(groups, peaks):
            group["lr"] = peak * schedule(step, progress)
        length = window_length(progress)
        batch, positions = random_windows(ids, starts, args.tokens // length, length)
        loss = model(input_ids=batch, position_ids=positions, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        adamw.step()
        muon.step()
        model.zero_grad()

        finished = progress >= 1 or step + 1 == args.steps
        if (step + 1) % 200 == 0 or finished:
            nats = held_out_nats(model, held_out_ids)[0] / len(held_out_ids)
            minutes = (time.monotonic() - begun) / 60
            print(f"step {step + 1}: training {loss:.3f}, held-out {nats:.3f} nats/token, {minutes:.1f} min", flush=True)
            if nats < best:
                best = nats
                save(model, args.out)
        if finished:
            break


def new_model():
    """Random weights, and sinusoids in the position table, which is learned from there on.

    In sinusoids the step from a position to the next is the same linear map everywhere.
    """
    model = OPTForCausalLM(OPTConfig(**{key: value for key, value in CONFIG.items() if key != "torch_dtype"}))
    table = model.model.decoder.embed_positions.weight.data  # (WINDOW + 2, C)
    rates = torch.exp(torch.arange(0, table.shape[1], 2) * (-math.log(10000) / table.shape[1]))
    angles = torch.arange(table.shape[0])[:, None] * rates
    table.copy_(0.01 * math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=1))
    return model


def schedule(step, progress):
    """Warm up over 100 steps, then a cosine from the peak (progress 0) to a twentieth of it (1)."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1))
    return min((step + 1) / 100, 0.05 + 0.95 * cosine)


def line_starts(ids, newline):
    """Where the lines of the text begin, blank ones left out.

    Lines rather than speeches, so that long speeches get their share of windows.
    """
    begins = torch.cat([torch.tensor([True]), ids[:-1] == newline]) & (ids != newline)
    starts = begins.nonzero().flatten()
    return starts[starts < len(ids) - WINDOW]


def window_length(progress):
    """Short windows first: in long ones it takes far longer until heads tell near tokens from far ones."""
    return 32 if progress < 0.35 else 128 if progress < 0.7 else WINDOW


def random_windows(ids, starts, count, length):
    """Token ids (count, length): </s>, then the text from the start of a random line; and positions.

    A window stands at a random place in the position table, so that short ones teach all of it.
    """
    chosen = starts[torch.randint(len(starts), (count,))]
    windows = ids[chosen[:, None] + torch.arange(length - 1)]
    first = torch.randint(WINDOW - length + 1, (count, 1))
    return torch.cat([torch.full((count, 1), EOS), windows], dim=1), first + torch.arange(length)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (https://kellerjordan.github.io/posts/muon/).

    Came in 80 steps to the loss that AdamW took 160 for. torch.optim.Muon is the same in bf16, which takes
    seconds a step on CPUs without bf16 arithmetic.
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for matrix in group["params"]:
                state, momentum = self.state[matrix], group["momentum"]
                average = state.setdefault("average", torch.zeros_like(matrix)).mul_(momentum).add_(matrix.grad)
                update = orthogonal(matrix.grad + momentum * average)
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(update, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(matrix):
    """About U V^T of the singular value decomposition U S V^T, by five Newton-Schulz steps."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def load(folder):
    """The model of a checkpoint directory, computing in f32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save(model, out):
    """The weights in f16 under the names of transformers; the tied head is not stored twice."""
    weights = {name: value.half() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


# ---- measuring ----


def report(folder, held_out):
    """Print the perplexity of the stored f16 weights, computed in f32."""
    model = load(folder)
    ids = encode(held_out, folder)
    nats, tokens = held_out_nats(model, ids)
    bits = nats / math.log(2) / len(held_out.encode("utf-8"))
    print(f"held out: {tokens} tokens, perplexity {math.exp(nats / tokens):.3f} per token, {bits:.4f} bits per byte")


@torch.no_grad()
def held_out_nats(model, ids):
    """(sum of -ln p over all tokens of ids, their number).

    The tokens are cut into consecutive windows of WINDOW - 1 without overlap; each is scored with
    </s> in front and nothing before it, so that every token counts once.
    """
    model.eval()
    nats = 0.0
    for window in ids.split(WINDOW - 1):
        window = torch.cat([torch.tensor([EOS]), window])[None]
        logits = model(input_ids=window).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    model.train()
    return nats, len(ids)


if __name__ == "__main__":
    main()
