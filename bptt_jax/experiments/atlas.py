"""The atlas measured: how every cell carries a gradient at its initialisation, and what a step of it costs."""

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.analysis.flow import gradient_flow
from bptt_jax.analysis.flow_results import GradientFlow
from bptt_jax.analysis.lyapunov import living_rates, lyapunov_exponents
from bptt_jax.cells.atlas import ATLAS, AtlasEntry, Family
from bptt_jax.cells.measurement import CellMeasurement, Parallel
from bptt_jax.experiments.network import NetworkParams, network
from bptt_jax.experiments.tasks import Batch, Task
from bptt_jax.experiments.timing import interleaved
from bptt_jax.files import read_file, write_json
from bptt_jax.leaves import to_jsonable
from bptt_jax.parallel.prediction import ParallelPrediction
from bptt_jax.recurrence.delta import LinearStep
from bptt_jax.step import Array, Cell, PyTree, state_size
from bptt_jax.step import Sequence as Masked

BASES = ("width", "parameters")
_WHOLE = 256  # numbers of the state up to which all exponents are measured
_FEW = 64  # of a larger state
_WIDEST = 4  # times the width that was asked for, where parameters are to be equal
_REPEATS, _AT_LEAST = 11, 0.4  # of timing, and seconds
# What runs once, in a tenth of the time that its compilation takes, is compiled in a hurry.
_IN_HASTE = {"xla_backend_optimization_level": 0}
_ROUNDING = 1e6  # steps: a signal that falls by less than some 1e-6 a step falls by rounding, in single precision
_MOST_BYTES = 1 << 26  # of a file of results


@dataclass(frozen=True)
class Settings:
    """All that the numbers depend on, but for the cells and the machine.

    Attributes:
      hidden: N, of `rnn`, and of all cells at equal width.
      batch: sequences, the same for all cells.
      seeds: of the initial weights.
      task: name of the task, or "text".
      length: T, steps of a sequence.
      text_sha256: of the text; None where there is none.
    """

    hidden: int
    batch: int
    seeds: int
    task: str
    length: int
    text_sha256: str | None = None


class AtlasFileError(ValueError):
    """The file holds an atlas of other settings, or none."""


class Measured(NamedTuple):
    """Measurements by cell and basis, and of the cells that could not be measured the reason."""

    cells: dict[str, dict[str, CellMeasurement]]
    failed: dict[str, str]


class _Timed(NamedTuple):
    """What is timed of one cell at one size, compiled."""

    forward: Callable[..., Array]
    backward: Callable[..., Any]
    memory: int


class _Job(NamedTuple):
    """A cell at one size, before anything is compiled."""

    name: str
    entry: AtlasEntry
    basis: Any
    hidden: int
    parameters: int
    cell: Cell
    followed: int


def embedded(task: Task, size: int) -> Task:
    """The task with its inputs times one random matrix ``[I, size]`` of N(0, 1), as an embedding of symbols is.

    Of one-hot symbols each input has then entries of unit variance, and drives the units as strongly as initial weights
    expect.
    """

    def sample(key: Array, batch: int) -> Batch:
        inputs, targets = task.sample(key, batch)
        table = jax.random.normal(jax.random.key(0), (task.input_size, size))
        return Batch(inputs @ table, targets)

    return task._replace(input_size=size, sample=sample)


def chosen(families: Sequence[str] = (), cells: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the atlas, in its order: those of the families and those named; all where nothing is said."""
    everything = not families and not cells
    return tuple(n for n, entry in ATLAS.items() if everything or entry.family in families or n in cells)


def parameter_count(cell: Cell, input_size: int) -> int:
    """Real numbers among a cell's parameters."""
    params = jax.eval_shape(lambda key: cell.init(key, input_size), jax.random.key(0))
    floating = [a for a in jax.tree.leaves(params) if jnp.issubdtype(a.dtype, jnp.inexact)]
    return sum(a.size * (2 if jnp.issubdtype(a.dtype, jnp.complexfloating) else 1) for a in floating)


def equal_size(make: Callable[[int], Cell], input_size: int, target: int, most: int) -> int:
    """The hidden size, up to `most`, whose number of parameters is nearest to `target`; of two the smaller.

    Sizes that the cell refuses, since its heads do not divide them, are left out. Counts grow with the size.
    """

    def count(size: int) -> int:
        return parameter_count(make(size), input_size)

    sizes = [n for n in range(1, most + 1) if _makes(make, n)]
    if not sizes:
        raise ValueError(f"no hidden size up to {most} is one of the cell's")
    i = bisect_left(sizes, target, key=count)
    return min(sizes[max(0, i - 1) : i + 1], key=lambda n: (abs(count(n) - target), n))


def _makes(make: Callable[[int], Cell], size: int) -> bool:
    try:
        make(size)
    except ValueError:
        return False
    return True


def measure(
    settings: Settings,
    task: Task,
    names: Sequence[str],
    file: Path,
    *,
    on_cell: Callable[[str, int, int], None] = lambda name, done, total: None,
    atlas: Mapping[str, AtlasEntry] = ATLAS,
) -> Measured:
    """Measures each of the cells at equal width and at equal number of parameters; the file has it after each.

    Cells that the file holds already are not measured again, so that the same call goes on where it was stopped.

    Args:
      settings, task: `task` is what `settings` name.
      names: of the atlas.
      file: JSON, begun if it is not there.
      on_cell: told, before each cell that is to be measured, its name, how many are done, and of how many.
      atlas: the cells that there are.

    Raises:
      AtlasFileError: the file holds an atlas of other settings, or cannot be read as one.
      OSError: it cannot be read or written.
    """
    there = {k: of for k, of in _read(file, settings).items() if k in atlas}
    missing = [n for n in names if n not in there]
    failed: dict[str, str] = {}
    if missing:
        bench = _Bench(settings, task, atlas["rnn"].make)
    for name in missing:
        on_cell(name, len(names) - len(missing) + missing.index(name), len(names))
        try:
            of_cell = bench.measure(name, atlas[name])
        except Exception as error:  # of a cell: the others are measured all the same
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
            continue
        there[name] = of_cell
        _write(file, settings, _read(file, settings) | there)  # another process may have added some
    return Measured({n: there[n] for n in names if n in there}, failed)


class _Bench:
    """The sequences, and the `rnn` beside which cells are timed."""

    def __init__(self, settings: Settings, task: Task, reference: Callable[[int], Cell]) -> None:
        self.settings, self.task = settings, task
        self.data = jax.block_until_ready(jax.jit(task.sample, static_argnums=1)(jax.random.key(0), settings.batch))
        self.keys = jax.random.split(jax.random.key(1), settings.seeds)
        cell = reference(settings.hidden)
        self.target = parameter_count(cell, task.input_size)
        self.reference = self._timed(cell)
        self.params = jax.jit(network(cell, task).init)(self.keys[0])

    def measure(self, name: str, entry: AtlasEntry) -> dict[str, CellMeasurement]:
        jobs = list(self._jobs(name, entry))
        sizes = {job.hidden: job for job in jobs}
        with ThreadPoolExecutor(2) as pool:
            programs = dict(zip(sizes, pool.map(self._compiled, sizes.values()), strict=True))
        found = {n: self._measured(sizes[n], *programs[n]) for n in sizes}
        return {job.basis: replace(found[job.hidden], basis=job.basis) for job in jobs}

    def _jobs(self, name: str, entry: AtlasEntry) -> Iterator[_Job]:
        wide, inputs = self.settings.hidden, self.task.input_size
        for basis in BASES:
            hidden = wide
            if basis == "parameters":
                hidden = equal_size(entry.make, inputs, self.target, _WIDEST * wide)
            cell = entry.make(hidden)
            size = state_size(cell.initial_state())
            followed = size if size <= _WHOLE else _FEW
            yield _Job(name, entry, basis, hidden, parameter_count(cell, inputs), cell, followed)

    def _compiled(self, job: _Job) -> tuple[Callable[..., Any], _Timed]:
        program = _gradients(job.cell, self.task, job.followed).lower(self.keys, self.data)
        return program.compile(_IN_HASTE), self._timed(job.cell)

    def _timed(self, cell: Cell) -> _Timed:
        net = network(cell, self.task)
        params = jax.eval_shape(net.init, self.keys[0])

        def loss(params: NetworkParams, data: Batch) -> Array:
            return jnp.mean(jax.vmap(partial(net.loss, params))(*data))

        forward = jax.jit(loss).lower(params, self.data).compile()
        backward = jax.jit(jax.value_and_grad(loss)).lower(params, self.data).compile()
        analysis = backward.memory_analysis()
        memory = 0 if analysis is None else int(analysis.temp_size_in_bytes)
        return _Timed(forward, backward, memory)

    def _measured(self, job: _Job, gradients: Callable[..., Any], timed: _Timed) -> CellMeasurement:
        flows, rates, params = gradients(self.keys, self.data)
        flows = jax.tree.map(np.asarray, flows)
        first = jax.tree.map(lambda a: a[0], params)
        candidates = {
            "forward": partial(timed.forward, first, self.data),
            "backward": partial(timed.backward, first, self.data),
            "rnn forward": partial(self.reference.forward, self.params, self.data),
            "rnn backward": partial(self.reference.backward, self.params, self.data),
        }
        # The least of all: on a busy machine medians of so few calls are off by factors.
        times = {name: min(of) for name, of in interleaved(candidates, _REPEATS, _AT_LEAST).items()}
        steps = self.task.length * self.settings.batch
        horizons = np.ravel(np.asarray(flows.horizon, np.float64))
        horizons = np.where(horizons > _ROUNDING, np.inf, horizons)
        rate, rate_error = _growth(flows)
        exponents, living = (np.asarray(a, np.float64) for a in rates)
        low, middle, high = _quantiles(horizons)
        with np.errstate(invalid="ignore"):
            span = self.task.length * (exponents[:, 0] - exponents[:, -1])
        memory = self.reference.memory
        numbers = {
            "growth_rate": rate,
            "growth_rate_error": rate_error,
            "horizon": middle,
            "horizon_low": low,
            "horizon_high": high,
            "exponent": np.mean(exponents[:, 0]),
            "exponent_error": _error_of_mean(exponents[:, 0]),
            "living": np.mean(np.sum(exponents > -1 / self.task.length, axis=1)),
            "log_condition": np.mean(np.where(np.isneginf(exponents[:, -1]), np.inf, span)),
            "leaf_shares": _leaf_shares(flows),
            "forward_time": times["forward"] / times["rnn forward"],
            "gradient_time": times["backward"] / times["rnn backward"],
            "memory": timed.memory / memory if memory else np.nan,
            "forward_seconds": times["forward"] / steps,
            "gradient_seconds": times["backward"] / steps,
            "memory_bytes": timed.memory / steps,
            "learned": np.nan,
        }
        return CellMeasurement(
            name=job.name,
            family=job.entry.family,
            basis=job.basis,
            hidden=job.hidden,
            parameters=job.parameters,
            size=state_size(job.cell.initial_state()),
            followed=job.followed,
            parallel=parallel_in_time(job.cell, living, self.data.inputs, self.task.length),
            leaf_names=flows.leaves.names,
            **{name: _number(value) for name, value in numbers.items()},
        )


def parallel_in_time(cell: Cell, living: np.ndarray, inputs: PyTree, length: int) -> Parallel:
    """What there is to evaluate a cell in parallel over time, from its `living_rates` ``[S, 2]``."""
    if isinstance(cell.step, LinearStep):
        return "linear"
    longest, size = length, state_size(cell.initial_state())
    if isinstance(inputs, Masked) and inputs.mask is not None:
        longest = int(np.sum(inputs.mask[0]))
    sizes = (jnp.full(len(living), n) for n in (length, longest, size))
    return ParallelPrediction(*jnp.asarray(living).T, *sizes).verdict


def _number(value: Any) -> Any:
    return np.asarray(value, np.float64)


def _gradients(cell: Cell, task: Task, followed: int) -> Any:
    """Of seeds, one after the other: flows ``[S, B]``, of the first sequence exponents ``[S, followed]`` and the
    largest while differences live with its error ``[S, 2]``, and the parameters."""
    net, h0 = network(cell, task), cell.initial_state()

    def of_seed(key: Array, data: Batch) -> PyTree:
        params = net.init(key)

        def flow(xs: PyTree, target: PyTree) -> GradientFlow:
            args = net.loss_args(params, xs, target)
            found = gradient_flow(cell.step, params.cell, h0, xs, net.loss_of_states, args=args, spectra=False)
            # What is not asked for is not compiled, a fifth of all.
            dropped: Any = dict.fromkeys(("contributions", "numerics", "peak_gain"))
            signal: Any = dict.fromkeys(("adjoint_log_norms", "log_gains"))
            return replace(found, signal=replace(found.signal, **signal), **dropped)

        first = jax.tree.map(lambda a: a[0], data.inputs)
        spectrum = lyapunov_exponents(
            cell.step, params.cell, h0, first, num=followed, warmup=(task.length - 1) // 10
        )
        living = jnp.stack([a[0] for a in living_rates(spectrum)])
        return jax.vmap(flow)(*data), (spectrum.exponents, living), params

    return jax.jit(lambda keys, data: jax.lax.map(lambda key: of_seed(key, data), keys))


def _growth(flows: GradientFlow) -> tuple[np.float64, np.float64]:
    """The rate, and its error: that of the mean over the seeds, for sequences under the same weights are no
    independent measurements; of a single seed that of its sequences."""
    pooled = flows.pooled()
    rates = np.asarray(pooled.growth_rate, np.float64)
    if len(rates) == 1:
        return np.float64(rates[0]), np.float64(pooled.growth_rate_error[0])
    return np.float64(np.mean(rates)), _error_of_mean(rates)


def _error_of_mean(values: np.ndarray) -> np.float64:
    if len(values) < 2 or not np.isfinite(values).all():
        return np.float64(np.nan)
    return np.float64(np.std(values, ddof=1) / math.sqrt(len(values)))


def _quantiles(values: np.ndarray) -> np.ndarray:
    """Tenth percentile, median and ninetieth, which are among the values; NaN left out."""
    known = values[~np.isnan(values)]
    return np.quantile(known, [0.1, 0.5, 0.9], method="inverted_cdf") if len(known) else np.full(3, np.nan)


def _leaf_shares(flows: GradientFlow) -> np.ndarray:
    gains = np.asarray(flows.leaves.log_norms, np.float64)
    gains = gains.reshape(-1, gains.shape[-1])
    largest = np.max(gains, axis=1, keepdims=True)
    used = (np.ravel(np.asarray(flows.signal.lags)) > 0) & np.isfinite(largest[:, 0])
    if not used.any():
        return np.full(gains.shape[-1], np.nan)
    squares = np.exp(2 * (gains[used] - largest[used]))
    return np.mean(squares / np.sum(squares, axis=1, keepdims=True), axis=0)


def _read(file: Path, settings: Settings) -> dict[str, dict[str, CellMeasurement]]:
    """Of the cells that are there."""
    try:
        content = json.loads(read_file(file, most=_MOST_BYTES).decode("utf-8"))
        there, cells = dict(content["settings"]), content["cells"]
        found = {name: {basis: parsed(of[basis]) for basis in BASES} for name, of in cells.items()}
    except FileNotFoundError:
        return {}
    except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise AtlasFileError(f"{file}: holds no atlas ({type(error).__name__})") from None
    here = _plain(settings)
    if there != here:
        keys = sorted(here.keys() | there.keys())
        told = "; ".join(
            f"{k}: {there.get(k)} there, {here.get(k)} here" for k in keys if there.get(k) != here.get(k)
        )
        raise AtlasFileError(f"{file}: holds an atlas of other settings ({told})")
    return found


def parsed(fields: Mapping[str, Any]) -> CellMeasurement:
    """From its `to_dict`."""
    kinds: dict[str, Callable[[Any], Any]] = dict.fromkeys(("name", "family", "basis", "parallel"), str)
    kinds["leaf_names"] = tuple
    kinds |= dict.fromkeys(("hidden", "parameters", "size", "followed"), int)
    found = CellMeasurement(**{k: kinds.get(k, _number)(v) for k, v in fields.items()})
    shapes = {k: np.shape(getattr(found, k)) for k in fields if k not in kinds}
    leaves = shapes.pop("leaf_shares")
    known = found.family in get_args(Family) and found.basis in BASES
    if not known or any(shapes.values()) or leaves != (len(found.leaf_names),):
        raise ValueError("no measurement")
    return found


def _write(file: Path, settings: Settings, cells: Mapping[str, Mapping[str, CellMeasurement]]) -> None:
    content = {k: {basis: m.to_dict() for basis, m in of.items()} for k, of in cells.items()}
    write_json(file, {"settings": _plain(settings), "cells": content})


def _plain(settings: Settings) -> dict[str, Any]:
    return to_jsonable(asdict(settings))
