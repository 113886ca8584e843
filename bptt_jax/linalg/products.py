"""Products of Jacobians, in log scale: 0.9^5000 is 1e-229, and float32 holds nothing below 1e-45."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from bptt_jax.checks import check_matrices
from bptt_jax.linalg import logscale
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.linalg.spectra import spectral_norm


def jacobian_product(jacobians: Array) -> LogScaled:
    """The product ``J_{T-1} ... J_1 J_0 = dh_T/dh_0``, the later step on the left.

    Args:
      jacobians: ``[T, D, D]`` in order of time, as from `bptt_jax.jacobians`.

    Returns:
      The matrix ``[D, D]``, as `LogScaled`.

    Raises:
      TypeError, ValueError: `jacobians` is no ``[T, D, D]`` array of numbers.

    Example:
      >>> found = bptt.jacobian_product(jnp.full((5000, 1, 1), 0.9))
      >>> round(float(found.log_norm), 1)  # of 1e-229
      -526.8
    """
    jacobians = check_matrices("jacobians", jacobians, square=True, ndim=3)
    return _product(jacobians)


def product_log_norms(jacobians: Array) -> Array:
    """How much of the error signal can come back to each step: log of the spectral norm of dh_T/dh_t.

    Args:
      jacobians: ``[T, D, D]`` in order of time, as from `bptt_jax.jacobians`.

    Returns:
      ``[T]``: entry t is ``log ||dh_T/dh_t||_2`` in nats, ``t = 0 .. T-1``; -inf where the product is zero, NaN
      from the last matrix that is not finite backwards.

    Raises:
      TypeError, ValueError: `jacobians` is no ``[T, D, D]`` array of numbers.

    Example:
      >>> bptt.product_log_norms(jnp.full((3, 1, 1), 0.5)) / jnp.log(2.0)
      Array([-3., -2., -1.], dtype=float32)
    """
    jacobians = check_matrices("jacobians", jacobians, square=True, ndim=3)
    return _product_log_norms(jacobians)


def prefix_products(jacobians: Array) -> LogScaled:
    """All products from the start, dh_1/dh_0 .. dh_T/dh_0, in parallel over time (Blelloch's scan).

    Args:
      jacobians: ``[T, D, D]`` in order of time, as from `bptt_jax.jacobians`.

    Returns:
      `LogScaled` with a leading axis of T: entry t is ``J_t ... J_0 = dh_{t+1}/dh_0``. Some 2 T products of
      matrices, in O(log T) rounds.

    Raises:
      TypeError, ValueError: `jacobians` is no ``[T, D, D]`` array of numbers.

    Example:
      >>> found = bptt.prefix_products(jnp.full((3, 1, 1), 0.5))
      >>> found.value.ravel()
      Array([0.5  , 0.25 , 0.125], dtype=float32)
    """
    return _cumulated(check_matrices("jacobians", jacobians, square=True, ndim=3), reverse=False)


def suffix_products(jacobians: Array) -> LogScaled:
    """All products to the end: entry t is ``J_{T-1} ... J_t = dh_T/dh_t``; otherwise as `prefix_products`.

    Example:
      >>> found = bptt.suffix_products(jnp.full((3, 1, 1), 0.5))
      >>> found.value.ravel()
      Array([0.125, 0.25 , 0.5  ], dtype=float32)
    """
    return _cumulated(check_matrices("jacobians", jacobians, square=True, ndim=3), reverse=True)


@partial(jax.jit, static_argnames="reverse")
def _cumulated(jacobians: Array, *, reverse: bool) -> LogScaled:
    normalize = jax.vmap(logscale.normalize)
    zeros = jnp.zeros(len(jacobians), jnp.int32)

    def combine(near: tuple[Array, Array], far: tuple[Array, Array]) -> tuple[Array, Array]:
        # `near` is next to where the products begin: on the right going forwards, on the left going backwards.
        left, right = (near, far) if reverse else (far, near)
        return normalize(matmul(left[0], right[0]), left[1] + right[1])

    matrices, exponents = jax.lax.associative_scan(combine, normalize(jacobians, zeros), reverse=reverse)
    return LogScaled(matrices, exponents)


@jax.jit
def _product(jacobians: Array) -> LogScaled:
    def body(carry: tuple[Array, Array], jacobian: Array) -> tuple[tuple[Array, Array], None]:
        return logscale.normalize(matmul(jacobian, carry[0]), carry[1]), None

    return LogScaled(*jax.lax.scan(body, identity(jacobians), jacobians)[0])


@jax.jit
def _product_log_norms(jacobians: Array) -> Array:
    return suffix_log_norms(identity(jacobians), jacobians)[1]


def identity(jacobians: Array) -> tuple[Array, Array]:
    """The empty product, as ``(mantissa, exponent)``."""
    return jnp.eye(jacobians.shape[-1], dtype=jacobians.dtype), jnp.zeros((), jnp.int32)


def suffix_log_norms(after: tuple[Array, Array], jacobians: Array) -> tuple[tuple[Array, Array], Array]:
    """One stretch of the backward recursion ``P_t = P_{t+1} J_t``.

    Args:
      after: the product of all later Jacobians as ``(mantissa, exponent)``.
      jacobians: ``[K, D, D]`` in order of time.

    Returns:
      The product with these included, and ``[K]`` log spectral norms.
    """

    def body(carry: tuple[Array, Array], jacobian: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        carry = logscale.normalize(matmul(carry[0], jacobian), carry[1])
        return carry, carry

    before, (matrices, exponents) = jax.lax.scan(body, after, jacobians, reverse=True)
    norms = spectral_norm(matrices)
    zero = norms == 0
    return before, logscale.to_log(jnp.where(zero, 1, norms), exponents, zero=zero)


def matmul(a: Array, b: Array) -> Array:
    # GPUs and TPUs multiply float32 in reduced precision by default: an error of 1e-3 a factor.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
