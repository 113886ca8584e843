"""The pages of ``bptt-jax diagnose --html`` and ``bptt-jax atlas``: one file with everything in it, no script, nothing
fetched."""

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bptt_jax.cli.report import COLUMNS, rows, visible

_STYLE = Path(__file__).with_name("page.css")
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}: {title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{heading}</h1>
<p>{title}</p>
</header>
<main>
{main}
</main>
</body>
</html>
"""
_FLOW = """\
<div class="pair">
<ul class="verdicts" aria-label="Verdicts">
{verdicts}
</ul>
{norms}
</div>
<h2 id="numbers">Numbers</h2>
<div class="scroll" role="region" aria-labelledby="numbers" tabindex="0">
{numbers}
</div>
<h2>Each recurrence, and what to try</h2>
{sections}
<h2>Settings</h2>
{settings}
<h2>What the numbers mean</h2>
<dl>
{meanings}
</dl>"""
_ATLAS = """\
{parts}
<h2>Settings</h2>
{settings}
<h2>What the numbers mean</h2>
<dl>
{meanings}
</dl>"""
_JACOBIAN = "dh<sub>t</sub>/dh<sub>t-1</sub>"
_MEANINGS = {
    "error signal": "The derivative of the loss with respect to the last state that the loss reads, followed back "
    "through the Jacobians alone, so that later losses do not hide its decay.",
    "growth rate": "Slope of the logarithm of the error signal's norm, in nats per step backwards in time: mean ± "
    "standard deviation over the sequences. At -0.1, 10 % is lost at every step; above 0, the signal grows.",
    "horizon": "How many steps back a thousandth of the error signal still arrives: median over the sequences. "
    "Beyond the sequence it is extrapolated by the growth rate; inf where the signal does not shrink.",
    "verdict": "Vanishing: less than a thousandth arrives at the first state. Exploding: a gradient exceeds a "
    "thousand times what the losses put in. Steady: neither. Non-finite: something is NaN or infinite. Of several "
    "sequences, the most frequent verdict; a single one that is not finite decides.",
    "spectral norm and radius": "Largest singular value, and largest modulus of an eigenvalue, of the Jacobian of "
    f"one step, {_JACOBIAN}: mean over steps and sequences. The norm bounds what one step can do to the signal; "
    "the radius alone says little, for products of matrices can grow while every eigenvalue is inside the unit "
    "circle.",
    "loss": "Mean over the sequences.",
}


def page(title: str, record: Mapping[str, Any], norms: Any, spectra: Sequence[tuple[Any, Any]]) -> str:
    """An HTML document; the same arguments give the same text.

    Args:
      title: what was measured.
      record: of `bptt_jax.cli.diagnose.record`.
      norms, spectra: figures of `bptt_jax.plots.flow.plot_parts`, `spectra` in the order of the recurrences.
    """
    recurrences = record["recurrences"]
    told = "; ".join(f"{name}: {s['verdict']}" for name, s in recurrences.items())
    caption = "Norm of dL/dh<sub>t</sub> against time t: median of the sequences, and a band for the middle 80 %."
    sections = map(_section, range(len(recurrences)), recurrences.items(), spectra)
    computed = {**record["versions"], "device": record["device"]}
    main = _FLOW.format(
        verdicts="\n".join(map(_verdict, range(len(recurrences)), recurrences.items())),
        norms=_figure(norms, "norms", f"Gradient norm against time. {told}", caption),
        numbers=_table(
            COLUMNS[:-1], rows(recurrences), "Mean over the sequences, ± standard deviation; horizon: median"
        ),
        sections="\n".join(sections),
        settings=_pairs("Of the command, as in flow.json", _options(record)) + _pairs("Computed with", computed),
        meanings=_defined(_MEANINGS),
    )
    return _document("Gradient flow", title, main)


class AtlasPart(NamedTuple):
    """A map of `bptt_jax.plots.plot_atlas`, and a table under the names of its columns."""

    heading: str
    figure: Any
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def atlas_page(
    title: str,
    parts: Sequence[AtlasPart],
    settings: Mapping[str, Any],
    computed: Mapping[str, str],
    meanings: Mapping[str, str],
    failed: Mapping[str, str],
) -> str:
    """An HTML document of the atlas; the same arguments give the same text.

    Args:
      title: what was measured.
      parts: in their order.
      settings: of the command.
      computed: with what.
      meanings: of the numbers.
      failed: why a cell is missing.
    """
    caption = "Each mark is a cell: how far back its gradient reaches, against what a training step of it costs."
    pieces = []
    for i, part in enumerate(parts):
        drawn = _figure(part.figure, f"map-{i}", f"{part.heading}: map of {len(part.rows)} cells", caption)
        pieces += [
            f'<h2 id="part-{i}">{_escaped(part.heading)}</h2>',
            drawn.replace("<figure>", '<figure class="wide">'),
            f'<div class="scroll" role="region" aria-labelledby="part-{i}" tabindex="0">',
            _table(part.columns, part.rows, "The longest horizon first"),
            "</div>",
        ]
    shown = {name: "none" if value is None else str(value) for name, value in settings.items()}
    tables = [_pairs("Of the command, as in atlas.json", shown), _pairs("Computed with", computed)]
    tables += [_pairs("Not measured", failed)] if failed else []
    main = _ATLAS.format(parts="\n".join(pieces), settings="".join(tables), meanings=_defined(meanings))
    return _document("Atlas of cells", title, main)


def _document(heading: str, title: str, main: str) -> str:
    style = _STYLE.read_text(encoding="utf-8")
    return _PAGE.format(heading=heading, title=_escaped(title), style=style, main=main)


def _defined(meanings: Mapping[str, str]) -> str:
    return "\n".join(f"<dt>{name}</dt>\n<dd>{meaning}</dd>" for name, meaning in meanings.items())


def _verdict(i: int, recurrence: tuple[str, Mapping[str, Any]]) -> str:
    name, s = recurrence
    count, total = s["verdicts"][s["verdict"]], sum(s["verdicts"].values())
    return (
        f'<li class="{s["verdict"]}"><a href="#recurrence-{i}"><bdi>{_escaped(name)}</bdi></a><br>'
        f"<strong>{s['verdict']}</strong> ({count} of {total})</li>"
    )


def _table(names: Sequence[str], cells: Iterable[Sequence[str]], caption: str) -> str:
    """In a narrow window each row stands as a list, which the roles keep a table to those who hear it."""
    head = "".join(f'<th scope="col" role="columnheader">{_lines(name)}</th>' for name in names)

    def row(name: str, *cells: str) -> str:
        pairs = zip(names[1:], cells, strict=False)
        told = (f'<td role="cell" data-name="{" ".join(of.split())}">{_lines(cell)}</td>' for of, cell in pairs)
        return f'<tr role="row"><th scope="row" role="rowheader">{_lines(name)}</th>{"".join(told)}</tr>'

    body = "\n".join(row(*of) for of in cells)
    return (
        '<table class="numbers" role="table">\n'
        f"<caption>{caption}</caption>\n"
        f'<thead role="rowgroup">\n<tr role="row">{head}</tr>\n</thead>\n'
        f'<tbody role="rowgroup">\n{body}\n</tbody>\n</table>'
    )


def _section(i: int, recurrence: tuple[str, Mapping[str, Any]], figures: tuple[Any, Any]) -> str:
    name, s = recurrence
    tries = "\n".join(f"<li>{_escaped(text)}</li>" for text in s["advice"])
    singular = f"Singular values of {_JACOBIAN} over time, all sequences together. Red line: 1."
    plane = f"Eigenvalues of {_JACOBIAN}, a sample of them, and the unit circle."
    return f"""\
<section class="{s["verdict"]}" aria-labelledby="recurrence-{i}">
<h3 id="recurrence-{i}"><bdi>{_escaped(name)}</bdi>: <strong>{s["verdict"]}</strong></h3>
{f"<ul>{chr(10)}{tries}{chr(10)}</ul>" if tries else "<p>Nothing to mend at this length.</p>"}
<div class="pair">
{_figure(figures[0], f"singular-{i}", f"Singular values of {name}", singular)}
{_figure(figures[1], f"plane-{i}", f"Eigenvalues of {name}", plane)}
</div>
</section>"""


def _options(record: Mapping[str, Any]) -> dict[str, str]:
    def shown(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(shown, value)) or "none"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return "not given" if value is None else str(value)

    options = {name: shown(value) for name, value in record["settings"].items()}
    if record["vocabulary"] is not None:
        options["characters of the text"] = f"{len(record['vocabulary'])} different ones"
    return options


def _pairs(caption: str, values: Mapping[str, str]) -> str:
    body = "\n".join(
        f'<tr><th scope="row">{_escaped(k)}</th><td>{_escaped(v)}</td></tr>' for k, v in values.items()
    )
    return f'<table class="settings">\n<caption>{caption}</caption>\n<tbody>\n{body}\n</tbody>\n</table>\n'


def _lines(text: str) -> str:
    return "<br>".join(map(_escaped, text.split("\n")))


def _escaped(text: str) -> str:
    """With nothing in it that HTML forbids, or that could order the words around it anew."""
    return html.escape(visible(text))


def _figure(figure: Any, key: str, label: str, caption: str) -> str:
    """Inline SVG whose colours follow the page's: each can be set by a property named after it.

    Args:
      key: what the identifiers in the SVG begin with, so that no two figures share one.
      label: for those who do not see it.
    """
    from matplotlib import rc_context

    written = io.StringIO()
    with rc_context({"svg.hashsalt": key}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, dpi=200, metadata=nothing)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]  # after a document type, which would be an address
    svg = re.sub(r"<!--.*?-->|<style.*?</style>| xmlns(:xlink)?=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    svg = re.sub(r'( id="| xlink:href="#|url\(#)', rf"\g<1>{key}-", svg).replace(" xlink:href=", " href=")
    svg = re.sub(r"(?<=: )(#([0-9a-f]{6}))\b", r"var(--c\2, \1)", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{_escaped(label)}"', 1)
    return f"<figure>\n{svg.strip()}\n<figcaption>{caption}</figcaption>\n</figure>"
