"""Omega against Pascanu's own network written out in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.remedies.regularizers import OmegaTerms, omega_penalty, omega_terms

N, T, B = 5, 7, 3


def _setting():
    cell = bptt.rnn(N, gain=1.3)
    params = cell.init(jax.random.key(0), 2)
    return cell, params, jax.random.normal(jax.random.key(1), (B, T, 2))


def _loss(states):
    return jnp.sum(states[-1] ** 2)


def _terms(params, xs):
    cell, _, _ = _setting()
    return jax.vmap(lambda x: omega_terms(cell.step, params, cell.initial_state(), x, _loss))(xs)


def _reference(weights, states, deltas):
    """sum_t (||delta_t diag(1 - h_t^2) W||^2 / ||delta_t||^2 - 1)^2 with h and delta constant, and d/dW."""
    value, grad = 0.0, np.zeros_like(weights)
    for h, delta in zip(states, deltas, strict=True):
        row = delta * (1 - h**2)
        pulled = row @ weights
        excess = pulled @ pulled / (delta @ delta) - 1
        value += excess**2
        grad += 2 * excess * 2 * np.outer(row, pulled) / (delta @ delta)
    return value, grad


def test_value_and_immediate_gradient() -> None:
    cell, params, xs = _setting()
    value, grad = jax.value_and_grad(lambda p: omega_penalty(_terms(p, xs)))(params)
    expected, expected_grad = [], []
    for x in xs:
        done = bptt.adjoints(cell.step, params, cell.initial_state(), x, _loss)
        arrays = (params.recurrent, done.states, done.adjoints)
        one = _reference(*(np.asarray(a, np.float64) for a in arrays))
        expected.append(one[0])
        expected_grad.append(one[1])
    assert float(value) == pytest.approx(np.mean(expected), rel=1e-4)
    np.testing.assert_allclose(grad.recurrent, np.mean(expected_grad, axis=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(grad.input, 0)
    np.testing.assert_array_equal(grad.bias, 0)


def test_released_code_divides_by_the_number_of_valid_steps() -> None:
    _, params, xs = _setting()
    terms = _terms(params, xs)
    assert bool(terms.valid.all())
    assert float(omega_penalty(terms, version="code")) == pytest.approx(float(omega_penalty(terms)) / T, rel=1e-5)
    partly = OmegaTerms(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[True, False], [True, True]]))
    assert float(omega_penalty(partly, version="code")) == pytest.approx(8 / 3)
    assert float(omega_penalty(partly)) == pytest.approx(5)


def test_valid_are_error_signals_of_at_least_1e_10() -> None:
    """Halved at every step: 2^-33 is above, 2^-34 below; 2^-199 has a square that float32 does not hold."""
    terms = omega_terms(lambda p, h, x: p * h, 0.5, jnp.ones(1), None, lambda s: s[-1, 0], length=200)
    np.testing.assert_array_equal(terms.valid, np.arange(200) >= 200 - 34)
    np.testing.assert_allclose(terms.terms, (0.25 - 1) ** 2, rtol=1e-5)


def test_zero_error_signals_add_nothing_and_break_nothing() -> None:
    cell, params, xs = _setting()

    def penalty(p):
        terms = omega_terms(cell.step, p, cell.initial_state(), xs[0], lambda s: jnp.sum(s[2] ** 2))
        return omega_penalty(terms), terms

    (value, terms), grad = jax.value_and_grad(penalty, has_aux=True)(params)
    np.testing.assert_array_equal(terms.terms[3:], 0)
    np.testing.assert_array_equal(terms.valid, [True] * 3 + [False] * 4)
    assert np.isfinite(float(value))
    assert np.isfinite(np.asarray(grad.recurrent)).all()


def test_orthogonal_linear_network_has_no_penalty() -> None:
    cell = bptt.rnn(N, activation=jax.nn.identity, recurrent_init=jax.nn.initializers.orthogonal())
    params = cell.init(jax.random.key(0), 2)
    terms = omega_terms(cell.step, params, cell.initial_state(), jnp.ones((T, 2)), _loss)
    assert float(omega_penalty(terms)) == pytest.approx(0, abs=1e-9)


def test_bad_version() -> None:
    with pytest.raises(ValueError, match="version: expected 'paper' or 'code', got 'theirs'"):
        omega_penalty(OmegaTerms(jnp.ones(2), jnp.ones(2, bool)), version="theirs")  # type: ignore[arg-type]


def test_flossing_is_the_mean_square_of_the_exponents(x64) -> None:
    """Of a diagonal map by hand, with its gradient: d/dd of (ln d)^2 is 2 ln d / d."""
    rates = jnp.asarray([0.5, 2.0, 0.9])

    def penalty(d, num):
        return bptt.flossing_penalty(lambda d, h, x: d * h, d, jnp.ones(3), num=num, length=400, warmup=300)

    logs = np.log(np.asarray(rates))
    assert float(penalty(rates, 3)) == pytest.approx(np.mean(logs**2), rel=1e-9)
    assert float(penalty(rates, 2)) == pytest.approx(np.mean(logs[1:] ** 2), rel=1e-9)
    np.testing.assert_allclose(jax.grad(penalty)(rates, 3), 2 * logs / rates / 3, rtol=1e-6)


def test_flossing_brings_exponents_to_zero(x64) -> None:
    """Engelken 2023: after some tens of descents the first exponents are near zero. In single precision the way
    down depends on the rounding."""
    xs = jax.random.normal(jax.random.key(1), (60, 4))
    cell = bptt.rnn(16, gain=0.5)
    params = cell.init(jax.random.key(0), 4)

    def penalty(params):
        return bptt.flossing_penalty(cell.step, params, cell.initial_state(), xs, num=4, warmup=10)

    value_and_grad = jax.jit(jax.value_and_grad(penalty))
    before = float(penalty(params))
    for _ in range(60):
        _, gradient = value_and_grad(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    after = bptt.lyapunov_exponents(cell.step, params, cell.initial_state(), xs, num=4, warmup=10).exponents
    assert float(penalty(params)) < before / 50
    assert np.max(np.abs(after)) < 0.2
