"""What docs/convert.md and the example say is what happens."""

from __future__ import annotations

import os
import re
import sys

import pytest
from environments import ROOT, run

pytest.importorskip("coreai_torch.converter", reason="Apple's converter is not installed")

PAGE = ROOT / "docs" / "convert.md"


def test_every_snippet(tmp_path, monkeypatch, capsys):
    """In the page's order, in one namespace, as a reader would enter them."""
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    snippets = list(re.finditer(r"^```python\n(.*?)^```", text, flags=re.M | re.S))
    assert snippets
    namespace: dict[str, object] = {"__name__": "convert"}
    for snippet in snippets:
        line = text[: snippet.start()].count("\n") + 1
        code = "\n" * line + snippet[1]  # errors then have the page's line numbers
        exec(compile(code, str(PAGE), "exec"), namespace)
    printed = capsys.readouterr().out
    shown = re.sub(r"\s+", " ", text[text.index("#coreai.composite") :].partition("}>")[0])
    assert shown in printed
    assert len(re.findall(r"^\S*norm\.rmsnorm_impl_", printed, flags=re.M)) == 2


@pytest.mark.slow
def test_the_example(tmp_path):
    example = ROOT / "examples" / "train_and_convert.py"
    printed = run(sys.executable, example, "--steps", "4", "--out", tmp_path, env=dict(os.environ))
    assert "9 calls of blocks.0.attention_norm.rmsnorm_impl_" in printed
    assert "8 calls of blocks.0.attention.q_norm.rmsnorm_impl_" in printed
    assert "Both agree within float32 rounding." in printed
    assert (tmp_path / "language_model.aimodel").is_dir()
