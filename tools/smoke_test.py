"""Is what is installed whole, and does it compute?  python -I tools/smoke_test.py

Needs nothing but the package and PyTorch.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import torch

import coreai_torch
from coreai_torch import ops, reference, replace_rms_norm
from coreai_torch._env_report import main as report
from coreai_torch.composite_ops import RMSNorm

NEED_MORE = {"coreai_torch.onnx", "coreai_torch.conversion"}  # than is a dependency
IS_RUN = {"coreai_torch.__main__"}

print(coreai_torch.__file__)
for name in coreai_torch.__all__:
    getattr(coreai_torch, name)
for module in pkgutil.walk_packages(coreai_torch.__path__, "coreai_torch."):
    if module.name not in NEED_MORE | IS_RUN:
        importlib.import_module(module.name)

x = torch.randn(64, 512)
norm = RMSNorm(512)
norm(x).square().sum().backward()
assert norm.weight.grad is not None
assert torch.equal(norm(x), reference.rms_norm(x, norm.weight))
half = ops.rms_norm(x.bfloat16(), norm.weight)
assert torch.equal(half, reference.rms_norm(x.bfloat16(), norm.weight))

model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.RMSNorm(512))
assert list(replace_rms_norm(model).replaced) == ["1"]
model(x).sum().backward()

program = torch.export.export(norm, (x,))
assert torch.equal(program.module()(x), norm(x))

sys.exit(report())
