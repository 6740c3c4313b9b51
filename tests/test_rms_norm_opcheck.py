"""torch.library.opcheck for every op of the namespace: discovered, so that none is forgotten."""

from __future__ import annotations

import pytest
import torch
from cases import ALL_PAIRS, names

from coreai_torch.reference.rms_norm import output_dtype

OPS = sorted(
    schema.name.partition("::")[2]
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("coreai_torch::")
)


def forward_arguments(pair):
    for shape, scale in [((5, 16), (16,)), ((2, 3, 4, 16), (3, 1, 16)), ((2, 3, 16), (2, 1, 16))]:
        for requires_grad in (False, True):
            yield (
                torch.randn(shape).to(pair[0]).requires_grad_(requires_grad),
                torch.randn(scale).to(pair[1]).requires_grad_(requires_grad),
                1e-5,
            )
    transposed = torch.randn(2, 4, 3, 16).to(pair[0]).transpose(1, 2)
    yield transposed.requires_grad_(), torch.randn(3, 1, 16).to(pair[1]), 1e-5


def backward_arguments(pair):
    for input, scale, eps in forward_arguments(pair):
        grad = torch.randn(input.shape).to(output_dtype(*pair))
        for mask in ([True, True], [True, False], [False, True]):
            yield grad, input.detach(), scale.detach(), eps, mask


def add_forward_arguments(pair):
    for input, scale, eps in forward_arguments(pair):
        residual = torch.randn(input.shape).to(pair[0]).requires_grad_(input.requires_grad)
        yield input, residual, scale, eps


def add_backward_arguments(pair):
    for grad, input, *others in backward_arguments(pair):
        yield grad, torch.randn(input.shape).to(pair[0]), input, *others


ARGUMENTS = {
    "rms_norm": forward_arguments,
    "fused_rms_norm": forward_arguments,
    "fused_rms_norm_backward": backward_arguments,
    "fused_add_rms_norm": add_forward_arguments,
    "fused_add_rms_norm_backward": add_backward_arguments,
}


def test_every_op_has_arguments_to_be_checked_with():
    assert set(OPS) == set(ARGUMENTS)


@pytest.mark.parametrize("pair", ALL_PAIRS, ids=names)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, pair):
    op = getattr(torch.ops.coreai_torch, name).default
    for arguments in ARGUMENTS[name](pair):
        torch.library.opcheck(op, arguments)
