"""Which PyTorch a build serves: the minor version that it was built with. Others get an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import coreai_torch._load
from coreai_torch import _C

PACKAGE = Path(coreai_torch._load.__file__).parent
SAME_MINOR = ".".join(torch.__version__.split(".")[:2])


@pytest.fixture
def copy(tmp_path):
    """The package without its compiled part."""
    package = tmp_path / "coreai_torch"
    package.mkdir()
    for path in PACKAGE.iterdir():
        if path.suffix == ".py" or path.is_dir():
            (package / path.name).symlink_to(path)
    init = PACKAGE / "_package_init.py"  # the name in a wheel
    if not (package / "__init__.py").exists():
        (package / "__init__.py").symlink_to(init)
    return package


def refused(package: Path, version: str) -> str:
    """What importing it prints where this torch is installed. It is refused before it is used."""
    (package.parent / "torch.py").write_text(f"__version__ = {version!r}\n")
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import coreai_torch"],  # -S: nothing but what is given here
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("installed", ["2.12.0", "2.14.0a0+git1", "3.13.0"])
def test_another_minor_version_is_refused(copy, installed):
    (copy / "_C.py").touch()  # it would load
    (copy / "_build_torch_version").write_text("2.13.0+cpu")
    assert refused(copy, installed) == (
        "ImportError: coreai_torch cannot load its kernels: it was built against torch 2.13.0+cpu, "
        f"but torch {installed} is installed. Build it for this environment, in a checkout of its "
        "repository: pip install --force-reinstall --no-deps --no-build-isolation ."
    )


def test_another_patch_version_is_named_where_loading_fails(copy):
    (copy / "_C.py").write_text("raise ImportError('undefined symbol: _ZN2at')")
    (copy / "_build_torch_version").write_text("2.13.1")
    assert "built against torch 2.13.1, but torch 2.13.0 is installed" in refused(copy, "2.13.0")
    assert "undefined symbol: _ZN2at. Build it" in refused(copy, "2.13.1")


def test_a_missing_module_is_explained(copy):
    told = refused(copy, "2.13.0")
    assert f"the compiled module is not in {copy}." in told
    assert "run Python in another folder" in told


def test_another_patch_version_loads(copy):
    (copy / Path(_C.__file__).name).symlink_to(_C.__file__)
    (copy / "_build_torch_version").write_text(f"{SAME_MINOR}.99")
    code = "import coreai_torch; print(coreai_torch.__file__)"
    variables = {**os.environ, "PYTHONPATH": str(copy.parent)}
    printed = subprocess.check_output(
        [sys.executable, "-c", code], cwd=copy.parent, env=variables, text=True
    )
    assert printed.splitlines()[-1].startswith(str(copy))
