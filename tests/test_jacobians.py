"""Exact Jacobians against finite differences and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import EXAMPLES, T, cell_example, cell_params, linear_step

import bptt_jax as bptt


def real(tree):
    """The state's vector: each leaf in turn, a complex one as its real and then its imaginary parts."""
    leaves = [np.asarray(a) for a in jax.tree.leaves(tree)]
    parts = [part for a in leaves for part in ((a.real, a.imag) if np.iscomplexobj(a) else (a,))]
    return np.concatenate([np.ravel(part) for part in parts])


def entry(tree, k):
    return jax.tree.map(lambda a: np.asarray(a)[k], tree)


@pytest.mark.parametrize("name", EXAMPLES)
def test_against_finite_differences(name, x64):
    step, params, state0, xs, length = EXAMPLES[name](jnp.float64)
    got = np.asarray(jax.jit(lambda xs: bptt.jacobians(step, params, state0, xs, length=length))(xs))
    states = bptt.unroll(step, params, state0, xs, length=length)
    one_step = jax.jit(step)
    _, unravel = bptt.ravel_state(state0)
    size, eps = real(state0).size, 1e-6
    assert got.shape == (T, size, size)
    for k in (0, T - 1):
        at = real(state0 if k == 0 else entry(states, k - 1))
        for j, unit in enumerate(np.eye(size)):
            up, down = (real(one_step(params, unravel(at + sign * eps * unit), entry(xs, k))) for sign in (1, -1))
            # Central differences: eps^2 of truncation, 1e-16 / eps of rounding.
            np.testing.assert_allclose(got[k, :, j], (up - down) / (2 * eps), atol=1e-8)


def test_rnn_in_closed_form(dtype):
    step, params, state0, xs, _ = cell_example("rnn", dtype)
    h = np.asarray(bptt.unroll(step, params, state0, xs))
    expected = (1 - h**2)[:, :, None] * np.asarray(params.recurrent)
    got = bptt.jacobians(step, params, state0, xs)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, expected, atol=8 * jnp.finfo(dtype).eps)


def test_lstm_has_h_first(x64):
    """dc_t/dc_{t-1} is the forget gate, and it stands in the lower right block."""
    step, params, state0, xs, _ = cell_example("lstm", jnp.float64)
    n = state0.h.size
    h = np.concatenate([state0.h[None], bptt.unroll(step, params, state0, xs).h[:-1]])
    w, u, b = (np.asarray(p)[n : 2 * n] for p in params)
    forget = 1 / (1 + np.exp(-(h @ w.T + np.asarray(xs) @ u.T + b)))
    got = bptt.jacobians(step, params, state0, xs)[:, n:, n:]
    np.testing.assert_allclose(got, forget[:, :, None] * np.eye(n), atol=1e-14)


def test_complex_multiplication_is_a_rotation_with_scaling():
    a = jnp.asarray([2 + 1j, -1j], jnp.complex64)
    got = bptt.jacobians(lambda a, z, x: a * z, a, jnp.ones(2, jnp.complex64), length=2)
    re, im = np.diag(a.real), np.diag(a.imag)
    np.testing.assert_array_equal(got, np.stack([np.block([[re, -im], [im, re]])] * 2))


def test_linear_map_is_its_own_jacobian():
    a = jnp.asarray([[0.5, 2.0], [0.0, -3.0]])
    np.testing.assert_array_equal(bptt.jacobians(linear_step, a, jnp.ones(2), length=3), np.stack([a] * 3))


def test_zero_gru_halves():
    params = jax.tree.map(jnp.zeros_like, cell_params("gru", jnp.float32))
    got = bptt.jacobians(bptt.gru(3).step, params, jnp.ones(3), jnp.ones((4, 2)))
    np.testing.assert_array_equal(got, np.stack([np.eye(3) / 2] * 4))


def test_zero_lstm_halves_its_cell_and_forgets_its_output():
    """With c = 0 as well, h = o tanh(c) passes on a quarter of c's change; nothing depends on h."""
    cell = bptt.lstm(3, forget_bias=0)
    params = jax.tree.map(jnp.zeros_like, cell_params("lstm", jnp.float32))
    got = bptt.jacobians(cell.step, params, cell.initial_state(), jnp.ones((4, 2)))
    zero, eye = np.zeros((3, 3)), np.eye(3)
    np.testing.assert_array_equal(got, np.stack([np.block([[zero, eye / 4], [zero, eye / 2]])] * 4))
    np.testing.assert_allclose(
        bptt.product_log_norms(got), np.log(0.5) * np.arange(4, 0, -1) + np.log(np.sqrt(1.25)), rtol=1e-6
    )


def test_a_step_that_forgets_its_state():
    half = jnp.ones(2, jnp.bfloat16)
    got = bptt.jacobians(lambda p, h, x: x * p, half, half, jnp.ones((3, 2), jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    assert got.shape == (3, 2, 2)
    assert not np.any(got)
