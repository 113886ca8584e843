"""The map of the atlas: how far each cell's gradient reaches, and what a step costs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bptt_jax.cells.measurement import CellMeasurement
from bptt_jax.plots.style import LINES, Axes, Figure, figure_of, finish, new_axes, text_size

# Of each family its colour and its mark: told apart in grey too.
_FAMILIES = {
    "simple": (LINES[0][0], "o"),
    "orthogonal": (LINES[3][0], "s"),
    "oscillatory": (LINES[4][0], "D"),
    "gated": (LINES[1][0], "^"),
    "linear": (LINES[2][0], "v"),
    "matrix": (LINES[5][0], "P"),
    "spiking": ("0.5", "X"),
    "reservoir": ("0.35", "*"),
}
_MARK = 6.0  # points
_RINGS, _AROUND = 24, 16  # places that are tried for a name: distances, and directions
_STEP = 5.0  # points from one ring to the next


def plot_atlas(
    results: Sequence[CellMeasurement] | Mapping[str, CellMeasurement],
    ax: Axes | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draws the map of the atlas: horizon against the cost of a training step, a mark for each cell.

    The further up, the further back the gradient reaches; the further left, the cheaper. Families differ in colour and
    shape. Where the signal does not shrink there is no horizon: these cells lie in the band at the top. A thin bar
    spans the horizons of the middle 80 % of seeds and sequences. Names are moved away from each other, by the same rule
    every time, and a line leads from a name to its mark where that is not near.

    Args:
      results: of `bptt_jax.experiments.atlas.measure`, of one basis, or a mapping with these as values.
      ax: to draw on; by default the axes of a new figure.
      title: above the axes.

    Returns:
      The figure of the axes.

    Raises:
      TypeError: `results` are none.
      ValueError: there are none.
    """
    measurements = _checked(results)
    shown = [m for m in measurements if float(m.horizon) > 0 and 0 < float(m.gradient_time) < math.inf]
    ax = new_axes(ax, (11.0, 8.0))
    costs = np.array([float(m.gradient_time) for m in shown])
    horizons = np.array([float(m.horizon) for m in shown])
    endless = np.isinf(horizons)
    last = max(10.0, float(np.max(horizons[~endless], initial=10.0)))
    edge, band = 2.2 * last, 4.5 * last
    heights = np.where(endless, band, horizons)
    ax.set(xscale="log", yscale="log")
    span = costs if shown else np.ones(1)
    ax.set_xlim(span.min() / 1.35, span.max() * 1.5)
    ax.set_ylim(np.min(horizons, initial=last) / 1.6, 9.0 * last if endless.any() else 2.5 * last)
    if endless.any():
        ax.axhspan(edge, 1.1 * ax.get_ylim()[1], color="0.9", linewidth=0, zorder=0)
        ax.text(
            0.01, 0.985, "does not shrink", transform=ax.transAxes, va="top", fontsize=text_size(ax), color="0.35"
        )
    for family, (color, marker) in _FAMILIES.items():
        of = [i for i, m in enumerate(shown) if m.family == family]
        if not of:
            continue
        label = f"{family} ({len(of)})"
        ax.plot(costs[of], heights[of], marker, color=color, ms=_MARK, mec="white", mew=0.5, label=label, zorder=3)
        for i in of:
            if not endless[i]:
                ends = [float(np.clip(v, 1e-3, edge)) for v in (shown[i].horizon_low, shown[i].horizon_high)]
                ax.plot([costs[i]] * 2, ends, color=color, linewidth=0.7, alpha=0.45, zorder=1)
    ax.set_xlabel("time of loss and gradient, per step, relative to rnn")
    ax.set_ylabel("horizon: steps until a thousandth of the gradient is left")
    _decimals(ax)
    finish(ax)
    size = text_size(ax)
    if shown:
        ax.legend(frameon=False, fontsize=size, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=4)
    left_out = [m.name for m in measurements if m not in shown]
    if left_out:
        ax.annotate(f"without a number: {', '.join(left_out)}", (0.01, 0.01), xycoords="axes fraction",
                    fontsize=size - 2, color="0.35")  # fmt: skip
    if title is not None:
        ax.set_title(title)
    _name(ax, [m.name for m in shown], np.stack([costs, heights], axis=1))
    return figure_of(ax)


def _checked(results: Any) -> list[CellMeasurement]:
    values = list(results.values()) if isinstance(results, Mapping) else results
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"results: expected measurements of cells, got {type(results).__name__}")
    if not len(values):
        raise ValueError("results: expected at least one cell, got none")
    for value in values:
        if not isinstance(value, CellMeasurement):
            raise TypeError(f"results: expected measurements of cells, got among them {type(value).__name__}")
    return list(values)


def _decimals(ax: Axes) -> None:
    """Numbers as they are, not powers: costs span little more than one of them."""
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(
            FuncFormatter(lambda v, _: f"{v:g}" if v < 1e5 else f"$10^{{{math.log10(v):.0f}}}$")
        )
        axis.set_minor_formatter(NullFormatter())


def _name(ax: Axes, names: Sequence[str], places: np.ndarray) -> None:
    """Writes each name where it covers neither a mark nor a name that stands already, as near as that can be."""
    figure = figure_of(ax)
    figure.draw_without_rendering()  # a layout may move the axes
    points = figure.dpi / 72
    marks = ax.transData.transform(places)
    taken = [_box(mark, np.full(2, 1.2 * _MARK * points)) for mark in marks]
    inside = np.asarray(ax.get_window_extent().extents)
    # Those in a crowd first: they have the least choice.
    spans = np.linalg.norm(marks[:, None] - marks[None], axis=2)
    crowd = np.sum(np.exp(-spans / (60 * points)), axis=1)
    for i in sorted(range(len(names)), key=lambda i: (-crowd[i], names[i])):
        text = ax.annotate(names[i], places[i], xytext=(0, 0), textcoords="offset points", fontsize=text_size(ax) - 1.5,
                           va="center", ha="center", zorder=4)  # fmt: skip
        extent = text.get_window_extent()
        size = np.array([extent.width + 2 * points, extent.height])
        shifts = _shifts(size, points)
        boxes = _box(marks[i] + shifts, size)
        covered = np.sum(_shared(boxes[:, None], np.stack(taken)), axis=1)
        outside = np.prod(size) - _shared(boxes, inside)
        best = int(np.argmin(np.round(covered + 10 * outside, 3)))  # the first of equals: the nearest
        text.set_position(tuple(shifts[best] / points))
        taken.append(boxes[best])
        if best >= 2 * _AROUND:
            _lead(ax, marks[i], boxes[best])


def _shifts(size: np.ndarray, points: float) -> np.ndarray:
    """``[rings * directions, 2]``, in pixels, of a name's centre from its mark: near ones first, of a ring the right
    one first, then by turns above and below."""
    turns = np.arange(_AROUND)
    angles = np.pi * ((turns + 1) // 2) * np.where(turns % 2, 1, -1) / (_AROUND / 2)
    gaps = (0.75 * _MARK + _STEP * np.arange(_RINGS)) * points
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.concatenate([directions * (gap + size / 2) for gap in gaps])


def _box(centre: np.ndarray, size: np.ndarray) -> np.ndarray:
    """``[..., 4]``: left, bottom, right, top."""
    return np.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def _shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The area that two boxes have in common."""
    ends = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.prod(np.maximum(ends, 0), axis=-1)


def _lead(ax: Axes, mark: np.ndarray, box: np.ndarray) -> None:
    """From a mark to the nearest point of its name."""
    ends = ax.transData.inverted().transform(np.stack([mark, np.clip(mark, box[:2], box[2:])]))
    ax.plot(ends[:, 0], ends[:, 1], color="0.5", linewidth=0.5, zorder=2)
