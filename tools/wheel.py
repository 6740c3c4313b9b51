"""Make a wheel as a release would: build it, repair it, and try it in a fresh environment.

    python tools/wheel.py                    # dist/*.whl
    python tools/wheel.py --test             # and use it where nothing but PyTorch is installed
    python tools/wheel.py --repair WHEEL     # one that has been built

Run it in an environment that has the PyTorch that the wheel is for, and auditwheel and patchelf.
PyTorch's libraries stay where PyTorch has them, so a wheel serves one version of PyTorch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMOKE_TEST = Path(__file__).with_name("smoke_test.py")

# What PyTorch brings along. Two copies in a process would be two thread pools, two dispatchers.
OF_TORCH = ("libtorch", "libc10", "libgomp", "libomp", "libshm", "libcuda", "libcudart")


def run(*command: object) -> None:
    print("+", *command, flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.check_call([str(part) for part in command], env={**os.environ, "PATH": path})


def build(folder: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps")
    run(*pip, "-w", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def repair(wheel: Path, out: Path) -> Path:
    """The wheel with the platform tag that its symbols allow, in `out`."""
    linux = platform.system() == "Linux"
    names = [f"{name}*" if linux else name for name in OF_TORCH]
    excluded = [option for name in names for option in ("--exclude", name)]
    with tempfile.TemporaryDirectory() as folder:
        program = ("auditwheel", "repair") if linux else ("delocate-wheel",)
        run(*program, *excluded, "-w", folder, wheel)
        (repaired,) = Path(folder).glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(repaired, out))


def test(wheel: Path) -> None:
    """Install it into an environment that has nothing but PyTorch, and use it there."""
    torch = importlib.metadata.version("torch").partition("+")[0]
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "bin", "python")
        run(sys.executable, "-m", "venv", folder)
        run(python, "-m", "pip", "install", "-q", f"torch=={torch}")
        run(python, "-m", "pip", "install", "-q", wheel)
        run(python, "-I", SMOKE_TEST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheel")
    parser.add_argument("--repair", type=Path, metavar="WHEEL", help="take this one")
    parser.add_argument("--test", action="store_true", help="try it in a fresh environment")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = repair(options.repair or build(Path(folder)), options.out)
    if options.test:
        test(wheel)
    print(wheel)


if __name__ == "__main__":
    main()
