"""The job of ``bptt-jax atlas``: every cell's gradient and cost, in one table."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from bptt_jax.analysis.verdict import plus_minus
from bptt_jax.cells.measurement import CellMeasurement
from bptt_jax.cli import train
from bptt_jax.cli.report import BadArgument, provenance
from bptt_jax.experiments.atlas import BASES, Measured, Settings, embedded
from bptt_jax.experiments.tasks import Task
from bptt_jax.leaves import to_jsonable
from bptt_jax.results import counted

COLUMNS = (
    "cell",
    "family",
    "units",
    "parameters",
    "growth rate",
    "horizon",
    "exponent",
    "living",
    "log condition",
    "signal by leaf",
    "forward",
    "gradient",
    "memory",
    "in parallel",
    "learned lag",
)
MEANINGS = {
    "units, parameters": "The hidden size, and how many real numbers are learned, the readout's aside.",
    "growth rate": "Of the error signal on its way back from the last step, in nats per step: mean over seeds and "
    "sequences ± standard error from the scatter of the seeds.",
    "horizon": "Steps until a thousandth of the error signal is left: the median, and in brackets the 10th and the "
    "90th percentile. Beyond the sequence it is extrapolated by the growth rate; inf where the signal does not shrink, "
    "or by rounding alone (beyond 1e6 steps).",
    "exponent": "The largest Lyapunov exponent of the driven recurrence, in nats per step, ± its standard error.",
    "living": "Directions that live as long as the sequence, those of exponents above -1/T, of D, all the numbers of "
    "the state: mean over the seeds. ≥ where all of those that were followed live, and there are more.",
    "log condition": "Of the product of all Jacobians, in nats: T times the difference between the largest and the "
    "smallest exponent. inf where a direction is erased; ≥ where not all directions were followed.",
    "signal by leaf": "Which share of the error signal's square is in which part of the state: mean over all lags.",
    "forward, gradient, memory": "Time of the loss, time of loss and gradient, and memory of the gradient, step by "
    "step over a batch, relative to rnn of the width that was asked for; the fastest of interleaved calls.",
    "in parallel": "linear: linear in the state, for bptt_jax.unroll_linear. Else what "
    "bptt_jax.predict_parallel says of bptt_jax.deer: parallel, sequential or undecided.",
    "learned lag": "The longest lag that was learned within one budget of updates.",
}
TITLES = {"width": "At equal width", "parameters": "At equal number of parameters"}


def prepare(
    task: str | None, text: str | None, length: int, hidden: int, batch: int, seeds: int
) -> tuple[Settings, Task]:
    """Everything that can fail for an argument, before anything is computed.

    Without a task, characters of a text under a random embedding of as many numbers as there are units.

    Raises:
      BadArgument: a text that cannot be read or is too short, no task of that length, a text and a task.
    """
    if length < 2:
        raise BadArgument(f"--length: expected at least 2, got {length}")
    if task is not None:
        if text is not None:
            raise BadArgument("--text, --task: expected one of them at most")
        made, _ = train.task_of(task, length, train.read_given_text(None) if task == "characters" else None)
        return Settings(hidden, batch, seeds, task, length), made
    source = train.read_given_text(text)
    made, _ = train.task_of("characters", length, source)
    digest = hashlib.sha256(source.encode()).hexdigest()
    return Settings(hidden, batch, seeds, "text", length, digest), embedded(made, hidden)


class AtlasPart(NamedTuple):
    """A map of `bptt_jax.plots.plot_atlas`, and a table under the names of its columns."""

    heading: str
    figure: Any
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def title(settings: Settings) -> str:
    """Of figure and page."""
    text = settings.task == "text"
    length = counted(settings.length, "character" if text else "step")
    of = length if text else f"{length} of the task {settings.task}"
    units, sequences = counted(settings.hidden, "unit"), counted(settings.batch, "sequence")
    return f"{units}, {sequences} of {of}, {counted(settings.seeds, 'seed')}, at initialisation"


def of_basis(measured: Measured, basis: str) -> list[CellMeasurement]:
    """One of `BASES`, longest horizon first."""
    found = [of[basis] for of in measured.cells.values()]
    return sorted(found, key=lambda m: (-float(np.nan_to_num(m.horizon, nan=-1.0, posinf=np.inf)), m.name))


def columns(measurements: Sequence[CellMeasurement]) -> tuple[str, ...]:
    """Of `COLUMNS` those that say something."""
    return COLUMNS if any(np.isfinite(m.learned) for m in measurements) else COLUMNS[:-1]


def rows(measurements: Sequence[CellMeasurement]) -> Iterator[tuple[str, ...]]:
    """Under `columns`."""
    learned = columns(measurements) == COLUMNS
    for m in measurements:
        of_leaves = zip(m.leaf_names, m.leaf_shares, strict=True)
        alive = "≥ " if m.followed < m.size and m.living == m.followed else ""
        bound = "≥ " if m.followed < m.size and np.isfinite(m.log_condition) else ""
        yield (
            m.name,
            m.family,
            str(m.hidden),
            str(m.parameters),
            plus_minus(float(m.growth_rate), float(m.growth_rate_error)),
            f"{_steps(m.horizon)} ({_steps(m.horizon_low)} to {_steps(m.horizon_high)})",
            plus_minus(float(m.exponent), float(m.exponent_error)),
            f"{alive}{m.living:.3g} of {m.size}",
            f"{bound}{m.log_condition:.0f}",
            "all" if len(m.leaf_names) == 1 else ", ".join(f"{name} {share:.0%}" for name, share in of_leaves),
            *(f"{value:.2f}" for value in (m.forward_time, m.gradient_time, m.memory)),
            m.parallel,
            *(["-" if np.isnan(m.learned) else f"{m.learned:.0f}"] if learned else []),
        )


def record(settings: Settings, measured: Measured) -> dict[str, Any]:
    """Everything that was asked for, in plain JSON types."""
    return to_jsonable(
        {
            "settings": asdict(settings),
            **provenance(),
            "cells": {name: {basis: m.to_dict() for basis, m in of.items()} for name, of in measured.cells.items()},
            "not_measured": measured.failed,
        }
    )


def markdown(settings: Settings, measured: Measured, provided: Mapping[str, Any]) -> str:
    """Both tables, and what they were measured with, of `provenance`."""
    versions = ", ".join(f"{name} {number}" for name, number in provided["versions"].items())
    lines = [f"{title(settings)}. On {provided['device']}; {versions}.", ""]
    for basis in BASES:
        of = of_basis(measured, basis)
        names = columns(of)
        lines += [
            f"**{TITLES[basis]}**",
            "",
            _line(names),
            _line("---" if i < 2 else "---:" for i in range(len(names))),
        ]
        lines += [*map(_line, rows(of)), ""]
    lines += [f"- {name}: {meaning}" for name, meaning in MEANINGS.items()]
    lines += [f"- not measured: {name}: {why}" for name, why in measured.failed.items()]
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _steps(value: Any) -> str:
    return f"{value:.0f}"
