"""Streaming stores: large outputs on memory that is there already have the bits of small ones."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# The second half of a tensor is below the size from which on outputs are streamed.
PROGRAM = """
import torch
from coreai_torch import ops
from coreai_torch.backends import cpu

backward = torch.ops.coreai_torch.fused_rms_norm_backward
for dtype, rows in ((torch.float32, 1700), (torch.bfloat16, 3400), (torch.float16, 3400)):
    x, g, w = (torch.randn(n, 4096).to(dtype) for n in (rows, rows, 1))
    half = slice(rows // 2, None)
    for level in cpu.supported_levels():
        with cpu.level(level):
            y_half = ops.rms_norm(x[half], w)
            dx_half, _ = backward(g[half], x[half], w, 1e-5, [True, True])
            for _ in range(3):  # freed memory comes back
                assert torch.equal(ops.rms_norm(x, w)[half], y_half), (level, dtype)
                dx, _ = backward(g, x, w, 1e-5, [True, True])
                assert torch.equal(dx[half], dx_half), (level, dtype)
                del dx
"""

ADD_PROGRAM = """
import torch
from coreai_torch import ops
from coreai_torch.backends import cpu

backward = torch.ops.coreai_torch.fused_add_rms_norm_backward
for dtype, rows in ((torch.float32, 1700), (torch.bfloat16, 3400), (torch.float16, 3400)):
    x, r, g, w = (torch.randn(n, 4096).to(dtype) for n in (rows, rows, rows, 1))
    half = slice(rows // 2, None)
    for level in cpu.supported_levels():
        with cpu.level(level):
            halves = ops.add_rms_norm(x[half], r[half], w)
            dx_half, _ = backward(g[half], r[half], x[half], w, 1e-5, [True, True])
            for _ in range(3):  # freed memory comes back
                for whole, part in zip(ops.add_rms_norm(x, r, w), halves):
                    assert torch.equal(whole[half], part), (level, dtype)
                dx, _ = backward(g, r, x, w, 1e-5, [True, True])
                assert torch.equal(dx[half], dx_half), (level, dtype)
                del dx, whole
"""


@pytest.mark.parametrize("program", [PROGRAM, ADD_PROGRAM], ids=["rms_norm", "add_rms_norm"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="streams on Linux only")
def test_streamed_results_have_the_same_bits(program):
    keep = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
    environment = {**os.environ, "GLIBC_TUNABLES": keep}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
