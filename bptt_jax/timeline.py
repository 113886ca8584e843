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


def reset_at_the_end(resets: Bool[Array, " T"], real: Bool[Array, " T"]) -> Bool[Array, ""]:
    """Whether a reset stands in the padding behind the last real step, where there is none for it to lead into."""
    index = jnp.arange(len(resets))
    return jnp.max(jnp.where(resets, index, -1)) > jnp.max(jnp.where(real, index, -1))


def before_reset(resets: Bool[Array, " T"]) -> Bool[Array, " T"]:
    """Whether a reset lies between the step and the end of the sequence."""
    return jnp.sum(resets) > jnp.cumsum(resets)


def after_reset(resets: Bool[Array, " T"], real: Bool[Array, " T"] | None = None) -> Bool[Array, " T"]:
    """Whether a reset lies between the first real step and this one; `resets` are at real steps."""
    first = 0 if real is None else jnp.argmax(real)
    return jnp.cumsum(resets.at[first].set(False)) > 0


def numbers_in_piece(real: Bool[Array, " T"], resets: Bool[Array, " T"]) -> Int[Array, " T"]:
    """The number of each step within its piece, real ones counted, from 1; `resets` are at real steps."""
    count = jnp.cumsum(real)
    return count - jax.lax.cummax(jnp.where(resets, count - 1, 0))


def number_pieces(real: Bool[Array, " T"], resets: Bool[Array, " T"]) -> Int[Array, " T"]:
    """The piece of each real step, by the number of resets up to it; -1 in padding. `resets` are at real steps."""
    return jnp.where(real, jnp.cumsum(resets, dtype=jnp.int32), -1)


def real_steps_first(real: Bool[Array, " T"]) -> Int[Array, " T"]:
    """Indices: those of the real steps in their order, then those of the padding."""
    return jnp.argsort(~real, stable=True)


def last_real_step(real: Bool[Array, " T"]) -> Int[Array, " T"]:
    """For every instant the index of the real step whose state it shows; -1 before the first."""
    return jax.lax.cummax(jnp.where(real, jnp.arange(len(real)), -1))


def moved_to_real_steps(tree: PyTree, real: Bool[Array, " T"]) -> PyTree:
    """Leaves ``[T, ...]`` with what stands in padding added to the last real step, whose state is held there."""
    owner = last_real_step(real)
    owner = jnp.where(owner < 0, len(real), owner)  # what comes before the first belongs to none
    return jax.tree.map(lambda a: jnp.zeros_like(a).at[owner].add(a, mode="drop"), tree)


def finite_steps(states: PyTree) -> Bool[Array, " T"]:
    """For every instant whether all floating numbers of the state are finite, given leaves ``[T, ...]``."""
    leaves = [a for a in jax.tree.leaves(states) if jnp.issubdtype(a.dtype, jnp.inexact)]
    return jnp.stack([jnp.all(jnp.isfinite(a.reshape(len(a), -1)), axis=1) for a in leaves]).all(axis=0)
