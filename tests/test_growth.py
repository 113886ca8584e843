"""Statistics of the logarithms of a signal: which growth it is."""

import numpy as np
import pytest

from bptt_jax.analysis.growth import polynomial_order


def order(gains):
    """Of one segment, given at lags 1, 2, ..."""
    return polynomial_order(np.arange(len(gains), 0, -1), np.asarray(gains)[::-1])


def gains_of(jacobian, steps):
    signal, found = np.ones(len(jacobian)), []
    for _ in range(steps):
        signal = np.transpose(jacobian) @ signal
        found.append(np.log(np.linalg.norm(signal) / np.sqrt(len(jacobian))))
    return found


@pytest.mark.parametrize("dt", [1.0, 30.0])
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_chain_of_integrators_grows_as_a_power_of_the_lag(degree, dt):
    """Of x' = x + dt v that is 1."""
    chain = np.eye(degree + 1) + dt * np.eye(degree + 1, k=1)
    np.testing.assert_allclose(order(gains_of(chain, 400)), degree, rtol=0.05)


def test_an_exponential_is_none():
    lags = np.arange(1, 401)
    for rate in (-0.1, 1e-3, 0.01, 0.1, 2.0):
        assert np.isnan(order(rate * lags)), rate
    # Nor is what an exponential ends that a power began, or begins that it ends.
    assert np.isnan(order(2 * np.log(lags) - 0.02 * lags))
    assert np.isnan(order(gains_of([[1.02, 1], [0, 1.02]], 400)))
    # What falls as a power of the lag has a horizon, and what keeps its size no order.
    assert np.isnan(order(-2 * np.log(lags)))
    assert np.isnan(order(0 * lags))


def test_a_random_walk_is_none():
    """Of 3000, whatever their drift, not one that grows a thousandfold."""
    rng = np.random.default_rng(0)
    for drift in (0.0, 0.02, 0.1):
        for scale in (0.05, 0.3):
            walks = np.cumsum(drift + scale * rng.standard_normal((500, 300)), axis=1)
            assert not any(not np.isnan(order(walk)) for walk in walks if np.max(walk) > np.log(1e3))


def test_too_few_lags_tell_nothing():
    assert np.isnan(order(np.log(np.arange(1, 8))))
    np.testing.assert_allclose(order(np.log(np.arange(1, 21))), 1)
    assert np.isnan(polynomial_order(np.zeros(30), np.full(30, np.nan)))


def test_the_longest_segment_is_the_one_that_is_judged():
    """Among others, and padding within it."""
    lags = np.r_[40:0:-1, 60:30:-1, np.zeros(3), 30:0:-1, 50:0:-1, 0, 0]
    gains = np.where(lags > 0, np.log(np.maximum(lags, 1)), np.nan)
    gains[:40] = gains[-52:-2] = 7.0
    np.testing.assert_allclose(polynomial_order(lags, gains), 1)
