"""Shared by all tests: a seed for each, and the proof that it is the fused op that is tested."""

from __future__ import annotations

import pytest
import torch

from coreai_torch.backends import cpu
from coreai_torch.composite_ops import RMSNormImpl


def pytest_sessionstart() -> None:
    x = torch.ones(2, 8, requires_grad=True)
    y = RMSNormImpl()(x, torch.ones(8))
    assert y.grad_fn is not None
    assert "RmsNormFunction" in y.grad_fn.name(), "RMSNormImpl does not run the fused kernels"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20260)


@pytest.fixture(params=cpu.supported_levels())
def level(request: pytest.FixtureRequest):
    """Every SIMD level that this processor runs, forced for the time of the test."""
    with cpu.level(request.param):
        yield request.param
