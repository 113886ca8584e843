"""The gains that hold an affine recurrence back, against a filter step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bptt_jax.linalg.affine import held_scan
from bptt_jax.linalg.kalman import filtered_scan, gains


@pytest.mark.parametrize("diagonal", [False, True])
def test_gains_are_those_of_a_kalman_filter(x64, diagonal) -> None:
    """Step by step in NumPy: covariance 0 at the start and at resets, noise 1, seen to be 0 with noise 1 / weight."""
    rng = np.random.default_rng(0)
    matrices, weight = 1.5 * rng.standard_normal((11, 3, 3)), 0.7
    if diagonal:
        matrices = matrices * np.eye(3)
    real, reset = np.arange(11) % 5 != 2, np.arange(11) == 9
    given = np.where(real[:, None, None], matrices, np.eye(3))
    found = jax.jit(gains)(
        jnp.asarray(np.diagonal(given, axis1=1, axis2=2) if diagonal else given),
        jnp.asarray(weight),
        begins=jnp.asarray(reset),
        held=jnp.asarray(~real),
    )
    covariance = np.zeros((3, 3))
    for t in range(11):
        if real[t]:
            before = 0 * covariance if reset[t] else covariance
            predicted = matrices[t] @ before @ matrices[t].T + np.eye(3)
            kept = np.eye(3) - predicted @ np.linalg.inv(predicted + np.eye(3) / weight)
            covariance = kept @ predicted
        else:
            kept = np.eye(3)
        np.testing.assert_allclose(np.diag(found[t]) if diagonal else found[t], kept, rtol=1e-9, atol=1e-12)


def test_means_are_those_of_the_filter(x64) -> None:
    rng = np.random.default_rng(0)
    factors, offsets = rng.standard_normal((7, 2, 2)), rng.standard_normal((7, 2))
    kept, h = np.asarray(jax.jit(gains)(jnp.asarray(factors), jnp.asarray(0.3))), np.zeros(2)
    found = jax.jit(filtered_scan)(jnp.asarray(factors), jnp.asarray(offsets), jnp.asarray(0.3), jnp.asarray(1e9))
    for t in range(7):
        h = kept[t] @ (factors[t] @ h + offsets[t])
        np.testing.assert_allclose(found[t], h, rtol=1e-12)


@pytest.mark.parametrize("diagonal", [False, True])
def test_where_nothing_is_held_back_covariances_may_overflow(diagonal) -> None:
    """With a weight of 0 the gains are 1, though the products of the factors are infinite, and so is the covariance."""
    factors = jnp.full((300, 2), 3.0, jnp.float32) if diagonal else jnp.tile(3 * jnp.eye(2), (300, 1, 1))
    offsets, most = jnp.ones((300, 2), jnp.float32), jnp.float32(1e9)
    found = jax.jit(filtered_scan)(factors, offsets, jnp.float32(0), most)
    np.testing.assert_array_equal(found, held_scan(factors, offsets, most))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype) -> None:
    wide = 0.3 * np.random.default_rng(3).standard_normal((4, 2, 2))
    expected = jax.jit(gains)(jnp.asarray(wide, jnp.float32), jnp.asarray(0.5, jnp.float32))
    found = jax.jit(gains)(jnp.asarray(wide, dtype), jnp.asarray(0.5, dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.02)
