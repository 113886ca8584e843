"""What all figures share: how they show in a notebook, their lines, their axes of logarithms."""

import io
import math
import warnings
from collections.abc import Sequence

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter, MaxNLocator
except ImportError as error:
    raise ImportError("bptt_jax.plots needs matplotlib: python -m pip install 'bptt_jax[plot]'") from error

# Told apart by dash and by lightness as well as by hue, so that a print in grey still shows which is which.
LINES: tuple[tuple[str, str | tuple[int, tuple[int, ...]]], ...] = (
    ("#000000", "-"),
    ("#c8102e", (0, (6, 2))),
    ("#3a86c8", "-."),
    ("#e09f1f", (0, (1, 1))),
    ("#5b3a8c", (0, (8, 2, 1, 2, 1, 2))),
    ("#4f9d5b", (0, (3, 1))),
)
_NARROW = 5.0  # inches, below which text is smaller


class NotebookFigure(Figure):
    """A figure that a notebook shows as the value of a cell, with nothing to be set up before."""

    def _repr_png_(self) -> bytes:
        written = io.BytesIO()
        self.savefig(written, format="png", dpi=100)
        return written.getvalue()


def new_axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """`ax`, or the only axes of a new figure of that size."""
    return NotebookFigure(figsize=figsize, layout="constrained").subplots() if ax is None else ax


def figure_of(ax: Axes) -> Figure:
    """The whole figure that the axes belong to."""
    figure = ax.figure.get_figure(root=True)
    assert figure is not None
    return figure


def text_size(ax: Axes) -> float:
    """In points, of labels and legends: smaller in a figure as narrow as a column."""
    return 7.0 if figure_of(ax).get_figwidth() < _NARROW else 9.0


def finish(ax: Axes) -> None:
    """Text of the figure's size, and a grid."""
    size = text_size(ax)
    ax.tick_params(labelsize=size)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_fontsize(size)
    ax.title.set_fontsize(size + 1)
    ax.grid(True, color="0.9", linewidth=0.6)


class DecadeFormatter(Formatter):
    """Of an axis of decimal logarithms: powers of ten, and where ticks lie closer than that, the numbers themselves,
    with as many digits as tell them apart."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return self.format_ticks([x])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        if all(abs(v - round(v)) < 1e-6 for v in values):
            return [f"$10^{{{round(v)}}}$" for v in values]
        labels = [""]
        for digits in range(1, 8):
            labels = [_number(v, digits) for v in values]
            if len(set(labels)) == len(set(values)):
                break
        return labels


def _number(decades: float, digits: int) -> str:
    """``10^decades``; a mantissa and a power of ten where it would have many zeros."""
    if abs(decades) < 4:
        return f"{10**decades:.{digits}g}"
    power = math.floor(decades)
    return f"{10 ** (decades - power):.{digits}g}e{power}"


def decades(ax: Axes) -> None:
    """The y axis holds decimal logarithms."""
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=3))
    ax.yaxis.set_major_formatter(DecadeFormatter())


def batched(values: object, ndim: int) -> np.ndarray:
    """With all axes but the last `ndim` made one."""
    array = np.asarray(values)
    return array.reshape(-1, *array.shape[array.ndim - ndim :])


def quantiles(rows: np.ndarray, levels: list[float], axis: int = 0) -> np.ndarray:
    """Quantiles that are entries, not interpolations, so that an infinity spoils no finite one; NaN left out."""
    if not rows.size:
        return np.full((len(levels), *np.delete(rows.shape, axis)), np.nan)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where every sequence is NaN, the line has a gap
        return np.nanquantile(rows, levels, axis=axis, method="inverted_cdf")


def aligned_at_end(rows: np.ndarray) -> np.ndarray:
    """``[B, T, ...]`` with what is NaN at the end of a row, its padding, moved to its beginning."""
    flat = rows.reshape(*rows.shape[:2], -1)
    known = ~np.all(np.isnan(flat), axis=2)
    shifts = np.where(known.any(axis=1), np.argmax(known[:, ::-1], axis=1), 0)
    return np.stack([np.roll(row, shift, axis=0) for row, shift in zip(rows, shifts, strict=True)])
