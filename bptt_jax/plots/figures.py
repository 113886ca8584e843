"""Figures. They are matplotlib `Figure`s without a window: save them or show them in a notebook."""

import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bptt_jax.analysis.flow import GradientFlow
from bptt_jax.analysis.influence import InfluenceMap

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as error:
    raise ImportError("bptt_jax.plots.figures needs matplotlib: python -m pip install 'bptt_jax[plot]'") from error

# Told apart by dash and by lightness as well as by hue, so that a print in grey still shows which is which.
_LINES: tuple[tuple[str, str | tuple[int, tuple[int, ...]]], ...] = (
    ("#000000", "-"),
    ("#c8102e", (0, (6, 2))),
    ("#3a86c8", "-."),
    ("#e09f1f", (0, (1, 1))),
    ("#5b3a8c", (0, (8, 2, 1, 2, 1, 2))),
    ("#4f9d5b", (0, (3, 1))),
)
_SCATTERED = 4000
_BAND = 1000
# Of a figure that is to be read on a phone, in inches: its text is then as large there as the text around it.
_COLUMN = 3.7
_UNDERFLOW = math.log10(1.4e-45)


def plot_gradient_flow(flows: GradientFlow | Mapping[str, GradientFlow], *, title: str | None = None) -> Figure:
    """Draws where gradients vanish or explode.

    Three rows: the norm of dL/dh_t against time for all flows on one logarithmic axis, with its horizon marked;
    for each flow the quantiles of the singular values of its Jacobians over time; and for each the eigenvalues
    with the unit circle. Of a batch, the line is the median and the band the middle 80 % of the sequences.

    Args:
      flows: one `GradientFlow`, or several by name, from single sequences or batched by ``jax.vmap``; of equal
        length or not.
      title: above the figure.

    Returns:
      A `matplotlib.figure.Figure`; ``figure.savefig(path)`` writes it.

    Raises:
      TypeError, ValueError: `flows` is neither a GradientFlow nor a non-empty mapping of them, or one has no spectra.
      ImportError: matplotlib is not installed.
    """
    named = {"gradient": flows} if isinstance(flows, GradientFlow) else flows
    if not isinstance(named, Mapping) or not all(isinstance(f, GradientFlow) for f in named.values()):
        raise TypeError(f"flows: expected a GradientFlow or a mapping of them by name, got {type(flows).__name__}")
    if not named:
        raise ValueError("flows: expected at least one GradientFlow, got an empty mapping")
    for name, flow in named.items():
        if flow.spectra is None:
            raise ValueError(f"flows: expected spectra, got a flow without them: {name} (spectra=False)")
    columns = len(named)
    figure = Figure(figsize=(max(7.0, 3.1 * columns), 10.5), layout="constrained")
    grid = figure.add_gridspec(3, columns, height_ratios=(1.35, 0.9, 1.0))
    _draw_norms(figure.add_subplot(grid[0, :]), named, columns=min(len(named), 2))
    values = _share_y([figure.add_subplot(grid[1, i]) for i in range(columns)])
    planes = [figure.add_subplot(grid[2, i]) for i in range(columns)]
    reach = _reach(named)
    for i, (name, flow) in enumerate(named.items()):
        _draw_singular_values(values[i], flow)
        _draw_eigenvalues(planes[i], flow, _LINES[i % len(_LINES)][0], reach)
        for ax in (values[i], planes[i]):
            ax.set_title(name, fontsize="medium")
            if i > 0:
                ax.set_ylabel("")
    _legend_below(values[0], 4, "singular values over time, all sequences together (red line: 1)")
    if title is not None:
        figure.suptitle(title)
    return figure


def plot_parts(flows: Mapping[str, GradientFlow]) -> tuple[Figure, dict[str, tuple[Figure, Figure]]]:
    """The figure of `plot_gradient_flow` in parts, each for one narrow column.

    Returns:
      The norms of all flows; and by name the singular values and the eigenvalues of each, whose points are of a
      colour that can be told from white and from black.
    """
    norms = Figure(layout="constrained")
    ax = norms.subplots()
    _draw_norms(ax, flows, columns=1)
    legend = ax.get_legend()
    assert legend is not None
    lines = sum(len(text.get_text().splitlines()) for text in legend.get_texts())
    norms.set_size_inches(_COLUMN, 2.9 + 0.2 * lines)
    spectra = {}
    for name, flow in flows.items():
        values, plane = (Figure((_COLUMN, 3.3), layout="constrained") for _ in range(2))
        ax = values.subplots()
        _draw_singular_values(ax, flow)
        _legend_below(ax, 2)
        _draw_eigenvalues(plane.subplots(), flow, _LINES[2][0], _reach(flows))
        spectra[name] = values, plane
    return norms, spectra


def plot_training(
    records: Sequence[Mapping[str, Any]], *, baseline: float | None = None, title: str | None = None
) -> Figure:
    """Draws a training run: loss and gradient norm against the number of updates, a line for each seed.

    Left the mean loss of each chunk of batches (thin) and the loss on fresh sequences (thick), with a dot where a
    seed has solved the task and a cross where a loss was first not finite; right the median norm of the
    gradient before clipping, and its maximum (thin).

    Args:
      records: of `bptt_jax.experiments.records.Training`, or the lines of its log.
      baseline: the loss of the trivial predictor, drawn as a dotted line.
      title: above the figure.

    Returns:
      A `matplotlib.figure.Figure`; ``figure.savefig(path)`` writes it.

    Raises:
      TypeError, ValueError: the records are not of a training run, or hold no chunk.
    """
    if isinstance(records, str) or not isinstance(records, Sequence):
        raise TypeError(f"records: expected those of a training run, got {type(records).__name__}")
    needed = {"updates", "seeds", "loss", "validation_loss", "gradient_log_norm", "solved_at"}
    for r in records:
        if not isinstance(r, Mapping) or not ("event" in r or needed <= r.keys()):
            raise TypeError(f"records: expected those of a training run, got among them {r!r:.60}")
    chunks = [r for r in records if "event" not in r]
    if not chunks:
        raise ValueError("records: expected those of a training run, got no chunk")
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = np.array([r["updates"] for r in chunks])
    curves = {name: _curves(chunks, name) for name in ("loss", "validation_loss")}
    norms = {name: np.exp(_curves(chunks, name)) for name in ("gradient_log_norm", "gradient_log_norm_max")}
    for i in range(len(chunks[0]["loss"])):
        color, dash = _LINES[i % len(_LINES)]
        look: dict[str, Any] = {"color": color, "linestyle": dash}
        left.plot(at, curves["loss"][:, i], linewidth=0.6, **look)
        left.plot(at, curves["validation_loss"][:, i], linewidth=1.8, label=f"seed {chunks[0]['seeds'][i]}", **look)
        right.plot(at, norms["gradient_log_norm_max"][:, i], linewidth=0.6, **look)
        right.plot(at, norms["gradient_log_norm"][:, i], linewidth=1.8, **look)
        solved = chunks[-1]["solved_at"][i]
        if solved is not None:
            left.plot(solved, curves["validation_loss"][at == solved, i], "o", color=color, markeredgecolor="white")
        wrong = np.flatnonzero([r["loss"][i] is not None and r["non_finite"][i] > 0 for r in chunks])
        if wrong.size:
            left.plot(at[wrong[0]], 0.95, "x", color=color, markersize=9, transform=left.get_xaxis_transform())
    if baseline is not None:
        left.axhline(baseline, color="0.5", linewidth=0.8, linestyle=":", label="trivial predictor")
    left.set_ylabel("loss (thick: fresh sequences)")
    right.set_ylabel("gradient norm before clipping (thin: largest)")
    for ax in (left, right):
        ax.set_xlabel("updates")
        if any(np.any(np.asarray(line.get_ydata()) > 0) for line in ax.get_lines()):
            ax.set_yscale("log", nonpositive="mask")
        ax.grid(True, color="0.9", linewidth=0.6)
    left.legend(frameon=False, fontsize="small", ncols=2)
    if title is not None:
        figure.suptitle(title)
    return figure


def plot_influence_map(influence: InfluenceMap, *, title: str | None = None) -> Figure:
    """Draws ``||dh_t/dh_s||`` for all pairs of times: red where an influence has grown, blue where it has shrunk.

    Args:
      influence: from `bptt_jax.influence_map`, of one sequence.
      title: above the figure.

    Returns:
      A `matplotlib.figure.Figure`; ``figure.savefig(path)`` writes it.

    Raises:
      TypeError, ValueError: `influence` is no `InfluenceMap`, or a batch of them.
    """
    if not isinstance(influence, InfluenceMap):
        raise TypeError(f"influence: expected an InfluenceMap, got {type(influence).__name__}")
    times, decades = np.asarray(influence.times), np.asarray(influence.log_norms, np.float64) / math.log(10)
    if decades.ndim != 2:
        raise ValueError(f"influence: expected that of one sequence, got a batch of shape {list(decades.shape)}")
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    ax = figure.subplots()
    later = np.tri(len(times), dtype=bool)
    shown = np.where(later, decades, math.nan)
    reach = float(np.max(np.abs(shown), where=np.isfinite(shown), initial=1e-3))
    shown = np.where(shown == -math.inf, -reach, shown)  # zero: as blue as it gets
    # Each value fills the cell that ends at its time.
    edges = np.concatenate([[times[0] - (times[1] - times[0])], times]) + 0.5
    mesh = ax.pcolormesh(edges, edges, shown, cmap="RdBu_r", vmin=-reach, vmax=reach)
    figure.colorbar(mesh, ax=ax, label=r"$\log_{10}\,\|dh_t/dh_s\|_2$")
    ax.set(xlabel="s, of the state that has the influence", ylabel="t, of the state that feels it", aspect="equal")
    if title is not None:
        ax.set_title(title)
    return figure


def _curves(chunks: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """``[chunks, seeds]``; NaN where a seed had stopped, and nothing that an axis could not show."""
    values = np.array([[math.nan if v is None else float(v) for v in r[name]] for r in chunks])
    return np.where(np.isinf(values), math.nan, values)


def _batched(values: object, ndim: int) -> np.ndarray:
    array = np.asarray(values)
    return array.reshape(-1, *array.shape[array.ndim - ndim :])


def _quantiles(rows: np.ndarray, levels: list[float], axis: int = 0) -> np.ndarray:
    """Quantiles that are entries, not interpolations, so that an infinity spoils no finite one; NaN left out."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where every sequence is NaN, the line has a gap
        return np.nanquantile(rows, levels, axis=axis, method="inverted_cdf")


def _draw_norms(ax: Axes, flows: Mapping[str, GradientFlow], columns: int) -> None:
    lowest = 0.0
    for i, (name, flow) in enumerate(flows.items()):
        color, dash = _LINES[i % len(_LINES)]
        decades = _batched(flow.signal.adjoint_log_norms, 1) / math.log(10)
        t = np.arange(1, decades.shape[1] + 1)
        low, middle, high = _quantiles(np.where(np.isfinite(decades), decades, np.nan), [0.1, 0.5, 0.9])
        horizon = float(_quantiles(_batched(flow.horizon, 0), [0.5])[0])
        label = f"{name}: {flow.verdict}"
        if math.isfinite(horizon):
            beyond = float(_quantiles(_batched(flow.horizon_extrapolated, 0).astype(float), [0.5])[0]) > 0
            label += f", horizon {math.ceil(horizon)}" + " (extrapolated)" * beyond
        ax.plot(t, middle, color=color, linestyle=dash, linewidth=1.8, label=textwrap.fill(label, 42))
        # The outline of a filled area keeps every vertex, so a long one is that of blocks, each as wide as it gets.
        starts = np.arange(0, len(t), -(-len(t) // _BAND))
        band = np.fmin.reduceat(low, starts), np.fmax.reduceat(high, starts)
        ax.fill_between(t[starts], *band, color=color, alpha=0.2, linewidth=0)
        reach = int(_quantiles(_batched(flow.reach, 0), [0.5])[0])
        at = reach - 1 - math.ceil(horizon) if math.isfinite(horizon) else -1
        if at >= 0:
            ax.plot(t[at], middle[at], marker="o", markersize=7, color=color, markeredgecolor="white")
        lowest = min(lowest, float(np.nanmin(low, initial=0.0)))
    if lowest < _UNDERFLOW:
        ax.axhline(_UNDERFLOW, color="0.5", linewidth=0.8, linestyle=":")
        ax.annotate(
            "below: 0 in float32", (1.0, _UNDERFLOW), xycoords=("axes fraction", "data"), ha="right", va="top",
            color="0.35", fontsize="small", xytext=(-4, -2), textcoords="offset points",
        )  # fmt: skip
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"$10^{{{y:.0f}}}$"))
    ax.set_xlabel("time step t")
    ax.set_ylabel(r"gradient norm  $\|dL/dh_t\|_2$")
    ax.grid(True, color="0.9", linewidth=0.6)
    ax.margins(x=0.01)
    threshold = float(np.ravel(np.asarray(next(iter(flows.values())).threshold))[0])
    ax.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=columns,
        frameon=False,
        title=f"dot: horizon, where {threshold:g} of the error signal is left",
        title_fontsize="small",
    )


def _draw_singular_values(ax: Axes, flow: GradientFlow) -> None:
    assert flow.spectra is not None
    values, steps = _batched(flow.spectra.singular_values, 2), _batched(flow.spectra.steps, 1)
    longest = np.argmax(np.sum(steps > 0, axis=1))
    steps, values = steps[longest][steps[longest] > 0], values[:, steps[longest] > 0]
    pooled = np.moveaxis(values, 1, 0).reshape(len(steps), -1)
    lowest, q10, median, q90, largest = _quantiles(pooled, [0.0, 0.1, 0.5, 0.9, 1.0], axis=1)
    ax.fill_between(steps, q10, q90, color="0.75", linewidth=0, label="middle 80 %")
    ax.plot(steps, largest, color="black", linewidth=1.2, linestyle="--", label="largest")
    ax.plot(steps, median, color="black", linewidth=1.6, label="median")
    ax.plot(steps, lowest, color="black", linewidth=1.0, linestyle=":", label="smallest")
    ax.axhline(1.0, color="#c8102e", linewidth=0.8)
    ax.set_yscale("log", nonpositive="mask")
    ax.set_xlabel("time step t")
    ax.set_ylabel(r"singular values of $dh_t/dh_{t-1}$")


def _legend_below(ax: Axes, columns: int, title: str | None = None) -> None:
    ax.figure.legend(
        *ax.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize="small",
        title=title,
        title_fontsize="small",
    )


def _draw_eigenvalues(ax: Axes, flow: GradientFlow, color: str, reach: float) -> None:
    assert flow.spectra is not None
    values = np.asarray(flow.spectra.eigenvalues)
    values = values.reshape(-1, values.shape[-1])
    values = values[:: -(-values.size // _SCATTERED)].ravel()  # whole matrices, for pairs stand together
    values = values[np.isfinite(values)]
    ax.scatter(values.real, values.imag, s=4, color=color, alpha=0.35, linewidths=0, rasterized=True)
    ax.add_patch(Circle((0, 0), 1.0, fill=False, color="0.35", linewidth=1.0))
    ax.set_xlim(-reach, reach)
    ax.set_ylim(-reach, reach)
    ax.set_aspect("equal")
    ax.set_xlabel(r"Re $\lambda$")
    ax.set_ylabel(r"Im $\lambda$, eigenvalues of $dh_t/dh_{t-1}$")


def _reach(flows: Mapping[str, GradientFlow]) -> float:
    """Of a plane with the unit circle and the eigenvalues of all."""
    moduli = [np.abs(np.asarray(flow.spectra.eigenvalues)) for flow in flows.values() if flow.spectra is not None]
    return max(1.25, *(1.05 * float(np.max(m[np.isfinite(m)], initial=0.0)) for m in moduli))


def _share_y(axes: list[Axes]) -> list[Axes]:
    for ax in axes[1:]:
        ax.sharey(axes[0])
        ax.tick_params(labelleft=False)
    return axes
