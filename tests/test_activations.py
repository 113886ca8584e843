"""The functions of the gates: the values of JAX's own, slopes as exact or more so, from fewer arrays kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.cells import activations

PAIRS = [(activations.tanh, jnp.tanh), (activations.sigmoid, jax.nn.sigmoid)]
both = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["tanh", "sigmoid"])


@both
def test_values_are_those_of_jax(ours, theirs):
    x = jnp.linspace(-20, 20, 321)
    np.testing.assert_array_equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("activation", "slope"),
    [(activations.tanh, lambda y: 1 - y * y), (activations.sigmoid, lambda y: y - y * y)],
    ids=["tanh", "sigmoid"],
)
def test_slopes_are_exact_in_the_value(activation, slope):
    """In float32 to roundings of the slope itself, also where units saturate: 1 - y^2 would be off by percents."""
    x = jnp.linspace(-8, 8, 321)
    y = np.asarray(activation(x), np.float64)
    np.testing.assert_allclose(jax.vmap(jax.grad(activation))(x), slope(y), rtol=3e-7)


@both
def test_higher_derivatives_in_both_modes(ours, theirs, x64):
    x = jnp.linspace(-4, 4, 9)
    for twice in (
        lambda f: jax.grad(jax.grad(f)),
        lambda f: jax.jacfwd(jax.jacrev(f)),
        lambda f: jax.jacfwd(jax.jacfwd(f)),
    ):
        np.testing.assert_allclose(jax.vmap(twice(ours))(x), jax.vmap(twice(theirs))(x), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("activation", [activations.tanh, activations.sigmoid], ids=["tanh", "sigmoid"])
def test_saturated_units_pass_nothing_on(activation):
    slopes = jax.vmap(jax.grad(activation))(jnp.array([-jnp.inf, -200.0, 200.0, jnp.inf]))
    np.testing.assert_array_equal(slopes, 0.0)
    assert jnp.isnan(jax.grad(activation)(jnp.nan))


@both
def test_of_a_product_only_the_factors_are_kept(ours, theirs):
    def kept(f):
        return [a.shape for a in jax.tree.leaves(jax.linearize(lambda a, b: f(a) * b, jnp.ones(3), jnp.ones(3))[1])]

    assert kept(ours) == [(3,), (3,)]
    assert len(kept(theirs)) > 2  # else ours have no reason to be


def test_weighted_mean(x64):
    """Exact at the ends, so that a gate that is shut holds its state for ever."""
    weight, a, b = jnp.array([0.0, 1.0, 0.3]), jnp.array([0.1, 1e30, 2.0]), jnp.array([1e30, 0.7, -5.0])
    np.testing.assert_array_equal(activations.weighted_mean(weight, a, b)[:2], [0.1, 0.7])
    slopes = jax.vmap(jax.grad(activations.weighted_mean, argnums=(0, 1, 2)))(weight, a, b)
    np.testing.assert_allclose(slopes, (b - a, 1 - weight, weight), rtol=1e-15)


def test_an_rnn_takes_those_that_keep_less_and_any_other_as_it_is():
    def kept(activation):
        cell = bptt.rnn(3, activation=activation)
        params, h, x = cell.init(jax.random.key(0), 2), cell.initial_state(), jnp.ones(2)
        return len(jax.tree.leaves(jax.linearize(lambda h: cell.step(params, h, x) * h, h)[1]))

    for ours, theirs in PAIRS:
        assert kept(theirs) == kept(ours) < kept(lambda a, theirs=theirs: theirs(a))
