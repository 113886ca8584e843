"""Leading singular values and eigenvalues of a linear map that is known by its products with vectors alone.

Golub-Kahan bidiagonalisation (Golub, Kahan 1965) and Arnoldi's method (Arnoldi 1951), both with full
reorthogonalisation. A start vector sees one direction of every eigenspace, and none outside of the range: where the
space is exhausted, both go on with a random vector orthogonal to all before, not coupled to them. So multiple
values are counted (all of an orthogonal matrix are 1) and missing ones are zero.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from bptt_jax import devices
from bptt_jax.linalg.lapack import by_modulus, eig, svd
from bptt_jax.linalg.logscale import LogScaled, plain
from bptt_jax.linalg.precision import matmul
from bptt_jax.linalg.scattered import scattered

# Steps beyond two for each value that is asked for. At the soft edge of an infinite random square matrix m steps
# leave the largest singular value short by a share of pi^2 / (2 (2m + 1)^2), here 1e-3; of D = 2000 by 1e-6.
_SINGULAR_STEPS = 30
# No polynomial singles out the rim of a disc: eigenvalues that fill one take many more.
_EIGEN_STEPS = 100

Product = Callable[[Array], LogScaled]  # of the map with a vector


class SingularTriplets(NamedTuple):
    """``A right_i ~ values_i left_i``, descending. What follows is all of it times ``2^exponent`` but the vectors.

    Attributes:
      values: ``[num]``.
      errors: ``[num]``: within this of each there is a singular value of A.
      left, right: ``[num, D]``, unit vectors.
      exponent: int32.
    """

    values: Array
    errors: Array
    left: Array
    right: Array
    exponent: Array


class Eigenpairs(NamedTuple):
    """``A vectors_i ~ values_i vectors_i``, by descending modulus; values and errors are times ``2^exponent``.

    Attributes:
      values: ``[m]``, complex.
      errors: ``[m]``: ``||A x - value x||``; the value is exact for a matrix as near to A as this.
      vectors: ``[m, D]``, complex unit vectors.
      exponent: int32.
    """

    values: Array
    errors: Array
    vectors: Array
    exponent: Array


def singular_steps(num: int, size: int) -> int:
    """Dimension of the two Krylov spaces; at `size` all is exact."""
    return min(size, 2 * num + _SINGULAR_STEPS)


def eigen_steps(num: int, size: int) -> int:
    """Dimension of the Krylov space; at `size` all is exact."""
    return min(size, 2 * num + _EIGEN_STEPS)


def singular_triplets(push: Product, pull: Product, size: int, dtype: jnp.dtype, num: int) -> SingularTriplets:
    """The leading singular values of a real linear map.

    Args:
      push, pull: the map and its transpose, ``[size] -> [size]`` of `dtype`.
      num: how many, at most `size`.

    Returns:
      `SingularTriplets`; values and errors are NaN if the map is not finite.
    """
    steps = singular_steps(num, size)
    random = _random_vectors(2 * steps + 1, size, dtype)

    def body(carry: tuple[Array, ...], at: tuple[Array, Array]) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
        (left, right, v, largest, unit), (k, spare) = carry, at
        right = _put(right, v, k)
        image = push(v)
        unit = _unit(k, image, unit)
        u, alpha, _, largest = _orthonormal(left, image.over(unit), largest, spare[0])
        left = _put(left, u, k)
        v, beta, _, largest = _orthonormal(right, pull(u).over(unit), largest, spare[1])
        return (left, right, v, largest, unit), (alpha, beta)

    basis = jnp.zeros((steps, size), dtype)
    carry = (basis, basis, random[-1], jnp.zeros((), dtype), jnp.zeros((), jnp.int32))
    each = jnp.arange(steps), random[:-1].reshape(steps, 2, size)
    (left, right, _, largest, unit), (diagonal, upper) = devices.scan(body, carry, each)
    bidiagonal = jnp.diag(diagonal) + jnp.diag(upper[:-1], 1)
    bad = ~jnp.isfinite(largest)
    x, values, y = svd(jnp.where(bad, 0, bidiagonal))
    errors = jnp.abs(upper[-1] * x[-1]) + _rounding(values[0], size)
    values, errors = (jnp.where(bad, jnp.nan, a[:num]) for a in (values, errors))
    return SingularTriplets(values, errors, matmul(x[:, :num].T, left), matmul(y[:num], right), unit)


def eigenpairs(push: Product, size: int, dtype: jnp.dtype, num: int) -> Eigenpairs:
    """The leading eigenvalues of a real linear map, and all others that the Krylov space holds.

    Args:
      push: the map, ``[size] -> [size]`` of `dtype`.
      num: how many are wanted, at most `size`: the Krylov space is chosen by it.

    Returns:
      `Eigenpairs`; values and errors are NaN if the map is not finite.
    """
    steps = eigen_steps(num, size)
    random = _random_vectors(steps + 1, size, dtype)

    def body(carry: tuple[Array, ...], at: tuple[Array, Array]) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
        (basis, v, largest, unit), (k, spare) = carry, at
        basis = _put(basis, v, k)
        image = push(v)
        unit = _unit(k, image, unit)
        v, length, along, largest = _orthonormal(basis, image.over(unit), largest, spare)
        return (basis, v, largest, unit), (along, length)

    carry = (jnp.zeros((steps, size), dtype), random[-1], jnp.zeros((), dtype), jnp.zeros((), jnp.int32))
    each = jnp.arange(steps), random[:-1]
    (basis, _, largest, unit), (columns, lengths) = devices.scan(body, carry, each)
    bad = ~jnp.isfinite(largest)
    # Below the diagonal `along` is zero, since the basis was zero there.
    hessenberg = columns.T + jnp.diag(lengths[:-1], -1)
    values, vectors = eig(jnp.where(bad, 0, hessenberg))
    order = by_modulus(values)
    values, vectors = values[order], vectors[:, order]
    errors = jnp.abs(lengths[-1]) * jnp.abs(vectors[-1]) + _rounding(largest, size)
    values, errors = (jnp.where(bad, jnp.nan, a) for a in (values, errors))
    return Eigenpairs(values, errors, matmul(vectors.T, basis.astype(vectors.dtype)), unit)


def least_squares(
    push: Callable[[Array], Array],
    pull: Callable[[Array], Array],
    b: Array,
    *,
    damping: Array,
    steps: int,
    tol: float,
) -> Array:
    """Minimises ``|A x - b|^2 + damping |x|^2`` by conjugate gradients (CGLS: Bjorck 1996, section 7.4).

    Args:
      push, pull: A, real and linear, and its transpose.
      b: what A maps to.
      damping: at least 0.
      steps: at most so many; in exact arithmetic x is found after as many as it has numbers.
      tol: ends where ``|A^T (b - A x) - damping x|`` has fallen by this factor.
    """
    unit = jnp.max(jnp.abs(b))
    b = b / jnp.where(unit > 0, unit, 1)  # no square leaves the range
    start = pull(b)
    first = jnp.sum(jnp.square(start))

    def more(carry: tuple[Array, ...]) -> Array:
        *_, size, count = carry
        return (size > tol**2 * first) & (count < steps)

    def body(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        x, left, direction, size, count = carry
        image = push(direction)
        curvature = jnp.sum(jnp.square(image)) + damping * jnp.sum(jnp.square(direction))
        length = jnp.where(curvature > 0, size / jnp.where(curvature > 0, curvature, 1), 0)
        x, left = x + length * direction, left - length * image
        gradient = pull(left) - damping * x
        new = jnp.sum(jnp.square(gradient))
        return x, left, gradient + new / size * direction, new, count + 1

    carry = jnp.zeros_like(start), b, start, first, jnp.zeros((), jnp.int32)
    return unit * devices.while_loop(more, body, carry)[0]


def _orthonormal(basis: Array, image: Array, largest: Array, spare: Array) -> tuple[Array, Array, Array, Array]:
    """The part of `image` that is orthogonal to the rows of `basis`, as a unit vector, and its length.

    Then the coefficients of the rest, and the largest image so far. A part within the rounding of that one has no
    direction: its length counts as zero and the `spare` vector takes its place.
    """
    largest = jnp.maximum(largest, jnp.linalg.norm(image))

    def project(turn: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        vector, length, along = carry
        first = turn == 0
        inside = matmul(basis, vector)
        vector = vector - matmul(inside, basis)
        norm = jnp.linalg.norm(vector)
        lost = first & (norm <= 10 * jnp.finfo(basis.dtype).eps * largest)
        along = along + jnp.where(first, 1, length) * inside
        length = jnp.where(first, jnp.where(lost, 0, norm), length)
        return jnp.where(lost, spare, vector / jnp.where(norm == 0, 1, norm)), length, along

    carry = image, jnp.zeros_like(largest), jnp.zeros_like(basis[:, 0])
    vector, length, along = devices.fori_loop(0, 3, project, carry)
    return vector, length, along, largest


def _put(rows: Array, row: Array, k: Array) -> Array:
    """The rows with this one as the k-th."""
    return _put_along(0)(rows, row, k)


@cache
def _put_along(axis: int) -> Callable[[Array, Array, Array], Array]:
    """Along this axis of the rows. JAX makes a scatter of it in a batch, five times as long to compile."""

    @custom_vmap
    def put(rows: Array, row: Array, k: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(rows, row, k, axis)

    @put.def_vmap
    def _(size: int, is_batched: list[bool], rows: Array, row: Array, k: Array) -> tuple[Array, bool]:
        rows, row = (
            a if yes else jnp.broadcast_to(a, (size, *a.shape))
            for a, yes in zip((rows, row), is_batched[:2], strict=True)
        )
        return _put_along(axis + 1)(rows, row, k), True

    return put


def _unit(k: Array, image: LogScaled, unit: Array) -> Array:
    """The power of two that the first image, of a random vector, has: in this unit no square overflows."""
    return jnp.where(k == 0, plain(image.normalized().exponent), unit)


def _rounding(norm: Array, size: int) -> Array:
    """What a product with a vector carries of rounding, about."""
    return jnp.finfo(norm.dtype).eps * jnp.sqrt(jnp.asarray(size, norm.dtype)) * norm


def _random_vectors(count: int, size: int, dtype: jnp.dtype) -> Array:
    vectors = scattered((count, size), dtype)
    return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
