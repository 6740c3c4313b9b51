"""torch.compile: whole graphs, no recompilation for rows, the switch between kernel and formula."""

from __future__ import annotations

import pytest
import torch
from cases import PAIRS, names, with_gradients
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import coreai_torch
from coreai_torch import _C, ops, reference
from coreai_torch.composite_ops import RMSNorm

KERNEL = "coreai_torch.fused_rms_norm.default"
BACKWARD = "coreai_torch.fused_rms_norm_backward.default"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    coreai_torch.set_compile_mode("auto")
    torch._dynamo.reset()


class TwoNorms(nn.Module):
    """The two kinds of weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = RMSNorm(8), RMSNorm(4, n_heads=2)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.first(x).view(-1, 5, 2, 4).transpose(1, 2)
        return self.second(heads)


class Graphs:
    """A backend that runs the traced graphs as they are, and notes what they call."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.backend = aot_autograd(fw_compiler=self._note, bw_compiler=self._note)

    def _note(self, graph, _):
        self.called.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward


def trained(model: nn.Module, function, x: Tensor) -> list[Tensor]:
    """Output and gradients after one backward."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", ["kernel", "auto"])
def test_kernels_both_ways_in_one_graph(mode, dynamic):
    coreai_torch.set_compile_mode(mode)
    graphs, model, x = Graphs(), TwoNorms(), torch.randn(3, 5, 8)
    compiled = torch.compile(model, backend=graphs.backend, fullgraph=True, dynamic=dynamic)
    ours, expected = trained(model, compiled, x), trained(model, model, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert graphs.called.count(KERNEL) == 2
    assert graphs.called.count(BACKWARD) == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_formula_in_one_graph(dynamic):
    coreai_torch.set_compile_mode("decompose")
    graphs, model, x = Graphs(), TwoNorms(), torch.randn(3, 5, 8)
    compiled = torch.compile(model, backend=graphs.backend, fullgraph=True, dynamic=dynamic)
    ours, expected = trained(model, compiled, x), trained(model, model, x)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert "aten.rsqrt.default" in graphs.called
    assert not [name for name in graphs.called if name.startswith("coreai_torch")]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kernel", "decompose"])
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_inductor_s_code(pair, mode):
    """With the neighbours that it fuses: a residual add before, a gate and a cast after."""
    coreai_torch.set_compile_mode(mode)

    def layer(norm):
        def call(x, w, eps):
            return (norm(x + x.sin(), w, eps) * x.sigmoid()).to(x.dtype)

        return call

    x, w, g = torch.randn(33, 96).to(pair[0]), torch.randn(96).to(pair[1]), torch.randn(33, 96)
    compiled = torch.compile(layer(ops.rms_norm), fullgraph=True)
    exact = with_gradients(layer(reference.rms_norm), x.double(), w.double(), g, 1e-5)
    ours = with_gradients(compiled, x, w, g, 1e-5)
    eager = with_gradients(layer(reference.rms_norm), x, w, g, 1e-5)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max()


@pytest.mark.parametrize("mode", ["kernel", "decompose"])
def test_no_recompilation_for_rows(mode):
    """With dynamic=True one graph serves all; by default the second number of rows makes the rows
    dynamic, and from then on one graph serves all."""
    coreai_torch.set_compile_mode(mode)
    for dynamic, graphs in ((True, 1), (None, 2)):
        torch._dynamo.reset()
        norm, counter = RMSNorm(8), CompileCounter()
        compiled = torch.compile(norm, backend=counter, fullgraph=True, dynamic=dynamic)
        for rows in (3, 5, 17, 64, 1000):
            compiled(torch.randn(rows, 8))
        assert counter.frame_count == graphs


@torch._dynamo.config.patch(error_on_recompile=True)
def test_no_recompilation_for_rows_in_training():
    model = TwoNorms()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 4, 17, 64):
        x = torch.randn(rows, 5, 8)
        ours, expected = trained(model, compiled, x), trained(model, model, x)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    with pytest.raises(RuntimeError, match="Recompiling"):
        compiled(torch.randn(3, 5, 8).double())


def test_mark_dynamic():
    norm, counter = RMSNorm(8), CompileCounter()
    compiled = torch.compile(norm, backend=counter, fullgraph=True)
    for rows in (3, 5, 17):
        x = torch.randn(rows, 8)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), norm(x))
    assert counter.frame_count == 1


def test_no_graph_break():
    explanation = torch._dynamo.explain(TwoNorms())(torch.randn(3, 5, 8))
    assert explanation.graph_count == 1
    assert explanation.graph_break_count == 0


def test_a_change_of_mode_is_seen_by_compiled_code():
    norm, graphs, x = RMSNorm(8), Graphs(), torch.randn(3, 8)
    compiled = torch.compile(norm, backend=graphs.backend, fullgraph=True)
    seen = []
    for mode in ("kernel", "decompose", "kernel", "decompose"):
        coreai_torch.set_compile_mode(mode)
        assert coreai_torch.get_compile_mode() == mode
        graphs.called.clear()
        compiled(x)
        seen.append(list(graphs.called))
    assert KERNEL in seen[0]
    assert "aten.rsqrt.default" in seen[1]
    assert seen[2:] == [[], []]  # both are kept


def test_the_mode_does_not_matter_without_compilation():
    coreai_torch.set_compile_mode("decompose")
    y = ops.rms_norm(torch.randn(3, 8, requires_grad=True), torch.randn(8))
    assert "RmsNormFunction" in y.grad_fn.name()


def test_unknown_mode():
    with pytest.raises(ValueError, match="one of 'kernel', 'decompose', 'auto', got 'fast'"):
        coreai_torch.set_compile_mode("fast")
    assert coreai_torch.get_compile_mode() == "auto"


def test_checkpointing_inside_a_compiled_model():
    model, graphs, x = TwoNorms(), Graphs(), torch.randn(3, 5, 8)
    compiled = torch.compile(
        lambda x: checkpoint(model, x, use_reentrant=False),
        backend=graphs.backend,
        fullgraph=True,
    )
    ours, expected = trained(model, compiled, x), trained(model, model, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert BACKWARD in graphs.called


def test_transforms_inside_a_compiled_function():
    x, w = torch.randn(6, 5, 8), torch.randn(8)
    loss = lambda w, x: ops.rms_norm(x, w).square().sum()  # noqa: E731
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))
    compiled = torch.compile(each, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(w, x), each(w, x))


def test_compiled_autograd():
    """The backward of an eager forward, compiled: the op is seen and not stepped over."""
    graphs = Graphs()
    x, w = torch.randn(5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    ops.rms_norm(x, w).square().sum().backward()
    expected = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    compiler = torch.compile(backend=graphs.backend, fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        ops.rms_norm(x, w).square().sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(w.grad, expected[1])
    assert BACKWARD in graphs.called


@pytest.mark.skipif(
    not (torch.cuda.is_available() and _C.build_info()["cuda_version"] is not None),
    reason="needs the CUDA kernels",
)
def test_reduce_overhead_replays_cuda_graphs():
    norm = RMSNorm(1024, device="cuda")
    compiled = torch.compile(norm, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(64, 1024, device="cuda")
        ours, expected = trained(norm, compiled, x), trained(norm, norm, x)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
