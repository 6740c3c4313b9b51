"""The snippets of docs/pytorch.md run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import coreai_torch

PAGE = Path(__file__).parents[1] / "docs" / "pytorch.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs a checkout")


def sections() -> dict[str, list[tuple[str, str]]]:
    """Kind and code of the snippets under each heading; the start of the page is under ''."""
    found: dict[str, list[tuple[str, str]]] = {}
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE):
        title = "" if section.startswith("# ") else section.partition("\n")[0]
        found[title] = re.findall(
            r"^```python *(\S*)\n(.*?)^```", section, re.DOTALL | re.MULTILINE
        )
    return found


SECTIONS = sections() if PAGE.exists() else {"": []}
START = "".join(code for _, code in SECTIONS.pop(""))


@pytest.fixture(autouse=True)
def _leave_no_mode_behind():
    torch._dynamo.reset()
    yield
    coreai_torch.set_compile_mode("auto")


def run(kinds: set[str], title: str) -> None:
    code = "\n".join(code for kind, code in SECTIONS[title] if kind in kinds)
    exec(compile(START + code, f"{PAGE.name}: {title}", "exec"), {"__name__": "docs"})


@pytest.mark.parametrize(
    "title", [t for t, snippets in SECTIONS.items() if "" in dict(snippets)] or [None]
)
def test_snippets(title, tmp_path, monkeypatch):
    if "onnx" in str(SECTIONS[title]):
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    run({""}, title)


@pytest.mark.slow
@pytest.mark.parametrize(
    "title", [t for t, snippets in SECTIONS.items() if "slow" in dict(snippets)] or [None]
)
def test_slow_snippets(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run({"", "slow"}, title)


@pytest.mark.slow
def test_snippets_of_two_processes(tmp_path):
    snippets = [code for s in SECTIONS.values() for kind, code in s if kind == "two-processes"]
    assert len(snippets) == 2
    program = tmp_path / "program.py"
    group = "torch.distributed.init_process_group('gloo')\n"
    # Not by Python's own end, which a gloo thread may abort: examples/lm_parallel.py says why.
    end = "torch.distributed.destroy_process_group()\nimport os\nos._exit(0)\n"
    program.write_text("\n".join([START, group, *snippets, end]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*launch, "--nproc-per-node", "2", program],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_every_snippet_is_of_a_known_kind():
    kinds = {kind for snippets in SECTIONS.values() for kind, _ in snippets}
    assert kinds == {"", "slow", "two-processes"}
    assert PAGE.read_text().count("```python") == 1 + sum(map(len, SECTIONS.values()))
