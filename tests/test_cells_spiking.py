"""Spikes and their surrogates; the radius of a reservoir."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slices import covering

import bptt_jax as bptt
from bptt_jax.cells import surrogates

N, I = 5, 3
FORMULAS = {
    "fast_sigmoid": lambda x: 1 / (1 + 25 * np.abs(x)) ** 2,
    "triangular": lambda x: 0.3 * np.maximum(1 - np.abs(x), 0),
    "arctan": lambda x: 1 / (1 + (np.pi * x) ** 2),
}


@pytest.mark.parametrize("name", covering(list(FORMULAS), "fast_sigmoid"))
def test_a_spike_has_the_surrogate_as_its_derivative(name, x64):
    """Forwards, backwards, and once more: the second derivative is the surrogate's, by differences."""
    spike, x = getattr(surrogates, name)(), jnp.array([-1.5, -0.5, -0.125, 0.25, 0.5, 2.0])
    derivative = jax.vmap(jax.grad(spike))
    np.testing.assert_array_equal(spike(x), np.asarray(x) > 0)
    assert spike(jnp.zeros(())) == 0
    np.testing.assert_allclose(derivative(x), FORMULAS[name](np.asarray(x)), rtol=1e-12)
    np.testing.assert_allclose(jax.jvp(spike, (x,), (jnp.ones_like(x),))[1], derivative(x), rtol=1e-12)
    slopes = (FORMULAS[name](np.asarray(x) + 1e-6) - FORMULAS[name](np.asarray(x) - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.vmap(jax.grad(jax.grad(spike)))(x), slopes, rtol=1e-6, atol=1e-9)
    assert spike(jnp.ones(2, jnp.bfloat16)).dtype == derivative(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


def test_surrogates_of_equal_numbers_are_the_same():
    assert surrogates.fast_sigmoid(10) is surrogates.fast_sigmoid(10.0)
    spiking = partial(bptt.cells.lif, spike=surrogates.arctan())
    assert spiking(3).step is spiking(4, decay=0.95).step
    assert spiking(3).step is not bptt.cells.lif(3).step
    with pytest.raises(TypeError, match="slope: expected a number known before compilation"):
        jax.jit(lambda slope: surrogates.fast_sigmoid(slope)(1.0))(2.0)


def test_the_jacobian_of_lif_is_that_of_its_surrogate():
    """Of the spikes s' = diag(psi(v - threshold)) times that of v, and of v by hand."""
    cell = bptt.cells.lif(N, decay=0.75, threshold=0.5, spike=surrogates.triangular())
    params = jax.jit(lambda key: cell.init(key, I))(jax.random.key(0))
    np.testing.assert_array_equal(np.diag(params.recurrent), 0)
    state = bptt.cells.spiking.LIFState(jnp.array([1.0, 0, 1, 0, 0]), jnp.linspace(0, 1, N))
    x = jnp.ones((1, I))
    found = np.asarray(bptt.jacobians(cell.step, params, state, x)[0])
    new = cell.step(params, state, x[0])
    of_v = np.concatenate([params.recurrent - 0.5 * np.eye(N), 0.75 * np.eye(N)], axis=1)
    psi = FORMULAS["triangular"](np.asarray(new.v) - 0.5)
    np.testing.assert_allclose(found, np.concatenate([psi[:, None] * of_v, of_v]), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(new.h, np.asarray(new.v) > 0.5)


def test_each_spike_raises_the_threshold_of_alif():
    """Under a constant current intervals between spikes grow, until as much wears off as is added."""
    cell = bptt.cells.alif(1, decay=0.5, rho=0.9, beta=1.0)
    params = cell.init(jax.random.key(0), 1)._replace(input=jnp.ones((1, 1)))
    states = bptt.unroll(cell.step, params, cell.initial_state(), jnp.full((60, 1), 2.0))
    intervals = np.diff(np.flatnonzero(np.asarray(states.h[:, 0])))
    assert intervals[0] < intervals[-1]
    assert np.all(np.asarray(states.h) == (np.asarray(states.v) > 1 + np.asarray(states.a)))


@pytest.mark.parametrize(
    ("alpha", "radius"), covering([(1.0, 0.9), (0.25, 0.99), (0.25, 0.7500001), (0.5, 1.5)], (0.25, 0.99))
)
def test_the_effective_radius_of_a_reservoir_is_exact(alpha, radius, x64):
    cell = bptt.cells.echo_state(30, alpha=alpha, spectral_radius=radius, connections=3, dtype=jnp.float64)
    params = jax.jit(lambda key: cell.init(key, I))(jax.random.key(1))
    effective = (1 - alpha) * np.eye(30) + alpha * np.asarray(params.recurrent)
    np.testing.assert_allclose(np.max(np.abs(np.linalg.eigvals(effective))), radius, rtol=1e-12)
    np.testing.assert_array_equal(np.count_nonzero(params.recurrent, axis=0), 3)
    rest = params._replace(bias=jnp.zeros(30))
    np.testing.assert_allclose(
        bptt.jacobians(cell.step, rest, cell.initial_state(), jnp.zeros((1, I)))[0], effective, rtol=1e-12
    )


def test_a_radius_that_no_scale_gives_is_refused():
    with pytest.raises(ValueError, match="spectral_radius: expected a finite number above 1 - alpha"):
        bptt.cells.echo_state(4, alpha=0.25, spectral_radius=0.75)
    with pytest.raises(Exception, match="spectral_radius: expected"):
        jax.block_until_ready(
            jax.jit(lambda r: bptt.cells.echo_state(2, spectral_radius=r).init(jax.random.key(0), 1))(-0.5)
        )
    few = bptt.cells.echo_state(3, connections=1, spectral_radius=0.5)  # there is always a cycle
    many = jax.jit(jax.vmap(lambda key: few.init(key, 1)))(jax.random.split(jax.random.key(0), 20))
    radii = np.max(np.abs(np.linalg.eigvals(many.recurrent)), axis=-1)
    np.testing.assert_allclose(radii, 0.5, rtol=1e-4)
