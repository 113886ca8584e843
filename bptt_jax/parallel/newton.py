"""Parallel in time: a whole trajectory at once, by Newton's method on all its equations."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bptt_jax import devices
from bptt_jax.checks import (
    at_path,
    check_choice,
    check_leaves,
    check_positive_int,
    describe_shapes,
    differentiated_by_rule,
)
from bptt_jax.linalg.affine import affine_scan
from bptt_jax.linalg.precision import at_least_single, matmul
from bptt_jax.linalg.scattered import signs
from bptt_jax.parallel import factors
from bptt_jax.recurrence.linearization import Mode, differentiation_mode
from bptt_jax.recurrence.programs import depends
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
    differentiable_part,
    full_precision,
    is_differentiable,
    prepend,
    ravel_state,
)
from bptt_jax.timeline import last_real_step

_ROUNDINGS = 100.0  # how many of them an equation may be off
_FEW = 4.0  # how many are good enough to stop at once
_NEAR = 8  # steps to either side in which a unit's size is looked up for the error
_RECOVER = 1.3  # the damping factor, at every iteration that succeeds
_CHUNK_NUMBERS = 1 << 22  # in what is held at a time, where memory is to stay O(T D)


class DeerSolution(Result):
    """What `deer` found, and how far it is to be trusted; a pytree of arrays.

    The residual is relative to ``|h_t| + |J_t| |h_{t-1}|`` with the Jacobian ``J_t``, entry by entry, as the roundings
    of a step are: no large number elsewhere in the state or in time covers them. The error is relative to the largest
    of these sizes that the unit has within 8 steps, since some of many numbers pass zero; where all are zero, of those
    at any time. What lies below 1e-31 in float32 (1e-292 in float64) counts as that large, since products of such
    numbers underflow.

    Attributes:
      states: h_1 .. h_T as of `bptt_jax.unroll`, leaves ``[T, ...]``; all floating ones NaN unless `converged`.
      converged: whether every equation ``h_t = step(h_{t-1}, x_t)`` holds to 100 roundings, and `error` is at most
        half of the digits (1.5e-8 in float64, 3.5e-4 in float32; half precision has too few of them for more than
        a few steps).
      iterations: how many were made; of several windows, in the one that took most.
      residual: the largest ``|step(h_{t-1}, x_t) - h_t|``.
      error: of the trajectory, to first order: what is left of the residuals, and one rounding at every step, sent
        through the exact linearisation; inf if the equations do not hold. In a chaotic recurrence it grows with
        exp(exponent * T), and then no evaluation, sequential ones included, knows the trajectory. Steps that jump
        (rounding, thresholds) have no derivative to tell of it. It is relative, so it is large also where a sum
        stays near zero for longer: a plain integrator in float32 may lose half of its digits there.
      residuals: ``[max_iterations]``, root mean square of the residual after each iteration, absolute, of several
        windows the largest; NaN for those that were not made.
    """

    states: State = field(dims=("time", ...))
    converged: Bool[Array, ""] = field(dims=())
    iterations: Int[Array, ""] = field(dims=())
    residual: Float[Array, ""] = field(dims=())
    error: Float[Array, ""] = field(dims=())
    residuals: Float[Array, " max_iterations"] = field(dims=("iteration",))

    def _headline(self) -> str:
        made = counted(int(self.iterations), "iteration")
        if self.converged:
            return f"converged in {made}, relative error {float(self.error):.1g}"
        if not math.isfinite(self.residual):
            return f"not converged in {made}, all NaN: a state is not finite, as those of unroll may be"
        measured = f"residual {float(self.residual):.1g}, error {float(self.error):.1g}"
        why = "roundings grow too large" if math.isfinite(self.error) else "try damping= or window="
        return f"not converged in {made} ({measured}), all NaN: {why}"


def deer(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree = None,
    *,
    length: int | None = None,
    jacobian: Literal["full", "diagonal", "blocks"] = "full",
    damping: Literal["scale", "kalman"] | None = None,
    guess: State | None = None,
    max_iterations: int = 100,
    window: int | None = None,
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
        once, for `error` at the end, a chunk of time after the other. Or "blocks": one of L x L numbers for each
        unit, of what the L leaves of one shape have of it (an lstm's h and c; real and imaginary part). It is
        estimated from one product with the Jacobian for each leaf, along random signs, instead of D products (as in
        Zoltowski et al. 2025, arXiv:2508.18413, for the diagonal): O(T D L) memory, and exact where units do not
        meet, as in `cells.indrnn` or `cells.lru`; there it is Newton's method in full. Where they do, what the
        others add is noise in A_t, and `damping` helps.
      damping: tames iterates that overshoot, which they do where a wrong state has expanding Jacobians, and keeps the
        quadratic convergence at the end; the solution is the same, and on a cycle it takes some more iterations than
        without. By a number that is halved whenever the residual has grown, by itself and beside the states, and
        recovers to 1 while it falls: "scale" multiplies all A_t by it. "kalman" is the trust region of ELK
        (Gonzalez et al. 2024, section 4.2), a Kalman filter that is told that the states hardly move, with the
        confidence 1 / number - 1: it holds back most where products of the A_t grow, for one more associative scan
        an iteration, of D x D matrices and their inverses if A_t is full.
      guess: where to start, like the result's `states`; by default h_0 at all times. In training, the trajectory of
        the update before.
      max_iterations: after T + 1 all states are exact; but beyond some dozens the sequential evaluation is faster.
      window: solve so many steps at a time, one window after the other, each from the end of the one before, and
        each within `max_iterations`: O(window D^2) memory beside the states instead of O(T D^2), for the gradient
        too, and fewer iterations where differences grow; T / window times as many rounds. T by default.

    Returns:
      `DeerSolution`. Its `states` can be differentiated with respect to `params`, `state0`, `xs` and a
      `reset_state`, in forward and reverse mode and any order, as far as the step can: by the adjoint equation of
      the converged trajectory, one more associative scan with the exact Jacobians (O(T D^2) memory), not through
      the iterations. Called in a loop (`jax.lax.scan`, `map`) it has second derivatives only where the first is taken
      forward (`jax.jvp`, `jax.jacfwd`): of another JAX forgets the rule there, and it is refused.

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
    check_choice("jacobian", jacobian, "full", "diagonal", "blocks")
    check_choice("damping", damping, None, "scale", "kalman")
    max_iterations = check_positive_int("max_iterations", max_iterations)
    check_leaves("guess", guess)
    window = recurrence.length if window is None else min(check_positive_int("window", window), recurrence.length)
    options = _Options(jacobian, damping, max_iterations)
    return _deer(recurrence, guess, options=options, window=window)


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


class _Options(NamedTuple):
    """Of `deer`."""

    jacobian: str
    damping: str | None
    max_iterations: int


class _Solved(NamedTuple):
    """A window.

    Attributes:
      h: its states ``[K, D]``.
      residual: the largest, relative.
      grown: ``[K, D, 2]``, what is left of the equations, and one rounding at each, sent through the Jacobians, with
        what came in from the window before; infinite where the equations do not hold.
      sizes: ``[K, D]``, to which it is relative.
      iterations, residuals: see `DeerSolution`.
    """

    h: Array
    residual: Array
    grown: Array
    sizes: Array
    iterations: Array
    residuals: Array


@devices.compiled
def _deer(recurrence: Recurrence, guess: State | None, *, options: _Options, window: int) -> DeerSolution:
    recurrence = check_step(recurrence)
    others, mode = _other_leaves(recurrence), differentiation_mode(recurrence)
    whole, steps = _Equations(jax.lax.stop_gradient(recurrence), others), recurrence.length
    vectors = None if guess is None else _vectors(recurrence.state0, guess, steps)
    start = recurrence.state0, jnp.zeros_like(jnp.stack([whole.h0, whole.h0], axis=-1))
    solve = partial(_solve, mode=mode, options=options)
    found = (
        solve(whole, vectors, start[1], jnp.zeros((), jnp.uint32))
        if window == steps
        else _in_windows(solve, whole, vectors, start, window)
    )
    h, residual, grown, sizes, count, residuals = found
    if recurrence.instants.real is not None:
        grown = jnp.where(recurrence.instants.real[:, None, None], grown, 0)
    eps = float(jnp.finfo(h.dtype).eps)
    # Of many numbers some pass zero, and one that rests there has no size of its own.
    sizes, wide = jax.lax.stop_gradient(sizes), (2 * _NEAR + 1, 1)
    nearby = jax.lax.reduce_window(sizes, np.asarray(-np.inf, sizes.dtype), jax.lax.max, wide, (1, 1), "SAME")
    own = jnp.where(nearby > 0, nearby, jnp.max(sizes, axis=0))
    error = jnp.max(_ratios(jnp.sum(jnp.abs(grown), axis=-1), own))
    converged = (residual <= _tolerance(eps)) & (error <= math.sqrt(eps))
    attached = _attached(recurrence, others, jnp.where(converged, h, jnp.nan), window)
    states = _Equations(recurrence, others).states(attached)
    return DeerSolution(states, converged, count, residual, error, residuals)


def _in_windows(
    solve: Callable[..., _Solved], whole: _Equations, vectors: Array | None, start: PyTree, window: int
) -> _Solved:
    """One after the other; the last is filled up with padding, like the first real step."""
    (recurrence, others), steps = whole, whole.recurrence.length
    first, missing = jnp.argmax(recurrence.real), -whole.recurrence.length % window
    places = jnp.concatenate([jnp.arange(steps), jnp.full(missing, first)])

    def cut(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: a[places].reshape(-1, window, *a.shape[1:]), tree)

    given = (jnp.arange(steps + missing) < steps).reshape(-1, window)
    x, real, reset = cut(recurrence.instants)
    real = given if real is None else given & real
    instants = Instant(x, real, None if reset is None else given & reset)
    at_first = jax.tree.map(lambda a: a[first], recurrence.instants)
    spare = recurrence.begin(recurrence.state0, at_first) if recurrence.spare is None else recurrence.spare
    filled = replace(recurrence, spare=spare)

    def body(carry: PyTree, piece: PyTree) -> tuple[PyTree, _Solved]:
        (state, grown), (begins, instants, others, vectors) = carry, piece
        equations = _Equations(filled.stretch(state, instants, window), others)
        found = solve(equations, vectors, grown, begins)
        last = jax.tree.map(lambda a: a[-1], equations.states(found.h))
        return (last, found.grown[-1]), found

    begins = jnp.arange(0, steps, window, dtype=jnp.uint32)
    _, found = devices.scan(body, start, (begins, instants, *cut((others, vectors))))
    h, grown, sizes = _together((found.h, found.grown, found.sizes), steps)
    # NaN where no window made it.
    largest = jnp.max(jnp.where(jnp.isnan(found.residuals), -jnp.inf, found.residuals), axis=0)
    residuals = jnp.where(jnp.isnan(found.residuals).all(axis=0), jnp.nan, largest)
    return _Solved(h, jnp.max(found.residual), grown, sizes, jnp.max(found.iterations), residuals)


def _tolerance(eps: float) -> float:
    return min(_ROUNDINGS * eps, math.sqrt(eps))  # the latter in half precision


def _solve(
    equations: _Equations,
    vectors: Array | None,
    come_in: Float[Array, "D 2"],
    begins: Array,
    *,
    mode: Mode,
    options: _Options,
) -> _Solved:
    """Newton's iterations; `come_in` is what the errors before have grown to, `begins` how many steps that were."""
    recurrence, instants, h0 = equations.recurrence, equations.recurrence.instants, equations.h0
    jacobian, kind, max_iterations = options
    at_rest = jnp.broadcast_to(h0, (recurrence.length, h0.size))
    first = at_rest if vectors is None else equations.held(vectors)
    eps = float(jnp.finfo(h0.dtype).eps)
    tolerance = _tolerance(eps)
    count_real = jnp.maximum(jnp.sum(recurrence.real), 1).astype(h0.dtype)
    begins = devices.vary(begins, devices.axes_of((recurrence, vectors, come_in)))

    def update(h: Array, f: Array, damping: Array, count: Array) -> tuple[Array, Array]:
        about = recurrence, equations.starts(h), instants, mode
        matrices: Any
        if jacobian == "blocks":
            matrices, sizes = factors.blocks(*about, count)
        else:
            matrices, sizes = factors.full(*about) if jacobian == "full" else factors.diagonals(*about)
        if kind == "scale":
            matrices = jax.tree.map(lambda a: damping * a, matrices)
        # Where differences grow only their signs are of use, which decide where states come to rest. What is larger
        # overflows, or takes all digits of the states that it is corrected to.
        most = jnp.max(jnp.where(jnp.isfinite(f), jnp.abs(f), 0)) / eps
        # After a state that is exact this is exactly zero, so that every iteration makes one more state exact at
        # least; also where it is not finite, and the plain evaluation stays.
        moved = factors.added(recurrence, matrices, f - h, most, 1 / damping - 1 if kind == "kalman" else None)
        new = f + jnp.where(jnp.isfinite(moved), moved, 0)
        return equations.held(jnp.where(jnp.isfinite(new), new, first)), sizes

    def in_real(a: Array) -> Array:
        """What is held in padding solves its equation, be it infinite."""
        return a if instants.real is None else jnp.where(instants.real[:, None], a, 0)

    def left(h: Array, f: Array) -> Array:
        return in_real(f - h)

    def rms(a: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.square(in_real(a))) / h0.size / count_real)

    def overshot(before: tuple[Array, Array], after: tuple[Array, Array]) -> Array:
        """Whether more is left of the equations, beside the states too: these may have to grow, and it with them."""
        (then, size_then), (now, size_now) = ((rms(f - h), jnp.minimum(rms(h), rms(f))) for h, f in (before, after))
        return ~((now <= then) | (now * size_then <= then * size_now))

    def unfinished(carry: Any) -> Array:
        _, _, (residual, before), count, _, _ = carry
        stuck = (residual <= tolerance) & (residual > 0.5 * before)
        return ~(residual <= min(_FEW * eps, tolerance)) & ~stuck & (count < max_iterations)

    def iterate(carry: Any) -> Any:
        h, f, (residual, _), count, residuals, damping = carry
        before = h, f
        h, abs_jac_times_state = update(h, f, damping, count)
        f = equations.advance(h)
        if kind is not None:
            damping = jnp.where(overshot(before, (h, f)), 0.5 * damping, jnp.minimum(1.0, _RECOVER * damping))
        both = jnp.max(_ratios(left(h, f), jnp.abs(h) + abs_jac_times_state)), residual
        return h, f, both, count + 1, residuals.at[count].set(rms(f - h)), damping

    def judged(h: Array, f: Array) -> tuple[Array, Array, Array, Array]:
        """The residual, how many equations do not hold, and the rest of what is known of a solution; by the Jacobians
        and sizes of the iterate itself: within the loop they are those of the one before, which may be others."""
        # Of another window others: the same ones would add up from window to window, or cancel within each.
        roundings = eps * signs(h.shape, h.dtype, after=begins * h0.size)
        grown, sizes = _propagated(recurrence, h, equations.starts(h), mode, left(h, f), roundings, come_in)
        ratios = _ratios(left(h, f), sizes)
        return jnp.max(ratios), jnp.sum(ratios > tolerance, dtype=jnp.int32), grown, sizes

    infinite, every = jnp.full_like(h0[0], jnp.inf), jnp.full_like(h0[0], first.size, jnp.int32)
    unknown = jnp.full_like(jnp.stack([first, first], axis=-1), jnp.inf), jnp.ones_like(first)

    def until_judged(carry: Any) -> Any:
        h, f, (before, _), _, count, residuals, damping = carry
        start = h, f, (infinite, infinite), count, residuals, damping
        h, f, (residual, _), count, residuals, damping = devices.while_loop(unfinished, iterate, start)
        not_held = residual, every, *unknown
        residual, open_, *judgement = devices.cond(residual <= tolerance, judged, lambda *_: not_held, h, f)
        return h, f, ((residual, open_), before), tuple(judgement), count, residuals, damping

    def goes_on(carry: Any) -> Array:
        _, _, ((residual, open_), (residual_before, open_before)), _, count, _, _ = carry
        # Where states decay to nothing, each iteration makes those exact that lie above a rounding of what it started
        # from: the largest residual stays what it is until none is left.
        better = (residual < 0.5 * residual_before) | (open_ < open_before)
        return (count == 0) | (~(residual <= tolerance) & better & (count < max_iterations))

    none = jnp.full(max_iterations, jnp.nan, h0.dtype)
    counts = jnp.zeros((), jnp.int32), none
    worst = (infinite, every), (infinite, every)
    start = first, equations.advance(first), worst, unknown, *counts, jnp.ones_like(infinite)
    h, _, ((residual, _), _), judgement, count, residuals, _ = devices.while_loop(goes_on, until_judged, start)
    grown, sizes = judgement
    return _Solved(h, residual, grown, sizes, count, residuals)


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


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _attached(recurrence: Recurrence, others: list[Array], h: Array, window: int) -> Array:
    """`h`, the solution of the recurrence, with the derivatives that this makes it have."""
    return differentiated_by_rule(h, differentiable_part(recurrence)[0])


@_attached.defjvp
def _differential(window: int, primals: PyTree, tangents: PyTree) -> tuple[Array, Array]:
    recurrence, others, h = primals
    h = _attached(*primals, window)
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
    starts = _Equations(recurrence, others).starts(h)
    return h, _carried_through(recurrence, starts, mode, offsets, window)


def _carried_through(recurrence: Recurrence, starts: State, mode: Mode, offsets: Array, chunk: int) -> Array:
    """The offsets, ``[T, D]``, through the exact Jacobians, those of a chunk of time at hand at once."""

    def through(before: Array, given: PyTree) -> tuple[Array, Array]:
        starts, instants, offsets = given
        matrices = factors.full(recurrence, starts, instants, mode)[0]
        total = affine_scan(
            matrices, offsets.at[0].add(_come_in(matrices, instants, before)), begins=instants.reset
        )
        return total[-1], total

    given, nothing = (starts, recurrence.instants, offsets), jnp.zeros_like(offsets[0])
    if chunk == recurrence.length:
        matrices = factors.full(recurrence, starts, recurrence.instants, mode)[0]
        return affine_scan(matrices, offsets, begins=recurrence.instants.reset)
    _, total = devices.scan(jax.checkpoint(through), nothing, _in_chunks(given, chunk))
    return _together(total, recurrence.length)


def _come_in(matrices: Array, instants: Instant, before: Array) -> Array:
    """What goes on from the chunk before."""
    come = matmul(matrices[0], before)
    return come if instants.reset is None else jnp.where(instants.reset[0], 0, come)


def _in_chunks(tree: PyTree, chunk: int) -> PyTree:
    """Leaves ``[T, ...]`` as ``[count, chunk, ...]``, the last with its last entry repeated."""

    def cut(a: Array) -> Array:
        fill = jnp.broadcast_to(a[-1], (-len(a) % chunk, *a.shape[1:]))
        return jnp.concatenate([a, fill]).reshape(-1, chunk, *a.shape[1:])

    return jax.tree.map(cut, tree)


def _together(tree: PyTree, steps: int) -> PyTree:
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:steps], tree)


def _ratios(difference: Array, size: Array) -> Array:
    """Of NaN infinity, for NaN would pass every comparison."""
    of, single = jnp.finfo(size.dtype), jnp.finfo(at_least_single(size.dtype))
    # Products below the range are flushed to zero: the sum of some that is just above it has few digits.
    least = max(float(of.tiny), float(single.tiny) / float(of.eps))
    ratio = jnp.where(difference == 0, 0, jnp.abs(difference) / jnp.maximum(size, least))
    return jnp.where(jnp.isnan(ratio), jnp.inf, ratio)


def _propagated(
    recurrence: Recurrence, h: Array, starts: State, mode: Mode, left: Array, roundings: Array, come_in: Array
) -> tuple[Array, Array]:
    """What is `left` of the equations, and one of the `roundings` of every number, ``[T, D]`` each, sent through the
    exact Jacobians, a chunk of time after the other: ``[T, D, 2]``. And ``|h| + |J| |start|``, ``[T, D]``, the sizes to
    which roundings are relative. In padding what was there before is held.
    """
    steps, size = h.shape
    chunk = max(1, min(steps, _CHUNK_NUMBERS // size**2))

    def body(before: Array, given: PyTree) -> tuple[Array, tuple[Array, Array]]:
        starts, instants, h, left, roundings = given
        matrices, abs_jac_times_state = factors.full(recurrence, starts, instants, mode)
        sizes = jnp.abs(h) + abs_jac_times_state
        errors = jnp.stack([left, sizes * roundings], axis=-1)
        if instants.real is not None:
            errors = jnp.where(instants.real[:, None, None], errors, 0)
        scan = partial(affine_scan, matrices, begins=instants.reset)
        total = jax.vmap(scan, -1, -1)(errors.at[0].add(_come_in(matrices, instants, before)))
        return total[-1], (total, sizes)

    _, found = devices.scan(body, come_in, _in_chunks((starts, recurrence.instants, h, left, roundings), chunk))
    return _together(found, steps)


def _vectors(state0: State, guess: State, steps: int) -> Array:
    expected: Any = jax.tree.map(lambda h: jax.ShapeDtypeStruct((steps, *h.shape), h.dtype), state0)
    got: Any = jax.tree.map(lambda h: jax.ShapeDtypeStruct(jnp.shape(h), jnp.result_type(h)), guess)
    if expected != got:
        raise ValueError(
            f"guess: expected a trajectory, like the result's states, {describe_shapes(expected)}, got "
            f"{describe_shapes(got)}"
        )
    vectors = jax.vmap(lambda h: ravel_state(h)[0])(jax.lax.stop_gradient(guess))
    return jnp.where(jnp.isfinite(vectors), vectors, 0)
