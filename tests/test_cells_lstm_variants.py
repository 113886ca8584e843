"""How the variants of the lstm, the bistable cells and the recurrent highway network start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt

N, I = 4, 3
KEY = jax.random.key(0)


def test_peepholes_start_closed():
    """The first steps of a peephole_lstm are those of an lstm of the same key."""
    x = jnp.ones(I)
    plain, peeping = bptt.lstm(N), bptt.cells.peephole_lstm(N)
    params, state = peeping.init(KEY, I), plain.initial_state()._replace(c=jnp.linspace(-1, 1, N))
    expected = plain.step(plain.init(KEY, I), state, x)
    np.testing.assert_array_equal(peeping.step(params, state, x).h, expected.h)
    moved = peeping.step(params._replace(peephole=jnp.ones(3 * N)), state, x)
    assert np.max(np.abs(moved.h - expected.h)) > 1e-3


def test_forget_biases():
    for make in (bptt.cells.peephole_lstm, bptt.cells.residual_lstm, bptt.cells.multiplicative_lstm):
        np.testing.assert_array_equal(make(N, forget_bias=2.0).init(KEY, I).bias, np.repeat([0, 2, 0, 0], N))
    coupled = bptt.cells.coupled_lstm(N, forget_bias=2.0)
    np.testing.assert_array_equal(coupled.init(KEY, I).bias, np.repeat([-2, 0, 0], N))


def test_janet_is_born_with_memories_up_to_the_longest():
    f, g = jnp.split(bptt.cells.janet(500, longest=50).init(KEY, I).bias, 2)
    times = 1 + jnp.exp(f)  # of which a share sigmoid(f) is kept: uniform between 2 and 50
    np.testing.assert_allclose([jnp.min(times), jnp.mean(times), jnp.max(times)], [2, 26, 50], atol=2)
    np.testing.assert_array_equal(g, 0)
    np.testing.assert_array_equal(bptt.cells.janet(N).init(KEY, I).bias, np.repeat([1, 0], N))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_layer_norm_lstm_does_not_see_how_large_its_output_is(scale):
    """But for the 1e-5 below the root, which weighs at its zeros alone."""
    cell = bptt.cells.layer_norm_lstm(N)
    params, state = cell.init(KEY, I), cell.initial_state()._replace(h=jnp.linspace(-1, 2, N))
    found = cell.step(params, state._replace(h=scale * 3 * state.h), jnp.ones(I))
    np.testing.assert_allclose(found.c, cell.step(params, state, jnp.ones(I)).c, rtol=1e-3)


@pytest.mark.parametrize("make", [bptt.cells.brc, bptt.cells.nbrc])
def test_bistable_cells_start_on_the_brink(make):
    """At zeros a = 1, and the Jacobian is the identity; above it the origin is unstable, below it stable."""
    cell = make(N)
    params, zeros, xs = cell.init(KEY, I), jnp.zeros(N), jnp.zeros((1, I))
    for shift, expected in (
        (0.0, 1.0),
        (0.5, 0.5 + 0.5 * (1 + np.tanh(0.5))),
        (-0.5, 0.5 + 0.5 * (1 - np.tanh(0.5))),
    ):
        moved = params._replace(bias=params.bias.at[:N].add(shift))
        jac = bptt.jacobians(cell.step, moved, zeros, xs)[0]
        np.testing.assert_allclose(jac, expected * np.eye(N), atol=1e-6)


def test_units_of_a_brc_see_themselves_alone():
    cell = bptt.cells.brc(N)
    jac = bptt.jacobians(cell.step, cell.init(KEY, I), jnp.linspace(-1, 1, N), jnp.ones((1, I)))[0]
    np.testing.assert_array_equal(jac - np.diag(np.diag(jac)), 0)


def test_a_highway_network_starts_by_carrying():
    """Its Jacobian is near (1 - sigmoid(-2))^L I, its weights being small."""
    for depth in (1, 4):
        cell = bptt.cells.rhn(N, depth=depth)
        params = cell.init(KEY, I)
        assert params.recurrent.shape == (depth, 2 * N, N)
        assert 0.03 < np.max(np.abs(params.recurrent)) <= 0.04
        jac = bptt.jacobians(cell.step, params, jnp.zeros(N), jnp.zeros((1, I)))[0]
        np.testing.assert_allclose(jac, (1 - 1 / (1 + np.exp(2))) ** depth * np.eye(N), atol=0.02)
