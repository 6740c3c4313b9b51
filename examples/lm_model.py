"""A small Llama-style language model with a choice of RMSNorm implementations.

RMSNorm stands in the two places where today's models have it: over the model dimension in front
of every sub-layer, with a weight of shape (dim,), and over each head's queries and keys, with a
weight of shape (n_heads, 1, head_dim). Whatever the implementation, a norm's only parameter is
called `weight`, so a state_dict of one loads into the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_torch.composite_ops import RMSNorm
from coreai_torch.reference import rms_norm

EPS = 1e-5
VOCAB = 256  # every byte is a token


class ReferenceRMSNorm(nn.Module):
    """The formula in plain PyTorch operations."""

    def __init__(self, dim: int, eps: float = EPS, n_heads: int | None = None) -> None:
        super().__init__()
        self.eps = eps
        shape = (dim,) if n_heads is None else (n_heads, 1, dim)
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class TorchRMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, returning the dtype it was given.

    Autocast runs it in float32 on CUDA, and float32 is what it would pass on.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).type_as(x)


class TorchHeadRMSNorm(nn.Module):
    """`torch.nn.RMSNorm` with a weight per head, which takes a product of its own."""

    def __init__(self, dim: int, eps: float, n_heads: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps, elementwise_affine=False)
        self.weight = nn.Parameter(torch.ones(n_heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(x) * self.weight).type_as(x)


def torch_rms_norm(dim: int, eps: float = EPS, n_heads: int | None = None) -> nn.Module:
    """`TorchRMSNorm` or `TorchHeadRMSNorm`, as the weight's shape asks for."""
    return TorchRMSNorm(dim, eps) if n_heads is None else TorchHeadRMSNorm(dim, eps, n_heads)


MakeNorm = Callable[..., nn.Module]  # called as make_norm(dim, eps) or make_norm(dim, eps, n_heads)
NORMS: dict[str, MakeNorm] = {
    "fused": RMSNorm,
    "torch": torch_rms_norm,
    "reference": ReferenceRMSNorm,
}


class RoPE(nn.Module):
    """Rotary position embedding: turns pairs of channels by angles that grow with position."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, seq_len: int, base: float = 10_000.0) -> None:
        super().__init__()
        frequency = base ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.outer(torch.arange(seq_len), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        turned = (a * self.cos - b * self.sin, a * self.sin + b * self.cos)
        return torch.cat(turned, dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with RMSNorm on each head's queries and keys."""

    def __init__(self, dim: int, n_heads: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.head_dim = dim // n_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = make_norm(self.head_dim, EPS, n_heads)
        self.k_norm = make_norm(self.head_dim, EPS, n_heads)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rope: RoPE) -> Tensor:
        # A head's query, key and value are neighbours in the projection's output, so that it can be
        # cut by heads. These are three (batch, n_heads, seq_len, head_dim) views of one buffer; the
        # fused norm reads them with the strides they have, and nothing is copied in front of it.
        heads = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim)).transpose(1, 2)
        q, k, v = heads.unbind(3)
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer, 8/3 times as wide as the model, as in Llama."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 64 * math.ceil(8 / 3 * dim / 64)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, n_heads: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.attention_norm = make_norm(dim, EPS)
        self.attention = Attention(dim, n_heads, make_norm)
        self.mlp_norm = make_norm(dim, EPS)
        self.mlp = SwiGLU(dim)

    def forward(self, x: Tensor, rope: RoPE) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Decoder over bytes whose output layer is its embedding."""

    def __init__(
        self,
        norm: str,
        *,
        dim: int,
        n_layers: int,
        n_heads: int,
        seq_len: int,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        make_norm = NORMS[norm]
        self.compute_dtype = compute_dtype
        self.embedding = nn.Embedding(VOCAB, dim)
        self.rope = RoPE(dim // n_heads, seq_len)
        self.blocks = nn.ModuleList(Block(dim, n_heads, make_norm) for _ in range(n_layers))
        self.final_norm = make_norm(dim, EPS)
        self._initialize(n_layers)

    def _initialize(self, n_layers: int) -> None:
        """Small weights, smaller still where 2 * n_layers results add up in the residual stream.

        Norms start from ones and draw no random numbers: a seed gives all of them one model.
        """
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                adds_up = name.endswith("out.weight")
                nn.init.normal_(weight, std=0.04 / math.sqrt(2 * n_layers) if adds_up else 0.04)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits in float32."""
        with torch.autocast(
            tokens.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32
        ):
            # Autocast leaves an embedding in float32, and what is added to float32 becomes
            # float32: this cast is what gives the residual stream, and the norms, bfloat16.
            x = self.embedding(tokens).to(self.compute_dtype)
            for block in self.blocks:
                x = block(x, self.rope)
            return F.linear(self.final_norm(x), self.embedding.weight).float()

    def norms(self) -> Iterator[nn.Module]:
        """Every norm of the model, once."""
        for name, module in self.named_modules():
            if name.endswith("_norm"):
                yield module
