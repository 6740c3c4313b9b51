"""The distributions: what they hold, and that they install where nothing else of ours is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from environments import ROOT, run

IN_CHECKOUT = (ROOT / "setup.py").exists()


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
def test_what_a_wheel_holds(built, tmp_path):
    held = zipfile.ZipFile(built.wheel).namelist()
    for package in ("coreai_torch", "coreai_torch/composite_ops"):
        assert f"{package}/__init__.abi3.so" in held
        assert f"{package}/_package_init.py" in held
        assert f"{package}/__init__.py" not in held
    for name in ("_C.pyi", "_build_torch_version", "composite_ops/rms_norm.py"):
        assert f"coreai_torch/{name}" in held
    for name in ("py.typed", "__init__.pyi", "composite_ops/rms_norm.pyi"):
        assert f"coreai_torch-stubs/{name}" in held
    assert [name for name in held if name.startswith("coreai_torch/_C.") and name.endswith(".so")]
    assert not [name for name in held if name.startswith(("tests", "csrc", "benchmarks"))]

    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", site, built.wheel)
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


@pytest.mark.skipif(not IN_CHECKOUT, reason="needs a checkout")
def test_an_sdist_has_the_same_bytes_each_time(tmp_path):
    """From two copies of the checkout, with other times, modes and owners of the files."""
    made = []
    for number, mode in ((1, 0o600), (2, 0o664)):
        copy = tmp_path / str(number) / "checkout"
        ignored = shutil.ignore_patterns("build", ".git", ".venv*", "*.so", "*.egg-info", "runs")
        shutil.copytree(ROOT, copy, ignore=ignored, copy_function=shutil.copyfile)
        for path in copy.rglob("*.py"):
            path.chmod(mode)
            os.utime(path, (number * 10**9, number * 10**9))
        code = "import coreai_torch_build as b; print(b.build_sdist('dist'))"
        environment = {"PYTHONPATH": "build_backend", "SOURCE_DATE_EPOCH": "1700000000"}
        run(sys.executable, "-c", code, cwd=copy, env={**os.environ, **environment})
        (sdist,) = (copy / "dist").glob("*.tar.gz")
        made.append(sdist.read_bytes())
    assert made[0] == made[1]
    with tarfile.open(sdist) as archive:
        assert {member.mtime for member in archive} == {1700000000}
        names = {member.name.partition("/")[2] for member in archive}
    assert {"LICENSE", "SECURITY.md", "CMakeLists.txt", "PKG-INFO"} <= names


@pytest.mark.skipif(not IN_CHECKOUT, reason="needs a checkout")
def test_checkpoints_are_loaded_without_running_what_is_in_them():
    loads = 0
    for folder in ("examples", "coreai_torch", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for arguments in re.findall(r"torch\.load\((.*)\)", path.read_text()):
                assert "weights_only=True" in arguments, f"{path}: {arguments}"
                loads += 1
    assert loads >= 2
