"""Writes model.pt2, an AOTInductor package of a norm, and an input and output to compare with.

python compile_model.py FOLDER
"""

import sys
from pathlib import Path

import torch

import coreai_torch
from coreai_torch.composite_ops import RMSNorm

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)

coreai_torch.set_compile_mode("kernel")  # a call of the fused op, not code of the compiler's own
norm = RMSNorm(64).requires_grad_(False)
x = torch.randn(4, 64)
program = torch.export.export(norm, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))

x = torch.randn(100, 64)
torch.save(x, folder / "input.pt")
torch.save(norm(x), folder / "output.pt")
