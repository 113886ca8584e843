"""Orthonormal frames propagated along trajectories by the tangent map: the recursion behind Lyapunov exponents."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from bptt_jax import devices
from bptt_jax.checks import check_leaves, raise_if
from bptt_jax.linalg import logscale
from bptt_jax.linalg.lq import ROUNDINGS, orthonormal
from bptt_jax.linalg.scattered import scattered, scattered_before
from bptt_jax.recurrence.tangents import tangent_step
from bptt_jax.step import Array, Instant, PyTree, Recurrence, State, choose, differentiable_part

_LONGEST = 64  # steps between two orthonormalisations, at most
_KNOWN = 1 << 14  # numbers of a frame that is a constant of the program; else it is one routine more to compile
_FORGETS = 0.03  # of a faster pace, at every orthonormalisation after the first few


class Frames(NamedTuple):
    """One of each of C trajectories.

    Attributes:
      rows: ``[C, num, D]``, directions, orthonormal at the ends of a stretch.
      places: ``[C, num]``, which row each direction is: those that were lost have gone last.
    """

    rows: Array
    places: Array


class FrameTrajectory(NamedTuple):
    """What frames have become after n steps along C trajectories.

    Attributes:
      states: the last ones, leaves ``[C, ...]``.
      frames: the last ones, orthonormal if the last step was forced.
      growth: ``[n, C, num]``, log of each direction's length before an orthonormalisation, 0 at other steps; -inf
        where nothing at all was left of it, NaN where the frame is not finite.
      zero: ``[n, C, num]``, whether that length is no more than what rounding leaves of zero.
      orthonormalised: ``[n, C]``, whether that was done after this step, a real one.
      finite: ``[n, C]``, whether state and frame are.
    """

    states: State
    frames: Frames
    growth: Array
    zero: Array
    orthonormalised: Array
    finite: Array


def propagate_frames(
    recurrence: Recurrence,
    states: State,
    frames: Frames,
    first: Float[Array, "num D"],
    fresh: Float[Array, "num D"],
    instants: Instant,
    forced: Bool[Array, "n C"],
    mending: Bool[Array, "n C"],
    *,
    always: bool,
) -> FrameTrajectory:
    """Propagates one frame along each of C trajectories, all of them orthonormalised when one of them needs it.

    Directions that are lost, of which a step leaves nothing or mere rounding, stand last from then on, so that they
    take nothing from those that live; of nothing a new one is drawn. After a reset the whole frame is `first`. In
    padding all is held.

    Args:
      recurrence: checked; its step is what counts, and what a reset makes of the state.
      states: to begin with, leaves ``[C, ...]``.
      frames: to begin with, orthonormal.
      first: orthonormal rows, with which every piece begins.
      fresh: orthonormal rows, of which new directions are made.
      instants: leaves ``[n, C, ...]``.
      forced: after which steps to orthonormalise in any case; the last ones before padding should be among them.
      mending: where coordinates that no direction holds any more come back, as large as half of the digits.
      always: orthonormalise after every step.
    """
    count, num, _ = frames.rows.shape
    dtype = frames.rows.dtype
    # Two fifths of the digits: how far directions grow apart varies, and the others must see them through. The pace
    # is the share that a step takes. Of the range, which they use up together, a quarter each way.
    limit = -0.4 * math.log(jnp.finfo(dtype).eps)
    huge = min(float(jnp.finfo(a.dtype).max) for a in jax.tree.leaves(differentiable_part(states)[0])) ** 0.25
    along = _each(tangent_step(recurrence, "lyapunov_exponents"), count)

    def body(carry: Any, inputs: Any) -> tuple[Any, tuple[Array, ...]]:
        states, frames, since, pace, done = carry
        at, now, mend = inputs
        if at.reset is not None:
            frames = _where(at.reset, begin_frames(first, count), frames)
        new, vectors, pushed = along(states, at, frames.rows)
        finite = _finite(vectors, 1)
        if at.real is None:
            states, frames = new, frames._replace(rows=pushed)
        else:
            states, frames = _where(at.real, (new, frames._replace(rows=pushed)), (states, frames))
            finite |= ~at.real
        since = since + 1

        def orthonormalise(frames: Frames) -> tuple[Any, ...]:
            after, growth, zero, apart = orthonormalised(frames, fresh, mend)
            if at.real is not None:
                after = _where(at.real, after, frames)
                growth = jnp.where(at.real[:, None], growth, 0)
                zero &= at.real[:, None]
            spent = apart / (limit * since.astype(pace.dtype))
            keeps = 1 - jnp.maximum(_FORGETS, 1 / (done + 2).astype(pace.dtype))
            return after, growth, zero, jnp.zeros_like(since), jnp.max(jnp.maximum(spent, keeps * pace)), done + 1

        def leave(frames: Frames) -> tuple[Any, ...]:
            nothing = jnp.zeros((count, num), dtype)
            return frames, nothing, jnp.zeros((count, num), bool), since, pace, done

        if always:
            due = jnp.ones((), bool)
            frames, growth, zero, since, pace, done = orthonormalise(frames)
        else:
            sizes = _sizes(frames.rows)
            largest = jnp.max(sizes[0], axis=1)
            within = jnp.all((largest > 1 / huge) & (largest < huge))
            late = (since >= _LONGEST) | (pace * (since + 1).astype(pace.dtype) > 1)
            due = jnp.any(now) | ~within | late | jnp.any(_rank(sizes) < num)
            frames, growth, zero, since, pace, done = devices.cond(due, orthonormalise, leave, frames)
        finite &= ~jnp.isnan(jnp.sum(growth, axis=1))
        held = jnp.zeros(count, bool) if at.real is None else ~at.real
        return (states, frames, since, pace, done), (growth, zero, due & ~held, finite)

    counters = jnp.zeros((), jnp.int32), jnp.ones((), dtype), jnp.zeros((), jnp.int32)
    start: Any = (states, frames, *counters)
    (states, frames, *_), measured = devices.scan(body, start, (instants, forced, mending))
    return FrameTrajectory(states, frames, *measured)


def begin_frames(first: Float[Array, "num D"], count: int) -> Frames:
    """The same for all C trajectories."""
    places = jnp.broadcast_to(jnp.arange(len(first)), (count, len(first)))
    return Frames(jnp.broadcast_to(first, (count, *first.shape)), places)


def random_frame(num: int, size: int, dtype: jnp.dtype) -> Float[Array, "num D"]:
    """Orthonormal rows, always the same."""
    if num * size <= _KNOWN:
        return jnp.asarray(np.linalg.qr(scattered_before((size, num)))[0].T, dtype)
    return orthonormal(scattered((size, num), dtype).T)[1]


def check_frame(frame: Any, num: int | None, size: int) -> int:
    """How many directions there are, given an initial frame ``[D, num]``, or None, and the `num` that is asked for."""
    if frame is None:
        return size if num is None else num
    check_leaves("initial_frame", frame)
    shape, dtype = jnp.shape(frame), jnp.result_type(frame)
    if not jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"initial_frame: expected real numbers, got {dtype}")
    if len(shape) != 2 or shape[0] != size or not 1 <= shape[1] <= size or num not in (None, shape[1]):
        columns = f"1 to {size}" if num is None else num
        raise ValueError(f"initial_frame: expected shape [{size}, {columns}], [D, num], got {list(shape)}")
    return shape[1]


def orthonormal_frame(columns: Float[Array, "D num"], dtype: jnp.dtype) -> Float[Array, "num D"]:
    """Rows of the same flags; refused, when it runs, where columns depend on each other or are not finite."""
    rows = jnp.asarray(columns, dtype).T
    rows = raise_if(rows, ~jnp.all(jnp.isfinite(rows)), "initial_frame: expected finite numbers")
    rows = rows / jnp.maximum(jnp.max(jnp.abs(rows), axis=1, keepdims=True), jnp.finfo(dtype).tiny)
    l, q = orthonormal(rows)
    least = jnp.min(jnp.abs(jnp.diagonal(l)))
    dependent = ~(least > ROUNDINGS * float(jnp.finfo(dtype).eps) * len(rows))
    return raise_if(q, dependent, "initial_frame: expected linearly independent columns")


def _each(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """For each of `count`; a single one by itself, for a `lax.cond` in a batch evaluates both sides."""
    if count > 1:
        return jax.vmap(function)

    def alone(*arguments: PyTree) -> PyTree:
        return jax.tree.map(lambda a: a[None], function(*jax.tree.map(lambda a: a[0], arguments)))

    return alone


def _where(which: Bool[Array, " C"], a: PyTree, b: PyTree) -> PyTree:
    return jax.vmap(choose)(which, a, b)


def _finite(numbers: Float[Array, "C ..."], axis: int | tuple[int, ...]) -> Bool[Array, " C"]:
    """Whether all are: by a sum, for that of truth values takes three times as long to compile."""
    return jnp.sum(jax.lax.stop_gradient(numbers) * 0, axis=axis) == 0


def _sizes(rows: Float[Array, "C num D"]) -> tuple[Float[Array, "C num"], Float[Array, "C D"]]:
    """The largest entries of every row and of every column."""
    sizes = jnp.abs(jax.lax.stop_gradient(rows))
    return jnp.max(sizes, axis=2), jnp.max(sizes, axis=1)


def _rank(sizes: tuple[Float[Array, "C num"], Float[Array, "C D"]]) -> Array:
    """``[C]``, the most that the rank of each can be by the rows and columns that hold anything."""
    return jnp.minimum(*(jnp.sum(a != 0, axis=1, dtype=a.dtype) for a in sizes))


def orthonormalised(
    frames: Frames, fresh: Float[Array, "num D"], mend: Bool[Array, " C"]
) -> tuple[Frames, Array, Array, Array]:
    """Orthonormal frames of the same flags of subspaces; the log of each direction's length before, and whether
    that is no more than what rounding leaves of zero, ``[C, num]``; and how far lengths have grown apart, ``[C]``.
    """
    count, num, _ = frames.rows.shape
    eps = float(jnp.finfo(frames.rows.dtype).eps)
    finite = _finite(frames.rows, (1, 2))
    rows = jnp.where(finite[:, None, None], frames.rows, 0)  # a bad frame never reaches LAPACK
    rows, exponent = jax.vmap(logscale.normalize)(rows, jnp.zeros(count, jnp.int32))
    sizes, widths = _sizes(rows)
    gone = jnp.arange(num, dtype=rows.dtype)[None] >= _rank((sizes, widths))[:, None]
    empty = widths == 0
    # A row of mere rounding says nothing, and would claim the direction of a row that lives.
    lost = sizes <= ROUNDINGS * eps * jnp.max(sizes, axis=1, keepdims=True)
    rows, places = devices.cond(jnp.any(lost), _lost_last, lambda rows, places, *_: (rows, places), rows,
                                frames.places, lost, fresh)  # fmt: skip
    l, q = orthonormal(rows)
    lengths = jnp.where(gone, 0, jnp.abs(jnp.diagonal(l, axis1=1, axis2=2)))
    zero = lengths <= ROUNDINGS * eps * jnp.max(lengths, axis=1, keepdims=True)
    logs = jnp.log(jnp.where(lengths == 0, 1, lengths)) + math.log(2) * exponent.astype(l.dtype)[:, None]
    logs = jnp.where(zero, jax.lax.stop_gradient(logs), logs)  # the derivative of a rounding
    growth = jnp.where(lengths == 0, -jnp.inf, logs)
    q = jnp.where(mend[:, None, None] & empty[:, None], q + math.sqrt(eps) * fresh[None], q)
    live = jax.lax.stop_gradient(logs)
    apart = jnp.max(live, axis=1, where=lengths > 0, initial=-jnp.inf) - jnp.min(
        live, axis=1, where=lengths > 0, initial=jnp.inf
    )
    growth, zero = (jnp.take_along_axis(a, places, axis=1) for a in (growth, zero))
    growth = jnp.where(finite[:, None], growth, jnp.nan)
    return Frames(q, places), growth, zero & finite[:, None], jnp.maximum(apart, 0)


def _lost_last(
    rows: Float[Array, "C num D"], places: Array, lost: Bool[Array, "C num"], fresh: Float[Array, "num D"]
) -> tuple[Array, Array]:
    """Lost rows after all others, those that hold nothing at all drawn anew."""
    order = jnp.argsort(lost, axis=1, stable=True)
    rows = jnp.take_along_axis(rows, order[:, :, None], axis=1)
    places = jnp.take_along_axis(jnp.argsort(order, axis=1), places, axis=1)
    return jnp.where(jnp.any(rows != 0, axis=2, keepdims=True), rows, fresh[None]), places
