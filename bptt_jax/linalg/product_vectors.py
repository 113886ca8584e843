"""Singular values and vectors of a product of many matrices, those far below the rounding of the largest as well.

The product is never formed. A frame of orthonormal rows F_0 is carried through the factors, orthonormalised after each:
``F_0 P^T = (L_0 L_1 ... ) F_T``, lower triangular factors, whose product has a power of two for each column. Columns
differ by what the product's singular values differ by, and Jacobi's rotations, which make them orthogonal to each
other, find all of them to the last digits (Demmel, Veselic 1992): of each pair only the ratio of the powers enters.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Num, PyTree

from bptt_jax import devices
from bptt_jax.checks import check_positive_int
from bptt_jax.linalg.eigensystem import phase
from bptt_jax.linalg.logscale import ZERO_EXPONENT, exponent, exponent_of, plain, shift
from bptt_jax.linalg.lq import ROUNDINGS, orthonormal
from bptt_jax.linalg.precision import matmul
from bptt_jax.linalg.products import checked, factors
from bptt_jax.linalg.scattered import scattered
from bptt_jax.results import Result, counted, field
from bptt_jax.timeline import after_reset

_BESIDE = 8  # directions that are carried beside those that are asked for, and as many of these once more
_PASSES = 100  # back and forth, at most
_SWEEPS = 40


class ProductSingularVectors(Result):
    """The leading singular values of a product of Jacobians P, and their vectors: ``P right[k] = exp(log_values[k])
    left[k]``.

    Attributes:
      log_values: ``[num]``, natural logarithms of the singular values, descending; -inf for what is mapped to zero.
      right: ``[num, D]``, orthonormal rows: the directions of the first state that survive best. The largest component
        of each is positive.
      left: ``[num, D]``, orthonormal rows: the directions of the last state that they become.
      errors: ``[num]``, sines of the angles by which the right vectors would turn, were they carried there and back
        once more: near the rounding where all is well. Singular values are off by some squares of them, relatively.
    """

    log_values: Float[Array, " num"] = field(dims=("rank",))
    right: Float[Array, "num D"] = field(dims=("rank", "unit"))
    left: Float[Array, "num D"] = field(dims=("rank", "unit"))
    errors: Float[Array, " num"] = field(dims=("rank",))

    def _headline(self) -> str:
        values = np.asarray(self.log_values)
        return (
            f"gains exp({values[0]:.4g}) to exp({values[-1]:.4g}), vectors to {np.max(np.asarray(self.errors)):.1g}"
        )


def product_singular_vectors(
    jacobians: Num[Array, "T D D"],
    *,
    num: int | None = None,
    resets: Bool[Array, " T"] | None = None,
    mask: Bool[Array, " T"] | None = None,
    states: PyTree = None,
) -> ProductSingularVectors:
    """The leading singular values of ``J_{T-1} ... J_0 = dh_T/dh_0`` with their vectors, at any length.

    Which direction of h_0 survives, which direction of h_T it becomes, and by how much it has grown; and so for the
    second, and the last, also where they are smaller by hundreds of orders of magnitude: no digit is lost beside the
    largest, while of a product at hand whatever lies below the rounding of the first is lost. A direction that one
    factor shrinks by more than the precision, relative to the largest, counts as mapped to zero.

    Frames of ``min(D, 2 num + 8)`` directions are carried back and forth until they stay, at most 100 times: with all
    D, or a gap below them, once or twice; with singular values that crowd together, as those of a few random matrices
    do, more often. Each costs T products of a frame with a Jacobian, and orthonormalisations.

    `log_values` have first derivatives, those of simple singular values; the vectors are constants to differentiation.

    Args:
      jacobians: ``[T, D, D]`` in order of time, real, as from `bptt_jax.jacobians`.
      num: how many; D, all, by default.
      resets, mask, states: as for `bptt_jax.jacobian_product`.

    Returns:
      `ProductSingularVectors`; NaN where a matrix is not finite; with a reset after the first real step, -inf and NaN.

    Raises:
      TypeError, ValueError: as `bptt_jax.jacobian_product`; `jacobians` are complex, or `num` exceeds D.

    Example:
      >>> jacobians = jnp.broadcast_to(jnp.array([[0.9, 0.0], [0.3, 0.1]]), (1000, 2, 2))
      >>> found = bptt.linalg.product_singular_vectors(jacobians)
      >>> found.log_values.round(1)
      Array([ -105.3, -2302.7], dtype=float32)
      >>> found.left.round(3)
      Array([[ 0.936,  0.351],
             [-0.351,  0.936]], dtype=float32)
    """
    given = checked(jacobians, resets, mask, states)
    if jnp.iscomplexobj(given[0]):
        raise TypeError(f"jacobians: expected real matrices, got {given[0].dtype}")
    size = given[0].shape[-1]
    num = size if num is None else check_positive_int("num", num)
    if num > size:
        raise ValueError(f"num: expected at most D = {counted(size, 'singular value')}, got {num}")
    return _product_singular_vectors(*given, num=num)


@devices.compiled
def _product_singular_vectors(*given: Any, num: int) -> ProductSingularVectors:
    jacobians, resets = factors(*given)
    bad = ~jnp.all(jnp.isfinite(jacobians))
    jacobians = jnp.where(bad, 0, jacobians)
    right, errors = _right_vectors(jax.lax.stop_gradient(jacobians), num)
    logs, left = _grown(jacobians, right)
    left, errors = jax.lax.stop_gradient((left, errors))
    nothing = jnp.zeros((), bool) if resets is None else after_reset(resets, given[2])[-1]
    logs = jnp.where(bad, jnp.nan, jnp.where(nothing, -jnp.inf, logs))
    right, left, errors = (jnp.where(bad | nothing, jnp.nan, a) for a in (right, left, errors))
    return ProductSingularVectors(logs, right, left, errors)


def _right_vectors(jacobians: Array, num: int) -> tuple[Array, Array]:
    """``[num, D]``, and the sines of the angles by which they still turn."""
    (steps, size, _), dtype = jacobians.shape, jacobians.dtype
    carried, eps = min(size, 2 * num + _BESIDE), float(jnp.finfo(dtype).eps)

    def pull(rows: Array) -> Array:
        def body(rows: Array, jacobian: Array) -> tuple[Array, None]:
            return orthonormal(_scaled(matmul(rows, jacobian))[0])[1], None

        return devices.scan(body, rows, jacobians, reverse=True)[0]

    def more(carry: tuple[Array, ...]) -> Array:
        *_, sines, last, passes = carry
        turns, turned = jnp.max(sines), jnp.max(last)
        settled = (turns < 10 * eps * (steps * size) ** 0.5) | ((turns < eps**0.5) & (turns >= turned))
        return (passes < _PASSES) & ~settled

    def again(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        rows, _, last, _, passes = carry
        right, left = _decomposed(rows, *_pushed(jacobians, rows))
        back = pull(left)
        aside = back - jnp.sum(back * right, axis=1, keepdims=True) * right
        return back, right[:num], jnp.linalg.norm(aside, axis=1)[:num], last, passes + 1

    # Always the same; by the way back alone it has turned to the right vectors.
    start = orthonormal(scattered((carried, size), dtype))[1]
    ones = jnp.ones(num, dtype)
    begun = pull(start), start[:num], ones, ones, jnp.zeros((), jnp.int32)
    _, right, sines, *_ = devices.while_loop(more, again, begun)
    return right / phase(right), sines


def _pushed(jacobians: Array, rows: Array) -> tuple[Array, Array, Array]:
    """The last frame, and the product of the triangular factors, but for a power of two that all of it has: columns
    ``[m, m]`` times powers of two ``[m]``."""

    def body(carry: tuple[Array, ...], jacobian: Array) -> tuple[tuple[Array, ...], None]:
        rows, columns, powers = carry
        lower, rows = orthonormal(_scaled(matmul(rows, jacobian.T))[0])
        # Column j of the product of the factors is that of all columns i with L_ij, in the unit of the largest.
        sums = powers[:, None] + exponent_of(jnp.abs(lower))
        top = jnp.max(sums, axis=0)
        weights = shift(lower, powers[:, None] - top[None])
        columns, more = _scaled_columns(matmul(columns, weights))
        powers = jnp.where(more == ZERO_EXPONENT, ZERO_EXPONENT, top + more)
        return (rows, columns, powers), None

    m = len(rows)
    start = rows, jnp.eye(m, dtype=rows.dtype), jnp.zeros(m, jnp.int32)
    return devices.scan(body, start, jacobians)[0]


def _scaled(rows: Array) -> tuple[Array, Array]:
    e = exponent(rows)
    return shift(rows, -plain(e)), plain(e)


def _scaled_columns(columns: Array) -> tuple[Array, Array]:
    each = exponent_of(jnp.max(jnp.abs(columns), axis=0))
    return shift(columns, -jnp.broadcast_to(plain(each)[None], columns.shape)), each


def _decomposed(first: Array, last: Array, columns: Array, powers: Array) -> tuple[Array, Array]:
    """Right and left vectors, descending, by one-sided Jacobi: orthogonal columns are U S, the rotations V."""
    m, dtype = len(columns), columns.dtype
    if m == 1:
        return first, last
    rounds = jnp.asarray(_rounds(m))
    enough = max(m, 8) * float(jnp.finfo(dtype).eps)

    def one(carry: tuple[Array, ...], pairs: Array) -> tuple[tuple[Array, ...], Array]:
        columns, powers, turned = carry
        p, q = pairs
        norms = jnp.sum(jnp.square(columns), axis=0)
        swap = (powers[q] > powers[p]) | ((powers[q] == powers[p]) & (norms[q] > norms[p]))
        p, q = jnp.where(swap, q, p), jnp.where(swap, p, q)
        a, b = columns[:, p], columns[:, q]
        ratio = shift(jnp.ones(len(p), dtype), jnp.maximum(powers[q] - powers[p], -4096))
        inner = jnp.sum(a * b, axis=0)
        apart = norms[p] - jnp.square(ratio) * norms[q]
        divisor = apart + jnp.sqrt(jnp.square(apart) + 4 * jnp.square(ratio * inner))
        tangent = jnp.where(inner == 0, 0, 2 * inner / jnp.where(divisor == 0, 1, divisor))  # divided by the ratio
        sine = ratio * tangent
        cosine = 1 / jnp.sqrt(1 + jnp.square(sine))
        ratio, tangent, sine, cosine = (r[None] for r in (ratio, tangent, sine, cosine))
        a, b = cosine * (a + ratio * sine * b), cosine * (b - tangent * a)
        u, v = turned[:, p], turned[:, q]
        turned = turned.at[:, p].set(cosine * (u + sine * v)).at[:, q].set(cosine * (v - sine * u))
        columns, more = _scaled_columns(columns.at[:, p].set(a).at[:, q].set(b))
        powers = jnp.where((more == ZERO_EXPONENT) | (powers == ZERO_EXPONENT), ZERO_EXPONENT, powers + more)
        size = jnp.sqrt(norms[p] * norms[q])
        return (columns, powers, turned), jnp.max(jnp.abs(inner) / jnp.where(size == 0, 1, size))

    def sweep(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        *state, _, count = carry
        state, overlaps = devices.scan(one, tuple(state), rounds)
        return *state, jnp.max(overlaps), count + 1

    start = columns, powers, jnp.eye(m, dtype=dtype), jnp.ones((), dtype), jnp.zeros((), jnp.int32)
    columns, powers, turned, *_ = devices.while_loop(lambda c: (c[3] > enough) & (c[4] < _SWEEPS), sweep, start)
    norms = jnp.linalg.norm(columns, axis=0)
    logs = jnp.log(jnp.where(norms == 0, 1, norms)) + math.log(2) * powers.astype(dtype)
    order = jnp.argsort(-jnp.where(norms == 0, -jnp.inf, logs), stable=True)
    left = matmul(turned[:, order].T, last)
    unit = (columns / jnp.where(norms == 0, 1, norms)[None])[:, order]
    lower, completed = orthonormal(unit.T)  # columns of zero have no direction of their own: what is left
    signs = jnp.where(jnp.diagonal(lower) < 0, -1, 1).astype(dtype)
    return matmul(completed * signs[:, None], first), left


def _rounds(m: int) -> np.ndarray:
    """``[rounds, 2, pairs]``: every pair of m columns once, in rounds of pairs that share none (Brent, Luk 1985)."""
    players = list(range(m + m % 2))
    found = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = [(a, b) for a, b in zip(players[:half], reversed(players[half:]), strict=True) if max(a, b) < m]
        found.append(np.asarray(pairs).T)
        players = [players[0], players[-1], *players[1:-1]]
    return np.stack(found)


def _grown(jacobians: Array, rows: Array) -> tuple[Array, Array]:
    """Log of the lengths that the rows come to, each without the parts along those before; and what they become."""

    def body(carry: tuple[Array, ...], jacobian: Array) -> tuple[tuple[Array, ...], None]:
        rows, logs, powers, dead = carry
        image, scale = _scaled(matmul(rows, jacobian.T))
        lower, rows = orthonormal(image)
        diagonal = jnp.diagonal(lower)
        lengths = jnp.abs(diagonal)
        zero = lengths <= ROUNDINGS * float(jnp.finfo(lengths.dtype).eps) * jnp.max(lengths)
        logs = logs + jnp.log(jnp.where(zero, 1, lengths))
        rows = rows * jnp.where(diagonal < 0, -1, 1).astype(rows.dtype)[:, None]
        return (rows, logs, powers + scale, dead | zero), None

    num = len(rows)
    start = rows, jnp.zeros(num, rows.dtype), jnp.zeros((), jnp.int32), jnp.zeros(num, bool)
    (rows, logs, powers, dead), _ = devices.scan(body, start, jacobians)
    return jnp.where(dead, -jnp.inf, logs + math.log(2) * powers.astype(logs.dtype)), rows
