"""Equinox cells as steps."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bptt_jax as bptt


class Leaky(eqx.Module):
    """A cell of one's own: a static field, an integer array, a nested module."""

    linear: eqx.nn.Linear
    order: jax.Array
    rate: float = eqx.field(static=True)

    def __call__(self, x, h):
        return self.rate * h + jnp.tanh(self.linear(jnp.concatenate([h, x]))[self.order])


@pytest.fixture(scope="module")
def leaky():
    return Leaky(eqx.nn.Linear(5, 3, key=jax.random.key(0)), jnp.asarray([2, 0, 1]), 0.5)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_equinox_cells_unroll_as_in_a_loop(kind):
    make = {"gru": eqx.nn.GRUCell, "lstm": eqx.nn.LSTMCell}[kind]
    cell = make(2, 3, key=jax.random.key(1))
    step, params = bptt.from_equinox(cell)
    state0 = jnp.zeros(3) if kind == "gru" else (jnp.zeros(3), jnp.zeros(3))
    xs = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
    expected, h = [], state0
    call = eqx.filter_jit(cell)
    for x in xs:
        h = call(x, h)
        expected.append(h)
    got = bptt.unroll(step, params, state0, xs)
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, np.stack(b), rtol=1e-5, atol=1e-6), got, *expected)


def test_parameters_are_the_floating_arrays(leaky):
    step, params = bptt.from_equinox(leaky)
    assert params.order is None
    assert len(jax.tree.leaves(params)) == 2
    new = step(params, jnp.ones(3), jnp.ones(2))
    np.testing.assert_allclose(new, leaky(jnp.ones(2), jnp.ones(3)), rtol=1e-6)


def test_gradients_fit_optax_and_equinox(leaky):
    """One step of gradient descent through `adjoints` lowers the loss that Equinox's own gradient belongs to."""
    step, params = bptt.from_equinox(leaky)
    h0, xs = jnp.zeros(3), jnp.ones((4, 2))

    def loss(states):
        return jnp.sum(jnp.square(states[-1] - 0.3))

    got = bptt.adjoints(step, params, h0, xs, loss)

    def value(module):
        h = h0
        for x in xs:
            h = module(x, h)
        return jnp.sum(jnp.square(h - 0.3))

    before, expected = eqx.filter_jit(eqx.filter_value_and_grad(value))(leaky)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got.params_grad, expected)
    optimiser = optax.sgd(0.01)
    updates, _ = optimiser.update(got.params_grad, optimiser.init(params))
    after = bptt.adjoints(step, eqx.apply_updates(params, updates), h0, xs, loss)
    np.testing.assert_allclose(got.loss, before, rtol=1e-5)
    assert after.loss < got.loss


def test_what_is_no_module():
    for wrong in (lambda x, h: h, jnp.tanh, 3, eqx.nn.GRUCell):
        with pytest.raises(TypeError, match=r"cell: expected an equinox.Module called as cell\(x, h\)"):
            bptt.from_equinox(wrong)


def test_step_itself_is_told_about_the_adapter(leaky):
    """An Equinox module as a step cannot be looked up again; the message says what can."""
    with pytest.raises(TypeError, match=r"bptt_jax\.from_equinox"):
        bptt.unroll(leaky, None, jnp.zeros(3), jnp.ones((4, 2)))
