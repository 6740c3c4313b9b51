"""Devices without kernels run the formula in PyTorch's own operations, with the same semantics.

No machine has them all, so the dispatcher is asked: what it would call for a tensor of a device is
called here with CPU tensors.
"""

from __future__ import annotations

import re

import pytest
import torch
from cases import ALL_PAIRS, FLOATS, names
from test_rms_norm_errors import MISTAKES
from test_rms_norm_forward import LAYOUTS, SCALES

from coreai_torch import ops, reference
from coreai_torch.composite_ops import RMSNorm
from coreai_torch.reference.rms_norm import output_dtype

FORWARD = torch.ops.coreai_torch.fused_rms_norm.default
BACKWARD = torch.ops.coreai_torch.fused_rms_norm_backward.default
WITHOUT_KERNELS = ["MPS", "XPU", "HPU", "XLA", "PrivateUse1"]


@pytest.fixture(params=WITHOUT_KERNELS)
def on(request):
    """Calls an op as for tensors of a device."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, request.param))
    return lambda op, *args: op.redispatch(keys, *args)


@pytest.mark.parametrize("op", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_the_dispatcher_has_something_for_every_device(op):
    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    for key in ("CPU", "CUDA", "Meta", *WITHOUT_KERNELS):
        assert has(op.name(), key)
        assert has(op.name(), f"Autograd{key}")
    # Without gradients too, and under transforms, nothing else is needed.
    assert has(op.name(), "FuncTorchBatched")


@pytest.mark.parametrize("pair", ALL_PAIRS, ids=names)
def test_same_bits_as_the_reference(on, pair):
    x, w = torch.randn(3, 4, 5, 8).to(pair[0]), torch.randn(4, 1, 8).to(pair[1])
    y = on(FORWARD, x, w, 1e-5)
    assert y.dtype == output_dtype(*pair)
    assert torch.equal(y, reference.rms_norm(x, w))


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_same_layouts_as_the_kernels(on, make):
    x, w = make(), torch.randn(6, 1, 48)
    y = on(FORWARD, x, w, 1e-5)
    assert y.stride() == ops.rms_norm(x, w).stride()
    grads, expected = (
        call(BACKWARD, y, x, w, 1e-5, [True, True]) for call in (on, lambda op, *args: op(*args))
    )
    for ours, kernel_s in zip(grads, expected, strict=True):
        assert ours.stride() == kernel_s.stride()
    # grad_input is a difference of terms, and rounded as they are.
    rstd = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    terms = (y * w).abs().amax(-1, keepdim=True) * rstd
    assert ((grads[0] - expected[0]).abs() <= 1e-6 * terms).all()
    torch.testing.assert_close(grads[1], expected[1])


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_gradients(on, scale, wanted):
    x, g = torch.randn(2, 2, 3, 5, 16, dtype=torch.float64)
    w = torch.randn(scale, dtype=torch.float64)
    ours = on(BACKWARD, g, x, w, 1e-5, wanted)
    y = reference.rms_norm(x.requires_grad_(), w.requires_grad_(), 1e-5)
    for grad, expected, asked in zip(ours, torch.autograd.grad(y, (x, w), g), wanted, strict=True):
        if asked:
            torch.testing.assert_close(grad, expected)
        else:
            assert grad.shape == (0,)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_same_errors(on, mistake):
    arguments, kind, message = mistake
    with pytest.raises(kind, match=re.escape("rms_norm: " + message)):
        on(FORWARD, *arguments)


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("n_heads", [None, 4])
def test_meta(n_heads, dtype):
    """Shapes, dtypes and strides of forward and backward, without memory."""
    norm = RMSNorm(8, n_heads=n_heads)
    x = torch.randn(3, 5, 4, 8, dtype=dtype).transpose(1, 2)
    results = []
    for device in ("cpu", "meta"):
        norm.to(device).zero_grad()
        leaf = x.to(device).detach().requires_grad_()
        y = norm(leaf)
        y.sum().backward()
        results.append([(t.shape, t.dtype, t.stride()) for t in (y, leaf.grad, norm.weight.grad)])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("mps", marks=pytest.mark.skipif(not torch.mps.is_available(), reason="MPS")),
        pytest.param("xpu", marks=pytest.mark.skipif(not torch.xpu.is_available(), reason="XPU")),
    ],
)
def test_the_devices_themselves(device):
    x, w = torch.randn(5, 8, device=device), torch.randn(8, device=device)
    x.requires_grad_()
    y = ops.rms_norm(x, w)
    torch.testing.assert_close(y, reference.rms_norm(x, w))
    y.sum().backward()
    assert x.grad.device == x.device
