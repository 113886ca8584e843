"""How the gradient looks by lag: its size, its noise, and its digits."""

import math

import numpy as np

from bptt_jax.analysis.lags import GradientByLag
from bptt_jax.analysis.noise import GradientNoise
from bptt_jax.analysis.precision import GradientPrecision
from bptt_jax.plots.style import LINES, Axes, Figure, decades, figure_of, finish, new_axes, text_size

_SIZE = 6.4, 3.6
_LAG = "lag (steps from loss to parameters)"


def plot_gradient_lags(by_lag: GradientByLag, *, ax: Axes | None = None, title: str | None = None) -> Figure:
    """Draws the norm of the gradient's part from each lag, beside that of the whole gradient, or says why it has none.

    Args:
      by_lag: from `bptt_jax.analysis.gradient_by_lag`, of one sequence. Where nothing comes from, there is a gap.
      ax: to draw on; by default the axes of a new figure.
      title: above the axes.

    Returns:
      The figure of the axes.

    Raises:
      TypeError, ValueError: `by_lag` is none, or a batch.

    Example:
      >>> problem = lambda w, h, x: w * h + x, 0.5, jnp.zeros(()), jnp.ones(20), lambda states: states[-1]
      >>> figure = bptt.plots.plot_gradient_lags(bptt.analysis.gradient_by_lag(*problem))
      >>> figure.axes[0].get_xlabel()
      'lag (steps from loss to parameters)'
    """
    _check_one("by_lag", by_lag, GradientByLag, "gradient_by_lag")
    ax = new_axes(ax, _SIZE)
    (color, dash), (other, other_dash) = LINES[:2]
    ax.plot(by_lag.lags, _log10(by_lag.log_norms), color=color, linestyle=dash, label="part from this lag")
    whole = float(by_lag.whole_log_norm) / math.log(10)
    if math.isfinite(whole):
        ax.axhline(whole, color=other, linestyle=other_dash, label="whole gradient")
    elif np.max(by_lag.log_norms) > -np.inf or math.isnan(whole):
        why = "underflows or cancels" if whole == -math.inf else "not finite"
        ax.plot([], [], color=other, linestyle=other_dash, label=f"whole gradient: {why}")
    return _finished(ax, r"$\|g_k\|$", title, logarithmic=True)


def plot_gradient_noise(noise: GradientNoise, *, ax: Axes | None = None, title: str | None = None) -> Figure:
    """Draws signal to noise by lag, with standard errors, and the lag from which on noise prevails.

    Args:
      noise: from `bptt_jax.analysis.gradient_noise`, of one batch. Where no signal is seen, there is a gap.
      ax: to draw on; by default the axes of a new figure.
      title: above the axes.

    Returns:
      The figure of the axes.

    Raises:
      TypeError, ValueError: `noise` is none, or several.

    Example:
      >>> xs = 1 + jax.random.normal(jax.random.key(0), (16, 8))
      >>> problem = lambda w, h, x: w * h + x, 0.5, jnp.zeros(()), xs, lambda states: states[-1]
      >>> figure = bptt.plots.plot_gradient_noise(bptt.analysis.gradient_noise(*problem))
      >>> figure.axes[0].get_ylabel()
      'signal to noise, batch of 16'
    """
    _check_one("noise", noise, GradientNoise, "gradient_noise")
    ax = new_axes(ax, _SIZE)
    (color, dash), (other, other_dash), (third, third_dash) = LINES[:3]
    ratios, errors = (np.asarray(a, np.float64) for a in (noise.signal_to_noise, noise.errors))
    ratios = np.where(np.isfinite(ratios) & (ratios > 0), ratios, np.nan)
    ax.plot(noise.lags, np.log10(ratios), color=color, linestyle=dash, label="signal to noise")
    low = np.log10(np.maximum(ratios - errors, ratios / 100))  # to zero and below there is no way down
    ax.fill_between(noise.lags, low, np.log10(ratios + errors), color=color, alpha=0.15, linewidth=0)
    ax.axhline(0, color=other, linestyle=other_dash, label="alike")
    if math.isfinite(float(noise.horizon)):
        ax.axvline(float(noise.horizon), color=third, linestyle=third_dash, label="noise prevails")
    return _finished(ax, f"signal to noise, batch of {int(noise.batch_size)}", title, logarithmic=True)


def plot_gradient_precision(
    *precisions: GradientPrecision, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """Draws the decimal digits that are left of the gradient's part from each lag; a dot where it underflows first.

    Args:
      precisions: from `bptt_jax.analysis.gradient_precision`, one for each dtype, of one sequence.
      ax: to draw on; by default the axes of a new figure.
      title: above the axes.

    Returns:
      The figure of the axes.

    Raises:
      TypeError, ValueError: there is none, one is something else, or a batch.

    Example:
      >>> with jax.enable_x64(True):
      ...     problem = lambda b, h, x: 0.7 * h + b, jnp.zeros(()), jnp.zeros(()), None, lambda states: states[-1]
      ...     found = bptt.analysis.gradient_precision(*problem, dtype="float16", length=60)
      >>> bptt.plots.plot_gradient_precision(found).axes[0].get_ylabel()
      'digits left'
    """
    if not precisions:
        raise ValueError("precisions: expected at least one of bptt_jax.analysis.gradient_precision, got none")
    for precision in precisions:
        _check_one("precisions", precision, GradientPrecision, "gradient_precision")
    ax = new_axes(ax, _SIZE)
    for k, precision in enumerate(precisions):
        color, dash = LINES[k % len(LINES)]
        digits = np.asarray(precision.digits, np.float64)
        digits = np.where(digits > 17, np.nan, digits)  # exact
        ax.plot(precision.lags, digits, color=color, linestyle=dash, label=precision.dtype)
        under = float(precision.underflow_lag)
        if math.isfinite(under):
            ax.plot([under], [digits[int(under)]], color=color, marker="o", linestyle="none")
    ax.set_ylim(bottom=0)
    return _finished(ax, "digits left", title, logarithmic=False)


def _check_one(name: str, found: object, kind: type, function: str) -> None:
    if not isinstance(found, kind):
        raise TypeError(f"{name}: expected that of bptt_jax.analysis.{function}, got {type(found).__name__}")
    shape = list(np.shape(found.__dict__["lags"]))
    if len(shape) > 1:
        raise ValueError(f"{name}: expected one, got a batch of shape {shape[:-1]}")


def _log10(logs: object) -> np.ndarray:
    values = np.asarray(logs, np.float64) / math.log(10)
    return np.where(np.isfinite(values), values, np.nan)


def _finished(ax: Axes, what: str, title: str | None, logarithmic: bool) -> Figure:
    ax.set(xlabel=_LAG, ylabel=what)
    if logarithmic:
        decades(ax)
    finish(ax)
    ax.legend(fontsize=text_size(ax), frameon=False)
    if title is not None:
        ax.set_title(title)
    return figure_of(ax)
