"""Sizes at which 32-bit arithmetic fails, and numbers of rows at which sums lose digits.

At most 9 GiB of memory are in use at a time. COREAI_TORCH_BIG=1 adds what takes minutes.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from cases import oracle, with_gradients

from coreai_torch import ops, reference

pytestmark = pytest.mark.slow

FP16 = torch.float16
backward = torch.ops.coreai_torch.fused_rms_norm_backward
bigger = pytest.mark.skipif(
    os.environ.get("COREAI_TORCH_BIG") != "1", reason="takes minutes: COREAI_TORCH_BIG=1"
)


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gc.collect()


def test_more_than_2_31_elements() -> None:
    """Of input, output and gradients: rows that repeat, each as if it were alone."""
    count, dim = 2**31 // (7 * 2048) + 1, 2048
    few, w = torch.randn(7, dim).to(FP16), torch.randn(dim).to(FP16)
    grad = torch.randn(7, dim).to(FP16)
    x = few.expand(count, 7, dim)
    assert x.numel() > 2**31
    y = ops.rms_norm(x, w)
    expected = ops.rms_norm(few, w)
    for k in (0, 1, 2**31 // (7 * dim), count - 1):
        assert torch.equal(y[k], expected)
    assert torch.equal(y.amax(0), y.amin(0))
    del y
    grad_input, grad_scale = backward(grad.expand(count, 7, dim), x, w, 1e-5, [True, True])
    expected_input, _ = backward(grad, few, w, 1e-5, [True, False])
    for k in (0, 1, 2**31 // (7 * dim), count - 1):
        assert torch.equal(grad_input[k], expected_input)
    assert torch.equal(grad_input.amax(0), grad_input.amin(0))
    exact = oracle(few, w, grad, 1e-5)[2] * count
    fits = exact.abs() < torch.finfo(FP16).max
    torch.testing.assert_close(
        grad_scale[fits].double(), exact[fits], rtol=2**-10, atol=1e-5 * exact.abs().max().item()
    )


def test_strides_and_offsets_beyond_2_31_elements() -> None:
    """Rows far apart in memory of which only they are touched."""
    dim, apart = 64, 2**31 + 11
    memory = torch.empty(3 * apart + dim, dtype=FP16)  # pages that nobody writes take no room
    x = memory.as_strided((3, dim), (apart, 1), apart)
    x.copy_(torch.randn(3, dim))
    w, grad = torch.randn(dim), torch.randn(3, dim).to(FP16)
    for ours, expected in zip(
        with_gradients(ops.rms_norm, x, w, grad, 1e-5),
        with_gradients(ops.rms_norm, x.clone(), w, grad, 1e-5),
        strict=True,
    ):
        assert torch.equal(ours, expected)
    x.copy_(grad)
    assert torch.equal(
        backward(x, x.clone(), w, 1e-5, [True, True])[0],
        backward(grad, grad, w, 1e-5, [True, True])[0],
    )


def test_a_row_of_10_8_elements() -> None:
    dim = 10**8
    x = torch.randn(dim).to(FP16).view(1, dim)
    y = ops.rms_norm(x, x[0])
    squares = torch.stack([part.double().square().sum() for part in x[0].split(10**7)]).sum()
    rstd = (squares / dim + 1e-5).rsqrt()
    part = slice(dim - 10**6, dim)
    exact = ((x[0, part].double() * rstd).to(FP16) * x[0, part]).double()
    assert ((y[0, part].double() - exact).abs() <= 2**-10 * exact.abs() + 2**-24).all()
    assert torch.equal(y, reference.rms_norm(x, x[0]))
    del y
    grad_input, grad_scale = backward(x, x, x[0], 1e-5, [True, True])
    normalized = x[0, part].double() * rstd
    grad_exact = x[0, part].double() * normalized
    assert ((grad_scale[part].double() - grad_exact).abs() <= 2**-10 * grad_exact + 2**-24).all()
    cubes = torch.stack([p.double().pow(3).sum() for p in x[0].split(10**7)]).sum()
    s = x[0, part].double().square()
    input_exact = (s - normalized * (cubes * rstd / dim)) * rstd
    error = (grad_input[0, part].double() - input_exact).abs()
    assert (error <= 2**-10 * input_exact.abs() + 1e-5).all()


def test_10_7_rows_of_8() -> None:
    rows, dim = 10**7, 8
    x, w = torch.randn(rows, dim), torch.randn(dim)
    ours = with_gradients(ops.rms_norm, x, w, x, 1e-5)
    assert torch.equal(ours[0], reference.rms_norm(x, w))
    exact = torch.zeros(dim, dtype=torch.float64)
    for part, grad_input in zip(x.split(10**6), ours[1].split(10**6), strict=True):
        of_part = oracle(part, w, part, 1e-5)
        exact += of_part[2]
        torch.testing.assert_close(grad_input.double(), of_part[1], rtol=1e-4, atol=1e-4)
    # Ten million terms of about 1: float32 sums one by one would stop at 2²⁴.
    torch.testing.assert_close(ours[2].double(), exact, rtol=1e-6, atol=0)


def test_10_7_heads_of_8() -> None:
    """As many rows of the scale as of the input."""
    x, w = torch.randn(10**7, 8).to(FP16), torch.randn(10**7, 8).to(FP16)
    y, grad_input, grad_scale = with_gradients(ops.rms_norm, x, w, x, 1e-5)
    for k in (0, 10**6 + 1, 10**7 - 1):
        alone = with_gradients(ops.rms_norm, x[k], w[k], x[k], 1e-5)
        for ours, expected in zip((y, grad_input, grad_scale), alone, strict=True):
            assert torch.equal(ours[k], expected)


def test_10_8_rows_of_1() -> None:
    x, w = torch.randn(10**8, 1).to(FP16), torch.ones(1, dtype=FP16)
    y = ops.rms_norm(x, w, 0.0)
    assert torch.equal(y[x != 0], x.sign()[x != 0])
    assert y[x == 0].isnan().all()


@bigger
def test_2_31_rows_of_1() -> None:
    rows = 2**31 + 9
    x, w = torch.full((1, 1), -3.0, dtype=FP16).expand(rows, 1), torch.ones(1)
    y = ops.rms_norm(x, w, 0.0)
    assert (y.amin(), y.amax()) == (-1, -1)
    del y
    _, grad_scale = backward(x, x, w, 0.0, [False, True])
    torch.testing.assert_close(grad_scale, torch.tensor([3.0 * rows]))


@bigger
def test_a_row_of_2_31_elements() -> None:
    dim = 2**31 + 9
    x = torch.ones(dim, dtype=FP16)
    x[::2] = -1
    y = ops.rms_norm(x, x, 0.0)
    assert (y.amin(), y.amax()) == (1, 1)
    del y
    grad_input, _ = backward(x, x, x, 0.0, [True, False])
    assert grad_input.isfinite().all()
