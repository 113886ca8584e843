"""How Lyapunov exponents look."""

from bptt_jax.analysis.lyapunov import LyapunovSpectrum, as_one, draw_exponents

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
except ImportError as error:
    raise ImportError("plot_exponents needs matplotlib: python -m pip install 'bptt_jax[plot]'") from error


def plot_exponents(
    spectrum: LyapunovSpectrum, *, ax: Axes | None = None, title: str | None = None
) -> Figure | SubFigure:
    """Draws the exponents in their order, with bars of two standard errors; a red triangle stands for -inf.

    Args:
      spectrum: from `bptt_jax.lyapunov_exponents`, of one sequence, or of a batch, of which `pooled` is drawn.
      ax: matplotlib's axes to draw on; by default those of a new figure, 3.4 inches wide.
      title: above them.

    Returns:
      The figure of the axes; ``figure.savefig(path)`` writes it.

    Raises:
      TypeError, ValueError: `spectrum` is none, or a batch of several axes.
      ImportError: matplotlib is not installed.

    Example:
      >>> spectrum = bptt.lyapunov_exponents(lambda w, h, x: w * h, jnp.array([0.5, 2.0]), jnp.zeros(2), length=50)
      >>> bptt.plots.plot_exponents(spectrum).axes[0].get_ylabel()
      'nats per step'
    """
    if not isinstance(spectrum, LyapunovSpectrum):
        raise TypeError(f"spectrum: expected a LyapunovSpectrum, got {type(spectrum).__name__}")
    if spectrum.exponents.ndim > 2:
        shape = list(spectrum.exponents.shape[:-1])
        raise ValueError(f"spectrum: expected one, or a batch of one axis, got a batch of shape {shape}")
    if ax is None:
        ax = Figure(figsize=(3.4, 2.6), layout="constrained").subplots()
    draw_exponents(ax, as_one(spectrum))
    if title is not None:
        ax.set_title(title)
    return ax.figure
