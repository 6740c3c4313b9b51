"""SIMD levels and threads: what was compiled, what is chosen, and who runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coreai_torch import _C, ops
from coreai_torch.backends import cpu

ROOT = Path(__file__).parents[1]
OBJECTS = sorted((ROOT / "build").glob("cmake-*/CMakeFiles/coreai_torch_kernels_*.dir/**/*.o"))


def level_in_a_new_process(**environment: str) -> tuple[str, str]:
    code = "from coreai_torch.backends import cpu; print(cpu.get_level())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip(), run.stderr


def test_every_level_can_be_forced():
    automatic = cpu.get_level()
    for name in cpu.supported_levels():
        with cpu.level(name):
            assert cpu.get_level() == name
    cpu.set_level(None)
    assert cpu.get_level() == automatic
    assert set(cpu.supported_levels()) <= set(cpu.compiled_levels())


def test_environment_variables():
    lowest = cpu.compiled_levels()[0]
    assert level_in_a_new_process(COREAI_TORCH_CPU_LEVEL=lowest)[0] == lowest
    assert level_in_a_new_process(ATEN_CPU_CAPABILITY="default")[0] == lowest
    level, complaint = level_in_a_new_process(COREAI_TORCH_CPU_LEVEL="sse9")
    assert level in cpu.supported_levels()
    assert "expected COREAI_TORCH_CPU_LEVEL to name a SIMD level" in complaint


@pytest.mark.skipif(
    "x86-64-v3" not in cpu.supported_levels(), reason="PyTorch has such names on x86-64 only"
)
def test_pytorch_s_own_switch_caps_the_level():
    assert level_in_a_new_process(ATEN_CPU_CAPABILITY="avx2")[0] == "x86-64-v3"


@pytest.mark.skipif(not OBJECTS, reason="needs the build folder of an in-place build")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: f"{p.parts[-4]}-{p.stem}")
def test_objects_of_a_level_export_one_table_and_nothing_weak(path):
    """A weak symbol compiled for a high level could be the copy that the linker keeps for all."""
    symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
    exported = re.findall(r"^\S+ ([A-Z]) (.*)$", symbols, re.MULTILINE)
    assert [kind for kind, _ in exported] == ["D"]
    op = path.name.partition("_level")[0]
    assert exported[0][1].startswith(f"coreai_torch::{op}_kernels_")


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="needs two threads")
def test_two_threads_really_run():
    """Counted by the kernel: the processor time of the call's threads, each by itself."""
    x, w = torch.randn(4096, 4096), torch.randn(4096)

    def time_per_thread() -> dict[str, int]:
        times = {}
        for task in Path("/proc/self/task").iterdir():
            fields = (task / "schedstat").read_text().split()
            times[task.name] = int(fields[0])
        return times

    ops.rms_norm(x, w)
    before = time_per_thread()
    for _ in range(20):
        ops.rms_norm(x, w)
    after = time_per_thread()
    busy = [after[task] - before.get(task, 0) for task in after]
    assert sum(1 for nanoseconds in busy if nanoseconds > 5e6) >= 2


def test_one_thread_runtime_is_loaded():
    libraries = set(re.findall(r"\S*lib(?:g|i)?omp\S*\.so\S*", Path("/proc/self/maps").read_text()))
    assert len(libraries) <= 1
    needed = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    direct = subprocess.run(
        ["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "libc10.so" in needed
    assert "omp" not in direct
