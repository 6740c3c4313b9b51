"""How DTensor shards the ops of add_rms_norm: as those of rms_norm, with the rows of residual and
new_residual where those of the input are."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ._rms_norm_sharding import Placements, _row_shardings, _tell_by_mask

_forward_op = torch.ops.coreai_torch.fused_add_rms_norm.default
_backward_op = torch.ops.coreai_torch.fused_add_rms_norm_backward.default


@register_sharding(_forward_op)
def _add_rms_norm_sharding(
    input: Any, residual: Any, scale: Any, eps: float
) -> list[tuple[Placements, Placements]]:
    everywhere = Replicate()
    shardings: list[tuple[Placements, Placements]] = [
        ([everywhere] * 2, [everywhere, everywhere, everywhere, None])
    ]
    for rows, of_scale in _row_shardings(input, scale):
        shardings.append(([rows, rows], [rows, rows, of_scale, None]))
    return shardings


@register_sharding(_backward_op)
def _add_rms_norm_backward_sharding(
    grad_output: Any,
    grad_new_residual: Any,
    new_residual: Any,
    scale: Any,
    eps: float,
    output_mask: list[bool],
) -> list[tuple[Placements, Placements]]:
    everywhere = Replicate()
    shardings: list[tuple[Placements, Placements]] = [
        ([everywhere] * 2, [everywhere, everywhere, everywhere, everywhere, None, None])
    ]
    for rows, of_scale in _row_shardings(new_residual, scale):
        of_grad_scale = of_scale if isinstance(of_scale, Shard) else Partial()
        # A gradient that is not asked for is an empty tensor.
        outputs: Placements = [
            rows if output_mask[0] else everywhere,
            of_grad_scale if output_mask[1] else everywhere,
        ]
        shardings.append((outputs, [rows, rows, rows, of_scale, None, None]))
    return shardings


_tell_by_mask(_backward_op)
