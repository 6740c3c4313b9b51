"""Sphinx settings. `make docs` builds the pages, with warnings as errors."""

import os
from importlib.metadata import version as version_of
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.nodes import get_node_source

import coreai_torch
from coreai_torch._externalize_spec import ExternalizeSpec

# With Apple's converter beside it, the name stands for Apple's class.
coreai_torch.ExternalizeSpec = ExternalizeSpec

project = "coreai-torch-rmsnorm"
version = release = version_of(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = project
html_show_copyright = False

default_role = "code"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
napoleon_use_ivar = True

# A reference to a name of this project that does not exist is an error. Others' are not looked up,
# as that would take a network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!coreai_torch).*")]

# Pages include files from all over the repository. A link to such a file leads to its page.
PAGES = {
    "README.md": "index",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "benchmarks/README.md": "performance",
    "benchmarks/TRIALS.md": "trials",
    "benchmarks/results/RESULTS.md": "performance",
    "benchmarks/results/cuda.md": "performance_cuda",
    "build_backend/README.md": "design",
    "csrc/README.md": "design",
    "tests/simt/README.md": "design",
}
ROOT = Path(__file__).resolve().parents[1]


def link_to_pages(app: Sphinx, doctree: nodes.document) -> None:
    """Turn links to files of the repository into links to the pages that include them."""
    for link in doctree.findall(addnodes.pending_xref):
        if link.get("reftype") != "myst" or link["reftarget"] in app.env.found_docs:
            continue
        path, _, heading = link["reftarget"].partition("#")
        if link.get("refdomain") == "doc":  # MyST knows it as a file, and has left out its suffix
            path, heading = f"{path}.md", link.get("reftargetid") or ""
        source = Path(get_node_source(link) or doctree["source"])
        file = Path(os.path.normpath(ROOT / "docs" / source.parent / path))
        page = PAGES.get(str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else "")
        if page is not None:
            link["refdomain"], link["reftarget"] = "doc", page
            link["reftargetid"] = heading or None


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", link_to_pages)
