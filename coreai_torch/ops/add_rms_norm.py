"""The residual add and the norm that follows it, in one op.

The op `coreai_torch::fused_add_rms_norm` has the kernels, and its autograd formula in C++. There is
no public op of that name: an exported program contains an addition and `coreai_torch::rms_norm`,
which is what a converter knows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from .._compile_mode import decomposes
from .._load import _C
from ..reference.add_rms_norm import (
    add_then,
    are_alike,
    check_add_rms_norm,
    check_add_rms_norm_backward,
)
from ..reference.rms_norm import output_dtype
from .rms_norm import rms_norm

_Op = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
_fused_op: _Op = torch.ops.coreai_torch.fused_add_rms_norm.default


def add_rms_norm(
    input: Tensor, residual: Tensor, scale: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """``new_residual = input + residual`` and ``output = rms_norm(new_residual, scale, eps)``.

    What a pre-norm transformer block does between its layers, with one pass over the data less
    than the two operations by themselves, forward and backward.

    Args:
        input: shape (..., dim), any strides; float64, float32, float16 or bfloat16.
        residual: of the same shape and dtype; any strides. Others that ``torch.add`` takes are
            added by it, and :func:`rms_norm` follows.
        scale: as for :func:`rms_norm`.
        eps: added to the mean of squares; zero or above.

    Returns:
        output, new_residual: both of the input's shape and with the strides of
        ``torch.empty_like(input)``; neither shares memory with an argument. new_residual is what
        ``torch.add`` gives; output is :func:`rms_norm` of it, rounded as it is, with the dtype
        that the two functions give by themselves, and on the CPU with the same bits. The gradient
        of input and residual is one tensor, rounded once.

    Raises:
        RuntimeError: residual does not broadcast with input or is on another device, the sum has
            no dimension, or scale does not fit its shape or device.
        NotImplementedError: another dtype, or a CUDA tensor in a build without CUDA kernels.
        ValueError: eps is negative or NaN.
    """
    if not are_alike(input, residual):
        return add_then(rms_norm, input, residual, scale, eps)
    if torch.compiler.is_compiling():
        return _traced_add_rms_norm(input, residual, scale, eps)
    return _C.fused_add_rms_norm(input, residual, scale, eps)


def _traced_add_rms_norm(
    input: Tensor, residual: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_exporting():
        return add_then(rms_norm, input, residual, scale, eps)
    if decomposes(input):
        return reference.add_rms_norm(input, residual, scale, eps)
    return _fused_op(input, residual, scale, eps)


@torch.library.register_fake("coreai_torch::fused_add_rms_norm")
def _fused_add_rms_norm_fake(
    input: Tensor, residual: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    check_add_rms_norm(input, residual, scale, eps)
    output = torch.empty_like(input, dtype=output_dtype(input.dtype, scale.dtype))
    return output, torch.empty_like(input)


@torch.library.register_fake("coreai_torch::fused_add_rms_norm_backward")
def _fused_add_rms_norm_backward_fake(
    grad_output: Tensor,
    grad_new_residual: Tensor,
    new_residual: Tensor,
    scale: Tensor,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    check_add_rms_norm_backward(grad_output, grad_new_residual, new_residual, scale, eps)
    grad_input = torch.empty_like(new_residual) if output_mask[0] else new_residual.new_empty(0)
    grad_scale = scale.new_empty(scale.shape if output_mask[1] else 0)
    return grad_input, grad_scale
