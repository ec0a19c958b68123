"""Settings of the documentation: Sphinx with MyST (Markdown) and furo. Build with `python3 dev.py docs`."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "whence"
author = "the whence authors"
copyright = "the whence authors"
version = release = installed_version("whence")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "cli_help", "methods_table"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"whence {release}"
html_show_sourcelink = False
html_copy_source = False


def _keep_colons(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    # napoleon takes what stands before a colon in an attribute's first line for its type ("-1: not visited" becomes the
    # type -1). Types are annotations here, so give it an empty comment first.
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _keep_colons, priority=400)  # before napoleon's 500
