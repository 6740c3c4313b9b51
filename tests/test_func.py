"""torch.func, forward-mode AD, higher derivatives and checkpointing, against the reference."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import PAIRS, names
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from coreai_torch import ops, reference
from coreai_torch.composite_ops import RMSNorm

FORWARD = torch.ops.coreai_torch.fused_rms_norm.default
BACKWARD = torch.ops.coreai_torch.fused_rms_norm_backward.default


class Calls(TorchDispatchMode):
    """Notes the ops that reach the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))

    def count(self, op: object) -> int:
        return self.ops.count(op)


def compare(transformed, *args):
    """`transformed(norm)(*args)` of ours and of the reference, in leaves."""
    ours = torch.utils._pytree.tree_leaves(transformed(ops.rms_norm)(*args))
    theirs = torch.utils._pytree.tree_leaves(transformed(reference.rms_norm)(*args))
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


# The shapes of one call: the scale shared, per head, per head behind a batch dimension that it does
# not span, with leading ones, over all rows, and last in a shape that the kernels do not take.
SHAPES = [
    ((8,), (8,)),
    ((5, 8), (8,)),
    ((3, 5, 8), (3, 1, 8)),
    ((2, 3, 5, 8), (3, 1, 8)),
    ((2, 3, 5, 8), (1, 1, 8)),
    ((2, 3, 5, 8), (2, 3, 5, 8)),
    ((2, 3, 5, 8), (2, 1, 5, 8)),
]
BATCH = 4


def batched(shape, dim, dtype=torch.float32):
    """A tensor of that shape, or with a batch dimension at `dim`."""
    if dim is None:
        return torch.randn(shape).to(dtype)
    dim = dim % (len(shape) + 1)
    return torch.randn(*shape[:dim], BATCH, *shape[dim:]).to(dtype)


def in_dims_of(*shapes):
    """Every choice of batch dimensions, but that of none at all."""
    choices = [(None, *range(-1, len(shape) + 1)) for shape in shapes]
    return [dims for dims in itertools.product(*choices) if set(dims) != {None}]


@pytest.fixture
def no_warnings():
    """PyTorch warns of a missing batching rule."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize(("shape", "scale"), SHAPES, ids=str)
@pytest.mark.usefixtures("no_warnings")
def test_vmap_over_any_argument_and_any_dim(shape, scale):
    for in_dims in in_dims_of(shape, scale):
        x, w = batched(shape, in_dims[0]), batched(scale, in_dims[1])
        with Calls() as calls:
            y = vmap(ops.rms_norm, in_dims)(x, w)
        assert calls.count(FORWARD) == 1
        slices = [
            [t if d is None else t.select(d, i) for t, d in zip((x, w), in_dims, strict=True)]
            for i in range(BATCH)
        ]
        for i, (one_x, one_w) in enumerate(slices):
            same = torch.equal if scale != SHAPES[-1][1] else torch.allclose
            assert same(y[i], ops.rms_norm(one_x, one_w))


@pytest.mark.parametrize("mask", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize(("shape", "scale"), SHAPES, ids=str)
@pytest.mark.usefixtures("no_warnings")
def test_vmap_of_backward_over_any_argument_and_any_dim(shape, scale, mask):
    for in_dims in in_dims_of(shape, shape, scale):
        shapes = (shape, shape, scale)
        args = [batched(s, d) for s, d in zip(shapes, in_dims, strict=True)]
        backward = lambda g, x, w: tuple(  # noqa: E731
            grad for grad, wanted in zip(BACKWARD(g, x, w, 1e-5, mask), mask, strict=True) if wanted
        )
        with Calls() as calls:
            grads = vmap(backward, in_dims)(*args)
        assert calls.count(BACKWARD) == 1
        for i in range(BATCH):
            one = [t if d is None else t.select(d, i) for t, d in zip(args, in_dims, strict=True)]
            for ours, expected in zip(grads, backward(*one), strict=True):
                torch.testing.assert_close(ours[i], expected)


@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_vmap_of_every_pair_of_dtypes(pair):
    x, w = batched((3, 5, 8), 1, pair[0]), batched((3, 1, 8), 2, pair[1])
    y = vmap(ops.rms_norm, (1, 2))(x, w)
    assert torch.equal(y, vmap(reference.rms_norm, (1, 2))(x, w))


def test_vmap_does_not_leave_the_kernels():
    """Where the scale of one call suits the kernels, so does that of a batch."""
    for (shape, scale), in_dims in itertools.product(SHAPES[:-1], [(0, None), (None, 0), (0, 0)]):
        x, w = batched(shape, in_dims[0]), batched(scale, in_dims[1])
        with torch.profiler.profile() as profile:
            vmap(ops.rms_norm, in_dims)(x, w)
        called = {event.name for event in profile.events()}
        assert "coreai_torch::fused_rms_norm" in called
        assert "aten::rsqrt" not in called


def test_nested_vmap():
    compare(
        lambda norm: vmap(vmap(norm, (1, None)), (0, 1)), torch.randn(3, 8, 4), torch.randn(8, 3)
    )
    compare(
        lambda norm: vmap(vmap(norm, (None, 0)), (0, None)), torch.randn(3, 8), torch.ones(4, 8)
    )


def test_vmap_names_a_mistake_in_one_call():
    with pytest.raises(RuntimeError, match=r"broadcasts to the shape of input, \[8\], got shape"):
        vmap(ops.rms_norm, (0, None))(torch.randn(3, 8), torch.randn(3, 8))


def loss_of(norm):
    return lambda x, w: norm(x, w).square().sum()


@pytest.mark.parametrize(("shape", "scale"), SHAPES, ids=str)
@pytest.mark.usefixtures("no_warnings")
def test_grad_and_vjp_run_the_kernels(shape, scale):
    x, w, g = torch.randn(shape), torch.randn(scale), torch.randn(shape)
    compare(lambda norm: grad(loss_of(norm), argnums=(0, 1)), x, w)
    compare(lambda norm: lambda x, w: vjp(norm, x, w)[1](g), x, w)
    with Calls() as calls:
        grad(loss_of(ops.rms_norm), argnums=(0, 1))(x, w)
    assert calls.count(FORWARD) == calls.count(BACKWARD) == 1


def test_a_mistake_under_a_transform_leaves_nothing_behind():
    x, w = torch.randn(5, 8), torch.randn(8)
    with pytest.raises(RuntimeError, match="expected scale with last dimension 8"):
        grad(loss_of(ops.rms_norm))(x, w[:4])
    compare(lambda norm: grad(loss_of(norm), argnums=(0, 1)), x, w)


@pytest.mark.parametrize(("shape", "scale"), SHAPES[:4], ids=str)
@pytest.mark.usefixtures("no_warnings")
def test_jacobians_and_hessians(shape, scale):
    x, w = torch.randn(shape).double(), torch.randn(scale).double()
    compare(lambda norm: jacrev(norm, argnums=(0, 1)), x, w)
    compare(lambda norm: jacfwd(norm, argnums=(0, 1)), x, w)
    compare(lambda norm: grad(lambda x, w: grad(loss_of(norm))(x, w).square().sum(), (0, 1)), x, w)
    compare(lambda norm: jacrev(jacrev(loss_of(norm), argnums=(0, 1)), argnums=(0, 1)), x, w)
    compare(lambda norm: hessian(loss_of(norm), argnums=(0, 1)), x, w)


@pytest.mark.parametrize("n_heads", [None, 2])
@pytest.mark.usefixtures("no_warnings")
def test_per_sample_gradients(n_heads):
    norm = RMSNorm(8, n_heads=n_heads)
    model = nn.Sequential(nn.Linear(8, 8), norm)
    x, target = torch.randn(6, 2, 5, 8), torch.randn(6, 2, 5, 8)
    params = dict(model.named_parameters())

    def loss(params, x, target):
        return (functional_call(model, params, (x,)) - target).square().mean()

    with Calls() as calls:
        each = vmap(grad(loss), (None, 0, 0))(params, x, target)
    assert calls.count(FORWARD) == calls.count(BACKWARD) == 1
    assert each["1.weight"].shape == (6, *norm.weight.shape)
    for i in range(6):
        model.zero_grad()
        loss(params, x[i], target[i]).backward()
        for name, param in model.named_parameters():
            torch.testing.assert_close(each[name][i], param.grad)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_jvp(requires_grad):
    x, w = torch.randn(5, 8), torch.randn(8)
    tangents = (torch.randn(5, 8), torch.randn(8))
    for t in (x, w):
        t.requires_grad_(requires_grad)
    compare(lambda norm: lambda x, w: jvp(norm, (x, w), tangents), x, w)
    compare(
        lambda norm: vmap(lambda t: jvp(lambda x: norm(x, w), (x,), (t,))), torch.randn(3, 5, 8)
    )


@pytest.mark.parametrize("which", ["input", "scale", "both"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_tensors_lose_no_tangent(which, requires_grad):
    x, w = torch.randn(5, 8), torch.randn(8)
    x_tangent, w_tangent = torch.randn(5, 8), torch.randn(8)

    def tangent(norm):
        with forward_ad.dual_level():
            one, other = x.clone().requires_grad_(requires_grad), w.clone()
            one = forward_ad.make_dual(one, x_tangent) if which != "scale" else one
            other = forward_ad.make_dual(other, w_tangent) if which != "input" else other
            return forward_ad.unpack_dual(norm(one, other)).tangent

    assert tangent(ops.rms_norm) is not None
    torch.testing.assert_close(tangent(ops.rms_norm), tangent(reference.rms_norm))


def test_tangents_of_the_gradient():
    """Forward over reverse: the backward op carries tangents too."""
    x, w, v = torch.randn(5, 8), torch.randn(8), torch.randn(5, 8)
    compare(lambda norm: lambda x: jvp(grad(lambda x: loss_of(norm)(x, w)), (x,), (v,)), x)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize(("shape", "scale"), SHAPES, ids=str)
def test_double_backward(shape, scale, wanted):
    def penalty(norm):
        torch.manual_seed(0)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        w = torch.randn(scale, dtype=torch.float64, requires_grad=True)
        leaves = [t for t, asked in zip((x, w), wanted, strict=True) if asked]
        grads = torch.autograd.grad(norm(x, w).square().sum(), leaves, create_graph=True)
        sum(g.square().sum() for g in grads).backward()
        return x.grad, w.grad

    for ours, expected in zip(penalty(ops.rms_norm), penalty(reference.rms_norm), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_double_backward_is_as_accurate_as_the_reference(pair):
    """Against float64: the bar of cases.py, over many elements."""

    def second(norm, x, w, g):
        x, w, g = (t.detach().clone().requires_grad_() for t in (x, w, g))
        y = norm(x, w)
        grads = torch.autograd.grad(y, (x, w), g.to(y.dtype), create_graph=True)
        sum(grad.double().square().sum() for grad in grads).backward()
        return [t.grad.double() for t in (x, w, g)]

    x, w, g = torch.randn(500, 64).to(pair[0]), torch.randn(64).to(pair[1]), torch.randn(500, 64)
    exact = second(ops.rms_norm, x.double(), w.double(), g.double())
    ours, theirs = second(ops.rms_norm, x, w, g), second(reference.rms_norm, x, w, g)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        error, error_of_reference = (a - c).abs(), (b - c).abs()
        noise = c.numel() ** -0.5
        assert error.mean() <= (1.05 + 2 * noise) * error_of_reference.mean()
        assert error.max() <= (1.5 + 16 * noise) * error_of_reference.max()


@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_double_backward_keeps_dtypes(pair):
    x = torch.randn(5, 8, dtype=pair[0], requires_grad=True)
    w = torch.randn(8, dtype=pair[1], requires_grad=True)
    y = ops.rms_norm(x, w)
    g = torch.ones_like(y, requires_grad=True)
    grads = torch.autograd.grad(y, (x, w), g, create_graph=True)
    second = torch.autograd.grad([g.float().sum() for g in grads], (x, w, g))
    assert [t.dtype for t in second] == [x.dtype, w.dtype, g.dtype]
    assert [t.shape for t in second] == [x.shape, w.shape, g.shape]


def test_the_first_gradient_of_a_double_backward_is_the_kernels():
    x, w = torch.randn(5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    plain = torch.autograd.grad(loss_of(ops.rms_norm)(x, w), (x, w))
    with Calls() as calls:
        grads = torch.autograd.grad(loss_of(ops.rms_norm)(x, w), (x, w), create_graph=True)
    assert calls.count(BACKWARD) == 1
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))


def test_third_derivatives():
    def third(norm):
        x = torch.linspace(-1, 2, 6, dtype=torch.float64).requires_grad_()
        w = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).requires_grad_()
        value = norm(x, w).pow(3).sum()
        for _ in range(3):
            value = torch.autograd.grad(value, x, create_graph=True)[0].square().sum()
        return torch.autograd.grad(value, (x, w))

    for ours, expected in zip(third(ops.rms_norm), third(reference.rms_norm), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("scale", [(6,), (2, 1, 6), (3, 1, 4, 6)], ids=str)
def test_gradcheck_batched(scale):
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(scale, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        ops.rms_norm,
        (x, w),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        ops.rms_norm, (x, w), check_fwd_over_rev=True, check_batched_grad=True
    )


def test_a_module_under_every_transform_at_once():
    """Per-sample Hessian-vector products: vmap over forward over reverse."""
    x, w, v = torch.randn(4, 5, 8), torch.randn(8), torch.randn(4, 5, 8)

    def product(norm):
        one = lambda x, v: jvp(grad(lambda x: loss_of(norm)(x, w)), (x,), (v,))[1]  # noqa: E731
        return vmap(one)

    compare(product, x, v)


# --- checkpointing, and what is kept for backward ---------------------------------------------


def saved_bytes(function, *args):
    """The bytes of distinct storages that a call saves for backward."""
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = function(*args)
    return sum(storages.values()), result


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("scale", [(64,), (4, 1, 64)], ids=str)
def test_saved_are_input_and_scale_and_not_a_byte_more(pair, scale):
    x = torch.randn(2, 4, 100, 64, dtype=pair[0], requires_grad=True)
    w = torch.randn(scale, dtype=pair[1], requires_grad=True)
    kept, _ = saved_bytes(ops.rms_norm, x, w)
    assert kept == x.nbytes + w.nbytes


def test_saved_is_the_base_of_a_view_and_no_copy_of_it():
    base = torch.randn(2, 100, 3, 64, requires_grad=True)
    w = torch.randn(64, requires_grad=True)
    kept, _ = saved_bytes(lambda x, w: ops.rms_norm(x.transpose(1, 2)[:, 1:], w), base, w)
    assert kept == base.nbytes + w.nbytes


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    norm = RMSNorm(8)
    x = torch.randn(3, 8, requires_grad=True)
    norm(x).square().sum().backward()
    expected = x.grad.clone(), norm.weight.grad.clone()
    x.grad, norm.weight.grad = None, None
    with Calls() as calls:
        checkpoint(norm, x, use_reentrant=use_reentrant).square().sum().backward()
    assert (calls.count(FORWARD), calls.count(BACKWARD)) == (2, 1)
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(norm.weight.grad, expected[1])


@pytest.mark.parametrize(("policy", "forwards"), [("MUST_SAVE", 1), ("MUST_RECOMPUTE", 2)])
def test_selective_checkpointing_by_op(policy, forwards):
    policy = getattr(CheckpointPolicy, policy)

    def choose(ctx, op, *args, **kwargs):
        return policy if op == FORWARD else CheckpointPolicy.PREFER_RECOMPUTE

    norm = RMSNorm(8)
    x = torch.randn(3, 8, requires_grad=True)
    norm(x * 2).exp().sum().backward()
    expected = x.grad.clone()
    x.grad = None
    with Calls() as calls:
        y = checkpoint(
            lambda x: norm(x * 2).exp(),
            x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(choose),
        )
        y.sum().backward()
    assert calls.count(FORWARD) == forwards
    assert torch.equal(x.grad, expected)
