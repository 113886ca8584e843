"""What is said of a backward pass in the dtype of the states, against `jax.grad` in that dtype, entry by entry."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracles import users_jit
from slices import covering

import bptt_jax as bptt
from bptt_jax.analysis.float_range import float_range
from bptt_jax.linalg.logscale import LogScaled

STEPS = 80
DTYPES = ("float16", "bfloat16", "float32")


def problem(dtype):
    """``h = w h + z`` of two units; dL/dz_t is dL/dh_t. The loss reads the last state, units by `weights`."""

    def step(w, h, z):
        return w * h + z

    def loss(states, weights):
        return jnp.sum(weights * states[-1])

    @users_jit
    def plain(w, weights):
        """What a user's own backward pass gives: dL/dh_T, dL/dh_{T-1}, ... and dL/dw."""

        def total(w, zs):
            states = jax.lax.scan(lambda h, z: 2 * (step(w, h, z),), jnp.zeros(2, w.dtype), zs)[1]
            return loss(states, weights)

        to_w, to_zs = jax.grad(total, (0, 1))(w, jnp.zeros((STEPS, 2), w.dtype))
        return to_w, to_zs[::-1]

    @users_jit
    def measured(w, weights):
        zs = jnp.zeros((STEPS, 2), w.dtype)
        return bptt.gradient_flow(step, w, jnp.zeros(2, w.dtype), zs, loss, args=weights, spectra=False)

    def both(w, weights):
        given = jnp.full(2, w, dtype), jnp.asarray(weights, dtype)
        lags = np.arange(STEPS)[:, None]
        truth = np.asarray(given[1], np.float64) * np.asarray(given[0], np.float64) ** lags
        to_w, to_h = (np.asarray(a, np.float64) for a in plain(*given))
        return measured(*given), truth, to_h, to_w

    return both


@pytest.fixture(scope="module", params=DTYPES)
def both(request):
    return jnp.dtype(request.param), problem(jnp.dtype(request.param))


def smallest(dtype):
    return float(ml_dtypes.finfo(dtype).smallest_normal) * 2.0 ** -ml_dtypes.finfo(dtype).nmant


def given(dtype, size):
    """Of what is given, in smallest numbers: on CPUs all below the normal ones is zero but for float16."""
    info = ml_dtypes.finfo(dtype)
    lowest = 1.0 if dtype == np.float16 else 2.0 ** (info.nmant + 1)  # twice the smallest normal one
    return np.clip(size, lowest, float(info.max) / smallest(dtype) / 4)


@pytest.mark.parametrize(
    ("w", "size"), covering([(0.9, 40.0), (0.9, 2.0**12), (0.5, 1.3 * 2.0**20), (0.9, 2.0**50)], (0.9, 2.0**12))
)
def test_where_digits_are_lost_and_where_all_is(both, w, size):
    """`size`: of the loss's derivative, in smallest numbers of the dtype; one unit of two is better off."""
    dtype, measure = both
    info, unit = ml_dtypes.finfo(dtype), smallest(dtype)
    flow, truth, plain, _ = measure(w, unit * given(dtype, size * np.asarray([1.0, 0.25])))
    numerics, largest = flow.numerics, np.max(truth, axis=1) / unit
    flushed = float(users_jit(lambda a: a / 2)(jnp.asarray(info.smallest_normal, dtype))) == 0
    least = 2.0**info.nmant if flushed else 1.0
    coarse = least if flushed else 2.0 ** ((1 + info.nmant) // 2)
    for lag, level in ((numerics.coarse_lag, coarse), (numerics.lost_lag, least / 2)):
        below = np.flatnonzero(largest < level)
        assert int(lag) == (below[0] if len(below) else -1)
    if numerics.lost_lag >= 0:
        # Zero, or what rounding left over: every entry is wrong by 100 % or more.
        wrong = np.abs(plain / truth - 1)[int(numerics.lost_lag) :]
        assert np.all(wrong >= 1 - 1e-6)
    if numerics.coarse_lag >= 0:
        at = np.abs(plain / unit)[int(numerics.coarse_lag) :]
        assert np.all(at == np.round(at))
        assert np.max(at) <= coarse
    assert numerics.in_range
    assert numerics.dtype == dtype.name
    assert flow.numerics.finite


@pytest.mark.parametrize("w", [0.9, 1.2])
def test_the_loss_scale_keeps_what_is_left_of_the_signal(both, w):
    """With it a plain backward pass is right to the digits of its dtype, as far as a thousandth of the signal."""
    dtype, measure = both
    info = ml_dtypes.finfo(dtype)
    weights = (20 * smallest(dtype) if w < 1 else float(info.max) / 8) * np.asarray([1.0, 0.5])
    weights = given(dtype, weights / smallest(dtype)) * smallest(dtype)
    flow, truth, plain, to_w = measure(w, weights)
    scale = int(flow.numerics.loss_scale_log2)
    if w > 1:
        over = int(np.argmax(np.max(truth, axis=1) > float(info.max)))
        assert flow.numerics.overflow_lag == over
        assert np.isfinite(plain[:over]).all()
        assert not np.isfinite(plain[over]).all()
        assert not np.isfinite(to_w).all()
        assert not flow.numerics.in_range
        assert flow.numerics.finite
        assert scale < 0
        assert f"{dtype.name} overflows at lag {over}" in flow.statement
    else:
        assert flow.numerics.overflow_lag == -1
        assert scale > 0
        start = 0 if dtype == np.float16 else 7  # 2^-1 = 0.9^6.6
        assert f"{dtype.name} has lost half of the signal's digits from lag {start} on" in flow.statement
    assert f"2^{scale}" in " | ".join(flow.advice())
    scaled, truth, plain, to_w = measure(w, np.ldexp(weights, scale))
    assert scaled.numerics.in_range
    assert np.isfinite(to_w).all()
    kept = truth > np.max(truth) * 1e-3
    error = np.abs(plain / truth - 1)[kept]
    assert np.max(error) < STEPS * 2.0**-info.nmant
    # Half of it would not be enough, or twice of it too much.
    worse, *_ = measure(w, np.ldexp(weights, scale - 1 if w < 1 else scale + 1))
    if w < 1:
        assert worse.numerics.loss_scale_log2 == 1
        assert scaled.numerics.loss_scale_log2 == 0
    else:
        assert not worse.numerics.in_range


@jax.jit
def of_sizes(log2_sizes, lags):
    """Of a state of a half, a complex and a single precision leaf with entries of these sizes, ``[T, 3]``."""
    scales = log2_sizes[:, 0]
    rest = jnp.exp2((log2_sizes - scales[:, None]).astype(jnp.float32))
    mantissa = (
        rest[:, :1].astype(jnp.float16),
        jax.lax.complex(jnp.zeros_like(rest[:, 1:2]), rest[:, 1:2]),
        rest[:, 2:],
    )
    return float_range(LogScaled(mantissa, scales), jnp.int32(0), [], lags, jnp.float32(1e-3))


def test_what_is_lost_is_lost_in_all_leaves_and_for_good():
    lags = jnp.arange(6, 0, -1)
    lost, sound = [-30, -160, -160], [0, 0, 0]  # of float16 2^-25 is nothing any more, of float32 2^-150

    def from_lag(*rows):
        return int(of_sizes(jnp.asarray(rows[::-1], jnp.int32), lags).lost_lag)

    assert from_lag(sound, sound, lost, lost, lost, lost) == 2
    assert from_lag(sound, sound, lost, lost, lost, sound) == -1
    assert from_lag(sound, lost, sound, lost, lost, lost) == 3
    assert from_lag(*[lost] * 6) == 0
    for k, kept in enumerate(lost):
        entry = [*lost[:k], kept + 40, *lost[k + 1 :]]
        assert from_lag(sound, entry, lost, lost, lost, lost) == 2, k
    over = of_sizes(jnp.asarray([[17, 0, 0], *[sound] * 5], jnp.int32), lags)
    assert (over.overflow_lag, over.loss_scale_log2) == (5, -2)  # float16 ends just below 2^16
    assert not over.in_range
    # Beyond where the signal begins, and in padding, there are no lags.
    outside = of_sizes(jnp.asarray([lost, lost, *[sound] * 4], jnp.int32), jnp.asarray([0, 0, 4, 3, 2, 1]))
    assert outside.lost_lag == -1


@pytest.mark.parametrize(("exponent", "in_range", "scale"), [(16, True, 0), (17, False, -1), (1040, False, -1024)])
def test_a_gradient_of_the_parameters_that_leaves_its_dtype(exponent, in_range, scale):
    """Adjoints of 1 are in range, and 3/4 of 2^16 is the last power of two that float16 holds as much of."""
    adjoints = LogScaled(jnp.ones((2, 1), jnp.float16), jnp.zeros(2, jnp.int32))
    lags, threshold = jnp.asarray([2, 1]), jnp.float32(1e-3)
    found = jax.jit(lambda e: float_range(adjoints, e, [jnp.dtype(jnp.float16)], lags, threshold))(exponent)
    assert bool(found.in_range) == in_range
    assert found.loss_scale_log2 == scale
    assert (found.overflow_lag, found.coarse_lag, found.lost_lag) == (-1, -1, -1)


@pytest.mark.parametrize("steps", [20, 1000, 4096])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_out_of_range_at_any_length(steps, bad):
    mantissa = jnp.full((steps, 3), 0.75).at[steps // 3, 1].set(bad)
    lags = jnp.arange(steps, 0, -1)
    found = float_range(LogScaled(mantissa, jnp.zeros(steps, jnp.int32)), jnp.int32(0), [], lags, jnp.float32(1e-3))
    assert not found.in_range
    assert found.loss_scale_log2 == 0
