"""Recurrences ``S_t = S_{t-1} (diag(a_t) + u_t w_t^T) + b_t`` of matrices, in parallel over time, by chunks."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from bptt_jax import devices
from bptt_jax.linalg.precision import matmul


class Factors(NamedTuple):
    """``diag(a) + u w^T``, each ``[T, K]``."""

    a: Array
    u: Array
    w: Array


def rank_one_scan(
    factors: Factors,
    offsets: Inexact[Array, "T V K"],
    *,
    begins: Bool[Array, " T"] | None = None,
    reverse: bool = False,
) -> Inexact[Array, "T V K"]:
    """All S_t of ``S_t = S_{t-1} (diag(a_t) + u_t w_t^T) + b_t``, from ``S_0 = 0``: a start belongs into b_1.

    The derivatives are such recurrences too, u and w exchanged, and are solved as such, one scan each.

    Args:
      factors: a, u, w; the first of each is never used.
      offsets: b, ``[T, V, K]``.
      begins: where True, ``S_t = b_t``, whatever comes before: it may have overflowed. None: nowhere.
      reverse: go backwards in time, ``S_t`` from ``S_{t+1}``; then the last factor is never used.

    Returns:
      ``[T, V, K]``, in the order of time.
    """

    def matvec(s: Array) -> Array:
        earlier = _before(s, reverse)
        added = multiply(factors, earlier)
        return s - (added if begins is None else jnp.where(begins[:, None, None], 0, added))

    def solve(_: object, b: Array) -> Array:
        return _scan(factors, b, begins, reverse=reverse)

    def transpose_solve(_: object, b: Array) -> Array:
        # As of `affine_scan`: the factor of the next instant, transposed, and the other way in time.
        following = Factors(*(_before(c, not reverse) for c in (factors.a, factors.w, factors.u)))
        return _scan(following, b, None if begins is None else _before(begins, not reverse), reverse=not reverse)

    return jax.lax.custom_linear_solve(matvec, offsets, solve, transpose_solve)


def multiply(factors: tuple[Array, ...], s: Array) -> Array:
    """``[..., V, K]``: matrices times ``diag(a) + u w^T``, of a, u and w ``[..., K]``."""
    a, u, w = (c[..., None, :] for c in factors)
    return a * s + jnp.sum(s * u, axis=-1, keepdims=True) * w


@devices.compiled
def _scan(factors: Factors, offsets: Array, begins: Array | None, *, reverse: bool) -> Array:
    anew = jnp.zeros(len(offsets), bool) if begins is None else begins
    # As for full factors (`affine_scan`): chunks take K times the work, for which a CPU has too few cores.
    in_order, in_chunks = partial(_in_order, reverse=reverse), partial(_in_chunks, reverse=reverse)
    return jax.lax.platform_dependent(factors, offsets, anew, cpu=in_order, default=in_chunks)


def _in_chunks(factors: Factors, offsets: Array, begins: Array, *, reverse: bool) -> Array:
    """The maps from the beginning of each chunk, of all chunks at once; then the states from chunk to chunk.

    About sqrt(T) steps twice. Maps are multiplied, never divided by products of a, which vanish.
    """
    steps, (values, keys) = len(offsets), offsets.shape[1:]
    size = math.isqrt(steps - 1) + 1
    chunks = -(-steps // size)

    def by_place(c: Array) -> Array:
        """``[size, chunks, ...]``, with steps at the end that count for nothing."""
        c = jnp.flip(c, 0) if reverse else c
        more = jnp.zeros((size * chunks - steps, *c.shape[1:]), c.dtype)
        return jnp.moveaxis(jnp.concatenate([c, more]).reshape(chunks, size, *c.shape[1:]), 1, 0)

    def body(maps: tuple[Array, Array, Array], at: tuple[Factors, Array, Array]) -> tuple[tuple, tuple]:
        product, state, begun = maps
        factors, offset, anew = at
        fresh = anew[:, None, None]
        product = jnp.where(fresh, 0, multiply(factors, product))
        state = jnp.where(fresh, 0, multiply(factors, state)) + offset
        maps = product, state, begun | anew
        return maps, maps

    one = jnp.broadcast_to(jnp.eye(keys, dtype=offsets.dtype), (chunks, keys, keys))
    start = one, jnp.zeros((chunks, values, keys), offsets.dtype), jnp.zeros(chunks, bool)
    given = jax.tree.map(by_place, (factors, offsets, begins))
    ends, maps = devices.scan(body, start, given)

    def onwards(state: Array, end: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        return _from(state, *end), state

    starts = devices.scan(onwards, jnp.zeros((values, keys), offsets.dtype), ends)[1]
    states = _from(jnp.broadcast_to(starts, maps[1].shape), *maps)
    states = jnp.moveaxis(states, 0, 1).reshape(size * chunks, values, keys)[:steps]
    return jnp.flip(states, 0) if reverse else states


def _in_order(factors: Factors, offsets: Array, begins: Array, *, reverse: bool) -> Array:
    def body(s: Array, at: tuple[Factors, Array, Array]) -> tuple[Array, Array]:
        factors, offset, anew = at
        s = jnp.where(anew, 0, multiply(factors, s)) + offset
        return s, s

    return devices.scan(body, jnp.zeros_like(offsets[0]), (factors, offsets, begins), reverse=reverse)[1]


def _from(state: Array, product: Array, added: Array, begun: Array) -> Array:
    # What was before a beginning may have overflowed.
    return jnp.where(begun[..., None, None], 0, matmul(state, product)) + added


def _before(a: Array, reverse: bool) -> Array:
    """What stands one instant earlier in the order of the recursion; zero at its beginning."""
    zero = jnp.zeros_like(a[:1])
    return jnp.concatenate([a[1:], zero] if reverse else [zero, a[:-1]])
