"""How a gradient flow looks: norms over time, spectra, leaves."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from bptt_jax.analysis.backward import Adjoints
from bptt_jax.analysis.flow_results import GradientFlow, Spectra
from bptt_jax.analysis.verdict import horizon_words
from bptt_jax.leaves import dotted
from bptt_jax.plots.style import (
    LINES,
    Axes,
    Figure,
    NotebookFigure,
    aligned_at_end,
    batched,
    decades,
    figure_of,
    finish,
    new_axes,
    quantiles,
    text_size,
)

try:
    from matplotlib.patches import Circle
except ImportError as error:
    raise ImportError("bptt_jax.plots needs matplotlib: python -m pip install 'bptt_jax[plot]'") from error

_SCATTERED = 4000
_BAND = 1000
# Of a figure that is to be read on a phone, in inches: its text is then as large there as the text around it.
_COLUMN = 3.7
_PANEL = 2.4  # inches, the least width of a panel of spectra
_UNDERFLOW = math.log10(1.4e-45)


def plot_gradient_flow(
    flows: GradientFlow | Mapping[str, GradientFlow],
    *,
    axes: Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    title: str | None = None,
) -> Figure:
    """Draws where gradients vanish or explode.

    The norm of dL/dh_t against time for all flows on one logarithmic axis, with its horizon marked (`plot_norms`); for
    each flow the quantiles of the singular values of its Jacobians over time (`plot_singular_values`); and for each
    the eigenvalues with the unit circle (`plot_eigenvalues`). Of a batch, the line is the median and the band the
    middle 80 % of the sequences. Flows without spectra have the first panel alone.

    Args:
      flows: one `GradientFlow`, or several by name, from single sequences or batched by ``jax.vmap``; of equal
        length or not.
      axes: to draw on, in the order of the panels: the norms, the singular values of each flow with spectra, the
        eigenvalues of each. By default those of a new figure.
      figsize: of the new figure, in inches; a narrow one has its panels below each other.
      title: above the figure.

    Returns:
      A `matplotlib.figure.Figure`, which a notebook shows; ``figure.savefig(path)`` writes it.

    Raises:
      TypeError, ValueError: `flows` is neither a GradientFlow nor a non-empty mapping of them; `axes` are not as many
        as the panels, or come with a `figsize`.
      ImportError: matplotlib is not installed.
    """
    named = _named(flows)
    spectral = {name: flow for name, flow in named.items() if flow.spectra is not None}
    if axes is None:
        axes = _grid(len(spectral), figsize)
    elif figsize is not None:
        raise ValueError("figsize: expected None, since axes are given")
    if len(axes) != 1 + 2 * len(spectral):
        raise ValueError(f"axes: expected {1 + 2 * len(spectral)}, one for each panel, got {len(axes)}")
    norms, values, planes = axes[0], axes[1 : 1 + len(spectral)], axes[1 + len(spectral) :]
    plot_norms(named, ax=norms)
    reach = _reach(spectral)
    colors = {name: LINES[i % len(LINES)][0] for i, name in enumerate(named)}
    for (name, flow), ax, plane in zip(spectral.items(), values, planes, strict=True):
        plot_singular_values(flow, ax=ax, legend=False)
        plot_eigenvalues(flow, ax=plane, color=colors[name], reach=reach)
        for panel in (ax, plane):
            panel.set_title(name, fontsize=text_size(panel) + 1)
    _share_y(values)
    _share_y(planes)
    if len(values):
        words = "singular values over time, all sequences together (red line: 1)"
        _legend_below(values[0], 4 if text_size(values[0]) > 8 else 2, words)
    figure = figure_of(norms)
    if title is not None:
        figure.suptitle(title, fontsize=text_size(norms) + 3)
    return figure


def plot_norms(
    flows: GradientFlow | Mapping[str, GradientFlow], *, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """Draws the norm of dL/dh_t against time, with the horizon of each flow as a dot.

    Sequences of different length, padded, are aligned at their end. A horizon that is extrapolated is marked so in
    the legend and has no dot.

    Args:
      flows: one `GradientFlow`, or several by name.
      ax: to draw on; by default the axes of a new figure.
      title: above the axes.

    Returns:
      The figure of the axes.

    Raises:
      TypeError, ValueError: as `plot_gradient_flow`.
    """
    named = _named(flows)
    ax = new_axes(ax, (7.0, 4.0))
    lowest, padded = 0.0, False
    for i, (name, flow) in enumerate(named.items()):
        color, dash = LINES[i % len(LINES)]
        measured = batched(flow.signal.adjoint_log_norms, 1) / math.log(10)
        rows = aligned_at_end(measured)
        padded |= not np.array_equal(rows, measured, equal_nan=True)
        t = np.arange(1, rows.shape[1] + 1)
        low, middle, high = quantiles(np.where(np.isfinite(rows), rows, np.nan), [0.1, 0.5, 0.9])
        horizon, extrapolated = _typical_horizon(flow)
        label = f"{name}: {_verdict(flow)}"
        if math.isfinite(horizon):
            label += f", {horizon_words(horizon, math.nan, extrapolated)}"
        wrapped = textwrap.fill(label, 42 if text_size(ax) > 8 else 48)
        ax.plot(t, middle, color=color, linestyle=dash, linewidth=1.8, label=wrapped)
        # The outline of a filled area keeps every vertex, so a long one is that of blocks, each as wide as it gets.
        starts = np.arange(0, len(t), -(-len(t) // _BAND))
        band = np.fmin.reduceat(low, starts), np.fmax.reduceat(high, starts)
        ax.fill_between(t[starts], *band, color=color, alpha=0.2, linewidth=0)
        at = _place(flow, horizon) if math.isfinite(horizon) and not extrapolated else -1
        if at >= 0:
            ax.plot(t[at], middle[at], marker="o", markersize=7, color=color, markeredgecolor="white")
        lowest = min(lowest, float(np.nanmin(low, initial=0.0)))
    if lowest < _UNDERFLOW:
        ax.axhline(_UNDERFLOW, color="0.5", linewidth=0.8, linestyle=":")
        ax.annotate(
            "below: 0 in float32", (1.0, _UNDERFLOW), xycoords=("axes fraction", "data"), ha="right", va="top",
            color="0.35", fontsize=text_size(ax), xytext=(-4, -2), textcoords="offset points",
        )  # fmt: skip
    decades(ax)
    ax.set_xlabel("time step t, sequences aligned at their end" if padded else "time step t")
    ax.set_ylabel(r"gradient norm  $\|dL/dh_t\|_2$")
    ax.margins(x=0.01)
    finish(ax)
    threshold = float(np.ravel(np.asarray(next(iter(named.values())).threshold))[0])
    ax.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=min(len(named), 2) if text_size(ax) > 8 else 1,
        frameon=False,
        fontsize=text_size(ax),
        title=f"dot: horizon, where {threshold:g} of the error signal is left",
        title_fontsize=text_size(ax),
    )
    if title is not None:
        ax.set_title(title)
    return figure_of(ax)


def plot_singular_values(
    flow: GradientFlow, *, ax: Axes | None = None, legend: bool = True, title: str | None = None
) -> Figure:
    """Draws the quantiles of the singular values of dh_t/dh_{t-1} over time, all sequences together.

    Args:
      flow: with spectra.
      ax: to draw on; by default the axes of a new figure.
      legend: whether there is one, below.
      title: above the axes.

    Returns:
      The figure of the axes.

    Raises:
      TypeError, ValueError: `flow` is no `GradientFlow`, or has no spectra.
    """
    spectra = _spectra(flow)
    ax = new_axes(ax, (4.5, 3.4))
    values, steps = batched(spectra.singular_values, 2), batched(spectra.steps, 1)
    longest = int(np.argmax((steps >= 0).sum(axis=1)))
    at = steps[longest][steps[longest] >= 0]
    pooled = np.moveaxis(values[:, : len(at)], 1, 0).reshape(len(at), values[:, 0].size)
    lowest, q10, median, q90, largest = quantiles(pooled, [0.0, 0.1, 0.5, 0.9, 1.0], axis=1)
    ax.fill_between(at, q10, q90, color="0.75", linewidth=0, label="middle 80 %")
    ax.plot(at, largest, color="black", linewidth=1.2, linestyle="--", label="largest")
    ax.plot(at, median, color="black", linewidth=1.6, label="median")
    ax.plot(at, lowest, color="black", linewidth=1.0, linestyle=":", label="smallest")
    ax.axhline(1.0, color="#c8102e", linewidth=0.8)
    ax.set_yscale("log", nonpositive="mask")
    ax.set_xlabel("time step t")
    of = "\n" if text_size(ax) < 8 else " "
    ax.set_ylabel(f"singular values{of}of $dh_t/dh_{{t-1}}$")
    finish(ax)
    if legend:
        _legend_below(ax, 2)
    if title is not None:
        ax.set_title(title)
    return figure_of(ax)


def plot_eigenvalues(
    flow: GradientFlow,
    *,
    ax: Axes | None = None,
    color: str = LINES[2][0],
    reach: float | None = None,
    title: str | None = None,
) -> Figure:
    """Draws the eigenvalues of dh_t/dh_{t-1} in the complex plane, with the unit circle.

    Args:
      flow: with spectra.
      ax: to draw on; by default the axes of a new figure.
      color: of the points.
      reach: of the plane, from -reach to reach both ways; by default as far as the eigenvalues go.
      title: above the axes.

    Returns:
      The figure of the axes.

    Raises:
      TypeError, ValueError: `flow` is no `GradientFlow`, or has no spectra.
    """
    values = np.asarray(_spectra(flow).eigenvalues)
    ax = new_axes(ax, (3.7, 3.7))
    reach = _reach({"": flow}) if reach is None else reach
    values = values.reshape(-1, values.shape[-1])
    values = values[:: -(-values.size // _SCATTERED)].ravel()  # whole matrices, for pairs stand together
    values = values[np.isfinite(values)]
    ax.scatter(values.real, values.imag, s=4, color=color, alpha=0.35, linewidths=0, rasterized=True)
    ax.add_patch(Circle((0, 0), 1.0, fill=False, color="0.35", linewidth=1.0))
    ax.set_xlim(-reach, reach)
    ax.set_ylim(-reach, reach)
    ax.set_aspect("equal")
    ax.set_xlabel(r"Re $\lambda$")
    of = ",\neigenvalues\n" if text_size(ax) < 8 else ", eigenvalues "
    ax.set_ylabel(rf"Im $\lambda${of}of $dh_t/dh_{{t-1}}$")
    finish(ax)
    ax.grid(False)
    if title is not None:
        ax.set_title(title)
    return figure_of(ax)


def plot_leaves(found: GradientFlow | Adjoints, *, ax: Axes | None = None, title: str | None = None) -> Figure:
    """Draws the log norm of each leaf of the state by itself: an LSTM's c and h, the layers of `bptt_jax.stack`.

    Args:
      found: a `GradientFlow`, for what arrives of the error signal in each leaf; or `Adjoints`, for dL/dh_t. Of a
        batch, the median.
      ax: to draw on; by default the axes of a new figure.
      title: above the axes.

    Returns:
      The figure of the axes.

    Raises:
      TypeError: `found` is neither.
    """
    if isinstance(found, GradientFlow):
        columns = np.moveaxis(batched(found.leaves.log_norms, 2), 2, 0)
        rows = dict(zip(found.leaves.names, columns, strict=True))
        first, words = 0, "what arrives of the error signal at h_t"
    elif isinstance(found, Adjoints):
        norms = jax.tree_util.tree_leaves_with_path(found.leaf_log_norms)
        rows = {dotted(path) or "h": batched(norm, 1) for path, norm in norms}
        first, words = 1, r"$\|dL/dh_t\|_2$, leaf by leaf"
    else:
        raise TypeError(f"found: expected a GradientFlow or Adjoints, got {type(found).__name__}")
    ax = new_axes(ax, (5.5, 3.4))
    for i, (name, leaf) in enumerate(rows.items()):
        color, dash = LINES[i % len(LINES)]
        middle = quantiles(aligned_at_end(np.where(np.isinf(leaf), np.nan, leaf)), [0.5])[0] / math.log(10)
        t = np.arange(first, first + len(middle))
        ax.plot(t, middle, color=color, linestyle=dash, linewidth=1.6, label=name)
    decades(ax)
    ax.set_xlabel("time step t")
    ax.set_ylabel(words)
    finish(ax)
    ax.legend(frameon=False, fontsize=text_size(ax))
    if title is not None:
        ax.set_title(title)
    return figure_of(ax)


def plot_parts(flows: Mapping[str, GradientFlow]) -> tuple[Figure, dict[str, tuple[Figure, Figure]]]:
    """The figure of `plot_gradient_flow` in parts, each for one narrow column.

    Returns:
      The norms of all flows; and by name the singular values and the eigenvalues of each, whose points are of a
      colour that can be told from white and from black.
    """
    norms = plot_norms(flows, ax=new_axes(None, (_COLUMN, 3.4)))
    legend = norms.axes[0].get_legend()
    assert legend is not None
    lines = sum(len(text.get_text().splitlines()) for text in legend.get_texts())
    norms.set_size_inches(_COLUMN, 2.9 + 0.2 * lines)
    spectral = {name: flow for name, flow in flows.items() if flow.spectra is not None}
    reach = _reach(spectral)
    spectra = {
        name: (
            plot_singular_values(flow, ax=new_axes(None, (_COLUMN, 3.3))),
            plot_eigenvalues(flow, ax=new_axes(None, (_COLUMN, 3.3)), reach=reach),
        )
        for name, flow in spectral.items()
    }
    return norms, spectra


def _named(flows: GradientFlow | Mapping[str, GradientFlow]) -> Mapping[str, GradientFlow]:
    named = {"gradient": flows} if isinstance(flows, GradientFlow) else flows
    if not isinstance(named, Mapping) or not all(isinstance(f, GradientFlow) for f in named.values()):
        raise TypeError(f"flows: expected a GradientFlow or a mapping of them by name, got {type(flows).__name__}")
    if not named:
        raise ValueError("flows: expected at least one GradientFlow, got an empty mapping")
    return named


def _spectra(flow: GradientFlow) -> Spectra:
    if not isinstance(flow, GradientFlow):
        raise TypeError(f"flow: expected a GradientFlow, got {type(flow).__name__}")
    if flow.spectra is None:
        raise ValueError("flow: expected one with spectra, got one measured with spectra=False")
    return flow.spectra


def _grid(flows: int, figsize: tuple[float, float] | None) -> list[Axes]:
    """The norms above, then rows of singular values, then rows of eigenvalues."""
    if figsize is None:
        columns = max(flows, 1)
        figsize = (max(7.0, 3.1 * columns), 10.5 if flows else 4.4)
    else:
        columns = max(1, min(flows, int(figsize[0] // _PANEL)))
    rows = -(-flows // columns)
    figure = NotebookFigure(figsize=figsize, layout="constrained")
    heights = [1.35, *[0.9] * rows, *[1.0] * rows]
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    places = [(first + i // columns, i % columns) for first in (1, 1 + rows) for i in range(flows)]
    return [figure.add_subplot(grid[0, :]), *(figure.add_subplot(grid[place]) for place in places)]


def _typical_horizon(flow: GradientFlow) -> tuple[float, bool]:
    """The median of a batch, and whether that one is extrapolated."""
    horizons = batched(flow.horizon, 0).astype(float)
    known = horizons[~np.isnan(horizons)]
    if not known.size:
        return math.nan, False
    middle = float(np.quantile(known, 0.5, method="inverted_cdf"))
    return middle, bool(batched(flow.horizon_extrapolated, 0)[np.flatnonzero(horizons == middle)[0]])


def _verdict(flow: GradientFlow) -> str:
    """Of several axes of a batch, the most frequent of all."""
    found = np.ravel(np.asarray(flow.verdict, object)).tolist()
    return str(max(found, key=found.count))


def _place(flow: GradientFlow, horizon: float) -> int:
    """Index of the adjoint at the state that lies that far back; -1 if it is not among them."""
    lags = batched(flow.signal.lags, 1)
    norms = batched(flow.signal.adjoint_log_norms, 1)
    longest = int(np.argmax(lags.max(axis=1)))
    padding = np.flatnonzero(~np.isnan(norms[longest]))
    shift = 0 if not padding.size else norms.shape[1] - 1 - int(padding[-1])
    found = np.flatnonzero(lags[longest] == math.ceil(horizon))
    return int(found[-1]) - 1 + shift if found.size and found[-1] >= 1 else -1


def _legend_below(ax: Axes, columns: int, title: str | None = None) -> None:
    figure = ax.figure
    figure.legend(
        *ax.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=text_size(ax),
        title=textwrap.fill(title, 44) if title and text_size(ax) < 8 else title,
        title_fontsize=text_size(ax),
    )


def _reach(flows: Mapping[str, GradientFlow]) -> float:
    """Of a plane with the unit circle and the eigenvalues of all."""
    moduli = [np.abs(np.asarray(_spectra(flow).eigenvalues)) for flow in flows.values()]
    return max([1.25, *(1.05 * float(np.max(m[np.isfinite(m)], initial=0.0)) for m in moduli)])


def _share_y(axes: Sequence[Axes]) -> None:
    """Those in one row; their labels stand at the first."""
    for ax in axes[1:]:
        ax.sharey(axes[0])
        spec, first = ax.get_subplotspec(), axes[0].get_subplotspec()
        if spec is not None and first is not None and spec.colspan.start > 0:
            ax.tick_params(labelleft=False)
            ax.set_ylabel("")
