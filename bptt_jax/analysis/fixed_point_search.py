"""From many starts at once to where the step rests: each moves by its own iterations, and none waits for another.

``r(h) = F(h) - h``, with the Jacobian ``A = J - I``, is to become zero, or ``|r|`` as small as it can. A number of
lanes iterate side by side; one that is done takes the next start.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bptt_jax import devices
from bptt_jax.leaves import along_leading
from bptt_jax.linalg.krylov import least_squares
from bptt_jax.linalg.lapack import solve, solve_positive
from bptt_jax.linalg.precision import matmul, wide
from bptt_jax.recurrence.jacobians import jacobian_at
from bptt_jax.recurrence.linearization import Mode
from bptt_jax.step import Array, Input, Recurrence, State, full_precision, is_differentiable, ravel_state

Method: TypeAlias = Literal["newton", "krylov", "gradient"]

# Numbers in all Jacobians, or in the vectors of all lanes, at one time.
_JACOBIAN_NUMBERS, _VECTOR_NUMBERS = 1 << 20, 1 << 18
_DAMPING = 1e-2  # at first, relative to the mean square of A's singular values
_EASED, _TIGHTENED = 0.2, 10.0  # its factors after an iteration that succeeded, and one that did not
_LEAST_DAMPING = 1e-6  # of a step after one that did not succeed
_STILL_FALLING = 0.9  # a residual within the tolerance that falls by this is not at its end
_PATIENCE = {"newton": 12, "krylov": 12, "gradient": 200}  # iterations without progress
_GOOD = 0.2  # with a residual smaller by this no other step is looked for
_SINGULAR = 100.0  # roundings of A up to which a singular value counts as zero
_PROGRESS, _FLAT = 1e-3, 1e-2
_INNER_STEPS, _INNER_TOL = 100, 1e-4  # of conjugate gradients within one iteration


class Map(NamedTuple):
    """The step as a map of vectors ``[D]``, one for each of K starts.

    Attributes:
      recurrence: checked; its instants are the inputs, one for all or K.
      others: leaves of the starts that are no floating numbers, ``[K, ...]``.
    """

    recurrence: Recurrence
    others: list[Array]

    def input(self, k: Array) -> Input:
        """Of start k."""
        last = self.recurrence.length - 1
        return jax.tree.map(lambda a: a[jnp.minimum(k, last)], self.recurrence.instants.x)

    def state(self, vector: Array, k: Array) -> State:
        """With what start k has of other leaves."""
        leaves, treedef = jax.tree.flatten(ravel_state(self.recurrence.state0)[1](vector))
        others = iter(self.others)
        return jax.tree.unflatten(treedef, [a if is_differentiable(a) else next(others)[k] for a in leaves])

    def __call__(self, vector: Array, k: Array) -> Array:
        recurrence = self.recurrence
        new = recurrence.step(recurrence.params, self.state(vector, k), self.input(k))
        return ravel_state(new)[0].astype(vector.dtype)

    def residual(self, vector: Array, k: Array) -> Array:
        """``F(h) - h``, in single precision at least."""
        with full_precision():  # as products of matrices, which they become under vmap, they would be in less
            return wide(self(vector, k)) - wide(vector)

    def jacobian(self, vector: Array, k: Array, mode: Mode) -> Array:
        recurrence = self.recurrence
        found = jacobian_at(recurrence.step, recurrence.params, self.state(vector, k), self.input(k), mode)
        return wide(found)

    def differential(self, vector: Array, k: Array, mode: Mode) -> tuple[Array, Any, Any]:
        """``F(h) - h`` and the products of ``J - I`` and of its transpose with vectors."""

        def moved(v: Array) -> Array:
            return self(v, k)

        with full_precision():
            if mode == "forward":
                new, push = jax.linearize(moved, vector)

                def pull(u: Array) -> Array:
                    return jax.linear_transpose(push, vector)(u)[0]

            else:
                new, pull_tuple = jax.vjp(moved, vector)

                def pull(u: Array) -> Array:
                    return pull_tuple(u)[0]

                def push(u: Array) -> Array:
                    return jax.linear_transpose(pull, vector)(u)[0]

        def less_identity(product: Callable[[Array], Array]) -> Callable[[Array], Array]:
            def of(u: Array) -> Array:
                with full_precision():
                    return wide(product(u.astype(vector.dtype))) - u

            return of

        return wide(new) - wide(vector), less_identity(push), less_identity(pull)


class _Lane(NamedTuple):
    """One of the searches that go on.

    Attributes:
      start: its number; K: there is nothing left to do.
      vector: where it is.
      damping: of the next step.
      idle: iterations in a row without progress.
      iterations: how many were made.
      memory: where it was before and the gradient there, if the method wants to know.
    """

    start: Array
    vector: Array
    damping: Array
    idle: Array
    iterations: Array
    memory: tuple[Array, ...]


class _Proposal(NamedTuple):
    """Where to go, the residual's size here and there, that of its gradient ``A^T r``, and the damping that was
    used."""

    vector: Array
    before: Array
    after: Array
    gradient: Array
    damping: Array
    memory: tuple[Array, ...]


class Found(NamedTuple):
    """Of each start: where it came to, after how many iterations, and whether ``|r|`` has a minimum there."""

    vectors: Array
    iterations: Array
    stationary: Array


def size(vector: Array) -> Array:
    """The norm, without a square that leaves the range; NaN and infinity stay."""
    largest = jnp.max(jnp.abs(vector))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    unit = jnp.minimum(unit, float(jnp.finfo(unit.dtype).max) ** 0.75)  # the inverse of more would be subnormal
    return unit * jnp.sqrt(jnp.sum(jnp.square(vector / unit)))


def search(
    of: Map,
    vectors: Array,
    tolerance: Callable[[Array], Array],
    enough: Callable[[Array], Array],
    reach: Array,
    *,
    method: Method,
    mode: Mode,
    max_iterations: int,
) -> Found:
    """From each of ``vectors [K, D]`` to where ``|F(h) - h|`` is zero, or has a minimum.

    Args:
      tolerance: of ``|F(h) - h|``, given h.
      enough: with how little of it nothing more is to be had.
      reach: no step is longer than this, or than h, or than ``F(h) - h``.
    """
    count, dim = vectors.shape
    numbers = _JACOBIAN_NUMBERS // dim**2 if method == "newton" else _VECTOR_NUMBERS // dim
    lanes = min(count, max(1, numbers))
    propose = partial({"newton": _newton, "krylov": _krylov, "gradient": _descend}[method], of, mode, reach)
    dtype, eps = wide(vectors).dtype, float(jnp.finfo(vectors.dtype).eps)

    def begin(start: Array) -> _Lane:
        """Those of these starts."""
        at = vectors[jnp.minimum(start, count - 1)]
        none = devices.vary(jnp.zeros(len(start), jnp.int32), devices.axes_of(at))
        damping = jnp.full(len(start), 1.0 if method == "gradient" else _DAMPING, dtype)
        memory = (at, jnp.zeros_like(wide(at))) if method == "gradient" else ()
        return _Lane(start, at, devices.vary(damping, devices.axes_of(at)), none, none, memory)

    def advance(lane: _Lane) -> tuple[_Lane, Array, Array]:
        found = propose(lane)
        better = found.after < found.before  # not so of NaN
        if method == "gradient":
            # Where A is small a short step is lost in the rounding of F(h) - h: the next is to be longer, not shorter.
            better |= found.after <= found.before + eps * size(wide(lane.vector))
        vector = jnp.where(better, found.vector, lane.vector)
        now = jnp.where(better, found.after, found.before)
        idle = jnp.where(now < (1 - _PROGRESS) * found.before, 0, lane.idle + 1)
        iterations = lane.iterations + (jnp.isfinite(found.before) & (found.before > 0)).astype(jnp.int32)
        good = now <= enough(vector)
        if method != "gradient":  # of which the last digits would be dear
            good |= (now <= tolerance(vector)) & ~(found.after < _STILL_FALLING * found.before)
        stuck = (idle >= _PATIENCE[method]) | (found.gradient <= 10 * eps * found.before)
        stationary = stuck & (found.gradient <= _FLAT * found.before) & ~good
        stuck |= (iterations >= max_iterations) | ~jnp.isfinite(found.before)
        tightened = jnp.maximum(_TIGHTENED * found.damping, _LEAST_DAMPING)
        damping = jnp.where(better, _EASED * found.damping, tightened)
        return _Lane(lane.start, vector, damping, idle, iterations, found.memory), good | stuck, stationary

    def body(carry: tuple[_Lane, Array, Found]) -> tuple[_Lane, Array, Found]:
        lane, following, found = carry
        lane, done, stationary = jax.vmap(advance)(lane)
        done &= lane.start < count
        place = jnp.where(done, lane.start, count)
        ends = Found(lane.vector, lane.iterations, stationary)
        found = jax.tree.map(lambda into, a: into.at[place].set(a, mode="drop"), found, ends)
        queue = following + jnp.cumsum(done, dtype=jnp.int32) - 1
        fresh = begin(jnp.where(done, jnp.minimum(queue, count), lane.start))
        lane = jax.tree.map(lambda a, b: jnp.where(along_leading(done, a), a, b), fresh, lane)
        return lane, following + jnp.sum(done, dtype=jnp.int32), found

    nothing = devices.vary(jnp.zeros(count, jnp.int32), devices.axes_of(vectors))
    first, following = begin(jnp.arange(lanes, dtype=jnp.int32)), jnp.asarray(lanes, jnp.int32)
    carry = first, following, Found(vectors, nothing, nothing > 0)
    return devices.while_loop(lambda carry: jnp.any(carry[0].start < count), body, carry)[2]


def _towards(vector: Array, change: Array, reach: Array, residual: Array) -> Array:
    """A step no longer than it may be. States that have decayed are no measure of where they go under an input."""
    length = size(change)
    longest = jnp.maximum(jnp.maximum(reach, residual), size(wide(vector)))
    return (wide(vector) + change * jnp.minimum(1, longest / jnp.where(length > 0, length, 1))).astype(vector.dtype)


def _newton(of: Map, mode: Mode, reach: Array, lane: _Lane) -> _Proposal:
    """The better of Newton's step and Levenberg's and Marquardt's.

    Where A is regular the former has all digits after a few, in single precision too, where A^T A has lost them; the
    latter goes to the nearest point where A is singular, along a line of fixed points say, and to a minimum of |r|.
    """
    jacobian = of.jacobian(lane.vector, lane.start, mode)
    residual = of.residual(lane.vector, lane.start)
    identity = jnp.eye(len(residual), dtype=residual.dtype)
    a = jacobian - identity
    gradient = matmul(a.T, residual)
    square = jnp.mean(jnp.sum(jnp.square(a), axis=0))
    damping = jnp.maximum(lane.damping, 10 * jnp.finfo(a.dtype).eps) * square
    normal = matmul(a.T, a) + damping * identity
    (newton,) = solve(jnp.concatenate([a, -residual[:, None]], axis=1))
    (levenberg,) = solve_positive(jnp.concatenate([normal, -gradient[:, None]], axis=1))
    steps, before = jnp.stack([newton, levenberg]), size(residual)
    candidates = jax.vmap(lambda step: _towards(lane.vector, step, reach, before))(steps)
    sizes = jax.vmap(lambda v: _or_infinite(size(of.residual(v, lane.start))))(candidates)
    # Newton's is for where the other is held back. Where A is singular it is rounding, divided by rounding, along the
    # null space: the singular value that it has met tells.
    regular = before > _SINGULAR * jnp.finfo(a.dtype).eps * square**0.5 * size(steps[0])
    held = (sizes[1] > _GOOD * before) & (sizes[0] < 0.5 * sizes[1])
    best = jnp.where(held & regular, 0, 1)
    return _Proposal(candidates[best], before, sizes[best], size(gradient), lane.damping, ())


def _krylov(of: Map, mode: Mode, reach: Array, lane: _Lane) -> _Proposal:
    """Levenberg's and Marquardt's step, by conjugate gradients."""
    residual, push, pull = of.differential(lane.vector, lane.start, mode)
    gradient = pull(residual)
    length = size(gradient)
    square = jnp.square(size(push(gradient / jnp.where(length > 0, length, 1))))
    damping = jnp.maximum(lane.damping, 10 * jnp.finfo(square.dtype).eps) * square
    step = least_squares(push, pull, -residual, damping=damping, steps=_INNER_STEPS, tol=_INNER_TOL)
    before = size(residual)
    candidate = _towards(lane.vector, step, reach, before)
    after = _or_infinite(size(of.residual(candidate, lane.start)))
    return _Proposal(candidate, before, after, length, lane.damping, ())


def _descend(of: Map, mode: Mode, reach: Array, lane: _Lane) -> _Proposal:
    """A step down the gradient of |r|^2 / 2, as long as the last one tells (Barzilai and Borwein 1988)."""
    residual, _, pull = of.differential(lane.vector, lane.start, mode)
    gradient = pull(residual)
    moved, change = wide(lane.vector) - wide(lane.memory[0]), gradient - lane.memory[1]
    curvature = jnp.sum(moved * change) / jnp.maximum(jnp.sum(jnp.square(moved)), jnp.finfo(moved.dtype).tiny)
    damping = jnp.where(jnp.any(moved != 0) & (curvature > 0), curvature, lane.damping)
    before = size(residual)
    candidate = _towards(lane.vector, -gradient / damping, reach, before)
    after = _or_infinite(size(of.residual(candidate, lane.start)))
    return _Proposal(candidate, before, after, size(gradient), damping, (lane.vector, gradient))


def _or_infinite(number: Array) -> Array:
    return jnp.where(jnp.isnan(number), jnp.inf, number)
