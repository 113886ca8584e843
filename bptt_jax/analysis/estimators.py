"""Truncated backpropagation through time, what it loses, and real-time recurrent learning, which loses nothing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bptt_jax import devices
from bptt_jax.analysis.backward import backward
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.checks import check_positive_int
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.linalg.precision import matmul
from bptt_jax.recurrence.linearization import cut, differentiation_mode, linearize, require_pulls
from bptt_jax.recurrence.unroll import states_of
from bptt_jax.results import Result, field
from bptt_jax.step import (
    Array,
    Instant,
    Loss,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    choose,
    differentiable_part,
    ravel_state,
)
from bptt_jax.timeline import moved_to_real_steps, numbers_in_piece, real_steps_first


class TruncationBias(Result):
    """How far the truncated gradient is from the full one, for every window.

    Attributes:
      windows: ``[K]``: 1 .. K steps.
      cosine: ``[K]``, of the angle between the two; NaN where one is zero.
      relative_error: ``[K]``, ``||truncated - full|| / ||full||``; NaN where the full one is zero.
    """

    windows: Int[Array, " K"] = field(dims=("windows",))
    cosine: Float[Array, " K"] = field(dims=("windows",))
    relative_error: Float[Array, " K"] = field(dims=("windows",))

    def _headline(self) -> str:
        longest = int(self.windows[-1])
        off = np.flatnonzero(~(np.asarray(self.relative_error) <= 0.1))
        enough = 1 + off[-1] if off.size else 0  # the first window from which on all are good
        if enough == longest:
            return f"no window of up to {longest} steps comes within 10 % of the full gradient for good"
        return f"from a window of {int(self.windows[enough])} steps on within 10 % of the full gradient"


def tbptt_gradient(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    k1: int,
    k2: int,
    args: PyTree = None,
    length: int | None = None,
) -> Params:
    """The gradient of TBPTT(k1, k2) at fixed parameters (Williams, Peng 1990: BPTT(h; h') with h = k2, h' = k1).

    After every k1 steps (and at the end) the losses of the steps since the last time are sent back, through the
    latest k2 steps. Windows of k1 = k2 are disjoint; with k2 > k1 they overlap and still count every loss once.
    The forward pass is never cut. Padding has no steps to count, and after a reset counting begins anew, so that
    the pieces of a sequence have the windows that they have alone.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      loss, args: as for `bptt_jax.adjoints`. The immediate derivative with respect to each state is that step's
        loss.
      k1: steps between two backward passes.
      k2: steps that each goes back; at least k1, for otherwise losses would be dropped. ``k2 >= T`` is full BPTT.

    Returns:
      A pytree like `params`; None at parameters that are not floating. Cost: some T k2 / k1 products with
      transposed Jacobians, k2 / k1 of them at a time; memory O(T D + k2 / k1 D).

    Raises:
      TypeError, ValueError: an argument breaks the contract, k2 < k1, or the step has no backward pass.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> problem = step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0]
      >>> [float(bptt.tbptt_gradient(*problem, k1=1, k2=k)) for k in (1, 2, 4)]
      [1.75, 2.5, 2.75]
    """
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss, args)
    steps = recurrence.length
    k1, k2 = check_positive_int("k1", k1), check_positive_int("k2", k2)
    if k2 < k1:
        raise ValueError(f"k2: expected at least k1 = {k1}, or losses are dropped, got {k2}")
    return _tbptt_gradient(recurrence, bound, k1=min(k1, steps), k2=min(k2, steps))


def truncation_bias(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    longest: int | None = None,
    args: PyTree = None,
    length: int | None = None,
) -> TruncationBias:
    """The bias of truncating every loss's error signal after K steps, for all K at once.

    Entry K - 1 compares ``tbptt_gradient(k1=1, k2=K)`` with the full gradient. All windows come from one pass over
    K: the error signals of all losses are carried back together, one step each, and what they add to the gradient
    is summed.

    Args:
      step, params, state0, xs, loss, args, length: as for `bptt_jax.adjoints`.
      longest: the largest window in real steps, T by default.

    Returns:
      `TruncationBias`. Cost O(T * longest) Jacobian products, memory O(T * D).

    Raises:
      TypeError, ValueError: an argument breaks the contract, or the step has no backward pass.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> problem = step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0]
      >>> bptt.truncation_bias(*problem).relative_error
      Array([0.364, 0.091, 0.   , 0.   ], dtype=float32)
    """
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss, args)
    steps = recurrence.length
    longest = steps if longest is None else min(check_positive_int("longest", longest), steps)
    return _truncation_bias(recurrence, bound, longest=longest)


def rtrl_gradient(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    args: PyTree = None,
    length: int | None = None,
) -> Params:
    """The full gradient, forward in time: real-time recurrent learning (Williams, Zipser 1989).

    Carries the sensitivities ``S_t = dh_t/dparams = J_t S_{t-1} + (immediate)`` and adds ``(dl/dh_t)^T S_t``:
    exact, no backward pass through time, memory O(D * P) however long the sequence, time O(D^2 * P) a step. The
    sensitivities hold in padding and are zero after a reset. States that the loss does not read do no harm, be they
    not finite.

    Args:
      step, params, state0, xs, loss, args, length: as for `bptt_jax.adjoints`.

    Returns:
      dL/dparams, equal to `adjoints`' ``params_grad``; None at parameters that are not floating.

    Raises:
      TypeError, ValueError: an argument breaks the contract.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> float(bptt.analysis.rtrl_gradient(step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0]))
      2.75
    """
    return _rtrl_gradient(bind(step, params, state0, xs, length), bind_loss(loss, args))


class _Windows(NamedTuple):
    """What truncated backpropagation carries backwards: the error signals of the windows that have not ended.

    Attributes:
      signals: like the state, leaves ``[W, ...]``, the latest to begin first; zero if there are fewer.
      left: ``[W]``, the steps that each has still to go.
      is_last: whether the step before, the next to come, is the last one of its piece.
    """

    signals: State
    left: Array
    is_last: Array


@devices.compiled
def _tbptt_gradient(recurrence: Recurrence, loss: BoundLoss, *, k1: int, k2: int) -> Params:
    given, along = recurrence.params, linearize(recurrence)
    require_pulls(along, "truncation")
    recurrence = along.recurrence
    immediate = loss.differentiate(along.states).states
    if recurrence.instants.real is not None:
        immediate = moved_to_real_steps(immediate, recurrence.instants.real)
    # Windows end k1 steps apart, but for the last of a piece.
    most = -(-k2 // k1) + 1

    def shifted(a: Array) -> Array:
        return jnp.concatenate([jnp.zeros_like(a[:1]), a[:-1]])

    def body(windows: _Windows, at_t: tuple[PyTree, State, Array]) -> tuple[_Windows, State]:
        residuals, immediate_t, number = at_t
        begun = _Windows(
            jax.tree.map(shifted, windows.signals), shifted(windows.left).at[0].set(k2), jnp.asarray(False)
        )
        signals, left, _ = choose(windows.is_last | (number % k1 == 0), begun, windows)
        signals = jax.tree.map(lambda a, b: a.at[0].add(b), signals, immediate_t)
        adjoint = jax.tree.map(lambda a: jnp.sum(a, axis=0), signals)
        pulled = cut(residuals, jax.vmap(along.pull, (None, 0))(residuals, signals))
        earlier = jax.vmap(lambda more, a: choose(more, a, along.no_cotangents))(left > 1, pulled)
        is_last = jnp.asarray(False) if residuals.reset is None else residuals.reset
        after = _Windows(earlier, jnp.maximum(left - 1, 0), is_last)
        return after if residuals.real is None else choose(residuals.real, after, windows), adjoint

    nothing = jax.tree.map(lambda a: jnp.zeros((most, *a.shape), a.dtype), along.no_cotangents)
    start = _Windows(nothing, jnp.zeros(most, jnp.int32), jnp.asarray(True))
    numbers = numbers_in_piece(recurrence.real, recurrence.resets)
    _, adjoints = devices.scan(body, start, (along.residuals, immediate, numbers), reverse=True)
    return devices.summed_like(along.pull_params(along.residuals, adjoints), differentiable_part(given)[0])


@devices.compiled
def _truncation_bias(recurrence: Recurrence, loss: BoundLoss, *, longest: int) -> TruncationBias:
    done = backward(recurrence, loss)
    along, immediate, full = done.along, done.loss.states, done.params_grad.value
    residuals, real = along.residuals, along.recurrence.instants.real
    if real is not None:
        immediate = moved_to_real_steps(immediate, real)
        order = real_steps_first(real)
        residuals, immediate = jax.tree.map(lambda a: a[order], (residuals, immediate))

    def inner(a: LogScaled, b: LogScaled) -> Array:
        # Only the angle matters, and the mantissas are of a size whose square every float holds; in half precision
        # the sum may be none.
        dtype = a.log_norm.dtype
        pairs = zip(jax.tree.leaves(a.mantissa), jax.tree.leaves(b.mantissa), strict=True)
        return sum((jnp.sum(jnp.real(u.conj() * v), dtype=dtype) for u, v in pairs), jnp.zeros((), dtype))

    def earlier(a: Array) -> Array:
        return jnp.concatenate([a[1:], jnp.zeros_like(a[:1])])

    def body(carry: tuple[State, Params], _: None) -> tuple[tuple[State, Params], tuple[Array, Array]]:
        # signals[t] is what arrives at h_{t+1} of the loss that lies `lag` steps later.
        signals, total = carry
        total = jax.tree.map(jnp.add, total, along.pull_params(residuals, signals))
        truncated, whole = LogScaled.of(total), LogScaled.of(full)
        missing = LogScaled.of(jax.tree.map(jnp.subtract, total, full)).log_norm
        squares = inner(truncated, truncated) * inner(whole, whole)
        nothing, none = whole.log_norm == -jnp.inf, squares == 0
        error = jnp.where(nothing, jnp.nan, missing - jnp.where(nothing, 0, whole.log_norm))
        cosine = jnp.where(none, jnp.nan, inner(truncated, whole) / jnp.sqrt(jnp.where(none, 1, squares)))
        pulled = jax.vmap(lambda r, signal: cut(r, along.pull(r, signal)))(residuals, signals)
        return (jax.tree.map(earlier, pulled), total), (cosine, jnp.exp(error))

    start = immediate, jax.tree.map(jnp.zeros_like, full)
    _, (cosine, error) = devices.scan(body, start, None, length=longest)
    return TruncationBias(1 + jnp.arange(longest), cosine, error)


@devices.compiled
def _rtrl_gradient(recurrence: Recurrence, loss: BoundLoss) -> Params:
    given, recurrence = recurrence.params, check_step(recurrence)
    mode = differentiation_mode(recurrence)
    moving, merge = differentiable_part(recurrence.params)
    theta, unravel_params = ravel_state(moving)
    size, dtype = recurrence.size, ravel_state(recurrence.state0)[0].dtype
    axes = devices.axes_of(recurrence.state0)
    cotangents = loss.differentiate(states_of(recurrence)).states
    # The cotangent of x + iy is dL/dx - i dL/dy, while Jacobians act on (x, y).
    immediate = jax.vmap(lambda d: ravel_state(jax.tree.map(jnp.conj, d))[0])(cotangents)

    def body(
        carry: tuple[State, Array, Array], at_t: tuple[Instant, Array]
    ) -> tuple[tuple[State, Array, Array], None]:
        h, sensitivities, total = carry
        at, immediate_t = at_t
        vector, unravel = ravel_state(recurrence.begin(h, at))

        def moved(theta: Array, vector: Array) -> tuple[Array, State]:
            new = recurrence.step(merge(unravel_params(theta)), unravel(vector), at.x)
            return ravel_state(new)[0], new

        start = sensitivities if at.reset is None else jnp.where(at.reset, 0, sensitivities)
        if mode == "forward":
            _, push, new = jax.linearize(moved, theta, vector, has_aux=True)
            directions = devices.vary(jnp.eye(theta.size, dtype=theta.dtype), axes)
            pushed = jax.vmap(push, in_axes=(0, 1), out_axes=1)(directions, start)
        else:
            _, pull, new = jax.vjp(moved, theta, vector, has_aux=True)
            by_params, by_state = jax.vmap(pull)(devices.vary(jnp.eye(size, dtype=dtype), axes))
            pushed = by_params.astype(dtype) + matmul(by_state, start)
        after = new, pushed
        if at.real is not None:
            after = choose(at.real, after, (h, sensitivities))
        # What is not read may be infinite, and zero times that is NaN.
        read = jnp.where(immediate_t[:, None] == 0, 0, after[1])
        return (*after, total + matmul(immediate_t, read).astype(theta.dtype)), None

    nothing = devices.vary(jnp.zeros((size, theta.size), dtype), axes)
    start = recurrence.state0, nothing, jnp.zeros_like(theta)
    (_, _, total), _ = devices.scan(body, start, (recurrence.instants, immediate), length=recurrence.length)
    return devices.summed_like(jax.tree.map(jnp.conj, unravel_params(total)), differentiable_part(given)[0])
