import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error
from slices import covering

import bptt_jax as bptt
from bptt_jax.analysis.truncation import truncation_bias
from bptt_jax.estimators import rtrl, tbptt

LENGTH = 13


def _setting(cell):
    params = cell.init(jax.random.key(0), 3)
    xs = jax.random.normal(jax.random.key(1), (LENGTH, 3))
    return cell.step, params, cell.initial_state(), xs


def _every_state(states):
    return jnp.sum(jnp.sin(jnp.arange(1, LENGTH + 1)) @ jax.tree.leaves(states)[0] ** 2)


def _vector(tree) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(a, np.float64)) for a in jax.tree.leaves(tree)])


def _by_definition(step, params, state0, xs, loss, k1, k2) -> np.ndarray:
    """Williams and Peng by stop_gradient: every window is re-run from a state that is cut off."""
    states = bptt.unroll(step, params, state0, xs)
    immediate = jax.grad(loss)(states)
    starts = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), state0, states)
    total = 0.0
    ends = sorted({*range(k1, LENGTH + 1, k1), LENGTH})
    for i, end in enumerate(ends):
        begin, fresh_from = max(0, end - k2), ends[i - 1] if i else 0

        def window(p, begin=begin, end=end, fresh_from=fresh_from):
            h = jax.tree.map(lambda a: jax.lax.stop_gradient(a[begin]), starts)
            value = 0.0
            for t in range(begin, end):
                h = step(p, h, xs[t])
                if t >= fresh_from:
                    products = jax.tree.map(lambda d, a, t=t: jnp.vdot(d[t], a), immediate, h)
                    value += sum(jax.tree.leaves(products))
            return value

        total = total + _vector(jax.grad(window)(params))
    return total


CELLS = {"rnn": bptt.rnn(4), "gru": bptt.gru(3), "lstm": bptt.lstm(3)}
WINDOWS = [(1, 1), (1, 4), (5, 5), (3, 7), (4, 4), (20, 20)]


@pytest.mark.parametrize(
    ("k1", "k2", "name"),
    covering(
        ((k1, k2, name) for k1, k2 in WINDOWS for name in ("rnn", "lstm")),
        (1, 4, "rnn"),
        (5, 5, "rnn"),
        (3, 7, "lstm"),
    ),
)
def test_tbptt_is_that_of_williams_and_peng(k1, k2, name) -> None:
    setting = _setting(CELLS[name])
    got = _vector(tbptt(*setting, _every_state, k1=k1, k2=k2))
    want = _by_definition(*setting, _every_state, k1, k2)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", covering(CELLS, "rnn", "lstm"))
def test_full_windows_and_rtrl_equal_full_bptt(name) -> None:
    setting = _setting(CELLS[name])
    full = _vector(bptt.adjoints(*setting, _every_state).params_grad)
    for k1 in (1, 5, LENGTH):
        got = _vector(tbptt(*setting, _every_state, k1=k1, k2=LENGTH))
        np.testing.assert_allclose(got, full, atol=1e-5 * np.abs(full).max())
    got = _vector(rtrl(*setting, _every_state))
    np.testing.assert_allclose(got, full, atol=1e-5 * np.abs(full).max())


def test_rtrl_with_integer_parameters_complex_state_and_no_inputs() -> None:
    def step(p, z, x):
        turn = jax.lax.complex(jnp.cos(p["angle"]), jnp.sin(p["angle"]))
        return p["w"].astype(z.dtype) * z * turn + p["steps"].astype(z.dtype)

    params = {"w": jnp.float32(0.8), "angle": jnp.float32(0.3), "steps": jnp.int32(1)}

    def loss(z):
        return jnp.sum(jnp.abs(z) ** 2) + jnp.sum(z.imag)

    state0 = jnp.ones(2, jnp.complex64)
    got = rtrl(step, params, state0, None, loss, length=6)
    want = bptt.adjoints(step, params, state0, None, loss, length=6).params_grad
    assert got["steps"] is None
    for name in ("w", "angle"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5)


def test_complex_parameters_have_the_gradients_of_jax() -> None:
    """dL/dx - i dL/dy of a + iy, whichever way it is computed."""
    with jax.enable_x64(True):
        xs = jnp.exp(jnp.asarray(np.arange(7)[:, None] * [1j, 2j]))
        setting = lambda a, z, x: a * z + jnp.conj(a) * x, jnp.array([0.4 + 0.5j, 0.7 - 0.2j]), xs[0], xs

        def loss(z):
            return jnp.sum(jnp.abs(z) ** 2) + jnp.sum(z.imag)

        want = jax.grad(lambda a: loss(bptt.unroll(setting[0], a, *setting[2:])))(setting[1])
        np.testing.assert_allclose(rtrl(*setting, loss), want, rtol=1e-12)
        np.testing.assert_allclose(tbptt(*setting, loss, k1=3, k2=7), want, rtol=1e-12)


def test_truncation_bias_is_that_of_every_window() -> None:
    setting = _setting(bptt.gru(3))
    full = _vector(bptt.adjoints(*setting, _every_state).params_grad)
    bias = truncation_bias(*setting, _every_state)
    np.testing.assert_array_equal(bias.windows, np.arange(1, LENGTH + 1))
    for k in (1, 2, 7, LENGTH):
        cut = _vector(tbptt(*setting, _every_state, k1=1, k2=k))
        error = np.linalg.norm(cut - full) / np.linalg.norm(full)
        cosine = cut @ full / np.linalg.norm(cut) / np.linalg.norm(full)
        np.testing.assert_allclose(bias.relative_error[k - 1], error, rtol=1e-3, atol=2e-6)
        np.testing.assert_allclose(bias.cosine[k - 1], cosine, atol=1e-5)
    short = truncation_bias(*setting, _every_state, longest=3)
    np.testing.assert_allclose(short.cosine, bias.cosine[:3], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_truncation_bias_in_half_precision(dtype) -> None:
    """Of so many parameters float16 cannot hold the sum of squares."""
    w = jnp.full((600, 600), 0.5, dtype)
    bias = truncation_bias(lambda w, h, x: 0.5 * h + jnp.mean(w), w, jnp.zeros(1, dtype), None, _last, length=4)
    np.testing.assert_allclose(bias.cosine, 1, rtol=1e-2)
    np.testing.assert_allclose(bias.relative_error, 1 - (2 - 0.5 ** np.arange(4)) / (2 - 0.5**3), atol=2e-2)


def _last(states):
    return states[-1, 0]


def test_influence_balancing() -> None:
    """Tallec and Ollivier's system: truncation has the wrong sign up to 40 steps (published values, float64)."""
    with jax.enable_x64(True):
        a = 0.5 * jnp.eye(23) + 0.5 * jnp.eye(23, k=1)
        sign = jnp.where(jnp.arange(23) < 10, 1.0, -1.0)

        def step(theta, s, x):
            return a @ s + theta * sign

        theta = jnp.float64(1.0)
        fixed = jnp.linalg.solve(jnp.eye(23) - a, theta * sign)
        published = {1: 1, 10: 10, 20: 16.476, 30: 9.870, 40: 0.566, 41: -0.219, 50: -4.753, 2000: -6}
        for window, value in published.items():
            got = tbptt(step, theta, fixed, None, lambda s: s[-1, 0], k1=1, k2=window, length=2000)
            assert float(got) == pytest.approx(value, abs=6e-4)
        assert float(rtrl(step, theta, fixed, None, lambda s: s[-1, 0], length=2000)) == pytest.approx(-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k1": 0, "k2": 3}, ValueError, "k1: expected at least 1, got 0"),
        ({"k1": 4, "k2": 3}, ValueError, "k2: expected at least k1 = 4, or losses are dropped, got 3"),
        ({"k1": 2.0, "k2": 3}, TypeError, "k1: expected an integer"),
    ],
)
def test_bad_windows(options, error, message) -> None:
    with pytest.raises(error, match=message):
        tbptt(*_setting(bptt.rnn(4)), _every_state, **options)
    with pytest.raises(ValueError, match="longest: expected at least 1"):
        truncation_bias(*_setting(bptt.rnn(4)), _every_state, longest=0)


REAL = np.asarray([0, 1, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0], bool)
RESETS = np.asarray([1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1], bool)  # the first two before steps 1 and 5
PIECES = [[1, 2, 3], [5, 8, 9], [10, 11, 12]]
OWNERS = np.asarray([-1, 1, 2, 3, 3, 5, 5, 5, 8, 9, 10, 11, 12, 12])  # the real step whose state stands there


@jax.custom_vjp
def spike(v):
    return (v > 0).astype(v.dtype)


spike.defvjp(lambda v: (spike(v), v), lambda v, g: (g / (1 + 10 * jnp.abs(v)) ** 2,))


def noisy_step(p, state, x):
    key, now = jax.random.split(state["key"])
    noise = jax.random.bits(now, x.shape, jnp.uint16).astype(x.dtype) / 2**16
    h = jnp.tanh(p["w"] @ state["h"] + p["b"] * x + noise)
    return {"h": h.at[state["t"] % 3].multiply(0.5), "t": state["t"] + p["stride"], "key": key}


def cond_step(p, state, x):
    h = jax.lax.cond(x[0] > 0, lambda h: jnp.tanh(p["w"] @ h + x), lambda h: 0.9 * h + p["b"], state["h"])
    return state | {"h": h}


def spiking_step(p, state, x):
    return state | {"h": 0.5 * state["h"] + spike(p["w"] @ state["h"] + p["b"] * x)}


def _problem(step):
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.standard_normal((3, 3))),
        "b": jnp.asarray(rng.standard_normal(3)),
        "stride": jnp.asarray(2),
    }
    state0, reset_state = (
        {"h": jnp.asarray(rng.standard_normal(3)), "t": jnp.asarray(k), "key": jax.random.key(k)} for k in (0, 1)
    )
    return step, params, state0, reset_state, jnp.asarray(rng.standard_normal((len(REAL), 3)))


def _weighted(states, args):
    return args["weights"] @ jnp.sum(jnp.sin(args["scale"] * states["h"]), axis=1)


@pytest.mark.parametrize("step", covering([noisy_step, cond_step, spiking_step]))
def test_padding_and_resets_are_the_pieces_alone(step, x64) -> None:
    """The loss reads states in padding too: where alone the state is read that is held there."""
    step, params, state0, reset_state, xs = _problem(step)
    weights = np.random.default_rng(1).standard_normal(len(REAL))
    real, resets = jnp.asarray(REAL), jnp.asarray(RESETS)
    spoilt = jnp.where(real[:, None], xs, jnp.nan)
    sequence = bptt.Sequence(spoilt, mask=real, resets=resets, reset_state=reset_state)
    scale = jnp.asarray(1.3)

    @jax.jit
    def of(state0, xs, weights):
        given = step, params, state0, xs, _weighted
        args = {"weights": weights, "scale": scale}
        gradients = [tbptt(*given, k1=k1, k2=k2, args=args) for k1, k2 in ((1, 1), (2, 2), (2, 3), (9, 9))]

        def loss(moving):
            return _weighted(bptt.unroll(step, params | moving, state0, xs), args)

        exact = jax.grad(loss)({name: params[name] for name in "wb"})
        return [*gradients, rtrl(*given, args=args)], exact

    got, exact = of(state0, sequence, jnp.asarray(weights))
    alone = []
    for piece in PIECES:
        folded = [np.sum(weights[np.equal(OWNERS, k)]) for k in piece]
        alone.append(of(reset_state, xs[np.asarray(piece)], jnp.asarray(folded))[0])
    for k, gradient in enumerate(got):
        assert gradient["stride"] is None
        expected = sum(_vector(pieces[k]) for pieces in alone)
        np.testing.assert_allclose(_vector(gradient), expected, rtol=1e-11, atol=1e-12)
    for gradient in got[3:]:  # of windows longer than any piece, and forward in time
        np.testing.assert_allclose(_vector(gradient), _vector(exact), rtol=1e-11, atol=1e-12)
    assert relative_error(got[0], got[1]) > 1e-3
    assert relative_error(got[1], got[2]) > 1e-3

    bias = truncation_bias(
        step, params, state0, sequence, _weighted, longest=4, args={"weights": jnp.asarray(weights), "scale": scale}
    )
    full = _vector(exact)
    cut = _vector(got[0])
    np.testing.assert_allclose(bias.relative_error[0], np.linalg.norm(cut - full) / np.linalg.norm(full), rtol=1e-9)
    cosine = cut @ full / np.linalg.norm(cut) / np.linalg.norm(full)
    np.testing.assert_allclose(bias.cosine[0], cosine, rtol=1e-9)
    np.testing.assert_allclose(bias.relative_error[2:], 0, atol=1e-12)


def test_windows_in_padding_by_hand() -> None:
    """w h + x of ones, loss on the last state, which is held in padding: d h_3 / d w with its lags cut."""
    w, xs = 0.6, bptt.Sequence(jnp.ones((5, 1)), mask=jnp.asarray([True, False, True, True, False]))
    h = [0, 1, 1 + w]  # before each step
    expected = [h[2], h[2] + w * h[1], h[2] + w * h[1] + w**2 * h[0]]
    for window, value in enumerate(expected, 1):
        got = tbptt(lambda w, h, x: w * h + x, w, jnp.zeros(1), xs, lambda s: s[-1, 0], k1=1, k2=window)
        np.testing.assert_allclose(got, value, rtol=1e-6)


def test_rtrl_is_finite_where_states_that_nothing_reads_overflow() -> None:
    def step(w, h, x):
        return w * h * h

    given = step, jnp.float32(3.0), jnp.float32(2.0), None, lambda states: states[2]
    assert np.isinf(bptt.unroll(*given[:4], length=9)[-1])
    got = rtrl(*given, length=9)
    np.testing.assert_allclose(got, jax.grad(lambda w: step(w, step(w, step(w, 2.0, 0), 0), 0))(3.0), rtol=1e-6)


def test_a_loop_of_unknown_length_goes_forward() -> None:
    def step(w, h, x):
        return jax.lax.while_loop(lambda c: c[0] < x, lambda c: (c[0] + 1, jnp.tanh(w @ c[1])), (0, h))[1]

    weights = jnp.asarray([[0.9, -0.4], [0.3, 0.8]])
    given = step, weights, jnp.asarray([0.3, -0.2]), jnp.asarray([1, 2, 3]), lambda states: jnp.sum(states**2)
    exact = jax.jacfwd(lambda w: jnp.sum(bptt.unroll(step, w, *given[2:4]) ** 2))(weights)
    np.testing.assert_allclose(rtrl(*given), exact, rtol=1e-5)
    with pytest.raises(TypeError, match="step: truncation needs its backward pass, and it has none"):
        tbptt(*given, k1=1, k2=2)
    with pytest.raises(TypeError, match="needs its backward pass, and it has none"):
        truncation_bias(*given)


def test_rtrl_forgets_at_a_reset() -> None:
    sequence = bptt.Sequence(jnp.ones(3), resets=jnp.arange(3) == 2, reset_state=jnp.asarray(0.5))
    got = rtrl(lambda w, h, x: w * h + x, 0.8, jnp.asarray(2.0), sequence, lambda states: states[-1])
    np.testing.assert_allclose(got, 0.5, rtol=1e-6)


def test_rtrl_of_a_step_that_goes_backwards_alone(x64) -> None:
    step, params, state0, _, xs = _problem(spiking_step)
    given = step, params, state0, xs, lambda states: jnp.sum(jnp.sin(states["h"]))
    got, exact = rtrl(*given), bptt.adjoints(*given).params_grad
    np.testing.assert_allclose(_vector(got), _vector(exact), rtol=1e-11)


def test_without_parameters_there_is_no_gradient() -> None:
    given = lambda p, h, x: x * h, None, jnp.ones(2), jnp.ones((3, 2)), jnp.sum
    assert rtrl(*given) is None
    assert tbptt(*given, k1=1, k2=2) is None
