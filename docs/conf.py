"""Sphinx: `pip install -e ".[docs]"`, then `python -m sphinx -W -b html docs docs/_build`."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

project = "gdiff_jax"
author = "the authors of gdiff_jax"
release = version = importlib.metadata.version("gdiff-jax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"gdiff_jax {release}"
html_show_sphinx = False
smartquotes = False  # flags and formulas hold -- and '

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
# Pages of benchmarks/results link to data files that lie beside them there; here such a link is the plain name.
nitpick_ignore_regex = [("myst", r"breaching|[\w-]+\.(jsonl?|csv)")]

default_role = "code"  # docstrings write `name` where RST wants ``name``
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # the signature has them
napoleon_use_ivar = True  # attributes as a list: as entries of their own they would be described twice


def _escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Bars in docstrings are norms, `|| g - g~ ||`, never RST's substitutions; "C." is no list."""
    for i, line in enumerate(lines):
        line = re.sub(r"^(\s*)(?=\w\.$)", r"\1\\", line)
        parts = re.split(r"(`[^`]*`)", line)
        lines[i] = "".join(part if part.startswith("`") else part.replace("|", r"\|") for part in parts)


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples have no docstring but "Alias for field number 0"; the signature shows them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _escape)
    app.connect("autodoc-skip-member", _skip)
