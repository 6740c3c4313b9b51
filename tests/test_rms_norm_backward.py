"""Gradients: the accuracy bar against float64, every layout, gradcheck, bit reproducibility."""

from __future__ import annotations

import pytest
import torch
from cases import (
    FLOATS,
    PAIRS,
    REPRODUCIBLE,
    assert_as_accurate_as_reference,
    assert_same_bits_at_every_level_and_number_of_threads,
    names,
    with_gradients,
)
from test_rms_norm_forward import LAYOUTS, SCALES

from coreai_torch import ops, reference

SHAPES = [(1, 64), (150, 33), (64, 128), (100, 1000), (300, 513), (2000, 96), (33, 4096)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_accuracy(shape, pair):
    x, g = torch.randn(shape).to(pair[0]), torch.randn(shape)
    w = torch.randn(shape[-1:]).to(pair[1])
    assert_as_accurate_as_reference(x, w, g)


@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_accuracy_per_head(pair):
    x, g = torch.randn(2, 4, 40, 64).to(pair[0]), torch.randn(2, 4, 40, 64)
    assert_as_accurate_as_reference(x, torch.randn(4, 1, 64).to(pair[1]), g)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("shape", [(32768, 512), (100_000, 64), (16, 65536)], ids=str)
def test_accuracy_over_many_rows(shape, dtype):
    x, g = torch.randn(shape).to(dtype), torch.randn(shape)
    assert_as_accurate_as_reference(x, torch.randn(shape[-1:]).to(dtype), g)


ROWS = {
    "zeros": lambda x: torch.zeros_like(x),
    "tiny": lambda x: x * 1e-4,
    "large": lambda x: x * 1e4,
    "one spike": lambda x: torch.where(torch.arange(x.shape[-1]) == 7, 6e4, x * 1e-3),
    "near the largest float16": lambda x: x.sign() * 65504,
}


@pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_accuracy_of_adversarial_rows(make, pair):
    x, g = make(torch.randn(40, 100)).to(pair[0]), torch.randn(40, 100)
    assert_as_accurate_as_reference(x, torch.randn(100).to(pair[1]), g)


@pytest.mark.parametrize("make_grad", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("make_input", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_input_and_grad_output(make_input, make_grad):
    x, g, w = make_input(), make_grad(), torch.randn(6, 1, 48)
    y, grad_input, grad_scale = with_gradients(ops.rms_norm, x, w, g, 1e-5)
    dense = with_gradients(ops.rms_norm, x.contiguous(), w, g.contiguous(), 1e-5)
    for ours, expected in zip((y, grad_input, grad_scale), dense, strict=True):
        assert torch.equal(ours, expected)
    grads = torch.ops.coreai_torch.fused_rms_norm_backward(g, x, w, 1e-5, [True, True])
    assert grads[0].stride() == torch.empty_like(x).stride()
    assert grads[1].is_contiguous()


@pytest.mark.parametrize("dim", [40, 64, 128, 256])
@pytest.mark.parametrize("heads", [7, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=names)
def test_heads_of_a_transposed_view(dtype, heads, dim):
    """They are gone through in another order than rows that lie one behind the other."""
    x, g = (torch.randn(2, 301, heads, dim).to(dtype).transpose(1, 2) for _ in range(2))
    w = torch.randn(heads, 1, dim, dtype=dtype)
    results = with_gradients(ops.rms_norm, x, w, g, 1e-5)
    dense = with_gradients(ops.rms_norm, x.contiguous(), w, g.contiguous(), 1e-5)
    for ours, expected in zip(results, dense, strict=True):
        assert torch.equal(ours, expected)
    assert_same_bits_at_every_level_and_number_of_threads(
        lambda: with_gradients(ops.rms_norm, x, w, g, 1e-5)
    )


@pytest.mark.parametrize("shape", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_scale_shapes(shape, pair):
    x, g = torch.randn(2, 3, 5, 16).to(pair[0]), torch.randn(2, 3, 5, 16)
    assert_as_accurate_as_reference(x, torch.randn(shape).to(pair[1]), g)


def test_gradient_of_a_sum():
    """Its gradient is one number, expanded over all dimensions."""
    x, w = torch.randn(6, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    ops.rms_norm(x, w).sum().backward()
    expected = with_gradients(reference.rms_norm, x, w, torch.ones(6, 40), 1e-5)
    torch.testing.assert_close(x.grad, expected[1])
    torch.testing.assert_close(w.grad, expected[2])


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_only_the_gradients_asked_for(wanted):
    x, w, g = torch.randn(9, 40), torch.randn(40), torch.randn(9, 40)
    op = torch.ops.coreai_torch.fused_rms_norm_backward
    both, some = op(g, x, w, 1e-5, [True, True]), op(g, x, w, 1e-5, list(wanted))
    for full, part, asked in zip(both, some, wanted, strict=True):
        assert torch.equal(part, full) if asked else part.shape == (0,)


@pytest.mark.parametrize("scale", [(6,), (2, 1, 6), (3, 1, 1, 6), (3, 1, 4, 6)], ids=str)
def test_gradcheck(scale):
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(scale, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        ops.rms_norm, (x, w), check_forward_ad=True, check_batched_grad=False
    )
    assert torch.autograd.gradgradcheck(ops.rms_norm, (x, w))


def test_zero_rows():
    x, w = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    ops.rms_norm(x, w).sum().backward()
    assert x.grad.shape == (0, 8)
    assert torch.equal(w.grad, torch.zeros(8))


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize(("shape", "scale"), REPRODUCIBLE, ids=str)
def test_same_bits_at_every_level_and_number_of_threads(pair, shape, scale):
    x, g = torch.randn(shape).to(pair[0]), torch.randn(shape)
    w = torch.randn(scale).to(pair[1])
    assert_same_bits_at_every_level_and_number_of_threads(
        lambda: with_gradients(ops.rms_norm, x, w, g, 1e-5)
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("dim", [40, 64, 128, 256])
def test_a_rows_gradient_does_not_depend_on_the_others(dim, dtype):
    """Nor on how many there are: beyond the caches, blocks of rows are taken in another way."""
    rows = (13 << 20) // (dim * dtype.itemsize)
    x, g = (torch.randn(rows, dim).to(dtype) for _ in range(2))
    w = torch.randn(dim).to(dtype)
    whole = with_gradients(ops.rms_norm, x, w, g, 1e-5)[1]
    for part in (slice(0, 7), slice(5, 13), slice(100, 1001)):
        grad_input = with_gradients(ops.rms_norm, x[part], w, g[part], 1e-5)[1]
        assert torch.equal(grad_input, whole[part])


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
def test_transposed_heads_with_one_scale_are_rows_in_the_order_of_memory(dtype):
    x, g = (torch.randn(2, 33, 4, 40).to(dtype) for _ in range(2))
    w = torch.randn(40).to(dtype)
    y, grad_x, grad_w = with_gradients(ops.rms_norm, x, w, g, 1e-5)
    transposed = with_gradients(ops.rms_norm, x.transpose(1, 2), w, g.transpose(1, 2), 1e-5)
    assert torch.equal(transposed[0], y.transpose(1, 2))
    assert torch.equal(transposed[1], grad_x.transpose(1, 2))
    assert torch.equal(transposed[2], grad_w)


def test_grad_scale_of_any_layout_does_not_depend_on_what_else_is_asked_for():
    op = torch.ops.coreai_torch.fused_rms_norm_backward
    dense, sliced = torch.randn(2, 33, 4, 40), torch.randn(2, 33, 3, 4, 40)[:, :, 1]
    expanded = torch.randn(33, 40).expand(2, 4, 33, 40)
    for x in (dense.transpose(1, 2), sliced.transpose(1, 2), expanded, dense.mT):
        g, w = torch.randn(x.shape), torch.ones(x.shape[-1])
        alone = op(g, x, w, 1e-5, [False, True])[1]
        assert torch.equal(alone, op(g, x, w, 1e-5, [True, True])[1])


def test_saved_for_backward_are_input_and_scale_only():
    saved = []
    x, w = torch.randn(8, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.rms_norm(x, w)
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), w.data_ptr()]
