"""How far a job is, on stderr: a bar on a terminal, elsewhere (files, notebooks) a line now and then."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bptt_jax.experiments.records import Record, describe
from bptt_jax.results import counted


class Progress:
    """What `progress` gives: told how much is done, it shows that, the rate and the time left."""

    def __init__(self, total: int, unit: str, bar: Any, *, quiet: bool) -> None:
        self._total, self._unit, self._bar, self._quiet = total, unit, bar, quiet
        self._task = bar.add_task("compiling", total=total, pace="")
        self._first: tuple[float, int] | None = None

    def show(self, done: int, what: str, line: str | None = None) -> None:
        """`done` of the total, and what is going on; where there is no bar, a `line`, if one is given."""
        pace = self._pace(done)
        self._bar.update(self._task, completed=done, description=what, pace=pace)
        if line is not None and self._bar.disable and not self._quiet:
            print(", ".join(filter(None, (line, pace))), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._quiet:
            return
        if self._bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def _pace(self, done: int) -> str:
        """Since the first that was told: what came before was compiling, or done by an earlier command."""
        now = time.perf_counter()
        if self._first is None:
            self._first = now, done
        started, before = self._first
        if done <= before or now <= started:
            return ""
        each = (now - started) / (done - before)
        rate = f"{counted(f'{1 / each:.3g}', self._unit)}/s" if each < 1 else f"{each:.3g} s each"
        return f"{rate}, {_duration(each * (self._total - done))} left" if done < self._total else rate


@contextmanager
def progress(total: int, unit: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Shows how far a job of `total` units (update, cell) is; nothing of it where `quiet`.

    Raises:
      ImportError: rich is missing.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar
    except ImportError as error:
        raise ImportError("progress needs rich: python -m pip install 'bptt_jax[plot]'") from error
    console = Console(stderr=True, soft_wrap=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}", markup=False),
    )
    with Bar(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        yield Progress(total, unit, bar, quiet=quiet)


@contextmanager
def progress_bar(updates: int, *, quiet: bool = False) -> Iterator[Callable[[Record | str], None]]:
    """Shows updates, loss, gradient norm and clipped share on stderr; what it gives is for `train`'s `on_record`, and
    shows a line of text that it is given above the bar.

    Numbers are medians of the seeds that run. Events are printed above the bar, a line each; where stderr is no
    terminal, as in a notebook, a line for every tenth of the updates takes the bar's place. With `quiet` nothing is
    shown.

    Raises:
      ImportError: rich is missing.
    """
    with progress(updates, "update", quiet=quiet) as shown:
        told = 0

        def report(record: Record | str) -> None:
            nonlocal told
            if isinstance(record, str):
                shown.say(record)
                return
            if "event" in record:
                shown.say(describe(record))
                return
            done, line = record["updates"], _line(record)
            tenth = 10 * done // updates
            shown.show(done, line, f"{done} of {counted(updates, 'update')}: {line}" if tenth > told else None)
            told = max(told, tenth)

        yield report


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _line(record: Record) -> str:
    parts = [f"loss {_median(record['loss']):.4g}"]
    norm = _median(record["gradient_log_norm"])
    # A norm may lie beyond the range of numbers, where its logarithm does not.
    parts.append(f"gradient norm {math.exp(norm):.3g}" if norm < 700 else f"log gradient norm {norm:.0f}")
    parts += [f"{what} {_median(record[what]):.0%}" for what in ("clipped", "skipped") if record[what] is not None]
    parts += [f"window {record['window']}"] if record["bias_bound"] is not None else []
    solved, seeds = sum(n is not None for n in record["solved_at"]), len(record["solved_at"])
    return ", ".join([*parts, f"solved {solved} of {seeds}"] if seeds > 1 else parts)


def _median(values: list[float | str | None]) -> float:
    numbers = sorted((float(v) for v in values if v is not None), key=lambda v: (math.isnan(v), v))
    return numbers[(len(numbers) - 1) // 2] if numbers else math.nan
