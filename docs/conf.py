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
napoleon_use_ivar = True
myst_heading_anchors = 2


def skip_fields(app: Any, what: str, name: str, member: object, skip: bool, options: Any) -> bool | None:
    """The fields of a NamedTuple stand in its docstring, not once more each by itself."""
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", skip_fields)
