"""Models for the tests of conversion, and what is read from the programs they become."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from coreai_torch.composite_ops import RMSNorm, RMSNormImpl

coreai_torch_converter = pytest.importorskip(
    "coreai_torch.converter", reason="Apple's converter is not installed: make converter"
)

# Input and scale.
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.float16, torch.float32, id="fp16-fp32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-fp32"),
]
EPS = 1e-6
ATTRIBUTES = "axes = -1 : si64, eps = 9.99999997E-7 : f32, version = 1 : si64"


class Block(nn.Module):
    """Norm of the input, attention with a norm on each head's queries and keys, residual.

    Args:
        norm: `RMSNorm`, ours or Apple's.
        dtype: of everything but the norms' weights.
        scale: dtype of these.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        scale: torch.dtype,
        norm: Callable[..., nn.Module] = RMSNorm,
        *,
        dim: int = 32,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm = norm(dim, EPS)
        self.q_norm = norm(dim // heads, EPS, heads)
        self.k_norm = norm(dim // heads, EPS, heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, dtype=dtype)
        self.out = nn.Linear(dim, dim, bias=False, dtype=dtype)
        randomize(self, scale)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        y = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).flatten(2))


class TwoNorms(nn.Module):
    """A norm with one weight for all, and one with a weight per head: the quick case."""

    def __init__(self, scale: torch.dtype, norm: Callable[..., nn.Module] = RMSNorm) -> None:
        super().__init__()
        self.norm, self.head_norm = norm(8, EPS), norm(8, EPS, 4)
        randomize(self, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.head_norm(self.norm(x).transpose(1, 2))


class NormAlone(nn.Module):
    """One norm, with a weight per head or one for all."""

    def __init__(
        self,
        scale: torch.dtype,
        dim: int,
        heads: int | None,
        norm: Callable[..., nn.Module] = RMSNorm,
    ) -> None:
        super().__init__()
        self.norm = norm(dim, EPS, heads)
        randomize(self, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class OwnScale(nn.Module):
    """`RMSNormImpl` with a scale that belongs to the module around it."""

    def __init__(self, dtype: torch.dtype, scale: torch.dtype, impl: type = RMSNormImpl) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32, dtype=dtype)
        self.gain = nn.Parameter(torch.randn(32, dtype=scale))
        self.impl = impl(EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.impl(self.linear(x), self.gain)


def randomize(module: nn.Module, scale: torch.dtype) -> None:
    """Random weights of norms, of a dtype: with ones, a lost or misplaced scale would not show."""
    for name, child in module.named_modules():
        if name.endswith("norm"):
            nn.init.normal_(child.weight)
            child.to(scale)


def text(program: object) -> str:
    """The program without the random suffixes of its graphs and of their results."""
    return re.sub(r"_[0-9a-f]{8}\b", "", str(program))


def composite_graphs(program: object) -> list[str]:
    """The texts of the graphs that are composite ops."""
    graphs = re.findall(r"^  coreai\.graph .*?^  }$", str(program), flags=re.M | re.S)
    return [graph for graph in graphs if "composite_decl" in graph]


def calls(program: object, op: str = "") -> int:
    """How often the program calls a composite op; the one of this name, if it is given."""
    wanted = f'composite_declaration<"{op}"' if op else "composite_declaration"
    graphs = [graph for graph in composite_graphs(program) if wanted in graph]
    names = [re.search(r"noinline @(\S+?)\(", graph)[1] for graph in graphs]
    return sum(len(re.findall(rf"coreai\.invoke @{re.escape(n)}\(", str(program))) for n in names)
