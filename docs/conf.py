"""Settings of Sphinx for the site that `make docs` builds from this folder, the README and the docstrings."""

import re

from sphinx.application import Sphinx

import seft_dist

project = "seft_dist"
author = "the seft_dist authors"
project_copyright = author
release = version = seft_dist.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"seft_dist {release}"
html_show_sphinx = html_show_sourcelink = html_copy_source = False
smartquotes = False  # options begin with two hyphens

myst_heading_anchors = 3
highlight_language = "none"

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
add_module_names = False
napoleon_use_ivar = True

OUTSIDE = re.compile(r"\]\(\.\./README\.md")
"""Links to the README, which is the site's first page."""


def lead_to_first_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Make links that lead out of docs/, for readers of the files, lead to the pages of the site."""
    source[0] = OUTSIDE.sub("](index.md", source[0])


COLON = "\0"
"""Stands for a colon while napoleon looks: "Folder of the run: configuration, ..." is a sentence, not a type."""


def escape(app: Sphinx, kind: str, name: str, item: object, options: object, lines: list[str]) -> None:
    """Keep the bars of |delta| and the star of zero3*.json in docstrings, which are text, not reStructuredText."""
    lines[:] = [re.sub(r"(?<![`*])([|*])(?![`*])", r"\\\1", line) for line in lines]
    if kind == "attribute":
        lines[:] = [line.replace(":", COLON) for line in lines]


def restore(app: Sphinx, kind: str, name: str, item: object, options: object, lines: list[str]) -> None:
    """Put the colons back."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def setup(app: Sphinx) -> None:
    """Register what is done with each page."""
    app.connect("source-read", lead_to_first_page)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon, which writes markup
    app.connect("autodoc-process-docstring", restore, priority=600)
