"""Recurrences that are linear in the state, unit by unit: in O(log T) rounds instead of T steps."""

from functools import partial

import jax
import jax.numpy as jnp

from bptt_jax import devices
from bptt_jax.linalg.affine import affine_scan
from bptt_jax.recurrence.diagonal import DiagonalStep
from bptt_jax.step import Array, Input, Instant, Params, PyTree, Recurrence, State, Step, bind, check_step


def unroll_linear(
    step: Step, params: Params, state0: State, xs: PyTree = None, *, length: int | None = None
) -> State:
    """All states of a `DiagonalStep`, as `bptt_jax.unroll` gives them, by one associative scan for each leaf.

    O(log T) rounds and O(T D) work instead of T steps (Martin, Cundy 2018, arXiv:1709.04057); its derivatives, of
    any order, cost one such scan each. Memory is O(T D), for gradients too. The scan forms products of the factors:
    those of ``|a| > 1`` overflow, to infinity or NaN, even where a state near 0 would still have been finite.

    Args:
      step: a `DiagonalStep`, such as the steps of `bptt_jax.cells.lru` and `bptt_jax.cells.min_gru`.
      params, state0, xs, length: as for `bptt_jax.unroll`.

    Returns:
      h_1 .. h_T, a pytree like `state0` with leaves ``[T, ...]``: ``states[k]`` is h_{k+1}, in padding the state
      that is held.

    Raises:
      TypeError, ValueError: `step` is no `DiagonalStep`, or an argument breaks the contract.

    Example:
      >>> @bptt.parallel.DiagonalStep
      ... def decay(rate, x):
      ...     return rate, x
      >>> bptt.unroll_linear(decay, 0.5, jnp.zeros(1), jnp.ones((3, 1)))
      Array([[1.  ],
             [1.5 ],
             [1.75]], dtype=float32)
    """
    if not isinstance(step, DiagonalStep):
        raise TypeError(
            "step: expected a bptt_jax.parallel.DiagonalStep, as lru and min_gru have, got "
            f"{type(step).__name__}; for steps that are not linear in the state there is bptt_jax.deer"
        )
    return _states(bind(step, params, state0, xs, length), step=step)


@devices.compiled
def _states(recurrence: Recurrence, *, step: DiagonalStep) -> State:
    recurrence = check_step(recurrence)
    params, state0, instants = recurrence.params, recurrence.state0, recurrence.instants

    def like_state(coefficients: State) -> State:
        return jax.tree.map(lambda h, c: jnp.broadcast_to(c, h.shape).astype(h.dtype), state0, coefficients)

    def at(x: Input) -> tuple[State, State]:
        a, b = step.at(params, state0, x)
        return like_state(a), like_state(b)

    coefficients = jax.vmap(at, axis_size=recurrence.length)(instants.x)
    # Without resets there is no such state, and none is needed.
    reset_state = state0 if recurrence.reset_state is None else recurrence.reset_state
    return jax.tree.map(partial(_scan, instants), state0, reset_state, *coefficients)


def _scan(instants: Instant, h0: Array, reset_state: Array, a: Array, b: Array) -> Array:
    """``[T, ...]``: the states of one leaf; what a step starts from anew goes into its b."""
    shape, flat = b.shape, (a.shape[0], h0.size)
    a, b, h0, reset_state = a.reshape(flat), b.reshape(flat), h0.ravel(), reset_state.ravel()
    if instants.reset is not None:
        b = jnp.where(instants.reset[:, None], a * reset_state[None] + b, b)
    if instants.real is not None:
        a, b = (jnp.where(instants.real[:, None], c, held) for c, held in ((a, 1), (b, 0)))
    start = a[0] * h0 if instants.reset is None else jnp.where(instants.reset[0], 0, a[0] * h0)
    return affine_scan(a, b.at[0].add(start), begins=instants.reset).reshape(shape)
