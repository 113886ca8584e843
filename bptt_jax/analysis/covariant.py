"""Covariant Lyapunov vectors: the directions that grow at the rates of the Lyapunov exponents, point by point."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bptt_jax import devices
from bptt_jax.analysis.averages import MOST_BATCHES, batches, count_within, own_library, pieces
from bptt_jax.analysis.frames import Frames, begin_frames, orthonormalised
from bptt_jax.analysis.lyapunov import (
    LyapunovSpectrum,
    check_num,
    count_unstable,
    finite_time_rates,
    frames_to_begin_with,
    per_unit_of_time,
    spectrum_of,
)
from bptt_jax.checks import call_user_function, check_function, check_leaves, check_positive
from bptt_jax.leaves import along_leading
from bptt_jax.linalg import logscale
from bptt_jax.linalg.lq import ROUNDINGS, orthonormal
from bptt_jax.linalg.precision import matmul
from bptt_jax.linalg.spectra import singular_values
from bptt_jax.recurrence.tangents import TangentStep, tangent_step
from bptt_jax.results import Result, counted, field
from bptt_jax.step import (
    Array,
    Instant,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    choose,
    ravel_state,
)


class CovariantVectors(Result):
    """The covariant Lyapunov vectors along a trajectory, in the order of their exponents, descending.

    Entry k of what has T entries belongs to step k, which makes h_{k+1}, and to the state that it starts from, after
    a reset if there is one. It is NaN where nothing is known: in warm-ups, in cool-downs and in padding; see `kept`.

    Attributes:
      spectrum: the exponents, with their errors, of all steps after the warm-ups: as of `bptt_jax.lyapunov_exponents`.
      vectors: ``[T, D, num]``, columns of unit norm, over the real numbers of the state as `bptt_jax.ravel_state` has
        them; None with ``observe=``. The Jacobian of step k maps ``vectors[k, :, i]`` to
        ``exp(growth[k, i]) vectors[k + 1, :, i]`` (with dt, ``exp(dt growth[k, i])``). The sign is arbitrary, but the
        same throughout a piece.
      growth: ``[T, num]``, the local exponents: what step k adds to the logarithm of the vector's length; -inf where it
        maps it to zero.
      angles: ``[T]``, in radians: the smallest angle between a vector in the span of the unstable ones and one in the
        span of the others: 0 at a homoclinic tangency, away from 0 throughout where the dynamics is hyperbolic. NaN
        where one of the two spans is empty.
      participation: ``[T, num]``, ``1 / sum_j v_j^4``: over how many units a vector is spread, 1 to D.
      unstable: how many vectors count as unstable, the first ones.
      kept: ``[T]``, whether the step is after the warm-up and before the cool-down of its piece, and the piece finite;
        nowhere, if states that were computed once more on the way back did not come out the same.
      observed: what `observe` has made of the vectors, leaves ``[T, ...]``; None without it.
    """

    spectrum: LyapunovSpectrum
    vectors: Float[Array, "T D num"] | None = field(dims=("time", "unit", "exponent"))
    growth: Float[Array, "T num"] = field(dims=("time", "exponent"))
    angles: Float[Array, " T"] = field(dims=("time",))
    participation: Float[Array, "T num"] = field(dims=("time", "exponent"))
    unstable: Int[Array, ""] = field(dims=())
    kept: Bool[Array, " T"] = field(dims=("time",))
    observed: PyTree = field(dims=("time", ...))

    _views: ClassVar = {"exponents": ("exponent",)}

    @property
    def exponents(self) -> Float[Array, " num"]:
        """``[num]``, nats per step, or per unit of time: those of `spectrum`."""
        return self.spectrum.exponents

    def finite_time(self, window: int) -> np.ndarray:
        """``[windows, num]``: the rates along the vectors within consecutive windows of so many steps that are kept.

        They start with each piece; what is left at its end belongs to none. Of a batch ``[..., windows, num]``, NaN
        where a sequence has fewer of them.

        Raises:
          ValueError: no piece is that long.
        """
        piece = np.where(np.asarray(self.kept), np.asarray(self.spectrum.piece), -1)
        return finite_time_rates(self.growth, piece, np.ones_like(piece, bool), window)

    def _headline(self) -> str:
        angles = np.asarray(self.angles)
        known = angles[np.isfinite(angles)]
        line = self.spectrum.statement
        if not np.any(np.asarray(self.kept)):
            return f"{line}; no step is between warm-up and cool-down"
        return f"{line}; {int(self.unstable)} unstable" + (
            f", at angles of {np.min(known):.2g} to {np.max(known):.2g} rad to the others" if len(known) else ""
        )


def covariant_vectors(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree = None,
    *,
    length: int | None = None,
    num: int | None = None,
    warmup: int | None = None,
    cooldown: int | None = None,
    unstable: int | None = None,
    observe: Callable[[Array, State], PyTree] | None = None,
    initial_frame: Float[Array, "D num"] | None = None,
    dt: float | Float[Array, ""] | None = None,
) -> CovariantVectors:
    """The covariant Lyapunov vectors, by Ginelli's algorithm (Ginelli et al. 2007, PRL 99, 130601; 2013).

    Frames of orthonormal directions are carried forwards, as by `bptt_jax.lyapunov_exponents`, after every step
    orthonormalised anew; their factors R are kept. Then upper triangular matrices of coefficients, to begin with the
    identity, are carried backwards by ``C_k ~ R_k^-1 C_{k+1}``, columns normalised. Forwards all directions turn to the
    fast ones, and backwards, within the span of the first so many of a frame, to the slow ones: after a warm-up and
    before a cool-down, ``frame_k C_k`` are the vectors. How long both have to be tells the difference of neighbouring
    exponents: what is left of a wrong direction falls by a factor of exp(difference) a step. Where exponents are
    equal there is no single vector, but a space that is common to them.

    Memory: the states and frames at the ends of some sqrt(T) stretches of some sqrt(T) steps are kept; on the way back
    each stretch is carried forwards once more. With `observe`, the vectors themselves need not be kept.

    Of a `bptt_jax.Sequence` it gives what it gives of the pieces between resets run alone: each has a frame, a warm-up
    and a cool-down of its own. Padding counts for nothing.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`; as for `bptt_jax.lyapunov_exponents` a step needs no
        forward mode.
      num: how many vectors, those of the largest exponents; D, all, by default.
      warmup: real steps at the beginning of each piece that only prepare state and frame; by default a tenth of them.
      cooldown: real steps at the end of each piece that only prepare the coefficients; by default a tenth of them.
      unstable: how many vectors are one side of `CovariantVectors.angles`; by default those of exponents that are
        positive by more than two standard errors, and those before them.
      observe: ``observe(vectors [D, num], state) -> pytree``, called at every step with the vectors and the state that
        it starts from: what is kept of them, instead of them.
      initial_frame: ``[D, num]``, as for `bptt_jax.lyapunov_exponents`.
      dt: how long a step takes: rates are then in nats per unit of time. By default in nats per step.

    Returns:
      `CovariantVectors`. It can be jitted, vmapped over sequences, and differentiated with respect to `params`,
      `state0` and `xs`: the derivative is that of the algorithm, which is that of the vectors where it has converged
      and the trajectory is not chaotic. Where a step maps directions to zero, the vector is one that it maps to zero,
      and after it another.

    Raises:
      TypeError, ValueError: an argument breaks the contract; `num` exceeds D, or no step is left between warm-up and
        cool-down; otherwise as `bptt_jax.lyapunov_exponents`.

    Example:
      >>> cat = jnp.array([[2.0, 1.0], [1.0, 1.0]])  # Arnold's map of the torus
      >>> step = lambda m, h, x: (m @ h) % 1.0
      >>> found = bptt.covariant_vectors(step, cat, jnp.array([0.1, 0.2]), length=60, warmup=20, cooldown=20)
      >>> found.exponents, jnp.abs(found.vectors[30])
      (Array([ 0.962, -0.962], dtype=float32), Array([[0.851, 0.526],
             [0.526, 0.851]], dtype=float32))
      >>> round(float(jnp.rad2deg(found.angles[30])))
      90
    """
    recurrence = bind(step, params, state0, xs, length)
    steps, size = recurrence.length, recurrence.size
    num = check_num(num, size, initial_frame)
    dt = None if dt is None else check_positive("dt", dt)
    for name, value in (("warmup", warmup), ("cooldown", cooldown), ("unstable", unstable)):
        _check_count(name, value, num if name == "unstable" else steps)
    if (warmup or 0) + (cooldown or 0) >= steps:
        raise ValueError(
            f"warmup, cooldown: expected fewer together than the {counted(steps, 'step')}, got {warmup or 0} and "
            f"{cooldown or 0}"
        )
    if observe is not None:
        observe = check_function("observe", observe, "observe(vectors, state) -> pytree")
    return _covariant(
        recurrence, initial_frame, dt, num=num, warmup=warmup, cooldown=cooldown, unstable=unstable, observe=observe
    )


def _check_count(name: str, value: Any, most: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not 0 <= value <= most:
        raise ValueError(f"{name}: expected 0 to {most}, got {value}")


class _Forward(NamedTuple):
    """What one step makes of a state and its frame.

    Attributes:
      recurrence: checked.
      first, fresh: ``[num, D]``, rows that every piece begins with, and of which new directions are made.
      mending: ``[T]``, as in `propagate_frames`.
    """

    recurrence: Recurrence
    first: Array
    fresh: Array
    mending: Array


@devices.compiled
def _covariant(
    recurrence: Recurrence,
    initial_frame: Array | None,
    dt: Array | None,
    *,
    num: int,
    warmup: int | None,
    cooldown: int | None,
    unstable: int | None,
    observe: Callable[..., PyTree] | None,
) -> CovariantVectors:
    recurrence = check_step(recurrence)
    all_pieces = pieces(recurrence)
    xp = own_library(all_pieces)
    upto, after = count_within(all_pieces)
    tenth = (upto + after) // 10
    before, behind = (tenth if wish is None else wish for wish in (warmup, cooldown))
    real = all_pieces >= 0
    piece = xp.where(real & (upto > before), all_pieces, -1)
    kept = jnp.asarray((piece >= 0) & (after >= behind))
    start = ravel_state(recurrence.state0)[0]
    fresh, first = frames_to_begin_with(start, num, initial_frame)
    forward = _Forward(recurrence, first, fresh, jnp.asarray(real & (upto < before)))

    length = math.isqrt(recurrence.length - 1) + 1
    count = -(-recurrence.length // length)
    numbers = jnp.arange(count * length).reshape(count, length)
    along = tangent_step(recurrence, "covariant_vectors")

    def stretch(carry: Any, numbers: Array) -> tuple[Any, Any]:
        end, steps = _carried(forward, along, carry, numbers)
        return end, ((carry, ravel_state(end[0])[0]), (steps.growth, steps.zero, steps.finite))

    def by_steps(tree: PyTree) -> Any:
        return jax.tree.map(lambda a: a.reshape(count * length, *a.shape[2:])[: recurrence.length], tree)

    begun = recurrence.state0, begin_frames(first, 1)
    _, (ends, measured) = devices.scan(stretch, begun, numbers)
    growth, zero, finite = by_steps(measured)
    of = batches(piece, MOST_BATCHES if recurrence.instants.reset is None else recurrence.length)
    erases = recurrence.resets & jnp.any(growth == -jnp.inf, axis=1)
    piece = jnp.where(erases, -1, jnp.asarray(piece))
    spectrum, order = spectrum_of(growth, zero, jnp.asarray(real), finite, piece, of, start.size)
    split = count_unstable(spectrum)
    split = split if unstable is None else jnp.full_like(split, unstable)

    def back(coefficients: Array, inputs: Any) -> tuple[Array, Any]:
        (carry, end), numbers = inputs
        (state, _), steps = _carried(forward, along, carry, numbers)
        body = partial(_one_back, order=order, split=split, observe=observe)
        coefficients, told = devices.scan(body, coefficients, steps, reverse=True)
        # In chaos, where the second time is rounded otherwise than the first, it ends elsewhere.
        off = jnp.max(jnp.abs(ravel_state(state)[0] - end))
        astray = off > float(jnp.finfo(end.dtype).eps) ** 0.5 * jnp.max(jnp.abs(end))
        return coefficients, (told, astray)

    _, (told, astray) = devices.scan(back, jnp.eye(num, dtype=first.dtype), (ends, numbers), reverse=True)
    spoilt = jnp.zeros(recurrence.length + 1, bool).at[jnp.asarray(all_pieces)].max(~finite)
    kept &= ~(spoilt[jnp.asarray(all_pieces)] | jnp.any(astray))

    def known(a: Array) -> Array:
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            return a
        return jnp.where(along_leading(kept, a), a, jnp.asarray(jnp.nan, a.dtype))

    local, angles, participation, seen = jax.tree.map(known, by_steps(told))
    if dt is not None:
        spectrum = per_unit_of_time(spectrum, dt)
        local = local / jnp.asarray(dt, local.dtype)
    vectors, observed = (seen, None) if observe is None else (None, seen)
    return CovariantVectors(spectrum, vectors, local, angles, participation, split, kept, observed)


class _Step(NamedTuple):
    """One step of a state and its frame; with a leading axis, many.

    Attributes:
      state: that it starts from.
      frame, places: its rows, and which one each direction is.
      after: the places afterwards.
      link: ``[num, num]``, lower triangular: what the step makes of the rows, in the order that they have afterwards,
        as coefficients of the rows afterwards, divided by ``2^exponent``.
      live: whether it is a real one.
      begins: whether a piece begins with it.
      growth, zero, finite: as in `FrameTrajectory`.
    """

    state: State
    frame: Array
    places: Array
    after: Array
    link: Array
    exponent: Array
    live: Array
    begins: Array
    growth: Array
    zero: Array
    finite: Array


def _carried(
    forward: _Forward, along: TangentStep, carry: tuple[State, Frames], numbers: Array
) -> tuple[Any, _Step]:
    """Through the steps of these numbers; those from T on change nothing."""
    recurrence = forward.recurrence

    def body(carry: Any, number: Array) -> tuple[Any, _Step]:
        state, frames = carry
        within = number < recurrence.length
        number = jnp.where(within, number, 0)
        at: Instant = jax.tree.map(lambda a: a[number], recurrence.instants)
        live = within if at.real is None else within & at.real
        begins = jnp.zeros((), bool) if at.reset is None else within & at.reset
        frames = choose(begins, begin_frames(forward.first, 1), frames)
        # What is carried out for nothing is the first step once more, which can do no harm.
        state = choose(within, state, recurrence.state0)
        new, vector, pushed = along(state, at, frames.rows[0])
        after, growth, zero, _ = orthonormalised(
            frames._replace(rows=pushed[None]), forward.fresh, forward.mending[number][None]
        )
        order = frames.places[0][jnp.argsort(after.places[0])]
        pushed = jnp.where(jnp.isfinite(pushed), pushed, 0)[order]
        scaled, exponent = logscale.normalize(pushed, jnp.zeros((), jnp.int32))
        finite = jnp.all(jnp.isfinite(vector)) & ~jnp.any(jnp.isnan(growth))
        step = _Step(
            recurrence.begin(state, at), frames.rows[0], frames.places[0], after.places[0],
            jnp.tril(matmul(scaled, after.rows[0].T)), exponent, live, begins,
            jnp.where(live, growth[0], 0), zero[0] & live, finite | ~live,
        )  # fmt: skip
        return choose(live, (new, after), (state, frames)), step

    return devices.scan(body, carry, numbers)


def _one_back(
    coefficients: Array, step: _Step, *, order: Array, split: Array, observe: Callable[..., PyTree] | None
) -> tuple[Array, Any]:
    """From the rows of coefficients after a step to those before it, and what is told of these."""
    log_lengths, before = _pulled(coefficients, step)
    before = choose(step.finite, before, jnp.eye(len(before), dtype=before.dtype))
    before = choose(step.live, before, coefficients)
    sorted_rows = before[step.places[order]]
    vectors = matmul(sorted_rows, step.frame)
    seen: PyTree = vectors.T
    if observe is not None:
        seen = call_user_function("observe", "(vectors, state)", observe, vectors.T, step.state)
        check_leaves("observe(vectors, state)", seen)
        seen = jax.tree.map(jnp.asarray, seen)
    participation = 1 / jnp.sum(jnp.square(jnp.square(vectors)), axis=1)
    told = log_lengths[step.after[order]], _smallest_angle(sorted_rows, split), participation, seen
    return choose(step.begins, jnp.eye(len(before), dtype=before.dtype), before), told


def _pulled(coefficients: Array, step: _Step) -> tuple[Array, Array]:
    """Log of the factor by which the step makes each vector longer, in the order afterwards; the rows before it."""
    diagonal = jnp.abs(jnp.diagonal(step.link))
    dead = diagonal <= ROUNDINGS * float(jnp.finfo(diagonal.dtype).eps) * jnp.max(diagonal)
    # A row that is mapped to zero has nothing of the others that are, and no other has anything of it.
    eye = jnp.eye(len(diagonal), dtype=diagonal.dtype)
    factor = jnp.where(dead[:, None] | dead[None], eye, step.link)
    wanted = jnp.where(
        dead[:, None], jnp.where(dead[None], eye, -step.link), jnp.where(dead[None], 0, coefficients)
    )
    rows = jax.lax.linalg.triangular_solve(factor, wanted, left_side=False, lower=True)
    # Powers of two first: squares of what is far from 1 leave the range.
    rows, exponents = jax.vmap(logscale.normalize)(rows, jnp.zeros(len(rows), jnp.int32))
    norms = jnp.linalg.norm(rows, axis=1)
    norms = jnp.where(norms == 0, 1, norms)
    powers = (step.exponent - exponents).astype(norms.dtype)
    log_lengths = jnp.where(dead, -jnp.inf, math.log(2) * powers - jnp.log(norms))
    rows = rows / norms[:, None]
    old = jnp.argsort(step.places[jnp.argsort(step.after)])  # rows in the order that they have before the step
    return log_lengths, rows[old][:, old]


def _smallest_angle(rows: Float[Array, "num num"], split: Array) -> Array:
    """Between the span of the first `split` rows and that of the others; NaN if there are none on one side."""
    num = len(rows)
    if num == 1:
        return jnp.full((), jnp.nan, rows.dtype)
    _, q = orthonormal(jnp.stack([rows, rows[::-1]]))
    overlap = matmul(q[0], q[1].T)
    i, others = jnp.arange(num, dtype=split.dtype), num - split
    above, left = (i < split)[:, None], (i < others)[None]
    cosines = jnp.where(above & left, overlap, 0)
    # The part of the others outside of the first rows' span, a square; beside it ones, which are none of the smallest.
    beside = (above & ~left) & (i[:, None] + others == i[None])
    sines = jnp.where(~above & left, overlap, jnp.where(beside, 1, 0).astype(rows.dtype))
    values = singular_values(jnp.stack([cosines, sines]))
    return jnp.where((split > 0) & (split < num), jnp.arctan2(values[1, -1], values[0, 0]), jnp.nan)
