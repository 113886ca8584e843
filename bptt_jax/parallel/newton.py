"""Parallel in time: a whole trajectory at once, by Newton's method on all its equations."""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from bptt_jax import devices
from bptt_jax.checks import at_path, check_choice, check_leaves, check_positive_int
from bptt_jax.linalg.affine import affine_scan, carried
from bptt_jax.linalg.precision import matmul
from bptt_jax.linalg.scattered import scattered
from bptt_jax.recurrence.jacobians import jacobians_at
from bptt_jax.recurrence.linearization import Mode, differentiation_mode
from bptt_jax.recurrence.programs import depends
from bptt_jax.results import Result, field
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
    differentiable_part,
    full_precision,
    is_differentiable,
    prepend,
    ravel_state,
)
from bptt_jax.timeline import last_real_step

_ROUNDINGS = 100.0  # how many of them an equation may be off
_FEW = 4.0  # how many are good enough to stop at once
_RECOVER = 1.3  # the damping factor, at every iteration that succeeds
_CHUNK_NUMBERS = 1 << 22  # in what is held at a time, where memory is to stay O(T D)


class DeerSolution(Result):
    """What `deer` found, and how far it is to be trusted; a pytree of arrays.

    Residual and error are relative to ``|h_t| + |J_t| |h_{t-1}|`` with the Jacobian ``J_t``, entry by entry, as the
    roundings of a step are: no large number elsewhere in the state or in time covers them. The error where that is zero
    is relative to the largest of the unit's.

    Attributes:
      states: h_1 .. h_T as of `bptt_jax.unroll`, leaves ``[T, ...]``; all floating ones NaN unless `converged`.
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
    ``d_t = A_t d_{t-1} + step(h_{t-1}, x_t) - h_t`` by associative scan (on a CPU, with full A_t, in order, which is
    less work and sooner compiled). After k iterations the first k states are
    exact, whatever the variant; whether all of them are after a few is decided by the largest Lyapunov exponent
    (Gonzalez et al. 2025, arXiv:2508.16817): see `bptt_jax.predict_parallel`. Padding holds the state, and at a
    reset the recurrence begins anew: nothing of what comes before it enters, be it as far from converged as it may.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`. Leaves of the state that are no floating numbers
        (counters, flags, random keys) must not depend on those that are: they are computed first, step by step,
        which takes T steps of little work.
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
      `DeerSolution`. Its `states` can be differentiated with respect to `params`, `state0`, `xs` and a
      `reset_state`, in forward and reverse mode and any order, as far as the step can: by the adjoint equation of
      the converged trajectory, one more associative scan with the exact Jacobians (O(T D^2) memory), not through
      the iterations.

    Raises:
      TypeError, ValueError: an argument breaks the contract, `guess` is not like the states, or a leaf that is no
        floating number depends on floating ones (spikes as booleans, an index that the state decides).

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
    return _deer(recurrence, guess, jacobian=jacobian, damped=damped, max_iterations=max_iterations)


class _Equations(NamedTuple):
    """``h_t = advance(h_{t-1})`` for all t, of vectors ``[T, D]``.

    Attributes:
      recurrence: checked.
      others: leaves of h_1 .. h_T that are no floating numbers, ``[T, ...]`` each, in their order: they are the
        same whatever the vectors.
    """

    recurrence: Recurrence
    others: list[Array]

    @property
    def h0(self) -> Array:
        return ravel_state(self.recurrence.state0)[0]

    def states(self, h: Array) -> State:
        leaves, treedef = jax.tree.flatten(jax.vmap(ravel_state(self.recurrence.state0)[1])(h))
        others = iter(self.others)
        return jax.tree.unflatten(treedef, [a if is_differentiable(a) else next(others) for a in leaves])

    def starts(self, h: Array) -> State:
        """What each step starts from."""
        return self.recurrence.starts(self.states(h))

    def held(self, h: Array) -> Array:
        """`h` with what is held in padding."""
        real = self.recurrence.instants.real
        return h if real is None else jnp.concatenate([self.h0[None], h])[1 + last_real_step(real)]

    def advance(self, h: Array) -> Array:
        """The right-hand sides."""
        recurrence = self.recurrence

        def one(start: State, x: PyTree) -> Array:
            return ravel_state(recurrence.step(recurrence.params, start, x))[0]

        # Under vmap over time products with vectors become products of matrices: in reduced precision consistent in
        # themselves, but not with the sequential evaluation.
        with full_precision():
            new = jax.vmap(one)(self.starts(h), recurrence.instants.x)
        real = recurrence.instants.real
        return new if real is None else jnp.where(real[:, None], new, prepend(self.h0, h))


@devices.compiled
def _deer(
    recurrence: Recurrence, guess: State | None, *, jacobian: str, damped: bool, max_iterations: int
) -> DeerSolution:
    recurrence = check_step(recurrence)
    others = _other_leaves(recurrence)
    equations = _Equations(jax.lax.stop_gradient(recurrence), others)
    mode, instants, h0 = differentiation_mode(recurrence), equations.recurrence.instants, equations.h0
    if guess is None:
        first = jnp.broadcast_to(h0, (recurrence.length, h0.size))
    else:
        first = equations.held(_vectors(recurrence.state0, guess, recurrence.length))
    eps = float(jnp.finfo(h0.dtype).eps)
    tolerance = min(_ROUNDINGS * eps, math.sqrt(eps))  # the latter in half precision
    linearised = _full if jacobian == "full" else _diagonals
    count_real = jnp.maximum(jnp.sum(recurrence.real), 1).astype(h0.dtype)

    def update(h: Array, f: Array, damping: Array) -> tuple[Array, Array]:
        factors, abs_jac_times_state = linearised(equations.recurrence, equations.starts(h), instants, mode)
        factors = damping * factors
        # After a state that is exact this is exactly zero, so that every iteration makes one more state exact at
        # least; also where products of expanding Jacobians have overflowed, and the plain evaluation stays.
        moved = carried(factors, affine_scan(factors, f - h, begins=instants.reset), begins=instants.reset)
        new = f + jnp.where(jnp.isfinite(moved), moved, 0)
        return equations.held(jnp.where(jnp.isfinite(new), new, first)), abs_jac_times_state

    def left(h: Array, f: Array) -> Array:
        # What is held in padding solves its equation, be it infinite.
        return f - h if instants.real is None else jnp.where(instants.real[:, None], f - h, 0)

    def rms(difference: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.square(difference)) / h0.size / count_real)

    def unfinished(carry: Any) -> Array:
        _, _, (residual, before), count, _, _ = carry
        stuck = (residual <= tolerance) & (residual > 0.5 * before)
        return ~(residual <= min(_FEW * eps, tolerance)) & ~stuck & (count < max_iterations)

    def iterate(carry: Any) -> Any:
        h, f, (residual, _), count, residuals, damping = carry
        before = rms(left(h, f))
        h, abs_jac_times_state = update(h, f, damping)
        f = equations.advance(h)
        after = rms(left(h, f))
        if damped:
            damping = jnp.where(after <= before, jnp.minimum(1.0, _RECOVER * damping), 0.5 * damping)
        both = _relative(left(h, f), jnp.abs(h) + abs_jac_times_state), residual
        return h, f, both, count + 1, residuals.at[count].set(after), damping

    def judged(h: Array, f: Array) -> tuple[Array, Array]:
        """Residual and error by the Jacobians of the iterate itself; within the loop they are those of the one before,
        which may be others."""
        signs = jnp.where(scattered(h.shape, h.dtype) < 0, -1, 1).astype(h.dtype)
        grown, size = _propagated(equations.recurrence, h, equations.starts(h), mode, left(h, f), eps * signs)
        # A unit that rests at zero has no size of its own there.
        own = jnp.where(size > 0, size, jnp.max(size, axis=0))
        return _relative(left(h, f), size), _relative(jnp.sum(jnp.abs(grown), axis=-1), own)

    infinite = jnp.full_like(h0[0], jnp.inf)

    def until_judged(carry: Any) -> Any:
        h, f, (before, _), _, count, residuals, damping = carry
        start = h, f, (infinite, infinite), count, residuals, damping
        h, f, (residual, _), count, residuals, damping = devices.while_loop(unfinished, iterate, start)
        residual, error = devices.cond(residual <= tolerance, judged, lambda *_: (residual, infinite), h, f)
        return h, f, (residual, before), error, count, residuals, damping

    def goes_on(carry: Any) -> Array:
        _, _, (residual, before), _, count, _, _ = carry
        return (count == 0) | (~(residual <= tolerance) & (residual < 0.5 * before) & (count < max_iterations))

    none = jnp.full(max_iterations, jnp.nan, h0.dtype)
    counts = jnp.zeros((), jnp.int32), none
    start = first, equations.advance(first), (infinite, infinite), infinite, *counts, jnp.ones_like(infinite)
    h, _, (residual, _), error, count, residuals, _ = devices.while_loop(goes_on, until_judged, start)
    converged = (residual <= tolerance) & (error <= math.sqrt(eps))
    found = _attached(recurrence, others, jnp.where(converged, h, jnp.nan))
    states = _Equations(recurrence, others).states(found)
    return DeerSolution(states, converged, count, residual, error, residuals)


def _other_leaves(recurrence: Recurrence) -> list[Array]:
    """What is no floating number in h_1 .. h_T, step by step: leaves ``[T, ...]``.

    Raises:
      TypeError: it depends on what is.
    """
    leaves, treedef = jax.tree.flatten(recurrence.state0)
    floating = [is_differentiable(leaf) for leaf in leaves]
    if all(floating):
        return []

    def kept(state: State) -> list[Array]:
        return [a for a, f in zip(jax.tree.leaves(state), floating, strict=True) if not f]

    def step(leaves: list[Array], params: Params, x: PyTree) -> list[Array]:
        return kept(recurrence.step(params, jax.tree.unflatten(treedef, leaves), x))

    x = jax.tree.map(lambda a: a[0], recurrence.instants.x)
    jaxpr = jax.make_jaxpr(step)(leaves, recurrence.params, x)
    moves = depends(jaxpr, floating + [False] * (len(jaxpr.in_avals) - len(leaves)))
    named = jax.tree_util.tree_leaves_with_path(recurrence.state0)
    paths = [path for (path, _), f in zip(named, floating, strict=True) if not f]
    for path, depends_on_floating in zip(paths, moves, strict=True):
        if depends_on_floating:
            raise TypeError(
                f"step: {at_path('state', path)} is no floating number and depends on those that are, so it cannot "
                "be had before them, in parallel over time; compute it from the states afterwards, or by unroll"
            )

    def body(others: list[Array], at: Instant) -> tuple[list[Array], list[Array]]:
        rest = iter(others)
        state = [a if f else next(rest) for a, f in zip(leaves, floating, strict=True)]
        others = kept(recurrence.advance(jax.tree.unflatten(treedef, state), at))
        return others, others

    start = kept(recurrence.state0)
    return devices.scan(body, start, recurrence.instants, length=recurrence.length)[1]


@jax.custom_jvp
def _attached(recurrence: Recurrence, others: list[Array], h: Array) -> Array:
    """`h`, the solution of the recurrence, with the derivatives that this makes it have."""
    return h


@_attached.defjvp
def _differential(primals: PyTree, tangents: PyTree) -> tuple[Array, Array]:
    recurrence, others, h = primals
    h = _attached(*primals)
    moving, merge = differentiable_part(recurrence)
    changes = differentiable_part(tangents[0])[0]

    def advanced(moving: Recurrence) -> Array:
        return _Equations(merge(moving), others).advance(h)

    mode = differentiation_mode(recurrence)
    if mode == "forward":
        offsets = jax.jvp(advanced, (moving,), (changes,))[1]
    else:
        new, pull = jax.vjp(advanced, moving)
        offsets = jax.linear_transpose(pull, new)((changes,))[0]
    factors, _ = _full(recurrence, _Equations(recurrence, others).starts(h), recurrence.instants, mode)
    return h, affine_scan(factors, offsets, begins=recurrence.instants.reset)


def _relative(difference: Array, size: Array) -> Array:
    """The largest entry of the ratio; of NaN infinity, for NaN would pass every comparison."""
    ratio = jnp.where(difference == 0, 0, jnp.abs(difference) / jnp.maximum(size, jnp.finfo(size.dtype).tiny))
    return jnp.max(jnp.where(jnp.isnan(ratio), jnp.inf, ratio))


def _full(recurrence: Recurrence, starts: State, instants: Instant, mode: Mode) -> tuple[Array, Array]:
    """``[K, D, D]``, the Jacobians J with respect to what K steps start from; and ``[K, D]``, ``|J| |start|``."""
    factors = jacobians_at(recurrence.step, recurrence.params, starts, instants.x, mode)
    with full_precision():
        abs_jac_times_state = jnp.einsum("tij,tj->ti", jnp.abs(factors), _sizes(starts))
    if instants.real is not None:
        factors = jnp.where(instants.real[:, None, None], factors, jnp.eye(recurrence.size, dtype=factors.dtype))
    return factors, abs_jac_times_state


def _sizes(starts: State) -> Array:
    """``[K, D]``; 0 of what is infinite: a computation in the log domain that begins with log 0 forgets it at once."""
    vectors = jnp.abs(jax.vmap(lambda h: ravel_state(h)[0])(starts))
    return jnp.where(vectors < jnp.inf, vectors, 0)


def _diagonals(recurrence: Recurrence, starts: State, instants: Instant, mode: Mode) -> tuple[Array, Array]:
    """``[K, D]``: the diagonals of the Jacobians, a column or a row of each at a time; otherwise as `_full`."""
    vectors = _sizes(starts)

    def part(abs_jac_times_state: Array, i: Array) -> tuple[Array, Array]:
        def at(state: State, x: PyTree) -> Array:
            vector, unravel = ravel_state(state)
            direction = jnp.zeros_like(vector).at[i].set(1)

            def moved(v: Array) -> Array:
                return ravel_state(recurrence.step(recurrence.params, unravel(v), x))[0]

            if mode == "forward":
                return jax.jvp(moved, (vector,), (direction,))[1]
            return jax.vjp(moved, vector)[1](direction)[0]

        with full_precision():
            parts = jax.vmap(at)(starts, instants.x)
        if mode == "forward":  # the i-th columns
            abs_jac_times_state = abs_jac_times_state + jnp.abs(parts) * vectors[:, i, None]
        else:
            abs_jac_times_state = abs_jac_times_state.at[:, i].set(jnp.sum(jnp.abs(parts) * vectors, axis=1))
        return abs_jac_times_state, parts[:, i]

    abs_jac_times_state, diagonals = devices.scan(part, jnp.zeros_like(vectors), jnp.arange(vectors.shape[1]))
    diagonals = diagonals.T if instants.real is None else jnp.where(instants.real[:, None], diagonals.T, 1)
    return diagonals, abs_jac_times_state


def _propagated(
    recurrence: Recurrence, h: Array, starts: State, mode: Mode, left: Array, roundings: Array
) -> tuple[Array, Array]:
    """What is `left` of the equations, and one of the `roundings` of every number, ``[T, D]`` each, sent through the
    exact Jacobians, a chunk of time after the other: ``[T, D, 2]``; zero in padding. And ``|h| + |J| |start|``,
    ``[T, D]``, the sizes to which roundings are relative.
    """
    instants, (steps, size) = recurrence.instants, h.shape
    chunk = max(1, min(steps, _CHUNK_NUMBERS // size**2))
    count = -(-steps // chunk)

    def in_chunks(a: Array) -> Array:
        a = jnp.concatenate([a, jnp.repeat(a[-1:], count * chunk - steps, axis=0)])
        return a.reshape(count, chunk, *a.shape[1:])

    def body(before: Array, inputs: PyTree) -> tuple[Array, tuple[Array, Array]]:
        starts, instants, h, left, roundings = inputs
        factors, abs_jac_times_state = _full(recurrence, starts, instants, mode)
        sizes = jnp.abs(h) + abs_jac_times_state
        errors = jnp.stack([left, sizes * roundings], axis=-1)
        if instants.real is not None:
            errors = jnp.where(instants.real[:, None, None], errors, 0)
        come = matmul(factors[0], before)
        come = come if instants.reset is None else jnp.where(instants.reset[0], 0, come)
        scan = partial(affine_scan, factors, begins=instants.reset)
        total = jax.vmap(scan, -1, -1)(errors.at[0].add(come))
        return total[-1], (total, sizes)

    nothing = jnp.zeros((size, 2), h.dtype)
    _, found = devices.scan(body, nothing, jax.tree.map(in_chunks, (starts, instants, h, left, roundings)))
    totals, sizes = jax.tree.map(lambda a: a.reshape(count * chunk, *a.shape[2:])[:steps], found)
    return totals if instants.real is None else jnp.where(instants.real[:, None, None], totals, 0), sizes


def _vectors(state0: State, guess: State, steps: int) -> Array:
    expected: Any = jax.tree.map(lambda h: jax.ShapeDtypeStruct((steps, *h.shape), h.dtype), state0)
    got: Any = jax.tree.map(lambda h: jax.ShapeDtypeStruct(jnp.shape(h), jnp.result_type(h)), guess)
    if expected != got:
        raise ValueError(f"guess: expected the trajectory's {expected}, got {got}")
    vectors = jax.vmap(lambda h: ravel_state(h)[0])(jax.lax.stop_gradient(guess))
    return jnp.where(jnp.isfinite(vectors), vectors, 0)
