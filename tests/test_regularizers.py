"""Omega against Pascanu's own network written out in NumPy float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error
from slices import covering

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


def _gru_jacobian(weights, state, x, params):
    """Of a gru by hand, linear in the recurrent weights: gates and what the reset multiplies are constants."""
    w_r, w_z, w_n = jnp.split(weights, 3)
    r_h, z_h, n_h = jnp.split(params.recurrent @ state, 3)
    r_x, z_x, n_x = jnp.split(params.input @ x + params.bias, 3)
    r, z, m = jax.nn.sigmoid(r_h + r_x), jax.nn.sigmoid(z_h + z_x), n_h + params.recurrent_bias
    n = jnp.tanh(n_x + r * m)
    inside = r[:, None] * w_n + (m * r * (1 - r))[:, None] * w_r
    through_z = ((state - n) * z * (1 - z))[:, None] * w_z
    return jnp.diag(z) + through_z + ((1 - z) * (1 - n**2))[:, None] * inside


def _omega(jacobians, deltas):
    pulled = jnp.einsum("ti,tij->tj", deltas, jacobians)
    return jnp.sum((jnp.sum(pulled**2, axis=1) / jnp.sum(deltas**2, axis=1) - 1) ** 2)


def test_gru_by_hand(x64) -> None:
    cell = bptt.gru(N, bias_init=jax.nn.initializers.normal(1.0))
    params, xs = cell.init(jax.random.key(0), 2), jax.random.normal(jax.random.key(1), (T, 2))
    h0 = jnp.linspace(-0.5, 0.5, N)
    done = bptt.adjoints(cell.step, params, h0, xs, _loss)
    starts = jnp.concatenate([h0[None], done.states[:-1]])

    def by_hand(weights):
        return _omega(jax.vmap(lambda h, x: _gru_jacobian(weights, h, x, params))(starts, xs), done.adjoints)

    def penalty(params):
        return omega_penalty(omega_terms(cell.step, params, h0, xs, _loss))

    value, gradient = jax.jit(jax.value_and_grad(penalty))(params)
    expected, expected_gradient = jax.jit(jax.value_and_grad(by_hand))(params.recurrent)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient.recurrent, expected_gradient, rtol=1e-9, atol=1e-12)
    for other in (gradient.input, gradient.bias, gradient.recurrent_bias):
        np.testing.assert_array_equal(other, 0)


def test_gates_that_do_not_see_the_state_vary(x64) -> None:
    """Of min_gru, J = diag(1 - z) with z made of the input alone; delta_t is a product of later ones."""
    cell = bptt.cells.min_gru(N)
    params, xs = cell.init(jax.random.key(0), 2), jax.random.normal(jax.random.key(1), (T, 2))
    deltas = bptt.adjoints(cell.step, params, cell.initial_state(), xs, _loss).adjoints

    def by_hand(params):
        z = jax.nn.sigmoid(xs @ params.input[:N].T + params.bias[None, :N])
        return _omega(jax.vmap(jnp.diag)(1 - z), deltas)

    def penalty(params):
        return omega_penalty(omega_terms(cell.step, params, cell.initial_state(), xs, _loss))

    got, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (penalty, by_hand))
    assert relative_error(got, expected) < 1e-12


def tanh_step(p, h, x):
    return jnp.tanh(p["w"] @ h + p["u"] @ x)


@jax.custom_jvp
def own_tanh(v):
    return jnp.tanh(v)


own_tanh.defjvps(lambda dv, out, v: dv * (1 - out**2))


@jax.custom_vjp
def backward_tanh(v):
    return jnp.tanh(v)


backward_tanh.defvjp(lambda v: (jnp.tanh(v), v), lambda v, g: (g * (1 - jnp.tanh(v) ** 2),))


def weights_through_a_loop(p, h, x):
    """The weights pass through the carry beside a state that does not move at first, and the start through ys."""

    def body(carry, u):
        w, old, new = carry
        return (w, new, jnp.tanh(w @ old + u @ x)), old

    zeros = jnp.zeros_like(h)
    (_, new, _), starts = jax.lax.scan(body, (p["w"], h, zeros), jnp.stack([p["u"], p["u"]]))
    return new + 0 * starts[0]


def halves(p, h, x):
    """A state with a counter, weights of which one is picked by the state, and one that is made of the input."""
    w = jax.lax.cond(h["h"][0] > 0, lambda: p["w"], lambda: 1.0 * p["w"])
    scale = jnp.where(h["t"] % 2 == 0, 1.0, 1.0)
    return {"h": jnp.tanh(scale * w @ h["h"] + p["u"] @ x), "t": h["t"] + 1}


WAYS = {
    "jit": jax.jit(tanh_step),
    "checkpoint": jax.checkpoint(tanh_step),
    "cond": lambda p, h, x: jax.lax.cond(x[0] > 0, tanh_step, jax.checkpoint(tanh_step), p, h, x),
    "switch": lambda p, h, x: jax.lax.switch(
        jnp.argmax(jnp.abs(x)), [lambda h: tanh_step(p, h, x), lambda h: jnp.tanh(p["w"] @ h + p["u"] @ x)], h
    ),
    "fori_loop": lambda p, h, x: jax.lax.fori_loop(0, 1, lambda i, h: tanh_step(p, h, x), h),
    "scan": weights_through_a_loop,
    "custom_jvp": lambda p, h, x: own_tanh(p["w"] @ h + p["u"] @ x),
    "custom_vjp": lambda p, h, x: backward_tanh(p["w"] @ h + p["u"] @ x),
    "inner vmap": lambda p, h, x: jax.vmap(lambda w, u: jnp.tanh(w @ h + u @ x))(p["w"], p["u"]),
    "counter": halves,
}


@pytest.mark.parametrize("way", covering(WAYS, "cond", "scan", "counter"))
def test_the_same_however_the_step_is_written(way, x64) -> None:
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((N, N))), "u": jnp.asarray(rng.standard_normal((N, 2)))}
    h0, xs = jnp.asarray(rng.standard_normal(N)), jnp.asarray(rng.standard_normal((T, 2)))
    counted = {"h": h0, "t": jnp.asarray(0)}

    def loss(states):
        return _loss(states["h"] if isinstance(states, dict) else states)

    @jax.jit
    def of(params):
        def penalty(params, step, state0):
            return omega_penalty(omega_terms(step, params, state0, xs, loss))

        start = counted if way == "counter" else h0
        bare, wrapped = ((tanh_step, h0), (WAYS[way], start))
        return [jax.value_and_grad(penalty)(params, *each) for each in (bare, wrapped)]

    bare, wrapped = of(params)
    assert relative_error(wrapped, bare) < 1e-12
    np.testing.assert_array_equal(wrapped[1]["u"], 0)
    assert np.all(wrapped[1]["w"] != 0)


def test_omega_of_a_linear_step_is_all_its_derivative(x64) -> None:
    """J is W and nothing else: the paper's derivative is that of the terms with delta constant."""
    w, xs = jnp.asarray(np.random.default_rng(0).standard_normal((N, N))), jnp.zeros((T, N))
    step = lambda w, h, x: w @ h + x  # noqa: E731
    deltas = bptt.adjoints(step, w, jnp.ones(N), xs, _loss).adjoints
    got = jax.grad(lambda w: omega_penalty(omega_terms(step, w, jnp.ones(N), xs, _loss)))(w)
    exact = jax.grad(lambda w: _omega(jnp.broadcast_to(w, (T, N, N)), deltas))(w)
    np.testing.assert_allclose(got, exact, rtol=1e-10)


@pytest.mark.exhaustive
def test_padding_and_resets_are_the_pieces_alone(x64) -> None:
    """Terms at real steps, none in padding, and the gradient is the sum of the pieces'."""
    cell = bptt.rnn(3)
    params, xs = cell.init(jax.random.key(0), 2), jax.random.normal(jax.random.key(1), (8, 2))
    real = np.asarray([1, 1, 0, 1, 1, 0, 0, 0], bool)
    resets = np.asarray([0, 0, 1, 0, 0, 0, 1, 0], bool)  # before step 3
    spoilt = jnp.where(jnp.asarray(real)[:, None], xs, jnp.nan)
    sequence = bptt.Sequence(spoilt, mask=jnp.asarray(real), resets=jnp.asarray(resets))
    h0 = jnp.asarray([0.3, -0.2, 0.5])

    def loss(states, weights):
        return weights @ jnp.sum(jnp.sin(states), axis=1)

    @jax.jit
    def of(params, xs, weights):
        def penalty(params):
            terms = omega_terms(cell.step, params, h0, xs, loss, args=weights)
            return omega_penalty(terms), terms

        (_, terms), gradient = jax.value_and_grad(penalty, has_aux=True)(params)
        return terms, gradient

    weights = jnp.asarray([1.0, -0.5, 0.25, 2.0, 0.0, 1.0, 0.5, 0.0])
    terms, gradient = of(params, sequence, weights)
    np.testing.assert_array_equal(terms.valid, real)
    np.testing.assert_array_equal(terms.terms[~real], 0)
    total = jax.tree.map(jnp.zeros_like, params)
    for piece, folded in (([0, 1], [1.0, -0.25]), ([3, 4], [2.0, 1.5])):
        alone, part = of(params, xs[np.asarray(piece)], jnp.asarray(folded))
        np.testing.assert_allclose(terms.terms[np.asarray(piece)], alone.terms, rtol=1e-11)
        total = jax.tree.map(jnp.add, total, part)
    assert relative_error(gradient, total) < 1e-11
    per_step = omega_penalty(terms, version="code")
    np.testing.assert_allclose(per_step, omega_penalty(terms) / 4, rtol=1e-12)


def test_what_omega_cannot_know_is_refused() -> None:
    def loop(w, h, x):
        return jax.lax.while_loop(lambda c: c[0] < x, lambda c: (c[0] + 1, jnp.tanh(w @ c[1])), (0, h))[1]

    with pytest.raises(TypeError, match="needs its backward pass, and it has none"):
        omega_terms(loop, jnp.eye(2), jnp.ones(2), jnp.asarray([1, 2]), _loss)
    mesh = jax.make_mesh((1,), ("units",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def sharded(w, h, x):
        return jax.shard_map(lambda w, h: jnp.tanh(w @ h), mesh=mesh, in_specs=(spec, spec), out_specs=spec)(w, h)

    with pytest.raises(TypeError, match="step: weights and states cannot be told apart within a shard_map"):
        omega_terms(sharded, jnp.eye(2), jnp.ones(2), None, _loss, length=3)


def test_bad_version() -> None:
    with pytest.raises(ValueError, match="version: expected 'paper' or 'code', got 'theirs'"):
        omega_penalty(OmegaTerms(jnp.ones(2), jnp.ones(2, bool)), version="theirs")  # type: ignore[arg-type]


def test_flossing_is_the_mean_square_of_the_exponents(x64) -> None:
    """Of a diagonal map by hand, with its gradient: d/dd of (ln d)^2 is 2 ln d / d."""
    rates = jnp.asarray([0.5, 2.0, 0.9])

    def penalty(d, num):
        return bptt.remedies.flossing_penalty(
            lambda d, h, x: d * h, d, jnp.ones(3), num=num, length=400, warmup=300
        )

    logs = np.log(np.asarray(rates))
    assert float(penalty(rates, 2)) == pytest.approx(np.mean(logs[1:] ** 2), rel=1e-9)
    value, gradient = jax.value_and_grad(penalty)(rates, 3)
    assert float(value) == pytest.approx(np.mean(logs**2), rel=1e-9)
    np.testing.assert_allclose(gradient, 2 * logs / rates / 3, rtol=1e-6)


def test_flossing_of_nothing_but_padding_is_zero() -> None:
    """What fills up a batch does not make the batch's penalty NaN."""
    masks = jnp.arange(5)[None] < jnp.array([4, 0])[:, None]

    def penalties(w):
        of_one = partial(bptt.remedies.flossing_penalty, lambda w, h, x: w * h, w, jnp.ones(1), num=1)
        return jax.vmap(lambda mask: of_one(bptt.Sequence(mask=mask)))(masks)

    np.testing.assert_allclose(penalties(0.5), [np.log(2) ** 2, 0], rtol=1e-5)
    np.testing.assert_allclose(jax.jacobian(penalties)(0.5), [-4 * np.log(2), 0], rtol=1e-5)


def test_flossing_brings_exponents_to_zero(x64) -> None:
    """Engelken 2023: after some tens of descents the first exponents are near zero. In single precision the way
    down depends on the rounding."""
    xs = jax.random.normal(jax.random.key(1), (60, 4))
    cell = bptt.rnn(16, gain=0.5)
    params = cell.init(jax.random.key(0), 4)

    def penalty(params):
        return bptt.remedies.flossing_penalty(cell.step, params, cell.initial_state(), xs, num=4, warmup=10)

    value_and_grad = jax.jit(jax.value_and_grad(penalty))
    before = float(penalty(params))
    for _ in range(60):
        _, gradient = value_and_grad(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    after = bptt.lyapunov_exponents(cell.step, params, cell.initial_state(), xs, num=4, warmup=10).exponents
    assert float(penalty(params)) < before / 50
    assert np.max(np.abs(after)) < 0.2
