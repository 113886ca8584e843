"""Cells with matrices for states, or exponential gates: how they begin, and what their Jacobians are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slices import covering

import bptt_jax as bptt


def drawn(name, n, inputs, **options):
    cell = getattr(bptt.cells, name)(n, **options)
    return cell, jax.jit(cell.init, static_argnums=1)(jax.random.key(0), inputs)


def test_xlstm_begins_as_released():
    _, p = drawn("slstm", 8, 50, heads=2)
    assert not np.any(p.recurrent)
    forget = p.bias.reshape(4, 2, 4)[1]
    np.testing.assert_allclose(forget, [[5 - 12 * (j / 3) ** 0.3 for j in range(4)]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(np.delete(p.bias.reshape(4, 8), 1, axis=0), 0)
    np.testing.assert_allclose(np.std(p.input), np.sqrt(2 / (5 * 50)), rtol=0.06)  # 1600 numbers
    _, p = drawn("mlstm", 8, 50, heads=4, key_size=32)
    assert not np.any(p.gates)
    np.testing.assert_allclose(p.bias[1], [3, 4, 5, 6], rtol=1e-6)
    assert 0 < np.max(np.abs(p.bias[0])) < 0.5
    np.testing.assert_allclose(np.std(p.key), np.sqrt(2 / (5 * 50)), rtol=0.04)  # 6400 numbers


def test_what_is_read_does_not_depend_on_the_stabiliser(x64):
    """The same memory said with another m, by up to what would overflow without: the same h, the same reading."""
    xs = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)))
    cell, p = drawn("slstm", 4, 3, dtype=jnp.float64)
    p = p._replace(recurrent=0.5 + p.recurrent)
    first = jax.jit(cell.step)(p, cell.initial_state(), xs[0])
    lower = first._replace(c=first.c * np.exp(5), n=first.n * np.exp(5), m=first.m - 5)
    states = [bptt.unroll(cell.step, p, state, xs[1:]) for state in (first, lower)]
    np.testing.assert_allclose(states[0].h, states[1].h, rtol=1e-12)

    cell, p = drawn("mlstm", 4, 3, dtype=jnp.float64)
    q = jnp.asarray(np.random.default_rng(1).standard_normal((2, 8)))

    @jax.jit
    def read(m):
        start = cell.initial_state()._replace(m=jnp.full(2, m))
        states = bptt.unroll(cell.step, p, start, xs)
        below = jnp.maximum(abs(jnp.sum(states.n * q[None], -1)), jnp.exp(-states.m))
        return jnp.einsum("thvk,hk->thv", states.C, q) / below[..., None]

    np.testing.assert_allclose(
        read(0.0), read(-jnp.inf), rtol=1e-12
    )  # the recurrent and the parallel form begin so
    np.testing.assert_allclose(read(0.0), read(3.0), rtol=1e-12)


@pytest.mark.parametrize("name", covering(["slstm", "mlstm"], "mlstm"))
def test_exponential_gates_do_not_overflow(name):
    """Input gates of 1e4, whose exponential no float holds; from the first step on."""
    cell, p = drawn(name, 4, 1)
    gates = "input" if name == "slstm" else "gates"
    p = p._replace(**{gates: jnp.ones_like(getattr(p, gates))})

    def value(p, h0, xs):
        return sum(jnp.sum(jnp.tanh(a[-1])) for a in jax.tree.leaves(bptt.unroll(cell.step, p, h0, xs)))

    found = jax.jit(jax.grad(value, (0, 1, 2)))(p, cell.initial_state(), jnp.full((3, 1), 1e4))
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(found))


def test_rwkv_begins_as_released():
    cell, p = drawn("rwkv6", 8, 5)
    kept = np.ravel(jax.jit(cell.step.coefficients)(p, jnp.ones(5))[0])  # whatever the input
    assert np.all(np.diff(kept) < 0)
    np.testing.assert_allclose(kept[[0, -1]], [np.exp(-np.exp(-6)), np.exp(-np.exp(-1))], rtol=1e-5)
    for weights, scale in ((p.key, 0.1 * np.sqrt(16 / 5)), (p.value, np.sqrt(8 / 5))):
        flat = np.asarray(weights).reshape(-1, 5) / scale
        np.testing.assert_allclose(flat.T @ flat, np.eye(5), atol=1e-5)
    p = jax.tree.map(np.asarray, drawn("rwkv7", 8, 5)[1])
    np.testing.assert_allclose(p.decay[:, [0, -1]], [[-8, 6 * 7 / 15 - 3], [6 * 8 / 15 - 8, 3]], atol=1e-5)
    np.testing.assert_allclose(p.rate[0, 0], -0.19 - 0.3 - 0.2, rtol=1e-5)
    np.testing.assert_allclose(p.removal[[0, -1], [0, -1]], [0.76, 0.66], rtol=1e-5)


def test_gated_deltanet_begins_as_released():
    _, p = drawn("gated_deltanet", 2000, 1, heads=1000, key_size=1)
    time, decay = np.log1p(np.exp(np.asarray(p.decay_bias))), np.exp(np.asarray(p.decay_log))
    assert 0.000999 < time.min() < 0.0011 < 0.09 < time.max() < 0.1001
    np.testing.assert_allclose(np.median(np.log10(time)), -2, atol=0.1)
    assert 0 < decay.min() < 0.2 < 15.8 < decay.max() < 16.001
    np.testing.assert_allclose(np.mean(decay), 8, atol=0.5)


@pytest.mark.parametrize("name", covering(["deltanet", "gated_deltanet"], "gated_deltanet"))
def test_what_the_delta_rule_takes_from_an_error_signal(name, x64):
    """One direction of keys for every value, by 1 - beta, and by the gate everywhere."""
    x = np.asarray([0.3, -0.8, 0.5])
    cell, p = drawn(name, 4, 3, heads=2, key_size=3, dtype=jnp.float64)
    jacobian = np.asarray(bptt.jacobians(cell.step, p, cell.initial_state(), x[None]))[0]
    p = jax.tree.map(np.asarray, p)
    k = p.key @ x
    k = k / (1 + np.exp(-k))
    taken = 1 / (1 + np.exp(-p.rate @ x)) * np.sum(k**2, 1) / (np.sum(k**2, 1) + 1e-6)
    alpha = np.ones(2)
    if name == "gated_deltanet":
        time = np.log1p(np.exp(p.decay @ x + p.decay_bias))
        alpha = np.exp(-np.exp(p.decay_log) * time)
    expected = [alpha[h] * by for h in range(2) for by in [1 - taken[h]] * 2 + [1] * 4]
    np.testing.assert_allclose(np.linalg.svd(jacobian)[1], np.sort(expected)[::-1], rtol=1e-10)


def test_the_jacobian_of_rwkv7_has_no_eigenvalue_beyond_1(x64):
    cell, p = drawn("rwkv7", 2, 4, heads=1, key_size=3, dtype=jnp.float64)
    rng = np.random.default_rng(0)
    p = jax.tree.map(lambda a: jnp.asarray(3 * rng.standard_normal(a.shape)), p)
    jacobians = bptt.jacobians(cell.step, p, cell.initial_state(), rng.standard_normal((300, 4)))
    assert np.max(np.abs(np.linalg.eigvals(jacobians))) < 1 + 1e-9
    assert 1.01 < np.max(np.linalg.norm(jacobians, 2, axis=(1, 2))) < 2 / np.sqrt(3)


@pytest.mark.parametrize(
    ("dtype", "gate"),
    covering([("float32", -300.0), ("float32", -60.0), ("float16", -9.0)], ("float32", -300.0), ("float16", -9.0)),
)
def test_slstm_where_what_comes_in_first_vanishes(dtype, gate):
    """h = o z after a first step, however far the input gate is closed; and after it what the gates make of it."""
    cell, p = drawn("slstm", 1, 1, dtype=dtype)
    p = p._replace(bias=jnp.asarray([gate, 1, 0.5, 0], dtype), input=jnp.zeros_like(p.input))
    one = jnp.ones(1, dtype)

    def read(p, x):
        first = cell.step(p, cell.initial_state(), x)
        return jnp.sum(cell.step(p, first, x).h)

    value, slopes = jax.jit(jax.value_and_grad(read))(p, one)
    np.testing.assert_allclose(np.float32(value), 0.5 * np.tanh(0.5), rtol=3e-3)
    np.testing.assert_allclose(
        np.float32(slopes.bias[2:]), [0.5 / np.cosh(0.5) ** 2, 0.25 * np.tanh(0.5)], rtol=5e-3
    )
    np.testing.assert_allclose(np.float32(slopes.bias[:2]), 0, atol=1e-3)


def test_second_derivatives_of_slstm_where_little_comes_in_first():
    cell, p = drawn("slstm", 1, 1)
    p = p._replace(bias=jnp.asarray([-40, 1, 0.5, 0], jnp.float32), input=jnp.zeros_like(p.input))

    def read(bias):
        return cell.step(p._replace(bias=bias), cell.initial_state(), jnp.ones(1)).h[0]

    slope = np.tanh(0.5) * (1 - np.tanh(0.5) ** 2)
    found = jax.jit(jax.hessian(read))(p.bias)
    np.testing.assert_allclose(found[:3, :3], np.diag([0, 0, -slope]), atol=1e-6)
