"""What the command prints of its results: tables, no wider than where they are read."""

import sys
from typing import Any

import numpy as np

from bptt_jax.cli import dynamics
from bptt_jax.cli.atlas import AtlasPart
from bptt_jax.cli.report import COLUMNS, rows, spectra_in_words


def console(make: Any, width: int = 132) -> Any:
    """rich's `Console`, which `make` is: of the terminal's width, or where there is none of one that tables fit in."""
    return make(width=None if sys.stdout.isatty() else width)


def of_flows(numbers: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_lines=True, caption=spectra_in_words(numbers["recurrences"]), caption_justify="left")
    for name in COLUMNS[:-1]:
        table.add_column(name, justify="left" if name in ("cell", "verdict") else "right", no_wrap=True)
    table.add_column(COLUMNS[-1])
    for row in rows(numbers["recurrences"]):
        table.add_row(*map(escape, row))
    return table


def of_training(numbers: dict[str, Any]) -> Any:
    from rich.table import Table

    title = f"trivial loss {numbers['trivial_loss']:.4g}; solved: {numbers['criterion']}"
    table = Table(title=title, title_justify="left", title_style="")
    for name in ("seed", "updates", "solved at", "loss", "error", "gradient norm", "clipped", "skipped"):
        table.add_column(name, justify="right", no_wrap=True)

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    for s in numbers["seeds"]:
        table.add_row(
            str(s["seed"]),
            str(s["updates"]),
            "-" if s["solved_at"] is None else str(s["solved_at"]),
            f"{s['validation_loss']:.4g}",
            f"{s['validation_error']:.2%}",
            f"{np.exp(s['gradient_log_norm']):.3g}",
            share(s["clipped"]),
            share(s["skipped"]),
        )
    return table


def of_dynamics(name: str, numbers: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(name), title_justify="left", title_style="")
    for column in dynamics.COLUMNS:
        table.add_column(column, justify="left" if column == "kind" else "right", no_wrap=True)
    for row in dynamics.rows(numbers):
        table.add_row(*map(escape, row))
    return table


def of_atlas(part: AtlasPart) -> Any:
    """A few of the columns; all of them are in the files."""
    from rich.table import Table

    shown = ("cell", "family", "units", "growth rate", "horizon", "exponent", "living", "gradient", "in parallel")
    table = Table(title=part.heading, title_justify="left", title_style="")
    for name in shown:
        table.add_column(
            name, justify="left" if name in ("cell", "family", "in parallel") else "right", no_wrap=True
        )
    for row in part.rows:
        table.add_row(*(cell for name, cell in zip(part.columns, row, strict=True) if name in shown))
    return table
