"""How a page is written: templates with everything in them, figures as drawings whose colours follow the page's."""

import base64
import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bptt_jax.leaves import visible

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape
    from matplotlib import rc_context
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("pages need matplotlib and Jinja2: python -m pip install 'bptt_jax[plot]'") from error

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(
    template: str,
    heading: str,
    title: str,
    *,
    tables: Mapping[str, Mapping[str, str]],
    meanings: Mapping[str, str],
    script: str = "",
    **values: Any,
) -> str:
    """An HTML document; the same arguments give the same text.

    Args:
      template: a file beside this one, made from ``base.html``.
      heading: what kind of page it is.
      title: what was measured.
      tables: of settings, by caption.
      meanings: of the numbers, by name.
      script: a file beside this one; no other script runs on the page.
      values: of the template. Whatever is no `Markup` is text, and what cannot be seen in it is shown escaped.
    """
    code = (_HERE / script).read_text(encoding="utf-8") if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return _ENVIRONMENT.get_template(template).render(
        heading=heading,
        title=title,
        tables=tables,
        meanings=meanings,
        policy=Markup(_POLICY + f"; script-src 'sha256-{digest}'") if code else Markup(_POLICY),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(code),
        **values,
    )


def drawing(figure: Figure, key: str, label: str, kind: str = "drawn") -> Markup:
    """Inline SVG whose colours follow the page's: each can be set by a property named after it.

    Args:
      key: what the identifiers in the SVG begin with, so that no two figures share one.
      label: for those who do not see it.
      kind: its class.
    """
    written = io.StringIO()
    with rc_context({"svg.hashsalt": key}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, dpi=200, metadata=nothing)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]  # after a document type, which would be an address
    svg = re.sub(r"<!--.*?-->|<style.*?</style>| xmlns(:xlink)?=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    svg = re.sub(r'( id="| xlink:href="#|url\(#)', rf"\g<1>{key}-", svg).replace(" xlink:href=", " href=")
    svg = re.sub(r"(?<=: )(#([0-9a-f]{6}))\b", r"var(--c\2, \1)", svg)
    opening = f'<svg role="img" class="{kind}" aria-label="{escape(visible(label))}"'
    return Markup(svg.replace("<svg", opening, 1).strip())


def in_lines(text: str) -> Markup:
    """Each line below the other."""
    return Markup("<br>").join(visible(line) for line in text.split("\n"))


def _shown(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_HERE),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"lines": in_lines, "spaced": lambda text: " ".join(text.split())}
