"""Orthonormal frames carried along trajectories by the tangent map: the recursion behind Lyapunov exponents."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.linalg.host_lapack import host_lq
from bptt_jax.linalg.precision import matmul
from bptt_jax.step import Array, Params, PyTree, State, Step, full_precision, ravel_state

_LONGEST = 64  # steps between two orthonormalisations, at most
_FORGETS = 0.03  # of a faster pace, at every orthonormalisation after the first few
_LARGE = 8192  # numbers from which on LAPACK may divide a matrix among threads, which block each other


class Carried(NamedTuple):
    """What frames have become after n steps along C trajectories.

    Attributes:
      vectors: ``[C, D]``, the last states.
      frames: ``[C, num, D]``, orthonormal rows if the last step was forced.
      growth: ``[n, C, num]``, log of each direction's length before an orthonormalisation, 0 at other steps; NaN
        where the frame is not finite.
      zero: ``[n, C, num]``, whether that length is no more than what rounding leaves of zero.
      due: ``[n]``, whether the frames were orthonormalised after this step.
    """

    vectors: Array
    frames: Array
    growth: Array
    zero: Array
    due: Array


def carry(
    step: Step,
    params: Params,
    unravel: Callable[[Array], State],
    vectors: Array,
    frames: Array,
    xs: PyTree,
    forced: np.ndarray,
) -> Carried:
    """Carries one frame along each of C trajectories, all of them orthonormalised when one of them needs it.

    Args:
      step, params: of the recurrence.
      unravel: from ``[D]`` to a state.
      vectors: ``[C, D]``, the states to begin with.
      frames: ``[C, num, D]``, orthonormal rows.
      xs: inputs, leaves ``[n, C, ...]``.
      forced: ``[n]``, after which steps to orthonormalise in any case.
    """
    # Two fifths of the digits: how far directions grow apart varies, and the others must see them through. The pace
    # is the share that a step takes. Of the range, which they use up together, a quarter each way.
    limit = -0.4 * math.log(jnp.finfo(frames.dtype).eps)
    huge = float(jnp.finfo(vectors.dtype).max) ** 0.25

    def along(vector: Array, frame: Array, x: PyTree) -> tuple[Array, Array]:
        # In less, the shorter directions would drown in its rounding.
        with full_precision():
            vector, push = jax.linearize(lambda v: ravel_state(step(params, unravel(v), x))[0], vector)
        return vector, jax.vmap(push)(frame.astype(vector.dtype)).astype(frame.dtype)

    def body(carry: Any, inputs: Any) -> tuple[Any, tuple[Array, Array, Array]]:
        vectors, frames, since, pace, done = carry
        x, now = inputs
        vectors, frames = jax.vmap(along)(vectors, frames, x)
        since = since + 1
        largest = jnp.max(jnp.abs(frames), axis=(1, 2))
        within = jnp.all((largest > 1 / huge) & (largest < huge))
        due = now | ~within | (since >= _LONGEST) | (pace * (since + 1).astype(pace.dtype) > 1)

        def orthonormalise(frames: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
            frames, growth, zero = _orthonormalised(frames)
            apart = jax.lax.stop_gradient(jnp.max(growth, axis=1) - jnp.min(growth, axis=1))
            spent = apart / (limit * since.astype(pace.dtype))
            keeps = 1 - jnp.maximum(_FORGETS, 1 / (done + 2).astype(pace.dtype))
            faster = jnp.where(jnp.isfinite(spent), jnp.maximum(spent, keeps * pace), 1)  # NaN: at every step
            return frames, growth, zero, jnp.zeros_like(since), jnp.max(faster), done + 1

        def leave(frames: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
            nothing = jnp.zeros(frames.shape[:2], frames.dtype)
            return frames, nothing, jnp.zeros(nothing.shape, bool), since, pace, done

        frames, growth, zero, since, pace, done = jax.lax.cond(due, orthonormalise, leave, frames)
        return (vectors, frames, since, pace, done), (growth, zero, due)

    counters = jnp.zeros((), jnp.int32), jnp.ones((), frames.dtype), jnp.zeros((), jnp.int32)
    start: Any = (vectors, frames, *counters)
    (vectors, frames, *_), measured = jax.lax.scan(body, start, (xs, jnp.asarray(forced)))
    return Carried(vectors, frames, *measured)


def _orthonormalised(frames: Array) -> tuple[Array, Array, Array]:
    """Orthonormal frames of the same flags of subspaces; the log of each direction's length before, and whether
    that is no more than what rounding leaves of zero.
    """
    finite = jnp.all(jnp.isfinite(frames), axis=(1, 2), keepdims=True)
    l, q = orthonormal(jnp.where(finite, frames, 0))  # a bad frame never reaches LAPACK
    lengths = jnp.abs(jnp.diagonal(l, axis1=1, axis2=2))
    growth = jnp.where(lengths == 0, -jnp.inf, jnp.log(jnp.where(lengths == 0, 1, lengths)))
    zero = lengths <= 4 * float(jnp.finfo(l.dtype).eps) * jnp.max(lengths, axis=1, keepdims=True)
    return q, jnp.where(finite[..., 0], growth, jnp.nan), zero & finite[..., 0]


@jax.custom_jvp
def orthonormal(frames: Array) -> tuple[Array, Array]:
    """A = L Q for real ``[..., M, N]``, M <= N: L ``[..., M, M]`` lower triangular, Q with orthonormal rows."""
    rows, columns = frames.shape[-2:]
    if rows * columns < _LARGE:
        return _lq(frames)
    return jax.lax.platform_dependent(frames, cpu=host_lq, default=_lq)


def _lq(frames: Array) -> tuple[Array, Array]:
    q, r = jnp.linalg.qr(frames.mT)
    return r.mT, q.mT


@orthonormal.defjvp
def _orthonormal_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    # From dA = dL Q + L dQ with a lower triangular dL and an antisymmetric dQ Q^T.
    l, q = orthonormal(*primals)
    change = jax.lax.linalg.triangular_solve(l, tangents[0], left_side=True, lower=True)  # L^-1 dA
    inside = matmul(change, q.mT)
    upper = jnp.triu(inside, 1)
    turn = upper - upper.mT
    return (l, q), (matmul(l, inside - turn), change - matmul(inside - turn, q))
