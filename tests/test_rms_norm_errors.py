"""The error contract: every message names the argument, what was expected and what was given, and
says the same from the kernels, the fake kernels and the reference."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

from coreai_torch import (
    _C,
    get_compile_mode,
    ops,
    reference,
    replace_rms_norm,
    restore_rms_norm,
    set_compile_mode,
)
from coreai_torch._externalize_spec import ExternalizeSpec
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
    "nested input": (
        (torch.nested.nested_tensor([X[0], X[0]]), W, 1e-5),
        RuntimeError,
        "expected input to be a dense tensor, got a nested tensor; convert it with "
        ".to_padded_tensor()",
    ),
    "no input": ((None, W, 1e-5), TypeError, "expected input to be a tensor, got None"),
    "no scale": ((X, None, 1e-5), TypeError, "expected scale to be a tensor, got None"),
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
    input, scale = arguments[:2]
    if input is None or scale is None or input.is_nested:
        pytest.skip("there is no such fake tensor")
    if input.layout != torch.strided or scale.device != input.device:
        pytest.skip("fake tensors stop it before our code sees it")
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        with pytest.raises(kind, match=re.escape("rms_norm: " + message)):
            ops.rms_norm(*fakes)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("name", ["rms_norm", "fused_rms_norm"])
def test_mistakes_in_calls_of_the_ops(mistake, name):
    """With a gradient wanted, too: autograd comes first then."""
    arguments, kind, message = mistake
    grad = torch.ones_like(X, requires_grad=True)
    with pytest.raises(kind, match=re.escape("rms_norm: " + message)):
        getattr(torch.ops.coreai_torch, name)(*arguments)
    with pytest.raises(kind, match=re.escape("rms_norm: " + message)):
        torch.ops.coreai_torch.fused_rms_norm_backward(grad, *arguments, [True, True])


GRADIENTS = {
    "shape": (torch.ones(2, 8), "with the shape of the output, [2, 3, 8], got shape [2, 8]"),
    "dtype": (
        torch.ones(2, 3, 8).double(),
        "of the output's dtype, torch.float32, got torch.float64",
    ),
    "device": (torch.ones(2, 3, 8, device="meta"), "on the device of input, cpu, got meta"),
    "layout": (torch.ones(2, 3, 8).to_sparse(), "to be a dense tensor, got layout Sparse"),
}


def test_no_gradient():
    message = re.escape("rms_norm: expected grad_output to be a tensor, got None")
    for scale in (W, W.clone().requires_grad_()):
        with pytest.raises(TypeError, match=message):
            torch.ops.coreai_torch.fused_rms_norm_backward(None, X, scale, 1e-5, [True, True])


@pytest.mark.parametrize("value", ["1", [1e-5], 1j, None])
def test_eps_of_another_type(value):
    message = re.escape(f"rms_norm: expected eps to be a number, got {value!r}")
    for function in (lambda: reference.rms_norm(X, W, value), lambda: RMSNormImpl(value)):
        with pytest.raises(TypeError, match=message):
            function()
    with pytest.raises(RuntimeError, match="Expected a value of type 'float' for argument 'eps'"):
        ops.rms_norm(X, W, value)


@pytest.mark.parametrize("function", [ops.rms_norm, reference.rms_norm, RMSNorm(8)])
@pytest.mark.parametrize("value", [3.0, [1.0], "x"])
def test_input_of_another_type(function, value):
    arguments = (value,) if isinstance(function, RMSNorm) else (value, W)
    message = "expected input to be a tensor, got|Expected a value of type 'Tensor' for argument"
    with pytest.raises((TypeError, RuntimeError), match=message):
        function(*arguments)


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


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"dim": 8.0}, TypeError, "expected dim to be an int, got 8.0"),
        ({"dim": "8"}, TypeError, "expected dim to be an int, got '8'"),
        ({"dim": None}, TypeError, "expected dim to be an int, got None"),
        ({"dim": True}, TypeError, "expected dim to be an int, got True"),
        ({"dim": [8]}, TypeError, "expected dim to be an int, got [8]"),
        ({"dim": 8, "n_heads": 2.0}, TypeError, "expected n_heads to be an int, got 2.0"),
        ({"dim": 8, "eps": "x"}, TypeError, "expected eps to be a number, got 'x'"),
        (
            {"dim": 8, "dtype": torch.int32},
            NotImplementedError,
            "expected dtype to be float64, float32, float16 or bfloat16, got torch.int32",
        ),
        (
            {"dim": 8, "dtype": torch.complex64},
            NotImplementedError,
            "expected dtype to be float64, float32, float16 or bfloat16, got torch.complex64",
        ),
    ],
)
def test_constructor_arguments_of_another_type(arguments, kind, message):
    with pytest.raises(kind, match=re.escape("rms_norm: " + message)):
        RMSNorm(**arguments)


def test_eps_of_zero_is_valid():
    assert torch.equal(RMSNormImpl(eps=0)(X, W), reference.rms_norm(X, W, 0))


@pytest.mark.parametrize("name", ["avx9000", "", 3, ["x86-64"], "x86-64\0"])
def test_unknown_level(name):
    before = cpu.get_level()
    with pytest.raises(ValueError, match=r"expected name to be one of .*, got ") as raised:
        cpu.set_level(name)
    assert str(raised.value).endswith(f"got {name}")
    with pytest.raises(ValueError, match="expected name to be one of"), cpu.level(name):
        pass
    assert cpu.get_level() == before


@pytest.mark.parametrize("mode", ["fast", None, 3, ["kernel"]])
def test_unknown_compile_mode(mode):
    before = get_compile_mode()
    with pytest.raises(ValueError, match="set_compile_mode: expected mode to be one of 'kernel'"):
        set_compile_mode(mode)
    assert get_compile_mode() == before


@pytest.mark.parametrize("function", [replace_rms_norm, restore_rms_norm])
@pytest.mark.parametrize("model", [None, 3, torch.nn.Linear, [torch.nn.Linear(2, 2)]])
def test_a_model_that_is_none(function, model):
    with pytest.raises(TypeError, match=r"expected model to be a torch.nn.Module, got \w+"):
        function(model)


def test_only_that_is_no_function():
    message = "replace_rms_norm: expected only to be a function, got str"
    with pytest.raises(TypeError, match=message):
        replace_rms_norm(torch.nn.Linear(2, 2), only="norm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "expected target_class to be a class, got 3"),
        ((RMSNorm(8),), "expected target_class to be a class, got RMSNorm("),
        ((RMSNormImpl, "rms_norm", "eps"), "expected composite_attrs to be a list of names, got "),
    ],
)
def test_wrong_externalize_spec(arguments, message):
    with pytest.raises(TypeError, match=re.escape("ExternalizeSpec: " + message)):
        ExternalizeSpec(*arguments)


@pytest.mark.skipif(_C.build_info()["cuda_version"], reason="this build has CUDA kernels")
def test_cuda_without_cuda_kernels():
    """On the dispatcher's CUDA key, as a CUDA tensor would come, which no machine need have."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    op = torch.ops.coreai_torch.fused_rms_norm.default
    with pytest.raises(NotImplementedError, match="coreai_torch was built without CUDA kernels"):
        op.redispatch(keys, X, W, 1e-5)
