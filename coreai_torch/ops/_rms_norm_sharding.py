"""How DTensor shards the ops of rms_norm.

Rows are independent of each other, so every dimension but the last may be sharded, and nothing has
to be gathered for it. A scale that spans the sharded dimension (one row for each head) is sharded
with it; any other is replicated, and each shard's gradient of it is a part of the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

Placements: TypeAlias = "list[Placement | None]"

_forward_op = torch.ops.coreai_torch.fused_rms_norm.default
_backward_op = torch.ops.coreai_torch.fused_rms_norm_backward.default


def _row_shardings(input: Any, scale: Any) -> Iterator[tuple[Shard, Shard | Replicate]]:
    """Each way to shard the input's rows, and the scale's placement that goes with it."""
    missing = input.ndim - scale.ndim
    for dim in range(input.ndim - 1):
        scale_dim = dim - missing
        spanned = scale_dim >= 0 and scale.shape[scale_dim] == input.shape[dim]
        yield Shard(dim), Shard(scale_dim) if spanned else Replicate()


@register_sharding(_forward_op)
def _rms_norm_sharding(input: Any, scale: Any, eps: float) -> list[tuple[Placements, Placements]]:
    shardings: list[tuple[Placements, Placements]] = [
        ([Replicate()], [Replicate(), Replicate(), None])
    ]
    for rows, of_scale in _row_shardings(input, scale):
        shardings.append(([rows], [rows, of_scale, None]))
    return shardings


@register_sharding(_backward_op)
def _rms_norm_backward_sharding(
    grad_output: Any, input: Any, scale: Any, eps: float, output_mask: list[bool]
) -> list[tuple[Placements, Placements]]:
    everywhere = Replicate()
    shardings: list[tuple[Placements, Placements]] = [
        ([everywhere] * 2, [everywhere, everywhere, everywhere, None, None])
    ]
    for rows, of_scale in _row_shardings(input, scale):
        of_grad_scale = of_scale if isinstance(of_scale, Shard) else Partial()
        # A gradient that is not asked for is an empty tensor.
        outputs: Placements = [
            rows if output_mask[0] else everywhere,
            of_grad_scale if output_mask[1] else everywhere,
        ]
        shardings.append((outputs, [rows, rows, of_scale, None, None]))
    return shardings


def _tell_by_mask(backward_op: Any) -> None:
    """Have DTensor tell calls of a backward op apart by their output_mask.

    It remembers what it decided for given placements. By default it takes no account of the
    arguments that are not tensors, but output_mask decides which of the outputs there are.
    """
    names = [argument.name for argument in backward_op._schema.arguments]
    info = RuntimeSchemaInfo(static_argnum=names.index("eps"))
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[backward_op] = info


_tell_by_mask(_backward_op)
