"""Trajectories seen in the eigenvectors of a Jacobian."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Complex

from bptt_jax.checks import check_leaves, type_name
from bptt_jax.linalg.eigensystem import Eigensystem
from bptt_jax.linalg.precision import matmul
from bptt_jax.step import Array, State, ravel_state


def modal_coordinates(states: State, system: Eigensystem, *, origin: State = None) -> Complex[Array, "T D"]:
    """How much of each eigenvector there is in every state: the left eigenvectors' products with it.

    With c = the result, ``h_t - origin = system.right @ c[t]``. Where the recurrence is linear about the origin, a
    fixed point, each coordinate goes its own way: ``c[t + 1, k] = system.values[k] * c[t, k]``.

    Args:
      states: leaves ``[T, ...]``, as from `bptt_jax.unroll`.
      system: of one Jacobian, D x D: from `bptt_jax.eigensystem`.
      origin: a state, from which all are measured: the fixed point at which the Jacobian was taken, say. By default
        zero.

    Returns:
      ``[T, D]``, complex; those of a conjugate pair are conjugate where states are real, as all are here: a complex
      state counts as its real and imaginary parts, as in `bptt_jax.ravel_state`.

    Raises:
      TypeError, ValueError: `system` is no `Eigensystem`, or one of another size than the states; the leaves do not
        have one T; `origin` is not like one state.

    Example:
      >>> w = jnp.array([[0.9, 1.0], [0.0, 0.5]])
      >>> states = bptt.unroll(lambda w, h, x: w @ h, w, jnp.array([0.0, 0.4]), length=3)
      >>> bptt.analysis.modal_coordinates(states, bptt.eigensystem(w)).real.round(2)
      Array([[ 0.9 , -0.54],
             [ 0.81, -0.27],
             [ 0.73, -0.13]], dtype=float32)
    """
    if not isinstance(system, Eigensystem):
        raise TypeError(f"system: expected an Eigensystem, of bptt_jax.eigensystem, got {type_name(system)}")
    check_leaves("states", states)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(states)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(f"states: expected leaves [T, ...] of one T, got {sorted(lengths) or 'none'}")
    states = jax.tree.map(jnp.asarray, states)
    vectors = jax.vmap(lambda h: ravel_state(h)[0])(states)
    size = vectors.shape[1]
    if system.left.shape != (size, size):
        raise ValueError(
            f"system: expected left [{size}, {size}], one of D = {size}, got {list(system.left.shape)}"
        )
    if origin is not None:
        vectors = vectors - _like_one(origin, states).astype(vectors.dtype)[None]
    return matmul(vectors.astype(system.left.dtype), system.left.T)


def _like_one(origin: Any, states: State) -> Array:
    check_leaves("origin", origin)
    wanted: Any = jax.tree.structure(states)
    given: Any = jax.tree.structure(origin)
    if wanted != given:
        raise ValueError(f"origin: expected a state of the structure {wanted}, got {given}")
    for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(origin), strict=True):
        if a.shape[1:] != jnp.shape(b):
            raise ValueError(
                f"origin: expected a leaf {list(a.shape[1:])}, as in the states, got {list(jnp.shape(b))}"
            )
    return ravel_state(jax.tree.map(jnp.asarray, origin))[0]
