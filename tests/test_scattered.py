"""Numbers without a pattern: evenly spread, unrelated to each other and to their places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bptt_jax.linalg.scattered import scattered


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.float64])
def test_spread_and_unrelated(dtype, x64):
    found = scattered((64, 100), dtype)
    assert found.dtype == dtype
    numbers = np.asarray(found, np.float64)
    n = numbers.size
    assert np.all(np.abs(numbers) <= 1)
    for power in (1, 2, 3, 4):  # the moments of an even distribution, within four standard errors
        expected, square = (0 if k % 2 else 1 / (k + 1) for k in (power, 2 * power))
        assert abs(np.mean(numbers**power) - expected) < 4 * np.sqrt((square - expected**2) / n)
    flat = numbers.ravel()
    for lag in (1, 2, 3, 4, 8, 16, 64, 100):
        assert abs(np.mean(flat[lag:] * flat[:-lag])) < 4 / 3 / np.sqrt(n - lag)
    # Rows of a random matrix: singular values between those of Marchenko and Pastur.
    values = np.linalg.svd(numbers * np.sqrt(3 / 100), compute_uv=False)
    np.testing.assert_allclose(values[[0, -1]], [1.8, 0.2], atol=0.1)


def test_always_the_same():
    np.testing.assert_array_equal(
        scattered((3, 4), jnp.float32), jax.jit(lambda: scattered((12,), jnp.float32))().reshape(3, 4)
    )
