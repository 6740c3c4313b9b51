"""Apple's `coreai-torch` and ours in one environment, in every order of install and uninstall.

Every test has a fresh virtual environment and the real packages; what is in it is shown by using
it (coexistence_probe.py): a training step whose profile has the kernels, a conversion with our
composite op and two of Apple's.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from environments import ROOT, Build, Environment

try:
    APPLE = f"coreai-torch=={importlib.metadata.version('coreai-torch')}"
except importlib.metadata.PackageNotFoundError:
    pytest.skip("Apple's converter is not installed: make converter", allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture
def env(tmp_path) -> Environment:
    return Environment(tmp_path / "env")


def files_of(archive: list[str]) -> set[str]:
    return {name for name in archive if not name.endswith("/") and ".dist-info/" not in name}


def test_no_file_in_common(built: Build):
    ours = files_of(zipfile.ZipFile(built.wheel).namelist())
    apples = files_of([str(f) for f in importlib.metadata.files("coreai-torch") or []])
    assert "coreai_torch/__init__.py" in apples
    assert "coreai_torch/__init__.abi3.so" in ours
    assert not ours & apples


def test_ours_alone(env: Environment, built: Build):
    env.install(built.wheel)
    env.probe("ours")
    assert env.report()[0] == 0


def test_apple_then_ours(env: Environment, built: Build):
    env.install(APPLE)
    env.probe("apple")
    env.install(built.wheel)
    env.probe("ours", "apple")
    env.pip("check")
    status, report = env.report()
    assert status == 0, report
    assert f"coreai-torch {APPLE.rpartition('=')[2]} (tested)" in report


def test_ours_then_apple(env: Environment, built: Build):
    env.install(built.wheel)
    env.install(APPLE)
    env.probe("ours", "apple")


@pytest.mark.parametrize("ours_first", [True, False])
def test_both_in_one_command(env: Environment, built: Build, ours_first):
    env.install(*((built.wheel, APPLE) if ours_first else (APPLE, built.wheel)))
    env.probe("ours", "apple")


def test_the_extra(env: Environment, built: Build):
    env.install(f"coreai-torch-rmsnorm[convert] @ {built.wheel.as_uri()}")
    env.probe("ours", "apple")


def test_upgrade_of_apples(env: Environment, built: Build):
    """From the older of the tested versions, which works as well."""
    env.install("coreai-torch==0.4.2", built.wheel)
    env.probe("ours", "apple")
    env.install("--upgrade", APPLE)
    assert "(tested)" in env.report()[1]
    env.probe("ours", "apple")


def test_upgrade_of_ours(env: Environment, built: Build):
    env.install(built.wheel)
    env.install(APPLE)
    env.install("--force-reinstall", "--no-deps", built.wheel)
    env.probe("ours", "apple")


@pytest.mark.parametrize("ours_first", [True, False])
def test_uninstall_of_ours(env: Environment, built: Build, ours_first):
    for package in (built.wheel, APPLE) if ours_first else (APPLE, built.wheel):
        env.install(package)
    env.uninstall("coreai-torch-rmsnorm")
    env.probe("apple")


@pytest.mark.parametrize("ours_first", [True, False])
def test_uninstall_of_apples(env: Environment, built: Build, ours_first):
    for package in (built.wheel, APPLE) if ours_first else (APPLE, built.wheel):
        env.install(package)
    env.uninstall("coreai-torch")
    env.probe("ours")


@pytest.mark.parametrize("ours_first", [True, False])
def test_editable(env: Environment, built: Build, ours_first):
    for package in (built.editable, APPLE) if ours_first else (APPLE, built.editable):
        env.install(package)
    env.probe("ours", "apple")
    status, report = env.report()
    assert status == 0, report
    assert str(built.source) in report
    env.uninstall("coreai-torch")
    env.probe("ours")


def test_pythonpath_to_a_built_checkout(env: Environment, built: Build):
    env.probe("ours", path=built.source)
    env.install(APPLE)
    env.probe("apple")
    env.probe("ours", "apple", path=built.source)


def test_apples_folder_earlier_on_the_path(env: Environment, built: Build, tmp_path):
    """Nothing of ours can run then, but it does not go unnoticed."""
    env.install(built.wheel)
    folder = tmp_path / "apple"
    env.pip("install", "--no-deps", "--target", folder, APPLE)
    env.probe("apple", path=folder)
    status, report = env.report(folder)
    assert status == 1
    assert "coreai_torch.__main__" in report

    tests = tmp_path / "tests"
    shutil.copytree(ROOT / "tests", tests)
    done = subprocess.run(
        [env.python, "-m", "pytest", "-q", tests],
        cwd=tests,
        env=env.variables(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "Apple's package is imported instead of this project's" in done.stdout + done.stderr


def test_a_lost_initializer(env: Environment, built: Build):
    """Then Apple's `__init__.py` is what runs, and the report says so."""
    env.install(built.wheel, APPLE)
    for file in env.site.glob("coreai_torch/**/__init__.abi3.so"):
        file.unlink()
    status, report = env.report()
    assert status == 1
    assert "PROBLEM" in report
    assert "coreai_torch.composite_ops._rms_norm.RMSNormImpl is in use" in report
    assert "reinstall coreai-torch-rmsnorm" in report


def test_a_converter_that_does_not_load(env: Environment, built: Build, tmp_path):
    """coreai-core is missing: ours trains, and asking for the converter says what is wrong."""
    env.install(built.wheel, APPLE)
    os.unlink(env.folder / "others" / "coreai")
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    import coreai_torch\n"
        "assert 'No module named' in str(caught[0].message), caught\n"
        "from coreai_torch.composite_ops import RMSNorm\n"
        "assert RMSNorm.__module__ == 'coreai_torch.composite_ops.rms_norm'\n"
        "from coreai_torch.conversion import load\n"
        "try:\n"
        "    load('model.aimodel').__enter__()\n"
        "except ImportError as error:\n"
        "    assert 'expected Core AI\\'s runtime, coreai-core, to be' in str(error), error\n"
        "coreai_torch.TorchConverter\n"
    )
    done = subprocess.run(
        [env.python, "-c", code],
        env=env.variables(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "cannot be imported (ModuleNotFoundError: No module named 'coreai'" in done.stderr, (
        done.stderr
    )
    status, report = env.report()
    assert status == 1
    assert "PROBLEM  converter: coreai_torch.TorchConverter is part of Apple's converter" in report


def test_an_untested_version_is_a_warning(env: Environment, built: Build):
    env.install(built.wheel, APPLE)
    (env.site / "coreai_torch" / "__version__.py").write_text('__version__ = "9.9.9"\n')
    code = "import warnings; warnings.simplefilter('always'); import coreai_torch"
    done = subprocess.run(
        [env.python, "-c", code], env=env.variables(), capture_output=True, text=True, check=True
    )
    assert "expected a converter that this package was tested with" in done.stderr
    assert "got 9.9.9" in done.stderr
    env.probe("ours", "apple")


def test_types(env: Environment, built: Build):
    """A type checker sees our classes, and the converter's types where it is installed."""
    code = (
        "from coreai_torch import ExternalizeSpec, TorchConverter\n"
        "from coreai_torch.composite_ops import RMSNorm, RMSNormImpl, RoPE\n"
        "from coreai_torch.ops import rms_norm\n"
        "reveal_type(RMSNorm(8, dtype=None).forward)\n"
        "reveal_type(rms_norm)\n"
        "reveal_type(TorchConverter().to_coreai)\n"
        "RMSNorm('8')\n"
        "ExternalizeSpec(RMSNormImpl, 'rms_norm', ['axes'])\n"
    )
    for package, program in ((built.wheel, "Any"), (APPLE, "AIProgram")):
        env.install(package)
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--python-executable", env.python, "-c", code],
            cwd=env.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        module, function, converter, wrong, *rest = done.stdout.replace('"', "").splitlines()
        assert "def (x: torch._tensor.Tensor) -> torch._tensor.Tensor" in module
        assert "input: torch._tensor.Tensor, scale: torch._tensor.Tensor, eps" in function
        assert program in converter
        assert "incompatible type" in wrong
        assert rest == ["Found 1 error in 1 file (checked 1 source file)"]
