"""Instructions per element of the CPU kernels, counted by valgrind's callgrind.

Unlike times they do not depend on the machine's load. valgrind emulates no AVX-512, so that the
level x86-64-v3 (AVX2) is forced: kernels of the higher levels execute about half as many, and their
number tells how well a kernel is written, not how long it takes where memory is the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import sections
from .environment import commit

ROOT = Path(__file__).parents[1]
LEVEL = "x86-64-v3"
DIMS = (64, 128, 512, 1024, 4096, 4095, 16384)
ROWS = 64


def build(folder: Path) -> Path:
    """The program that runs the kernels. CMAKE_ARGS counts, as it does for setup.py."""
    options = ["-DCOREAI_TORCH_BENCHMARKS=ON", "-DCOREAI_TORCH_TESTS=OFF"]
    options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if ninja:
        options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        raise RuntimeError("counting instructions needs cmake: pip install cmake ninja")
    command = [cmake, "-S", str(ROOT), "-B", str(folder), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    target = ["--target", "count_instructions"]
    subprocess.run([cmake, "--build", str(folder), *target], check=True, stdout=subprocess.DEVNULL)
    return folder / "count_instructions"


def count(program: Path, dims: Sequence[int] = DIMS, rows: int = ROWS) -> dict[str, Any]:
    """Run it under callgrind and read what that wrote: a file for each kernel, dtype and dim."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise RuntimeError("counting instructions needs valgrind: apt-get install valgrind")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "counts"
        options = ["--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={output}"]
        command = [valgrind, *options, str(program), str(rows), *map(str, dims)]
        environ = os.environ | {"COREAI_TORCH_CPU_LEVEL": LEVEL}
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        records = [record for path in Path(folder).iterdir() if (record := read(path, rows))]
    if not records:
        raise RuntimeError(f"{' '.join(command)} counted nothing:\n{done.stderr}")
    records.sort(key=lambda record: (record["order"], record["dim"]))
    for record in records:
        del record["order"]
    version = subprocess.run([valgrind, "--version"], capture_output=True, text=True).stdout.strip()
    return {
        "tool": f"{version}, callgrind",
        "level": LEVEL,
        "rows": rows,
        **commit(),
        "records": records,
    }


def read(path: Path, rows: int) -> dict[str, Any] | None:
    """The count in a file of callgrind's; None for the one of the program's end."""
    text = path.read_text()
    trigger = re.search(r"^desc: Trigger: Client Request: (\w+) (\w+) (\d+)$", text, re.MULTILINE)
    total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
    part = re.search(r"^part: (\d+)$", text, re.MULTILINE)
    if trigger is None or total is None or part is None:
        return None
    kernel, dtype, dim = trigger[1], trigger[2], int(trigger[3])
    per_element = round(int(total[1]) / (rows * dim), 4)
    kinds = ("forward", "backward")
    dtypes = ("float32", "bfloat16", "float16", "mixed")
    order = (kinds.index(kernel), dtypes.index(dtype))
    return {
        **{"kernel": kernel, "dtype": dtype, "dim": dim, "instructions": int(total[1])},
        **{"per_element": per_element, "order": order},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "benchmarks")
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    options = parser.parse_args(arguments)
    try:
        result = count(build(options.build), options.dims)
    except RuntimeError as problem:
        print(f"skipped: {problem}")
        return 0
    print("\n".join(sections.instructions(result)))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
