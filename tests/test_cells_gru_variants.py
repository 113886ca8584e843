"""What the papers say of the variants of the GRU and of the additive cells, and how they begin."""

import jax
import numpy as np
import pytest

import bptt_jax as bptt

cells = bptt.cells
N, I = 6, 4


def begun(cell: bptt.Cell) -> tuple:
    return jax.jit(lambda key: cell.init(key, I))(jax.random.key(0))


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (cells.ugrnn(N), (1, 0)),
        (cells.ugrnn(N, forget_bias=3.0), (3, 0)),
        (cells.ran(N, forget_bias=2.0), (0, 2)),
        (cells.cfn(N), (1, -1)),
        (cells.fastgrnn(N), (1, 1)),
        (cells.intersection_rnn(N), (0, 0, 1, 1)),
    ],
)
def test_biases(cell, expected):
    for found, value in zip(begun(cell).bias.reshape(-1, N), expected, strict=True):
        np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("make", [cells.mgu, cells.star])
def test_chrono_begins_with_long_memories(make):
    gate, other = begun(make(N, bias_init=cells.initializers.chrono(1000))).bias.reshape(2, N)
    assert np.all(gate < 0)
    np.testing.assert_array_equal(other, 0)


def test_star_begins_orthogonal():
    params = begun(cells.star(N))
    np.testing.assert_allclose(np.asarray(params.recurrent) @ params.recurrent.T, np.eye(N), atol=1e-5)
    for block in np.split(params.input, 2):
        np.testing.assert_allclose(np.asarray(block).T @ block, np.eye(I), atol=1e-5)


def test_cfn_begins_small():
    params = begun(cells.cfn(40))
    for weights in (params.recurrent, params.input):
        assert np.abs(weights).max() <= 0.07
        assert 0.035 < np.std(weights) < 0.045
        assert abs(np.mean(weights)) < 0.005


def test_cfn_comes_to_rest():
    """Whatever its weights, every unit shrinks without input."""
    cell = cells.cfn(N)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: 3 * rng.standard_normal(a.shape).astype("f"), begun(cell))
    h = rng.standard_normal((20, N)).astype("f")
    after = jax.jit(jax.vmap(cell.step, (None, 0, None)))(params, h, np.zeros(I, "f"))
    assert np.all(np.abs(after) < np.abs(h))


def test_sgu_with_its_gate_shut_keeps():
    cell = cells.sgu(N)
    params = begun(cell)
    shut = params._replace(bias=np.concatenate([params.bias[:N], np.full(N, -20, "f")]))
    h = np.linspace(-1, 1, N, dtype="f")
    np.testing.assert_array_equal(jax.jit(jax.jacfwd(cell.step, 1))(shut, h, np.ones(I, "f")), np.eye(N))


@pytest.mark.exhaustive  # its equations have their oracle
def test_only_h_of_the_intersection_network_recurs():
    """As that of `ugrnn` with the same weights, on the projected input."""
    cell, single = cells.intersection_rnn(N), cells.ugrnn(N)
    params = begun(cell)
    rng = np.random.default_rng(1)
    y, h, x = (rng.standard_normal(n).astype("f") for n in (N, N, I))
    state = type(cell.initial_state())(y, h)
    blocks = [np.split(leaf, 4) for leaf in (params.recurrent, params.input, params.bias)]
    alone = type(begun(single))(*(np.concatenate([b[3], b[1]]) for b in blocks))
    new = jax.jit(cell.step)(params, state, x)
    expected = jax.jit(single.step)(alone, h, np.asarray(params.projection) @ x)
    np.testing.assert_allclose(new.h, expected, rtol=1e-5, atol=1e-6)
    jacobian = jax.jit(jax.jacfwd(cell.step, 1))(params, state, x)
    for part in (jacobian.y.y, jacobian.h.y):
        np.testing.assert_array_equal(part, 0)
