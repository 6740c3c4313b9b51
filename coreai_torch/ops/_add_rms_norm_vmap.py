"""torch.vmap of the ops of add_rms_norm, as `_rms_norm_vmap` has it for those of rms_norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.add_rms_norm import check_add_rms_norm, check_add_rms_norm_backward
from ._rms_norm_vmap import _InDims, _place, _put, _put_scale, _sample

_fused_op = torch.ops.coreai_torch.fused_add_rms_norm.default
_backward_op = torch.ops.coreai_torch.fused_add_rms_norm_backward.default


def _add_rms_norm_vmap(
    info: Any, in_dims: _InDims, input: Tensor, residual: Tensor, scale: Tensor, eps: float
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    one_input, one_scale = _sample(input, in_dims[0]), _sample(scale, in_dims[2])
    check_add_rms_norm(one_input, _sample(residual, in_dims[1]), one_scale, eps)
    place = _place(one_input, one_scale)
    if in_dims[2] is not None:
        scale = _put_scale(scale, in_dims[2], info.batch_size, one_scale, one_input.dim())
    input = _put(input, in_dims[0], info.batch_size, place)
    residual = _put(residual, in_dims[1], info.batch_size, place)
    return _fused_op(input, residual, scale, eps), (place, place)


def _add_rms_norm_backward_vmap(
    info: Any,
    in_dims: _InDims,
    grad_output: Tensor,
    grad_new_residual: Tensor,
    new_residual: Tensor,
    scale: Tensor,
    eps: float,
    output_mask: list[bool],
) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
    one_input, one_scale = _sample(new_residual, in_dims[2]), _sample(scale, in_dims[3])
    check_add_rms_norm_backward(
        _sample(grad_output, in_dims[0]),
        _sample(grad_new_residual, in_dims[1]),
        one_input,
        one_scale,
        eps,
    )
    place = _place(one_input, one_scale)
    # A gradient of the scale for each sample takes a row of the scale for each sample.
    if in_dims[3] is not None or output_mask[1]:
        scale = _put_scale(scale, in_dims[3], info.batch_size, one_scale, one_input.dim())
    tensors = (grad_output, grad_new_residual, new_residual)
    rows = [_put(t, dim, info.batch_size, place) for t, dim in zip(tensors, in_dims, strict=False)]
    grad_input, grad_scale = _backward_op(*rows, scale, eps, output_mask)
    if output_mask[1]:
        grad_scale = grad_scale.reshape(info.batch_size, *one_scale.shape)
    return (grad_input, grad_scale), (
        place if output_mask[0] else None,
        0 if output_mask[1] else None,
    )


torch.library.register_vmap("coreai_torch::fused_add_rms_norm", _add_rms_norm_vmap)
torch.library.register_vmap(
    "coreai_torch::fused_add_rms_norm_backward", _add_rms_norm_backward_vmap
)
