"""A progress bar for `bptt_jax.experiments.loop.train`."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bptt_jax.experiments.records import Record, describe


@contextmanager
def progress_bar(updates: int) -> Iterator[Callable[[Record], None]]:
    """Shows updates, loss, gradient norm and clipped share on stderr; what it gives is for `train`'s `on_record`.

    Numbers are medians of the seeds that run. Events are printed above the bar, a line each; where stderr is no
    terminal, a line for every tenth of the updates takes the bar's place.

    Raises:
      ImportError: rich is missing.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise ImportError("progress_bar needs rich: python -m pip install 'bptt_jax[plot]'") from error
    console = Console(stderr=True, soft_wrap=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("compiling", total=updates)
        told = 0

        def report(record: Record) -> None:
            nonlocal told
            if "event" in record:
                console.print(describe(record), markup=False, highlight=False)
                return
            progress.update(bar, completed=record["updates"], description=_line(record))
            tenth = 10 * record["updates"] // updates
            if not console.is_terminal and tenth > told:
                told = tenth
                print(f"{record['updates']} of {updates} updates: {_line(record)}", file=sys.stderr, flush=True)

        yield report


def _line(record: Record) -> str:
    parts = [f"loss {_median(record['loss']):.4g}"]
    norm = _median(record["gradient_log_norm"])
    # A norm may lie beyond the range of numbers, where its logarithm does not.
    parts.append(f"gradient norm {math.exp(norm):.3g}" if norm < 700 else f"log gradient norm {norm:.0f}")
    parts += [f"{what} {_median(record[what]):.0%}" for what in ("clipped", "skipped") if record[what] is not None]
    solved, seeds = sum(n is not None for n in record["solved_at"]), len(record["solved_at"])
    return ", ".join([*parts, f"solved {solved} of {seeds}"] if seeds > 1 else parts)


def _median(values: list[float | str | None]) -> float:
    numbers = sorted((float(v) for v in values if v is not None), key=lambda v: (math.isnan(v), v))
    return numbers[(len(numbers) - 1) // 2] if numbers else math.nan
