"""Parallel in time: a whole trajectory at once, by Newton's method on all its equations."""

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from bptt_jax.checks import check_choice, check_leaves, check_positive_int
from bptt_jax.linalg.affine import affine_scan, carried
from bptt_jax.recurrence.jacobians import jacobians_at
from bptt_jax.results import Result, field
from bptt_jax.step import (
    Array,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    full_precision,
    prepend,
    ravel_state,
)

_ROUNDINGS = 100.0  # how many of them an equation may be off
_FEW = 4.0  # how many are good enough to stop at once
_RECOVER = 1.3  # the damping factor, at every iteration that succeeds
_CHUNK_NUMBERS = 1 << 22  # in what is held at a time, where memory is to stay O(T D)


class DeerSolution(Result):
    """What `deer` found, and how far it is to be trusted; a pytree of arrays.

    Residual and error are relative to ``|h_t| + |J_t| |h_{t-1}|`` with the Jacobian ``J_t``, entry by entry, as the
    roundings of a step are: no large number elsewhere in the state or in time covers them.

    Attributes:
      states: h_1 .. h_T as of `bptt_jax.unroll`, leaves ``[T, ...]``; NaN throughout unless `converged`.
      converged: whether every equation ``h_t = step(h_{t-1}, x_t)`` holds to 100 roundings, and `error` is at most
        half of the digits (1.5e-8 in float64, 3.5e-4 in float32; half precision has too few of them for more than
        a few steps).
      iterations: how many were made.
      residual: the largest ``|step(h_{t-1}, x_t) - h_t|``.
      error: of the trajectory, to first order: what is left of the residuals, and one rounding at every step, sent
        through the exact linearisation; inf if the equations do not hold. In a chaotic recurrence it grows with
        exp(exponent * T), and then no evaluation, sequential ones included, knows the trajectory. Steps that jump
        (rounding, thresholds) have no derivative to tell of it. It is relative, so it is large also where a sum
        passes zero: a plain integrator in float32 may lose half of its digits there within some 1000 steps.
      residuals: ``[max_iterations]``, root mean square of the residual after each iteration, absolute; NaN for
        those that were not made.
    """

    states: State = field(dims=("time", ...))
    converged: Bool[Array, ""] = field(dims=())
    iterations: Int[Array, ""] = field(dims=())
    residual: Float[Array, ""] = field(dims=())
    error: Float[Array, ""] = field(dims=())
    residuals: Float[Array, " max_iterations"] = field(dims=("iteration",))

    def _headline(self) -> str:
        if self.converged:
            return f"converged in {int(self.iterations)} iterations, relative error {float(self.error):.1g}"
        measured = f"residual {float(self.residual):.1g}, error {float(self.error):.1g}"
        return f"not converged after {int(self.iterations)} iterations ({measured}): all states are NaN"


def deer(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree = None,
    *,
    length: int | None = None,
    jacobian: Literal["full", "diagonal"] = "full",
    damped: bool = False,
    guess: State | None = None,
    max_iterations: int = 100,
) -> DeerSolution:
    """All states of a recurrence in O(log T) rounds an iteration instead of T steps (DEER: Lim et al. 2023,
    arXiv:2309.12252).

    Each iteration linearises all steps about the last iterate and solves the affine recurrence
    ``d_t = A_t d_{t-1} + step(h_{t-1}, x_t) - h_t`` by associative scan. After k iterations the first k states are
    exact, whatever the variant; whether all of them are after a few is decided by the largest Lyapunov exponent
    (Gonzalez et al. 2025, arXiv:2508.16817): see `bptt_jax.predict_parallel`.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      jacobian: A_t is the exact Jacobian, or its diagonal alone (quasi-DEER: Gonzalez et al. 2024,
        arXiv:2407.19115): more iterations, but O(T D) memory instead of O(T D^2), and products of matrices only
        once, for `error` at the end, a chunk of time after the other.
      damped: multiply the A_t by a factor that is halved whenever the residual has grown, and recovers to 1 while
        it falls. Like the trust region of ELK (Gonzalez et al. 2024) it tames iterates that overshoot, which they
        do where a wrong state has expanding Jacobians, and keeps the quadratic convergence at the end. At 0 it
        would be Jacobi's iteration; the solution is the same.
      guess: where to start, like the result's `states`; by default h_0 at all times. In training, the trajectory of
        the update before.
      max_iterations: after T + 1 all states are exact; but beyond some dozens the sequential evaluation is faster.

    Returns:
      `DeerSolution`. Its `states` can be differentiated with respect to `params`, `state0` and `xs`, in forward
      and reverse mode and any order: by the adjoint equation of the converged trajectory, one more associative scan
      with the exact Jacobians (O(T D^2) memory), not through the iterations.

    Raises:
      TypeError, ValueError: an argument breaks the contract, or `guess` is not like the states.

    Example:
      >>> step = lambda w, h, x: jnp.tanh(w * h + x)
      >>> found = bptt.deer(step, 0.5, jnp.zeros(1), jnp.ones((100, 1)))
      >>> bool(found.converged), int(found.iterations) < 10, found.states.shape
      (True, True, (100, 1))
    """
    recurrence = bind(step, params, state0, xs, length)
    check_choice("jacobian", jacobian, "full", "diagonal")
    if not isinstance(damped, bool):
        raise TypeError(f"damped: expected True or False, got {type(damped).__name__}")
    max_iterations = check_positive_int("max_iterations", max_iterations)
    check_leaves("guess", guess)
    return _deer(recurrence, guess, jacobian, damped, max_iterations)


@partial(jax.jit, static_argnames=("jacobian", "damped", "max_iterations"))
def _deer(
    recurrence: Recurrence, guess: State | None, jacobian: str, damped: bool, max_iterations: int
) -> DeerSolution:
    recurrence = check_step(recurrence)
    step, params, state0 = recurrence.step, recurrence.params, recurrence.state0
    xs, steps = recurrence.instants.x, recurrence.length
    fixed = jax.lax.stop_gradient((params, xs))
    h0, unravel = ravel_state(jax.lax.stop_gradient(state0))
    first = jnp.broadcast_to(h0, (steps, h0.size)) if guess is None else _vectors(state0, guess, steps)
    eps = float(jnp.finfo(h0.dtype).eps)
    tolerance = min(_ROUNDINGS * eps, math.sqrt(eps))  # the latter in half precision
    linearised = _full if jacobian == "full" else _diagonals

    def starts_of(h: Array) -> State:
        return jax.vmap(unravel)(prepend(h0, h))

    def evaluate(h: Array) -> Array:
        return _evaluate(step, fixed[0], starts_of(h), fixed[1])

    def update(h: Array, f: Array, keep: Array) -> tuple[Array, Array]:
        factors, felt = linearised(step, fixed[0], starts_of(h), fixed[1])
        # After a state that is exact this is exactly zero, so that every iteration makes one more state exact at
        # least; also where products of expanding Jacobians have overflowed, and the plain evaluation stays.
        moved = carried(keep * factors, affine_scan(keep * factors, f - h))
        new = f + jnp.where(jnp.isfinite(moved), moved, 0)
        return jnp.where(jnp.isfinite(new), new, first), felt

    def rms(difference: Array) -> Array:
        return jnp.sqrt(jnp.mean(jnp.square(difference)))

    def unfinished(carry: Any) -> Array:
        _, _, _, (residual, before), count, _, _ = carry
        stuck = (residual <= tolerance) & (residual > 0.5 * before)
        return ~(residual <= min(_FEW * eps, tolerance)) & ~stuck & (count < max_iterations)

    def iterate(carry: Any) -> Any:
        h, f, _, (residual, _), count, residuals, keep = carry
        before = rms(f - h)
        h, felt = update(h, f, keep)
        f = evaluate(h)
        after = rms(f - h)
        if damped:
            keep = jnp.where(after <= before, jnp.minimum(1.0, _RECOVER * keep), 0.5 * keep)
        both = _relative(f - h, jnp.abs(h) + felt), residual
        return h, f, felt, both, count + 1, residuals.at[count].set(after), keep

    infinite = jnp.full((), jnp.inf, h0.dtype)
    none = jnp.full(max_iterations, jnp.nan, h0.dtype)
    start = (
        first,
        evaluate(first),
        first,
        (infinite, infinite),
        jnp.zeros((), jnp.int32),
        none,
        jnp.ones_like(infinite),
    )
    h, f, felt, (residual, _), count, residuals, _ = jax.lax.while_loop(unfinished, iterate, start)
    exact = residual <= tolerance

    def error() -> Array:
        signs = jax.random.rademacher(jax.random.key(0), h.shape, h.dtype)
        size = jnp.abs(h) + felt
        both = jnp.stack([f - h, eps * size * signs], axis=-1)
        grown = _propagated(step, fixed[0], starts_of(h), fixed[1], both)
        return _relative(jnp.sum(jnp.abs(grown), axis=-1), size)

    error_ = jax.lax.cond(exact, error, lambda: infinite)
    converged = exact & (error_ <= math.sqrt(eps))
    states = jax.vmap(unravel)(jnp.where(converged, h, jnp.nan))
    return DeerSolution(_attached(step, params, state0, xs, states), converged, count, residual, error_, residuals)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attached(step: Step, params: Params, state0: State, xs: PyTree, states: State) -> State:
    """`states`, a solution of the recurrence, with the derivatives that this makes it have."""
    return states


@_attached.defjvp
def _differential(step: Step, primals: PyTree, tangents: PyTree) -> tuple[State, State]:
    params, state0, xs, states = primals
    states = _attached(step, params, state0, xs, states)
    starts = prepend(state0, states)

    def equations(params: Params, state0: State, xs: PyTree) -> Array:
        return _evaluate(step, params, prepend(state0, states), xs)

    offsets = jax.jvp(equations, primals[:3], tangents[:3])[1]
    vectors = affine_scan(_full(step, params, starts, xs)[0], offsets)
    unravel = ravel_state(state0)[1]
    return states, jax.vmap(unravel)(vectors)


def _relative(difference: Array, size: Array) -> Array:
    """The largest entry of the ratio; of NaN infinity, for NaN would pass every comparison."""
    ratio = jnp.where(difference == 0, 0, jnp.abs(difference) / jnp.maximum(size, jnp.finfo(size.dtype).tiny))
    return jnp.max(jnp.where(jnp.isnan(ratio), jnp.inf, ratio))


# Under vmap over time the step's products with vectors become products of matrices: in reduced precision consistent
# in themselves, but not with the sequential evaluation.
def _evaluate(step: Step, params: Params, starts: State, xs: PyTree) -> Array:
    """``[T, D]``: the step from each of the states `starts`."""
    with full_precision():
        return jax.vmap(lambda h, x: ravel_state(step(params, h, x))[0])(starts, xs)


def _full(step: Step, params: Params, starts: State, xs: PyTree) -> tuple[Array, Array]:
    """``[T, D, D]``, all Jacobians J; and ``[T, D]``, ``|J| |h|``."""
    factors = jacobians_at(step, params, starts, xs, "forward")
    vectors = jax.vmap(lambda h: ravel_state(h)[0])(starts)
    with full_precision():
        return factors, jnp.einsum("tij,tj->ti", jnp.abs(factors), jnp.abs(vectors))


def _diagonals(step: Step, params: Params, starts: State, xs: PyTree) -> tuple[Array, Array]:
    """``[T, D]``: the diagonals of all Jacobians, a column of each at a time; otherwise as `_full`."""
    vectors = jax.vmap(lambda h: ravel_state(h)[0])(starts)

    def column(felt: Array, i: Array) -> tuple[Array, Array]:
        def at(state: State, x: PyTree) -> Array:
            vector, unravel = ravel_state(state)
            direction = jnp.zeros_like(vector).at[i].set(1)
            return jax.jvp(lambda v: ravel_state(step(params, unravel(v), x))[0], (vector,), (direction,))[1]

        with full_precision():
            columns = jax.vmap(at)(starts, xs)
        return felt + jnp.abs(columns) * jnp.abs(vectors[:, i, None]), columns[:, i]

    felt, diagonals = jax.lax.scan(column, jnp.zeros_like(vectors), jnp.arange(vectors.shape[1]))
    return diagonals.T, felt


def _propagated(step: Step, params: Params, starts: State, xs: PyTree, errors: Array) -> Array:
    """``[T, D, K]``: the sums of all K `errors` so far, carried on by the exact Jacobians, a chunk of them at a
    time.
    """
    steps, size, _ = errors.shape
    chunk = max(1, min(steps, _CHUNK_NUMBERS // size**2))
    count = -(-steps // chunk)

    def in_chunks(a: Array) -> Array:
        a = jnp.concatenate([a, jnp.repeat(a[-1:], count * chunk - steps, axis=0)])
        return a.reshape(count, chunk, *a.shape[1:])

    def body(before: Array, inputs: PyTree) -> tuple[Array, Array]:
        starts, xs, errors = inputs
        factors = _full(step, params, starts, xs)[0]
        errors = errors.at[0].add(jnp.matmul(factors[0], before, precision=jax.lax.Precision.HIGHEST))
        total = jax.vmap(partial(affine_scan, factors), -1, -1)(errors)
        return total[-1], total

    _, totals = jax.lax.scan(body, jnp.zeros_like(errors[0]), jax.tree.map(in_chunks, (starts, xs, errors)))
    return totals.reshape(count * chunk, *errors.shape[1:])[:steps]


def _vectors(state0: State, guess: State, steps: int) -> Array:
    expected: Any = jax.tree.map(lambda h: jax.ShapeDtypeStruct((steps, *h.shape), h.dtype), state0)
    got: Any = jax.tree.map(lambda h: jax.ShapeDtypeStruct(jnp.shape(h), jnp.result_type(h)), guess)
    if expected != got:
        raise ValueError(f"guess: expected the trajectory's {expected}, got {got}")
    vectors = jax.vmap(lambda h: ravel_state(h)[0])(jax.lax.stop_gradient(guess))
    return jnp.where(jnp.isfinite(vectors), vectors, 0)
