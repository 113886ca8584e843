"""One step, and what it makes of directions at the state that it starts from: no residual is kept."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from bptt_jax.devices import axes_of, vary
from bptt_jax.linalg.precision import matmul
from bptt_jax.recurrence.linearization import differentiation_mode
from bptt_jax.step import Array, Instant, Recurrence, State, full_precision, ravel_state

TangentStep: TypeAlias = Callable[[State, Instant, Array], tuple[State, Array, Array]]

# Up to so many numbers of state a Jacobian is formed row by row, of a step that has no other way to push.
_DENSE = 1024


def tangent_step(recurrence: Recurrence, what: str) -> TangentStep:
    """The step of a checked recurrence, with directions.

    A step that has a backward pass alone (`jax.custom_vjp`) pushes by the transpose of its pull; where that cannot
    be turned round (it clips, or loops), by its Jacobian, formed of D pulls.

    Args:
      recurrence: to be traced.
      what: needs it; named in errors.

    Returns:
      ``(h, at, directions [num, D]) -> (new h, its vector [D], new directions [num, D])``: reset before the step if
      there is a reset; directions belong to the state that the step starts from. In padding it has no meaning.

    Raises:
      TypeError: when it is traced: the step cannot be differentiated, or has pulls alone and too large a state.
    """
    mode = differentiation_mode(recurrence)

    def along(h: State, at: Instant, directions: Array) -> tuple[State, Array, Array]:
        vector, unravel = ravel_state(recurrence.begin(h, at))

        def move(v: Array) -> tuple[Array, tuple[State, Array]]:
            new = recurrence.step(recurrence.params, unravel(v), at.x)
            moved = ravel_state(new)[0]
            return moved, (new, moved)

        rows = vary(directions.astype(vector.dtype), axes_of(vector))
        with full_precision():  # in less, the shorter directions would drown in its rounding
            if mode == "forward":
                _, push, (new, moved) = jax.linearize(move, vector, has_aux=True)
                pushed = jax.vmap(push)(rows)
            else:
                _, pull, (new, moved) = jax.vjp(move, vector, has_aux=True)
                pushed = _pushed(lambda c: pull(c)[0], vector, rows, what)
        return new, moved, pushed.astype(directions.dtype)

    return along


def _pushed(pull: Callable[[Array], Array], vector: Array, rows: Array, what: str) -> Array:
    def push(direction: Array) -> Array:
        return jax.linear_transpose(pull, vector)(direction)[0]

    try:
        jax.eval_shape(push, vector)
    except Exception as fault:  # of JAX, which raises some five types here
        if vector.size > _DENSE:
            raise TypeError(_refusal(what, vector.size, fault)) from fault
        jacobian = jax.vmap(pull)(vary(jnp.eye(vector.size, dtype=vector.dtype), axes_of(vector)))
        return matmul(rows, jacobian.T)
    return jax.vmap(push)(rows)


def _refusal(what: str, size: int, fault: Any) -> str:
    lines = str(fault).strip().splitlines() or [""]
    return (
        f"step: {what} needs pushes (Jacobian-vector products), and it has pulls alone, of a jax.custom_vjp, that "
        f"cannot be turned round ({type(fault).__name__}: {lines[0][:200]}); write its derivative as a "
        f"jax.custom_jvp, or bring a state of at most {_DENSE} numbers, whose Jacobian is formed row by row, "
        f"instead of D = {size}"
    )
