"""Eigenvectors and singular vectors of stacks of matrices: arrays in, arrays out.

Vectors are known up to a factor. Here each has unit norm, and its largest component is real and positive (the first of
them, where several are as large to half of the digits): so they are functions of the matrix, with derivatives.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Complex, Float, Inexact

from bptt_jax import devices
from bptt_jax.checks import check_matrices, check_positive_int
from bptt_jax.linalg.lapack import by_modulus, eig, inverse
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.linalg.precision import matmul
from bptt_jax.linalg.spectra import scaled_down, triplets
from bptt_jax.results import Result, counted, field


class Eigensystem(Result):
    """``A right = right diag(values)``, ``left A = diag(values) left`` and ``left right = 1``.

    So ``A = right diag(values) left``: a mode k is the direction ``right[:, k]``, along which a state moves, and the
    row ``left[k]``, which reads how much of it there is in a state.

    Attributes:
      values: ``[..., N]``, complex, by descending modulus; the two of a conjugate pair stand together, positive angle
        first.
      right: ``[..., N, N]``, complex, columns of unit norm, of which the largest component is real and positive. For
        a real matrix the two of a pair are conjugate, and those of real values real.
      left: ``[..., N, N]``, complex, rows, the inverse of `right`. Large where vectors are nearly parallel.
    """

    values: Complex[Array, "... N"] = field(dims=("mode",))
    right: Complex[Array, "... N N"] = field(dims=("unit", "mode"))
    left: Complex[Array, "... N N"] = field(dims=("mode", "unit"))

    _views: ClassVar = {"condition_numbers": ("mode",)}

    @property
    def condition_numbers(self) -> Float[Array, "... N"]:
        """``[..., N]``, of each eigenvalue: a change of the matrix by a norm of e moves it by this times e, to first
        order (Wilkinson 1965). 1 for a normal matrix, not finite or near 1 / eps for a defective one."""
        return jnp.linalg.norm(self.left, axis=-1) * jnp.linalg.norm(self.right, axis=-2)

    def _headline(self) -> str:
        moduli, worst = np.abs(np.asarray(self.values)), np.max(np.asarray(self.condition_numbers))
        return f"moduli {np.max(moduli):.3g} to {np.min(moduli):.3g}, condition numbers up to {worst:.2g}"


class SingularVectors(Result):
    """``A right[k] = values[k] left[k]``.

    Attributes:
      values: ``[..., K]``, singular values, descending.
      right: ``[..., K, N]``, orthonormal rows: the directions that `values` are the gains of. The largest component of
        each is real and positive.
      left: ``[..., K, M]``, orthonormal rows: what they become.
    """

    values: Float[Array, "... K"] = field(dims=("rank",))
    right: Inexact[Array, "... K N"] = field(dims=("rank", "unit"))
    left: Inexact[Array, "... K M"] = field(dims=("rank", "unit"))

    def _headline(self) -> str:
        values = np.asarray(self.values)
        return f"gains {np.max(values):.3g} to {np.min(values):.3g}"


def eigensystem(matrices: Inexact[Array, "... N N"]) -> Eigensystem:
    """Eigenvalues with right and left eigenvectors, biorthogonal.

    Values are as exact as those of `bptt_jax.eigenvalues`, at any scale: ``eigensystem(s A)`` has s times the values
    and the same vectors. A vector errs by the rounding of the matrix divided by the distance to the nearest other
    eigenvalue, times its condition number.

    Derivatives, forwards and backwards, are those of the vectors as they are normalised here: unit norm, and the
    largest component real and positive (the gauge). They exist where eigenvalues are simple and one component is the
    largest. Between eigenvalues that are exactly equal the derivative of the vectors leaves out the turn within
    their space, which has none; near such a place, and near defective matrices, it grows without bound.

    Args:
      matrices: ``[..., N, N]``, real or complex, not necessarily normal.

    Returns:
      `Eigensystem`; NaN for a matrix that is not finite, which leaves the others of its stack alone. `left` is not
      finite, or as large as 1 / eps, where a matrix is defective: it has no N eigenvectors.

    Raises:
      TypeError, ValueError: `matrices` is no array of numbers with at least two axes, none of them empty, or the
        matrices are not square.

    Example:
      >>> found = bptt.eigensystem(jnp.array([[0.9, 1.0], [0.0, 0.5]]))
      >>> found.values.real, found.left.real[0]
      (Array([0.9, 0.5], dtype=float32), Array([1. , 2.5], dtype=float32))
      >>> bool(jnp.allclose((found.left @ found.right).real, jnp.eye(2), atol=1e-6))
      True
    """
    return _eigensystem(check_matrices("matrices", matrices, square=True))


def singular_vectors(matrices: Inexact[Array, "... M N"], *, num: int | None = None) -> SingularVectors:
    """Leading singular values with their vectors: which directions a step amplifies, and what they become.

    Derivatives, forwards and backwards, are those of the vectors as they are normalised: the largest component of each
    right one real and positive. They exist where singular values are simple and none of them is zero.

    Args:
      matrices: ``[..., M, N]``, real or complex.
      num: how many, K; min(M, N), all, by default.

    Returns:
      `SingularVectors`; NaN for a matrix that is not finite, which leaves the others of its stack alone.

    Raises:
      TypeError, ValueError: as for `bptt_jax.singular_values`, or `num` exceeds min(M, N).

    Example:
      >>> found = bptt.linalg.singular_vectors(jnp.array([[0.0, 2.0], [0.0, 0.0]]), num=1)
      >>> found.values, found.right, found.left
      (Array([2.], dtype=float32), Array([[0., 1.]], dtype=float32), Array([[1., 0.]], dtype=float32))
    """
    matrices = check_matrices("matrices", matrices, square=False)
    most = min(matrices.shape[-2:])
    num = most if num is None else check_positive_int("num", num)
    if num > most:
        raise ValueError(f"num: expected at most {counted(most, 'singular value')}, got {num}")
    return _singular_vectors(matrices, num=num)


@devices.compiled
def _eigensystem(matrices: Array) -> Eigensystem:
    scaled, bad = scaled_down(matrices)
    values, right, left = _modes(scaled.mantissa)
    values = LogScaled(values, scaled.exponent).value
    right, left = (jnp.where(bad[..., None], jnp.nan, a) for a in (right, left))
    return Eigensystem(jnp.where(bad, jnp.nan, values), right, left)


@devices.compiled
def _singular_vectors(matrices: Array, *, num: int) -> SingularVectors:
    scaled, bad = scaled_down(matrices)
    left, values, right = triplets(scaled.mantissa)
    left, values, right = left.mT[..., :num, :], values[..., :num], right[..., :num, :].conj()
    turn = phase(right)
    values = jnp.where(bad, jnp.nan, LogScaled(values, scaled.exponent).value)
    right, left = (jnp.where(bad[..., None], jnp.nan, a * turn.conj()) for a in (right, left))
    return SingularVectors(values, right, left)


def phase(rows: Array) -> Array:
    """``[..., K, 1]``: of the largest component of each row."""
    largest = jnp.take_along_axis(rows, _leading(rows), axis=-1)
    return largest / jnp.abs(largest).astype(rows.dtype)


def _leading(rows: Array) -> Array:
    """``[..., K, 1]``: the index of the first component that is as large as any to half of the digits."""
    sizes = jax.lax.stop_gradient(jnp.abs(rows))
    enough = 1 - float(jnp.finfo(sizes.dtype).eps) ** 0.5
    return jnp.argmax(sizes >= enough * jnp.max(sizes, axis=-1, keepdims=True), axis=-1, keepdims=True)


@jax.custom_jvp
def _modes(matrices: Array) -> tuple[Array, Array, Array]:
    """Values, right and left vectors, of matrices that are neither large nor small."""
    values, right = eig(matrices)
    order = by_modulus(values)
    values = jnp.take_along_axis(values, order, axis=-1)
    right = jnp.take_along_axis(right, order[..., None, :], axis=-1)
    rows = right.mT / phase(right.mT)
    rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True).astype(rows.dtype)
    (left,) = inverse(rows.mT)
    if not jnp.iscomplexobj(matrices):
        # To the last bit, which neither a phase nor elimination keeps.
        rows, left = (_conjugate_in_pairs(a, values) for a in (rows, left))
    return values, rows.mT, left


def _conjugate_in_pairs(rows: Array, values: Array) -> Array:
    second = (values.imag < 0)[..., None]
    rows = jnp.where(second, jnp.roll(rows, 1, axis=-2).conj(), rows)
    return jnp.where((values.imag == 0)[..., None], rows.real.astype(rows.dtype), rows)


@_modes.defjvp
def _modes_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    # From A V = V L: V^-1 dV = F * (V^-1 dA V) off the diagonal, with F_jk = 1 / (l_k - l_j). On it stands what the
    # normalisation says: Re v^H dv = 0, and the imaginary part of dv_p / v_p is zero at the largest component p.
    values, right, left = _modes(*primals)
    inside = matmul(matmul(left, tangents[0].astype(right.dtype)), right)
    apart = values[..., None, :] - values[..., :, None]
    same = apart == 0
    turn = jnp.where(same, 0, inside / jnp.where(same, 1, apart))
    moved = matmul(right, turn).mT
    rows = right.mT
    at = _leading(rows)
    longer = jnp.sum(rows.conj() * moved, axis=-1, keepdims=True).real
    peak = jnp.take_along_axis(rows, at, axis=-1)
    turned = (jnp.take_along_axis(moved, at, axis=-1) / peak).imag
    moved = (moved - jax.lax.complex(longer, turned) * rows).mT
    change = jnp.diagonal(inside, axis1=-2, axis2=-1), moved, -matmul(matmul(left, moved), left)
    return (values, right, left), change
