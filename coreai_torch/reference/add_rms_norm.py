"""The residual add and RMSNorm in plain PyTorch operations, and the argument checks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .rms_norm import (
    check_dense,
    check_device,
    check_rms_norm,
    check_rms_norm_backward,
    rms_norm,
)

_OP = "add_rms_norm"


def add_rms_norm(
    input: Tensor, residual: Tensor, scale: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """``rms_norm(input + residual, scale, eps)``, and ``input + residual``.

    See :func:`coreai_torch.ops.add_rms_norm` for shapes, dtypes and errors.
    """
    return add_then(rms_norm, input, residual, scale, eps)


def add_then(
    norm: Callable[[Tensor, Tensor, float], Tensor],
    input: Tensor,
    residual: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The add by itself, of all that it takes, and then the norm."""
    for name, tensor in (("input", input), ("residual", residual)):
        check_dense(name, tensor, op=_OP)
    for ours, theirs in zip(reversed(residual.shape), reversed(input.shape), strict=False):
        if not (ours == theirs or ours == 1 or theirs == 1):
            raise RuntimeError(
                f"{_OP}: expected residual that broadcasts with the shape of input, "
                f"{list(input.shape)}, got shape {list(residual.shape)}"
            )
    if input.dim() and residual.dim():  # the add takes a single number from anywhere
        check_device("residual", residual, input, op=_OP)
    new_residual = input + residual
    of = "input" if are_alike(input, residual) else "input + residual"
    check_rms_norm(new_residual, scale, eps, op=_OP, of=of)
    return norm(new_residual, scale, eps), new_residual


def are_alike(input: Tensor, residual: Tensor) -> bool:
    """Whether the add neither promotes nor broadcasts, which is what the fused op takes."""
    try:
        return input.dtype == residual.dtype and input.shape == residual.shape
    except (AttributeError, RuntimeError):  # not tensors that have a shape; the checks say so
        return False


def check_add_rms_norm(input: Tensor, residual: Tensor, scale: Tensor, eps: float) -> None:
    """Raise what the error contract says of the arguments of the fused op;
    csrc/torch/add_rms_norm.cpp has the same in C++."""
    check_rms_norm(input, scale, eps, op=_OP)
    _check_like("residual", residual, "input", input)


def check_add_rms_norm_backward(
    grad_output: Tensor,
    grad_new_residual: Tensor,
    new_residual: Tensor,
    scale: Tensor,
    eps: float,
) -> None:
    """Raise what the error contract says of the arguments of backward."""
    check_rms_norm_backward(grad_output, new_residual, scale, eps, op=_OP)
    _check_like("grad_new_residual", grad_new_residual, "new_residual", new_residual)


def _check_like(name: str, tensor: Tensor, of: str, input: Tensor) -> None:
    check_dense(name, tensor, op=_OP)
    if tensor.shape != input.shape:
        raise RuntimeError(
            f"{_OP}: expected {name} with the shape of {of}, {list(input.shape)}, "
            f"got shape {list(tensor.shape)}"
        )
    if tensor.dtype != input.dtype:
        raise RuntimeError(
            f"{_OP}: expected {name} of the dtype of {of}, {input.dtype}, got {tensor.dtype}"
        )
    check_device(name, tensor, input, op=_OP, of=of)
