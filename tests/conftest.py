"""Shared by all tests: a seed for each, and the proof that it is the fused op that is tested."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from environments import ROOT, Build, build

import coreai_torch

if not hasattr(coreai_torch, "backends"):
    pytest.exit(
        "Apple's package is imported instead of this project's, from "
        f"{coreai_torch.__file__}: build_backend/README.md says what comes before what",
        returncode=1,
    )

from coreai_torch.backends import cpu
from coreai_torch.composite_ops import RMSNormImpl


def pytest_sessionstart() -> None:
    x = torch.ones(2, 8, requires_grad=True)
    y = RMSNormImpl()(x, torch.ones(8))
    assert y.grad_fn is not None
    assert "RmsNormFunction" in y.grad_fn.name(), "RMSNormImpl does not run the fused kernels"
    if os.environ.get("REQUIRE_CONVERTER") and importlib.util.find_spec("coreai") is None:
        pytest.exit("REQUIRE_CONVERTER is set, but the converter is not installed", returncode=1)


@pytest.fixture(scope="session")
def built() -> Iterator[Build]:
    """An sdist and a wheel of this checkout. Within it, where ccache may have their objects."""
    parent = ROOT / "build"
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tests-", dir=parent) as folder:
        yield build(Path(folder))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20260)


@pytest.fixture(params=cpu.supported_levels())
def level(request: pytest.FixtureRequest):
    """Every SIMD level that this processor runs, forced for the time of the test."""
    with cpu.level(request.param):
        yield request.param
