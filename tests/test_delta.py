"""Steps that are linear in a matrix: in parallel against one by one, in order and by chunks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import weighted_loss
from slices import covering

import bptt_jax as bptt
from bptt_jax.linalg import rank_one
from bptt_jax.linalg.rank_one import Factors, rank_one_scan

V, K, I = 3, 2, 4


@bptt.parallel.DeltaStep
def two_leaves(params, x):
    """A user's own: two matrices of two heads and one that is broadcast, factors that grow, of any rank."""
    row = jnp.tanh(params["u"] * x[:K])
    written = params["b"] * jnp.sin(x[:V])[:, None]
    return (
        {"many": 0.9 * jnp.cos(row)[None], "one": 1.1},
        {"many": -jnp.stack([row, 2 * row]), "one": row},
        {"many": row, "one": params["w"]},
        {"many": written[None], "one": jnp.sum(x)},
    )


def example(steps):
    """(step, params, state0, xs) in double precision, with a start that is not 0."""
    rng = np.random.default_rng(0)
    draw = rng.standard_normal
    params = {"u": draw(K), "w": 0.3 * draw(K), "b": draw((V, K))}
    state0 = {"many": draw((2, V, K)), "one": draw((2, 2))}
    return two_leaves, jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, state0), draw((steps, I))


def loop(factors, offsets, begins, reverse):
    """NumPy, instant by instant, with the factors in full."""
    a, u, w = (np.asarray(c) for c in factors)
    s, states = np.zeros_like(offsets[0]), np.zeros_like(offsets)
    for t in reversed(range(len(offsets))) if reverse else range(len(offsets)):
        full = np.diag(a[t]) + np.outer(u[t], w[t])
        s = offsets[t] + (0 if begins[t] else s @ full)
        states[t] = s
    return states


def factors_and_offsets(steps, seed=0):
    rng = np.random.default_rng(seed)
    a, u, w = (0.8 * rng.standard_normal((steps, K)) for _ in range(3))
    return Factors(a, u, w), rng.standard_normal((steps, V, K))


BOTH = [(way, reverse) for way in (rank_one._in_order, rank_one._in_chunks) for reverse in (False, True)]


@pytest.mark.parametrize(("way", "reverse"), covering(BOTH, (rank_one._in_chunks, True)))
def test_both_ways(way, reverse, x64):
    """Also where the last chunk is not full."""
    for steps in (1, 9, 11):
        factors, offsets = factors_and_offsets(steps)
        begins = np.arange(steps) % 7 == 5
        got = jax.jit(partial(way, reverse=reverse))(factors, offsets, begins)
        np.testing.assert_allclose(got, loop(factors, offsets, begins, reverse), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("way", covering([rank_one._in_order, rank_one._in_chunks], rank_one._in_chunks))
def test_what_overflowed_ends_at_a_beginning(way):
    factors, offsets = factors_and_offsets(30)
    grown = jax.tree.map(lambda c: jnp.asarray(c, jnp.float32).at[:20].multiply(1e15), factors)
    offsets = jnp.asarray(offsets, jnp.float32)
    begins = jnp.arange(30) == 22
    got = way(grown, offsets, begins, reverse=False)
    assert not np.isfinite(got[21]).any()
    expected = loop(jax.tree.map(lambda c: c[22:], factors), np.asarray(offsets[22:]), begins[22:], False)
    np.testing.assert_allclose(got[22:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reverse", covering([False, True], False))
def test_derivatives_of_the_scan(reverse, x64):
    """First and second, by factors and offsets, in both modes, against those of the loop in order."""
    factors, offsets = factors_and_offsets(7)
    begins = jnp.arange(7) == 3
    toward = factors_and_offsets(7, 1)

    def value(scan, factors, offsets):
        return jnp.sum(jnp.sin(scan(factors, offsets) + jnp.arange(7.0)[:, None, None]))

    def derivatives(scan):
        gradient = jax.grad(partial(value, scan), (0, 1))
        return jax.jit(partial(jax.jvp, gradient, (factors, offsets), toward))()

    got = derivatives(partial(rank_one_scan, begins=begins, reverse=reverse))
    expected = derivatives(lambda f, b: rank_one._in_order(f, b, begins, reverse=reverse))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


REAL = np.asarray([0, 1, 1, 0, 1, 1, 1, 0, 1, 0], bool)
RESETS = np.asarray([0, 0, 0, 1, 0, 0, 1, 0, 0, 1], bool)


@pytest.mark.parametrize("plain", covering([False, True], False))
def test_equal_to_unroll(plain, x64):
    """Values and all gradients; also with padding, NaN in it, and resets to another state than the start."""
    step, params, state0, xs = example(10)
    again = jax.tree.map(lambda a: 0.3 * a[::-1], state0)
    loss = weighted_loss(jnp.sin(1 + jnp.arange(10.0)))
    xs = jnp.asarray(xs) if plain else jnp.where(REAL[:, None], xs, jnp.nan)

    def of(unroll):
        def value(params, state0, again, xs):
            marks = {"mask": jnp.asarray(REAL), "resets": jnp.asarray(RESETS), "reset_state": again}
            states = unroll(step, params, state0, bptt.Sequence(xs, **({} if plain else marks)))
            return loss(states), states

        return jax.value_and_grad(value, (0, 1, 2, 3), has_aux=True)(params, state0, again, xs)

    got, expected = jax.jit(lambda: (of(bptt.unroll_linear), of(bptt.unroll)))()
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * max(1, np.max(np.abs(b))))


def test_a_batch(x64):
    step, params, state0, xs = example(6)
    batch = jnp.stack([xs, 2 * xs])
    got = jax.jit(jax.vmap(lambda xs: bptt.unroll_linear(step, params, state0, xs)))(batch)
    for k in range(2):
        expected = bptt.unroll(step, params, state0, batch[k])
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a[k], b, rtol=1e-12, atol=1e-13)


def test_a_reset_before_the_first_step_leaves_the_start():
    step = bptt.parallel.DeltaStep(lambda params, x: (0.5, 0.0, 0.0, 1.0))
    sequence = bptt.Sequence(resets=jnp.arange(3) == 0, reset_state=jnp.asarray([[4.0]]))
    got = bptt.unroll_linear(step, None, jnp.asarray([[7.0]]), sequence)
    np.testing.assert_array_equal(got.ravel(), [3, 2.5, 2.25])


def test_the_delta_rule_replaces_what_a_key_had(x64):
    """At rate 1, keys of norm 1: the memory holds the last value of every key; others are not touched."""
    cell = bptt.cells.deltanet(V, heads=1, key_size=2, dtype=jnp.float64)
    params = jax.jit(cell.init, static_argnums=1)(jax.random.key(0), 2)
    # Keys e_1 and e_2 by the input, and a rate of nearly 1.
    params = params._replace(key=jnp.asarray([[[5.0, -1000.0], [-1000.0, 5.0]]]), rate=jnp.full((1, 2), 40.0))
    xs = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    states = bptt.unroll(cell.step, params, cell.initial_state(), xs)
    for t, first, second in ((1, 0, 1), (2, 2, 1)):
        expected = np.stack([params.value[0] @ xs[first], params.value[0] @ xs[second]], axis=1)
        np.testing.assert_allclose(states[t, 0], expected, rtol=1e-6, atol=1e-6)


def test_bad_arguments():
    _, params, state0, xs = example(5)
    short = jax.tree.map(lambda a: a.astype(jnp.float32), (params, state0, jnp.asarray(xs)))

    def run(*coefficients, state=short[1]["one"]):
        return bptt.unroll_linear(bptt.parallel.DeltaStep(lambda p, x: coefficients), short[0], state, short[2])

    with pytest.raises(TypeError, match=r"coefficients: expected four \(a, u, w, b\), got tuple"):
        run(1.0, 0.0)
    with pytest.raises(ValueError, match=r"expected w of shape, \[2\], got \[3\]"):
        run(1.0, 0.0, jnp.ones(3), 0.0)
    with pytest.raises(ValueError, match=r"expected b of shape, \[2, 2\], got \[3, 2\]"):
        run(1.0, 0.0, 0.0, jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"state0: expected matrices \[..., V, K\], .* got \[2\]"):
        run(1.0, 0.0, 0.0, 0.0, state=jnp.zeros(2))
    with pytest.raises(TypeError, match=r"coefficients: expected a function .* got float"):
        bptt.parallel.DeltaStep(0.5)


MATRICES = [name for name, entry in bptt.cells.ATLAS.items() if entry.family == "matrix"]


@pytest.mark.parametrize("name", covering(MATRICES, "rwkv7"))
def test_no_input_no_nan(name):
    """From a state of 0 without input: all derivatives are finite, also second ones by the input."""
    cell = getattr(bptt.cells, name)(2)
    params = jax.jit(cell.init, static_argnums=1)(jax.random.key(0), 2)

    def value(params, state, x):
        return sum(jnp.sum(jnp.cos(a)) for a in jax.tree.leaves(cell.step(params, state, x)))

    given = params, cell.initial_state(), jnp.zeros(2)
    found = jax.jit(lambda: (jax.grad(value, (0, 1, 2))(*given), jax.hessian(value, 2)(*given)))()
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(found))
