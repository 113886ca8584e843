"""The job of ``bptt-jax dynamics``: where a recurrence rests, its modes there, its exponents and covariant vectors."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.analysis.covariant import CovariantVectors, covariant_vectors
from bptt_jax.analysis.fixed_point_results import FixedPoints
from bptt_jax.analysis.fixed_points import fixed_points, sample_starts
from bptt_jax.analysis.lyapunov import as_one
from bptt_jax.analysis.verdict import plus_minus
from bptt_jax.cli import diagnose
from bptt_jax.cli.report import BadArgument, one_line, provenance
from bptt_jax.leaves import along_leading, to_jsonable
from bptt_jax.recurrence.unroll import unroll
from bptt_jax.results import counted
from bptt_jax.step import Array, Input, Params, PyTree, Sequence, State, Step, state_size

_FOLLOWED = 4  # sequences along which directions are carried
_MOST_VECTORS = 16
_SHOWN = 30  # points in a table


@dataclass(frozen=True)
class Settings:
    """All that the outcome depends on."""

    source: diagnose.Settings
    starts: int
    perturbation: float
    input: str
    vectors: int | None
    tol: float | None
    margin: float
    dt: float


class Dynamics(NamedTuple):
    """What was measured of one recurrence.

    Attributes:
      name: in table and figure.
      step, params, x: what the points are fixed points of; x is the constant input.
      states: those visited, leaves ``[B, T, ...]``.
      found: the points.
      vectors: of a few of the sequences.
    """

    name: str
    step: Step
    params: Params
    x: Input
    states: State
    found: FixedPoints
    vectors: CovariantVectors


def prepare(settings: Settings) -> tuple[diagnose.Data, list[diagnose.Recurrence]]:
    """Everything that can fail for an argument; of a run its trained networks, on fresh sequences of its task.

    Raises:
      BadArgument: as `bptt_jax.cli.diagnose.prepare`.
    """
    data, recurrences = diagnose.prepare(settings.source)
    return data, recurrences[1::2] if settings.source.checkpoint is not None else recurrences


def measure(recurrence: diagnose.Recurrence, data: diagnose.Data, settings: Settings) -> Dynamics:
    """Raises BadArgument where the step breaks the contract, or raises."""
    step, params, state0 = recurrence.step, recurrence.params, recurrence.state0
    try:
        states = jax.jit(jax.vmap(lambda xs: unroll(step, params, state0, xs)))(data.inputs)
        # What is held in padding is a state that was visited, too.
        starts = sample_starts(
            states, settings.starts, key=jax.random.key(settings.source.seed), noise=settings.perturbation, axes=2
        )
        x = _constant(data.inputs, settings.input)
        found = fixed_points(step, params, starts, x, tol=settings.tol, margin=settings.margin)
        num = min(state_size(state0), _MOST_VECTORS if settings.vectors is None else settings.vectors)
        few = jax.tree.map(lambda a: a[:_FOLLOWED], data.inputs)
        follow = jax.vmap(lambda xs: covariant_vectors(step, params, state0, xs, num=num, observe=_nothing))
        vectors = jax.jit(follow)(few)
    except (Exception, SystemExit) as error:  # whatever a step of the user's raises
        raise BadArgument(f"{recurrence.name}: {one_line(error)}") from error
    return Dynamics(recurrence.name, step, params, x, states, found, jax.block_until_ready(vectors))


def record(settings: Settings, measured: list[Dynamics]) -> dict[str, Any]:
    """Everything in plain JSON types; NaN and infinities are the strings that ``float`` reads back."""
    return to_jsonable(
        {
            "settings": asdict(settings),
            **provenance(),
            "units": f"rates in nats per step, time constants and periods in units of time (a step is {settings.dt:g})",
            "recurrences": {d.name: _numbers(d, settings.dt) for d in measured},
        }
    )


COLUMNS = ("point", "kind", "starts", "speed", "unstable", "|λ| max", "slowest", "period", "escape")


def rows(numbers: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Under `COLUMNS`, a row for each point of a recurrence in `record`."""

    def text(value: Any) -> str:
        return "-" if value is None else f"{float(value):.3g}"

    for k, point in enumerate(numbers["fixed_points"][:_SHOWN], 1):
        yield (
            str(k),
            point["kind"],
            str(point["starts"]),
            text(point["speed"]),
            str(point["unstable"]),
            text(point["modulus"]),
            *(text(point[name]) for name in ("slowest_time", "slowest_period", "escape_time")),
        )


def statements(numbers: dict[str, Any]) -> list[str]:
    """What else there is to say, in lines."""
    found, shown = numbers["search"], min(_SHOWN, len(numbers["fixed_points"]))
    kinds = ", ".join(f"{count} {kind}" for kind, count in numbers["kinds"].items()) or "none"
    lines = [f"fixed points: {kinds}, from {found['converged']} of {counted(found['starts'], 'start')}"]
    if shown < len(numbers["fixed_points"]):
        lines[0] += f"; the first {shown} are shown"
    if far := found["outliers"]:
        lines[0] += f"; {far} came to points far from all starts, which are left out"
    exponents = zip(*numbers["exponents"].values(), strict=True)
    rates = [plus_minus(*map(float, of_one)) for of_one in exponents][:4]
    lines.append(f"largest Lyapunov exponents, driven: {', '.join(rates)} nats per step")
    angles = numbers["angles"]
    if angles is not None:
        lines.append(f"angle between unstable and other directions: {angles['min']:.3g} to {angles['max']:.3g} rad")
    return lines


def _nothing(vectors: Any, state: State) -> None:
    """Vectors are not kept: exponents and angles are all that is asked for."""


def _constant(inputs: PyTree, which: str) -> Input:
    """One input, the mean being that over real steps; without the key beside it: of the noise there is none at a fixed
    point."""
    xs, mask = (inputs.xs, inputs.mask) if isinstance(inputs, Sequence) else (inputs, None)
    if isinstance(xs, tuple) and len(xs) == 2 and _is_key(xs[1]):
        xs = xs[0]

    def mean(a: Array) -> Array:
        return jnp.mean(a, axis=(0, 1), where=None if mask is None else along_leading(mask, a))

    return jax.tree.map(lambda a: jnp.zeros(a.shape[2:], a.dtype) if which == "zero" else mean(a), xs)


def _is_key(tree: PyTree) -> bool:
    return isinstance(tree, jax.Array) and jnp.issubdtype(tree.dtype, jax.dtypes.prng_key)


def _numbers(d: Dynamics, dt: float) -> dict[str, Any]:
    distinct = d.found.distinct()
    times, periods = (np.asarray(f(dt), np.float64) for f in (distinct.time_constants, distinct.periods))
    values = np.asarray(distinct.eigenvalues)
    points = []
    for k, kind in enumerate(distinct.kinds.tolist()):
        staying, leaving = times[k] > 0, times[k] < 0
        slowest = int(np.argmax(np.where(staying, times[k], -np.inf)))
        points.append(
            {
                "kind": kind,
                "state": [np.asarray(leaf)[k].ravel().tolist() for leaf in jax.tree.leaves(distinct.points)],
                "starts": int(distinct.arrivals[k]),
                "speed": float(distinct.speeds[k]),
                "unstable": int(distinct.unstable[k]),
                "neutral": int(distinct.neutral[k]),
                "modulus": float(np.abs(values[k, 0])),
                "slowest_time": float(times[k, slowest]) if staying.any() else None,
                "slowest_period": _finite(periods[k, slowest]) if staying.any() else None,
                "escape_time": float(np.min(-times[k][leaving])) if leaving.any() else None,
                "eigenvalues": [[z.real, z.imag] for z in values[k].tolist()],
            }
        )
    spectrum = as_one(d.vectors.spectrum)
    angles = np.asarray(d.vectors.angles, np.float64)
    angles = angles[np.isfinite(angles)]
    levels = {"min": 0.0, "q10": 0.1, "median": 0.5, "q90": 0.9, "max": 1.0}
    return {
        "search": {
            "starts": len(d.found.speeds),
            "converged": int(np.sum(d.found.converged)),
            "finite": int(np.sum(d.found.finite)),
            "outliers": int(np.sum(d.found.outlier & d.found.converged)),
        },
        "kinds": dict(Counter(distinct.kinds.tolist())),
        "fixed_points": points,
        "exponents": {
            "rates": np.asarray(spectrum.exponents, np.float64).tolist(),
            "errors": np.asarray(spectrum.standard_errors, np.float64).tolist(),
        },
        "angles": {k: float(np.quantile(angles, q)) for k, q in levels.items()} if len(angles) else None,
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
