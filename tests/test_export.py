"""torch.export, AOTInductor and ONNX."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from cases import DTYPES, FLOATS, names
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import coreai_torch
from coreai_torch import ops, reference
from coreai_torch.composite_ops import RMSNorm

NODE = "coreai_torch.rms_norm.default"


class TwoNorms(nn.Module):
    """The two kinds of weight, and a choice of implementation."""

    def __init__(self, norm=ops.rms_norm) -> None:
        super().__init__()
        self.norm = norm
        self.first = nn.Parameter(torch.randn(8))
        self.second = nn.Parameter(torch.randn(2, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.norm(x, self.first).unflatten(-1, (2, 4)).transpose(1, 2)
        return self.norm(heads, self.second, 1e-6)


class Modules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = RMSNorm(8), RMSNorm(4, eps=1e-6, n_heads=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).unflatten(-1, (2, 4)).transpose(1, 2))


def called(program: ExportedProgram) -> list[str]:
    """The operators in order, without the assertions that export puts in front of casts."""
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    return [name for name in names if name != "aten._assert_tensor_metadata.default"]


def dynamic():
    return ({0: Dim("batch"), 1: Dim("length")},)


@pytest.mark.parametrize("dynamic_shapes", [None, dynamic()], ids=["static", "dynamic"])
@pytest.mark.parametrize("strict", [False, True])
def test_one_visible_node(strict, dynamic_shapes):
    model, x = Modules(), torch.randn(3, 5, 8)
    program = export(model, (x,), dynamic_shapes=dynamic_shapes, strict=strict)
    nodes = [node for node in program.graph.nodes if str(node.target) == NODE]
    assert len(nodes) == 2
    assert all(len(node.all_input_nodes) == 2 for node in nodes)
    assert nodes[1].args[2] == 1e-6
    weights = [program.graph_signature.inputs_to_parameters[n.args[1].name] for n in nodes]
    assert weights == ["first.weight", "second.weight"]
    assert torch.equal(program.module()(x), model(x))
    if dynamic_shapes:
        x = torch.randn(7, 4, 8)
        assert torch.equal(program.module()(x), model(x))


def test_an_exported_program_trains_on_the_kernels():
    model, x = TwoNorms(), torch.randn(3, 5, 8)
    exported = export(model, (x,)).module()
    y = exported(x)
    assert "RmsNormFunction" in y.grad_fn.name()
    y.square().sum().backward()
    model(x).square().sum().backward()
    for ours, expected in zip(exported.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)


@pytest.mark.parametrize("strict", [False, True])
def test_decomposed_it_is_the_reference_s_program(strict):
    x = torch.randn(3, 5, 8)
    ours, expected = (
        export(TwoNorms(norm), (x,), dynamic_shapes=dynamic(), strict=strict).run_decompositions()
        for norm in (ops.rms_norm, reference.rms_norm)
    )
    assert called(ours) == called(expected)
    assert all(name.startswith("aten.") for name in called(ours))
    for shape in ((3, 5, 8), (6, 2, 8)):
        y = torch.randn(shape)
        model = TwoNorms()
        model.load_state_dict(ours.state_dict)
        assert torch.equal(ours.module()(y), model(y))


@pytest.mark.parametrize("pair", list(itertools.product(DTYPES, DTYPES)), ids=names)
def test_decomposed_every_pair_of_dtypes(pair):
    class Norm(nn.Module):
        def forward(self, x, w):
            return ops.rms_norm(x, w)

    x, w = torch.randn(3, 8).to(pair[0]), torch.randn(8).to(pair[1])
    program = export(Norm(), (x, w))
    assert called(program) == [NODE]
    assert torch.equal(program.run_decompositions().module()(x, w), ops.rms_norm(x, w))


def test_save_and_load(tmp_path):
    model, x = Modules(), torch.randn(3, 5, 8)
    torch.export.save(export(model, (x,), dynamic_shapes=dynamic()), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert called(loaded).count(NODE) == 2
    assert torch.equal(loaded.module()(x), model(x))


def test_load_where_nothing_is_known_but_the_package(tmp_path):
    model, x = Modules(), torch.ones(3, 5, 8)
    torch.export.save(export(model, (x,)), tmp_path / "model.pt2")
    torch.save(model(x).detach(), tmp_path / "expected.pt")
    program = (
        "import torch, coreai_torch\n"
        "y = torch.export.load('model.pt2').module()(torch.ones(3, 5, 8))\n"
        "assert torch.equal(y, torch.load('expected.pt'))\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kernel", "decompose"])
def test_aot_inductor(mode, tmp_path):
    """A package with the kernels, or with the compiler's own code where that is asked for."""
    coreai_torch.set_compile_mode(mode)
    try:
        model, x = Modules(), torch.randn(3, 5, 8)
        shapes = ({0: Dim("batch", min=2, max=64)},)
        program = export(model, (x,), dynamic_shapes=shapes)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
    finally:
        coreai_torch.set_compile_mode("auto")
    package = torch._inductor.aoti_load_package(path)
    for batch in (3, 9):
        x = torch.randn(batch, 5, 8)
        with torch.profiler.profile() as profile:
            y = package(x)
        torch.testing.assert_close(y, model(x).detach())
        kernels = [e for e in profile.events() if e.name == "coreai_torch::fused_rms_norm"]
        assert len(kernels) == (2 if mode == "kernel" else 0)


# --- ONNX -------------------------------------------------------------------------------------


class OneNorm(nn.Module):
    def __init__(self, shape, dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.scale, 1e-5)


def to_onnx(model: nn.Module, x: Tensor, **options):
    pytest.importorskip("onnxscript")
    return torch.onnx.export(
        model, (x,), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False, **options
    )


def run_onnx(program, x: Tensor) -> Tensor:
    """By ONNX Runtime; it has no bfloat16 on the CPU, which the evaluator of ONNX itself has."""
    if x.dtype != torch.bfloat16:
        pytest.importorskip("onnxruntime")
        return program(x)[0]
    onnx = pytest.importorskip("onnx.reference")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    evaluator = onnx.ReferenceEvaluator(program.model_proto)
    value = x.float().numpy().astype(ml_dtypes.bfloat16)
    (y,) = evaluator.run(None, {program.model.graph.inputs[0].name: value})
    dtype = {"bfloat16": torch.bfloat16}.get(str(y.dtype)) or getattr(torch, str(y.dtype))
    return torch.from_numpy(y.astype("float64")).to(dtype)


PAIRS = list(itertools.product(DTYPES, DTYPES))
QUICK = (torch.float32, torch.float32), (torch.float16, torch.float32)


@pytest.mark.parametrize("scale", [(8,), (3, 1, 8)], ids=str)
@pytest.mark.parametrize(
    "pair",
    [pytest.param(p, marks=() if p in QUICK else pytest.mark.slow) for p in PAIRS],
    ids=names,
)
def test_onnx_standard_operator(pair, scale):
    from coreai_torch.onnx import translation_table

    model, x = OneNorm(scale, pair[1]), torch.randn(2, 3, 5, 8).to(pair[0])
    program = to_onnx(model, x, opset_version=23, custom_translation_table=translation_table())
    operators = [node.op_type for node in program.model.graph]
    assert operators.count("RMSNormalization") == 1
    assert set(operators) <= {"RMSNormalization", "Cast", "ConstantOfShape", "Mul"}
    simple = scale == (8,) and (pair[0] == pair[1] or pair[0] in (torch.float32, torch.float64))
    if simple and torch.promote_types(*pair) == pair[0]:
        assert operators == ["RMSNormalization"]

    x = torch.randn(4, 3, 5, 8).to(pair[0])
    expected, y = model(x).detach(), run_onnx(program, x)
    assert y.dtype == expected.dtype
    # The runtime may round once less than the standard says; eps is a float32 in ONNX.
    ulp = max(torch.finfo(dtype).eps for dtype in (pair[0], expected.dtype))
    torch.testing.assert_close(y, expected, rtol=max(2 * ulp, 1e-10), atol=max(2 * ulp, 1e-10))


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=names)
def test_onnx_plain_operators_before_opset_23(dtype):
    model, x = OneNorm((3, 1, 8), torch.float32), torch.randn(2, 3, 5, 8).to(dtype)
    program = to_onnx(model, x, opset_version=18)
    operators = {node.op_type for node in program.model.graph}
    assert "RMSNormalization" not in operators
    assert {"ReduceMean", "Mul"} <= operators
    assert program.model.graph.opset_imports[""] == 18
    assert {node.domain for node in program.model.graph} == {""}
    torch.testing.assert_close(run_onnx(program, x), model(x).detach())
