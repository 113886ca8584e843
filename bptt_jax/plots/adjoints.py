"""How the error signal looks, unit by unit."""

import math

import jax
import numpy as np

from bptt_jax.analysis.backward import Adjoints
from bptt_jax.plots.style import Axes, Figure, figure_of, finish, new_axes, text_size


def plot_adjoints(adjoints: Adjoints, *, ax: Axes | None = None, title: str | None = None) -> Figure:
    """Draws the size of dL/dh_t unit by unit over time, on a logarithmic scale that holds where float32 ends.

    Args:
      adjoints: from `bptt_jax.adjoints`, of one sequence. The leaves of the state stand above each other.
      ax: to draw on; by default the axes of a new figure. A colour bar is put beside it.
      title: above the axes.

    Returns:
      The figure of the axes.

    Raises:
      TypeError, ValueError: `adjoints` are none, or a batch of them.

    Example:
      >>> found = bptt.adjoints(lambda w, h, x: w * h, 0.5, jnp.ones(3), jnp.zeros(20), lambda states: states[-1].sum())
      >>> bptt.plots.plot_adjoints(found).axes[0].get_ylabel()
      'unit'
    """
    if not isinstance(adjoints, Adjoints):
        raise TypeError(f"adjoints: expected those of bptt_jax.adjoints, got {type(adjoints).__name__}")
    if adjoints.loss.ndim:
        shape = list(adjoints.loss.shape)
        raise ValueError(f"adjoints: expected those of one sequence, got a batch of shape {shape}")
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(adjoints.log_magnitudes)]
    sizes = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1).T / math.log(10)
    ax = new_axes(ax, (6.4, 3.6))
    figure = figure_of(ax)
    known = sizes[np.isfinite(sizes)]
    low, high = (float(known.min()), float(known.max())) if known.size else (-1.0, 0.0)
    shown = np.where(sizes == -math.inf, low, sizes)  # zero: as dark as it gets
    edges = np.arange(sizes.shape[1] + 1) + 0.5
    units = np.arange(len(sizes) + 1) - 0.5
    mesh = ax.pcolormesh(edges, units, shown, cmap="viridis", vmin=low, vmax=max(high, low + 1e-9))
    bar = figure.colorbar(mesh, ax=ax)
    bar.set_label(r"$\log_{10}\,|dL/dh_t|$", fontsize=text_size(ax))
    bar.ax.tick_params(labelsize=text_size(ax))
    ax.set(xlabel="time step t", ylabel="unit")
    finish(ax)
    ax.grid(False)
    if title is not None:
        ax.set_title(title)
    return figure
