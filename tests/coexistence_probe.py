"""Run in a fresh environment: is what should be there really there, and does it work?

python coexistence_probe.py ours apple      both distributions are installed, or one of them
"""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def check_training_on_the_kernels() -> None:
    from coreai_torch.composite_ops import RMSNorm

    model = nn.Sequential(nn.Linear(8, 64), RMSNorm(64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[1].weight.detach().clone()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(torch.randn(16, 8)).square().sum().backward()
        optimizer.step()
    ran = {event.name for event in profiler.events()}
    assert {"coreai_torch::fused_rms_norm", "coreai_torch::fused_rms_norm_backward"} <= ran, ran
    assert "aten::rsqrt" not in ran
    assert not torch.equal(model[1].weight, before)


def check_conversion() -> None:
    import coreai_torch
    from coreai_torch import ExternalizeSpec, TorchConverter, get_decomp_table
    from coreai_torch.composite_ops import SDPA, RMSNorm, RMSNormImpl, RoPE

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = RMSNorm(8)
            self.rope = RoPE()
            self.sdpa = SDPA()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            half = torch.arange(32.0).view(1, 8, 4)
            turned = self.rope(self.norm(x), half.cos(), half.sin())
            return self.sdpa(turned, turned, x)

    def export(model: nn.Module) -> torch.export.ExportedProgram:
        program = torch.export.export(model, args=(torch.randn(1, 2, 8, 8),))
        return program.run_decompositions(get_decomp_table())

    assert coreai_torch.ExternalizeSpec is coreai_torch.externalize.ExternalizeSpec
    specs = [
        ExternalizeSpec(RMSNormImpl, "rms_norm", ["axes", "eps"]),
        ExternalizeSpec(RoPE, "rope", []),
        ExternalizeSpec(SDPA, "scaled_dot_product_attention", []),
    ]
    converter = TorchConverter()
    converter.add_pytorch_module(Model().eval(), export_fn=export, externalize_modules=specs)
    program = str(converter.to_coreai())
    for name in ("rms_norm", "rope", "scaled_dot_product_attention"):
        assert f'composite_declaration<"{name}"' in program, program
    assert 'input_names = ["input", "scale"]' in program


def check_what_the_converter_is_asked_for() -> None:
    for statement in (
        "from coreai_torch import TorchConverter",
        "from coreai_torch.composite_ops import RoPE",
    ):
        with pytest.raises(ImportError, match="pip install coreai-torch=="):
            exec(statement)


def check_conversion_says_what_is_missing() -> None:
    from coreai_torch.composite_ops import RMSNorm
    from coreai_torch.conversion import convert

    with pytest.raises(ImportError, match="pip install coreai-torch=="):
        convert(RMSNorm(8), (torch.randn(2, 8),))


def main(expected: set[str]) -> None:
    if "ours" in expected:
        check_training_on_the_kernels()
    else:
        from coreai_torch.composite_ops import RMSNorm

        assert RMSNorm.__module__ == "coreai_torch.composite_ops._rms_norm"
    if "apple" in expected:
        check_conversion()
    else:
        check_what_the_converter_is_asked_for()
        check_conversion_says_what_is_missing()


warnings.simplefilter("ignore")
main(set(sys.argv[1:]))
