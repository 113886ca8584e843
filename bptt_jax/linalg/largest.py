"""The largest singular value of every matrix of a stack, on a CPU: without the others, in half the time of all."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from bptt_jax import devices
from bptt_jax.linalg.lapack import on_one_thread
from bptt_jax.linalg.precision import matmul


def _tridiagonal(matrices: Array) -> Array:
    """Of Hermitian matrices ``[..., N, N]`` the diagonal and, behind a zero, the squares beside it: ``[..., 2, N]``."""
    _, diagonal, beside, _ = jax.lax.linalg.tridiagonal(matrices)
    return jnp.stack([diagonal, jnp.pad(beside * beside, [(0, 0)] * (beside.ndim - 1) + [(1, 0)])], axis=-2)


tridiagonal = on_one_thread(_tridiagonal, (2,))


def largest_singular_value(matrices: Array) -> Array:
    """``[..., M, N] -> [...]``, of entries of about 1: to a few roundings.

    The root of the largest eigenvalue of ``A^H A``, where squares, which cost the small ones their digits, cost
    nothing. That is reduced to tridiagonal form by LAPACK and found by bisection in all matrices at once.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        matrices = matrices.mT
    (reduced,) = tridiagonal(matmul(matrices.mT.conj(), matrices))
    return jnp.sqrt(_largest_eigenvalue(reduced))


def _largest_eigenvalue(reduced: Array) -> Array:
    """Of positive semidefinite tridiagonal matrices ``[..., 2, N]``.

    x is above all eigenvalues of T where every pivot of x - T is positive (Golub and Van Loan, Matrix Computations,
    4th edition, 8.4.1). One pivot of every matrix a round: loops within loops take twice as long to compile.
    """
    size, kind = reduced.shape[-1], jnp.finfo(reduced.dtype)
    columns = jnp.moveaxis(reduced, -1, 0)
    trace = jnp.sum(reduced[..., 0, :], axis=-1)  # at least the largest, and at most N times that

    def next_pivot(i: Array, at: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # The value lies between `low` and ``low + 2 * half``; the pivots are those of x = low + half.
        pivot, low, half = at
        row = i % size
        diagonal, squares = jnp.moveaxis(jax.lax.dynamic_index_in_dim(columns, row, keepdims=False), -1, 0)
        anew = row == 0
        low = jnp.where(anew & (pivot <= 0), low + half, low)
        half = jnp.where(anew, half / 2, half)
        new = low + half - diagonal - jnp.where(anew, 0, squares / jnp.maximum(pivot, kind.tiny))
        return jnp.where(anew | (pivot > 0), new, pivot), low, half

    rounds = kind.nmant + math.ceil(math.log2(size))  # to a quarter of a rounding of the root
    # In the first round ``low`` is to stay, whatever the pivot: 0, and the trace above.
    pivot, low, half = devices.fori_loop(0, rounds * size, next_pivot, (jnp.ones_like(trace), 0 * trace, trace))
    return jnp.where(pivot > 0, low + half / 2, low + 1.5 * half)
