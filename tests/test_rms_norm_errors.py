"""The error contract: every message names the argument, what was expected and what was given, and
says the same from the kernels, the fake kernels and the reference."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

from coreai_torch import _C, ops, reference
from coreai_torch.backends import cpu
from coreai_torch.composite_ops import RMSNorm, RMSNormImpl

X, W = torch.randn(2, 3, 8), torch.randn(8)

MISTAKES = {
    "0-d input": (
        (torch.tensor(1.0), W, 1e-5),
        RuntimeError,
        "expected input with at least one dimension, got shape []",
    ),
    "integer input": (
        (torch.ones(2, 8, dtype=torch.int64), W, 1e-5),
        NotImplementedError,
        "expected input of dtype float64, float32, float16 or bfloat16, got torch.",
    ),
    "complex scale": (
        (X, W.to(torch.complex64), 1e-5),
        NotImplementedError,
        "expected scale of dtype float64, float32, float16 or bfloat16, got torch.",
    ),
    "scale of another width": (
        (X, torch.ones(4), 1e-5),
        RuntimeError,
        "expected scale with last dimension 8 (the last dimension of input), got shape [4]",
    ),
    "scale of width 1": (
        (X, torch.ones(1), 1e-5),
        RuntimeError,
        "expected scale with last dimension 8 (the last dimension of input), got shape [1]",
    ),
    "0-d scale": (
        (X, torch.tensor(1.0), 1e-5),
        RuntimeError,
        "expected scale with last dimension 8 (the last dimension of input), got shape []",
    ),
    "wrong number of heads": (
        (X, torch.ones(5, 1, 8), 1e-5),
        RuntimeError,
        "expected scale that broadcasts to the shape of input, [2, 3, 8], got shape [5, 1, 8]",
    ),
    "scale with more dimensions": (
        (X, torch.ones(1, 1, 1, 8), 1e-5),
        RuntimeError,
        "expected scale that broadcasts to the shape of input, [2, 3, 8], got shape [1, 1, 1, 8]",
    ),
    "negative eps": ((X, W, -1.0), ValueError, "expected eps >= 0, got -1"),
    "eps not a number": ((X, W, float("nan")), ValueError, "expected eps >= 0, got nan"),
    "sparse input": (
        (torch.eye(8).to_sparse(), W, 1e-5),
        RuntimeError,
        "expected input to be a dense tensor, got layout ",
    ),
    "another device": (
        (X, W.to("meta"), 1e-5),
        RuntimeError,
        "expected scale on the device of input, cpu, got meta; move one of them with .to()",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("function", [ops.rms_norm, reference.rms_norm])
def test_mistakes(mistake, function):
    arguments, kind, message = mistake
    with pytest.raises(kind, match=re.escape("rms_norm: " + message)):
        function(*arguments)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_a_traced_call(mistake):
    arguments, kind, message = mistake
    if arguments[0].layout != torch.strided or arguments[1].device != arguments[0].device:
        pytest.skip("fake tensors stop it before our code sees it")
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        with pytest.raises(kind, match=re.escape("rms_norm: " + message)):
            ops.rms_norm(*fakes)


GRADIENTS = {
    "shape": (torch.ones(2, 8), "with the shape of the output, [2, 3, 8], got shape [2, 8]"),
    "dtype": (
        torch.ones(2, 3, 8).double(),
        "of the output's dtype, torch.float32, got torch.float64",
    ),
    "device": (torch.ones(2, 3, 8, device="meta"), "on the device of input, cpu, got meta"),
    "layout": (torch.ones(2, 3, 8).to_sparse(), "to be a dense tensor, got layout Sparse"),
}


@pytest.mark.parametrize(("grad", "message"), GRADIENTS.values(), ids=GRADIENTS)
def test_wrong_gradient(grad, message):
    with pytest.raises(RuntimeError, match=re.escape(f"rms_norm: expected grad_output {message}")):
        torch.ops.coreai_torch.fused_rms_norm_backward(grad, X, W, 1e-5, [True, True])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "expected dim > 0, got 0"),
        ({"dim": -3}, "expected dim > 0, got -3"),
        ({"dim": 8, "n_heads": 0}, "expected n_heads > 0, got 0"),
        ({"dim": 8, "eps": -1.0}, "expected eps >= 0, got -1.0"),
        ({"dim": 8, "eps": float("nan")}, "expected eps >= 0, got nan"),
    ],
)
def test_wrong_constructor_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape("rms_norm: " + message)):
        RMSNorm(**arguments)


def test_eps_of_zero_is_valid():
    assert torch.equal(RMSNormImpl(eps=0)(X, W), reference.rms_norm(X, W, 0))


def test_unknown_level():
    with pytest.raises(ValueError, match=r"expected name to be one of .*, got avx9000"):
        cpu.set_level("avx9000")


@pytest.mark.skipif(_C.build_info()["cuda_version"], reason="this build has CUDA kernels")
def test_cuda_without_cuda_kernels():
    """On the dispatcher's CUDA key, as a CUDA tensor would come, which no machine need have."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    op = torch.ops.coreai_torch.fused_rms_norm.default
    with pytest.raises(NotImplementedError, match="coreai_torch was built without CUDA kernels"):
        op.redispatch(keys, X, W, 1e-5)
