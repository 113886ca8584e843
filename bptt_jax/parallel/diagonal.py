"""Recurrences that are linear in the state, unit by unit: in O(log T) rounds instead of T steps."""

from functools import partial

import jax
import jax.numpy as jnp

from bptt_jax.linalg.affine import affine_scan
from bptt_jax.recurrence.diagonal import DiagonalStep
from bptt_jax.step import Array, Input, Params, PyTree, Recurrence, State, Step, bind, check_step


def unroll_linear(
    step: Step, params: Params, state0: State, xs: PyTree = None, *, length: int | None = None
) -> State:
    """All states of a `DiagonalStep`, as `bptt_jax.unroll` gives them, by one associative scan for each leaf.

    O(log T) rounds and O(T D) work instead of T steps (Martin, Cundy 2018, arXiv:1709.04057); its derivatives, of
    any order, cost one such scan each. Memory is O(T D), for gradients too. The scan forms products of the factors:
    those of ``|a| > 1`` overflow, to infinity or NaN, even where a state near 0 would still have been finite.

    Args:
      step: a `DiagonalStep`, such as the steps of `bptt_jax.lru` and `bptt_jax.min_gru`.
      params, state0, xs, length: as for `bptt_jax.unroll`.

    Returns:
      h_1 .. h_T, a pytree like `state0` with leaves ``[T, ...]``: ``states[k]`` is h_{k+1}.

    Raises:
      TypeError, ValueError: `step` is no `DiagonalStep`, or an argument breaks the contract.

    Example:
      >>> @bptt.DiagonalStep
      ... def decay(rate, x):
      ...     return rate, x
      >>> bptt.unroll_linear(decay, 0.5, jnp.zeros(1), jnp.ones((3, 1)))
      Array([[1.  ],
             [1.5 ],
             [1.75]], dtype=float32)
    """
    if not isinstance(step, DiagonalStep):
        raise TypeError(
            "step: expected a bptt_jax.DiagonalStep, as lru and min_gru have, got "
            f"{type(step).__name__}; for steps that are not linear in the state there is bptt_jax.deer"
        )
    return _states(step, bind(step, params, state0, xs, length))


@partial(jax.jit, static_argnames="step")
def _states(step: DiagonalStep, recurrence: Recurrence) -> State:
    recurrence = check_step(recurrence)
    params, state0, xs, steps = recurrence.params, recurrence.state0, recurrence.instants.x, recurrence.length

    def like_state(coefficients: State) -> State:
        return jax.tree.map(lambda h, c: jnp.broadcast_to(c, h.shape).astype(h.dtype), state0, coefficients)

    def at(x: Input) -> tuple[State, State]:
        a, b = step.at(params, state0, x)
        return like_state(a), like_state(b)

    return jax.tree.map(_scan, state0, *jax.vmap(at, axis_size=steps)(xs))


def _scan(h0: Array, a: Array, b: Array) -> Array:
    """``[T, ...]``: the states of one leaf; the start goes into b_1."""
    flat = a.shape[0], h0.size
    b = b.at[0].add(a[0] * h0)
    return affine_scan(a.reshape(flat), b.reshape(flat)).reshape(b.shape)
