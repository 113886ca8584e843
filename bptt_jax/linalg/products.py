"""Products of Jacobians, in log scale: 0.9^5000 is 1e-229, and float32 holds nothing below 1e-45.

All take, beside the Jacobians, what a sequence with padding and new beginnings has. Entry k of `resets` says that a
reset comes before the step from h_k to h_{k+1}. Nothing passes a reset: a product with one between two factors is
zero, whatever the factors are. Before the first factor it changes nothing, for a product is the derivative with
respect to what its first step starts from.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, PyTree

from bptt_jax import devices
from bptt_jax.checks import check_flags, check_leaves, check_matrices
from bptt_jax.linalg.logscale import LogScaled, to_log
from bptt_jax.linalg.spectra import spectral_norm
from bptt_jax.timeline import after_reset, before_reset, finite_steps, resets_at_real_steps


def jacobian_product(
    jacobians: Num[Array, "T D D"],
    *,
    resets: Bool[Array, " T"] | None = None,
    mask: Bool[Array, " T"] | None = None,
    states: PyTree = None,
) -> LogScaled:
    """The product ``J_{T-1} ... J_1 J_0 = dh_T/dh_0``, the later step on the left.

    Args:
      jacobians: ``[T, D, D]`` in order of time, as from `bptt_jax.jacobians`.
      resets: those of the `bptt_jax.Sequence`: the product is zero if there is one after the first real step.
      mask: that of the `bptt_jax.Sequence`. In padding the Jacobian counts as the identity, whatever stands there,
        and a reset takes place before the next real step.
      states: h_1 .. h_T, leaves ``[T, ...]``, as from `bptt_jax.unroll`. A step that leads to NaN or infinity has a
        Jacobian of NaN then, also where it does not show it (relu, linear steps).

    Returns:
      The matrix ``[D, D]``, as `LogScaled`.

    Raises:
      TypeError, ValueError: `jacobians` is no ``[T, D, D]`` array of numbers, or the others do not fit.

    Example:
      >>> found = bptt.jacobian_product(jnp.full((5000, 1, 1), 0.9))
      >>> round(float(found.log_norm), 1)  # of 1e-229
      -526.8
    """
    return _product(*checked(jacobians, resets, mask, states))


def product_log_norms(
    jacobians: Num[Array, "T D D"],
    *,
    resets: Bool[Array, " T"] | None = None,
    mask: Bool[Array, " T"] | None = None,
    states: PyTree = None,
) -> Float[Array, " T"]:
    """How much of the error signal can come back to each step: log of the spectral norm of dh_T/dh_t.

    Args, Raises: as for `jacobian_product`.

    Returns:
      ``[T]``: entry t is ``log ||dh_T/dh_t||_2`` in nats, ``t = 0 .. T-1``, with h_t what the step starts from, and
      in padding the state that is held. All lead to the end of the sequence: -inf before the last reset, where the
      product is zero, and after it what the last piece gives alone. NaN from the last matrix that is not finite
      backwards, to the reset before it.

    Example:
      >>> bptt.product_log_norms(jnp.full((3, 1, 1), 0.5)) / jnp.log(2.0)
      Array([-3., -2., -1.], dtype=float32)
      >>> episodes = jnp.array([False, True, False])
      >>> bptt.product_log_norms(jnp.full((3, 1, 1), 0.5), resets=episodes) / jnp.log(2.0)
      Array([-inf,  -2.,  -1.], dtype=float32)
    """
    return _product_log_norms(*checked(jacobians, resets, mask, states))


def prefix_products(
    jacobians: Num[Array, "T D D"],
    *,
    resets: Bool[Array, " T"] | None = None,
    mask: Bool[Array, " T"] | None = None,
    states: PyTree = None,
) -> LogScaled:
    """All products from the start, dh_1/dh_0 .. dh_T/dh_0, in parallel over time (Blelloch's scan).

    Args, Raises: as for `jacobian_product`.

    Returns:
      `LogScaled` with a leading axis of T: entry t is ``J_t ... J_0 = dh_{t+1}/dh_0``, zero from the first reset on
      that comes after the first real step. Some 2 T products of matrices, in O(log T) rounds.

    Example:
      >>> found = bptt.linalg.prefix_products(jnp.full((3, 1, 1), 0.5))
      >>> found.value.ravel()
      Array([0.5  , 0.25 , 0.125], dtype=float32)
    """
    return _cumulated(*checked(jacobians, resets, mask, states), reverse=False)


def suffix_products(
    jacobians: Num[Array, "T D D"],
    *,
    resets: Bool[Array, " T"] | None = None,
    mask: Bool[Array, " T"] | None = None,
    states: PyTree = None,
) -> LogScaled:
    """All products to the end: entry t is ``J_{T-1} ... J_t = dh_T/dh_t``; otherwise as `prefix_products`.

    They are zero before the last reset; see `product_log_norms`, which gives their norms.

    Example:
      >>> found = bptt.linalg.suffix_products(jnp.full((3, 1, 1), 0.5))
      >>> found.value.ravel()
      Array([0.125, 0.25 , 0.5  ], dtype=float32)
    """
    return _cumulated(*checked(jacobians, resets, mask, states), reverse=True)


def identity(size: int, dtype: jnp.dtype) -> LogScaled:
    """The identity."""
    return LogScaled(jnp.eye(size, dtype=dtype), jnp.zeros((), jnp.int32))


def log_spectral_norm(matrix: LogScaled) -> Float[Array, "..."]:
    """Natural logarithm of the spectral norm: -inf for zero, NaN for what is not finite."""
    return log_of_norm(spectral_norm(matrix.mantissa), matrix.exponent)


def log_of_norm(norm: Float[Array, "..."], exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """Natural logarithm of ``norm * 2^exponent``: -inf for zero."""
    return to_log(jnp.where(norm == 0, 1, norm), exponent, zero=norm == 0)


def products_back(after: LogScaled, jacobians: Num[Array, "K D D"]) -> tuple[LogScaled, LogScaled]:
    """One stretch of the backward recursion ``P_t = P_{t+1} J_t``, as if there were no resets.

    Args:
      after: the product of all later Jacobians.
      jacobians: ``[K, D, D]`` in order of time.

    Returns:
      The product with these included, and all on the way, ``[K, D, D]`` in order of time.
    """

    def body(product: LogScaled, jacobian: Array) -> tuple[LogScaled, LogScaled]:
        product = product @ jacobian
        return product, product

    return devices.scan(body, after, jacobians, reverse=True)


Factors = tuple[Array, Array | None, Array | None, PyTree]


def checked(jacobians: Array, resets: Array | None, mask: Array | None, states: PyTree) -> Factors:
    jacobians = check_matrices("jacobians", jacobians, square=True, ndim=3)
    for name, flags in (("resets", resets), ("mask", mask)):
        if flags is not None:
            check_flags(name, flags, len(jacobians))
    check_leaves("states", states)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(states)}
    if lengths - {(len(jacobians),)}:
        raise ValueError(f"states: expected leaves [{len(jacobians)}, ...], as the jacobians, got {lengths}")
    return jacobians, resets, mask, states


def factors(jacobians: Array, resets: Array | None, mask: Array | None, states: PyTree) -> tuple[Array, Any]:
    """The matrices that are multiplied, and the resets at real steps."""
    if states is not None:
        jacobians = jnp.where(finite_steps(states)[:, None, None], jacobians, jnp.nan)
    if mask is not None:
        jacobians = jnp.where(mask[:, None, None], jacobians, jnp.eye(jacobians.shape[-1], dtype=jacobians.dtype))
        resets = None if resets is None else resets_at_real_steps(resets, mask)
    return jacobians, resets


@devices.compiled
def _cumulated(*given: Any, reverse: bool) -> LogScaled:
    jacobians, resets = factors(*given)

    def combine(near: LogScaled, far: LogScaled) -> LogScaled:
        # `near` is next to where the products begin: on the right going forwards, on the left going backwards.
        return near @ far if reverse else far @ near

    products = jax.lax.associative_scan(combine, LogScaled.of(jacobians, axes=1), reverse=reverse)
    if resets is None:
        return products
    return products.zero_where(before_reset(resets) if reverse else after_reset(resets, given[2]))


@devices.compiled
def _product(*given: Any) -> LogScaled:
    jacobians, resets = factors(*given)

    def body(product: LogScaled, jacobian: Array) -> tuple[LogScaled, None]:
        return jacobian @ product, None

    product = devices.scan(body, identity(jacobians.shape[-1], jacobians.dtype), jacobians)[0]
    return product if resets is None else product.zero_where(after_reset(resets, given[2])[-1])


@devices.compiled
def _product_log_norms(*given: Any) -> Array:
    jacobians, resets = factors(*given)
    norms = log_spectral_norm(products_back(identity(jacobians.shape[-1], jacobians.dtype), jacobians)[1])
    return norms if resets is None else jnp.where(before_reset(resets), -jnp.inf, norms)
