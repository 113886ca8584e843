"""dL/dh_t and dL/dparams against `jax.grad` with zero perturbations, and where floating numbers end."""

import math
from fractions import Fraction
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import (
    EXAMPLES,
    T,
    cell_example,
    floating,
    linear_step,
    losses,
    perturbation_gradients,
    relative_error,
    users_jit,
    weighted_loss,
)
from slices import covering

import bptt_jax as bptt

adjoints, temporal_contributions = (
    users_jit(function, static_argnames=("step", "loss", "length"))
    for function in (bptt.adjoints, bptt.temporal_contributions)
)

# What the order of summation may cost: `jax.grad` in single precision is itself 1e-5 off in the worst of these.
TOLERANCE = {"float32": 3e-5, "float64": 1e-12}


def scalar_step(w, h, x):
    return w * h


def last(states):
    return jnp.sum(states[-1])


@pytest.mark.parametrize(
    ("name", "dtype"),
    covering(product(EXAMPLES, ["float32", "float64"]), ("lstm", "float32"), ("tokens", "float64")),
    indirect=["dtype"],
)
def test_equal_to_jax_grad(name, dtype):
    example = EXAMPLES[name](dtype)
    step, params, state0, xs, length = example

    # Closing over a traced value, as a loss on labels does, is part of what is tested.
    @jax.jit
    def both(weights):
        loss = weighted_loss(weights)
        states = bptt.unroll(step, params, state0, xs, length=length)
        expected = states, loss(states), *perturbation_gradients(example, loss)
        return bptt.adjoints(step, params, state0, xs, loss, length=length), expected

    for which, weights in losses(T, dtype).items():
        got, (states, loss, params_grad, state0_grad, adjoints) = both(weights)
        pairs = [(got.params_grad, floating(params_grad)), (got.state0_grad, state0_grad)]
        pairs += [(got.adjoints, adjoints), (got.states, states), (got.loss, loss)]
        for a, b in pairs:
            assert_alike(a, b)
            assert relative_error(a, b) <= TOLERANCE[dtype.name], which
        vectors = np.concatenate([np.reshape(a, (T, -1)) for a in jax.tree.leaves(adjoints)], axis=1)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(
                got.log_norms, np.log(np.linalg.norm(vectors, axis=1)), atol=3 * TOLERANCE[dtype.name]
            )


def assert_alike(a, b):
    """The same structure, shapes and dtypes, None included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(a)] == [(x.shape, x.dtype) for x in jax.tree.leaves(b)]


def test_integer_parameters_have_none():
    step, params, state0, xs, _ = EXAMPLES["tokens"](jnp.float32)
    got = jax.eval_shape(lambda p: bptt.adjoints(step, p, state0, xs, weighted_loss(jnp.ones(T))), params)
    assert got.params_grad["order"] is None
    assert got.params_grad["table"].shape == (5, 3)


@pytest.mark.parametrize("params", [None, jnp.asarray([1, 0])])
def test_nothing_to_learn(params):
    def step(p, h, x):
        return jnp.tanh(h[::-1] if p is None else h[p])

    @jax.jit
    def both(h0):
        arguments = step, params, h0, None, last
        return bptt.adjoints(*arguments, length=3), bptt.temporal_contributions(*arguments, length=3)

    got, contributions = both(jnp.asarray([0.1, 0.2]))
    assert got.params_grad is None
    assert np.all(np.isfinite(got.log_norms))
    assert np.all(contributions.log_norms == -np.inf)
    assert np.all(np.isnan(contributions.shares))


def test_last_loss_is_transported_by_the_product_of_jacobians(x64):
    step, params, state0, xs, _ = cell_example("lstm", jnp.float64)
    loss = weighted_loss(losses(T, jnp.float64)["last"])
    got = jax.jit(lambda xs: bptt.adjoints(step, params, state0, xs, loss))(xs)
    adjoints = np.concatenate(got.adjoints, axis=1)
    product = np.eye(adjoints.shape[1])
    jacobians = np.asarray(jax.jit(lambda xs: bptt.jacobians(step, params, state0, xs))(xs))
    for t in reversed(range(T)):
        np.testing.assert_allclose(adjoints[t], product.T @ adjoints[-1], rtol=1e-12, atol=1e-14)
        product = product @ jacobians[t]
    start = np.concatenate(got.state0_grad)
    np.testing.assert_allclose(start, product.T @ adjoints[-1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("w", [0.9, 0.5, 1.5, 2.0])
def test_log_norms_hold_at_any_length(w):
    steps, w = 5000, jnp.float32(w)
    got = adjoints(scalar_step, w, jnp.ones(()), None, last, length=steps)
    # A rounding of 6e-8 at each of 5000 products can at worst add up to 3e-4.
    np.testing.assert_allclose(got.log_norms, np.arange(steps - 1, -1, -1) * np.log(np.float64(w)), atol=3e-4)
    assert np.all(np.isfinite(got.log_norms))
    assert got.state0_grad == (0 if w < 1 else np.inf)
    if w == np.float32(0.9):
        np.testing.assert_allclose(got.log_norms[0] + np.log(w), -526.8, atol=0.01)


def test_log_norms_of_a_network_that_float32_cannot_hold():
    a = np.asarray([[0.5, 0.3, 0.0], [-0.2, 0.4, 0.1], [0.1, 0.0, 0.3]])
    steps, h, states = 300, np.full(3, 0.1), []
    for _ in range(steps):
        h = np.tanh(a @ h + 0.2)
        states.append(h)
    signal, expected = np.ones(3), np.zeros(steps)
    for t in reversed(range(steps)):
        expected[t] = np.log(np.linalg.norm(signal))
        signal = a.T @ ((1 - states[t] ** 2) * signal)

    def step(a, h, x):
        return jnp.tanh(a @ h + 0.2)

    got = adjoints(step, jnp.asarray(a, jnp.float32), jnp.full(3, 0.1), None, last, length=steps)
    assert expected[0] < np.log(np.finfo(np.float32).smallest_subnormal)
    # Each Jacobian is wrong by some 1e-7, the sum over 300 steps by 1e-4 at most.
    np.testing.assert_allclose(got.log_norms, expected, atol=1e-4)
    assert np.all(np.asarray(got.adjoints[0]) == 0)
    assert np.all(np.isfinite(got.params_grad))


def test_half_precision_log_norms_are_exact_for_powers_of_two():
    got = adjoints(scalar_step, jnp.float16(0.5), jnp.float16(1), None, last, length=4001)
    np.testing.assert_allclose(got.log_norms[0], -2772.5887, rtol=1e-6)


def exact_logs(w, steps, resets=()):
    """log of the entries of dL/dh_1 .. dL/dh_T for the sum of the last state under ``h <- w h``: by fractions."""

    def log(x):
        return math.log(abs(x.numerator)) - math.log(x.denominator) if x else -math.inf

    w = [[Fraction(float(v)) for v in row] for row in np.asarray(w)]
    signal, logs = [Fraction(1)] * len(w), []
    for t in reversed(range(steps)):
        logs.append([log(x) for x in signal])
        signal = [sum(w[j][i] * signal[j] for j in range(len(w))) for i in range(len(w))]
        if t in resets:
            signal = [Fraction(0)] * len(w)
    return np.asarray(logs[::-1])


def assert_same_logs(got, expected):
    """Up to the rounding of 200 products and of the logarithm itself; -inf only where it is exactly zero."""
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=3e-5)


@pytest.mark.parametrize("resets", [(), (90,)])
def test_units_whose_adjoints_differ_by_more_than_float32_does(resets):
    """The first is driven by the second, which forgets fast; the third by none."""
    w = np.asarray([[0.9, 0.0, 0.0], [0.25, 1e-3, 0.0], [0.0, 0.0, 1e-9]], np.float32)
    xs = bptt.Sequence(length=210, mask=np.arange(210) < 200, resets=np.isin(np.arange(210), resets))
    got = bptt.adjoints(linear_step, jnp.asarray(w), jnp.ones(3), xs, last)
    assert_same_logs(got.log_magnitudes[:200], exact_logs(w, 200, resets))
    assert np.min(exact_logs(w, 200)) < -4000
    np.testing.assert_array_equal(got.log_magnitudes[200:], 0)
    assert_same_logs(got.log_norms[:200], np.logaddexp.reduce(2 * exact_logs(w, 200, resets), axis=1) / 2)


@pytest.mark.parametrize("steps", covering([3, 200], 200))
def test_leaves_whose_adjoints_differ_by_more_than_float32_does(steps):
    """Also in a batch, whose other members need no such care; and from the loss itself."""
    weights = {"slow": jnp.asarray([[0.9, 0.5]]), "fast": jnp.asarray([[1e-3, 0.5]])}
    state0 = {"slow": jnp.ones(2), "fast": jnp.ones(())}

    def step(w, h, x):
        return jax.tree.map(lambda h, w: h * w, h, w)

    def reads(states):
        return 1e25 * jnp.sum(states["slow"][-1]) + 1e-25 * states["fast"][-1]

    def found(w):
        return bptt.adjoints(step, w, state0, None, reads, length=steps)

    got = jax.vmap(found)(jax.tree.map(lambda a: a[0], weights))
    back = np.arange(steps - 1, -1, -1)
    for k in range(2):
        slow, fast = (
            back * np.log(np.float64(weights[name][0, k])) + np.log(np.float64(np.float32(scale)))
            for name, scale in (("slow", 1e25), ("fast", 1e-25))
        )
        assert_same_logs(got.leaf_log_norms["slow"][k], slow + np.log(2) / 2)
        assert_same_logs(got.leaf_log_norms["fast"][k], fast)
        assert_same_logs(got.log_magnitudes["slow"][k], np.stack([slow, slow], axis=1))


def test_derivatives_of_log_magnitudes():
    """Entries that float32 does not hold beside the largest are constant to it."""

    def found(w):
        return bptt.adjoints(scalar_step, w, jnp.ones(2), None, last, length=100).log_magnitudes

    w = jnp.asarray([0.9, 1e-3])
    gradient = jax.jit(jax.vmap(jax.grad(lambda w, k: found(w)[k, jnp.arange(2)].sum()), (None, 0)))
    known, lost = gradient(w, jnp.asarray([95, 0]))
    np.testing.assert_allclose(known, 4 / w, rtol=1e-5)
    np.testing.assert_allclose(lost, [99 / w[0], 0], rtol=1e-5)


@pytest.mark.parametrize("remat", [False, 30])
def test_gradients_beyond_the_range_of_floats(remat):
    """Their logarithms, where the numbers are 0 or inf: w^k summed over k, of states that are zero throughout."""
    steps = 5000

    def step(p, h, x):
        return p["w"] * h + p["b"] * x

    @users_jit
    def found(w):
        params = {"w": w, "b": jnp.ones(())}
        xs = jnp.zeros(steps)
        return bptt.adjoints(step, params, jnp.zeros(()), xs, lambda h: h[-1], inputs=True, remat=remat)

    for w in (np.float32(0.8), np.float32(1.25)):
        got, log = found(w), np.log(np.float64(w))
        end = 0 if w < 1 else np.inf
        assert got.state0_grad == got.xs_grad[0] == end
        np.testing.assert_allclose(got.state0_log_norm, steps * log, rtol=1e-6)
        np.testing.assert_allclose(got.xs_log_norms, log * np.arange(steps - 1, -1, -1), rtol=1e-6, atol=1e-6)
        assert got.params_log_norm == -np.inf  # zero, for state and input are


def test_gradient_of_parameters_beyond_the_range_of_floats():
    """``dL/db`` is the geometric series of w."""

    def found(w, scale):
        params = {"w": w, "b": jnp.zeros(())}
        return bptt.adjoints(
            lambda p, h, x: p["w"] * h + p["b"] * x,
            params,
            jnp.zeros(()),
            jnp.ones(4000),
            lambda h, scale: scale * h[-1] + 1e30 * scale,
            args=scale,
        )

    w = np.float32(1.25)
    got = users_jit(found)(w, np.float32(1))
    assert got.params_grad["b"] == np.inf
    expected = 4000 * np.log(np.float64(w)) - np.log(np.float64(w) - 1)
    np.testing.assert_allclose(got.params_log_norm, expected, rtol=1e-6)
    scaled = got.scaled.params_grad
    np.testing.assert_allclose(scaled.log_magnitudes["b"], expected, rtol=1e-6)
    np.testing.assert_allclose(got.args_log_norm, 30 * np.log(10), rtol=1e-6)


def test_what_leaves_jax_of_adjoints():
    pytest.importorskip("xarray")
    got = bptt.adjoints(scalar_step, 0.5, jnp.ones(2), None, last, length=3)
    said = got.to_dict()
    assert said["adjoints"] == [[0.25, 0.25], [0.5, 0.5], [1, 1]]
    np.testing.assert_allclose(said["log_norms"], np.log(np.sqrt(2) / np.asarray([4, 2, 1])), rtol=1e-6)
    np.testing.assert_allclose(said["leaf_log_norms"], said["log_norms"], rtol=1e-6)
    assert said["xs_log_norms"] is said["args_log_norm"] is None
    np.testing.assert_allclose(said["params_log_norm"], np.log(1.5), rtol=1e-6)  # 3 w^2 for each of two
    data = got.to_xarray()
    for name in ("adjoints", "log_magnitudes", "scaled.adjoints.mantissa"):
        assert data[name].dims == ("time", "unit")
    for name in ("log_norms", "leaf_log_norms", "scaled.adjoints.exponent"):
        assert data[name].dims == ("time",)
    assert repr(got).startswith("Adjoints: 3 steps, log norm -1.04 at h_1, 0.3466 at h_T, 0.4055 of dL/dparams")


def test_orthogonal_step_keeps_the_adjoint():
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))
    got = adjoints(linear_step, jnp.asarray(q, jnp.float32), jnp.ones(4), None, last, length=1000)
    # q itself is orthogonal to 1e-7 only, which 1000 steps multiply.
    np.testing.assert_allclose(got.log_norms, np.log(2.0), atol=1e-4)


def test_unread_states_have_minus_infinity():
    got = bptt.adjoints(scalar_step, jnp.float32(0.9), jnp.ones(()), None, lambda states: states[2], length=6)
    assert np.all(got.log_norms[3:] == -np.inf)
    assert np.all(got.adjoints[3:] == 0)
    np.testing.assert_allclose(got.log_norms[:3], [2 * np.log(0.9), np.log(0.9), 0], atol=1e-6)


def test_nan_stays_behind_its_step():
    """A NaN in the immediate derivative at one step does not reach the adjoints of later ones."""
    got = bptt.adjoints(
        scalar_step, jnp.float32(0.9), jnp.ones(()), None, lambda states: states[2] * jnp.nan + states[5], length=6
    )
    assert np.all(np.isnan(got.log_norms[:3]))
    assert np.all(np.isfinite(got.log_norms[3:]))


def test_batch_inside_the_step():
    """A vmapped step has the gradient of the batch, the sum of the sequences' own."""
    step, params, state0, xs, _ = cell_example("rnn", jnp.float32)
    xs, states0 = np.stack([xs, -0.5 * xs], axis=1), np.stack([state0, -state0])
    whole = jax.jit(lambda h, xs: bptt.adjoints(jax.vmap(step, (None, 0, 0)), params, h, xs, last))(states0, xs)
    each = jax.jit(jax.vmap(lambda h, xs: bptt.adjoints(step, params, h, xs, last), (0, 1)))(states0, xs)
    summed = jax.tree.map(lambda g: np.asarray(g).sum(axis=0), each.params_grad)
    assert relative_error(whole.params_grad, summed) <= 1e-5
    assert relative_error(whole.adjoints, np.swapaxes(each.adjoints, 0, 1)) <= 1e-5


@pytest.mark.parametrize("name", ["lstm", "tokens"])
def test_contributions_against_one_vjp_per_step(name, x64):
    step, params, state0, xs, _ = example = EXAMPLES[name](jnp.float64)
    loss = weighted_loss(losses(T, jnp.float64)["all"])

    def of_one_step(h, x, adjoint):
        gradient = jax.vjp(lambda p: step(p, h, x), params)[1](adjoint)[0]
        return jnp.concatenate([jnp.ravel(g) for g in jax.tree.leaves(floating(gradient))])

    @jax.jit
    def both():
        states = bptt.unroll(step, params, state0, xs)
        starts = jax.tree.map(lambda h0, h: jnp.concatenate([h0[None], h[:-1]]), state0, states)
        adjoints = perturbation_gradients(example, loss)[2]
        return bptt.temporal_contributions(step, params, state0, xs, loss), jax.vmap(of_one_step)(
            starts, xs, adjoints
        )

    got, contributions = both()
    contributions = np.asarray(contributions)
    whole = contributions.sum(axis=0)
    np.testing.assert_allclose(got.log_norms, np.log(np.linalg.norm(contributions, axis=1)), atol=1e-12)
    np.testing.assert_allclose(got.shares, contributions @ whole / (whole @ whole), atol=1e-12)
    np.testing.assert_allclose(np.sum(got.shares), 1, atol=1e-12)


def input_step(p, h, x):
    """``dL/dp`` for ``L = h_T`` is the sum over t of ``x_t / 2^(T-t)``."""
    return 0.5 * h + p * x


def test_contributions_of_a_backward_pass_with_a_loop_of_unknown_length():
    """As that of a solver of differential equations: it runs, and cannot be transposed."""

    @jax.custom_vjp
    def thrice(h):
        return 3 * h

    def backward(count, g):
        return (jax.lax.while_loop(lambda c: c[0] < count, lambda c: (c[0] + 1, c[1] + g), (0, 0 * g))[1],)

    thrice.defvjp(lambda h: (3 * h, jnp.asarray(3)), backward)
    xs = jnp.asarray([[0.5], [-1.0], [0.25]])
    found, expected = (
        bptt.gradient_flow(
            lambda w, h, x, f=f: f(w * h) + x,
            jnp.float32(0.5),
            jnp.ones(1),
            xs,
            lambda h: h[-1, 0] ** 2,
            spectra=False,
        )
        for f in (thrice, lambda h: 3 * h)
    )
    assert (found.mode, expected.mode) == ("reverse", "forward")
    np.testing.assert_allclose(found.contributions.shares, expected.contributions.shares, rtol=1e-5)
    np.testing.assert_allclose(found.contributions.log_norms, expected.contributions.log_norms, rtol=1e-5)


def test_second_derivative_where_the_gradient_is_zero():
    """Of parameters that a state of zero hides."""

    def gradient(h0, find):
        return find(0.5, h0)

    def whole(w, h0):
        return bptt.final_state(scalar_step, w, h0, length=12)

    def ours(w, h0):
        return bptt.adjoints(scalar_step, w, h0, None, last, length=12).params_grad

    expected = jax.grad(gradient)(0.0, jax.grad(whole))
    np.testing.assert_allclose(jax.grad(gradient)(0.0, ours), expected, rtol=1e-6)


def test_contributions_hold_where_float32_underflows():
    back = np.arange(1999, -1, -1)
    got = temporal_contributions(input_step, jnp.ones(1), jnp.ones(1), np.ones((2000, 1), np.float32), last)
    np.testing.assert_allclose(got.log_norms, -back * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(got.shares, 0.5**back / 2, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize(("dtype", "scale", "tolerance"), [("float16", 500, 2e-3), ("float32", 1e22, 1e-6)])
def test_shares_of_a_gradient_whose_square_overflows(dtype, scale, tolerance):
    one, xs = np.ones(1, dtype), np.full((6, 1), scale, dtype)
    got = temporal_contributions(input_step, one, one, xs, last)
    expected = 0.5 ** np.arange(5, -1, -1.0)
    np.testing.assert_allclose(got.shares, expected / expected.sum(), rtol=tolerance)


def test_what_contributions_say_of_themselves():
    def said(p, loss=last):
        found = temporal_contributions(lambda p, h, x: p * h + x, p, jnp.zeros(1), jnp.ones((5, 1)), loss)
        return repr(found).splitlines()[0]

    # Of the last state by w: h_4, w h_3, w^2 h_2, w^3 h_1 and nothing from the first step, which starts from zero.
    assert said(0.5).endswith("half of the gradient is from step 5 of 5 on, the earliest part from step 2")
    assert "from step 4 of 5 on" in said(2.0)  # 15 + 14 + 12 + 8 + 0 of 49
    assert said(0.5, lambda states: 0 * states[-1, 0]).endswith("the gradient is zero")
    assert said(jnp.inf).endswith("the gradient is not finite")


def test_what_contributions_say_of_a_gradient_that_is_lost_beside_the_largest_adjoint():
    first = jnp.zeros((200, 1)).at[0].set(1.0)
    found = temporal_contributions(lambda b, h, x: 0.1 * h + b * x, 0.5, jnp.zeros(1), first, last)
    np.testing.assert_allclose(found.log_norms, [199 * np.log(0.1)] + [-np.inf] * 199, rtol=1e-6)
    said = f"the gradient underflows or cancels: its largest part, of step 1, has log norm {199 * np.log(0.1):.4g}"
    assert repr(found).startswith(f"TemporalContributions: {said}\n")


def test_a_gradient_that_is_lost_beside_the_largest_adjoint_is_called_so():
    """By whatever tells its norm: the adjoints alone cannot tell it from zero, a gradient flow can."""

    def decaying(b, h, x):
        return 0.1 * h + b * x

    def headline(scale, loss=last, b=0.5):
        return repr(bptt.adjoints(decaying, b, jnp.zeros(1), scale * first, loss)).splitlines()[0]

    def flow(scale):
        return bptt.gradient_flow(decaying, 0.5, jnp.zeros(1), scale * first, last, spectra=False)

    first, slope = jnp.zeros((200, 1)).at[0].set(1.0), 199 * np.log(0.1)
    assert bptt.adjoints(decaying, 0.5, jnp.zeros(1), first, last).params_log_norm == -np.inf
    assert headline(1.0).endswith(", dL/dparams zero, or lost beside the largest adjoint")
    assert headline(1.0, lambda states: 0 * states[-1, 0]).endswith(", dL/dparams zero")
    bare = bptt.adjoints(lambda p, h, x: 0.1 * h + x, None, jnp.zeros(1), first, last)
    assert "dL/dparams" not in repr(bare).splitlines()[0]

    part = f"the gradient underflows or cancels: its largest part, of step 1, has log norm {slope:.4g}"
    assert flow(1.0).statement.endswith(f"; {part}")
    assert flow(1.0).summary()["statement"] == flow(1.0).statement
    assert "underflows or cancels" not in flow(0.0).statement  # it is zero
    both = jax.vmap(flow)(jnp.asarray([0.0, 1.0, 0.01]))
    assert both.statement.endswith(f"; in 2 of 3 sequences {part}")

    monitor = bptt.Monitor(decaying, last, in_axes=(None, 0, None))
    record = monitor.probe(0, 0.5, jnp.zeros(1), first[None])
    assert record.statement.endswith("; dL/dparams zero, or lost beside the largest adjoint")
    seen = bptt.Monitor(decaying, last, in_axes=(None, 0, None)).probe(0, 0.5, jnp.zeros(1), jnp.ones((1, 200, 1)))
    assert "dL/dparams" not in seen.statement


def test_shares_where_the_derivative_along_the_gradient_is_not_finite():
    """Of a hidden Markov model that cannot be in two of its states at first: pulls are finite there, pushes are not."""
    transitions = jnp.log(jnp.array([[0.7, 0.3, 0.0], [0.0, 0.6, 0.4], [0.2, 0.0, 0.8]]))
    b = jnp.log(jnp.array([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]]))
    start, xs = jnp.array([0.0, -jnp.inf, -jnp.inf]), jnp.array([0, 1, 0, 1])

    def step(b, a, x):
        return jax.nn.logsumexp(a[:, None] + transitions, axis=0) + b[:, x]

    def final(states):
        return -jax.nn.logsumexp(states[-1])

    def of_step(each):  # by parameters of each step's own
        def body(a, inputs):
            return step(inputs[0], a, inputs[1]), None

        return -jax.nn.logsumexp(jax.lax.scan(body, start, (each, xs))[0])

    parts = np.asarray(jax.grad(of_step)(jnp.broadcast_to(b, (4, 3, 2))))
    whole = parts.sum(axis=0)
    expected = np.sum(parts * whole, axis=(1, 2)) / np.sum(whole**2)
    np.testing.assert_allclose(temporal_contributions(step, b, start, xs, final).shares, expected, rtol=1e-5)


def test_shares_of_complex_parameters_sum_to_one():
    parts = jax.random.normal(jax.random.key(0), (2, 2, 2)) / 2
    a = jax.lax.complex(parts[0], parts[1])
    h0 = jnp.ones(2, jnp.complex64)
    found = bptt.temporal_contributions(
        lambda a, h, x: a @ h, a, h0, None, lambda s: jnp.sum(jnp.abs(s[-1]) ** 2), length=5
    )
    assert abs(float(jnp.sum(found.shares)) - 1) < 1e-5


@pytest.mark.parametrize(
    ("compile_", "steps", "power"), covering([(jax.jit, 300, 1), (users_jit, 20, 40)], (users_jit, 20, 40))
)
def test_parallel_adjoints_beyond_the_range_of_floats(compile_, steps, power) -> None:
    """Powers of 1/2 and 2 that float32 does not hold, and zero Jacobians, which end the signal for good."""
    parallel_adjoints, last = compile_(bptt.parallel.parallel_adjoints), np.zeros((steps, 2), np.float32)
    last[-1] = 1, 0
    back = np.arange(steps - 1, -1, -1)
    for factor in (0.5**power, 2.0**power):
        jacobians = np.broadcast_to(factor * np.eye(2, dtype=np.float32), (steps, 2, 2))
        found = parallel_adjoints(jacobians, last)
        np.testing.assert_allclose(found.log_norms, back * np.log(factor), rtol=1e-6)
        near = back * power <= 120  # where float32 still holds it
        np.testing.assert_array_equal(found.adjoints[near, 0], factor ** back[near].astype(np.float32))
    jacobians = np.broadcast_to(np.eye(2, dtype=np.float32), (steps, 2, 2)).copy()
    jacobians[steps // 2] = 0
    dead = parallel_adjoints(jacobians, last)
    np.testing.assert_array_equal(dead.log_norms[steps // 2 :], 0)
    np.testing.assert_array_equal(dead.log_norms[: steps // 2], -np.inf)
    np.testing.assert_array_equal(dead.state0_grad, 0)


def test_parallel_adjoints_of_other_arrays() -> None:
    jacobians, last = np.zeros((40, 2, 2), np.float32), np.zeros((40, 2), np.float32)
    with pytest.raises(ValueError, match=r"immediate: expected shape \[40, 2\], as the jacobians, got \[40\]"):
        bptt.parallel.parallel_adjoints(jacobians, last[:, 0])
    with pytest.raises(TypeError, match="immediate: expected float32, as the jacobians, got complex64"):
        bptt.parallel.parallel_adjoints(jacobians, last.astype(np.complex64))


@pytest.mark.parametrize(
    ("name", "remat"),
    covering([*((name, True) for name in EXAMPLES), ("gru", 2), ("lstm", T)], ("complex", True), ("gru", 2)),
)
def test_rematerialised_it_is_the_same(name, remat, x64):
    """Segments that divide T and that do not; one segment alone."""
    example = EXAMPLES[name](jnp.float64)
    step, params, state0, xs, length = example
    loss = weighted_loss(losses(T, jnp.float64)["all"])

    def found(remat):
        got = jax.jit(
            lambda params: bptt.adjoints(step, params, state0, xs, loss, length=length, remat=remat, inputs=True)
        )(params)
        return got.loss, got.states, got.adjoints, got.log_norms, got.params_grad, got.state0_grad, got.xs_grad

    for got, expected in zip(jax.tree.leaves(found(remat)), jax.tree.leaves(found(False)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_rematerialised_it_keeps_little():
    """Beyond what it returns: some segments' residuals, where plainly it is all of them."""
    steps, n = 2500, 32
    cell = bptt.gru(n)
    params, xs = cell.init(jax.random.key(0), 2), jnp.zeros((steps, 2))

    def temporary(remat):
        def found(params, xs):
            return bptt.adjoints(cell.step, params, cell.initial_state(), xs, lambda h: jnp.sum(h), remat=remat)

        return jax.jit(found).lower(params, xs).compile().memory_analysis().temp_size_in_bytes

    assert temporary(True) < steps * n * 4 / 2  # less than half of the states
    assert temporary(False) > 4 * steps * n * 4


def test_parallel_adjoints_of_padding_take_the_identity_whatever_stands_there() -> None:
    jacobians, last = jnp.asarray([2.0, jnp.nan, 3.0])[:, None, None], jnp.asarray([[0.0], [0.0], [1.0]])
    got = bptt.parallel.parallel_adjoints(jacobians, last, mask=jnp.asarray([True, False, True]))
    np.testing.assert_array_equal(got.adjoints.ravel(), [3, 3, 1])
    np.testing.assert_array_equal(got.state0_grad, [6])


@pytest.mark.exhaustive
def test_parallel_adjoints_of_padding_and_resets(x64):
    """As those of `adjoints`, which looks at the step itself; what stands in the padding is NaN."""
    e = cell_example("lstm", jnp.float64, n=2, steps=11)
    real = np.asarray([0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0], bool)
    resets = np.asarray([1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1], bool)
    again = jax.tree.map(lambda a: 0.3 * a, e.state0)
    sequence = bptt.Sequence(e.xs, mask=jnp.asarray(real), resets=jnp.asarray(resets), reset_state=again)
    loss = weighted_loss(jnp.sin(1 + jnp.arange(11, dtype=float)))
    vectors = jax.vmap(lambda h: bptt.ravel_state(h)[0])

    @jax.jit
    def both(sequence):
        known = bptt.adjoints(*e[:3], sequence, loss)
        jacobians = bptt.jacobians(*e[:3], sequence)
        jacobians = jnp.where(jnp.asarray(real)[:, None, None], jacobians, jnp.nan)
        immediate = vectors(jax.grad(loss)(known.states))
        options = {"mask": sequence.mask, "resets": sequence.resets}
        return known, bptt.parallel.parallel_adjoints(jacobians, immediate, **options)

    known, got = both(sequence)
    np.testing.assert_allclose(got.adjoints, vectors(known.adjoints), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(got.log_norms, known.log_norms, atol=1e-12)
    np.testing.assert_allclose(got.state0_grad, bptt.ravel_state(known.state0_grad)[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(got.reset_state_grad, bptt.ravel_state(known.reset_state_grad)[0], rtol=1e-12)
    without = bptt.parallel.parallel_adjoints(jnp.ones((2, 1, 1)), jnp.ones((2, 1)))
    assert without.reset_state_grad is None
    bad = jnp.full((3, 1, 1), 2.0).at[2].set(jnp.inf)
    got = bptt.parallel.parallel_adjoints(bad, jnp.ones((3, 1)), resets=jnp.asarray([False, False, True]))
    np.testing.assert_array_equal(got.adjoints[:, 0], [3, 1, 1])  # nothing of it passes the reset
    with pytest.raises(ValueError, match="resets: expected 2 booleans"):
        bptt.parallel.parallel_adjoints(jnp.ones((2, 1, 1)), jnp.ones((2, 1)), resets=jnp.zeros(3, bool))


def test_a_gradient_in_float16_where_parameters_are_many():
    """Down to its subnormal numbers, which are much of its range."""
    xs = jnp.zeros(60, jnp.float16).at[0].set(1)
    params = jnp.full(100, 0.5, jnp.float16)

    def step(p, h, x):
        return jnp.float16(0.8) * h + p[0] * x

    def loss(states):
        return 1000 * states[-1].astype(jnp.float32)

    found = bptt.adjoints(step, params, jnp.float16(0), xs, loss)
    gradient = jax.grad(lambda p: loss(bptt.unroll(step, p, jnp.float16(0), xs)))(params)
    assert gradient[0] > 0.0015
    np.testing.assert_allclose(found.params_grad, gradient, rtol=0.01)


def test_log_magnitudes_in_float16_beside_a_larger_one():
    """0.18^k beside 0.2^k: held in float16 it would fall to the smallest number and, times 0.9, stay there."""
    w = jnp.asarray([0.18, 0.2], jnp.float16)
    found = bptt.adjoints(
        lambda w, h, x: w * h, w, jnp.ones(2, jnp.float16), None, lambda s: jnp.sum(s[-1]), length=300
    )
    steps = np.arange(299, -1, -1)[:, None]
    expected = steps * np.log(np.asarray(w, np.float64))
    # Every step rounds a mantissa of eleven digits.
    np.testing.assert_allclose(found.log_magnitudes, expected, rtol=1e-3, atol=0.01)
