"""The C++ package, found by find_package, and the two examples that use it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from environments import ROOT, run

EXAMPLES = ROOT / "examples" / "cpp"
TREE = ROOT / "build" / "cpp"  # that of `make test-cpp`, which compiles the same
OPS = "-DCOREAI_TORCH_OPS"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.exists(), reason="needs a checkout"),
]


def program(name: str) -> str:
    """cmake or ninja: that of the environment, or that on PATH."""
    found = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    assert found is not None, f"expected {name} to be installed: pip install {name}"
    return found


def configure(source: Path, build: Path, *options: str) -> None:
    ninja = f"-DCMAKE_MAKE_PROGRAM={program('ninja')}"
    run(program("cmake"), "-S", source, "-B", build, "-G", "Ninja", ninja, *options)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """What `cmake --install` leaves, with the ops."""
    prefix = tmp_path_factory.mktemp("package")
    libtorch = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    configure(ROOT, TREE, libtorch, "-DCOREAI_TORCH_WERROR=ON", f"{OPS}=ON")
    try:
        run(program("cmake"), "--build", TREE)
        run(program("cmake"), "--install", TREE, "--prefix", prefix)
    finally:
        configure(ROOT, TREE, f"{OPS}=OFF")
    return prefix


def build_example(name: str, package: Path, folder: Path) -> Path:
    configure(
        EXAMPLES / name, folder, f"-DCMAKE_PREFIX_PATH={package};{torch.utils.cmake_prefix_path}"
    )
    run(program("cmake"), "--build", folder)
    return folder / name


def test_the_kernels_without_a_framework(package, tmp_path):
    printed = run(build_example("kernels", package, tmp_path))
    assert "512 rows of 1024" in printed
    linked = run("ldd", tmp_path / "kernels") if sys.platform == "linux" else ""
    assert "torch" not in linked


def test_a_compiled_model_without_python(package, tmp_path):
    run(sys.executable, EXAMPLES / "aot_inductor" / "compile_model.py", tmp_path / "model")
    example = build_example("aot_inductor", package, tmp_path / "build")
    assert "output [100, 64] is Python's, to the bit" in run(example, tmp_path / "model")
    linked = run("ldd", example) if sys.platform == "linux" else ""
    assert "libpython" not in linked


def test_the_version_is_that_of_the_python_package(package):
    (config,) = package.rglob("coreai_torch-config-version.cmake")
    (version,) = [
        line.split('"')[1]
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if line.startswith("version = ")
    ]
    assert f'set(PACKAGE_VERSION "{version}")' in config.read_text()
