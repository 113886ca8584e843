"""Signal and noise by lag, against closed forms, NumPy, and many batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slices import covering

import bptt_jax as bptt
from bptt_jax.analysis.lags import gradient_by_lag
from bptt_jax.analysis.noise import gradient_noise

STEPS = 6


def driven(b, h, x):
    """Read at the end, the part of lag k is ``a^k x_{T-1-k}``, whatever b is."""
    return 0.8 * h + b * x


def last(states):
    return states[-1]


def parts_of(xs):
    return 0.8 ** np.arange(xs.shape[1]) * np.asarray(xs, np.float64)[:, ::-1]


def by_definition(parts, batch):
    """Of parts ``[S, K]``, or ``[S, K, P]``."""
    parts = parts.reshape(*parts.shape[:2], -1)
    variance = parts.var(axis=0, ddof=1).sum(axis=-1)
    signal = np.square(parts.mean(axis=0)).sum(axis=-1) - variance / len(parts)
    return signal / (variance / batch)


def test_against_numpy(x64) -> None:
    xs = 1 + np.random.default_rng(0).standard_normal((9, STEPS))
    found = gradient_noise(driven, 0.5, 0.0, jnp.asarray(xs), last, batch=4)
    parts = parts_of(xs)
    np.testing.assert_allclose(found.signal_to_noise, by_definition(parts, 4), rtol=1e-11)
    np.testing.assert_allclose(found.log_norms, np.log(np.abs(parts.mean(axis=0))), rtol=1e-11)
    np.testing.assert_allclose(found.log_spreads, np.log(parts.std(axis=0, ddof=1)), rtol=1e-11)
    np.testing.assert_allclose(found.whole, by_definition(parts.sum(axis=1)[:, None], 4)[0], rtol=1e-11)
    without = np.stack([by_definition(np.delete(parts, i, axis=0), 4) for i in range(9)])
    errors = np.sqrt(8 / 9 * np.square(without - without.mean(axis=0)).sum(axis=0))
    np.testing.assert_allclose(found.errors, errors, rtol=1e-9)
    needed = np.where(found.signal_to_noise > 0, 4 / by_definition(parts, 4), np.inf)
    np.testing.assert_allclose(found.batch_needed, needed, rtol=1e-11)
    short = gradient_noise(driven, 0.5, 0.0, jnp.asarray(xs), last, longest=2)
    np.testing.assert_allclose(short.signal_to_noise, by_definition(parts, 9)[:2], rtol=1e-11)
    np.testing.assert_allclose(short.whole, found.whole * 9 / 4, rtol=1e-11)


@pytest.mark.parametrize("batch", covering([1, 30], 30))
def test_against_what_is_known(batch, x64) -> None:
    """Inputs of means 0.5^k, k steps before the end, and of variance 1: the ratio is ``B 0.25^k``, the batch at which
    signal and noise are alike 4^k."""
    mean = 0.5 ** np.arange(STEPS)[::-1]
    xs = jnp.asarray(mean + np.random.default_rng(1).standard_normal((40_000, STEPS)))
    found = gradient_noise(driven, 0.5, 0.0, xs, last, batch=batch)
    power = 0.25 ** np.arange(STEPS)
    assert np.all(np.abs(found.signal_to_noise - batch * power) < 4 * found.errors)
    np.testing.assert_allclose(found.errors, batch * np.sqrt((4 * power + 2 * power**2) / 40_000), rtol=0.1)
    np.testing.assert_allclose(found.batch_needed[:4], 4.0 ** np.arange(4), rtol=0.2)
    # 30 / 4^2 is above 1, 30 / 4^3 below.
    assert float(found.horizon) == {1: 0 if found.signal_to_noise[0] < 1 else 1, 30: 3}[batch]


def test_against_many_batches(x64) -> None:
    """The variance of the batch's gradient from batch to batch is its noise."""
    cell, batch, batches = bptt.rnn(3), 8, 250
    params, state0 = cell.init(jax.random.key(0), 2), cell.initial_state()
    xs = 0.5 + jax.random.normal(jax.random.key(1), (batch * batches, STEPS, 2))

    def loss(states, target):
        return jnp.square(states[-1, 0] - target)

    targets = jnp.tanh(jnp.sum(xs, axis=(1, 2)))
    found = gradient_noise(cell.step, params, state0, xs, loss, args=targets, batch=batch)

    @jax.jit
    @jax.vmap
    def parts(x, target):
        by_lag = gradient_by_lag(cell.step, params, state0, x, loss, args=target, parts=range(STEPS))
        return jnp.concatenate([a.reshape(STEPS, -1) for a in jax.tree.leaves(by_lag.parts.value)], axis=1)

    means = np.asarray(parts(xs, targets)).reshape(batches, batch, STEPS, -1).mean(axis=1)
    noise = means.var(axis=0, ddof=1).sum(axis=-1)
    signal = np.square(means.mean(axis=0)).sum(axis=-1) - noise / batches
    # A variance of 250 batches is known to some 9 %, of a few directions together a little better.
    np.testing.assert_allclose(found.signal_to_noise, signal / noise, rtol=0.25)
    assert np.all(np.diff(found.signal_to_noise) < 0)


@pytest.mark.parametrize("dtype", covering(["float16", "bfloat16"], "bfloat16"))
def test_half_precision(dtype) -> None:
    xs = (1 + np.random.default_rng(0).standard_normal((50, STEPS))).astype(np.float32)
    found = gradient_noise(driven, jnp.asarray(0.5, dtype), jnp.zeros((), dtype), jnp.asarray(xs, dtype), last)
    assert found.signal_to_noise.dtype == jnp.float32
    np.testing.assert_allclose(found.signal_to_noise, by_definition(parts_of(xs), 50), rtol=0.05)


def test_far_below_the_range_of_the_dtype() -> None:
    """The ratio is that of the inputs at every lag, where parts are of 1e-60 too; so is a large one at no noise."""
    xs = jnp.asarray(np.outer([1, 2, 3], np.ones(400)), jnp.float32)
    found = gradient_noise(lambda b, h, x: 0.7 * h + b * x, 0.5, 0.0, xs, last)
    np.testing.assert_allclose(found.signal_to_noise, 3 * (4 - 1 / 3), rtol=1e-4)
    np.testing.assert_allclose(found.log_norms, np.log(2) + np.arange(400) * np.log(0.7), rtol=1e-5)
    assert float(found.horizon) == np.inf
    assert "up to a lag of 399" in repr(found)


def test_where_the_batch_is(x64) -> None:
    """States of their own, one target for all, inputs with the batch behind, padding."""
    rng = np.random.default_rng(0)
    xs, starts = rng.standard_normal((STEPS, 5)), rng.standard_normal(5)
    mask = np.arange(STEPS)[:, None] < np.asarray([6, 4, 5, 6, 3])

    def loss(states, target):
        return jnp.square(states[-1] - target)

    found = gradient_noise(
        driven,
        0.5,
        jnp.asarray(starts),
        bptt.Sequence(jnp.asarray(xs), mask=jnp.asarray(mask)),
        loss,
        args=jnp.asarray(0.3),
        in_axes=(0, 1, None),
    )
    parts = np.zeros((5, STEPS))
    for i, h in enumerate(starts):
        for x in xs[mask[:, i], i]:
            h = 0.8 * h + 0.5 * x
        length = mask[:, i].sum()
        parts[i, :length] = 2 * (h - 0.3) * 0.8 ** np.arange(length) * xs[:length, i][::-1]
    np.testing.assert_allclose(found.signal_to_noise, by_definition(parts, 5), rtol=1e-10)
    alone = gradient_noise(
        lambda b, h, x: b * h, 0.5, jnp.asarray(starts), None, last, in_axes=(0, None, 0), length=3
    )
    np.testing.assert_allclose(alone.signal_to_noise, by_definition(np.outer(starts, np.ones(3)), 5), rtol=1e-10)


def test_no_noise_no_signal_and_a_late_one() -> None:
    xs = jnp.ones((3, STEPS))
    same = gradient_noise(driven, 0.5, 0.0, xs, lambda states: states[2])
    assert np.all(same.signal_to_noise[:3] > 1e6)  # inf but for roundings
    assert np.all(np.isnan(same.signal_to_noise[3:]))
    assert float(same.horizon) == 3
    assert "tells parts up to a lag of 2 from noise, and nothing comes from a lag of 3" in repr(same)
    nothing = gradient_noise(driven, 0.5, 0.0, xs, lambda states: 0 * states[2])
    assert float(nothing.horizon) == 0
    assert f"nothing of the gradient comes from a lag of up to {STEPS - 1}" in repr(nothing)
    opposed = gradient_noise(driven, 0.5, 0.0, xs[:2] * jnp.asarray([[1.0], [-1.0]]), last)
    assert "tells no part from noise" in repr(opposed)

    def delayed(b, h, x):
        return jnp.stack([b * x, h[0]])

    late = gradient_noise(delayed, 0.5, jnp.zeros(2), xs, lambda states: states[-1, 1], longest=4)
    np.testing.assert_array_equal(np.isnan(late.signal_to_noise), [True, False, True, True])
    assert float(late.horizon) == 2
    two = gradient_noise(driven, 0.5, 0.0, xs[:2] * jnp.asarray([[1.0], [-2.0]]), last)
    assert np.all(np.isnan(two.errors))
    np.testing.assert_allclose(two.signal_to_noise, 2 * (0.25 / 4.5 - 0.5), rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_sequence_that_is_not_finite(bad) -> None:
    xs = jnp.ones((3, STEPS)).at[1, 4].set(bad)
    found = gradient_noise(driven, 0.5, 0.0, xs, last)
    assert not np.isfinite(found.log_norms[1])
    assert np.isnan(found.horizon)
    assert "of the 3 sequences' gradients not all are finite" in repr(found)
    np.testing.assert_array_equal(np.isnan(found.batch_needed), np.isnan(found.signal_to_noise))
    assert np.isnan(found.batch_needed[1])
    assert np.isnan(found.noise_scale)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"xs": jnp.ones((1, 3))},
            ValueError,
            "batch: expected at least 2 sequences, whose gradients differ, got 1",
        ),
        ({"batch": 0}, ValueError, "batch: expected at least 1"),
        ({"longest": 0}, ValueError, "longest: expected at least 1"),
        ({"in_axes": (0, 0, 0)}, ValueError, "state0: expected the batch as axis 0"),
        ({"in_axes": 0}, TypeError, "in_axes: expected a tuple of three"),
        ({"args": jnp.ones(4)}, ValueError, "batch: expected one number of sequences"),
        ({"xs": jnp.ones(2)}, ValueError, "xs: expected time as the first axis"),
    ],
)
def test_bad_batches(given, error, message) -> None:
    arguments = {"step": driven, "params": 0.5, "state0": 0.0, "xs": jnp.ones((3, 4)), "loss": last} | given
    with pytest.raises(error, match=message):
        gradient_noise(**arguments)
