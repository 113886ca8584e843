import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt


def test_identity_and_the_irnn_carries_its_state() -> None:
    cell = bptt.rnn(6, activation=jax.nn.relu, recurrent_init=bptt.initializers.identity())
    params = cell.init(jax.random.key(0), 2)
    np.testing.assert_array_equal(params.recurrent, np.eye(6))
    h = jnp.arange(6.0)
    np.testing.assert_array_equal(cell.step(params, h, jnp.zeros(2)), h)
    np.testing.assert_array_equal(bptt.initializers.identity(0.5)(jax.random.key(0), (3, 3)), 0.5 * np.eye(3))


def test_sparse_has_its_nonzeros_and_spectral_radius() -> None:
    weights = np.asarray(
        bptt.initializers.sparse(15, spectral_radius=0.95)(jax.random.key(0), (50, 50)), np.float64
    )
    np.testing.assert_array_equal((weights != 0).sum(axis=1), 15)  # outgoing, by row, as in the released code
    assert (weights != 0).sum(axis=0).std() > 0
    assert np.abs(np.linalg.eigvals(weights)).max() == pytest.approx(0.95, rel=1e-4)
    small = np.asarray(bptt.initializers.sparse(15)(jax.random.key(0), (4, 4)))
    assert (small != 0).all()


def test_chrono_makes_memory_times_uniform() -> None:
    longest, n = 200, 5000
    params = bptt.lstm(
        n, bias_init=bptt.initializers.chrono(longest), recurrent_init=jax.nn.initializers.zeros
    ).init(jax.random.key(0), 1)
    i, f, g, o = np.asarray(params.bias).reshape(4, n)
    np.testing.assert_array_equal(i, -f)
    np.testing.assert_array_equal([g, o], 0)
    times = np.exp(f)
    assert times.min() >= 1
    assert times.max() <= longest - 1
    # Quantiles of U[1, 199]; the standard error of a quantile of 5000 draws is at most 1.4.
    np.testing.assert_allclose(np.quantile(times, [0.25, 0.5, 0.75]), [50.5, 100, 149.5], atol=6)


def test_chrono_gru_keeps_by_its_update_gate() -> None:
    params = bptt.gru(7, bias_init=bptt.initializers.chrono(50)).init(jax.random.key(0), 2)
    r, z, n = np.asarray(params.bias).reshape(3, 7)
    np.testing.assert_array_equal([r, n], 0)
    assert (z >= 0).all()
    assert (z > 0).any()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="longest: expected at least 3, got 2"):
        bptt.initializers.chrono(2)
    with pytest.raises(TypeError, match="nonzeros: expected an integer"):
        bptt.initializers.sparse(1.5)
    with pytest.raises(ValueError, match=r"shape: expected a square matrix for the identity, got \[2, 3\]"):
        bptt.initializers.identity()(jax.random.key(0), (2, 3))
    with pytest.raises(ValueError, match="shape: expected a square matrix for a spectral radius"):
        bptt.initializers.sparse()(jax.random.key(0), (2, 3))
    with pytest.raises(ValueError, match=r"shape: expected \(4, N\) of an lstm or \(3, N\) of a gru, got \[2, 3\]"):
        bptt.initializers.chrono(9)(jax.random.key(0), (2, 3))
