"""Truncated backpropagation through time, what it loses, and real-time recurrent learning, which loses nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bptt_jax.analysis.adjoints import adjoints
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.checks import check_positive_int
from bptt_jax.linalg import logscale
from bptt_jax.recurrence.linearization import Linearization, linearize, require_pulls
from bptt_jax.recurrence.unroll import states_of
from bptt_jax.results import Result, field
from bptt_jax.step import (
    Array,
    Loss,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    differentiable_part,
    ravel_state,
)


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
    length: int | None = None,
) -> Params:
    """The gradient of TBPTT(k1, k2) at fixed parameters (Williams, Peng 1990: BPTT(h; h') with h = k2, h' = k1).

    After every k1 steps (and at the end) the losses of the steps since the last time are sent back, through the
    latest k2 steps. Windows of k1 = k2 are disjoint; with k2 > k1 they overlap and still count every loss once.
    The forward pass is never cut.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      loss: ``loss(states) -> scalar``; its immediate derivative with respect to each state is that step's loss.
      k1: steps between two backward passes.
      k2: steps that each goes back; at least k1, for otherwise losses would be dropped. ``k2 >= T`` is full BPTT.

    Returns:
      A pytree like `params`; None at parameters that are not floating.

    Raises:
      TypeError, ValueError: an argument breaks the contract, or k2 < k1.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> problem = step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0]
      >>> [float(bptt.tbptt_gradient(*problem, k1=1, k2=k)) for k in (1, 2, 4)]
      [1.75, 2.5, 2.75]
    """
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss)
    steps = recurrence.length
    k1, k2 = check_positive_int("k1", k1), check_positive_int("k2", k2)
    if k2 < k1:
        raise ValueError(f"k2: expected at least k1 = {k1}, or losses are dropped, got {k2}")
    return _tbptt_gradient(recurrence, bound, min(k1, steps), min(k2, steps))


def truncation_bias(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    longest: int | None = None,
    length: int | None = None,
) -> TruncationBias:
    """The bias of truncating every loss's error signal after K steps, for all K at once.

    Entry K - 1 compares ``tbptt_gradient(k1=1, k2=K)`` with the full gradient. All windows come from one pass over
    K: the error signals of all losses are carried back together, one step each, and what they add to the gradient
    is summed.

    Args:
      step, params, state0, xs, loss, length: as for `bptt_jax.adjoints`.
      longest: the largest window, T by default.

    Returns:
      `TruncationBias`. Cost O(T * longest) Jacobian products, memory O(T * D).

    Raises:
      TypeError, ValueError: an argument breaks the contract.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> problem = step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0]
      >>> bptt.truncation_bias(*problem).relative_error
      Array([0.364, 0.091, 0.   , 0.   ], dtype=float32)
    """
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss)
    steps = recurrence.length
    longest = steps if longest is None else min(check_positive_int("longest", longest), steps)
    full = adjoints(step, params, state0, xs, loss, length=steps).params_grad
    return _truncation_bias(recurrence, bound, full, longest)


def rtrl_gradient(
    step: Step, params: Params, state0: State, xs: PyTree, loss: Loss, *, length: int | None = None
) -> Params:
    """The full gradient, forward in time: real-time recurrent learning (Williams, Zipser 1989).

    Carries the sensitivities ``S_t = dh_t/dparams = J_t S_{t-1} + (immediate)`` and adds ``(dl/dh_t)^T S_t``:
    exact, no backward pass through time, memory O(D * P) however long the sequence, time O(D^2 * P) a step.

    Args, Raises: as for `bptt_jax.adjoints`.

    Returns:
      dL/dparams, equal to `adjoints`' ``params_grad``; None at parameters that are not floating.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> float(bptt.rtrl_gradient(step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0]))
      2.75
    """
    return _rtrl_gradient(bind(step, params, state0, xs, length), bind_loss(loss))


def _linearized(recurrence: Recurrence, loss: BoundLoss) -> tuple[Linearization, State]:
    along = linearize(recurrence)
    require_pulls(along, "truncation")
    return along, loss.differentiate(along.states).states


@partial(jax.jit, static_argnames=("k1", "k2"))
def _tbptt_gradient(recurrence: Recurrence, loss: BoundLoss, k1: int, k2: int) -> Params:
    along, immediate = _linearized(recurrence, loss)
    params, steps = recurrence.params, recurrence.length
    # A window ends after steps k1, 2 k1, .. and after the last; padding in front gives all of them k2 steps.
    ends = jnp.minimum(k1 * (1 + jnp.arange(-(-steps // k1))), steps)

    def padded(a: Array) -> Array:
        return jnp.concatenate([jnp.repeat(a[:1], k2, axis=0), a])

    residuals, immediate = jax.tree.map(padded, (along.residuals, immediate))
    age = jnp.arange(k2)[::-1]

    def window(total: Params, inputs: tuple[Array, Array]) -> tuple[Params, None]:
        end, fresh = inputs
        inside = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, end, k2), (residuals, immediate))
        real = age < end  # the padding repeats the first step: its share of the gradient is masked

        def body(later: State, at_t: PyTree) -> tuple[State, State]:
            (residuals_t, immediate_t), age_t, real_t = at_t
            counted = jax.tree.map(lambda d: jnp.where(age_t < fresh, d, 0), immediate_t)
            adjoint = jax.tree.map(lambda a, b: jnp.where(real_t, a + b, 0), later, counted)
            return along.pull(residuals_t, adjoint), adjoint

        nothing = along.no_cotangents
        _, adjoints = jax.lax.scan(body, nothing, (inside, age, real), reverse=True)
        return jax.tree.map(jnp.add, total, along.pull_params(inside[0], adjoints)), None

    fresh = jnp.diff(ends, prepend=0)
    nothing = jax.tree.map(jnp.zeros_like, differentiable_part(params)[0])
    return jax.lax.scan(window, nothing, (ends, fresh))[0]


@partial(jax.jit, static_argnames="longest")
def _truncation_bias(recurrence: Recurrence, loss: BoundLoss, full: Params, longest: int) -> TruncationBias:
    along, immediate = _linearized(recurrence, loss)
    pull = jax.vmap(along.pull)
    log_full = logscale.log_norm(full)

    def inner(a: Params, b: Params) -> Array:
        # Only the angle matters, so both are brought to a size whose square every float holds.
        a, b = (logscale.normalize(tree, jnp.zeros((), jnp.int32))[0] for tree in (a, b))
        return jax.tree.reduce(jnp.add, jax.tree.map(lambda u, v: jnp.real(jnp.vdot(u, v)), a, b))

    def body(carry: tuple[State, Params], _: None) -> tuple[tuple[State, Params], tuple[Array, Array]]:
        # signals[t] is what arrives at h_{t+1} of the loss that lies `lag` steps later.
        signals, total = carry
        total = jax.tree.map(jnp.add, total, along.pull_params(along.residuals, signals))
        error = jnp.exp(logscale.log_norm(jax.tree.map(jnp.subtract, total, full)) - log_full)
        cosine = inner(total, full) / jnp.sqrt(inner(total, total) * inner(full, full))
        earlier = pull(along.residuals, signals)
        signals = jax.tree.map(lambda a: jnp.concatenate([a[1:], jnp.zeros_like(a[:1])]), earlier)
        return (signals, total), (cosine, error)

    start = immediate, jax.tree.map(jnp.zeros_like, full)
    _, (cosine, error) = jax.lax.scan(body, start, None, length=longest)
    return TruncationBias(1 + jnp.arange(longest), cosine, error)


@jax.jit
def _rtrl_gradient(recurrence: Recurrence, loss: BoundLoss) -> Params:
    recurrence = check_step(recurrence)
    step, xs = recurrence.step, recurrence.instants.x
    moving, merge = differentiable_part(recurrence.params)
    theta, unravel_params = ravel_state(moving)
    h0, unravel_state = ravel_state(recurrence.state0)
    immediate = _real_vectors(loss.differentiate(states_of(recurrence)).states)

    def body(
        carry: tuple[Array, Array, Array], at_t: tuple[PyTree, Array]
    ) -> tuple[tuple[Array, Array, Array], None]:
        h, sensitivities, total = carry
        x, immediate_t = at_t

        def vector_step(theta: Array, h: Array) -> Array:
            return ravel_state(step(merge(unravel_params(theta)), unravel_state(h), x))[0]

        h, push = jax.linearize(vector_step, theta, h)
        sensitivities = jax.vmap(push, in_axes=(0, 1), out_axes=1)(
            jnp.eye(theta.size, dtype=theta.dtype), sensitivities
        )
        return (h, sensitivities, total + immediate_t @ sensitivities), None

    start = h0, jnp.zeros((h0.size, theta.size), h0.dtype), jnp.zeros_like(theta)
    (_, _, total), _ = jax.lax.scan(body, start, (xs, immediate))
    return jax.tree.map(jnp.conj, unravel_params(total))


def _real_vectors(cotangents: State) -> Array:
    """``[T, D]``: derivatives by real and imaginary parts; JAX's cotangent of x + iy is dL/dx - i dL/dy."""
    return jax.vmap(lambda d: ravel_state(jax.tree.map(jnp.conj, d))[0])(cotangents)
