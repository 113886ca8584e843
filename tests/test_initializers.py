import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt


def test_identity_and_the_irnn_carries_its_state() -> None:
    cell = bptt.rnn(6, activation=jax.nn.relu, recurrent_init=bptt.cells.initializers.identity())
    params = cell.init(jax.random.key(0), 2)
    np.testing.assert_array_equal(params.recurrent, np.eye(6))
    h = jnp.arange(6.0)
    np.testing.assert_array_equal(cell.step(params, h, jnp.zeros(2)), h)
    np.testing.assert_array_equal(bptt.cells.initializers.identity(0.5)(jax.random.key(0), (3, 3)), 0.5 * np.eye(3))


def test_sparse_has_its_nonzeros_and_spectral_radius() -> None:
    weights = np.asarray(
        bptt.cells.initializers.sparse(15, spectral_radius=0.95)(jax.random.key(0), (50, 50)), np.float64
    )
    np.testing.assert_array_equal((weights != 0).sum(axis=1), 15)  # outgoing, by row, as in the released code
    assert (weights != 0).sum(axis=0).std() > 0
    assert np.abs(np.linalg.eigvals(weights)).max() == pytest.approx(0.95, rel=1e-4)
    small = np.asarray(bptt.cells.initializers.sparse(15)(jax.random.key(0), (4, 4)))
    assert (small != 0).all()


def test_chrono_makes_memory_times_uniform() -> None:
    longest, n = 200, 5000
    params = bptt.lstm(
        n, bias_init=bptt.cells.initializers.chrono(longest), recurrent_init=jax.nn.initializers.zeros
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
    params = bptt.gru(7, bias_init=bptt.cells.initializers.chrono(50)).init(jax.random.key(0), 2)
    r, z, n = np.asarray(params.bias).reshape(3, 7)
    np.testing.assert_array_equal([r, n], 0)
    assert (z >= 0).all()
    assert (z > 0).any()


@pytest.mark.parametrize(("r_min", "r_max", "max_phase"), [(0.0, 1.0, 2 * math.pi), (0.6, 0.9, 0.3)])
def test_ring_is_filled_evenly(r_min, r_max, max_phase):
    """|lambda|^2 and phase by Kolmogorov and Smirnov: beyond 1.95 / sqrt(n) once in 1000 keys."""
    n = 20_000
    ring = bptt.cells.initializers.ring(r_min, r_max, max_phase=max_phase)
    nu_log, theta_log = np.asarray(ring(jax.random.key(0), (2, n)), np.float64)
    radial = (np.exp(-2 * np.exp(nu_log)) - r_min**2) / (r_max**2 - r_min**2)
    angular = np.exp(theta_log) / max_phase
    for uniform in (radial, angular):
        gap = np.abs(np.sort(uniform) - (np.arange(n) + 0.5) / n)
        assert gap.max() < 1.95 / np.sqrt(n)
    assert abs(np.corrcoef(radial, angular)[0, 1]) < 4 / np.sqrt(n)


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-23])
@pytest.mark.parametrize("radii", [(0.0, 1.0), (0.0, 0.5), (0.999, 1.0), (0.0, 0.0), (0.7, 0.7)])
def test_ring_is_finite_at_the_ends_of_what_is_drawn(draw, radii, monkeypatch):
    """Single precision, whatever the generator gives; and gamma = sqrt(1 - |lambda|^2) of it."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.full(shape, draw, dtype))
    nu_log, theta_log = bptt.cells.initializers.ring(*radii)(jax.random.key(0), (2, 1), jnp.float32)
    assert np.isfinite([nu_log, theta_log]).all()
    modulus = np.exp(-np.exp(np.asarray(nu_log, np.float64)))
    assert modulus < 1
    np.testing.assert_allclose(modulus, radii[0] if draw == 0 else radii[1], atol=3e-4)
    assert np.isfinite(bptt.cells.lru(1, r_min=radii[0], r_max=radii[1]).init(jax.random.key(0), 1).gamma_log)


TRACED = [
    (bptt.cells.initializers.identity, (0.5,), (math.inf,), "scale: expected a finite number"),
    (
        lambda r: bptt.cells.initializers.sparse(1, spectral_radius=r),
        (0.5,),
        (-0.5,),
        "spectral_radius: expected a number",
    ),
    (bptt.cells.initializers.ring, (0.25, 0.75), (-0.25, 0.75), "r_min: expected a radius"),
    (bptt.cells.initializers.ring, (0.25, 0.75), (0.25, 0.125), "r_max: expected a radius from r_min to 1"),
    (lambda phase: bptt.cells.initializers.ring(max_phase=phase), (0.5,), (7.0,), "max_phase: expected an angle"),
]


@pytest.mark.parametrize(("make", "good", "bad", "message"), TRACED, ids=[message for *_, message in TRACED])
def test_traced_settings(make, good, bad, message, x64):
    """The weights of plain numbers, in the dtype that is asked for; what is out of range is found when it runs."""
    key = jax.random.key(0)
    drawn = jax.jit(lambda *settings: make(*settings)(key, (2, 2), jnp.float32))
    chex.assert_trees_all_close(drawn(*map(jnp.float64, good)), make(*good)(key, (2, 2), jnp.float32), rtol=1e-5)
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(drawn(*bad))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="longest: expected at least 3, got 2"):
        bptt.cells.initializers.chrono(2)
    with pytest.raises(TypeError, match="nonzeros: expected an integer"):
        bptt.cells.initializers.sparse(1.5)
    with pytest.raises(ValueError, match=r"shape: expected a square matrix for the identity, got \[2, 3\]"):
        bptt.cells.initializers.identity()(jax.random.key(0), (2, 3))
    with pytest.raises(ValueError, match="shape: expected a square matrix for a spectral radius"):
        bptt.cells.initializers.sparse()(jax.random.key(0), (2, 3))
    with pytest.raises(ValueError, match=r"\(3, N\) of a gru or \(2, N\) of a min_gru, got \[5, 3\]"):
        bptt.cells.initializers.chrono(9)(jax.random.key(0), (5, 3))
    for radii in [(-0.1, 1), (1, 1), (math.nan, 1)]:
        with pytest.raises(ValueError, match=f"r_min: expected a radius of at least 0 .* got {radii[0]}"):
            bptt.cells.initializers.ring(*radii)
    for radii in [(0.5, 0.4), (0, 1.1), (0, math.nan)]:
        with pytest.raises(ValueError, match=f"r_max: expected a radius from r_min to 1, got {radii[1]}"):
            bptt.cells.initializers.ring(*radii)
    for phase in (0, 7, math.nan):
        with pytest.raises(ValueError, match=f"max_phase: expected an angle above 0 .* got {phase}"):
            bptt.cells.initializers.ring(max_phase=phase)
    with pytest.raises(ValueError, match=r"shape: expected \(2, N\), of nu_log and theta_log, got \[3, 2\]"):
        bptt.cells.initializers.ring()(jax.random.key(0), (3, 2))
