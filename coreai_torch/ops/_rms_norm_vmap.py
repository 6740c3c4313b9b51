"""torch.vmap of the ops of rms_norm: one call of the kernels for the whole batch.

A scale with a batch dimension is a scale with one more dimension, and the kernels take scales of
any shape that reads "row r uses scale row (r // inner) % groups". So all that there is to do is to
put the batch dimension where the scale keeps that shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.rms_norm import check_rms_norm, check_rms_norm_backward

_fused_op = torch.ops.coreai_torch.fused_rms_norm.default
_backward_op = torch.ops.coreai_torch.fused_rms_norm_backward.default

_InDims = tuple[Any, ...]


def _sample(tensor: Tensor, batch_dim: int | None) -> Tensor:
    """What one call sees."""
    return tensor if batch_dim is None else tensor.select(batch_dim, 0)


def _scale_dims(scale: Tensor) -> int:
    """The number of dimensions of one call's scale, leaving out leading ones of size 1."""
    leading = 0
    while leading < scale.dim() - 1 and scale.shape[leading] == 1:
        leading += 1
    return scale.dim() - leading


def _place(input: Tensor, scale: Tensor) -> int:
    """Where the batch dimension goes among those of one call's input.

    Right before the dimensions that the scale spans, or in front if those are the last one only:
    then many rows in a row use one row of the scale.
    """
    dims = _scale_dims(scale)
    return 0 if dims == 1 else input.dim() - dims


def _put(tensor: Tensor, batch_dim: int | None, size: int, place: int) -> Tensor:
    """The tensor with its batch dimension, or one of stride 0 where it has none, at `place`."""
    if batch_dim is not None:
        return tensor.movedim(batch_dim, place)
    return tensor.unsqueeze(place).expand(*tensor.shape[:place], size, *tensor.shape[place:])


def _put_scale(scale: Tensor, batch_dim: int | None, size: int, one: Tensor, ndim: int) -> Tensor:
    """The scale with a batch dimension that meets that of the input, one call's of `ndim`."""
    scale = _put(scale, batch_dim, size, 0)
    dims = _scale_dims(one)
    ones = ndim - 1 if dims == 1 else 0
    return scale.reshape(size, *(1,) * ones, *one.shape[one.dim() - dims :])


def _rms_norm_vmap(
    info: Any, in_dims: _InDims, input: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, int]:
    one_input, one_scale = _sample(input, in_dims[0]), _sample(scale, in_dims[1])
    check_rms_norm(one_input, one_scale, eps)
    place = _place(one_input, one_scale)
    if in_dims[1] is not None:
        scale = _put_scale(scale, in_dims[1], info.batch_size, one_scale, one_input.dim())
    input = _put(input, in_dims[0], info.batch_size, place)
    return _fused_op(input, scale, eps), place


def _rms_norm_backward_vmap(
    info: Any,
    in_dims: _InDims,
    grad_output: Tensor,
    input: Tensor,
    scale: Tensor,
    eps: float,
    output_mask: list[bool],
) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
    one_input, one_scale = _sample(input, in_dims[1]), _sample(scale, in_dims[2])
    check_rms_norm_backward(_sample(grad_output, in_dims[0]), one_input, one_scale, eps)
    place = _place(one_input, one_scale)
    # A gradient of the scale for each sample takes a row of the scale for each sample.
    if in_dims[2] is not None or output_mask[1]:
        scale = _put_scale(scale, in_dims[2], info.batch_size, one_scale, one_input.dim())
    grad_output = _put(grad_output, in_dims[0], info.batch_size, place)
    input = _put(input, in_dims[1], info.batch_size, place)
    grad_input, grad_scale = _backward_op(grad_output, input, scale, eps, output_mask)
    if output_mask[1]:
        grad_scale = grad_scale.reshape(info.batch_size, *one_scale.shape)
    return (grad_input, grad_scale), (
        place if output_mask[0] else None,
        0 if output_mask[1] else None,
    )


torch.library.register_vmap("coreai_torch::fused_rms_norm", _rms_norm_vmap)
torch.library.register_vmap("coreai_torch::fused_rms_norm_backward", _rms_norm_backward_vmap)
