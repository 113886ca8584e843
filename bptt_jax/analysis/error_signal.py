"""The error signal on its way back: what one backward pass tells, without any D x D matrix.

In each segment, a stretch between resets, the immediate derivative of the last state that the loss reads there is
followed back alone to the segment's start (Hochreiter's error flow), since later losses do not refresh it.
"""

import math
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bptt_jax import devices
from bptt_jax.analysis.backward import Backward, backward
from bptt_jax.analysis.growth import Growth, Tally, pack, unpack
from bptt_jax.analysis.loss import BoundLoss
from bptt_jax.linalg import logscale, reductions
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.recurrence.linearization import Linearization, cut
from bptt_jax.step import PyTree, Recurrence, State, choose, differentiable_part
from bptt_jax.timeline import moved_to_real_steps


class ErrorSignal(NamedTuple):
    """What one backward pass tells. Of the state's L leaves that hold floating numbers, in their order.

    Attributes:
      done: the backward pass.
      lags: ``[T]``, real steps from where the signal begins in its segment back to h_t; 0 where there is no signal:
        in padding, and after it. At the step that leads to the state where it begins, the lag is 1.
      gains: ``[T]``, log of what arrives at h_t of the signal, relative to its norm; NaN where there is none.
      leaf_gains: ``[T, L]``, likewise what arrives in each leaf, relative to the norm of the whole signal.
      growth: of `gains`.
      leaf_growth: of `leaf_gains`, ``[L]``.
      adjoint_log_norms: ``[T]``, log of ``||dL/dh_{t+1}||``; NaN in padding.
      reach: lags of the longest segment.
      peak_gain: the largest, over t, of ``log ||dL/dh_t|| - log sum_k ||dl/dh_k||``, over all k >= t in the segment:
        at most 0 if no product of Jacobians exceeds 1. -inf if the loss reads no state.
      reads: whether the loss reads any state that a real step leads to.
      first_nonfinite_state: the first t whose h_{t+1} is NaN or infinite; -1 if none.
      first_nonfinite_adjoint: likewise of dL/dh_{t+1}, going backwards; -1 if none.
      finite: whether the loss, the adjoints and what is followed are, and no state is NaN.
    """

    done: Backward
    lags: Int[Array, " T"]
    gains: Float[Array, " T"]
    leaf_gains: Float[Array, "T L"]
    growth: Growth
    leaf_growth: Growth
    adjoint_log_norms: Float[Array, " T"]
    reach: Int[Array, ""]
    peak_gain: Float[Array, ""]
    reads: Bool[Array, ""]
    first_nonfinite_state: Int[Array, ""]
    first_nonfinite_adjoint: Int[Array, ""]
    finite: Bool[Array, ""]


def propagate_error_signal(
    recurrence: Recurrence, loss: BoundLoss, *, threshold: Float[Array, ""], share: Float[Array, ""]
) -> ErrorSignal:
    """Follows the error signals of all segments back, in one reverse scan; nothing here is of size D x D.

    Args:
      recurrence, loss: to be traced.
      threshold: where a signal counts as gone.
      share: of the largest immediate derivative in a segment, in its largest entry, which one must exceed to count as
        reading its state.
    """
    done = backward(recurrence, loss)
    along = done.along
    real = along.recurrence.instants.real
    immediate = done.loss.states if real is None else moved_to_real_steps(done.loss.states, real)
    adjoints = done.signal.log_norm
    level = jnp.log(threshold).astype(adjoints.dtype)
    least = _least_that_reads(immediate, along.recurrence, share.astype(adjoints.dtype))
    end, ways = _send_back(along, immediate, adjoints, least, level)
    growth = end.tally.growth(ways.increments, ways.places, level)
    leaves = slice(None) if ways.gains.shape[1] == 1 else slice(1, None)
    found = end.found
    return ErrorSignal(
        done,
        ways.lags.astype(jnp.int32),
        ways.gains[:, 0],
        ways.gains[:, leaves],
        jax.tree.map(lambda a: a[0], growth),
        jax.tree.map(lambda a: a[leaves], growth),
        adjoints if real is None else jnp.where(real, adjoints, jnp.nan),
        end.tally.length[0].astype(jnp.int32),
        found.peak,
        end.tally.lags[0] > 0,
        found.bad_state.astype(jnp.int32),
        found.bad_adjoint.astype(jnp.int32),
        jnp.isfinite(done.loss.value) & (found.spoilt == 0) & (found.bad_adjoint < 0),
    )


def _least_that_reads(immediate: State, recurrence: Recurrence, share: Float[Array, ""]) -> Float[Array, "#T"]:
    """That share of the largest entry in the segment of each step; of steps where all is finite."""

    largest = [jax.vmap(reductions.largest)(jnp.abs(a)) for a in jax.tree.leaves(immediate)]
    found = reduce(jnp.maximum, [jnp.where(a < jnp.inf, a, 0).astype(share.dtype) for a in largest])
    if recurrence.instants.reset is None:
        found = jnp.broadcast_to(reductions.most(found), found.shape)
    else:
        segment = jnp.cumsum(recurrence.instants.reset)
        found = jax.ops.segment_max(found, segment, num_segments=recurrence.length)[segment]
    return share * found


class _Sizes(NamedTuple):
    """Of a tree as a whole and, if there are several, of each of its leaves, ``[R]``: their norm is
    ``largest * sqrt(squares)``."""

    largest: Array
    squares: Array

    @property
    def logs(self) -> Float[Array, " R"]:
        zero = self.largest == 0
        logs = jnp.log(jnp.where(zero, 1, self.largest)) + jnp.log(jnp.where(zero, 1, self.squares)) / 2
        return jnp.where(zero, -jnp.inf, logs)


def _measure(tree: PyTree) -> tuple[LogScaled, _Sizes]:
    """The tree, normalized, and its sizes."""
    leaves = [jnp.abs(a) for a in jax.tree.leaves(tree)]
    dtype = max([jnp.dtype(jnp.float32), *(a.dtype for a in leaves)], key=lambda d: d.itemsize)
    leaves = [a.astype(dtype) for a in leaves]
    largest = [reductions.largest(a) for a in leaves]
    top = reduce(jnp.maximum, largest)
    exponent = logscale.plain(logscale.exponent_of(top))
    scales = [jnp.where(each == 0, 1, each) for each in largest]
    squares = [reductions.total(jnp.square(a / scale)) for a, scale in zip(leaves, scales, strict=True)]
    if len(leaves) > 1:
        whole = jnp.where(top == 0, 1, top)
        together = sum(
            (s * jnp.square(a / whole) for s, a in zip(squares, largest, strict=True)), jnp.zeros_like(top)
        )
        squares = [together, *squares]
        largest = [top, *largest]
    return LogScaled(logscale.shift(tree, -exponent), exponent), _Sizes(jnp.stack(largest), jnp.stack(squares))


class _Found(NamedTuple):
    """Scalars of the reverse scan, floating numbers, so that one array holds them.

    Attributes:
      lag: real steps since the signal began; -1 if there is none.
      origin: log of the norm with which it began.
      came_in: log of the sum of the norms of the immediate derivatives, from the end of the segment on.
      peak, bad_state, bad_adjoint: see `ErrorSignal`.
      spoilt: 1 if a state or the signal is NaN.
    """

    lag: Array
    origin: Array
    came_in: Array
    peak: Array
    bad_state: Array
    bad_adjoint: Array
    spoilt: Array


class _Carried(NamedTuple):
    """Of the reverse scan: what has arrived, normalized; the logarithms of its mantissa and of those of its leaves,
    ``[R]``; and what was found."""

    signal: LogScaled
    logs: Array
    found: Array
    tally: Array


class _End(NamedTuple):
    found: _Found
    tally: Tally


class _Ways(NamedTuple):
    """Of all steps: see `ErrorSignal` and `bptt_jax.analysis.growth.Tally.growth`."""

    lags: Array
    gains: Array
    increments: Array
    places: Array


def _send_back(
    along: Linearization,
    immediate: State,
    adjoints: Float[Array, " T"],
    least: Float[Array, " T"],
    level: Float[Array, ""],
) -> tuple[_End, _Ways]:
    """The reverse scan. What it carries beside the signal is packed: each array that it carries or gives is one more
    loop to compile."""
    dtype = adjoints.dtype
    steps = along.recurrence.length

    def body(carry: _Carried, at: tuple[PyTree, State, State, Array, Array, Array]) -> tuple[_Carried, Array]:
        residuals, state, derivative, adjoint, least, t = at
        real = True if residuals.real is None else residuals.real
        found = _Found(*carry.found)
        start, sizes = _measure(derivative)
        logs = sizes.logs
        # Not "above", so that NaN reads.
        begins = real & (found.lag < 0) & (sizes.largest[0] != 0) & ~(sizes.largest[0] <= least)
        fresh = LogScaled(start.mantissa, jnp.zeros_like(start.exponent)), logs - _log(start.exponent, dtype)
        signal, before = choose(begins, fresh, (carry.signal, carry.logs))
        origin = jnp.where(begins, logs[0] - _log(start.exponent, dtype), found.origin)
        lag = jnp.where(begins, 0, found.lag)
        came_in = jnp.logaddexp(found.came_in, logs[0])
        silent = (came_in == -jnp.inf) | jnp.logical_not(real)
        peak = jnp.maximum(found.peak, jnp.where(silent, -jnp.inf, adjoint - jnp.where(silent, 0, came_in)))

        pulled, sizes = _measure(along.pull(residuals, signal.mantissa))
        moved = real & (lag >= 0)
        lag = jnp.where(moved, lag + 1, lag)
        logs = sizes.logs
        increment, after = logs - before, logs - _log(pulled.exponent, dtype)
        gain = logs + _log(signal.exponent, dtype) - origin
        last = t == 0 if residuals.reset is None else residuals.reset | (t == 0)
        # What the tally is made of is packed, so that it is calculated once and not in each of its rows.
        given = gain, increment, before != -jnp.inf, logs != -jnp.inf, lag, moved, begins, last & (lag > 0)
        packed = jax.lax.optimization_barrier(
            jnp.stack([jnp.broadcast_to(a, gain.shape).astype(dtype) for a in given])
        )
        tally, out = _tallied(unpack(carry.tally, Tally), packed, level)

        parts = reductions.real_parts(differentiable_part(state)[0])
        largest = [reductions.largest(jnp.abs(a)) for a in parts]
        nan = reduce(jnp.logical_or, map(jnp.isnan, largest))
        bad = reduce(jnp.logical_or, [~jnp.isfinite(a) for a in largest])
        spoilt = nan | (moved & jnp.isnan(gain[0])) | (moved & (gain[0] == jnp.inf))
        signal = LogScaled(pulled.mantissa, signal.exponent + pulled.exponent)
        if residuals.reset is not None:
            signal = cut(residuals, signal)
        found = _Found(
            jnp.where(last, -1, lag),
            origin,
            jnp.where(last, -jnp.inf, came_in),
            peak,
            jnp.where(real & bad, t, found.bad_state),
            jnp.where((found.bad_adjoint < 0) & ~(adjoint < jnp.inf), t, found.bad_adjoint),
            jnp.where(spoilt, 1, found.spoilt),
        )
        return _Carried(signal, after, jnp.stack(found), tally), out

    nothing = along.no_cotangents
    _, sizes = _measure(nothing)
    rows = len(sizes.largest)
    found = _Found(*(jnp.asarray(v, dtype) for v in (-1, 0, -jnp.inf, -jnp.inf, -1, -1, 0)))
    carry = _Carried(
        LogScaled(nothing, jnp.zeros((), jnp.int32)),
        jnp.full(rows, -jnp.inf, dtype),
        jnp.stack(found),
        pack(Tally.empty(rows, dtype)),
    )
    inputs = along.residuals, along.states, immediate, adjoints, least, jnp.arange(steps, dtype=dtype)
    end, out = devices.scan(body, carry, inputs, reverse=True)
    ways = _Ways(out[:, 0, 0], out[:, 1], out[:, 2], out[:, 3])
    return _End(_Found(*end.found), unpack(end.tally, Tally)), ways


def _tallied(tally: Tally, packed: Float[Array, "8 R"], level: Float[Array, ""]) -> tuple[Array, Array]:
    """The tally after one more step, packed, and a row of `_Ways`."""
    gain, increment, left, arrived, lag, moved, begins, ends = packed
    moved = moved > 0
    tally = _where(begins > 0, tally.begin(), tally)
    further = tally.step(lag, gain, increment, left > 0, arrived > 0, level)
    alive = moved & (further.place > tally.place)
    tally = _where(moved, further, tally)
    values = (lag, gain, increment, tally.place)
    kept, outside = (moved, moved, alive, alive), (0.0, jnp.nan, 0.0, 0.0)
    out = [jnp.where(k, v, o) for k, v, o in zip(kept, values, outside, strict=True)]
    return pack(_where(ends > 0, tally.end(lag), tally)), jnp.stack(out)


def _where(which: Bool[Array, " R"], a: Tally, b: Tally) -> Tally:
    return jax.tree.map(lambda x, y: jnp.where(which, x, y), a, b)


def _log(exponent: Int[Array, ""], dtype: jnp.dtype) -> Float[Array, ""]:
    """log of 2^exponent."""
    return exponent.astype(dtype) * math.log(2)
