"""The CUDA part as nvcc compiles it, on a machine that need not have a card: does the whole module
build, link and load, and is the machine code what the kernels were written for?"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
DTYPES = ("float32", "float16", "bfloat16")
OPS = {"rms_norm": 24, "add_rms_norm": 8}  # and how many kernels there are of each, at the least

pytestmark = pytest.mark.slow

# CI sets this, so that a missing tool is not taken for a passed test.
REQUIRED = os.environ.get("COREAI_TORCH_REQUIRE_NVCC") == "1"


def tool(name: str) -> str:
    """A program of the toolkit, or of the nvidia-cuda-* packages from PyPI."""
    candidates = [name, f"/usr/local/cuda/bin/{name}"]
    candidates += [
        str(path) for folder in sys.path for path in Path(folder).glob(f"nvidia/cu*/bin/{name}")
    ]
    found = next((path for c in candidates if (path := shutil.which(c))), None)
    if found is None:
        (pytest.fail if REQUIRED else pytest.skip)(f"needs {name}")
    return found


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the module as FORCE_CUDA=1 does; returns the folder with the kernels' objects."""
    tool("nvcc")
    library = tmp_path_factory.mktemp("build")
    environment = dict(os.environ, FORCE_CUDA="1", CMAKE_ARGS="-DCOREAI_TORCH_WERROR=ON")
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(library)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    check_that_it_loads(library)
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-cuda"
    return folder / "CMakeFiles" / "coreai_torch_cuda_kernels.dir" / "csrc" / "cuda"


def check_that_it_loads(library: Path) -> None:
    """Beside a torch without CUDA too: it runs on the CPU there."""
    code = """
import torch, coreai_torch
from coreai_torch import _C
assert _C.build_info()["cuda_version"], _C.build_info()
x, w = torch.randn(4, 64), torch.randn(64)
torch.testing.assert_close(coreai_torch.ops.rms_norm(x, w), coreai_torch.reference.rms_norm(x, w))
torch.testing.assert_close(coreai_torch.ops.add_rms_norm(x, x, w)[1], x + x)
"""
    environment = dict(os.environ, PYTHONPATH=str(library))
    for command in (["-c", code], ["-m", "coreai_torch"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=library, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "architectures 80-real" in done.stdout


@dataclass
class Kernel:
    """A kernel's machine code."""

    name: str  # as in the source, without namespaces: rms_norm_forward_rows<float, float, 4, ...>
    opcodes: list[str]

    @property
    def width(self) -> tuple[int, int, int]:
        """Threads of a row, accesses of a thread, blocks of a cluster."""
        threads, accesses, cluster = re.search(r"Width<(\d+), (\d+), (\d+),", self.name).groups()
        return int(threads), int(accesses), int(cluster)

    def count(self, pattern: str) -> int:
        """How many instructions match."""
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes)


def plain_names(mangled: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True)
    return [
        re.sub(r"coreai_torch::|\(int\)|^void |\(.*$", "", name) for name in done.stdout.split("\n")
    ]


@functools.cache
def kernels_of(path: Path, architecture: str) -> list[Kernel]:
    """The kernels of an object file, disassembled."""
    command = [tool("cuobjdump"), "-sass", "-arch", f"sm_{architecture}", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n\s*Function : ", text)[1:]
    names = plain_names([part.split("\n", 1)[0].strip() for part in parts])
    instruction = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", re.MULTILINE)
    return [
        Kernel(name, instruction.findall(part)) for name, part in zip(names, parts, strict=False)
    ]


def row_kernels(
    objects: Path, op: str, dtype: str, architecture: str, direction: str
) -> list[Kernel]:
    """Those that read rows 16 bytes at a time."""
    elements = 4 if dtype == "float32" else 8
    pattern = re.compile(rf"rms_norm_{direction}_(rows|clusters)<\w+, \w+, {elements}, Width")
    kernels = kernels_of(objects / f"{op}_{dtype}.cu.o", architecture)
    found = [kernel for kernel in kernels if pattern.match(kernel.name)]
    if architecture < "90" and architecture != "100" and architecture != "120":
        found = [kernel for kernel in found if kernel.width[2] == 1]
    assert len(found) >= OPS[op], "kernels are missing"
    return found


def row_loads(kernel: Kernel) -> list[int]:
    """Where in a forward kernel rows are read: into registers, or into shared memory. The scale is
    read as a constant."""
    into_registers = re.compile(r"LDG\.(?!.*CONSTANT)")
    return [
        i
        for i, opcode in enumerate(kernel.opcodes)
        if opcode.startswith("LDGSTS") or into_registers.match(opcode)
    ]


def scale_bytes(kernel: Kernel) -> int:
    """Of one access: as many elements as 16 bytes of the input hold."""
    input_type, scale_type = re.search(r"<(\w+), (\w+),", kernel.name).groups()
    size = {"float": 4, "Float16": 2, "BFloat16": 2}
    return 16 // size[input_type] * size[scale_type]


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("op", OPS)
def test_nothing_spills(objects: Path, op: str, dtype: str) -> None:
    """No stack, no local memory, in any kernel for any architecture."""
    path = objects / f"{op}_{dtype}.cu.o"
    command = [tool("cuobjdump"), "-res-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text.stdout + text.stderr
    )
    assert len(usage) >= 6 * (16 if op == "rms_norm" else 4), "kernels are missing"
    bad = [use for use in usage if use[2] != "0" or use[3] != "0"]
    assert not bad, plain_names([use[0] for use in bad])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_forward_reads_and_writes_rows_in_wide_accesses(
    objects: Path, op: str, dtype: str, architecture: str
) -> None:
    for kernel in row_kernels(objects, op, dtype, architecture, "forward"):
        accesses = kernel.width[1]
        rows = [kernel.opcodes[i] for i in row_loads(kernel)]
        assert len(rows) == accesses * (1 if op == "rms_norm" else 2), kernel.name
        assert all(".128" in opcode for opcode in rows), kernel.name
        narrow_scale = scale_bytes(kernel) < 16
        scales = accesses * max(1, scale_bytes(kernel) // 16)
        assert kernel.count("LDG(?!DEPBAR)") == len(rows) + scales, kernel.name
        wide = len(rows) + (0 if narrow_scale else scales)
        assert kernel.count(r"LDG\S*\.128") == wide, kernel.name
        assert kernel.count(r"STG\S*\.128") == kernel.count("STG"), kernel.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_all_of_a_row_is_under_way_before_any_of_it_is_used(
    objects: Path, op: str, dtype: str, architecture: str
) -> None:
    """Loads one after another would wait for memory several times."""
    for kernel in row_kernels(objects, op, dtype, architecture, "forward"):
        loads = row_loads(kernel)
        between = kernel.opcodes[loads[0] : loads[-1]]
        assert not [o for o in between if o.startswith(("FFMA", "FMUL", "FADD"))], kernel.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_backward_copies_rows_in_wide_accesses(
    objects: Path, op: str, dtype: str, architecture: str
) -> None:
    """Past the registers and the L1 cache: of the first rows, and in the loop of the next."""
    for kernel in row_kernels(objects, op, dtype, architecture, "backward"):
        _, accesses, cluster = kernel.width
        copies = kernel.count(r"LDGSTS")
        assert copies == kernel.count(r"LDGSTS\S*\.BYPASS\S*\.128"), kernel.name
        operands = 2 if op == "rms_norm" or cluster > 1 else 3
        assert copies % (2 * accesses) == 0, kernel.name
        assert copies >= 2 * accesses * operands, kernel.name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_no_function_calls(objects: Path, op: str, dtype: str) -> None:
    """All inlined; the only subroutines are those of 64-bit division, for huge numbers of rows."""
    for kernel in row_kernels(objects, op, dtype, "90", "forward"):
        assert kernel.count("CALL") <= 4, kernel.name
