"""`calibrate`: the value found is the one that theory has, and its error bars hold it as often as they should."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

import bptt_jax as bptt
from bptt_jax.analysis import calibrate_cell
from bptt_jax.analysis.calibration import draw_calibration


def last(states):
    return jnp.sum(states[-1])


def scaled(w, h, x):
    return w * h


def linear(value):
    return scaled, value


def autonomous(w, h, x):
    return jnp.tanh(w @ h)


def leaky(w, h, x):
    return 0.8 * h + 0.2 * jnp.tanh(w @ h)


@pytest.mark.parametrize("loss", [last, None])
def test_the_rate_of_a_linear_recurrence_is_the_logarithm(loss):
    found = bptt.calibrate(linear, jnp.ones(2), None, loss, low=0.1, high=30.0, target=-1.0, length=10)
    np.testing.assert_allclose(found.value, np.exp(-1), rtol=1e-5)
    np.testing.assert_allclose(found.slope, np.exp(1), rtol=1e-2)
    assert found.error < 1e-6
    measured = found.measured
    assert np.all(np.diff(measured.values) > 0)
    np.testing.assert_allclose(measured.values[jnp.array([0, -1])], [0.1, 30.0], rtol=1e-6)
    np.testing.assert_allclose(measured.rates, np.log(measured.values), atol=1e-5)
    assert len(measured.values) < 16


N, DRAWS = 24, 4
KEYS = jax.random.split(jax.random.key(0), DRAWS)


def normal(key):
    return jax.random.normal(key, (N, N)) / np.sqrt(N)


def radii(leak, gain):
    """Of the Jacobians at the origin, of each draw."""
    weights = np.asarray(jax.vmap(normal)(KEYS), np.float64)
    return np.abs(np.linalg.eigvals((1 - leak) * np.eye(N) + leak * gain * weights)).max(axis=1)


@pytest.mark.parametrize(("step", "leak"), [(autonomous, 1.0), (leaky, 0.2)])
def test_a_tanh_network_at_rest(step, leak):
    """It stays at the origin, where the exponent is the logarithm of the spectral radius: by the circular law 1 times
    the gain for large N, leaky or not, and at finite N what NumPy says of these matrices."""
    found = bptt.calibrate(
        lambda gain, key: (step, gain * normal(key)),
        jnp.zeros(N), low=0.3, high=3.0, length=600, warmup=200, keys=KEYS,
    )  # fmt: skip
    exact = brentq(lambda gain: np.mean(np.log(radii(leak, gain))), 0.3, 3.0)
    np.testing.assert_allclose(found.value, exact, rtol=0.01)  # a pair of eigenvalues turns the direction
    each = np.log(radii(leak, exact))
    slope = (np.mean(np.log(radii(leak, exact + 0.01))) - np.mean(np.log(radii(leak, exact - 0.01)))) / 0.02
    np.testing.assert_allclose(found.error, np.std(each, ddof=1) / np.sqrt(DRAWS) / slope, rtol=0.2)
    assert abs(found.value - 1) < 0.25


def driven(w, h, x):
    return jnp.tanh(w @ h + x)


def mean_field_gain(variance):
    """The gain g at which q = g^2 E tanh^2(sqrt(q + s^2) z) has g^2 E sech^4(sqrt(q + s^2) z) = 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()

    def chi(gain):
        q = brentq(lambda q: gain**2 * weights @ np.tanh(np.sqrt(q + variance) * nodes) ** 2 - q, 1e-9, gain**2)
        return gain**2 * weights @ np.cosh(np.sqrt(q + variance) * nodes) ** -4.0 - 1

    return brentq(chi, 1.0, 4.0)


def test_the_critical_gain_with_noise_is_that_of_mean_field_theory():
    units, draws, steps, variance = 60, 6, 150, 0.5

    def make(gain, key):
        return driven, gain * jax.random.normal(key, (units, units)) / np.sqrt(units)

    xs = np.sqrt(variance) * jax.random.normal(jax.random.key(1), (draws, steps, units))
    keys = jax.random.split(jax.random.key(2), draws)
    found = bptt.calibrate(make, jnp.zeros(units), xs, last, low=0.5, high=4.0, keys=keys, batched=True)
    expected = mean_field_gain(variance)
    assert expected > 1.3
    # Exponents of finite networks are low by the order of 1 / N: a product of N x N Gaussian matrices by 1 / (2 N).
    assert abs(found.value - expected) < 3 * found.error + 2 * expected / units


def test_the_forget_bias_of_an_lstm_is_that_of_the_carousel():
    """Without other paths the rate is log sigmoid(b)."""
    zeros = jax.nn.initializers.zeros

    def make(bias):
        return bptt.lstm(2, forget_bias=bias, recurrent_init=zeros, input_init=zeros)

    xs = jax.random.normal(jax.random.key(0), (2, 30, 3))
    found = calibrate_cell(make, xs, lambda s: jnp.sum(s.c[-1]), low=-1.0, high=6.0, target=-0.1, batched=True)
    np.testing.assert_allclose(found.value, np.log(np.exp(-0.1) / (1 - np.exp(-0.1))), atol=1e-3)


@pytest.mark.exhaustive
def test_a_leaky_network_needs_what_it_is_told():
    """A gain of 0.5, whose rate of -0.15 by itself would ask for 0.58."""

    def make(gain):
        return bptt.cells.leaky_rnn(32, alpha=0.2, gain=gain)

    xs = jax.random.normal(jax.random.key(3), (8, 80, 8))
    found = calibrate_cell(make, xs, last, low=0.5, high=8.0, batched=True)
    assert 1.5 < found.value < 5
    assert "would be steady" in found.statement

    @jax.jit
    def mean_rate(gain):
        cell = make(gain)

        def rate(key, xs):
            return bptt.gradient_flow(
                cell.step, cell.init(key, 8), cell.initial_state(), xs, last, spectra=False
            ).growth_rate

        return jnp.mean(jax.vmap(rate)(jax.random.split(jax.random.key(0), 8), xs))

    # Where it says, the rate is zero within the error of the rate, of which a tenth is left over.
    rate_error = found.error * found.slope
    assert abs(mean_rate(found.value)) < 0.2 * rate_error
    assert mean_rate(found.value - 4 * found.error) < -2 * rate_error


@pytest.mark.exhaustive
def test_the_advice_of_a_flow_names_what_was_found():
    found = bptt.calibrate(linear, jnp.ones(2), low=0.1, high=30.0, length=10)
    flow = bptt.gradient_flow(scaled, 0.3, jnp.ones(2), None, last, length=10, spectra=False)
    without = flow.advice()
    assert any("recommend_gain" in said for said in without)
    said = flow.advice(calibrated={"factor": found})
    assert f"factor {found.statement}" in said
    assert found.statement.endswith("would be steady")
    assert [s for s in said if "factor" not in s] == [s for s in without if "recommend_gain" not in s]
    assert f"factor {found.statement}" in flow.advice(gated=True, calibrated={"factor": found})
    exploding = bptt.gradient_flow(scaled, 3.0, jnp.ones(2), None, last, length=10, spectra=False)
    assert f"factor {found.statement}" in exploding.advice(calibrated={"factor": found})
    missing = bptt.calibrate(linear, jnp.ones(1), low=0.5, high=9.0, length=60)
    assert any(s.startswith("factor: no value found") for s in flow.advice(calibrated={"factor": missing}))
    with pytest.raises(TypeError, match="calibrated: expected names and what calibrate found"):
        flow.advice(calibrated=found)


def noisy(w, h, x):
    return w * jnp.exp(0.3 * x) * h


@partial(jax.jit, static_argnums=(1, 2))
def _found(keys, draws, steps):
    """Of w exp(0.3 x), x ~ N(0, 1), the exponent is log w."""

    def one(key):
        if draws == 1:
            xs = jax.random.normal(key, (steps,))
            return bptt.calibrate(lambda w: (noisy, w), jnp.zeros(1), xs, low=0.5, high=2.0)
        xs = jax.random.normal(key, (draws, steps))
        return bptt.calibrate(lambda w: (noisy, w), jnp.zeros(1), xs, low=0.5, high=2.0, batched=True)

    found = jax.vmap(one)(keys)
    return found.value, found.error


@pytest.mark.parametrize(
    ("draws", "steps", "repeats"),
    [
        (20, 30, 100),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in [(20, 100, 1000), (1, 2000, 1000)]),
    ],
)
def test_error_bars_cover(draws, steps, repeats):
    value, error = _found(jax.random.split(jax.random.key(9), repeats), draws, steps)
    within = [int(np.sum(np.abs(value - 1) <= k * error)) for k in (1, 2)]
    print(f"{draws} draws of {steps} steps: {within[0]} of {repeats} within one error, {within[1]} within two")
    # Of Student's t with 19 degrees of freedom 0.670 and 0.940.
    for count, share in zip(within, (0.67, 0.94), strict=True):
        assert abs(count - share * repeats) < 3.5 * np.sqrt(repeats * share * (1 - share)) + 0.01 * repeats


@pytest.mark.exhaustive
def test_error_bars_of_random_networks_cover():
    """The truth is the root of many more networks of the same kind."""
    units, steps, draws = 20, 100, 20

    def make(gain, key):
        return driven, gain * jax.random.normal(key, (units, units)) / np.sqrt(units)

    @jax.jit
    def of(key):
        k_xs, k_weights = jax.random.split(key)
        xs = jax.random.normal(k_xs, (draws, steps, units)) / 2
        keys = jax.random.split(k_weights, draws)
        found = bptt.calibrate(make, jnp.zeros(units), xs, low=0.8, high=3.0, keys=keys, batched=True, warmup=20)
        return found.value, found.error

    value, error = map(np.asarray, jax.lax.map(of, jax.random.split(jax.random.key(4), 100)))
    truth = value.mean()
    within = [int(np.sum(np.abs(value - truth) <= k * error)) for k in (1, 2)]
    print(
        f"gain {truth:.3f} +- {value.std() / 10:.3f}: {within[0]} of 100 within one error, {within[1]} within two"
    )
    np.testing.assert_allclose(np.sqrt(np.mean(error**2)), value.std(), rtol=0.3)
    assert within[0] >= 54
    assert within[1] >= 86


def test_ends_on_the_same_side_are_told_with_what_was_measured():
    ends = {"low": 0.1, "high": 0.5, "length": 10}
    with pytest.raises(ValueError, match=r"both sides of the target, 0, got -2\.303 at 0\.1 and -0\.6931 at 0\.5"):
        bptt.calibrate(linear, jnp.ones(2), **ends)
    found = jax.jit(jax.vmap(lambda target: bptt.calibrate(linear, jnp.ones(2), **ends, target=target)))(
        jnp.array([-1.0, 0.0])
    )
    np.testing.assert_allclose(found.value, [np.exp(-1), np.nan], rtol=1e-5)
    assert "1 of 2 values found" in found.statement
    assert "no value found: got -2.303 at 0.1" in jax.tree.map(lambda a: a[1], found).statement


def test_what_is_not_finite_is_told_where():
    found = bptt.calibrate(linear, jnp.ones(1), low=0.5, high=9.0, length=60)
    assert np.isnan(found.value)
    assert "not finite" in found.statement
    assert "at 9" in found.statement
    assert len(found.measured.values) == 2


def test_one_program_whatever_the_values():
    calls = []

    def make(value):
        calls.append(None)
        return linear(value)

    for low, high, target in ((0.5, 2.0, 0.0), (0.2, 30.0, -0.5)):
        bptt.calibrate(make, jnp.ones(2), low=low, high=high, target=target, length=10)
        once = len(calls)
    first = calls.copy()
    bptt.calibrate(make, jnp.ones(2), low=0.3, high=3.0, length=10)
    assert len(calls) == len(first) == once


def test_padding_counts_for_nothing():
    def make(value):
        return driven, value * jnp.asarray([[0.9, 0.3], [-0.2, 1.1]])

    xs = jax.random.normal(jax.random.key(0), (12, 2)) / 4
    mask = jnp.asarray([1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0], bool)
    options = {"low": 0.2, "high": 1.0, "target": -0.6}
    found = bptt.calibrate(
        make, jnp.zeros(2), bptt.Sequence(jnp.where(mask[:, None], xs, jnp.nan), mask=mask), last, **options
    )
    alone = bptt.calibrate(make, jnp.zeros(2), xs[mask], last, **options)
    np.testing.assert_allclose(found.value, alone.value, rtol=1e-4)
    np.testing.assert_allclose(found.error, alone.error, rtol=1e-2)


def test_the_figure_shows_the_curve():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    found = bptt.calibrate(linear, jnp.ones(2), low=0.1, high=30.0, length=10)
    draw_calibration(axes, found)
    assert axes.get_xscale() == "log"
    np.testing.assert_allclose(axes.lines[2].get_xdata(), found.measured.values, rtol=1e-6)
    assert "base64" in found._repr_html_()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 2.0}, r"low: expected a number below high = 2\.0, got 2\.0"),
        ({"keys": jnp.zeros(())}, "keys: expected the draws as the first axis, got a scalar"),
        ({"keys": jnp.zeros((0, 2))}, "keys, xs: expected at least one draw"),
        ({"warmup": 10}, "warmup: expected fewer than the 10 steps, and none below 0, got 10"),
        ({"args": 1.0}, "args, has_aux: expected a loss beside them, got None"),
        ({"loss": last, "warmup": 1}, "warmup: expected 0 with a loss"),
        ({"make": lambda value: scaled}, "make: must return .step, params., got function"),
    ],
)
def test_bad_arguments(options, message):
    good = {"make": linear, "state0": jnp.ones(2), "low": 0.5, "high": 2.0, "length": 10}
    with pytest.raises((TypeError, ValueError), match=message):
        bptt.calibrate(**good | options)


def test_a_rate_that_jumps_past_the_target_is_said_to() -> None:
    def make(value):
        return lambda w, h, x: w * h, jnp.where(value < 0.7, 0.5, 2.0)

    found = bptt.calibrate(make, jnp.ones(1), length=20, low=0.2, high=3.0)
    assert abs(found.value - 0.7) <= 2 * found.error
    assert 1e-7 < found.error < 1e-5
    assert re.fullmatch(
        r"at 0\.(7|69999)\d* \+- \d\S* the rate jumps from -0.693 to 0.693 nats per step", found.statement
    )
