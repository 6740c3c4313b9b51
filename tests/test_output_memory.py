"""Large outputs have the bits of small ones, whether their memory is there already or fresh."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# A part by itself is below the size from which on the system is asked about an output's memory.
PROGRAM = """
import torch
from coreai_torch import ops
from coreai_torch.backends import cpu

PART = 200
backward = torch.ops.coreai_torch.fused_rms_norm_backward
for dtype, rows in ((torch.float32, 1700), (torch.bfloat16, 3400), (torch.float16, 3400)):
    x, g, w = (torch.randn(n, 4096).to(dtype) for n in (rows, rows, 1))
    x[::97, 3] = 1e-38  # a denormal number now and then
    for level in cpu.supported_levels():
        with cpu.level(level):
            y = torch.cat([ops.rms_norm(part, w) for part in x.split(PART)])
            dx = torch.cat([
                backward(dy, part, w, 1e-5, [True, True])[0]
                for dy, part in zip(g.split(PART), x.split(PART))
            ])
            for _ in range(3):  # freed memory comes back, or not
                assert torch.equal(ops.rms_norm(x, w), y), (level, dtype)
                whole, _ = backward(g, x, w, 1e-5, [True, True])
                assert torch.equal(whole, dx), (level, dtype)
                del whole
"""

ADD_PROGRAM = """
import torch
from coreai_torch import ops
from coreai_torch.backends import cpu

PART = 200
backward = torch.ops.coreai_torch.fused_add_rms_norm_backward
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
for dtype, rows in ((F32, 500), (F32, 1700), (BF16, 1000), (BF16, 3400), (F16, 3400)):
    x, r, g, w = (torch.randn(n, 4096).to(dtype) for n in (rows, rows, rows, 1))
    x[::97, 3] = r[::97, 3] = 1e-38  # a denormal number now and then
    for level in cpu.supported_levels():
        with cpu.level(level):
            parts = [ops.add_rms_norm(*part, w) for part in zip(x.split(PART), r.split(PART))]
            y, s = (torch.cat(part) for part in zip(*parts))
            dx = torch.cat([
                backward(*part, w, 1e-5, [True, True])[0]
                for part in zip(g.split(PART), r.split(PART), x.split(PART))
            ])
            for _ in range(3):  # freed memory comes back, or not
                output, new_residual = ops.add_rms_norm(x, r, w)
                assert torch.equal(output, y), (level, dtype)
                assert torch.equal(new_residual, s), (level, dtype)
                whole, _ = backward(g, r, x, w, 1e-5, [True, True])
                assert torch.equal(whole, dx), (level, dtype)
                del output, new_residual, whole
"""

# Rows of all lengths that have their own way to be streamed, each head with its own scale, or all
# with one.
LENGTHS_PROGRAM = """
import torch
from coreai_torch import ops
from coreai_torch.backends import cpu

PART = 800_000  # elements

def in_parts(x, w):
    return torch.cat([ops.rms_norm(part, w) for part in x.split(PART // x.shape[-1] or 1)])

ELEMENTS = {torch.float32: 7 << 20, torch.bfloat16: 13 << 20, torch.float16: 13 << 20}
for dtype, elements in ELEMENTS.items():
    for dim in (64, 80, 528, 1001, 1024, 4095, 4101, 5120, 8208, 8224, 2_000_000):
        x = torch.randn(3, elements // 3 // dim + 1, dim).to(dtype)
        w = torch.randn(3, 1, dim).to(dtype)
        x[:, ::97, 3] = 1e-38
        for level in cpu.supported_levels():
            with cpu.level(level):
                heads = [in_parts(head, scale) for head, scale in zip(x, w[:, 0])]
                shared = in_parts(x.flatten(0, 1), w[0, 0]).view(x.shape)
                for _ in range(2):
                    assert torch.equal(ops.rms_norm(x, w), torch.stack(heads)), (level, dtype, dim)
                    assert torch.equal(ops.rms_norm(x, w[0, 0]), shared), (level, dtype, dim)
"""

# Attention heads in float32 that fill the last cache, contiguous and transposed.
HEADS_PROGRAM = """
import torch
from coreai_torch import ops
from coreai_torch.backends import cpu

for dim in (64, 128):
    x, w = torch.randn(4, (4 << 20) // 4 // 8 // dim, 8, dim), torch.randn(dim)
    for level in cpu.supported_levels():
        with cpu.level(level):
            y = torch.cat([ops.rms_norm(part, w) for part in x.flatten(0, 1).split(100)])
            for _ in range(2):
                assert torch.equal(ops.rms_norm(x, w), y.view(x.shape)), (level, dim)
                heads = ops.rms_norm(x.transpose(1, 2), w).transpose(1, 2)
                assert torch.equal(heads, y.view(x.shape)), (level, dim)
"""

# Forward and backward of operands that have left the second cache, but are not streamed.
BETWEEN_PROGRAM = """
import torch
from coreai_torch import ops
from coreai_torch.backends import cpu

def differentiated(x, w, g):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = ops.rms_norm(x, w)
    return y.detach(), *torch.autograd.grad(y, (x, w), g)

CASES = [
    (torch.float32, 9 << 20, (128, 136, 200, 256, 511, 1024, 5000)),
    (torch.float32, 13 << 20, (31, 33, 200, 511, 512, 1000)),  # but for the first, one by one
    (torch.bfloat16, 5 << 20, (128, 136, 200, 256, 511, 1024, 5000)),
    (torch.float16, 5 << 20, (128, 136, 200, 256, 511, 1024, 5000)),
]
for dtype, size, dims in CASES:
    for dim in dims:
        rows = size // dtype.itemsize // dim + 1
        x, g = torch.randn(rows, dim).to(dtype), torch.randn(rows, dim).to(dtype)
        w = torch.randn(dim).to(dtype)
        wide = x.double()
        exact = (g * wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt()).sum(0)
        dw_of_level = set()
        for level in cpu.supported_levels():
            with cpu.level(level):
                y, dx, dw = differentiated(x, w, g)
                parts = [differentiated(a, w, b) for a, b in zip(x.split(1001), g.split(1001))]
                assert torch.equal(y, torch.cat([part[0] for part in parts])), (level, dtype, dim)
                assert torch.equal(dx, torch.cat([part[1] for part in parts])), (level, dtype, dim)
                dw_of_level.add(dw.view(torch.uint8).numpy().tobytes())
        assert len(dw_of_level) == 1, (dtype, dim)
        torch.testing.assert_close(dw.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)
"""

# Backward of float32 rows that are taken in turn, in the caches, beyond them and past them, and of
# the same rows with gaps between them, which are not.
IN_TURN_PROGRAM = """
import torch
from coreai_torch.backends import cpu

ops = torch.ops.coreai_torch
BACKWARD = {3: ops.fused_rms_norm_backward, 4: ops.fused_add_rms_norm_backward}

def with_gaps(x):
    wide = torch.empty(len(x), x.shape[1] + 8)
    return wide[:, :-8].copy_(x)

CACHES = (1001, 256), (703, 384), (1, 300)
BEYOND = (51_002, 31), (17_001, 100), (16_003, 128)
PAST = (66_003, 64), (52_801, 80), (17_001, 256), (12_001, 384)
for rows, dim in (*CACHES, *BEYOND, *PAST):
    operands = [torch.randn(rows, dim) for _ in range(3)]
    for w in torch.randn(dim), torch.randn(dim).bfloat16():
        for n, backward in BACKWARD.items():
            x = operands[: n - 1]
            bits = set()
            for level in cpu.supported_levels():
                with cpu.level(level):
                    expected = backward(*map(with_gaps, x), w, 1e-5, [True, True])
                    for _ in range(2):
                        given = backward(*x, w, 1e-5, [True, True])
                        assert torch.equal(given[0], expected[0]), (level, rows, dim, n)
                        assert torch.equal(given[1], expected[1]), (level, rows, dim, n)
                    bits.add(given[1].view(torch.uint8).numpy().tobytes())
                    del given, expected
            assert len(bits) == 1, (rows, dim, n)
"""

MEMORY = {
    "kept": "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592",
    "fresh": "glibc.malloc.mmap_threshold=65536",  # given back to the system at once
}


PROGRAMS = {
    "rms_norm": PROGRAM,
    "add_rms_norm": ADD_PROGRAM,
    "lengths": LENGTHS_PROGRAM,
    "heads": HEADS_PROGRAM,
    "between": BETWEEN_PROGRAM,
    "in turn": IN_TURN_PROGRAM,
}


@pytest.mark.parametrize("tunables", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="makes no difference elsewhere")
def test_large_outputs_have_the_bits_of_small_ones(program, tunables):
    environment = {**os.environ, "GLIBC_TUNABLES": tunables}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
