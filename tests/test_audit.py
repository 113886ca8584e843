"""The audit of estimators whose bias, noise and sight are known."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.estimators import Audit, audit, es, rtrl, tbptt

STEPS, KEYS = 13, 12
REAL = jnp.asarray([0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1], bool)
RESETS = jnp.asarray([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0], bool)  # pieces of five steps


def step(params, h, x):
    return jnp.tanh(params["w"] @ h + params["b"] * x["drive"])


def loss(states, args):
    return args["readout"] @ jnp.sum(jnp.square(states), axis=0) + args["shift"] * states[-1, 0]


def exact(step, params, state0, xs, loss, *, key, args, length):
    return bptt.adjoints(step, params, state0, xs, loss, args=args, length=length).params_grad


def noisy(*given, key, **options):
    gradient = exact(*given, key=key, **options)
    return gradient | {"w": gradient["w"] + 0.1 * jax.random.normal(key, gradient["w"].shape, gradient["w"].dtype)}


def batch(count):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((3, 3)) / 2), "b": jnp.asarray(rng.standard_normal(3)), "n": 2}
    xs = {"drive": jnp.asarray(rng.standard_normal((count, STEPS)))}
    sequences = bptt.Sequence(xs, mask=jnp.stack([REAL] * count), resets=jnp.stack([RESETS] * count))
    args = {"readout": jnp.asarray(rng.standard_normal(3)), "shift": jnp.asarray(rng.standard_normal(count))}
    return params, jnp.asarray(rng.standard_normal(3)), sequences, args


@pytest.fixture(scope="module")
def found():
    with jax.enable_x64(True):
        params, state0, xs, args = batch(3)
        return audit(
            {"tbptt": partial(tbptt, k1=1, k2=2), "rtrl": rtrl, "noisy": noisy, "es": es},
            step,
            params,
            state0,
            xs,
            loss,
            args=args,
            in_axes=(None, 0, {"readout": None, "shift": 0}),
            key=jax.random.key(0),
            keys=KEYS,
            lags=(0, 1, 2, 4, 5),
        )


def gradients(estimator=exact, **options):
    """Of the three sequences, as vectors ``[3, P]``."""
    params, state0, xs, args = batch(3)
    given = {"key": None, "length": None} | options
    rows = []
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], xs)
        gradient = estimator(step, params, state0, one, loss, args=args | {"shift": args["shift"][i]}, **given)
        rows.append(np.concatenate([np.ravel(gradient["b"]), np.ravel(gradient["w"])]))
    return np.stack(rows)


def test_by_lag_truncation_is_blind_beyond_its_window(found, x64) -> None:
    """No piece is longer than five steps."""
    nothing = math.nan
    np.testing.assert_allclose(found.lag_shares[0], [1, 1, 0, 0, nothing], atol=1e-12)
    np.testing.assert_allclose(found.lag_shares[1], [1, 1, 1, 1, nothing], rtol=1e-10)
    np.testing.assert_array_equal(found.lag_share_errors[0], [0, 0, 0, 0, nothing])
    for k in (2, 3):
        away = np.abs(np.asarray(found.lag_shares[k]) - 1)[:4] / found.lag_share_errors[k][:4]
        assert np.all(away < 3)
        assert np.all(found.lag_share_errors[k][:4] > 0)


def test_bias_share_and_cosine(found, x64) -> None:
    mean, truncated = gradients().mean(axis=0), gradients(tbptt, k1=1, k2=2).mean(axis=0)
    size = np.linalg.norm(mean)
    np.testing.assert_allclose(found.exact_log_norm, np.log(size), rtol=1e-12)
    np.testing.assert_allclose(found.bias[0], np.linalg.norm(truncated - mean) / size, rtol=1e-10)
    np.testing.assert_allclose(found.share[0], truncated @ mean / size**2, rtol=1e-10)
    np.testing.assert_allclose(found.cosine[0], truncated @ mean / size / np.linalg.norm(truncated), rtol=1e-10)
    np.testing.assert_allclose([found.bias[1], found.share[1], found.cosine[1]], [0, 1, 1], atol=1e-10)
    for of in (found.bias_error, found.share_error, found.cosine_error):
        np.testing.assert_allclose(of[:2], 0, atol=1e-15)
    for k in (2, 3):
        assert abs(found.share[k] - 1) < 3 * found.share_error[k]
        assert found.bias[k] < 2 * found.bias_error[k]


def test_variance_over_keys_and_sequences(found, x64) -> None:
    rows = gradients()
    mean = rows.mean(axis=0)
    over_sequences = np.sum(np.var(rows, axis=0, ddof=1)) / (mean @ mean)
    np.testing.assert_array_equal(found.variance[:2], 0)
    np.testing.assert_allclose(found.exact_variance, over_sequences, rtol=1e-10)
    np.testing.assert_allclose(found.sequence_variance[1], over_sequences, rtol=1e-10)
    # Nine numbers with a standard deviation of 0.1, of which there are as many as keys and sequences.
    expected = 9 * 0.01 / (mean @ mean)
    assert found.variance[2] == pytest.approx(expected, rel=3 * math.sqrt(2 / 9 / 3 / (KEYS - 1)))
    assert found.bias_error[2] == pytest.approx(math.sqrt(expected / 3 / KEYS), rel=0.35)
    assert found.sequence_variance[2] == pytest.approx(
        over_sequences, abs=4 * math.sqrt(expected * over_sequences / KEYS)
    )


def test_it_reads(found) -> None:
    assert repr(found).startswith("Audit: cosine with the exact gradient: rtrl 1.000, ")
    head, _, first, *rest = found.table.splitlines()
    assert head == "| estimator | bias | share | cosine | variance | sees |"
    assert first.startswith("| tbptt | 0.")
    assert first.endswith("| 0 | 1 step |")
    assert [row.split(" | ")[-1] for row in rest] == ["4 steps |"] * 3
    assert found.to_dict()["lag_shares"][0] == [1.0, pytest.approx(1), pytest.approx(0), pytest.approx(0), "nan"]


def test_one_sequence_and_one_key(x64) -> None:
    """Of the last state alone, with the lags that are looked at by default; a blind estimator."""

    def blind(step, params, state0, xs, loss, *, key, args, length):
        return 0 * params

    given = lambda w, h, x: w * h, 0.5, 1.0, None, lambda states: states[-1]
    found = audit({"blind": blind}, *given, length=12, key=jax.random.key(0), keys=1)
    np.testing.assert_array_equal(found.lags, [0, 1, 2, 5, 10])
    np.testing.assert_array_equal(found.lag_shares, 0)
    np.testing.assert_array_equal([found.bias[0], found.share[0], found.variance[0]], [1, 0, math.nan])
    assert math.isnan(found.exact_variance)
    assert found.exact_log_norm == pytest.approx(math.log(12) + 11 * math.log(0.5))
    assert found.table.endswith("| - |")
    assert Audit is type(found)


def test_a_lag_beyond_the_range_of_the_dtype_is_not_judged() -> None:
    """Its part is 10^(6 lag), and single precision holds slopes down to 10^-38."""
    given = lambda b, h, x: 1e6 * h + b, 0.0, 0.0, None, lambda states: states[-1]
    found = audit({"rtrl": rtrl}, *given, length=12, key=jax.random.key(0), keys=1, lags=(0, 6, 7, 11))
    np.testing.assert_allclose(found.lag_shares[0], [1, 1, math.nan, math.nan], rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "slope", "in_range"),
    [
        ("float32", 1e-36, True),
        ("float32", 1e-42, False),
        ("float32", 1e36, True),
        ("float32", 1e42, False),
        ("float16", 2e-6, True),  # below the normal numbers, of which CPUs take none for zero
        ("float16", 2e-9, False),
    ],
)
def test_of_a_gradient_beyond_the_range_of_its_dtype_nothing_is_said_of_the_bias(dtype, slope, in_range) -> None:
    """Of b in ``slope sum_t (b_0 + b_1)``, with a slope of two factors that are both in range."""
    factor = np.sqrt(slope).astype(dtype)
    given = lambda b, h, x: factor * b, jnp.ones(2, dtype), jnp.zeros(2, dtype), None
    found = audit(
        {"rtrl": rtrl}, *given, lambda s: factor * jnp.sum(s), length=3, key=jax.random.key(0), keys=1, lags=(0,)
    )
    log_norm = np.log(3 * np.sqrt(2)) + 2 * np.log(np.float64(factor))
    assert found.exact_log_norm == pytest.approx(log_norm, abs=1e-2)
    assert bool(found.in_range) is in_range
    said, side = repr(found).splitlines()[0], "below" if slope < 1 else "above"
    if in_range:
        assert said == "Audit: cosine with the exact gradient: rtrl 1.000"
        assert found.bias[0] < 0.1
    else:
        words = f"{side} the range of its dtype: nothing is known of bias and cosine"
        assert said == f"Audit: the gradient, log norm {float(found.exact_log_norm):.4g}, is {words}"
    if not in_range and slope < 1:
        np.testing.assert_array_equal([found.bias[0], found.share[0], found.cosine[0]], [1, 0, math.nan])
        assert found.lag_shares[0, 0] == pytest.approx(1, rel=1e-2)


def test_without_a_gradient_nothing_is_said_of_the_bias() -> None:
    given = lambda b, h, x: h + b, 1.0, 0.0, None
    options = {"length": 3, "key": jax.random.key(0), "keys": 1, "lags": ()}
    nothing = audit({"rtrl": rtrl}, *given, lambda states: 0 * states[-1], **options)
    assert not nothing.in_range
    assert "Audit: the gradient is zero or underflows: nothing is known of bias and cosine\n" in repr(nothing)
    infinite = audit({"rtrl": rtrl}, *given, lambda states: states[-1] * jnp.inf, **options)
    assert not infinite.in_range
    assert "Audit: the gradient is not finite: nothing is known of bias and cosine\n" in repr(infinite)


def scaled(by):
    """An estimator of the gradient times what `by` makes of the key."""

    def estimator(*given, key, **options):
        return jax.tree.map(lambda a: a * by(key), exact(*given, key=key, **options))

    return estimator


SCALED = {
    "whole": scaled(lambda key: 1.0),
    "huge": scaled(lambda key: 1e30),
    "tiny": scaled(lambda key: 1e-30),
    "none": scaled(lambda key: 0.0),
    "wild": scaled(lambda key: jnp.inf),
    "lost": scaled(lambda key: jnp.nan),
    "rare": scaled(lambda key: jnp.where(jax.random.uniform(key) < 0.5, 1.0, 0.0)),
}


def linear(b, h, x):
    return 0.5 * h + b + x


@pytest.mark.parametrize("keys", [1, 6])
def test_what_has_no_cosine_says_so_in_words(keys) -> None:
    def total(states):
        return jnp.sum(states[-1])

    given = linear, jnp.ones(2), jnp.zeros(2), jnp.zeros((3, 2))
    found = audit(SCALED, *given, total, key=jax.random.key(1), keys=keys, lags=(0,))
    rare = float(found.share[-1])
    assert 0 < rare < 1 if keys > 1 else rare in (0, 1)
    sparse = {0.0: "undefined (it is zero)", 1.0: "1.000"}.get(rare, "undefined (it is zero for some keys)")
    infinite = "undefined (it is not finite)"
    words = ["1.000", "1.000", "1.000", "undefined (it is zero)", infinite, infinite, sparse]
    lines = [line.strip("| ").split(" | ") for line in found.table.splitlines()[2:]]
    assert [line[3] for line in lines] == words
    assert "nan" not in found.table
    assert ["not finite" in (line[1], line[2]) for line in lines] == [name in ("wild", "lost") for name in SCALED]
    assert [line[4] for line in lines[:4]] == ["-" if keys == 1 else "0"] * 4
    assert "nan" not in repr(found).splitlines()[0]
    assert "whole 1.000, huge 1.000, tiny 1.000" in repr(found).splitlines()[0]


@pytest.mark.parametrize(
    ("slope", "said"),
    [
        (1e-30, "the gradient, log norm -136.7, is below the range of its dtype"),
        (1e30, "the gradient, log norm 139.6, is above the range of its dtype"),
        (0.0, "the gradient is zero or underflows"),
        (math.inf, "the gradient is not finite"),
    ],
)
def test_of_a_gradient_out_of_range_the_table_calls_unknown_what_is(slope, said) -> None:
    """By two factors that are both in range; what rounding has left is no number of the estimators."""

    def slight(states, args):
        return args * jnp.sum(states)

    def steep(b, h, x):
        return b * x

    given = steep, jnp.ones(2), jnp.zeros(2), jnp.full((3, 2), slope)
    found = audit({"rtrl": rtrl}, *given, slight, args=jnp.asarray(slope), key=jax.random.key(0), keys=2, lags=())
    assert found.table.splitlines()[2] == "| rtrl | unknown | unknown | unknown | unknown | - |"
    assert f"Audit: {said}: nothing is known of bias and cosine" == repr(found).splitlines()[0]


def test_a_gradient_lost_beside_its_largest_adjoint_is_not_called_zero() -> None:
    """A number that no parameter moves doubles at every step, and another is what they add up to."""

    def beside(w, h, x):
        return {"grows": 2 * h["grows"], "adds": h["adds"] + w}

    state0 = {"grows": jnp.asarray(0.0), "adds": jnp.asarray(0.0)}
    given = beside, jnp.asarray(0.5), state0, None, lambda states: states["grows"][-1] + states["adds"][-1]
    found = audit({"rtrl": rtrl}, *given, key=jax.random.key(0), keys=1, lags=(0, 1), length=300)
    assert found.exact_log_norm == -math.inf
    np.testing.assert_allclose(found.lag_shares, [[1, 1]], rtol=1e-5)
    words = "the gradient underflows or cancels: nothing is known of bias and cosine"
    assert repr(found).splitlines()[0] == f"Audit: {words}"


GIVEN = {"w": jnp.ones(2)}, jnp.zeros(2), jnp.ones((3, 2)), lambda states: jnp.sum(states)


@pytest.mark.parametrize(
    ("estimator", "options", "error", "message"),
    [
        (rtrl, {"lags": (0, 3)}, ValueError, "lags: expected lags of at least 0 and below 3, got 3"),
        (rtrl, {"lags": 3}, TypeError, "lags: expected a sequence of integers, got int"),
        (rtrl, {"in_axes": (None, 0)}, TypeError, "in_axes: expected a tuple of three"),
        (rtrl, {"keys": 0}, ValueError, "keys: expected at least 1, got 0"),
        (3, {}, TypeError, r"estimators\['a'\]: expected a function estimator\(step, params"),
        (
            lambda *given, **options: 3.0,
            {},
            ValueError,
            r"estimators\['a'\]: must return a gradient like the floating",
        ),
    ],
)
def test_bad_arguments(estimator, options, error, message) -> None:
    with pytest.raises(error, match=message):
        audit({"a": estimator}, lambda p, h, x: p["w"] * h + x, *GIVEN, **{"key": jax.random.key(0)} | options)


def test_an_estimator_that_raises_is_named() -> None:
    with pytest.raises(ValueError, match="k2: expected at least k1") as raised:
        audit({"short": partial(tbptt, k1=2, k2=1)}, lambda p, h, x: p["w"] * h + x, *GIVEN, key=jax.random.key(0))
    assert "raised by estimators['short']" in raised.value.__notes__[0]
    assert "xs, loss, key=, args=, length=)" in raised.value.__notes__[0]
