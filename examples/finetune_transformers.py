"""Train a model of Hugging Face's `transformers` with its own norms and with the fused ones.

    python examples/finetune_transformers.py
    python examples/finetune_transformers.py --family gemma3 --dtype bfloat16
    python examples/finetune_transformers.py --model path/or/name --steps 50
    python examples/finetune_transformers.py --dim 4096 --dtype bfloat16      # on a GPU

`--model` fine-tunes a pretrained causal language model, from a folder or from the Hub. Without it
the model is a small one with random weights, which reads bytes: nothing is downloaded. The text is
the standard library of the running Python.

One copy of the model stays as it is; the norms of the other are replaced in one line. Both take
turns on the same batches, from the same weights. In the end the speeds and losses stand side by
side, and the exit status is 1 if the losses differ by more than rounding explains.

It takes transformers: pip install transformers
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from train_lm import read_corpus

import coreai_torch

FAMILIES = {  # of models with random weights
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}
HEAD_DIM = 64
UNTIMED_STEPS = 2  # the first steps also pay for memory and one-time set-up in libraries

# The largest difference of two losses, relative to them. In bfloat16 the gradients that the fused
# norm rounds once are not those of a norm that rounds after each operation.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}


@dataclass
class Lane:
    """One model in training and its history."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def random_model(args: argparse.Namespace) -> nn.Module:
    config, model = FAMILIES[args.family]
    heads = max(1, args.dim // HEAD_DIM)
    return model(
        config(
            vocab_size=256,
            hidden_size=args.dim,
            intermediate_size=3 * args.dim,
            num_hidden_layers=args.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=args.dim // heads,
            max_position_embeddings=args.length,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def model_and_tokens(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model in float32 on the CPU, and the text as one long row of tokens."""
    text, _ = read_corpus(args.data_mb)
    if args.model is None:
        return random_model(args), text
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    characters = bytes(text.tolist()).decode(errors="replace")
    return model, torch.tensor(tokenizer(characters)["input_ids"])


def train_step(lane: Lane, batch: Tensor) -> None:
    start = time.perf_counter()
    loss = lane.model(input_ids=batch, labels=batch, use_cache=False).loss
    lane.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(lane.model.parameters(), 1.0)
    lane.optimizer.step()
    lane.losses.append(loss.item())  # on a GPU this waits for the whole step
    lane.seconds.append(time.perf_counter() - start)


def make_lanes(model: nn.Module, args: argparse.Namespace) -> list[Lane]:
    model = model.to(args.device, getattr(torch, args.dtype)).train()
    fused = copy.deepcopy(model)

    print(coreai_torch.replace_rms_norm(fused))  # this is all

    return [
        Lane(name, m, torch.optim.AdamW(m.parameters(), lr=args.lr, fused=True))
        for name, m in (("its own norms", model), ("fused norms", fused))
    ]


def table(lanes: list[Lane], tokens_per_step: int) -> str:
    lines = [f"{'':15}{'tokens/s':>10}{'first loss':>12}{'last loss':>12}"]
    for lane in lanes:
        speed = tokens_per_step / statistics.median(lane.seconds[UNTIMED_STEPS:] or lane.seconds)
        first, last = lane.losses[0], lane.losses[-1]
        lines.append(f"{lane.name:15}{speed:>10,.0f}{first:>12.5f}{last:>12.5f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder or name of a pretrained causal language model")
    add("--family", choices=FAMILIES, default="llama", help="of the model with random weights")
    add("--dim", type=int, default=256, help="its width (%(default)s)")
    add("--layers", type=int, default=4, help="its layers (%(default)s)")
    add("--dtype", choices=TOLERANCE, default="float32", help="of the weights (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--steps", type=int, default=20, help="(%(default)s)")
    add("--batch", type=int, default=8, help="sequences per step (%(default)s)")
    add("--length", type=int, default=256, help="tokens per sequence (%(default)s)")
    add("--lr", type=float, default=3e-4, help="learning rate (%(default)s)")
    add("--data-mb", type=float, default=1.0, help="megabytes of text (%(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    model, tokens = model_and_tokens(args)
    lanes = make_lanes(model, args)
    draw = random.Random(0)
    for step in tqdm(range(args.steps), unit="step"):
        starts = [draw.randrange(len(tokens) - args.length) for _ in range(args.batch)]
        batch = torch.stack([tokens[s : s + args.length] for s in starts]).to(args.device).long()
        for lane in lanes if step % 2 else lanes[::-1]:  # neither is always the first
            train_step(lane, batch)

    print(table(lanes, args.batch * args.length))
    largest = max(abs(a - b) / a for a, b in zip(*(lane.losses for lane in lanes), strict=True))
    print(f"Largest difference of two losses: {largest:.1e} of them")
    if largest > TOLERANCE[args.dtype]:
        sys.exit(f"That is more than rounding explains, {TOLERANCE[args.dtype]:.0e}")


if __name__ == "__main__":
    main()
