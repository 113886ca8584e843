"""How a training run looks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bptt_jax.plots.style import LINES, Axes, Figure, NotebookFigure, figure_of, finish, text_size


def plot_training(
    records: Sequence[Mapping[str, Any]],
    *,
    baseline: float | None = None,
    axes: Sequence[Axes] | None = None,
    figsize: tuple[float, float] = (10.5, 4.2),
    title: str | None = None,
) -> Figure:
    """Draws a training run: loss and gradient norm against the number of updates, a line for each seed.

    Left the mean loss of each chunk of batches (thin) and the loss on fresh sequences (thick), with a dot where a
    seed has solved the task and a cross where a loss was first not finite; right the median norm of the
    gradient before clipping, and its maximum (thin).

    Args:
      records: of `bptt_jax.experiments.records.Training`, or the lines of its log.
      baseline: the loss of the trivial predictor, drawn as a dotted line.
      axes: two to draw on, the losses' and the norms'; by default those of a new figure.
      figsize: of the new figure, in inches; in a narrow one the norms stand below.
      title: above the figure.

    Returns:
      A `matplotlib.figure.Figure`; ``figure.savefig(path)`` writes it.

    Raises:
      TypeError, ValueError: the records are not of a training run, or hold no chunk.
    """
    if isinstance(records, str) or not isinstance(records, Sequence):
        raise TypeError(f"records: expected those of a training run, got {type(records).__name__}")
    needed = {"updates", "seeds", "loss", "validation_loss", "solved_at", "non_finite"}
    needed |= {"gradient_log_norm", "gradient_log_norm_max"}
    for r in records:
        if not isinstance(r, Mapping) or not ("event" in r or needed <= r.keys()):
            raise TypeError(f"records: expected those of a training run, got among them {r!r:.60}")
    chunks = [r for r in records if "event" not in r]
    if not chunks:
        raise ValueError("records: expected those of a training run, got no chunk")
    if axes is None:
        figure = NotebookFigure(figsize=figsize, layout="constrained")
        axes = np.ravel(figure.subplots(1, 2) if figsize[0] >= 6 else figure.subplots(2, 1)).tolist()
    if len(axes) != 2:
        raise ValueError(f"axes: expected two, of the losses and of the norms, got {len(axes)}")
    left, right = axes
    at = np.array([r["updates"] for r in chunks])
    curves = {name: _curves(chunks, name) for name in ("loss", "validation_loss")}
    norms = {name: np.exp(_curves(chunks, name)) for name in ("gradient_log_norm", "gradient_log_norm_max")}
    for i in range(len(chunks[0]["loss"])):
        color, dash = LINES[i % len(LINES)]
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
        finish(ax)
    left.legend(frameon=False, fontsize=text_size(left), ncols=2)
    whole = figure_of(left)
    if title is not None:
        whole.suptitle(title)
    return whole


def _curves(chunks: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """``[chunks, seeds]``; NaN where a seed had stopped, and nothing that an axis could not show."""
    values = np.array([[math.nan if v is None else float(v) for v in r[name]] for r in chunks])
    return np.where(np.isinf(values), math.nan, values)
