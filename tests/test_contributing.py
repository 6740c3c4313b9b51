"""What the files for contributors say holds: pins, versions, workflows, make targets, links."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from environments import ROOT

CONFIG = ROOT / ".pre-commit-config.yaml"
pytestmark = pytest.mark.skipif(not CONFIG.exists(), reason="needs a checkout")


def text(name: str) -> str:
    return (ROOT / name).read_text()


def pins(config: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"([a-z][a-z-]*)==([\d.]+)", config):
        found.setdefault(name, set()).add(version)
    return found


def test_hooks_have_the_pins_of_the_linters():
    hooks, project = pins(text(CONFIG.name)), pins(text("pyproject.toml"))
    shared = {"ruff", "clang-format", "check-jsonschema"}
    assert shared <= set(hooks)
    for name in shared:
        assert hooks[name] == project[name], f"{name}: hooks and pyproject.toml differ"
        assert len(hooks[name]) == 1


def test_the_version_is_the_same_everywhere():
    (project,) = re.findall(r'^version = "(.+)"$', text("pyproject.toml"), flags=re.M)
    (package,) = re.findall(r'^__version__ = "(.+)"$', text("coreai_torch/__init__.py"), re.M)
    assert project == package


def test_the_workflows_are_valid():
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert [w.stem for w in workflows] == ["ci", "release"]
    schema = ("--builtin-schema", "vendor.github-workflows")
    command = (sys.executable, "-m", "check_jsonschema", *schema)
    done = subprocess.run([*command, *workflows], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_named_exists():
    """`make TARGET` and paths, in what contributors and CI read."""
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", text("Makefile"), flags=re.M))
    for page in ("README.md", "CONTRIBUTING.md", ".ci/run", ".github/workflows/ci.yml"):
        for target in re.findall(r"\bmake ([a-z][a-z0-9-]+)", text(page)):
            assert target in targets, f"{page}: make {target}"
    for page in ("README.md", "CONTRIBUTING.md", "csrc/README.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text(page)):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"
    for path in re.findall(r"tests/\w+\.py", text("CONTRIBUTING.md")):
        assert (ROOT / path).exists(), f"CONTRIBUTING.md: {path}"
