"""Settings of the documentation site: ``python -m sphinx -W docs OUT`` builds it, without a network."""

import ast
import base64
import importlib.metadata
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

project = "bptt_jax"
release = importlib.metadata.version("bptt_jax")
copyright = "the bptt_jax developers"
extensions = ["myst_nb", "sphinx_design", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
default_role = "py:obj"  # `name` in a docstring: a link where the name is on the site, else just the name
html_theme = "furo"
html_title = f"bptt_jax {release}"
html_copy_source = False
html_show_sphinx = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # `written_signature` has them
python_maximum_signature_line_length = 90
autodoc_preserve_defaults = True
napoleon_use_rtype = False  # "Returns: x, of this shape: what it is" is one sentence
napoleon_attr_annotations = False
napoleon_custom_sections = [("Attributes", "params_style")]
myst_heading_anchors = 2
myst_enable_extensions = ["colon_fence"]
nb_execution_mode = "off"  # notebooks are shown as they are committed
nb_merge_streams = True

NOTEBOOKS = {
    "decision": "Neuroscience",
    "characters": "Language",
    "agent_memory": "Agents",
    "spiking": "Spiking networks",
    "double_pendulum": "Physics",
    "irregular_times": "Differential equations",
    "unrolled_optimisation": "Unrolled optimisation",
    "depth_as_time": "Deep networks",
    "pytorch_checkpoint": "From PyTorch",
    "flipflop": "Dynamical systems",
}


def skip_fields(app: Any, what: str, name: str, member: object, skip: bool, options: Any) -> bool | None:
    """The fields of a NamedTuple stand in its docstring, not once more each by itself."""
    return True if type(member).__name__ == "_tuplegetter" else None


def written_signature(
    app: Any, what: str, name: str, of: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str] | None:
    """As in the source, where types have the names that were given to them, and arrays their axes."""
    if what not in ("function", "method"):
        return None
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(of)))).body
    if not isinstance(node, ast.FunctionDef) or node.returns is None:
        return None
    if what == "method":
        del node.args.args[0]
    shown = (ast.unparse(part).replace("' ", "'") for part in (node.args, node.returns))
    arguments, result = shown
    return f"({arguments})", result.strip("'")


def whole_sentence(app: Any, what: str, name: str, of: object, options: Any, lines: list[str]) -> None:
    """Of a property's first line napoleon would take what stands before a colon for its type."""
    if what == "property":
        lines[:0] = ["..", ""]  # a comment first


def make_gallery(app: Any) -> None:
    """The notebooks as they are, and a page with a card for each: its question, field, opening and last picture."""
    folder = Path(app.srcdir) / "gallery"
    folder.mkdir(exist_ok=True)
    cards = []
    for name, subject in NOTEBOOKS.items():
        text = (Path(app.srcdir).parent / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
        cells = json.loads(text)["cells"]
        question, opening, *_ = "".join(cells[0]["source"]).removeprefix("# ").split("\n\n")
        pictures = [
            output["data"].get("image/png")
            for cell in cells
            for output in cell.get("outputs", ())
            if "data" in output
        ]
        (folder / f"{name}.ipynb").write_text(text, encoding="utf-8")
        (folder / f"{name}.png").write_bytes(base64.b64decode("".join([p for p in pictures if p][-1])))
        cards += [
            f":::{{grid-item-card}} {question}",
            f":link: {name}\n:link-type: doc\n:img-top: {name}.png\n:img-alt: the last figure of the notebook\n",
            f"**{subject}.** {opening}\n:::\n",
        ]
    head = "# Gallery\n\nOne field each: a question, what was measured, and what the numbers changed.\n"
    listed = "\n".join(["```{toctree}", ":hidden:", "", *NOTEBOOKS, "```", ""])
    (folder / "index.md").write_text(
        "\n".join([head, "::::{grid} 1 1 2 2", ":gutter: 3\n", *cards, "::::\n", listed])
    )


def setup(app: Any) -> None:
    app.connect("builder-inited", make_gallery)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-signature", written_signature)
    app.connect("autodoc-process-docstring", whole_sentence, priority=400)
