"""Conversion with Apple's converter, the real one: the norms become the composite op rms_norm."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from convert_cases import (
    ATTRIBUTES,
    DTYPES,
    EPS,
    Block,
    NormAlone,
    OwnScale,
    TwoNorms,
    calls,
    composite_graphs,
    text,
)
from coreai_torch.externalize import _patch_model_for_externalization, _subexport_and_restore
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs

from coreai_torch import ExternalizeSpec, TorchConverter, get_decomp_table
from coreai_torch.composite_ops import RMSNorm, RMSNormImpl
from coreai_torch.composite_ops import _rms_norm as apple
from coreai_torch.conversion import composites, convert

SPEC = ExternalizeSpec(
    target_class=RMSNormImpl, composite_op_name="rms_norm", composite_attrs=["axes", "eps"]
)
APPLES_SPEC = ExternalizeSpec(apple.RMSNormImpl, "rms_norm", ["axes", "eps"])
SHAPE = (2, 8, 32)


def to_coreai(
    model: nn.Module, x: Tensor, specs: list, dynamic: bool = False, strict: bool = False
):
    """As users write it, without a function of ours."""
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},) if dynamic else None

    def export(module: nn.Module) -> torch.export.ExportedProgram:
        program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=strict)
        return program.run_decompositions(get_decomp_table())

    converter = TorchConverter()
    converter.add_pytorch_module(
        model.eval(), export_fn=export, externalize_modules=specs, output_names=["y"]
    )
    return converter.to_coreai()


@pytest.mark.parametrize(
    ("dtype", "scale", "dynamic"),
    [
        *((*case.values, False) for case in DTYPES),
        pytest.param(torch.float32, torch.float32, True, marks=pytest.mark.slow),
    ],
)
def test_every_norm_becomes_a_private_graph(dtype, scale, dynamic):
    """Of a block: a weight for all positions, and a weight per head, on transposed slices.

    The converter merges equal graphs. Those of the queries and the keys are equal: their scales
    are inputs.
    """
    x = torch.randn(SHAPE, dtype=dtype)
    program = to_coreai(Block(dtype, scale), x, [SPEC], dynamic)
    graphs = composite_graphs(program)
    assert (len(graphs), calls(program)) == (2, 3)
    rows = "?x?x32" if dynamic else "2x8x32"
    heads = "?x4x?x8" if dynamic else "2x4x8x8"
    names = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    expected = {
        "norm": (f"{rows}x{names[dtype]}", f"32x{names[scale]}"),
        "q_norm": (f"{heads}x{names[dtype]}", f"4x1x8x{names[scale]}"),
    }
    for graph in graphs:
        assert graph.startswith("  coreai.graph private noinline @")
        assert (
            'composite_declaration<"rms_norm" = {input_names = ["input", "scale"], '
            f'op_attrs = {{{ATTRIBUTES}}}, output_names = ["output"]}}>'
        ) in graph
        norm = expected.pop(re.search(r"@(\w+)\.rmsnorm_impl_", graph)[1])
        inputs = re.findall(r"%arg\d: tensor<(\S+)> {coreai.name = \"(\w+)\"}", graph)
        assert inputs == [(norm[0], "input"), (norm[1], "scale")]
        # The scale is an input: the constants are single numbers, like eps.
        assert not re.search(r"coreai.constant dense<\[", graph)
    assert not expected


@pytest.mark.parametrize(("dtype", "scale"), DTYPES)
def test_a_scale_of_the_enclosing_module(dtype, scale):
    program = to_coreai(OwnScale(dtype, scale), torch.randn(4, 32, dtype=dtype), [SPEC])
    (graph,) = composite_graphs(program)
    assert 'input_names = ["input", "scale"]' in graph
    assert ATTRIBUTES in graph


def programs_of_both(ours: nn.Module, theirs: nn.Module, x: Tensor, externalized=True, **options):
    """Of a model with our norms and of the same with Apple's."""
    theirs.load_state_dict(ours.state_dict())
    specs = ([SPEC], [APPLES_SPEC]) if externalized else ([], [])
    return [
        text(to_coreai(model, x, spec, **options))
        for model, spec in zip((ours, theirs), specs, strict=True)
    ]


@pytest.mark.parametrize("externalized", [True, False])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("dtype", "scale"), DTYPES)
def test_the_program_is_that_of_apples_own_module(dtype, scale, dynamic, externalized):
    theirs = TwoNorms(scale, apple.RMSNorm)
    assert type(theirs.norm.rmsnorm_impl) is apple.RMSNormImpl
    programs = programs_of_both(
        TwoNorms(scale), theirs, torch.randn(2, 6, 4, 8, dtype=dtype), externalized, dynamic=dynamic
    )
    assert programs[0] == programs[1]
    assert programs[0].count("composite_declaration") == (2 if externalized else 0)


@pytest.mark.slow
@pytest.mark.parametrize(("dynamic", "strict"), [(False, True), (True, False)])
@pytest.mark.parametrize(("dtype", "scale"), DTYPES)
def test_a_block_is_that_with_apples_own_module(dtype, scale, dynamic, strict):
    ours, theirs = Block(dtype, scale), Block(dtype, scale, apple.RMSNorm)
    x = torch.randn(SHAPE, dtype=dtype)
    programs = programs_of_both(ours, theirs, x, dynamic=dynamic, strict=strict)
    assert programs[0] == programs[1]


@pytest.mark.parametrize(("dtype", "scale"), DTYPES)
def test_impl_is_converted_as_apples_own(dtype, scale):
    ours, theirs = OwnScale(dtype, scale), OwnScale(dtype, scale, apple.RMSNormImpl)
    programs = programs_of_both(ours, theirs, torch.randn(4, 32, dtype=dtype))
    assert programs[0] == programs[1]


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program(strict):
    """Exported by oneself, with and without composite ops."""
    x = torch.randn(SHAPE)
    model = Block(torch.float32, torch.float32).eval()

    def export() -> torch.export.ExportedProgram:
        program = torch.export.export(model, (x,), strict=strict)
        return program.run_decompositions(get_decomp_table())

    plain = TorchConverter().add_exported_program(export(), output_names=["y"]).to_coreai()
    assert not composites(plain)
    assert text(plain) == text(to_coreai(model, x, [], strict=strict))

    _patch_model_for_externalization(model, [SPEC])
    exported = export()
    graphs = _subexport_and_restore(model, exported)
    converter = TorchConverter().add_exported_program(
        exported, output_names=["y"], _externalized_exported_programs=graphs
    )
    assert text(converter.to_coreai()) == text(to_coreai(model, x, [SPEC], strict=strict))


def test_version_among_the_attributes():
    x = torch.randn(SHAPE)
    model = Block(torch.float32, torch.float32)
    spec = ExternalizeSpec(RMSNormImpl, "rms_norm", ["axes", "eps", "version"])
    assert text(to_coreai(model, x, [spec])) == text(to_coreai(model, x, [SPEC]))


def test_twice_in_one_process():
    x = torch.randn(SHAPE)
    model = Block(torch.float32, torch.float32)
    assert text(to_coreai(model, x, [SPEC])) == text(to_coreai(model, x, [SPEC]))


def test_one_norm_called_at_two_places():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = RMSNorm(32, EPS)
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(self.norm(x)))

    program = to_coreai(Twice(), torch.randn(4, 32), [SPEC])
    (graph,) = composite_graphs(program)
    assert ATTRIBUTES in graph
    assert calls(program) == 2


def test_norms_several_modules_deep():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = [Block(torch.float32, torch.float32) for _ in range(2)]
            self.layers = nn.ModuleDict({"decoder": nn.Sequential(*blocks)})

        def forward(self, x: Tensor) -> Tensor:
            return self.layers["decoder"](x)

    program = to_coreai(Stack(), torch.randn(SHAPE), [SPEC])
    assert calls(program) == 6
    assert {name.rpartition("_")[0] for name in composites(program)} == {
        "layers.decoder.0.norm.rmsnorm_impl",
        "layers.decoder.0.q_norm.rmsnorm_impl",
    }


def grad(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def names_of_nodes(y: Tensor) -> set[str]:
    """The autograd nodes that a result comes from."""
    seen, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [n for n, _ in node.next_functions]
    return {node.name() for node in seen}


def test_training_and_compiling_afterwards():
    """On the same module object, on the kernels, with the same numbers."""
    x = torch.randn(SHAPE)
    model = Block(torch.float32, torch.float32)
    before = model(x), *grad(model, x)
    to_coreai(model, x, [SPEC])
    model.train()
    after = model(x), *grad(model, x)
    assert all(map(torch.equal, before, after))
    assert any("RmsNormFunction" in name for name in names_of_nodes(model(x)))

    torch._dynamo.reset()
    backend = EagerAndRecordGraphs()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), before[0])
    (graph,) = backend.graphs
    assert str(graph.code).count("coreai_torch.fused_rms_norm") == 3
    assert torch.equal(copy.deepcopy(model)(x), before[0])


def test_training_between_marking_and_restoring():
    """A model prepared for externalization still has the same gradients."""
    x = torch.randn(SHAPE)
    model = Block(torch.float32, torch.float32)
    before = grad(model, x)
    _patch_model_for_externalization(model, [SPEC])
    marked = grad(model, x)
    exported = torch.export.export(model, (x,)).run_decompositions(get_decomp_table())
    _subexport_and_restore(model, exported)
    for a, b in zip(before, marked, strict=True):
        torch.testing.assert_close(a, b)


def test_convert_is_the_same_in_short():
    x = torch.randn(SHAPE)
    model = Block(torch.float32, torch.float32)
    program = convert(model.eval(), (x,), output_names=["y"])
    assert text(program) == text(to_coreai(model, x, [SPEC]))
    found = composites(program)
    assert {name.partition(".")[0] for name in found} == {"norm", "q_norm"}
    assert all(ATTRIBUTES in declaration for declaration in found.values())

    dim = torch.export.Dim("batch")
    dynamic = convert(model, (x,), dynamic_shapes=({0: dim},), input_names=["tokens"])
    assert '%arg0: tensor<?x8x32xf32> {coreai.name = "tokens"}' in str(dynamic)
    assert not composites(convert(model, (x,), externalize_modules=[]))
    assert text(convert(model, (x,), externalize_modules=[SPEC], output_names=["y"])) == text(
        program
    )


def test_a_norm_as_the_root_module():
    x = torch.randn(4, 32)
    with pytest.raises(ValueError, match="among its submodules, got a RMSNormImpl itself"):
        convert(RMSNormImpl(), (x, torch.ones(32)))
    # RMSNorm has the RMSNormImpl as a submodule.
    assert len(composites(convert(RMSNorm(32), (x,)))) == 1


def test_attributes_that_the_class_does_not_have():
    model = NormAlone(torch.float32, 32, None)
    spec = ExternalizeSpec(RMSNormImpl, "rms_norm", ["axes", "epsilon"])
    with pytest.raises(ValueError, match=r"got 'epsilon'; it has axes, eps and version"):
        convert(model, (torch.randn(4, 32),), externalize_modules=[spec])


def test_a_path_that_the_converter_cannot_use():
    model = nn.Sequential(nn.Linear(32, 32), RMSNorm(32))
    with pytest.raises(ValueError, match=r"begins with a letter, got '1.rmsnorm_impl'"):
        convert(model, (torch.randn(4, 32),))
    named = nn.ModuleDict({"model": model})
    named.forward = lambda x: named["model"](x)
    assert len(composites(convert(named, (torch.randn(4, 32),)))) == 1
