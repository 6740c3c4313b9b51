"""What docs/models.md and the example say is what happens."""

from __future__ import annotations

import importlib.util
import os
import re
import sys

import pytest
from environments import ROOT, run

pytest.importorskip("transformers", reason="transformers is not installed")

PAGE = ROOT / "docs" / "models.md"
HAS_CONVERTER = importlib.util.find_spec("coreai_torch.converter") is not None


@pytest.mark.skipif(not PAGE.exists(), reason="needs a checkout")
def test_every_snippet(tmp_path, monkeypatch, capsys):
    """In the page's order, in one namespace, as a reader would enter them."""
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    snippets = list(re.finditer(r"^```python *(\S*)\n(.*?)^```", text, flags=re.M | re.S))
    assert [snippet[1] for snippet in snippets].count("converter") == 1
    namespace: dict[str, object] = {"__name__": "models"}
    for snippet in snippets:
        if snippet[1] == "converter" and not HAS_CONVERTER:
            continue
        line = text[: snippet.start()].count("\n") + 1
        code = "\n" * line + snippet[2]  # errors then have the page's line numbers
        exec(compile(code, str(PAGE), "exec"), namespace)
    (shown,) = re.findall(r"^```\n(norms replaced: .*?)^```", text, flags=re.M | re.S)
    assert capsys.readouterr().out.startswith(shown)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("gemma3", "bfloat16")])
def test_the_example(family, dtype):
    example = ROOT / "examples" / "finetune_transformers.py"
    sizes = {"steps": 4, "batch": 2, "length": 64, "dim": 128, "layers": 2, "data-mb": 0.2}
    options = {**sizes, "device": "cpu", "family": family, "dtype": dtype}
    given = [text for name, value in options.items() for text in (f"--{name}", value)]
    printed = run(sys.executable, example, *given, env=dict(os.environ))
    assert f"norms replaced: {5 if family == 'llama' else 13}, left as they are: 0" in printed
    first = re.findall(r"norms +[\d,]+ +([\d.]+) +[\d.]+$", printed, flags=re.M)
    assert len(first) == 2
    assert first[0] == first[1]
