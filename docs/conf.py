"""Settings of the documentation site: ``python -m sphinx -W docs OUT`` builds it, without a network."""

import importlib.metadata
from typing import Any

project = "bptt_jax"
release = importlib.metadata.version("bptt_jax")
copyright = "the bptt_jax developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
default_role = "py:obj"  # `name` in a docstring: a link where the name is on the site, else just the name
html_theme = "furo"
html_title = f"bptt_jax {release}"
html_copy_source = False
html_show_sphinx = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes, which types do not
autodoc_preserve_defaults = True
napoleon_use_rtype = False  # "Returns: x, of this shape: what it is" is one sentence
napoleon_attr_annotations = False
napoleon_custom_sections = [("Attributes", "params_style")]
myst_heading_anchors = 2


def skip_fields(app: Any, what: str, name: str, member: object, skip: bool, options: Any) -> bool | None:
    """The fields of a NamedTuple stand in its docstring, not once more each by itself."""
    return True if type(member).__name__ == "_tuplegetter" else None


def whole_sentence(app: Any, what: str, name: str, of: object, options: Any, lines: list[str]) -> None:
    """Of a property's first line napoleon would take what stands before a colon for its type."""
    if what == "property":
        lines[:0] = ["..", ""]  # a comment first


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-docstring", whole_sentence, priority=400)
