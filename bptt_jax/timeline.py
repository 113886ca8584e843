"""Which steps of a sequence count, where it begins anew, and how far its states are finite."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree


def resets_at_real_steps(resets: Bool[Array, " T"], real: Bool[Array, " T"]) -> Bool[Array, " T"]:
    """The resets, those in the padding moved to the next real step."""
    index = jnp.arange(len(resets))
    last_reset = jax.lax.cummax(jnp.where(resets, index, -1))
    last_real = jnp.concatenate([jnp.full(1, -1), jax.lax.cummax(jnp.where(real, index, -1))[:-1]])
    return real & (last_reset > last_real)


def before_reset(resets: Bool[Array, " T"]) -> Bool[Array, " T"]:
    """Whether a reset lies between the step and the end of the sequence."""
    return jnp.sum(resets) > jnp.cumsum(resets)


def after_reset(resets: Bool[Array, " T"]) -> Bool[Array, " T"]:
    """Whether a reset lies between the first step and this one."""
    return jnp.cumsum(resets.at[0].set(False)) > 0


def real_steps_first(real: Bool[Array, " T"]) -> Int[Array, " T"]:
    """Indices: those of the real steps in their order, then those of the padding."""
    return jnp.argsort(~real, stable=True)


def last_real_step(real: Bool[Array, " T"]) -> Int[Array, " T"]:
    """For every instant the index of the real step whose state it shows; -1 before the first."""
    return jax.lax.cummax(jnp.where(real, jnp.arange(len(real)), -1))


def finite_steps(states: PyTree) -> Bool[Array, " T"]:
    """For every instant whether all floating numbers of the state are finite, given leaves ``[T, ...]``."""
    leaves = [a for a in jax.tree.leaves(states) if jnp.issubdtype(a.dtype, jnp.inexact)]
    return jnp.stack([jnp.all(jnp.isfinite(a.reshape(len(a), -1)), axis=1) for a in leaves]).all(axis=0)
