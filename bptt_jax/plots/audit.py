"""How far back estimators of the gradient see."""

import numpy as np

from bptt_jax.estimators.audit import Audit, beyond_range, cosine_in_words
from bptt_jax.plots.style import LINES, Axes, Figure, figure_of, finish, new_axes, text_size


def plot_audit(audit: Audit, *, ax: Axes | None = None, title: str | None = None) -> Figure:
    """Draws, lag by lag, which share of the gradient each estimator retains, with standard errors over the keys.

    The legend has the cosines with the exact gradient, or says why there are none.

    Args:
      audit: from `bptt_jax.audit`, of lags.
      ax: to draw on; by default the axes of a new figure.
      title: above the axes.

    Returns:
      A `matplotlib.figure.Figure`; ``figure.savefig(path)`` writes it.

    Raises:
      TypeError, ValueError: `audit` is no `Audit`, a batch of them, or one without lags.
    """
    if not isinstance(audit, Audit):
        raise TypeError(f"audit: expected an Audit, got {type(audit).__name__}")
    lags, shares, errors = map(np.asarray, (audit.lags, audit.lag_shares, audit.lag_share_errors))
    if shares.ndim != 2:
        raise ValueError(f"audit: expected that of one problem, got a batch of shape {list(shares.shape)}")
    if not lags.size:
        raise ValueError("audit: expected one with lags, got lags=()")
    ax = new_axes(ax, (6.4, 4.0))
    figure = figure_of(ax)
    for k, name in enumerate(audit.names):
        color, dash = LINES[k % len(LINES)]
        known = ~np.isnan(shares[k])
        ax.errorbar(
            lags[known],
            shares[k][known],
            yerr=np.nan_to_num(errors[k][known]),
            color=color,
            linestyle=dash,
            marker=".",
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
            label=f"{name}: cosine {cosine_in_words(audit, k, 2)}",
        )
    ax.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xscale("symlog", linthresh=1)
    ax.set(
        xlabel="lag: loss step minus parameter step", ylabel="share of the exact gradient's part", xlim=(-0.1, None)
    )
    finish(ax)
    small = text_size(ax)
    ax.legend(frameon=False, fontsize=small, title=beyond_range(audit) or None, title_fontsize=small)
    if title is not None:
        ax.set_title(title)
    return figure
