"""Converted programs in Core AI's runtime, the real one, beside eager PyTorch.

Inputs are random, and so are scales: with ones, a lost or misplaced scale would not show.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from convert_cases import DTYPES, Block, NormAlone, OwnScale
from torch import Tensor, nn

from coreai_torch.conversion import composites, convert, load


@pytest.fixture
def run_in_runtime(tmp_path):
    """Converts, saves, loads and runs a model with one input and one output."""

    def run(model: nn.Module, x: Tensor, *others: Tensor, **options: object) -> list[Tensor]:
        program = convert(model.eval(), (x,), input_names=["x"], output_names=["y"], **options)
        program.save_asset(tmp_path / "model.aimodel")
        with load(tmp_path / "model.aimodel") as function:
            return [function(x=each)["y"] for each in (x, *others)]

    return run


def ulps_apart(a: Tensor, b: Tensor) -> int:
    """The largest number of representable values between two tensors' elements."""
    assert a.dtype == b.dtype
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    sign = torch.iinfo(bits).max
    ordinals = [t.view(bits).long() for t in (a, b)]
    ordinals = [torch.where(i < 0, -(i & sign), i) for i in ordinals]
    return int((ordinals[0] - ordinals[1]).abs().max())


def allowed_ulps(dtype: torch.dtype, scale: torch.dtype, dim: int) -> float:
    """How far the runtime's norm may be from eager's, in units in the last place.

    The runtime adds squares one after another, so that the error of its sum grows with the root of
    their number, and eager PyTorch's does not. That shows in float32. What is rounded to 16 bits
    once may fall on the other side of a tie: one unit. What is rounded, multiplied by the scale and
    rounded again may be two units away, but from so few rounding ties that it takes a large tensor.
    """
    if dtype == torch.float32:
        return 4 + math.sqrt(dim) / 2
    return 1 if scale == torch.float32 or dim <= 64 else 2


@pytest.mark.parametrize(
    ("dim", "heads", "externalized"),
    [(64, None, True), (64, 8, True), (33, None, True), (64, 8, False)],
)
@pytest.mark.parametrize(("dtype", "scale"), DTYPES)
def test_the_norm_alone(run_in_runtime, dtype, scale, dim, heads, externalized):
    model = NormAlone(scale, dim, heads)
    x = torch.randn(2, 8, 16, dim).mul(3).to(dtype)
    (y,) = run_in_runtime(model, x, **({} if externalized else {"externalize_modules": []}))
    expected = model(x).detach()
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    assert ulps_apart(y, expected) <= allowed_ulps(dtype, scale, dim)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [None, 8])
@pytest.mark.parametrize("dim", [1, 8, 1024, 4096])
@pytest.mark.parametrize(("dtype", "scale"), DTYPES)
def test_the_norm_alone_at_other_sizes(run_in_runtime, dtype, scale, dim, heads):
    test_the_norm_alone(run_in_runtime, dtype, scale, dim, heads, True)


@pytest.mark.parametrize(("dtype", "scale"), DTYPES)
def test_a_block(run_in_runtime, dtype, scale):
    """Within the rounding of its matrix products, some units of the largest results' last place."""
    model = Block(dtype, scale, dim=64)
    exact = Block(torch.float64, torch.float64, dim=64)
    exact.load_state_dict(model.state_dict())
    x = torch.randn(2, 16, 64, dtype=dtype)
    (y,) = run_in_runtime(model, x)
    expected = exact(x.double()).detach()
    assert y.dtype == dtype
    unit = torch.finfo(dtype).eps * expected.abs().max()
    assert (y - expected).abs().max() <= 4 * unit
    assert (y - model(x)).abs().max() <= 4 * unit


def test_after_training(run_in_runtime):
    """The scales that training made, of a module that owns one and of a block."""
    for model, x in (
        (OwnScale(torch.float32, torch.float32), torch.randn(16, 32)),
        (Block(torch.float32, torch.float32), torch.randn(2, 8, 32)),
    ):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - x.flip(-1)).square().mean().backward()
            optimizer.step()
        assert not any(map(torch.equal, before, model.parameters()))
        torch.testing.assert_close(run_in_runtime(model, x)[0], model(x).detach())


def test_dynamic_shapes(run_in_runtime):
    model = NormAlone(torch.float32, 32, 4)
    x = torch.randn(2, 4, 6, 32)
    others = [torch.randn(1, 4, 1, 32), torch.randn(3, 4, 50, 32)]
    shapes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("length")},)
    results = run_in_runtime(model, x, *others, dynamic_shapes=shapes)
    for each, y in zip((x, *others), results, strict=True):
        assert ulps_apart(y, model(each).detach()) <= allowed_ulps(x.dtype, x.dtype, 32)


def test_a_saved_program_keeps_its_composite_op(tmp_path):
    from coreai.authoring import AIModelAsset

    program = convert(NormAlone(torch.float32, 8, None), (torch.randn(2, 8),))
    program.save_asset(tmp_path / "model.aimodel")
    read = AIModelAsset.load(tmp_path / "model.aimodel").program
    assert composites(read) == composites(program)
    assert len(composites(read)) == 1


def test_errors(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="expected path to be a program"),
        load(tmp_path / "nothing.aimodel"),
    ):
        pass
    path: Path = tmp_path / "model.aimodel"
    model = NormAlone(torch.float32, 8, None)
    convert(model, (torch.randn(2, 8),), input_names=["x"]).save_asset(path)
    with load(path) as function:
        with pytest.raises(ValueError, match="main: expected inputs x, got y"):
            function(y=torch.randn(2, 8))
        with pytest.raises(RuntimeError, match="invalid shape"):
            function(x=torch.randn(2, 9))
        assert function(x=torch.randn(2, 8))
