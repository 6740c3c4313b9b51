"""RMSNorm as a function, and what PyTorch has to know of its ops beside the C++ kernels.

Two levels. The public op `coreai_torch::rms_norm` is what an exported program contains: one visible
node, which decomposes into plain ATen operations. The private op `coreai_torch::fused_rms_norm` has
the kernels, and its autograd formula in C++. Outside of export, `rms_norm` calls the private op
directly; under torch.compile it does what :func:`set_compile_mode` says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from .._compile_mode import decomposes
from .._load import _C
from ..reference.rms_norm import check_rms_norm, check_rms_norm_backward, output_dtype

_Op = Callable[[Tensor, Tensor, float], Tensor]
_public_op: _Op = torch.ops.coreai_torch.rms_norm.default
_fused_op: _Op = torch.ops.coreai_torch.fused_rms_norm.default


def rms_norm(input: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """``input / sqrt(mean(input²) + eps) · scale`` over the last dimension.

    Root Mean Square Layer Normalization, Zhang & Sennrich 2019, arXiv:1910.07467.

    Args:
        input: shape (..., dim), any strides; float64, float32, float16 or bfloat16. It is copied
            only where the elements of a row are not adjacent in memory.
        scale: shape (dim,), (n_heads, 1, dim), or any other that broadcasts to the input's shape
            and spans its last dimension; any of the same dtypes.
        eps: added to the mean of squares; zero or above.

    Returns:
        A tensor of the input's shape, with the strides of ``torch.empty_like(input)``. Statistics
        and products are taken in float32 (float64 for float64 input). Beside a float32 scale, a
        16-bit input gives a result of its own dtype, rounded once; otherwise the normalized input
        is rounded to its dtype before it is multiplied, and the result has the dtype that the two
        promote to. The result has the same bits for any number of threads and any SIMD level, and
        a row's result does not depend on the other rows.

    Raises:
        RuntimeError: input has no dimension, or scale does not fit its shape or device.
        NotImplementedError: another dtype, or a CUDA tensor in a build without CUDA kernels.
        ValueError: eps is negative or NaN.
    """
    if torch.compiler.is_compiling():
        return _traced_rms_norm(input, scale, eps)
    return _C.fused_rms_norm(input, scale, eps)


def _traced_rms_norm(input: Tensor, scale: Tensor, eps: float) -> Tensor:
    if torch.compiler.is_exporting():
        return _public_op(input, scale, eps)
    if decomposes(input):
        return reference.rms_norm(input, scale, eps)
    return _fused_op(input, scale, eps)


@torch.library.impl("coreai_torch::rms_norm", "CompositeImplicitAutograd")
def _rms_norm(input: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    if torch.compiler.is_exporting() and not _in_aot_inductor():
        return reference.rms_norm(input, scale, eps)
    if torch.compiler.is_compiling() and decomposes(input):
        return reference.rms_norm(input, scale, eps)
    return _fused_op(input, scale, eps)


def _in_aot_inductor() -> bool:
    """Whether an exported program is being compiled, which to PyTorch is a part of exporting it."""
    inductor = sys.modules.get("torch._inductor.virtualized")
    return inductor is not None and bool(inductor.V.aot_compilation)


@torch.library.register_fake("coreai_torch::fused_rms_norm")
def _fused_rms_norm_fake(input: Tensor, scale: Tensor, eps: float) -> Tensor:
    check_rms_norm(input, scale, eps)
    return torch.empty_like(input, dtype=output_dtype(input.dtype, scale.dtype))


@torch.library.register_fake("coreai_torch::fused_rms_norm_backward")
def _fused_rms_norm_backward_fake(
    grad_output: Tensor, input: Tensor, scale: Tensor, eps: float, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    check_rms_norm_backward(grad_output, input, scale, eps)
    grad_input = torch.empty_like(input) if output_mask[0] else input.new_empty(0)
    grad_scale = scale.new_empty(scale.shape if output_mask[1] else 0)
    return grad_input, grad_scale
