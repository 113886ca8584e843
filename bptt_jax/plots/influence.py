"""How the influence of each state on each later one looks."""

import math

import numpy as np

from bptt_jax.analysis.influence import InfluenceMap
from bptt_jax.plots.style import Axes, Figure, figure_of, finish, new_axes, text_size


def plot_influence_map(influence: InfluenceMap, *, ax: Axes | None = None, title: str | None = None) -> Figure:
    """Draws ``||dh_t/dh_s||`` for all pairs of times: red where an influence has grown, blue where it has shrunk.

    Args:
      influence: from `bptt_jax.influence_map`, of one sequence.
      ax: to draw on; by default the axes of a new figure. A colour bar is put beside it.
      title: above the axes.

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
    ax = new_axes(ax, (6.4, 5.4))
    figure = figure_of(ax)
    later = np.tri(len(times), dtype=bool)
    shown = np.where(later, decades, math.nan)
    reach = float(np.max(np.abs(shown), where=np.isfinite(shown), initial=1e-3))
    shown = np.where(shown == -math.inf, -reach, shown)  # zero: as blue as it gets
    # Each value fills the cell that ends at its time.
    edges = np.concatenate([[times[0] - (times[1] - times[0])], times]) + 0.5
    mesh = ax.pcolormesh(edges, edges, shown, cmap="RdBu_r", vmin=-reach, vmax=reach, rasterized=True)
    bar = figure.colorbar(mesh, ax=ax)
    bar.set_label(r"$\log_{10}\,\|dh_t/dh_s\|_2$", fontsize=text_size(ax))
    bar.ax.tick_params(labelsize=text_size(ax))
    ax.set(xlabel="s, of the state that has the influence", ylabel="t, of the state that feels it", aspect="equal")
    finish(ax)
    ax.grid(False)
    if title is not None:
        ax.set_title(title)
    return figure
