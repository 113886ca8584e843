"""Singular values and eigenvalues of a whole stack of matrices at a time.

For GPUs, whose libraries take large stacks matrix by matrix, but for symmetric ones: singular values are found from
these. For eigenvalues every operation below is one over the whole stack, the last axis of all arrays there, so that
neighbouring threads read neighbouring numbers. No product of matrices is used: its precision is the hardware's choice.
Work is in the precision of the matrices, each divided by a power of two first.

Both are backward stable: the values found are exact ones of A + E with ``||E|| <= c eps ||A||``, c of the order of
the size at worst. A singular value so errs by ``c eps`` of the largest, however small it is itself. An eigenvalue
errs by that times its condition number; of a defective matrix, by a root of it. No balancing beforehand.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bptt_jax import devices
from bptt_jax.linalg.logscale import normalize, shift
from bptt_jax.linalg.precision import matmul

# Steps of a sweep between two looks at how far it must go: on a GPU each look is a wait for the device.
_STEPS_AT_ONCE = 8
_SWEEPS_PER_ROW = 30


def batched_singular_values(matrices: Array) -> Array:
    """``[..., M, N] -> [..., min(M, N)]``, descending.

    In single precision, where JAX has double (`jax_enable_x64`), roots of the eigenvalues of ``A^H A``, in double: its
    rounding is lost in that of A. Elsewhere squares would lose half the digits, and they are the upper eigenvalues of
    ``[[0, A], [A^H, 0]]`` (Golub and Van Loan, Matrix Computations, 4th edition, 8.6.1), A made square before.
    """
    rows, columns = matrices.shape[-2:]
    if rows < columns:
        rows, columns, matrices = columns, rows, matrices.mT
    real = jnp.finfo(matrices.dtype).dtype
    if real == jnp.float32 and jax.config.read("jax_enable_x64"):
        double = matrices.astype(jnp.complex128 if jnp.iscomplexobj(matrices) else jnp.float64)
        squares = jnp.linalg.eigvalsh(matmul(double.mT.conj(), double))
        return jnp.sqrt(jnp.maximum(squares[..., ::-1], 0)).astype(real)
    if rows > columns:
        matrices = jnp.linalg.qr(matrices, mode="r")
    zero = jnp.zeros_like(matrices)
    both = jnp.block([[zero, matrices], [matrices.mT.conj(), zero]])
    return jnp.maximum(jnp.linalg.eigvalsh(both)[..., : -columns - 1 : -1], 0)


def batched_eigenvalues(matrices: Array) -> Array:
    """``[..., N, N] -> [..., N]``, complex; of real matrices in exact conjugate pairs, positive angle first.

    Householder reduction to Hessenberg form, then Francis' QR iterations with double shifts. A sweep passes through
    all matrices at the same rows, and through all blocks into which a matrix has fallen. NaN for a matrix that has
    not converged after as many sweeps as LAPACK allows.
    """
    stack, exponents = _stack_last(matrices)
    values = shift(_hessenberg_eigenvalues(_hessenberg(stack)), exponents[None])
    return values.T.reshape(matrices.shape[:-1])


def _stack_last(matrices: Array) -> tuple[Array, Array]:
    """``[..., M, N] -> [M, N, stack]`` with entries below 1, and the exponents of two taken out."""
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    return jax.vmap(lambda a: normalize(a, jnp.int32(0)), out_axes=-1)(flat)


def _reflector(x: Array, pivot: Array | int) -> tuple[Array, Array]:
    """``[n, stack]``: u and t of the unitary ``1 - u t^H`` that makes all of x zero but the pivot; t = 0 for x = 0.

    t = 2 u / |u|^2 from u as it was rounded, so that the product is unitary to the last bits.
    """
    largest = jnp.max(jnp.abs(x), axis=0, keepdims=True)
    x = x / jnp.where(largest == 0, 1, largest).astype(x.dtype)  # squares of what is tiny would vanish
    norm, first = (r.astype(x.dtype) for r in (jnp.sqrt(_square(x)), jnp.abs(x[pivot])))
    phase = jnp.where(first == 0, 1, x[pivot] / jnp.where(first == 0, 1, first))
    u = x.at[pivot].add(phase * norm)
    length = _square(u).astype(x.dtype)[None]
    return u, 2 * u / jnp.where(length == 0, 1, length)


def _square(x: Array) -> Array:
    return jnp.sum(x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x, axis=0)


def _hessenberg(a: Array) -> Array:
    """Of which what lies below the first subdiagonal is left as it comes out, though it stands for zero."""
    size = len(a)
    index = jnp.arange(size)[:, None]

    def step(k: Array, a: Array) -> Array:
        u, t = _reflector(jnp.where(index > k, a[:, k], 0), k + 1)
        y = jnp.sum(t.conj()[:, None] * a, axis=0)
        z = jnp.sum(a * u[None], axis=1)
        z = z - u * jnp.sum(y * u, axis=0, keepdims=True)
        return a - u[:, None] * y[None] - z[:, None] * t.conj()[None]

    return devices.fori_loop(0, size - 2, step, a)


class _Blocks(NamedTuple):
    """The diagonal blocks into which the matrices have fallen; all fields ``[N, stack]``.

    Attributes:
      starts: a block starts in this row.
      first, last: rows of the block of this row.
    """

    starts: Array
    first: Array
    last: Array

    @property
    def unfinished(self) -> Array:
        return self.last - self.first > 1


def _hessenberg_eigenvalues(h: Array) -> Array:
    """``[N, N, stack] -> [N, stack]``, complex; below the first subdiagonal nothing is read."""
    size, _, stack = h.shape
    limit = _SWEEPS_PER_ROW * max(10, size)

    def unfinished(carry: tuple[Array, _Blocks, Array, Array]) -> Array:
        _, blocks, _, sweeps = carry
        return jnp.any(blocks.unfinished) & (sweeps < limit)

    def sweep(carry: tuple[Array, _Blocks, Array, Array]) -> tuple[Array, _Blocks, Array, Array]:
        h, old, age, sweeps = carry
        h = _chase(h, _bulges(h, old, age), old)
        new = _split(h, old.starts)
        same = (new.first == old.first) & (new.last == old.last)
        return h, new, jnp.where(same, age + 1, 0), sweeps + 1

    h = jnp.where(jnp.tri(size, k=-2, dtype=bool)[..., None], 0, h)
    h = jnp.pad(h, ((0, 2), (0, 2), (0, 0)))  # so that every row has two more below it
    blocks = _split(h, jnp.broadcast_to(jnp.arange(size)[:, None] == 0, (size, stack)))
    start = h, blocks, jnp.zeros((size, stack), jnp.int32), jnp.int32(0)
    h, blocks, _, _ = devices.while_loop(unfinished, sweep, start)
    failed = jnp.any(blocks.unfinished, axis=0, keepdims=True)
    return jnp.where(failed, jnp.nan, _block_eigenvalues(h, blocks))


def _diagonals(h: Array) -> tuple[Array, Array, Array, Array]:
    """Diagonal, the entries right of it, below it, and below those of the next row, ``[N, stack]`` each."""
    k = jnp.arange(len(h) - 2)
    return h[k, k], h[k, k + 1], h[k + 1, k], h[k + 2, k + 1]


def _split(h: Array, starts: Array) -> _Blocks:
    """Blocks once subdiagonal entries that are lost in the rounding of their neighbours count as zero.

    They stay in the matrix: no block reads what lies left of it.
    """
    diagonal, _, below, _ = (jnp.abs(d) for d in _diagonals(h))
    beside = diagonal[:-1] + diagonal[1:]
    # Both zero: compared with all of them, as in EISPACK's hqr.
    size = jnp.sum(diagonal + below, axis=0, keepdims=True)
    small = below[:-1] <= jnp.finfo(below.dtype).eps * jnp.where(beside == 0, size, beside)
    starts = starts.at[1:].set(starts[1:] | small)
    index = jnp.arange(len(starts))[:, None]
    first = jax.lax.cummax(jnp.where(starts, index, 0), axis=0)
    ends = jnp.roll(starts, -1, axis=0)  # row 0 starts one, so the last row ends one
    return _Blocks(starts, first, jax.lax.cummin(jnp.where(ends, index, len(starts) - 1), axis=0, reverse=True))


def _bulges(h: Array, blocks: _Blocks, age: Array) -> Array:
    """``[3, N, stack]``: a multiple of the first column of ``(H - s)(H - t)`` for a block that starts in that row.

    s and t are the eigenvalues of the block's last two rows, of which only the trace and the determinant enter.
    Where a block has stayed whole for ten sweeps, EISPACK's substitute for them.
    """
    a, right, below, next_below = _diagonals(h)

    def of_last(row: Array) -> Array:
        return jnp.take_along_axis(row, blocks.last, axis=0)

    x, y = of_last(a), of_last(jnp.roll(a, 1, axis=0))
    w = of_last(jnp.roll(right * below, 1, axis=0))
    s = of_last(jnp.abs(jnp.roll(below, 1, axis=0)) + jnp.abs(jnp.roll(below, 2, axis=0))).astype(a.dtype)
    other = age % 11 == 10
    x, y = jnp.where(other, x + 0.75 * s, x), jnp.where(other, x + 0.75 * s, y)
    w = jnp.where(other, -0.4375 * s * s, w)
    r, t = x - a, y - a
    scale = jnp.abs(r) + jnp.abs(t) + jnp.abs(below)
    scale = jnp.where(scale == 0, 1, scale).astype(a.dtype)
    c, next_a = below / scale, jnp.roll(a, -1, axis=0)
    return jnp.stack([r / scale * t - w / scale + c * right, c * (next_a - a - r - t), c * next_below])


def _chase(h: Array, bulges: Array, blocks: _Blocks) -> Array:
    """One sweep: in every unfinished block a bulge is made at its first row and chased to its last."""
    end = len(blocks.first) - 1

    def step(k: Array, h: Array) -> Array:
        k = jnp.minimum(k, end)  # the last row of a matrix is the last of its block: nothing to do
        first, last, unfinished = blocks.first[k], blocks.last[k], blocks.unfinished[k]
        rows = jax.lax.dynamic_slice_in_dim(h, k, 3, axis=0)
        before = jnp.maximum(k - 1, 0)
        x = jnp.where((first == k)[None], bulges[:, k], rows[:, before])
        inside = (unfinished & (k < last))[None] & (k + jnp.arange(3)[:, None] <= last[None])
        u, t = _reflector(jnp.where(inside, x, 0), 0)
        rows = rows - u[:, None] * jnp.sum(t.conj()[:, None] * rows, axis=0)[None]
        rows = rows.at[1:, before].set(jnp.where(inside[1:] & (first < k)[None], 0, rows[1:, before]))
        h = jax.lax.dynamic_update_slice_in_dim(h, rows, k, axis=0)
        columns = jax.lax.dynamic_slice_in_dim(h, k, 3, axis=1)
        columns = columns - jnp.sum(columns * u[None], axis=1)[:, None] * t.conj()[None]
        return jax.lax.dynamic_update_slice_in_dim(h, columns, k, axis=1)

    low = jnp.min(jnp.where(blocks.unfinished, blocks.first, end))
    high = jnp.max(jnp.where(blocks.unfinished, blocks.last, 0))

    def steps(i: Array, h: Array) -> Array:
        return devices.fori_loop(0, _STEPS_AT_ONCE, lambda j, h: step(low + _STEPS_AT_ONCE * i + j, h), h)

    return devices.fori_loop(0, (high - low + _STEPS_AT_ONCE - 1) // _STEPS_AT_ONCE, steps, h)


def _block_eigenvalues(h: Array, blocks: _Blocks) -> Array:
    """Of blocks of one row and of two."""
    a, right, below, _ = _diagonals(h)
    d = jnp.roll(a, -1, axis=0)
    half = (a - d) / 2
    larger = jnp.maximum(jnp.abs(right), jnp.abs(below))
    scale = jnp.maximum(jnp.abs(half), larger)
    scale = jnp.where(scale == 0, 1, scale).astype(a.dtype)
    product = right / scale * below
    square = half / scale * half + product
    real = not jnp.iscomplexobj(a)
    kind = np.result_type(a.dtype, np.complex64)
    a, d, half, product, scale = (x.astype(kind) for x in (a, d, half, product, scale))
    root = jnp.sqrt(square.astype(kind)) * jnp.sqrt(scale)
    apart = half + jnp.where((half.conj() * root).real < 0, -root, root)  # the larger of the two
    one, two = d + apart, d - product / jnp.where(apart == 0, 1, apart / scale)
    if real:  # a pair conjugate to the last bit
        one, two = jnp.where(square < 0, d + half + root, one), jnp.where(square < 0, d + half - root, two)
    of_pair = jnp.where(blocks.starts, one, jnp.roll(two, 1, axis=0))
    return jnp.where(blocks.last > blocks.first, of_pair, a)
