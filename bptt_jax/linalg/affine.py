"""Affine recurrences ``h_t = A_t h_{t-1} + b_t`` in parallel over time, by associative scan (Blelloch 1990)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from bptt_jax import devices
from bptt_jax.linalg.precision import matmul


def affine_scan(
    factors: Inexact[Array, "T D D"] | Inexact[Array, "T D"],
    offsets: Inexact[Array, "T D"],
    *,
    begins: Bool[Array, " T"] | None = None,
    reverse: bool = False,
) -> Inexact[Array, "T D"]:
    """All h_t of ``h_t = A_t h_{t-1} + b_t``, from ``h_0 = 0``: a start belongs into b_1.

    The derivatives are affine recurrences too and are solved as such, one scan each, instead of differentiating the
    rounds of the scan.

    Args:
      factors: A, ``[T, D, D]``, or ``[T, D]`` for diagonal ones; the first is never used.
      offsets: b, ``[T, D]``.
      begins: where True, ``h_t = b_t``, whatever comes before: it may have overflowed. None: nowhere.
      reverse: go backwards in time, ``h_t = A_t h_{t+1} + b_t``; then the last factor is never used.

    Returns:
      ``[T, D]``, in the order of time. O(log T) rounds; T D^2 numbers for full factors, which a CPU takes in order.
    """
    diagonal = factors.ndim == 2

    def matvec(h: Array) -> Array:
        return h - carried(factors, h, begins=begins, reverse=reverse)

    def solve(_: object, b: Array) -> Array:
        return _scan(factors, b, begins, None, reverse=reverse)

    def transpose_solve(_: object, b: Array) -> Array:
        # (I - A S)^T = I - S^T A^T: the factor of the next instant, transposed, and the other way in time.
        following = _before(factors if diagonal else factors.mT, not reverse)
        anew = None if begins is None else _before(begins, not reverse)
        return _scan(following, b, anew, None, reverse=not reverse)

    return jax.lax.custom_linear_solve(matvec, offsets, solve, transpose_solve)


def held_scan(
    factors: Float[Array, "T D D"] | Float[Array, "T D"],
    offsets: Float[Array, "T D"],
    most: Float[Array, ""],
    *,
    begins: Bool[Array, " T"] | None = None,
) -> Float[Array, "T D"]:
    """As `affine_scan`, but what grows beyond `most` is held there, and keeps its direction: what turns while it grows
    comes out at the right phase. With diagonal factors each unit is held by itself.

    In the rounds of the scan products of factors are held too, where they grow 1 / eps times: nothing overflows.
    """
    return _scan(factors, offsets, begins, most, reverse=False)


def carried(factors: Array, h: Array, *, begins: Array | None = None, reverse: bool = False) -> Array:
    """``A_t h_{t-1}`` for all t, zero for the first: what the recurrence adds to its offsets."""
    added = _apply(factors, _before(h, reverse))
    return added if begins is None else jnp.where(begins[:, None], 0, added)


class _Map(NamedTuple):
    """``h -> factor h + offset``, or the constant `offset` where it `begins`."""

    factor: Array
    offset: Array
    begins: Array | None


@devices.compiled
def _scan(factors: Array, offsets: Array, begins: Array | None, most: Array | None, *, reverse: bool) -> Array:
    in_rounds = partial(_associative, reverse=reverse)
    if factors.ndim == 2:
        return in_rounds(factors, offsets, begins, most)
    # The rounds multiply matrices, where one after the other takes vectors, D times less work. A CPU has too few cores
    # to make up for that, and log T rounds, each compiled by itself, are dear.
    in_order = partial(_sequential, reverse=reverse)
    return jax.lax.platform_dependent(factors, offsets, begins, most, cpu=in_order, default=in_rounds)


def _associative(
    factors: Array, offsets: Array, begins: Array | None, most: Array | None, *, reverse: bool
) -> Array:
    axes = (-2, -1) if factors.ndim == 3 else ()

    def combine(near: _Map, far: _Map) -> _Map:
        factor, offset = _compose(far.factor, near.factor), _apply(far.factor, near.offset) + far.offset
        if most is not None:
            factor = _held(factor, 1 / float(jnp.finfo(factors.dtype).eps), axes)
            offset = _held(offset, most, axes[1:])
        if near.begins is None or far.begins is None:
            return _Map(factor, offset, None)
        return _Map(factor, jnp.where(far.begins[:, None], far.offset, offset), near.begins | far.begins)

    return jax.lax.associative_scan(combine, _Map(factors, offsets, begins), reverse=reverse).offset


def _sequential(
    factors: Array, offsets: Array, begins: Array | None, most: Array | None, *, reverse: bool
) -> Array:
    def body(h: Array, at: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        factor, offset, anew = at
        h = offset + jnp.where(anew, 0, _apply(factor, h))
        h = h if most is None else _held(h, most, (-1,) if factors.ndim == 3 else ())
        return h, h

    anew = jnp.zeros(len(offsets), bool) if begins is None else begins
    anew = anew.at[-1 if reverse else 0].set(True)
    return devices.scan(body, jnp.zeros_like(offsets[0]), (factors, offsets, anew), reverse=reverse)[1]


def _held(a: Array, most: Array | float, axes: tuple[int, ...]) -> Array:
    """What is beyond `most` held there; along `axes`, if any, with all that is more than a rounding beside it, which
    keeps the direction. What is less may belong to units that do not grow."""
    if not axes:
        return jnp.clip(a, -most, most)
    of = jnp.finfo(a.dtype)
    a = jnp.clip(a, -float(of.max), float(of.max))
    largest = jnp.max(jnp.abs(a), axis=axes, keepdims=True)
    growing = (largest > most) & (jnp.abs(a) > float(of.eps) * most)
    return jnp.where(growing, a / largest * most, a)


def _before(a: Array, reverse: bool) -> Array:
    """What stands one instant earlier in the order of the recursion; zero at its beginning."""
    zero = jnp.zeros_like(a[:1])
    return jnp.concatenate([a[1:], zero] if reverse else [zero, a[:-1]])


# GPUs and TPUs multiply float32 in reduced precision by default.
def _apply(factors: Array, h: Array) -> Array:
    if factors.ndim == h.ndim:
        return factors * h
    return jnp.einsum("...ij,...j->...i", factors, h, precision=jax.lax.Precision.HIGHEST)


def _compose(far: Array, near: Array) -> Array:
    return far * near if far.ndim == 2 else matmul(far, near)
