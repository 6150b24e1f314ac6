"""The site: every Markdown page of the repository that a reader wants, and the API from the docstrings.

The pages are read on a code host as well, so the source folder is the repository itself: a link between two
pages is the same relative path in both places. What is only in the site, the API and the plots of recorded
runs, is generated into docs/generated before the pages are read.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

import generate  # noqa: E402

import aufast  # noqa: E402

project = "aufast"
copyright = "the aufast contributors, BSD-3-Clause"
version = release = aufast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx.ext.viewcode",
]
root_doc = "docs/index"
CONTENTS = (root_doc, "docs/operators/index")
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/**.md"]
exclude_patterns = [
    ".*",
    "build",
    "dist",
    "demo",
    "aufast",
    "csrc",
    "kernels",
    "tests",
    "examples",
    "benchmarks",
]

# A heading of a page has the anchor that a code host gives it.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]

# In docstrings, `this` is code.
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 100
maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"aufast {version}"
html_extra_path = ["site"]  # index.html, which leads to docs/index.html
html_copy_source = False
html_show_sphinx = False

doctest_global_setup = "import torch, aufast\ntorch.manual_seed(0)"


def add_toctrees(app: Sphinx, name: str, source: list[str]) -> None:
    """Make each list of links on a page of contents a part of the site's, the first with all generated."""
    if name not in CONTENTS:
        return
    sections = {
        heading: re.findall(r"^- \[.+?\]\((.+?)\.md\)", body, re.M)
        for heading, body in re.findall(r"^##? (.+?)\n(.*?)(?=^##? |\Z)", source[0], re.M | re.S)
    }
    if name == root_doc:
        sections["Measured"] += ["generated/records/*"]
        sections["API"] = ["generated/api/*"]
    for heading, pages in sections.items():
        if pages:
            lines = [f":hidden:\n:glob:\n:caption: {heading}\n", *pages]
            source[0] += "\n```{toctree}\n" + "\n".join(lines) + "\n```\n"


def run_sessions(app: Sphinx, page: nodes.document) -> None:
    """Let the doctest builder run every block marked `pycon`; those of a page share their names."""
    for block in page.findall(nodes.literal_block):
        if block.get("language") == "pycon":
            block["testnodetype"] = "doctest"
            block["groups"] = [app.env.docname]


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", lambda app: generate.everything(DOCS / "generated"))
    app.connect("source-read", add_toctrees)
    app.connect("doctree-read", run_sessions)
