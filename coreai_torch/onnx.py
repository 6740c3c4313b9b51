"""ONNX: rms_norm as the standard operator RMSNormalization, which opset 23 introduced.

    torch.onnx.export(
        model, args, dynamo=True, opset_version=23,
        custom_translation_table=coreai_torch.onnx.translation_table(),
    )

Without the table, and for earlier opsets, the exporter decomposes the op into plain operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .reference.rms_norm import output_dtype

__all__ = ["translation_table"]


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What the exporter is to make of this package's ops, for opset 23 and later.

    RMSNormalization normalizes in float32, rounds to the input's dtype and multiplies, all in one
    dtype and with a scale of one dimension. Where that is not the dtype rule of
    :func:`coreai_torch.ops.rms_norm`, or where the scale has more dimensions, it stands between
    casts, or with a scale of ones in front of a multiplication.

    Raises:
        ImportError: onnxscript is not installed.
    """
    import onnx_ir
    from onnxscript import opset23

    double, single = onnx_ir.DataType.DOUBLE, onnx_ir.DataType.FLOAT
    half, brain = onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16
    to_torch = {
        double: torch.float64,
        single: torch.float32,
        half: torch.float16,
        brain: torch.bfloat16,
    }
    to_onnx = {ours: theirs for theirs, ours in to_torch.items()}

    def cast(value: Any, of: Any, to: Any) -> Any:
        return value if of == to else opset23.Cast(value, to=to)

    def rms_norm(input: Any, scale: Any, eps: float = 1e-5) -> Any:
        output = to_onnx[output_dtype(to_torch[input.dtype], to_torch[scale.dtype])]
        if scale.dtype == single and input.dtype in (half, brain):
            normal = product = single  # rounded once, at the end
        else:
            normal, product = input.dtype, output
        one_call = len(scale.shape) == 1 and normal == product
        if one_call:
            weight = cast(scale, scale.dtype, product)
        else:
            one = onnx_ir.tensor([1], dtype=normal)
            weight = opset23.ConstantOfShape(opset23.Shape(scale, start=-1), value=one)
        result = opset23.RMSNormalization(
            cast(input, input.dtype, normal),
            weight,
            axis=-1,
            epsilon=eps,
            stash_type=int(double if normal == double else single),
        )
        if not one_call:
            factor = cast(scale, scale.dtype, product)
            result = opset23.Mul(cast(result, normal, product), factor)
        return cast(result, product, output)

    return {torch.ops.coreai_torch.rms_norm.default: rms_norm}
