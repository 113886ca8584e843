"""Results on one page: to read, and, where scripts run, to explore."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from markupsafe import Markup

from bptt_jax.analysis.fixed_point_results import FixedPoints
from bptt_jax.analysis.flow_results import GradientFlow
from bptt_jax.analysis.influence import InfluenceMap
from bptt_jax.analysis.lyapunov import LyapunovSpectrum, as_one
from bptt_jax.analysis.verdict import COLUMNS, table_row
from bptt_jax.files import atomic_path
from bptt_jax.leaves import visible
from bptt_jax.linalg.eigensystem import Eigensystem
from bptt_jax.pages import embedded
from bptt_jax.pages.document import document, drawing
from bptt_jax.plots.dynamics import plot_fixed_points, plot_modes
from bptt_jax.plots.exponents import plot_exponents
from bptt_jax.plots.flow import plot_parts
from bptt_jax.plots.influence import plot_influence_map
from bptt_jax.plots.style import Figure, batched, figure_of

Reported: TypeAlias = GradientFlow | LyapunovSpectrum | InfluenceMap | FixedPoints | Eigensystem

_KINDS = {
    GradientFlow: "Gradient flow",
    LyapunovSpectrum: "Lyapunov exponents",
    InfluenceMap: "Influence map",
    FixedPoints: "Fixed points",
    Eigensystem: "Eigensystem",
}
_ROWS = 64  # of a table
_CURVES = 16  # exponents whose estimates are followed
_MARKS = 2000  # of a figure, beyond which they are an image
_JACOBIAN = Markup("dh<sub>t</sub>/dh<sub>t-1</sub>")
_OF_FLOWS = {
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
    "one step: mean over steps and sequences. The norm bounds what one step can do to the signal; the radius alone "
    "says little, for products of matrices can grow while every eigenvalue is inside the unit circle.",
    "loss": "Mean over the sequences.",
}
_OF_OTHERS: dict[type, dict[str, str]] = {
    LyapunovSpectrum: {
        "exponent": "The mean rate at which a small difference between two states grows along a trajectory. Above 0, "
        "differences grow: chaos; below 0, they fade. The error is a standard error.",
    },
    InfluenceMap: {
        "influence": "The norm of the Jacobian of a later state by an earlier one, ‖dh_t/dh_s‖: the most that a small "
        "change at s can be at t, relative to its size.",
    },
    FixedPoints: {
        "fixed point": "A state that a step maps to itself. Stable: all small changes fade. Saddle: some grow. "
        "Marginal: some neither grow nor fade.",
    },
    Eigensystem: {
        "eigenvalue": "The factor by which a step multiplies the size of a mode: inside the unit circle it fades, and "
        "it turns by the angle at every step.",
    },
}


class Part(NamedTuple):
    """A result that is no gradient flow.

    Attributes:
      key: of its place on the page.
      name: that it was given.
      kind: of result, in words.
      said: what was found.
      figures: each with its caption.
      live: what the script makes of its data: "modes", "map" or "series"; "" for nothing.
      live_caption: below that.
      columns, rows, caption: of a table; without rows there is none.
      notes: what was left out.
      data: for the script.
    """

    key: str
    name: str
    kind: str
    said: str
    figures: Sequence[tuple[Markup, str]]
    live: str = ""
    live_caption: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    caption: str = ""
    notes: Sequence[str] = ()
    data: Mapping[str, Any] | None = None


def report(
    results: Reported | Mapping[str, Reported], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Writes results as one self-contained HTML file, which needs no network.

    Gradient flows stand first and together: their verdicts, the gradient norms, a table, what to try, singular values
    and eigenvalues. Where scripts run, a slider goes through time, and singular values and eigenvalues move along;
    recurrences, sequences and leaves of the state are switched on and off; padding is shaded and resets are marked.
    Exponents, influence maps, fixed points and eigensystems follow, each with its figure and table. Without scripts,
    and in print, the figures are there as they are. Of long sequences and large batches the script has a part, and
    the page says which.

    Args:
      results: a `GradientFlow` or a `LyapunovSpectrum` (of one sequence, or batched by ``jax.vmap``), an
        `InfluenceMap`, `FixedPoints` (of one search) or an `Eigensystem`; or several by name.
      path: of the file, which is there whole or not at all.
      title: below the heading; by default what is in it.

    Returns:
      The path.

    Raises:
      TypeError, ValueError: `results` are none of these, or none; a batch of what is shown one by one.
      OSError: the file cannot be written.
      ImportError: matplotlib or Jinja2 is not installed.

    Example:
      >>> import tempfile
      >>> step = lambda w, h, x: jnp.tanh(w @ h + x)
      >>> w, xs = 0.5 * jnp.eye(2), jnp.ones((20, 2))
      >>> flow = bptt.gradient_flow(step, w, jnp.zeros(2), xs, lambda states: states[-1].sum())
      >>> found = bptt.lyapunov_exponents(step, w, jnp.zeros(2), xs)
      >>> path = bptt.report({"tanh": flow, "exponents": found}, tempfile.mkdtemp() + "/page.html")
      >>> path.read_text(encoding="utf-8")[:15]
      '<!DOCTYPE html>'
    """
    named = _named(results)
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title: expected a str or None, got {type(title).__name__}")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected that of a file, got {type(path).__name__}")
    text = report_page(named, ", ".join(named) if title is None else title)
    file = Path(path)
    with atomic_path(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file


def report_page(
    results: Mapping[str, Reported],
    title: str,
    *,
    tables: Mapping[str, Mapping[str, str]] | None = None,
    gated: Mapping[str, bool | None] | None = None,
) -> str:
    """The document of `report`.

    Args:
      results: by name, of one or more.
      title: below the heading.
      tables: of settings, by caption.
      gated: which recurrences have gates; see `bptt_jax.analysis.GradientFlow.advice`.
    """
    flows = {name: _one_axis(found) for name, found in results.items() if isinstance(found, GradientFlow)}
    others = {name: found for name, found in results.items() if not isinstance(found, GradientFlow)}
    parts = [_part(f"part-{i}", visible(name), found) for i, (name, found) in enumerate(others.items())]
    of_flows, notes = embedded.of_flows(flows)
    data = {"quantities": embedded.QUANTITIES, "flows": of_flows, "parts": {p.key: p.data for p in parts if p.live}}
    meanings = dict(_OF_FLOWS if flows else {})
    for kind, words in _OF_OTHERS.items():
        if any(isinstance(found, kind) for found in others.values()):
            meanings |= words
    return document(
        "report.html",
        "Gradient flow" if flows else "Dynamics",
        title,
        tables=tables or {},
        meanings=meanings,
        script="page.js",
        data=embedded.data_block(data),
        notes=notes,
        parts=parts,
        **_of_flows(flows, gated or {}),
    )


def _named(results: Any) -> Mapping[str, Reported]:
    named = results if isinstance(results, Mapping) else {_KINDS.get(type(results), ""): results}
    for name, found in named.items():
        if not isinstance(name, str):
            raise TypeError(f"results: expected names that are str, got {name!r}")
        if type(found) not in _KINDS:
            kinds = ", ".join(kind.__name__ for kind in _KINDS)
            raise TypeError(f"results: expected {kinds}, or these by name, got {type(found).__name__} ({name!r})")
    if not named:
        raise ValueError("results: expected at least one, got an empty mapping")
    return named


def _one_axis(flow: GradientFlow) -> GradientFlow:
    """A batch of any axes as one; a single sequence as it is."""
    axes = flow.loss.ndim
    if axes < 2:
        return flow
    return jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[axes:]), flow)


def _of_flows(flows: Mapping[str, GradientFlow], gated: Mapping[str, bool | None]) -> dict[str, Any]:
    """Values of the template."""
    if not flows:
        return {"flows": []}
    # No name is mathematics to matplotlib.
    norms, spectra = plot_parts({visible(name).replace("$", r"\$"): flow for name, flow in flows.items()})
    singular = Markup("Singular values of {} over time, all sequences together. Red line: 1.").format(_JACOBIAN)
    plane = Markup("Eigenvalues of {}, a sample of them, and the unit circle.").format(_JACOBIAN)
    told, rows = [], []
    for i, (name, flow) in enumerate(flows.items()):
        summary, drawn = flow.summary(), spectra.get(visible(name).replace("$", r"\$"))
        rows.append((visible(name), *table_row(summary)))
        told.append(
            {
                "key": f"recurrence-{i}",
                "name": name,
                "verdict": summary["verdict"],
                "count": summary["verdicts"][summary["verdict"]],
                "total": sum(summary["verdicts"].values()),
                "advice": flow.advice(gated=gated.get(name)),
                "figures": []
                if drawn is None
                else [
                    (drawing(drawn[0], f"singular-{i}", f"Singular values of {name}"), singular),
                    (drawing(drawn[1], f"plane-{i}", f"Eigenvalues of {name}"), plane),
                ],
            }
        )
    verdicts = "; ".join(f"{flow['name']}: {flow['verdict']}" for flow in told)
    caption = Markup(
        "Norm of dL/dh<sub>t</sub> against time t: median of the sequences, and a band for the middle 80 %."
    )
    return {
        "flows": told,
        "norms": drawing(norms, "norms", f"Gradient norm against time. {verdicts}"),
        "norms_caption": caption,
        "columns": COLUMNS,
        "rows": rows,
    }


def _part(key: str, name: str, found: Any) -> Part:
    if isinstance(found, LyapunovSpectrum):
        return _exponents(key, name, found)
    if isinstance(found, InfluenceMap):
        return _influence(key, name, found)
    if isinstance(found, FixedPoints):
        return _fixed_points(key, name, found)
    return _eigensystem(key, name, found)


def _exponents(key: str, name: str, found: LyapunovSpectrum) -> Part:
    pooled = as_one(found)
    values, errors = (np.asarray(a, np.float64) for a in (pooled.exponents, pooled.standard_errors))
    converged = np.asarray(pooled.converged)
    rows = [
        (str(i + 1), f"{values[i]:+.5f}", f"{errors[i]:.5f}", "yes" if converged[i] else "no")
        for i in range(min(len(values), _ROWS))
    ]
    live: dict[str, Any] = {}
    if found.exponents.ndim == 1:
        running = found.running[:, :_CURVES]
        labels = [f"exponent {i + 1}" for i in range(running.shape[1])]
        live = {
            "live": "series",
            "live_caption": "The estimates from the steps up to t.",
            "data": embedded.of_series(running, labels, f"nats per {found.unit}"),
        }
    return Part(
        key,
        name,
        _KINDS[LyapunovSpectrum],
        pooled.statement,
        [
            (
                _drawn(figure_of(plot_exponents(found).axes[0]), key, name),
                "Exponents in their order, with two standard errors; a red triangle stands for -inf.",
            )
        ],
        columns=("number", f"exponent\nnats per {found.unit}", "standard\nerror", "converged"),
        rows=rows,
        caption="The exponents, the largest first",
        notes=_first(len(values), "exponents"),
        **live,
    )


def _influence(key: str, name: str, found: InfluenceMap) -> Part:
    figure = plot_influence_map(found)
    times, norms = np.asarray(found.times), np.asarray(found.log_norms, np.float64) / math.log(10)
    to_end = [(str(t), f"{norm:+.2f}") for t, norm in zip(times[:-1], norms[-1, :-1], strict=True)]
    return Part(
        key,
        name,
        _KINDS[InfluenceMap],
        found._headline(),
        [
            (
                _drawn(figure, key, name),
                Markup("Norm of dh<sub>t</sub>/dh<sub>s</sub>: red where it has grown, blue where it has shrunk."),
            )
        ],
        live="map",
        live_caption="Red where an influence has grown, blue where it has shrunk, the more so the stronger the colour.",
        columns=("s", "log10 of\nthe influence"),
        rows=to_end[:_ROWS],
        caption=f"Influence of h_s on the last state, h_{times[-1]}",
        data=embedded.of_map(found),
    )


def _fixed_points(key: str, name: str, found: FixedPoints) -> Part:
    distinct = found.distinct()
    kinds, values = distinct.kinds, np.asarray(distinct.eigenvalues)
    constants = np.asarray(distinct.time_constants())
    columns = (
        np.asarray(a).tolist() for a in (distinct.arrivals, distinct.unstable, distinct.neutral, distinct.speeds)
    )
    rows = [
        (
            str(i + 1), str(kinds[i]), str(arrivals), str(unstable), str(neutral), f"{speed:.1e}",
            f"{np.abs(values[i, 0]):.4f}", f"{constants[i, 0]:.3g}",
        )
        for i, (arrivals, unstable, neutral, speed) in enumerate(zip(*columns, strict=True))
    ]  # fmt: skip
    figures = [
        (_drawn(plot_modes(found), f"{key}-modes", name), "Eigenvalues at the fixed points, and the unit circle.")
    ]
    if sum(leaf[0].size for leaf in jax.tree.leaves(found.points)) > 1:
        figures.insert(
            0, (_drawn(plot_fixed_points(found), f"{key}-points", name), "The fixed points, a mark for each kind.")
        )
    labels = [f"fixed point {i + 1}, {kind}" for i, kind in enumerate(kinds.tolist())]
    live = _modes(values, labels, len(rows)) if rows else {}
    return Part(
        key,
        name,
        _KINDS[FixedPoints],
        found._headline(),
        figures,
        columns=(
            "number", "kind", "starts that\ncame here", "directions\nthat grow", "that neither\ngrow nor fade", "speed",
            "largest\nmodulus", "its time\nconstant, steps",
        ),
        rows=rows[:_ROWS],
        caption="The distinct fixed points",
        **live,
    )  # fmt: skip


def _eigensystem(key: str, name: str, found: Eigensystem) -> Part:
    values, conditions = batched(found.values, 1), batched(found.condition_numbers, 1)
    rows = [
        (str(i + 1), f"{v.real:+.5f}", f"{v.imag:+.5f}", f"{abs(v):.5f}", f"{c:.3g}")
        for i, (v, c) in enumerate(zip(values[0].tolist(), conditions[0].tolist(), strict=True))
    ]
    labels = [f"matrix {i + 1}" for i in range(len(values))]
    return Part(
        key,
        name,
        _KINDS[Eigensystem],
        found._headline(),
        [
            (
                _drawn(plot_modes(found), key, name),
                "Eigenvalues, the unit circle, and a ring for each of some time constants.",
            )
        ],
        columns=("number", "real part", "imaginary part", "modulus", "condition\nnumber"),
        rows=rows[:_ROWS],
        caption="The eigenvalues" if len(values) == 1 else "The eigenvalues of the first matrix",
        **_modes(values, labels, len(rows)),
    )


def _modes(values: np.ndarray, labels: Sequence[str], rows: int) -> dict[str, Any]:
    """What a part has of eigenvalues ``[K, N]``, with so many rows in its table."""
    data, left_out = embedded.of_modes(values, labels)
    notes = left_out + _first(rows, "rows")
    return {"live": "modes", "live_caption": "Eigenvalues and the unit circle.", "data": data, "notes": notes}


def _first(count: int, what: str) -> list[str]:
    return [f"The table has the first {_ROWS} of {count} {what}."] if count > _ROWS else []


def _drawn(figure: Figure, key: str, name: str) -> Markup:
    figure.set_size_inches(3.7, 3.3)
    for marks in (marks for ax in figure.axes for marks in ax.collections):
        marks.set_rasterized(marks.get_rasterized() or np.shape(marks.get_offsets())[0] > _MARKS)
    return drawing(figure, key, f"Figure of {name}")
