"""Singular values and eigenvalues of stacks of matrices: arrays in, arrays out.

Half precision is computed in single, integers as floating numbers. A matrix with a NaN or an infinity gives NaN
and leaves the others of its stack alone (LAPACK is never shown it). Every routine is backward stable at any scale:
singular values, however small, err by a modest multiple of the rounding of the largest, eigenvalues by that of the
norm times their condition number. What lies below the smallest normal number is zero to XLA on a CPU.
"""

import math
from collections.abc import Callable
from functools import cache, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Complex, Float, Inexact

from bptt_jax import devices
from bptt_jax.checks import check_matrices
from bptt_jax.linalg import logscale
from bptt_jax.linalg.batched_spectra import batched_eigenvalues, batched_singular_values
from bptt_jax.linalg.lapack import by_modulus, eig, inverse, on_one_thread, svd
from bptt_jax.linalg.largest import largest_singular_value
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.linalg.precision import matmul


def singular_values(matrices: Inexact[Array, "... M N"]) -> Float[Array, "... K"]:
    """Singular values, descending.

    Args:
      matrices: ``[..., M, N]``, real or complex.

    Returns:
      ``[..., min(M, N)]``, real.

    Raises:
      TypeError, ValueError: `matrices` is no array of numbers with at least two axes, none of them empty.

    Example:
      >>> bptt.singular_values(jnp.array([[0.0, 2.0], [0.0, 0.0]]))
      Array([2., 0.], dtype=float32)
    """
    return _singular_values(check_matrices("matrices", matrices, square=False))


def eigenvalues(matrices: Inexact[Array, "... N N"]) -> Complex[Array, "... N"]:
    """Eigenvalues by descending modulus; the two of a conjugate pair stand together, positive angle first.

    Args:
      matrices: ``[..., N, N]``, real or complex, not necessarily normal.

    Returns:
      ``[..., N]``, complex.

    Raises:
      TypeError, ValueError: as for `singular_values`, or the matrices are not square.

    Example:
      >>> quarter_turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])
      >>> bptt.eigenvalues(quarter_turn).imag
      Array([ 1., -1.], dtype=float32)
    """
    return _eigenvalues(check_matrices("matrices", matrices, square=True))


def spectral_norm(matrices: Inexact[Array, "... M N"]) -> Float[Array, "..."]:
    """The largest singular value, ``||A||_2``: ``[..., M, N] -> [...]``. Raises as `singular_values`.

    Example:
      >>> round(float(bptt.linalg.spectral_norm(jnp.array([[0.0, 2.0], [0.0, 0.0]]))), 3)
      2.0
    """
    return _spectral_norm(check_matrices("matrices", matrices, square=False))


def spectral_radius(matrices: Inexact[Array, "... N N"]) -> Float[Array, "..."]:
    """The largest modulus of an eigenvalue: ``[..., N, N] -> [...]``. Raises as `eigenvalues`.

    Example:
      >>> round(float(bptt.linalg.spectral_radius(jnp.array([[0.0, 2.0], [0.0, 0.0]]))), 3)
      0.0
    """
    return jnp.abs(eigenvalues(matrices)[..., 0])


def condition_number(matrices: Inexact[Array, "... M N"]) -> Float[Array, "..."]:
    """``sigma_max / sigma_min``: ``[..., M, N] -> [...]``, inf for a singular matrix, the zero matrix included.

    Raises as `singular_values`.

    Example:
      >>> round(float(bptt.linalg.condition_number(jnp.array([[4.0, 0.0], [0.0, 1.0]]))), 3)
      4.0
    """
    values = singular_values(matrices)
    largest, smallest = values[..., 0], values[..., -1]
    return jnp.where(smallest == 0, jnp.inf, largest / jnp.where(smallest == 0, 1, smallest))


@devices.compiled
def _singular_values(matrices: Array) -> Array:
    if matrices.shape[-2:] == (1, 1) and not jnp.iscomplexobj(matrices):
        only = matrices[..., 0]  # as of eigenvalues
        return jnp.where(jnp.isfinite(only), jnp.abs(only), jnp.nan)
    return _singular_values_of(*scaled_down(matrices))


@devices.compiled
def _spectral_norm(matrices: Array) -> Array:
    if 1 in matrices.shape[-2:]:
        return _singular_values(matrices)[..., 0]
    scaled, bad = scaled_down(matrices)
    return jnp.where(bad[..., 0], jnp.nan, LogScaled(_norm(scaled.mantissa), scaled.exponent).value)


@devices.compiled
def _eigenvalues(matrices: Array) -> Array:
    if matrices.shape[-1] == 1:
        # Else the compiler may round one number in two ways, for its exponent and for its mantissa: a factor of 2.
        only = matrices[..., 0]
        return jax.lax.complex(jnp.where(jnp.isfinite(only), only.real, jnp.nan), only.imag)
    return _eigenvalues_of(*scaled_down(matrices))


def spectra_and_others(
    matrices: Float[Array, "... N N"], others: Float[Array, "... N N"]
) -> tuple[Float[Array, "... N"], Complex[Array, "... N"], Float[Array, "... N"]]:
    """Singular values and eigenvalues of matrices, and the singular values of as many others: what is done before and
    after a routine is compiled once."""
    matrices, others = (check_matrices("matrices", a, square=True) for a in (matrices, others))
    if matrices.shape[-1] == 1:
        return singular_values(matrices), eigenvalues(matrices), singular_values(others)
    scaled, bad = scaled_down(jnp.stack([matrices, others]))
    own, of_others = _singular_values_of(scaled, bad)
    return own, _eigenvalues_of(*jax.tree.map(lambda a: a[0], (scaled, bad))), of_others


def _singular_values_of(scaled: LogScaled, bad: Array) -> Array:
    return jnp.where(bad, jnp.nan, LogScaled(_svd(scaled.mantissa), scaled.exponent).value)


def _eigenvalues_of(scaled: LogScaled, bad: Array) -> Array:
    values = _eigvals(scaled.mantissa)
    ordered = jnp.take_along_axis(values, by_modulus(values), axis=-1)
    return jnp.where(bad, jnp.nan, LogScaled(ordered, scaled.exponent).value)


def scaled_down(matrices: Array) -> tuple[LogScaled, Array]:
    """Each with a largest part of an entry in [1/2, 1), zero instead where it is not finite; and ``[..., 1]``, where
    that is so.

    LAPACK's geev, in the build of SciPy that jaxlib takes it from, gives wrong eigenvalues far from 1: in single
    precision below some 1e-12 and above 1e12, in double beyond 1e-150 and 1e150.
    """
    parts = [matrices.real, matrices.imag] if jnp.iscomplexobj(matrices) else [matrices]
    parts = jax.lax.stop_gradient(parts)
    # By sums, for `max` passes over NaN on a CPU; of numbers, for truth values take three times as long to compile.
    bad = ~(reduce(jnp.add, [jnp.sum(a * 0, axis=(-2, -1)) for a in parts]) == 0)
    largest = reduce(jnp.maximum, [jnp.max(jnp.abs(a), axis=(-2, -1)) for a in parts])
    usual = ~bad & (largest > 0)  # the derivatives of zero are to be zero
    exponent = jnp.where(usual, logscale.exponent_of(largest), logscale.ZERO_EXPONENT)
    shifted = LogScaled(matrices, jnp.zeros_like(exponent)).over(exponent)
    mantissas = jnp.where(usual[..., None, None], shifted, 0)
    return LogScaled(mantissas, exponent), bad[..., None]


class _Route(NamedTuple):
    """Which stacks go to a routine.

    Attributes:
      platform: "cpu", "gpu" or "any".
      sizes: of the shorter side of a matrix.
      fewest: matrices in the stack, those of `jax.vmap` included.
    """

    platform: str
    sizes: range
    fewest: int
    routine: Callable[[Array], Array]


_svd_alone = on_one_thread(lambda matrices: jnp.linalg.svd(matrices, compute_uv=False), (1,))
_eigvals_alone = on_one_thread(jnp.linalg.eigvals, (1,))
_ANY = range(1, 1 << 31)
# The first row that fits. On a GPU, jnp.linalg takes matrices one by one (singular values from 33 x 33 on), and
# the batched eigenvalues need so many launches that a few matrices are not worth it. Measured on an H100 by
# benchmarks/spectra_routes.py. On a CPU the rounds of a bisection are not worth it for few matrices, or small ones.
_ROUTES = {
    "singular values": (
        _Route("gpu", range(33, _ANY.stop), 1, batched_singular_values),
        _Route("any", _ANY, 1, lambda matrices: _svd_alone(matrices)[0]),
    ),
    "spectral norms": (
        _Route("cpu", range(32, _ANY.stop), 16, largest_singular_value),
        _Route("any", _ANY, 1, lambda matrices: _first_of_all(matrices)),
    ),
    "eigenvalues": (
        _Route("gpu", range(1, 1025), 12, batched_eigenvalues),
        _Route("any", _ANY, 1, lambda matrices: _eigvals_alone(matrices)[0]),
    ),
}


def _routine(job: str, platform: str, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    size, count = min(shape[-2:]), math.prod(shape[:-2])
    fit = (r for r in _ROUTES[job] if r.platform in (platform, "any") and size in r.sizes and count >= r.fewest)
    return next(fit).routine


@cache
def _gpu_is_here() -> bool:
    try:
        return len(jax.devices("gpu")) > 0
    except RuntimeError:
        return False


def _whole_stack(job: str) -> Callable[[Array], Array]:
    """The routine for its stack. Mapped axes join the stack: they have their say in the route, and a loop that ends
    when the last matrix has converged would otherwise copy all of them at every turn."""

    @jax.custom_batching.custom_vmap
    def compute(matrices: Array) -> Array:
        usual, on_cpu = (_routine(job, platform, matrices.shape) for platform in ("any", "cpu"))
        # All alternatives are traced, the batched ones for a tenth of a second.
        on_gpu = _routine(job, "gpu", matrices.shape) if _gpu_is_here() else usual
        ways = {"cpu": on_cpu, "cuda": on_gpu, "rocm": on_gpu}
        others = {platform: way for platform, way in ways.items() if way is not usual}
        return jax.lax.platform_dependent(matrices, **others, default=usual) if others else usual(matrices)

    @compute.def_vmap
    def _(size: int, batched: list[bool], matrices: Array) -> tuple[Array, bool]:
        return compute(matrices), True

    return compute


_svd = jax.custom_jvp(_whole_stack("singular values"))
_norm = jax.custom_jvp(_whole_stack("spectral norms"))
_eigvals = jax.custom_jvp(_whole_stack("eigenvalues"))


def _first_of_all(matrices: Array) -> Array:
    return _svd(matrices)[..., 0]


@_svd.defjvp
def _svd_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # d sigma_k = Re u_k^H dA v_k
    left, values, right = triplets(*primals)
    moved = jnp.sum(left.conj() * matmul(tangents[0], right.conj().mT), axis=-2)
    return values, moved.real


@_norm.defjvp
def _norm_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    values, moved = _svd_jvp(primals, tangents)
    return values[..., 0], moved[..., 0]


@jax.custom_jvp
def triplets(matrices: Array) -> tuple[Array, Array, Array]:
    left, values, right = svd(matrices)
    return left, values, right


@triplets.defjvp
def _triplets_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    # With P = U^H dA V: off the diagonal U^H dU = F * (P S + S P^H) and V^H dV = F * (S P + P^H S), where
    # F_jk = 1 / (s_k^2 - s_j^2), nothing for equal values. What phase P has on it goes to U.
    left, values, rows = triplets(*primals)
    right, moved = rows.conj().mT, tangents[0]
    inside = matmul(matmul(left.conj().mT, moved), right)
    s = values.astype(inside.dtype)[..., None, :]
    apart = (s - s.mT) * (s + s.mT)
    same = apart == 0
    turn = jnp.where(same, 0, 1 / jnp.where(same, 1, apart))
    diagonal = jnp.diagonal(inside, axis1=-2, axis2=-1)
    phases = (diagonal - diagonal.conj())[..., None, :] / 2
    within_left = turn * (inside * s + s.mT * inside.conj().mT)
    within_right = turn * (s.mT * inside + inside.conj().mT * s)
    ahead, back = matmul(moved, right), matmul(moved.conj().mT, left)
    left_moved = matmul(left, within_left) + _divided(left * phases + ahead - matmul(left, inside), s)
    right_moved = matmul(right, within_right) + _divided(back - matmul(right, inside.conj().mT), s)
    return (left, values, rows), (left_moved, diagonal.real, right_moved.conj().mT)


def _divided(a: Array, s: Array) -> Array:
    return jnp.where(s == 0, 0, a / jnp.where(s == 0, 1, s))


@_eigvals.defjvp
def _eigvals_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # d lambda_k = w_k^T dA v_k, the w_k being the rows of V^-1
    values, vectors, rows = _diagonalised(*primals)
    return values, jnp.sum(matmul(rows, tangents[0].astype(rows.dtype)) * vectors.mT, axis=-1)


@jax.custom_jvp
def _diagonalised(matrices: Array) -> tuple[Array, Array, Array]:
    """``A V = V L``: values, V, V^-1."""
    values, vectors = eig(matrices)
    (rows,) = inverse(vectors)
    return values, vectors, rows


@_diagonalised.defjvp
def _diagonalised_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    # V^-1 dV = F * (V^-1 dA V) with F_jk = 1 / (l_k - l_j) off the diagonal; on it nothing: whatever multiplies a
    # vector divides its row of V^-1, and is not seen in the values.
    values, vectors, rows = _diagonalised(*primals)
    inside = matmul(matmul(rows, tangents[0].astype(rows.dtype)), vectors)
    apart = values[..., None, :] - values[..., :, None]
    same = apart == 0
    turn = jnp.where(same, 0, inside / jnp.where(same, 1, apart))
    moved = jnp.diagonal(inside, axis1=-2, axis2=-1)
    return (values, vectors, rows), (moved, matmul(vectors, turn), -matmul(turn, rows))
