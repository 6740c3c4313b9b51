"""Fresh virtual environments for tests of installing, and the wheels to install in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROBE = Path(__file__).with_name("coexistence_probe.py")


def run(*command: object, **options: object) -> str:
    """Run a command and return what it prints; fail with all of that if it fails."""
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass(frozen=True)
class Build:
    """What a checkout builds."""

    source: Path  # the unpacked sdist, with the modules built in place
    wheel: Path
    editable: Path  # the wheel that `pip install -e` builds


def build(folder: Path) -> Build:
    """checkout -> sdist -> wheels: what the build needs and the sdist lacks shows here."""
    checkout = folder / "checkout"
    ignored = shutil.ignore_patterns("build", ".git", ".venv*", "*.so", "*.egg-info", "runs")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    code = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    run(sys.executable, "-c", code, cwd=checkout)
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    pip = (sys.executable, "-m", "pip", "-q")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder / "wheels", source)
    (wheel,) = (folder / "wheels").glob("*.whl")
    code = "import coreai_torch_build as b; print(b.build_editable('dist'))"
    run(sys.executable, "-c", code, cwd=source, env={**os.environ, "PYTHONPATH": "build_backend"})
    (editable,) = (source / "dist").glob("*.whl")
    return Build(source, wheel, editable)


class Environment:
    """A virtual environment with all that the tests' own has, save for the two `coreai_torch`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.python = folder / "bin" / "python"
        scheme = {"base": str(folder), "platbase": str(folder)}
        self.site = Path(sysconfig.get_path("purelib", "venv", scheme))
        others = folder / "others"
        others.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.startswith(("coreai_torch", "__editable__", "__pycache__")):
                (others / entry.name).symlink_to(entry)
        # A plain path: what is installed in the environment itself precedes it.
        (self.site / "others.pth").write_text(f"{others}\n")

    def pip(self, command: str, *arguments: object) -> str:
        """Run pip on this environment."""
        pip = (sys.executable, "-m", "pip", "-q", "--python", self.python)
        return run(*pip, command, *arguments, env=self.variables())

    def install(self, *requirements: object) -> None:
        self.pip("install", "--no-build-isolation", *requirements)

    def uninstall(self, distribution: str) -> None:
        self.pip("uninstall", "-y", distribution)

    def probe(self, *expected: str, path: Path | None = None) -> None:
        """Train, convert, and so on: see coexistence_probe.py, which takes what to expect."""
        run(self.python, PROBE, *expected, cwd=self.folder, env=self.variables(path))

    def report(self, path: Path | None = None) -> tuple[int, str]:
        """Exit status and output of `python -m coreai_torch`."""
        done = subprocess.run(
            [self.python, "-m", "coreai_torch"],
            cwd=self.folder,
            env=self.variables(path),
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    @staticmethod
    def variables(path: Path | None = None) -> dict[str, str]:
        """The tests' own, but for PYTHONPATH, and for CI's pins: a test may install others."""
        left_out = ("PYTHONPATH", "PIP_CONSTRAINT")
        others = {name: value for name, value in os.environ.items() if name not in left_out}
        return others | ({"PYTHONPATH": str(path)} if path else {})
