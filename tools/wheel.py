"""Make a wheel as a release would: build, repair with auditwheel, and try it in a fresh environment.

    python tools/wheel.py              # dist/*.whl
    python tools/wheel.py --test       # and use it where nothing but PyTorch is installed

Run it with the Python and in the environment, with PyTorch and auditwheel, that the wheel is for.
PyTorch's libraries stay where PyTorch has them: the wheel is for this version of PyTorch.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SMOKE_TEST = Path(__file__).with_name("smoke_test.py")

# What PyTorch brings along. Two copies in a process would be two thread pools, two dispatchers.
OF_TORCH = ("libtorch*.so*", "libc10*.so*", "libgomp*.so*", "libshm*.so*", "libcud*.so*")


def run(*command: object) -> None:
    print("+", *command, flush=True)
    subprocess.check_call([str(part) for part in command])


def build(out: Path) -> Path:
    """The repaired wheel, in `out`."""
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps")
    with tempfile.TemporaryDirectory() as folder:
        run(*pip, "-w", folder, ROOT)
        (wheel,) = Path(folder).glob("*.whl")
        if platform.system() == "Linux":
            excluded = [option for name in OF_TORCH for option in ("--exclude", name)]
            repaired = Path(folder, "repaired")
            run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", repaired, wheel)
            (wheel,) = repaired.glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, out))


def test(wheel: Path) -> None:
    """Install it into an environment that has nothing but PyTorch, and use it there."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "venv/bin/python")
        run(sys.executable, "-m", "venv", python.parents[1])
        run(python, "-m", "pip", "install", "-q", f"torch=={torch.__version__.partition('+')[0]}")
        run(python, "-m", "pip", "install", "-q", wheel)
        run(python, "-I", SMOKE_TEST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheel")
    parser.add_argument("--test", action="store_true", help="try it in a fresh environment")
    options = parser.parse_args()
    wheel = build(options.out)
    if options.test:
        test(wheel)
    print(wheel)


if __name__ == "__main__":
    main()
