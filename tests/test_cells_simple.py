"""How the simple cells begin, and what their Jacobians are by construction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt

N, I = 5, 3


def started(cell, key=0):
    return cell, jax.jit(lambda key: cell.init(key, I))(jax.random.key(key))


def jacobian_at_rest(cell, params):
    return np.asarray(bptt.jacobians(cell.step, params, cell.initial_state(), jnp.zeros((1, I)))[0])


def test_irnn_begins_at_the_identity_with_faint_inputs():
    _, params = started(bptt.cells.irnn(40))
    np.testing.assert_array_equal(params.recurrent, np.eye(40))
    np.testing.assert_allclose(np.std(params.input), 0.001, rtol=0.25)  # of 120 numbers
    np.testing.assert_array_equal(
        started(bptt.cells.irnn(4, scale=0.01))[1].recurrent, np.float32(0.01) * np.eye(4)
    )


def test_units_of_indrnn_see_only_themselves():
    cell, params = started(bptt.cells.indrnn(200))
    assert 0 <= np.min(params.recurrent) < 0.05 < 0.95 < np.max(params.recurrent) < 1
    cell, params = started(bptt.cells.indrnn(N, activation=jnp.tanh))
    np.testing.assert_allclose(jacobian_at_rest(cell, params), np.diag(params.recurrent), rtol=1e-6)


def test_the_context_of_scrn_forgets_by_alpha():
    cell, params = started(bptt.cells.scrn(N, context_size=2, alpha=0.75))
    assert params.from_context.shape == (N, 2)
    assert cell.initial_state().s.shape == (2,)
    np.testing.assert_allclose(jacobian_at_rest(cell, params)[N:], np.eye(2, N + 2, N) * 0.75, rtol=1e-6)


def test_the_shares_of_fastrnn_begin_at_one():
    cell, params = started(bptt.cells.fastrnn(N))
    drive = np.asarray(params.bias, np.float64)
    new = 1 / (1 + np.exp(3)) * np.tanh(drive)  # from a state of zeros
    np.testing.assert_allclose(cell.step(params, cell.initial_state(), jnp.zeros(I)), new, rtol=1e-5)
    slope = (1 - np.tanh(drive) ** 2)[:, None] * np.asarray(params.recurrent)
    kept = 1 / (1 + np.exp(-3))
    np.testing.assert_allclose(jacobian_at_rest(cell, params), kept * np.eye(N) + (1 - kept) * slope, atol=1e-6)


@pytest.mark.parametrize(("name", "share"), [("antisymmetric", 1.0), ("gated_antisymmetric", 0.5)])
def test_antisymmetric_cells_turn_but_for_gamma(name, share):
    cell, params = started(getattr(bptt.cells, name)(N, epsilon=0.25, gamma=0.5))
    flow = (jacobian_at_rest(cell, params) - np.eye(N)) / (0.25 * share)
    np.testing.assert_allclose(flow + flow.T, -2 * 0.5 * np.eye(N), atol=1e-5)
    assert np.max(np.abs(flow - flow.T)) > 0.1


def test_beta_of_lipschitz_leads_from_symmetric_to_antisymmetric():
    for beta, sign in ((0.0, 1), (1.0, -1)):
        cell, params = started(bptt.cells.lipschitz(N, epsilon=0.5, beta=beta, gamma=0.25))
        params = params._replace(bias=jnp.zeros(N))
        flow = (jacobian_at_rest(cell, params) - np.eye(N)) / 0.5 + 2 * 0.25 * np.eye(N)
        np.testing.assert_allclose(flow, sign * flow.T, atol=1e-6)
        assert np.max(np.abs(flow)) > 0.02


def test_numbers_of_a_step_may_be_traced():
    params, h, x = bptt.rnn(N).init(jax.random.key(0), I), jnp.linspace(0, 1, N), jnp.ones(I)

    @jax.jit
    def step(epsilon, gamma):
        return bptt.cells.antisymmetric(N, epsilon=epsilon, gamma=gamma).step(params, h, x)

    expected = bptt.cells.antisymmetric(N, epsilon=0.3, gamma=0.2).step(params, h, x)
    np.testing.assert_allclose(step(0.3, 0.2), expected, rtol=1e-6)
    with pytest.raises(Exception, match="epsilon: expected"):
        jax.block_until_ready(step(-0.3, 0.2))
