"""Sums over many steps: in half precision they grow no more after 256 (bfloat16) or 2048 (float16) like terms, and
float16 ends at 65504, while each term and the gradient are well within its range."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt

E = bptt.estimators
T = 3000
HALF = [jnp.bfloat16, jnp.float16]
KEEPS_ALL = dict(rtrl=E.rtrl, snap=E.snap, rflo=E.rflo, tbptt=partial(E.tbptt, k1=T, k2=T))


def last(states):
    return states[-1, 0]


def mean(states):
    return jnp.mean(states.astype(jnp.float32))


def accumulates(p, h, x):
    return h + p * x


def decays(p, h, x):
    return 0.5 * h + p * x


def decays_in_many(p, h, x):
    return 0.5 * h + p["w"] @ x + p["b"]


def numbers(tree):
    return [np.asarray(a, np.float64) for a in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("size", [1, 20])  # added up step by step, or by contractions
def test_a_gradient_is_the_sum_of_what_all_steps_send(dtype, remat, size):
    """dL/dx p is 1 / T (2 - 2^(t - T)) x at step t, 2 x in all; float16 does not hold T x."""
    xs = jnp.full((T, size), 25, dtype)
    params = {"w": jnp.full((size, size), 0.001, dtype), "b": jnp.zeros(size, dtype)}
    found = bptt.adjoints(decays_in_many, params, jnp.zeros(size, dtype), xs, mean, remat=remat).params_grad
    expected = {"w": np.full((size, size), 50 / size), "b": np.full(size, 2 / size)}
    for a, b in zip(numbers(found), numbers(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", KEEPS_ALL)
def test_an_estimator_that_keeps_all_gives_the_whole(dtype, name):
    problem = jnp.asarray(0.001, dtype), jnp.zeros(1, dtype), jnp.full((T, 1), 0.1, dtype)
    for step, loss, expected in ((accumulates, last, 0.1 * T), (decays, mean, 0.2)):
        found = KEEPS_ALL[name](step, *problem, loss)
        assert found.dtype == dtype
        np.testing.assert_allclose(np.float64(found), expected, rtol=0.01)


@pytest.mark.parametrize("dtype", HALF)
def test_parts_of_the_gradient_add_up_to_it(dtype):
    problem = accumulates, jnp.asarray(0.001, dtype), jnp.zeros(1, dtype), jnp.full((T, 1), 0.1, dtype), last
    by_lag = bptt.analysis.gradient_by_lag(*problem, longest=1)
    np.testing.assert_allclose(by_lag.shares, 1 / T, rtol=0.01)
    np.testing.assert_allclose(bptt.temporal_contributions(*problem).shares, 1 / T, rtol=0.01)
    errors = np.asarray(bptt.truncation_bias(*problem).relative_error)
    np.testing.assert_allclose(errors[[0, T // 2 - 1, T - 1]], [1 - 1 / T, 0.5, 0], atol=0.01)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("remat", [False, True])
def test_what_comes_back_to_the_state_of_many_resets(dtype, remat):
    xs = bptt.Sequence(jnp.zeros((T, 1), dtype), resets=jnp.arange(T) > 0, reset_state=jnp.zeros(1, dtype))
    p, h = jnp.ones((), dtype), jnp.zeros(1, dtype)
    found = bptt.adjoints(
        accumulates, p, h, xs, lambda states: jnp.sum(0.1 * states.astype(jnp.float32)), remat=remat
    )
    np.testing.assert_allclose(numbers(found.reset_state_grad), [[0.1 * (T - 1)]], rtol=0.01)


@pytest.mark.parametrize("dtype", HALF)
def test_the_mean_over_many_sequences(dtype):
    xs, states = jnp.full((T, 2, 1), 0.1, dtype), jnp.zeros((T, 1), dtype)
    problem = accumulates, jnp.asarray(0.001, dtype), states, xs, last
    found = bptt.audit({"": E.rtrl}, *problem, in_axes=(0, 0, None), key=jax.random.key(0), keys=1, lags=())
    np.testing.assert_allclose(found.exact_log_norm, np.log(0.2), atol=0.01)


@pytest.mark.parametrize("dtype", HALF)
def test_what_a_dtype_makes_of_a_long_sum_is_told(dtype):
    """`jax.grad` adds up in the dtype of the parameters; so does that which tells of its digits."""
    step, loss = lambda p, h, x: 0.0 * h + p * x, lambda states: jnp.sum(states) / states.shape[0]
    with jax.enable_x64(True):
        given = jnp.zeros(()), jnp.zeros(()), jnp.full(T, 0.1)
        found = bptt.analysis.gradient_precision(step, *given, loss, dtype=dtype, longest=1)
    p, xs = jnp.zeros((), dtype), jnp.full(T, 0.1, dtype)

    def plain(p):
        return jnp.sum(jax.lax.scan(lambda h, x: (new := p * x, new), p, xs)[1] / T)

    off = abs(np.float64(jax.grad(plain)(p)) / np.float64(xs[0]) - 1)
    np.testing.assert_allclose(found.relative_errors[0], off, rtol=0.05)
