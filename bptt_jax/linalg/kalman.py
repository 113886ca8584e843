"""Affine recurrences held back by a Kalman filter, in parallel over time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bptt_jax import devices
from bptt_jax.leaves import along_leading
from bptt_jax.linalg.affine import held_scan
from bptt_jax.linalg.precision import matmul, wide


def filtered_scan(
    factors: Float[Array, "T D D"] | Float[Array, "T D"],
    offsets: Float[Array, "T D"],
    weight: Float[Array, ""],
    most: Float[Array, ""],
    *,
    begins: Bool[Array, " T"] | None = None,
    held: Bool[Array, " T"] | None = None,
) -> Float[Array, "T D"]:
    """The means of a Kalman filter: all h_t of ``h_t = G_t (A_t h_{t-1} + b_t)``, from ``h_0 = 0``; see `gains`.

    Args:
      factors, offsets, most, begins: as for `held_scan`.
      weight: one over the variance of the noise with which h_t is seen to be zero; 0 makes G the identity.
      held: steps that are none: G is the identity there, and the factor is to be, too.
    """

    def filtered() -> tuple[Array, Array]:
        kept = gains(factors, weight, begins=begins, held=held)
        return _times(kept, factors), kept * offsets if kept.ndim == 2 else matmul(kept, offsets[..., None])[..., 0]

    # With a weight of 0 the covariance may be infinite, and the gain 1 / (1 + 0 * inf).
    closed, moved = devices.cond(weight > 0, filtered, lambda: (factors, offsets))
    return held_scan(closed, moved, most, begins=begins)


def gains(
    factors: Float[Array, "T D D"] | Float[Array, "T D"],
    weight: Float[Array, ""],
    *,
    begins: Bool[Array, " T"] | None = None,
    held: Bool[Array, " T"] | None = None,
) -> Float[Array, "T D D"] | Float[Array, "T D"]:
    """``G_t = (I + weight P_t)^-1``, P_t the covariance that the filter predicts of ``h_t = A_t h_{t-1} + noise``.

    The noise has variance 1, h is known where it begins, and seen to be 0 with noise of variance 1 / weight after each
    step. Where products of the A shrink P stays near 1, and the gain near 1 / (1 + weight); where they would grow P
    does, and the gain holds them back.
    """

    def where(which: Array | None, a: Array, b: Array) -> Array:
        return b if which is None else jnp.where(along_leading(which, b), a, b)

    factors, noise, share = where(begins, 0 * factors, factors), _identity(factors), weight / (1 + weight)
    steps = _Filtering(
        where(held, factors, (1 - share) * factors),
        where(held, 0 * noise, (1 - share) * noise),
        where(held, 0 * noise, share * _times(_transposed(factors), factors)),
    )
    found = jax.lax.associative_scan(_one_after_the_other, steps).covariance
    before = jnp.concatenate([jnp.zeros_like(found[:1]), found[:-1]])
    predicted = _times(_times(factors, before), _transposed(factors)) + noise
    return where(held, noise, _inverse(noise + weight * predicted))


class _Filtering(NamedTuple):
    """Several steps of the filter at once, ``P -> A (P^-1 + J)^-1 A^T + C`` (Särkkä, Garcia-Fernandez 2021,
    arXiv:1905.13002, lemma 8)."""

    factor: Array
    covariance: Array
    information: Array


def _one_after_the_other(near: _Filtering, far: _Filtering) -> _Filtering:
    between = _inverse(_identity(near.factor) + _times(near.covariance, far.information))
    onward = _times(far.factor, between)
    return _Filtering(
        _times(onward, near.factor),
        _times(_times(onward, near.covariance), _transposed(far.factor)) + far.covariance,
        _times(_times(_transposed(near.factor), _times(far.information, between)), near.factor) + near.information,
    )


# Of diagonal matrices, [T, D], as well.
def _identity(a: Array) -> Array:
    return jnp.ones_like(a) if a.ndim == 2 else jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)


def _times(a: Array, b: Array) -> Array:
    return a * b if a.ndim == 2 else matmul(a, b)


def _transposed(a: Array) -> Array:
    return a if a.ndim == 2 else a.mT


def _inverse(a: Array) -> Array:
    if a.ndim == 2:
        return 1 / a
    return jnp.linalg.inv(wide(a)).astype(a.dtype)
