"""The wheel of a release: repaired, with a manylinux tag, whole, and in use where installed."""

from __future__ import annotations

import sys
import zipfile

import pytest
from environments import ROOT, Environment, run

TOOLS = ROOT / "tools"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux"),
    pytest.mark.skipif(not TOOLS.exists(), reason="needs a checkout"),
]


@pytest.fixture(scope="module")
def repaired(built, tmp_path_factory):
    out = tmp_path_factory.mktemp("repaired")
    run(sys.executable, TOOLS / "wheel.py", "--repair", built.wheel, "--out", out)
    (wheel,) = out.glob("*.whl")
    return wheel


def test_the_tag_says_where_it_runs(repaired):
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{version}-{version}-manylinux_2_" in repaired.name


def test_it_holds_none_of_the_libraries_of_torch(repaired):
    names = zipfile.ZipFile(repaired).namelist()
    shared = [name for name in names if ".so" in name]
    assert len(shared) == 3, "_C, and the __init__ of two packages"
    assert not [name for name in names if ".libs/" in name]


def test_it_works_where_it_is_installed(repaired, tmp_path):
    environment = Environment(tmp_path / "venv")
    environment.install("--no-deps", repaired)
    variables = environment.variables()
    printed = run(environment.python, TOOLS / "smoke_test.py", cwd=tmp_path, env=variables)
    assert printed.startswith(str(environment.site))
    assert "coreai_torch.composite_ops.rms_norm, fused" in printed
