"""Singular values with one matrix to a block of threads: a Pallas kernel, and a candidate of `spectra_routes.py`.

One-sided Jacobi (Hestenes): rows of a matrix are turned against each other, two by two, until all are orthogonal;
their norms are the singular values. A round turns half as many pairs as there are rows at once: of rows whose numbers
differ by the same bits (``p ^ q = m``), so that a sweep is one round for each m, and no row moves. The whole is one
launch, where `cusolverDnXsyevBatched`, to which the package leaves it, takes many.

It is lowered by way of Triton (in JAX 0.12 still, with a warning that it will not be for ever), which gives a kernel
no say over shared memory: a matrix lies in the device's memory and is kept by the caches. The 256 KB of first-level
cache of each multiprocessor of an H100 hold one matrix of 256 rows in float32, or four of 128; larger ones come from
the second level. Rows are padded to a power of two with zeros, as Triton wants it. On an H100 it is the fastest up to
64 rows, by 1.2 to 2 over the next, and errs by 1.5e-5 of the largest at 128 and 8e-5 at 512 rows, more than is allowed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from bptt_jax.linalg.logscale import LogScaled

_SWEEPS = 30  # as many as LAPACK's gesvj
_AT_ONCE = 8192  # numbers of a group of pairs, in registers


def jacobi_singular_values(matrices: jax.Array, *, interpret: bool = False) -> jax.Array:
    """``[..., M, N] -> [..., min(M, N)]``, descending; real.

    Each errs by a modest multiple of the rounding of the largest. NaN where it did not converge.

    Args:
      matrices: a stack; no NaN and no infinity among them.
      interpret: by array operations, on any device.
    """
    *batch, rows, columns = matrices.shape
    if rows > columns:
        rows, columns, matrices = columns, rows, matrices.mT
    scaled = LogScaled.of(matrices, axes=len(batch))
    flat = scaled.mantissa.reshape(-1, rows, columns)
    height, width = pl.next_power_of_2(max(rows, 2)), pl.next_power_of_2(columns)
    padded = jnp.pad(flat, ((0, 0), (0, height - rows), (0, width - columns)))
    of_each = pl.BlockSpec((None, height, width), lambda i: (i, 0, 0))
    _, values = pl.pallas_call(
        partial(_turn_all, barrier=(lambda: None) if interpret else triton.debug_barrier),
        out_shape=(padded, jax.ShapeDtypeStruct((len(padded), height), padded.dtype)),
        grid=(len(padded),),
        in_specs=[of_each],
        out_specs=(of_each, pl.BlockSpec((None, height), lambda i: (i, 0))),
        input_output_aliases={0: 0},
        # One stage: loads are not to be moved before the stores that they wait for.
        compiler_params=triton.CompilerParams(num_warps=min(max(height * width // 1024, 1), 8), num_stages=1),
        interpret=interpret,
    )(padded)
    descending = jnp.sort(values, axis=-1, descending=True)[:, :rows].reshape(*batch, rows)
    return LogScaled(descending, scaled.exponent).value


def _turn_all(_: Any, matrix: Any, values: Any, *, barrier: Any) -> None:
    # What it is given lies where `matrix` does.
    height, width = matrix.shape
    group = max(1, min(height, _AT_ONCE // width) // 2)  # of pairs
    eps = float(jnp.finfo(matrix.dtype).eps)
    limit = width**0.5 * eps

    def numbers(first: Any, count: int) -> jax.Array:
        return first * count + jax.lax.iota(jnp.int32, count)

    def turn(m: Any, high: Any, first: Any, largest: Any) -> Any:
        k = numbers(first, group)
        p = 2 * k - (k & (high - 1))  # the k-th number without the highest bit of m
        x, y = matrix[p, :], matrix[p ^ m, :]
        of_x, of_y, product = (jnp.sum(a, axis=1) for a in (x * x, y * y, x * y))
        scale = jnp.sqrt(of_x) * jnp.sqrt(of_y)
        # Below eps^2 either row is lost in the rounding of the largest numbers, or it changes by less than that.
        skew = jnp.abs(product) > jnp.maximum(limit * scale, eps * eps)
        ratio = (of_y - of_x) / jnp.where(skew, 2 * product, 1)
        tangent = jnp.where(ratio < 0, -1.0, 1.0) / (jnp.abs(ratio) + jnp.sqrt(1 + ratio * ratio))
        tangent = jnp.where(skew, tangent, 0)
        cosine = 1 / jnp.sqrt(1 + tangent * tangent)
        c, s = cosine[:, None], (cosine * tangent)[:, None]
        matrix[p, :], matrix[p ^ m, :] = c * x - s * y, s * x + c * y
        return jnp.maximum(largest, jnp.max(skew.astype(jnp.int32)))

    def sweep(carry: tuple[Any, Any]) -> tuple[Any, Any]:
        def round_of(m: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            high, turned = carry
            high = jnp.where(m == 2 * high, m, high)
            turned = jax.lax.fori_loop(0, height // 2 // group, partial(turn, m, high), turned)
            barrier()
            return high, turned

        start = jnp.int32(1), jnp.int32(0)
        _, turned = jax.lax.fori_loop(jnp.int32(1), jnp.int32(height), round_of, start)
        return carry[0] + 1, turned

    def unfinished(carry: tuple[Any, Any]) -> Any:
        return (carry[1] > 0) & (carry[0] < _SWEEPS)

    _, turned = jax.lax.while_loop(unfinished, sweep, (jnp.int32(0), jnp.int32(1)))

    def norm(first: Any, _: Any) -> None:
        rows = numbers(first, 2 * group)
        found = jnp.sqrt(jnp.sum(matrix[rows, :] * matrix[rows, :], axis=1))
        values[rows] = jnp.where(turned > 0, jnp.nan, found)

    jax.lax.fori_loop(0, height // (2 * group), norm, None)
