"""What users feel: a decoder block, and a whole training step, with one norm or another.

The model is the one of examples/lm_model.py; all of its norms are exchanged, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.lm_model import NORMS, VOCAB, Block, LanguageModel, RoPE

from . import timing
from .measure import Plan
from .verification import error

MORE_BUDGET = 6  # times that of a kernel's case, which would be spent after three steps
NAMES = {"ours": "fused", "torch": "torch", "reference": "reference"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Size(NamedTuple):
    dim: int = 512
    heads: int = 8
    layers: int = 2
    length: int = 256
    batch: int = 4

    def __str__(self) -> str:
        return (
            f"dim {self.dim}, {self.heads} heads, {self.length} tokens, batch of {self.batch}, "
            f"{self.layers} layers in the whole model"
        )


def block(name: str, dtype: torch.dtype, size: Size, device: str) -> Callable[[], Tensor]:
    """Forward and backward of a decoder block; returns the output."""
    torch.manual_seed(0)
    module = Block(size.dim, size.heads, NORMS[NAMES[name]]).to(device, dtype)
    rope = RoPE(size.dim // size.heads, size.length).to(device, dtype)
    x = torch.randn(size.batch, size.length, size.dim, device=device).to(dtype).requires_grad_()
    wanted = [x, *module.parameters()]
    dy = torch.randn(x.shape, device=device).to(dtype)

    def run() -> Tensor:
        y = module(x, rope)
        torch.autograd.grad(y, wanted, dy)
        return y.detach()

    return run


def training_step(name: str, dtype: torch.dtype, size: Size, device: str) -> Callable[[], Tensor]:
    """Forward, loss, backward and AdamW of a language model; returns the loss."""
    torch.manual_seed(0)
    model: nn.Module = LanguageModel(
        NAMES[name],
        dim=size.dim,
        n_layers=size.layers,
        n_heads=size.heads,
        seq_len=size.length,
        compute_dtype=dtype,
    ).to(device)
    tokens = torch.randint(VOCAB, (size.batch, size.length + 1), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


KINDS = {"decoder block, F+B": block, "training step": training_step}


def finished(run: Callable[[], Tensor]) -> Callable[[], None]:
    """The same, waiting for the card."""

    def runs() -> None:
        run()
        torch.cuda.synchronize()

    return runs


def measure(kind: str, dtype: str, plan: Plan, size: Size) -> dict[str, Any]:
    names = [name for name in NAMES if name in plan.providers]
    runs = {name: KINDS[kind](name, DTYPES[dtype], size, plan.device) for name in names}
    results = {name: run().double() for name, run in runs.items()}  # before any of them is timed
    record: dict[str, Any] = {"name": kind, "dtype": dtype, "size": str(size)}
    limit = 64 * torch.finfo(DTYPES[dtype]).eps
    for name, result in results.items():
        difference = error(result.reshape(1, -1), results[names[0]].reshape(1, -1))
        if not difference <= limit:  # also for NaN
            return record | {"failed": f"{name} differs from {names[0]} by {difference:.1e}"}
    if plan.device == "cuda":
        runs = {name: finished(run) for name, run in runs.items()}
    effort = plan.effort._replace(budget=MORE_BUDGET * plan.effort.budget)
    timings = timing.take_turns(runs, effort)
    times = {name: timing.summary(samples) for name, samples in timings.seconds.items()}
    return record | timings.counts() | {"times": times}


def model_times(plan: Plan, size: Size = Size()) -> list[dict[str, Any]]:  # noqa: B008
    return [measure(kind, dtype, plan, size) for kind in KINDS for dtype in DTYPES]
