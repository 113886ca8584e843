"""Truncated backpropagation through time."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from bptt_jax import devices
from bptt_jax.analysis.backward import linearize_for
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.checks import check_positive_int
from bptt_jax.recurrence.linearization import cut, require_pulls
from bptt_jax.step import Array, Loss, Params, PyTree, Recurrence, State, Step, bind, choose, differentiable_part
from bptt_jax.timeline import moved_to_real_steps, numbers_in_piece


def tbptt(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    key: PRNGKeyArray | None = None,
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
      key: not looked at; there is nothing random.
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
      >>> [float(bptt.estimators.tbptt(*problem, k1=1, k2=k)) for k in (1, 2, 4)]
      [1.75, 2.5, 2.75]
    """
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss, args)
    steps = recurrence.length
    k1, k2 = check_positive_int("k1", k1), check_positive_int("k2", k2)
    if k2 < k1:
        raise ValueError(f"k2: expected at least k1 = {k1}, or losses are dropped, got {k2}")
    return _tbptt(recurrence, bound, k1=min(k1, steps), k2=min(k2, steps))


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


@partial(devices.compiled, checked=True)
def _tbptt(recurrence: Recurrence, loss: BoundLoss, *, k1: int, k2: int) -> Params:
    given, along = recurrence.params, linearize_for(recurrence, loss)
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
    found = along.pull_made(along.contract_made(along.residuals, adjoints))
    return devices.summed_like(found, differentiable_part(given)[0])
