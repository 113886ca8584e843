"""The error signal on its way back to h_0: what one backward pass tells, without any D x D matrix."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.analysis import matrix_free
from bptt_jax.analysis.adjoints import Backward, backward
from bptt_jax.analysis.loss import BoundLoss
from bptt_jax.linalg import logscale
from bptt_jax.recurrence.linearization import Linearization
from bptt_jax.step import Array, PyTree, Recurrence, State, ravel_state


class Signal(NamedTuple):
    """What one backward pass tells, without Jacobians; fields as in `GradientFlow`.

    Attributes:
      done: the backward pass.
      starts: h_0 .. h_{T-1}.
      reads: whether the loss reads any state; if not, `gains` is NaN.
      last_read: index of the last that it reads.
      back: s, as `GradientFlow.reach`.
      gains: ``[T]``, as `GradientFlow.error_log_gains`.
      peak: as `GradientFlow.peak_gain`.
      bad_state, bad_adjoint: ``[T]``, where these are not finite.
      finite: whether loss, states and adjoints are.
    """

    done: Backward
    starts: State
    adjoint_log_norms: Array
    reads: Array
    last_read: Array
    back: Array
    gains: Array
    peak: Array
    bad_state: Array
    bad_adjoint: Array
    finite: Array


def propagate_error_signal(recurrence: Recurrence, loss: BoundLoss) -> Signal:
    """Follows the error signal of the last state that the loss reads; nothing here is of size D x D."""
    done = backward(recurrence, loss)
    states, starts = done.along.states, done.along.starts
    log_norms, immediate, steps = done.signal.log_norm, done.loss.states, recurrence.length
    error, reads, last_read = _error_signal(immediate)
    bad_state = ~_finite_by_step(states)
    bad_adjoint = ~(log_norms < jnp.inf)
    return Signal(
        done,
        starts,
        log_norms,
        reads,
        last_read,
        jnp.where(reads, last_read + 1, steps),
        _error_log_gains(done.along, starts, error, last_read),
        _peak_gain(log_norms, immediate),
        bad_state,
        bad_adjoint,
        jnp.isfinite(done.loss.value) & ~jnp.any(bad_state) & ~jnp.any(bad_adjoint),
    )


def slope(gains: Array, back: Array) -> Array:
    """The growth rate: least-squares slope of the gains against the steps back, the start (0, 0) included."""
    steps = gains.shape[0]
    gains = jnp.append(gains, 0.0)
    back = back.astype(gains.dtype)
    lag = (back - jnp.arange(steps + 1, dtype=gains.dtype)) / back
    used = (lag > 0) | (jnp.arange(steps + 1) == steps)
    lag = jnp.where(jnp.arange(steps + 1) == steps, 0.0, lag)
    dead = jnp.any(used & (gains == -jnp.inf))
    gains = jnp.where(used & (gains != -jnp.inf), gains, 0.0)
    n = jnp.sum(used, dtype=gains.dtype)
    centred = jnp.where(used, lag - jnp.sum(jnp.where(used, lag, 0.0)) / n, 0.0)
    slope = jnp.sum(centred * (gains - jnp.sum(gains) / n)) / jnp.sum(centred**2) / back
    return jnp.where(dead, -jnp.inf, slope)


def horizon(gains: Array, back: Array, rate: Array, fraction: Array) -> Array:
    """Steps until the gains have fallen to `fraction` for good."""
    lag = back - jnp.arange(gains.shape[0])
    threshold = jnp.log(fraction).astype(gains.dtype)
    within = 1 + jnp.max(jnp.where((lag > 0) & (gains >= threshold), lag, 0))
    falling = rate < 0
    further = (threshold - gains[0]) / jnp.where(falling, rate, -1)
    beyond = jnp.where(falling, back.astype(gains.dtype) + further, jnp.inf)
    horizon = jnp.where(gains[0] >= threshold, beyond, within.astype(gains.dtype))
    return jnp.where(jnp.any(jnp.isnan(gains)), jnp.nan, horizon)


def _finite_by_step(states: State) -> Array:
    leaves = jax.tree.leaves(states)
    return jnp.stack([jnp.all(jnp.isfinite(a.reshape(a.shape[0], -1)), axis=1) for a in leaves]).all(axis=0)


def _error_signal(immediate: State) -> tuple[Array, Array, Array]:
    """(dl/dh_s as a real vector [D], whether there is one, index of s)."""
    # The cotangent of x + iy is dL/dx - i dL/dy, while Jacobians act on (x, y).
    vectors = jax.vmap(lambda d: ravel_state(jax.tree.map(jnp.conj, d))[0])(immediate)
    reads = jnp.any(vectors != 0, axis=1)
    last = vectors.shape[0] - 1 - jnp.argmax(reads[::-1])
    any_read = jnp.any(reads)
    return vectors[last], any_read, jnp.where(any_read, last, vectors.shape[0] - 1)


def _error_log_gains(along: Linearization, starts: State, error: Array, last_read: Array) -> Array:
    """Log norms [T] of the error signal carried back to each h_t, relative to its start."""
    pull = matrix_free.pull_back(along)

    def body(signal: tuple[Array, Array], inputs: tuple[PyTree, Array]) -> tuple[tuple[Array, Array], Array]:
        residuals, move = inputs
        moved = logscale.normalize(pull(residuals, signal[0]), signal[1])
        signal = jax.tree.map(partial(jnp.where, move), moved, signal)
        return signal, logscale.log_norm(*signal)

    on_the_way = jnp.arange(jax.tree.leaves(starts)[0].shape[0]) <= last_read
    start = logscale.normalize(error, jnp.zeros((), jnp.int32))
    _, gains = jax.lax.scan(body, start, (along.residuals, on_the_way), reverse=True)
    return gains - logscale.log_norm(*start)


def _peak_gain(adjoint_log_norms: Array, immediate: State) -> Array:
    """The largest ``||lambda_t|| / sum_{k >= t} ||dl/dh_k||``: at most 1 if no product of Jacobians exceeds 1."""
    came_in = jax.lax.cumlogsumexp(jax.vmap(logscale.log_norm)(immediate), reverse=True)
    silent = came_in == -jnp.inf
    return jnp.max(jnp.where(silent, -jnp.inf, adjoint_log_norms - jnp.where(silent, 0.0, came_in)))
