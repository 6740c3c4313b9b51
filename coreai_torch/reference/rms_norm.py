"""RMSNorm in plain PyTorch operations, for any device, and its argument checks.

The order of operations and the places of rounding are those of the RMSNorm in Apple's
`coreai-torch`, so that an exported model converts to the same program.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def rms_norm(input: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """``input / sqrt(mean(input²) + eps) · scale`` over the last dimension.

    See :func:`coreai_torch.ops.rms_norm` for shapes, dtypes and errors.
    """
    check_rms_norm(input, scale, eps)
    wide = input if input.dtype == torch.float64 else input.float()
    # A product and not a square(), which a converter would turn into a power.
    normalized = wide * (wide * wide).mean(-1, keepdim=True).add(eps).rsqrt()
    if scale.dtype == torch.float32 and input.dtype != torch.float32:
        return (normalized * scale).to(input.dtype)
    return normalized.to(input.dtype) * scale


def output_dtype(input: torch.dtype, scale: torch.dtype) -> torch.dtype:
    """The dtype of the output for the dtypes of input and scale."""
    if scale in (input, torch.float32) or input == torch.float64:
        return input
    return torch.promote_types(input, scale)


def check_rms_norm(
    input: Tensor, scale: Tensor, eps: float, *, op: str = "rms_norm", of: str = "input"
) -> None:
    """Raise what the error contract says; csrc/torch/rms_norm.cpp has the same in C++.

    `op` is the op's name, and `of` what the user knows its input as.
    """
    for name, tensor in ((of, input), ("scale", scale)):
        check_dense(name, tensor, op=op)
        if tensor.dtype not in DTYPES:
            raise NotImplementedError(
                f"{op}: expected {name} of dtype float64, float32, float16 or bfloat16, "
                f"got {tensor.dtype}"
            )
    if input.dim() < 1:
        raise RuntimeError(
            f"{op}: expected {of} with at least one dimension, got shape {list(input.shape)}"
        )
    if scale.dim() < 1 or scale.shape[-1] != input.shape[-1]:
        raise RuntimeError(
            f"{op}: expected scale with last dimension {input.shape[-1]} (the last dimension "
            f"of {of}), got shape {list(scale.shape)}"
        )
    if scale.dim() > input.dim() or any(
        ours != 1 and ours != theirs
        for ours, theirs in zip(reversed(scale.shape), reversed(input.shape), strict=False)
    ):
        raise RuntimeError(
            f"{op}: expected scale that broadcasts to the shape of {of}, "
            f"{list(input.shape)}, got shape {list(scale.shape)}"
        )
    check_device("scale", scale, input, op=op, of=of)
    check_eps(eps, op=op)


def check_rms_norm_backward(
    grad_output: Tensor, input: Tensor, scale: Tensor, eps: float, *, op: str = "rms_norm"
) -> None:
    """Raise what the error contract says of the arguments of backward."""
    check_rms_norm(input, scale, eps, op=op)
    check_dense("grad_output", grad_output, op=op)
    if grad_output.shape != input.shape:
        raise RuntimeError(
            f"{op}: expected grad_output with the shape of the output, "
            f"{list(input.shape)}, got shape {list(grad_output.shape)}"
        )
    expected = output_dtype(input.dtype, scale.dtype)
    if grad_output.dtype != expected:
        raise RuntimeError(
            f"{op}: expected grad_output of the output's dtype, {expected}, got {grad_output.dtype}"
        )
    check_device("grad_output", grad_output, input, op=op)


def check_eps(eps: float, *, op: str = "rms_norm") -> None:
    """Raise TypeError or ValueError unless eps is a number that is zero or above."""
    try:
        valid = eps >= 0
    except TypeError:
        raise TypeError(f"{op}: expected eps to be a number, got {eps!r}") from None
    if not valid:
        raise ValueError(f"{op}: expected eps >= 0, got {eps}")


def check_dense(name: str, tensor: Tensor, *, op: str) -> None:
    """Raise TypeError if it is no tensor, RuntimeError if it is nested or sparse."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{op}: expected {name} to be a tensor, got "
            f"{'None' if tensor is None else type(tensor).__name__}"
        )
    if tensor.is_nested:
        raise RuntimeError(
            f"{op}: expected {name} to be a dense tensor, got a nested tensor; "
            "convert it with .to_padded_tensor()"
        )
    if tensor.layout != torch.strided:
        raise RuntimeError(
            f"{op}: expected {name} to be a dense tensor, got layout {tensor.layout}; "
            "convert it with .to_dense()"
        )


def check_device(name: str, tensor: Tensor, input: Tensor, *, op: str, of: str = "input") -> None:
    """Raise RuntimeError if a tensor is not where the input is."""
    if tensor.device != input.device:
        raise RuntimeError(
            f"{op}: expected {name} on the device of {of}, {input.device}, "
            f"got {tensor.device}; move one of them with .to()"
        )
