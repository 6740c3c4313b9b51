"""The ops are called past `torch.ops` where nobody looks on, and through it where somebody does."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from coreai_torch import ops

fused = torch.ops.coreai_torch

OPS = {
    "rms_norm": (ops.rms_norm, fused.fused_rms_norm.default, 1),
    "add_rms_norm": (ops.add_rms_norm, fused.fused_add_rms_norm.default, 2),
}
each_op = pytest.mark.parametrize(("function", "op", "inputs"), OPS.values(), ids=OPS)


def arguments(inputs):
    return [*(torch.randn(3, 8) for _ in range(inputs)), torch.randn(8)]


@pytest.fixture
def seen():
    return []


@each_op
@pytest.mark.parametrize("base", [TorchFunctionMode, TorchDispatchMode])
def test_modes_see_the_op(function, op, inputs, base, seen):
    handler = "__torch_function__" if base is TorchFunctionMode else "__torch_dispatch__"

    def handle(self, func, types, args=(), kwargs=None):
        seen.append(func)
        return func(*args, **(kwargs or {}))

    with type("Mode", (base,), {handler: handle})():
        function(*arguments(inputs))
    assert op in seen


@each_op
def test_subclasses_see_the_op(function, op, inputs, seen):
    class Subclass(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    args = [tensor.as_subclass(Subclass) for tensor in arguments(inputs)]
    seen.clear()
    results = function(*args)
    assert op in seen
    results = results if isinstance(results, tuple) else (results,)
    assert all(type(result) is Subclass for result in results)


@each_op
def test_a_parameter_and_a_subclass_without_a_function_of_its_own(function, op, inputs):
    class Plain(torch.nn.Parameter):
        __torch_function__ = torch._C._disabled_torch_function_impl

    *tensors, scale = arguments(inputs)
    expected = function(*tensors, scale)
    for kind in (torch.nn.Parameter, Plain):
        results = function(*tensors, kind(scale, requires_grad=False))
        torch.testing.assert_close(results, expected, rtol=0, atol=0)


@each_op
def test_eps_that_is_no_float(function, op, inputs):
    args = arguments(inputs)
    torch.testing.assert_close(function(*args, 1), function(*args, 1.0), rtol=0, atol=0)
    assert function(*args, True) is not None
    with pytest.raises(RuntimeError, match="eps"):
        function(*args, "1e-5")


@each_op
def test_what_is_no_tensor(function, op, inputs):
    with pytest.raises((RuntimeError, TypeError), match="input"):
        function(*[[1.0]] * inputs, torch.ones(1))
    with pytest.raises(RuntimeError, match="scale"):
        function(*arguments(inputs)[:-1], [1.0])


@each_op
def test_errors_have_their_types(function, op, inputs):
    *tensors, scale = arguments(inputs)
    with pytest.raises(ValueError, match="eps"):
        function(*tensors, scale, -1.0)
    with pytest.raises(NotImplementedError, match="dtype"):
        function(*tensors, scale.int())
    with pytest.raises(RuntimeError, match="scale"):
        function(*tensors, torch.randn(9))


@each_op
def test_jit_trace(function, op, inputs):
    args = tuple(arguments(inputs))
    traced = torch.jit.trace(lambda *args: function(*args), args)
    assert op._schema.name in str(traced.graph)
    torch.testing.assert_close(traced(*args), function(*args), rtol=0, atol=0)


@each_op
def test_symbolic_trace(function, op, inputs):
    if inputs == 2:
        pytest.skip("asks for shapes, which a symbol has not")
    graph = torch.fx.symbolic_trace(lambda x, w: function(x, w)).graph
    assert op in {node.target for node in graph.nodes}


@each_op
def test_references_are_released(function, op, inputs):
    args = arguments(inputs)
    before = [sys.getrefcount(arg) for arg in args]
    for _ in range(10):
        function(*args)
        with pytest.raises(ValueError, match="eps"):
            function(*args, -1.0)
    assert [sys.getrefcount(arg) for arg in args] == before
