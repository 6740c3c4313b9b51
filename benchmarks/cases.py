"""What is measured: an op, a shape and dtypes, and the inputs made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-5
OPS = ("rms_norm", "add_rms_norm")
DIRECTIONS = ("forward", "backward", "forward+backward")
SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "F+B"}
DTYPES = {
    "float32": (torch.float32, torch.float32),  # of the input, of the scale
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "mixed": (torch.bfloat16, torch.float32),
}

PER_HEAD = (2, 8, 512, 64)
TRANSPOSED = (2, 32, 512, 128)
ODD = (4096, 4095)
SHAPES = (
    *((32768, 64), (32768, 128), (32768, 512)),
    *((2048, 1024), (2048, 2048), (64, 4096), (4096, 4096), (8192, 4096)),
    *((2048, 5120), (2048, 8192), (2048, 16384), (64, 65536)),
    *(ODD, PER_HEAD, (1, 4096)),
)
FLOAT16_SHAPES = ((32768, 128), (2048, 1024), (64, 4096), (8192, 4096), PER_HEAD, (1, 4096))
ADD_SHAPES = ((64, 4096), (2048, 1024), (4096, 4096))

CUDA_DIMS = (64, 128, 512, 1024, 2048, 4096, 4095, 5120, 8192, 16384, 65536)
CUDA_ROWS = (1, 64, 2048, 32768)
CUDA_HEADS = (4, 32, 2048, 128)
CUDA_MOST_BYTES = 2 * 2**30  # of one tensor


@dataclass(frozen=True)
class Case:
    """An op, a shape and a key of DTYPES.

    `kind` says how the op is called: "plain"; "transposed", a shape (batch, heads, length, dim)
    that is a transposed view, as attention has it, or "per-head transposed", the same with a scale
    per head; or "module", where modules are called instead of functions, which adds the host's time
    that users see.
    """

    shape: tuple[int, ...]
    dtype: str
    op: str = "rms_norm"
    kind: str = "plain"

    @property
    def name(self) -> str:
        op = "" if self.op == "rms_norm" else f"{self.op} "
        kind = "" if self.kind == "plain" else f" {self.kind}"
        return f"{op}{self.dtype} {'x'.join(map(str, self.shape))}{kind}"

    @property
    def tensor_bytes(self) -> int:
        """The size of the input, and of everything else that has its shape."""
        return math.prod(self.shape) * DTYPES[self.dtype][0].itemsize

    @property
    def scale_shape(self) -> tuple[int, ...]:
        per_head = self.kind == "per-head transposed"
        return (self.shape[1], 1, self.shape[-1]) if per_head else (self.shape[-1],)

    def bytes_moved(self, direction: str) -> int:
        """What an ideal kernel moves: tensors of the input's size, each read or written once.

        The norm: forward reads x and writes y; backward reads x and dy and writes dx. With the
        addition: forward reads x and the residual and writes y and their sum; backward reads the
        sum and both outputs' gradients and writes one gradient, which is that of both inputs. The
        scale counts once for each direction; its gradient is less than a row of the input.
        """
        forward, backward = (2, 3) if self.op == "rms_norm" else (4, 4)
        tensors = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
        passes = 2 if direction == "forward+backward" else 1
        scale = math.prod(self.scale_shape) * DTYPES[self.dtype][1].itemsize
        return tensors[direction] * self.tensor_bytes + passes * scale


class Inputs(NamedTuple):
    tensors: tuple[Tensor, ...]  # the input, and the residual where the op adds one
    scale: Tensor
    grads: tuple[Tensor, ...]  # of the outputs

    @property
    def input(self) -> Tensor:
        return self.tensors[0]

    def detached(self) -> Inputs:
        """The same tensors for inference: none requires a gradient."""
        return Inputs(tuple(t.detach() for t in self.tensors), self.scale.detach(), self.grads)


def make_case(
    shape: tuple[int, ...], dtype: str, op: str = "rms_norm", one_scale: bool = False
) -> Case:
    """The case that a shape stands for on the command line."""
    if len(shape) == 4:
        return Case(shape, dtype, op, "transposed" if one_scale else "per-head transposed")
    return Case(shape, dtype, op, "module" if shape[0] == 1 and op == "rms_norm" else "plain")


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Normally distributed tensors that require gradients, and gradients of the outputs."""
    dtype, scale_dtype = DTYPES[case.dtype]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def tensor() -> Tensor:
        if not case.kind.endswith("transposed"):
            return normal(case.shape).to(dtype)
        batch, heads, length, dim = case.shape
        return normal((batch, length, heads, dim)).to(dtype).transpose(1, 2)

    count = 1 if case.op == "rms_norm" else 2
    tensors = tuple(tensor().requires_grad_() for _ in range(count))
    scale = normal(case.scale_shape).mul_(0.2).add_(1).to(scale_dtype).requires_grad_()
    return Inputs(tensors, scale, tuple(tensor() for _ in range(count)))


def default_cases(device: str = "cpu") -> list[Case]:
    if device == "cuda":
        shapes = [(rows, dim) for dim in CUDA_DIMS for rows in CUDA_ROWS]
        cases = [Case(s, d) for d in ("float32", "bfloat16", "mixed") for s in shapes]
        kinds = ("per-head transposed", "transposed")
        cases += [Case(CUDA_HEADS, d, kind=k) for d in ("float32", "bfloat16") for k in kinds]
        cases += [Case((32768, 4096), d, "add_rms_norm") for d in ("float32", "bfloat16")]
        return [case for case in cases if case.tensor_bytes <= CUDA_MOST_BYTES]
    cases = [make_case(shape, dtype) for dtype in ("float32", "bfloat16") for shape in SHAPES]
    cases += [make_case(shape, "float16") for shape in FLOAT16_SHAPES]
    cases += [Case((4096, 4096), "mixed")]
    cases += [Case(TRANSPOSED, d, kind="transposed") for d in ("float32", "bfloat16")]
    adds = [Case(s, d, "add_rms_norm") for d in ("float32", "bfloat16") for s in ADD_SHAPES]
    return cases + adds


def quick_cases(device: str = "cpu") -> list[Case]:
    if device == "cuda":
        return [Case((2048, dim), "bfloat16") for dim in CUDA_DIMS]
    return [
        Case((64, 4096), "float32"),
        Case((2048, 1024), "bfloat16"),
        Case((4096, 4096), "float32"),
        make_case(PER_HEAD, "float32"),
        make_case((1, 4096), "float32"),
        Case((2048, 1024), "bfloat16", "add_rms_norm"),
    ]
