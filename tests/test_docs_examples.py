"""The examples on the pages of the API, and on the one for a quick start, do what they show."""

from __future__ import annotations

import doctest
import re

import pytest
from environments import ROOT

import coreai_torch
from coreai_torch._coexistence import APPLE_NAMES

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("api/*.md"))
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="needs a checkout")


def blocks(text: str, language: str) -> str:
    """The fenced blocks of a page in their order, with the line numbers of the page."""
    code, kept = "", ""
    for line in text.splitlines(keepends=True):
        if line.startswith("```"):
            code = line[3:].strip() if not code else ""
            kept += "\n"
        else:
            kept += line if code == language else "\n"
    return kept


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples(page):
    examples = doctest.DocTestParser().get_doctest(
        blocks(page.read_text(), "pycon"), {}, page.name, str(page), 0
    )
    failures: list[str] = []
    doctest.DocTestRunner(verbose=False).run(examples, out=failures.append)
    assert not failures, "".join(failures)
    written = len(re.findall(r"^>>> ", page.read_text(), flags=re.M))
    assert len(examples.examples) == written


def test_there_are_examples():
    without = [page.stem for page in PAGES if ">>> " not in page.read_text()]
    assert without == ["conversion", "index"]  # docs/convert.md has those of conversion


def test_quick_start():
    page = DOCS / "quickstart.md"
    code = blocks(page.read_text(), "python")
    assert code.strip()
    exec(compile(code, str(page), "exec"), {"__name__": "quickstart"})


def test_the_api_pages_have_every_public_name():
    text = "".join(page.read_text() for page in PAGES)
    not_ours = {"__version__", *APPLE_NAMES["coreai_torch"]}
    public = {name for name in coreai_torch.__all__ if not name.startswith("_")}
    for name in sorted(public - not_ours):
        assert f":: coreai_torch.{name}" in text, f"no page of docs/api has coreai_torch.{name}"
