"""The distributions: what they hold, and that they install where nothing else of ours is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IN_CHECKOUT = (ROOT / "setup.py").exists()


def run(*command: object, **options: object) -> str:
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_include_no_framework():
    for path in (ROOT / "csrc").rglob("*.[hc]*"):
        if path.parts[-2] in ("torch", "tests") or path.suffix not in (".h", ".cpp"):
            continue
        includes = re.findall(r"#include [<\"]([^>\"]+)", path.read_text())
        assert not [i for i in includes if i.startswith(("torch/", "ATen/", "c10/", "pybind11"))]


def test_environment_report():
    report = run(sys.executable, "-m", "coreai_torch")
    assert "coreai_torch.composite_ops.rms_norm, fused" in report
    assert "PROBLEM" not in report


@pytest.mark.slow
@pytest.mark.skipif(not IN_CHECKOUT, reason="needs a checkout")
def test_sdist_to_wheel_to_a_fresh_environment(tmp_path):
    """sdist -> wheel -> new environment: nothing that the build needs is missing from the sdist."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns("build", ".git", ".venv*", "*.so", "*.egg-info", "runs"),
    )
    code = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    run(sys.executable, "-c", code, cwd=source)
    (sdist,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()

    pip = [sys.executable, "-m", "pip", "-q"]
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, unpacked)
    (wheel,) = tmp_path.glob("*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    for name in ("py.typed", "_C.pyi", "_build_torch_version", "composite_ops/rms_norm.py"):
        assert f"coreai_torch/{name}" in held
    assert [name for name in held if name.endswith(".so")]
    assert not [name for name in held if name.startswith(("tests", "csrc", "benchmarks"))]

    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", site, wheel)
    report = run(
        sys.executable,
        "-m",
        "coreai_torch",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert str(site) in report
    assert "fused" in report


@pytest.mark.skipif(not IN_CHECKOUT, reason="needs a checkout")
def test_a_missing_torch_is_explained(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n"
    )
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in done.stderr
