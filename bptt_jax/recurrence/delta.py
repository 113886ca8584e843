"""Steps that are linear in a state that is a matrix: they scale its columns, and add something of rank one to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax.checks import check_function
from bptt_jax.recurrence.diagonal import DiagonalStep, check_coefficients, pickled_by_name
from bptt_jax.step import Array, Input, Params, State


@dataclass(frozen=True)
class DeltaStep:
    """A step ``S_t = S_{t-1} (diag(a_t) + u_t w_t^T) + b_t`` of matrices ``[..., V, K]``, the generalised delta rule,
    whose coefficients do not depend on the state.

    The delta rule (Schlag et al. 2021, arXiv:2102.11174) has ``a = 1, u = -beta k, w = k, b = beta v k^T``. It is a
    `Step` like any other, and `unroll_linear` evaluates it in parallel. Two of the same function are equal and share
    what JAX has compiled, so define it once, at the top of a module; it can be used as a decorator.

    Attributes:
      coefficients: pure function ``(params, x) -> (a, u, w, b)``, each of the structure of the state: where that has
        a leaf ``[..., V, K]``, a, u and w have one ``[..., K]`` and b one ``[..., V, K]``, or broadcast to these.

    Raises:
      TypeError: `coefficients` is no function.

    Example:
      >>> @bptt.parallel.DeltaStep
      ... def rule(params, x):
      ...     return 1.0, -x["k"], x["k"], x["v"][:, None] * x["k"][None, :]
      >>> xs = {"k": jnp.asarray([[1.0, 0.0], [1.0, 0.0]]), "v": jnp.asarray([[5.0], [7.0]])}
      >>> bptt.unroll_linear(rule, None, jnp.zeros((1, 2)), xs)  # the second value replaces the first
      Array([[[5., 0.]],
      <BLANKLINE>
             [[7., 0.]]], dtype=float32)
    """

    coefficients: Callable[[Params, Input], tuple[State, State, State, State]]

    def __post_init__(self) -> None:
        check_function("coefficients", self.coefficients, "coefficients(params, x) -> (a, u, w, b)")

    def __reduce__(self) -> Any:
        return pickled_by_name(self)

    def __call__(self, params: Params, state: State, x: Input) -> State:
        return jax.tree.map(_advanced, state, *self.at(params, state, x))

    def at(self, params: Params, state: State, x: Input) -> tuple[State, State, State, State]:
        """The coefficients, of which the leaves may still want to be broadcast.

        Raises:
          TypeError, ValueError: they are not four of the state's structure, or do not go into its shapes.
        """
        found = self.coefficients(params, x)
        check_coefficients(found, self.like(state))
        return found

    def like(self, state: State) -> dict[str, State]:
        """By the names of the coefficients what their leaves are like when they have been broadcast."""
        rows = jax.tree.map(lambda h: jax.ShapeDtypeStruct(_row(h), jnp.result_type(h)), state)
        return {"a": rows, "u": rows, "w": rows, "b": state}


LinearStep = DiagonalStep | DeltaStep


def _row(h: Array) -> tuple[int, ...]:
    """``[..., K]``."""
    shape = jnp.shape(h)
    if len(shape) < 2:
        raise ValueError(f"state0: expected matrices [..., V, K], which a DeltaStep multiplies, got {list(shape)}")
    return *shape[:-2], shape[-1]


def _advanced(h: Array, a: Array, u: Array, w: Array, b: Array) -> Array:
    a, u, w = (jnp.broadcast_to(c, _row(h))[..., None, :] for c in (a, u, w))
    return a * h + jnp.sum(h * u, axis=-1, keepdims=True) * w + jnp.broadcast_to(b, h.shape)
