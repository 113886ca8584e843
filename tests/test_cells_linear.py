"""How the cells begin that are linear in their state, and where the numerics of their gates turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slices import covering

import bptt_jax as bptt

N, I = 64, 3
KEY = jax.random.key(0)


def test_an_open_gate_of_rg_lru_decays_as_published():
    params = bptt.cells.rg_lru(2000).init(KEY, I)
    decay = np.exp(-8 * np.logaddexp(0, np.float64(params.decay)))
    assert 0.9 - 1e-5 < decay.min() < 0.901 < 0.998 < decay.max() < 0.999 + 1e-5
    np.testing.assert_allclose(decay.mean(), 0.9495, atol=0.003)


def test_gradients_of_rg_lru_in_half_precision_where_inputs_are_large():
    """They are within its range, as are those of single precision, though the squares of what is multiplied are not."""
    half, single = (bptt.cells.rg_lru(8, dtype=dtype) for dtype in (jnp.float16, jnp.float32))
    params, xs = half.init(KEY, I), jnp.full((3, I), 1e4, jnp.float16)

    def gradient(cell, dtype):
        given = jax.tree.map(lambda a: a.astype(dtype), (params, xs))
        return jax.grad(lambda p, x: jnp.sum(bptt.unroll(cell.step, p, cell.initial_state(), x)))(*given)

    found, expected = gradient(half, jnp.float16), gradient(single, jnp.float32)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert float(jnp.max(jnp.abs(b))) < 65504
        np.testing.assert_allclose(np.float32(a), b, rtol=0.01, atol=0.01 * float(jnp.max(jnp.abs(b))))
    with jax.numpy_dtype_promotion("standard"), pytest.raises(TypeError, match="must keep the dtype of state"):
        bptt.unroll(half.step, params, half.initial_state(), xs.astype(jnp.float32))  # as other cells


@pytest.mark.parametrize("dtype", covering([jnp.float32, jnp.float16], jnp.float16))
def test_a_closed_gate_of_rg_lru_has_a_gradient(dtype):
    """Where r is 0 in its dtype, so that nothing is let in: the square root of 1 - a^2 has no slope there."""
    cell = bptt.cells.rg_lru(2, dtype=dtype)
    params = cell.init(KEY, 1)._replace(bias=jnp.asarray([-200, -200, 0, 0], dtype), gates=jnp.zeros((4, 2), dtype))
    h, x = jnp.ones(2, dtype), jnp.ones(1, dtype)
    gradient = jax.jit(jax.grad(lambda p, x: jnp.sum(cell.step(p, h, x))))
    for large in (1, 3e4):
        np.testing.assert_array_equal(cell.step(params, h, large * x), 1)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in gradient(params, large * x))


def test_gates_of_min_lstm_that_are_both_closed_divide_their_share():
    cell = bptt.cells.min_lstm(2)
    zeros = cell.init(KEY, 1)._replace(input=jnp.zeros((6, 1)))
    params = zeros._replace(bias=jnp.asarray([-200, -200, -200, -199, 3, 3], jnp.float32))
    found = cell.step(params, jnp.ones(2), jnp.ones(1))
    np.testing.assert_allclose(found, [2, 1 + 2 / (1 + np.exp(-1))], rtol=1e-5)
    slopes = jax.jit(jax.grad(lambda p: jnp.sum(cell.step(p, jnp.ones(2), jnp.ones(1)))))(params).bias
    assert bool(jnp.all(jnp.isfinite(slopes)))


def test_hgrn_keeps_at_least_its_bound():
    cell = bptt.cells.hgrn(N, lower_bound=0.9)
    params = cell.init(KEY, I)
    a, _ = cell.step.coefficients(params, 100 * jnp.ones(I))
    assert 0.9 - 1e-6 < np.abs(a).min() < 0.91
    assert np.abs(a).max() > 0.99
    np.testing.assert_allclose(np.angle(a), 10000 ** (-2 * np.arange(N) / N), rtol=1e-5)


def test_sru_without_its_own_state_is_min_gru():
    """Whose gate lets in."""
    cell = bptt.cells.sru(4)
    params = cell.init(KEY, I)._replace(recurrent=jnp.zeros(4))
    gate, candidate = jnp.split(params.input, 2)
    other = bptt.cells.MinGRUParams(jnp.concatenate([-gate, candidate]), jnp.zeros(8))
    xs, h = jax.random.normal(KEY, (6, I)), jnp.ones(4)
    expected = bptt.unroll_linear(bptt.cells.min_gru(4).step, other, h, xs)
    np.testing.assert_allclose(bptt.unroll(cell.step, params, h, xs), expected, rtol=1e-5)


def test_initial_weights_of_sru():
    params = bptt.cells.sru(3000).init(KEY, I)
    gate, candidate = np.split(np.asarray(params.input), 2)
    np.testing.assert_allclose([gate.var(), candidate.var()], [1 / 6, 1 / 3], rtol=0.06)
    np.testing.assert_allclose(np.asarray(params.recurrent).var(), 0.5, rtol=0.06)


def test_deer_has_qrnn_and_sru_in_few_iterations():
    """The gates of a qrnn do not see what they gate, and a unit of an sru sees itself alone."""
    xs = jax.random.normal(KEY, (50, I))
    for name, jacobian, most in (("qrnn", "full", 3), ("sru", "diagonal", 6)):
        cell = getattr(bptt.cells, name)(4)
        params = cell.init(KEY, I)
        found = bptt.deer(cell.step, params, cell.initial_state(), xs, jacobian=jacobian)
        assert bool(found.converged)
        assert int(found.iterations) <= most
        expected = bptt.unroll(cell.step, params, cell.initial_state(), xs)
        for a, b in zip(jax.tree.leaves(found.states), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_options_may_be_traced():
    """And are then checked when it runs."""

    @jax.jit
    def begun(bias, bound):
        forgetful, bounded = bptt.cells.min_lstm(1, forget_bias=bias), bptt.cells.hgrn(1, lower_bound=bound)
        return forgetful.init(KEY, 1).bias, bounded.init(KEY, 1).bound

    biases, bound = begun(3.0, 0.75)
    np.testing.assert_allclose(biases, [3, 0, 0])
    np.testing.assert_allclose(bound, [np.log(3)], rtol=1e-5)
    for bias, bound in ((np.inf, 0.5), (0.0, 1.5)):
        with pytest.raises(Exception, match=r"(forget_bias|lower_bound): expected"):
            jax.block_until_ready(begun(bias, bound))
