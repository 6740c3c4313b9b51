"""The residual add and the norm in one op: what it computes is what the two compute one after the
other, forward to the bit and backward rounded once less."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import (
    ALL_PAIRS,
    DTYPES,
    FLOATS,
    PAIRS,
    REPRODUCIBLE,
    assert_no_worse,
    assert_same_bits_at_every_level_and_number_of_threads,
    names,
    oracle,
)
from test_compile import Graphs
from test_func import Calls, batched, in_dims_of, saved_bytes
from test_func import no_warnings as no_warnings
from test_rms_norm_errors import MISTAKES
from test_rms_norm_forward import LAYOUTS, SCALES, VALUES, assert_same_bits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.export import Dim, export
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import coreai_torch
from coreai_torch import ops, reference
from coreai_torch.reference.rms_norm import output_dtype

FORWARD = torch.ops.coreai_torch.fused_add_rms_norm.default
BACKWARD = torch.ops.coreai_torch.fused_add_rms_norm_backward.default
NORM_FORWARD = torch.ops.coreai_torch.fused_rms_norm.default
NORM_BACKWARD = torch.ops.coreai_torch.fused_rms_norm_backward.default


def apart(x: Tensor, r: Tensor, w: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Eager PyTorch."""
    h = x + r
    return reference.rms_norm(h, w, eps), h


def with_gradients(function, x, r, w, dy, dh, eps=1e-5) -> list[Tensor]:
    """Both outputs, and the gradients of the three tensors."""
    leaves = [t.detach().requires_grad_() for t in (x, r, w)]
    y, h = function(*leaves, eps)
    torch.autograd.backward([y, h], [dy.to(y.dtype), dh.to(h.dtype)])
    return [y.detach(), h.detach(), *(leaf.grad for leaf in leaves)]


def make(shape, pair, scale=None):
    """Input, residual, scale, and gradients of the two outputs."""
    x, r = torch.randn(shape).to(pair[0]), torch.randn(shape).to(pair[0])
    w = torch.randn(scale or shape[-1:]).to(pair[1])
    return x, r, w, torch.randn(shape).to(output_dtype(*pair)), torch.randn(shape).to(pair[0])


# --- forward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ALL_PAIRS, ids=names)
def test_same_bits_as_the_add_and_the_norm(pair, level):
    for dim in (1, 3, 8, 31, 32, 33, 100, 128, 513, 1000, 4097):
        for rows in (1, 5, 33):
            x, r, w, _, _ = make((rows, dim), pair)
            for ours, expected in zip(ops.add_rms_norm(x, r, w), apart(x, r, w), strict=True):
                assert_same_bits(ours, expected)


@pytest.mark.parametrize("make_values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("dtype", FLOATS, ids=names)
def test_values(make_values, dtype, level):
    x, r, w = (make_values(torch.randn(5, 67)).to(dtype) for _ in range(3))
    for a, b in ((x, r), (x, torch.randn(5, 67).to(dtype)), (x, -x)):
        for ours, expected in zip(ops.add_rms_norm(a, b, w[0]), apart(a, b, w[0]), strict=True):
            assert_same_bits(ours, expected)


@pytest.mark.parametrize("make_residual", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("make_input", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(make_input, make_residual):
    x, r, w = make_input(), make_residual(), torch.randn(6, 1, 48)
    y, h = ops.add_rms_norm(x, r, w)
    expected = apart(x.contiguous(), r.contiguous(), w)
    assert_same_bits(y, expected[0])
    assert_same_bits(h, expected[1])
    assert y.stride() == h.stride() == torch.empty_like(x).stride()
    dy, dh = make_residual(), make_input()
    for given in ((dy, dh), (dh, dy)):
        ours = with_gradients(ops.add_rms_norm, x, r, w, *given)
        dense = with_gradients(ops.add_rms_norm, x.contiguous(), r.contiguous(), w, *given)
        assert all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))
    grad_input, _ = BACKWARD(dy, dh, x, w, 1e-5, [True, True])
    assert grad_input.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("heads", [7, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=names)
def test_heads_of_a_transposed_view(dtype, heads, dim, level):
    x, r, dy, dh = (torch.randn(2, 21, heads, dim).to(dtype).transpose(1, 2) for _ in range(4))
    w = torch.randn(heads, 1, dim, dtype=dtype)
    for ours, expected in zip(ops.add_rms_norm(x, r, w), apart(x, r, w), strict=True):
        assert_same_bits(ours, expected)
    ours = with_gradients(ops.add_rms_norm, x, r, w, dy, dh)
    dense = with_gradients(ops.add_rms_norm, x.contiguous(), r.contiguous(), w, dy, dh)
    assert all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))


def test_rows_with_adjacent_elements_are_not_copied():
    x, r = (torch.randn(4, 10, 18, 48)[:, :, k : k + 6].transpose(1, 2) for k in (6, 12))
    with torch.profiler.profile() as profile:
        ops.add_rms_norm(x, r, torch.randn(6, 1, 48))
    called = {event.key for event in profile.key_averages()}
    assert "coreai_torch::fused_add_rms_norm" in called
    assert not called & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::add"}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_scale_shapes(scale, pair):
    x, r, w, dy, dh = make((2, 3, 5, 16), pair, scale)
    ours, expected = (with_gradients(f, x, r, w, dy, dh) for f in (ops.add_rms_norm, apart))
    for a, b in zip(ours[:2], expected[:2], strict=True):
        assert_same_bits(a, b)
    tolerance = 4 * max(torch.finfo(dtype).eps for dtype in pair)
    for a, b in zip(ours[2:], expected[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (2, 0), (8,), (1,), (1, 1)], ids=str)
def test_small_shapes(shape):
    x, r, w, dy, dh = make(shape, (torch.float32, torch.float32))
    ours, expected = (with_gradients(f, x, r, w, dy, dh) for f in (ops.add_rms_norm, apart))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
def test_a_row_does_not_depend_on_the_others(dtype):
    x, r, w, dy, dh = make((257, 1000), (dtype, torch.float32))
    whole = with_gradients(ops.add_rms_norm, x, r, w, dy, dh)[:3]
    for rows in (slice(0, 1), slice(3, 4), slice(100, 257)):
        part = with_gradients(ops.add_rms_norm, x[rows], r[rows], w, dy[rows], dh[rows])[:3]
        for ours, expected in zip(part, whole, strict=True):
            assert_same_bits(ours, expected[rows])


def test_the_outputs_are_nobody_else_s_memory():
    x, r, w = torch.randn(3, 8), torch.zeros(3, 8), torch.ones(8)
    outputs = ops.add_rms_norm(x, r, w)
    pointers = {t.data_ptr() for t in (x, r, w, *outputs)}
    assert len(pointers) == 5


# --- what the fused op does not take ----------------------------------------------------------


@pytest.mark.parametrize(
    "dtypes",
    [d for d in itertools.product((*DTYPES, torch.int64), repeat=2) if d != (torch.int64,) * 2],
    ids=names,
)
def test_every_pair_of_dtypes_that_the_add_promotes(dtypes):
    x, r = (torch.randn(3, 8).mul(4).to(dtype) for dtype in dtypes)
    for dtype in DTYPES:
        w = torch.randn(8).to(dtype)
        for ours, expected in zip(ops.add_rms_norm(x, r, w), apart(x, r, w), strict=True):
            assert_same_bits(ours, expected)


@pytest.mark.parametrize(
    ("input", "residual"),
    [
        ((3, 8), (8,)),
        ((8,), (3, 8)),
        ((3, 1, 8), (1, 5, 8)),
        ((3, 8), ()),
        ((), (8,)),
        ((3, 1), (3, 8)),
    ],
    ids=str,
)
def test_an_add_that_broadcasts(input, residual):
    x, r, w = torch.randn(input), torch.randn(residual), torch.randn(8)
    shape = torch.broadcast_shapes(input, residual)
    given = torch.randn(shape), torch.randn(shape)
    ours, expected = (with_gradients(f, x, r, w, *given) for f in (ops.add_rms_norm, apart))
    assert_same_bits(ours[0], expected[0])
    assert_same_bits(ours[1], expected[1])
    for a, b in zip(ours[2:], expected[2:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pair", [(torch.float32, torch.float64), (torch.float16, torch.bfloat16)])
def test_dtypes_that_no_kernel_takes_are_rounded_once_too(pair):
    x, r, w, dy, dh = make((40, 64), pair)
    ours = with_gradients(ops.add_rms_norm, x, r, w, dy, dh)
    exact = oracle(x + r, w, dy, 1e-5)[1] + dh.double()
    error = (ours[2].double() - exact).abs()
    assert (error <= 0.5 * torch.finfo(pair[0]).eps * exact.abs() + 1e-6 * exact.abs().mean()).all()


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(150, 33), (64, 128), (300, 513), (2000, 96), (33, 4096)], ids=str
)
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_accuracy(shape, pair):
    x, r, w, dy, dh = make(shape, pair)
    ours, theirs = (with_gradients(f, x, r, w, dy, dh) for f in (ops.add_rms_norm, apart))
    assert torch.equal(ours[2], ours[3])
    _, exact_grad, exact_grad_scale = oracle(ours[1], w, dy, 1e-5)
    exact_grad = exact_grad + dh.double()
    assert_no_worse("grad_input", ours[2], theirs[2], exact_grad, shape[0])
    assert_no_worse("grad_scale", ours[4], theirs[4], exact_grad_scale, shape[0])
    if pair[0].itemsize == 2:  # rounded once: half an ulp, but for what float32 is off
        error = (ours[2].double() - exact_grad).abs()
        noise = 1e-6 * (exact_grad.abs() + exact_grad.abs().mean())
        assert (error <= 0.5 * torch.finfo(pair[0]).eps * exact_grad.abs() + noise).all()


def test_with_one_gradient_the_other_s_work_is_not_done():
    x, r, w, dy, dh = make((9, 40), (torch.float32, torch.float32))
    leaves = [t.requires_grad_() for t in (x, r, w)]
    with Calls() as calls:
        grads = torch.autograd.grad(ops.add_rms_norm(*leaves)[1], leaves, dh, allow_unused=True)
    assert torch.equal(grads[0], dh)
    assert torch.equal(grads[1], dh)
    assert grads[2] is None
    assert calls.count(BACKWARD) == calls.count(NORM_BACKWARD) == 0

    with Calls() as calls:
        y, h = ops.add_rms_norm(*leaves)
        grads = torch.autograd.grad(y, leaves, dy)
    assert (calls.count(BACKWARD), calls.count(NORM_BACKWARD)) == (0, 1)
    expected = NORM_BACKWARD(dy, h.detach(), w.detach(), 1e-5, [True, True])
    assert torch.equal(grads[0], expected[0])
    assert torch.equal(grads[1], expected[0])
    assert torch.equal(grads[2], expected[1])

    with Calls() as calls:
        grads = torch.autograd.grad(ops.add_rms_norm(*leaves), leaves, (dy, dh))
    assert (calls.count(BACKWARD), calls.count(NORM_BACKWARD)) == (1, 0)
    torch.testing.assert_close(grads[0], expected[0] + dh)
    assert torch.equal(grads[2], expected[1])


WANTED = [mask for mask in itertools.product((True, False), repeat=3) if any(mask)]


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_only_the_gradients_asked_for(wanted):
    x, r, w, dy, dh = make((9, 40), (torch.float32, torch.float32))
    expected = with_gradients(ops.add_rms_norm, x, r, w, dy, dh)[2:]
    leaves = [t.requires_grad_(asked) for t, asked in zip((x, r, w), wanted, strict=True)]
    with Calls() as calls:
        torch.autograd.backward(ops.add_rms_norm(*leaves), (dy, dh))
    for leaf, full, asked in zip(leaves, expected, wanted, strict=True):
        assert torch.equal(leaf.grad, full) if asked else leaf.grad is None
    sums = wanted[0] or wanted[1]
    assert (calls.count(BACKWARD), calls.count(NORM_BACKWARD)) == ((1, 0) if sums else (0, 1))
    both = BACKWARD(dy, dh, x.detach(), w.detach(), 1e-5, [True, True])
    for mask in itertools.product((True, False), repeat=2):
        some = BACKWARD(dy, dh, x.detach(), w.detach(), 1e-5, mask)
        for part, full, asked in zip(some, both, mask, strict=True):
            assert torch.equal(part, full) if asked else part.shape == (0,)


def test_gradients_of_sums():
    """Each is one number, expanded over all dimensions."""
    x, r, w, _, _ = make((6, 40), (torch.float32, torch.float32))
    ones = torch.ones(()).expand(6, 40)
    ours, expected = (with_gradients(f, x, r, w, ones, ones) for f in (ops.add_rms_norm, apart))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize(("shape", "scale"), REPRODUCIBLE, ids=str)
def test_same_bits_at_every_level_and_number_of_threads(pair, shape, scale):
    arguments = make(shape, pair, scale)
    assert_same_bits_at_every_level_and_number_of_threads(
        lambda: with_gradients(ops.add_rms_norm, *arguments)
    )


@pytest.mark.parametrize("scale", [(6,), (2, 1, 6), (3, 1, 4, 6)], ids=str)
def test_gradcheck(scale):
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 2, 4, 6), (3, 2, 4, 6), scale)
    ]
    assert torch.autograd.gradcheck(
        ops.add_rms_norm,
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        ops.add_rms_norm, leaves, check_fwd_over_rev=True, check_batched_grad=True
    )


def test_saved_are_the_sum_and_the_scale_and_not_a_byte_more():
    x, r, w, _, _ = make((2, 4, 100, 64), (torch.bfloat16, torch.float32), (4, 1, 64))
    leaves = [t.requires_grad_() for t in (x, r, w)]
    kept, (_, h) = saved_bytes(ops.add_rms_norm, *leaves)
    assert kept == h.nbytes + w.nbytes
    node = h.grad_fn
    assert "AddRmsNormFunction" in node.name()


def test_a_chain_of_blocks():
    """The residual stream of a model: each sum has two uses."""

    def run(function):
        torch.manual_seed(0)
        x, weights = torch.randn(5, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
        h, y = torch.zeros(5, 16), x
        for w in weights:
            y, h = function(y.tanh(), h, w)
        (y * h).sum().backward()
        return x.grad, weights.grad

    for ours, expected in zip(run(ops.add_rms_norm), run(apart), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    x, r, w, dy, dh = make((3, 8), (torch.float32, torch.float32))
    through = lambda *args: checkpoint(ops.add_rms_norm, *args, use_reentrant=use_reentrant)  # noqa: E731
    ours, expected = (with_gradients(f, x, r, w, dy, dh) for f in (through, ops.add_rms_norm))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


# --- torch.func, forward mode, higher derivatives ---------------------------------------------

SHAPES = [
    ((8,), (8,)),
    ((3, 5, 8), (3, 1, 8)),
    ((2, 3, 5, 8), (3, 1, 8)),
    ((2, 3, 5, 8), (2, 1, 5, 8)),  # which the kernels do not take
]


def loss_of(function):
    def loss(x, r, w):
        y, h = function(x, r, w)
        return y.square().sum() + (h * h.sin()).sum()

    return loss


def compare(transformed, *args):
    """`transformed(function)(*args)` of ours and of the two operations, in leaves."""
    leaves = torch.utils._pytree.tree_leaves
    ours, theirs = leaves(transformed(ops.add_rms_norm)(*args)), leaves(transformed(apart)(*args))
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("shape", "scale"), SHAPES, ids=str)
@pytest.mark.usefixtures("no_warnings")
def test_vmap_over_any_argument_and_any_dim(shape, scale):
    for in_dims in in_dims_of(shape, shape, scale):
        shapes = (shape, shape, scale)
        args = [batched(s, d) for s, d in zip(shapes, in_dims, strict=True)]
        with Calls() as calls:
            results = vmap(ops.add_rms_norm, in_dims)(*args)
        assert calls.count(FORWARD) == 1
        for i in range(len(results[0])):
            one = [t if d is None else t.select(d, i) for t, d in zip(args, in_dims, strict=True)]
            for ours, expected in zip(results, ops.add_rms_norm(*one), strict=True):
                torch.testing.assert_close(ours[i], expected)


@pytest.mark.parametrize("mask", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize(("shape", "scale"), SHAPES, ids=str)
@pytest.mark.usefixtures("no_warnings")
def test_vmap_of_backward(shape, scale, mask):
    shapes = (shape, shape, shape, scale)
    for in_dims in itertools.product((None, 0, -1), repeat=4):
        if set(in_dims) == {None}:
            continue
        args = [batched(s, d) for s, d in zip(shapes, in_dims, strict=True)]
        backward = lambda g, h, x, w: tuple(  # noqa: E731
            t for t, wanted in zip(BACKWARD(g, h, x, w, 1e-5, mask), mask, strict=True) if wanted
        )
        grads = vmap(backward, in_dims)(*args)
        for i in range(len(grads[0])):
            one = [t if d is None else t.select(d, i) for t, d in zip(args, in_dims, strict=True)]
            for ours, expected in zip(grads, backward(*one), strict=True):
                torch.testing.assert_close(ours[i], expected)


@pytest.mark.parametrize(("shape", "scale"), SHAPES, ids=str)
@pytest.mark.usefixtures("no_warnings")
def test_transforms(shape, scale):
    x, r, w = (torch.randn(s, dtype=torch.float64) for s in (shape, shape, scale))
    all_three = (0, 1, 2)
    compare(lambda f: grad(loss_of(f), all_three), x, r, w)
    compare(lambda f: lambda *args: vjp(f, *args)[1]((x, r)), x, r, w)
    compare(lambda f: lambda *args: jvp(f, args, (r, x, w)), x, r, w)
    with Calls() as calls:
        grad(loss_of(ops.add_rms_norm), all_three)(x, r, w)
    assert calls.count(FORWARD) == calls.count(BACKWARD) == 1


@pytest.mark.parametrize(("shape", "scale"), SHAPES[:2], ids=str)
@pytest.mark.usefixtures("no_warnings")
def test_higher_derivatives(shape, scale):
    x, r, w = (torch.randn(s, dtype=torch.float64) for s in (shape, shape, scale))
    all_three = (0, 1, 2)
    compare(lambda f: jacrev(f, all_three), x, r, w)
    compare(lambda f: jacfwd(f, all_three), x, r, w)
    compare(lambda f: hessian(loss_of(f), all_three), x, r, w)
    compare(lambda f: jacrev(jacrev(loss_of(f), all_three), all_three), x, r, w)


@pytest.mark.usefixtures("no_warnings")
def test_per_sample_gradients():
    x, r, w = torch.randn(6, 5, 8), torch.randn(6, 5, 8), torch.randn(8)
    with Calls() as calls:
        each = vmap(grad(loss_of(ops.add_rms_norm), (0, 1, 2)), (0, 0, None))(x, r, w)
    assert calls.count(FORWARD) == calls.count(BACKWARD) == 1
    for i in range(6):
        one = grad(loss_of(apart), (0, 1, 2))(x[i], r[i], w)
        for ours, expected in zip(each, one, strict=True):
            torch.testing.assert_close(ours[i], expected)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_tensors_lose_no_tangent(which, requires_grad):
    args = [torch.randn(5, 8), torch.randn(5, 8), torch.randn(8)]
    direction = torch.randn_like(args[which])

    def tangents(function):
        with forward_ad.dual_level():
            dual = [t.clone().requires_grad_(requires_grad) for t in args]
            dual[which] = forward_ad.make_dual(dual[which], direction)
            return [forward_ad.unpack_dual(t).tangent for t in function(*dual)]

    for ours, expected in zip(tangents(ops.add_rms_norm), tangents(apart), strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("which", range(4))
def test_the_backward_op_loses_no_tangent(which):
    args = [torch.randn(5, 8) for _ in range(3)] + [torch.randn(8)]
    direction = torch.randn_like(args[which])

    def backward(dy, dh, h, w):
        y = reference.rms_norm(h.requires_grad_(), w.requires_grad_(), 1e-5)
        of_h, of_w = torch.autograd.grad(y, (h, w), dy, create_graph=True)
        return of_h + dh, of_w

    def tangents(function):
        with forward_ad.dual_level():
            dual = [t.clone() for t in args]
            dual[which] = forward_ad.make_dual(dual[which], direction)
            return [forward_ad.unpack_dual(t).tangent for t in function(*dual)]

    ours = tangents(lambda *args: BACKWARD(*args, 1e-5, [True, True]))
    for a, b in zip(ours, tangents(backward), strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_double_backward_keeps_dtypes(pair):
    x, r, w, dy, dh = (t.requires_grad_() for t in make((5, 8), pair))
    grads = torch.autograd.grad(ops.add_rms_norm(x, r, w), (x, r, w), (dy, dh), create_graph=True)
    total = sum(g.float().square().sum() for g in grads)
    second = torch.autograd.grad(total, (x, r, w, dy, dh))
    assert [t.dtype for t in second] == [t.dtype for t in (x, r, w, dy, dh)]


# --- devices without kernels ------------------------------------------------------------------


@pytest.mark.parametrize("device", ["MPS", "XPU", "PrivateUse1"])
def test_devices_without_kernels_run_the_formula(device):
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))
    for make_layout in LAYOUTS.values():
        x, r, w = make_layout(), torch.randn(4, 6, 10, 48), torch.randn(6, 1, 48)
        for ours, expected in zip(
            FORWARD.redispatch(keys, x, r, w, 1e-5), ops.add_rms_norm(x, r, w), strict=True
        ):
            torch.testing.assert_close(ours, expected)
            assert ours.stride() == expected.stride()
        for mask in ((True, True), (True, False), (False, True)):
            ours = BACKWARD.redispatch(keys, r, x, x, w, 1e-5, mask)
            for a, b in zip(ours, BACKWARD(r, x, x, w, 1e-5, mask), strict=True):
                torch.testing.assert_close(a, b)
                assert a.stride() == b.stride()


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("function", [ops.add_rms_norm, reference.add_rms_norm])
def test_the_mistakes_of_rms_norm(mistake, function):
    (x, w, eps), kind, message = mistake
    with pytest.raises(kind, match=re.escape("add_rms_norm: " + message)):
        function(x, x, w, eps)


X, W = torch.randn(2, 3, 8), torch.randn(8)
RESIDUALS = {
    "shape": (
        torch.ones(2, 8),
        RuntimeError,
        "expected residual that broadcasts with the shape of input, [2, 3, 8], got shape [2, 8]",
    ),
    "device": (
        torch.ones(3, 8, device="meta"),
        RuntimeError,
        "expected residual on the device of input, cpu, got meta; move one of them with .to()",
    ),
    "layout": (
        torch.ones(3, 8).to_sparse(),
        RuntimeError,
        "expected residual to be a dense tensor, got layout ",
    ),
    "complex": (
        torch.ones(2, 3, 8, dtype=torch.complex64),
        NotImplementedError,
        "expected input + residual of dtype float64, float32, float16 or bfloat16, got torch.",
    ),
}


@pytest.mark.parametrize("mistake", RESIDUALS.values(), ids=RESIDUALS)
@pytest.mark.parametrize("function", [ops.add_rms_norm, reference.add_rms_norm])
def test_wrong_residual(mistake, function):
    residual, kind, message = mistake
    with pytest.raises(kind, match=re.escape("add_rms_norm: " + message)):
        function(X, residual, W)


def test_a_scale_that_does_not_fit_the_sum():
    message = "add_rms_norm: expected scale with last dimension 8 (the last dimension of input + "
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.add_rms_norm(X, W, torch.ones(4))


ALIKE = {
    "shape": (torch.ones(2, 8), "with the shape of {of}, [2, 3, 8], got shape [2, 8]"),
    "dtype": (torch.ones(2, 3, 8).half(), "of the dtype of {of}, torch.float32, got torch.float16"),
    "device": (torch.ones(2, 3, 8, device="meta"), "on the device of {of}, cpu, got meta"),
    "layout": (torch.ones(2, 3, 8).to_sparse(), "to be a dense tensor, got layout Sparse"),
}


@pytest.mark.parametrize(("tensor", "message"), ALIKE.values(), ids=ALIKE)
def test_the_private_ops_check_their_arguments(tensor, message):
    def raises(name, of):
        text = f"add_rms_norm: expected {name} {message.format(of=of)}"
        return pytest.raises(RuntimeError, match=re.escape(text))

    with raises("residual", "input"):
        FORWARD(X, tensor, W, 1e-5)
    with raises("grad_new_residual", "new_residual"):
        BACKWARD(X, tensor, X, W, 1e-5, [True, True])


def test_wrong_grad_output():
    with pytest.raises(RuntimeError, match="add_rms_norm: expected grad_output of the output's"):
        BACKWARD(X.half(), X, X, W, 1e-5, [True, True])


def test_cuda_without_cuda_kernels():
    if coreai_torch._C.build_info()["cuda_version"]:
        pytest.skip("this build has CUDA kernels")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(NotImplementedError, match=r"add_rms_norm: .* built without CUDA kernels"):
        FORWARD.redispatch(keys, X, X, W, 1e-5)


# --- torch.compile ----------------------------------------------------------------------------


@pytest.fixture
def _fresh():
    torch._dynamo.reset()
    yield
    coreai_torch.set_compile_mode("auto")
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", ["kernel", "auto", "decompose"])
@pytest.mark.usefixtures("_fresh")
def test_one_graph(mode, dynamic):
    coreai_torch.set_compile_mode(mode)
    graphs, arguments = Graphs(), make((3, 5, 8), (torch.float32, torch.float32))
    compiled = torch.compile(
        ops.add_rms_norm, backend=graphs.backend, fullgraph=True, dynamic=dynamic
    )
    ours, expected = (with_gradients(f, *arguments) for f in (compiled, ops.add_rms_norm))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **({} if mode == "decompose" else {"rtol": 0, "atol": 0}))
    kernels = [name for name in graphs.called if name.startswith("coreai_torch")]
    called = [] if mode == "decompose" else [str(FORWARD), str(BACKWARD)]
    assert kernels == called


@pytest.mark.usefixtures("_fresh")
def test_no_recompilation_for_rows():
    counter = CompileCounter()
    compiled = torch.compile(ops.add_rms_norm, backend=counter, fullgraph=True, dynamic=True)
    for rows in (3, 5, 17, 64):
        x, r, w, _, _ = make((rows, 8), (torch.float32, torch.float32))
        compiled(x, r, w)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh")
def test_compiled_where_the_add_broadcasts():
    graphs = Graphs()
    compiled = torch.compile(ops.add_rms_norm, backend=graphs.backend, fullgraph=True)
    y, h = compiled(X, W, W)
    assert torch.equal(h, X + W)
    assert torch.equal(y, ops.rms_norm(X + W, W))
    assert str(NORM_FORWARD) in graphs.called


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.usefixtures("_fresh")
def test_inductor_s_code(pair):
    def layer(x, r, w, eps=1e-5):
        y, h = ops.add_rms_norm(x.sin(), r, w, eps)
        return y * 2, h + 1

    arguments = make((33, 96), pair)
    compiled = torch.compile(layer, fullgraph=True)
    for a, b in zip(
        with_gradients(compiled, *arguments), with_gradients(layer, *arguments), strict=True
    ):
        tolerance = 4 * max(torch.finfo(dtype).eps for dtype in pair)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=4 * tolerance)


def test_compiled_autograd():
    graphs = Graphs()
    x, r, w, dy, dh = make((5, 8), (torch.float32, torch.float32))
    expected = with_gradients(ops.add_rms_norm, x, r, w, dy, dh)
    torch._dynamo.reset()
    compiler = torch.compile(backend=graphs.backend, fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        ours = with_gradients(ops.add_rms_norm, x, r, w, dy, dh)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert str(BACKWARD) in graphs.called


# --- export and conversion --------------------------------------------------------------------


class Block(nn.Module):
    """A residual add and a norm, by a function."""

    def __init__(self, function=ops.add_rms_norm) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(x, r, self.weight)


def by_hand(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    return ops.rms_norm(h, w), h


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("strict", [False, True])
def test_exported_it_is_an_add_and_the_composite_op(strict, dynamic):
    x, r = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    shapes = ({0: Dim("batch"), 1: Dim("length")},) * 2 if dynamic else None
    programs = [
        export(Block(f), (x, r), dynamic_shapes=shapes, strict=strict)
        for f in (ops.add_rms_norm, by_hand)
    ]
    called = [[str(n.target) for n in p.graph.nodes if n.op == "call_function"] for p in programs]
    assert called[0] == called[1] == ["aten.add.Tensor", "coreai_torch.rms_norm.default"]
    ours, expected = (p.run_decompositions() for p in programs)
    assert ours.graph_module.code == expected.graph_module.code
    for program in (programs[0], ours):
        for a, b in zip(program.module()(x, r), Block()(x, r), strict=True):
            assert torch.equal(a, b)


def test_converted_it_is_an_add_and_the_formula():
    pytest.importorskip("coreai_torch.converter", reason="needs Apple's converter")
    from convert_cases import text

    from coreai_torch.conversion import convert

    x = (torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    names = {"input_names": ["x", "r"], "output_names": ["y", "h"]}
    ours, expected = (
        text(convert(Block(f).eval(), x, **names)) for f in (ops.add_rms_norm, by_hand)
    )
    assert ours == expected
