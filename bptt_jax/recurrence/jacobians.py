"""Exact per-step Jacobians dh_k/dh_{k-1}."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float

from bptt_jax import devices
from bptt_jax.checks import check_choice
from bptt_jax.recurrence.linearization import Mode, differentiation_mode
from bptt_jax.recurrence.unroll import states_of
from bptt_jax.step import (
    Array,
    Input,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    differentiable_part,
    full_precision,
    ravel_state,
)


def jacobians(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree = None,
    *,
    length: int | None = None,
    mode: Mode | None = None,
) -> Float[Array, "T D D"]:
    """The Jacobian of every step along the trajectory.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      mode: "forward", column by column (`jax.jacfwd`), or "reverse", row by row, of the step's backward pass: what
        backpropagation through time multiplies. They differ only where a step's derivative is not that of its
        values (`jax.custom_vjp`: surrogate gradients). None: forward where the step has it; else reverse.

    Returns:
      ``[T, D, D]``: entry k is dh_{k+1}/dh_k, rows are outputs. D counts the floating numbers of the state, in the
      order of `bptt_jax.ravel_state`; a complex one counts as its real and imaginary parts. After a reset it is the
      derivative with respect to the state that the step starts from (``bptt_jax.jacobian_product(..., resets=)``
      knows that nothing passes a reset); in padding, where the state is held, it is the identity.

    Raises:
      TypeError, ValueError: an argument breaks the contract, or the step cannot be differentiated by `mode`.

    Products of matrices within the Jacobian are in full precision on every device, those of the trajectory in the
    precision that JAX is set to. On a CPU write the products of your own step as ``weights @ h``: the Jacobians of
    ``h @ weights`` take 1.3 to 3.7 times as long.

    Example:
      >>> step = lambda w, h, x: w @ h + x
      >>> w = jnp.array([[0.5, 1.0], [0.0, 2.0]])
      >>> bptt.jacobians(step, w, jnp.zeros(2), jnp.ones((10, 2)))[0]
      Array([[0.5, 1. ],
             [0. , 2. ]], dtype=float32)
    """
    if mode is not None:
        check_choice("mode", mode, "forward", "reverse")
    return _jacobians(bind(step, params, state0, xs, length), mode=mode)


@partial(devices.compiled, checked=True)
def _jacobians(recurrence: Recurrence, *, mode: Mode | None) -> Array:
    recurrence = check_step(recurrence)
    starts = recurrence.starts(states_of(recurrence))
    mode = differentiation_mode(recurrence, mode)
    found = jacobians_at(recurrence.step, recurrence.params, starts, recurrence.instants.x, mode)
    if recurrence.instants.real is None:
        return found
    return jnp.where(recurrence.real[:, None, None], found, jnp.eye(recurrence.size, dtype=found.dtype))


def jacobians_at(step: Step, params: Params, starts: State, xs: Input, mode: Mode) -> Float[Array, "K D D"]:
    """The Jacobian of the step at each of K given states (leaves ``[K, ...]``) and inputs."""
    return jax.vmap(partial(jacobian_at, step, params, mode=mode))(starts, xs)


def jacobian_at(step: Step, params: Params, state: State, x: Input, mode: Mode) -> Float[Array, "D D"]:
    """The Jacobian of the step at one state and input.

    Under `jax.vmap` over states the basis of tangents stays unbatched: what is linear in the state with constant
    weights (W h) is differentiated once for all states.
    """
    vector, unravel = ravel_state(state)

    def leaves(v: Array) -> list[Array]:
        new = jax.tree.leaves(differentiable_part(step(params, unravel(v), x))[0])
        return [ravel_state(leaf)[0].astype(v.dtype) for leaf in new]

    with full_precision():
        if mode == "reverse":
            _, pull = jax.vjp(lambda v: jnp.concatenate(leaves(v)), vector)
            rows = devices.vary(jnp.eye(vector.size, dtype=vector.dtype), devices.axes_of(vector))
            return jax.vmap(lambda row: pull(row)[0])(rows)
        columns = jax.jacfwd(leaves)(vector)
    # Joined after differentiation: joined within it, Jacobians of an LSTM took 2.5 to 6 times as long on CPU.
    return jnp.concatenate(columns)
