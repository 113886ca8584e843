"""The parallel evaluation against the sequential one; what it says where it does not arrive."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import EXAMPLES, cell_example, linear_step, losses, relative_error, weighted_loss
from slices import covering

import bptt_jax as bptt
from bptt_jax.parallel import factors, newton
from bptt_jax.step import bind, check_step, units

deer = jax.jit(bptt.deer, static_argnames=("step", "length", "jacobian", "damping", "max_iterations", "window"))
VARIANTS = {"full": {}, "diagonal": {"jacobian": "diagonal"}, "scaled": {"damping": "scale"}}
FORMS = VARIANTS | {
    "blocks": {"jacobian": "blocks", "damping": "kalman"},
    "windows": {"window": 4, "damping": "kalman"},
}


def random_network(gain: float, size: int = 30, steps: int = 200):
    """``s' = W tanh(s)`` from a uniform start, and a uniform guess (Gonzalez et al. 2025, arXiv:2508.16817)."""
    rng = np.random.default_rng(10)
    weights = gain * rng.standard_normal((size, size)) / math.sqrt(size)
    state0, guess = rng.uniform(-1, 1, (2, size))
    return network_step, *map(jnp.asarray, (weights, state0, np.tile(guess, (steps, 1))))


def network_step(w, s, x):
    return w @ jnp.tanh(s)


@pytest.mark.parametrize("variant", FORMS)
@pytest.mark.parametrize("name", covering(EXAMPLES, "lstm", "tokens"))
def test_equals_the_sequential_evaluation(x64, name, variant) -> None:
    e = EXAMPLES[name](jnp.float64)
    found = deer(*e[:4], length=e.length, **FORMS[variant])
    assert found.converged
    assert relative_error(found.states, bptt.unroll(*e[:4], length=e.length)) < 1e-13
    assert float(found.residual) <= 100 * np.finfo(np.float64).eps
    made = np.isfinite(found.residuals)
    assert int(made.sum()) == int(found.iterations)
    assert made[: int(found.iterations)].all()


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_long_sequences_in_a_few_iterations(x64, name) -> None:
    cell = getattr(bptt.cells, name)(12)
    params, xs = cell.init(jax.random.key(0), 2), jax.random.normal(jax.random.key(1), (3000, 2))
    arguments = (cell.step, jax.tree.map(lambda a: 0.7 * a, params), cell.initial_state(), xs)
    found = deer(*arguments)
    assert found.converged
    assert int(found.iterations) <= 10
    assert relative_error(found.states, bptt.unroll(*arguments)) < 1e-12
    # Newton's: the number of right digits doubles, where it is not yet at the end of them.
    rms = np.asarray(found.residuals)[: int(found.iterations)]
    middle = np.flatnonzero((rms[:-1] < 1e-2) & (rms[1:] > 1e-14))
    assert (rms[middle + 1] < 10 * rms[middle] ** 1.5).all()


def test_a_linear_recurrence_takes_one_iteration(x64) -> None:
    a = 0.9 * jnp.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0])
    xs = jax.random.normal(jax.random.key(0), (500, 4))
    for given in (xs, bptt.Sequence(xs, resets=jnp.arange(500) % 200 == 100)):
        found = deer(linear_step, a, jnp.ones(4), given)
        assert found.converged
        # A second one, if the roundings fall so, has no more than those to mend.
        assert float(found.residuals[0]) < 1e-15
        assert int(found.iterations) <= 2
        assert relative_error(found.states, bptt.unroll(linear_step, a, jnp.ones(4), given)) < 1e-13


def test_every_iteration_makes_one_more_state_exact(x64) -> None:
    """Whatever the Jacobians: here of 1e6, whose products leave the range of float64 after 51 steps."""

    def step(p, h, x):
        return jnp.sin(p * h)

    state0, guess = jnp.asarray([0.3, -0.2]), 0.1 * jnp.ones((200, 2))
    for options in VARIANTS.values():
        for most in (150, 201):
            found = deer(step, 1e6, state0, length=200, guess=guess, max_iterations=most, **options)
            assert not found.converged
            assert (float(found.residual) <= 100 * np.finfo(np.float64).eps) == (most > 200)


def test_stopped_before_the_end_it_has_not_converged(x64) -> None:
    """Even where what is left would do little harm: here it shrinks a hundredfold at every iteration."""
    a = jnp.asarray([[0.5, 0.005], [0.005, 0.5]])
    left = set()
    for most in (8, 14, 15, 17):
        found = deer(linear_step, a, jnp.ones(2), length=60, jacobian="diagonal", max_iterations=most)
        holds = float(found.residual) <= 100 * np.finfo(np.float64).eps
        assert bool(found.converged) == holds == bool(np.isfinite(found.error))
        assert np.isnan(found.states).all() != holds
        left.add("none" if holds else "little" if found.residual < 1e-9 else "much")
    assert left == {"none", "little", "much"}


def test_gain_decides(x64) -> None:
    """3 to 4 iterations below a gain of 1, many where the exponent is positive: Gonzalez et al. 2025."""

    def iterations(gain: float) -> int:
        step, weights, state0, guess = random_network(gain, size=40, steps=200)
        found = deer(step, weights, state0, length=200, guess=guess, max_iterations=60)
        rms = np.asarray(found.residuals)
        return int(np.argmax(rms**2 <= 1e-10)) + 1 if (rms**2 <= 1e-10).any() else 61

    assert iterations(0.5) in (2, 3, 4)
    assert iterations(0.8) in (3, 4, 5)
    assert iterations(2.0) > 40


@pytest.mark.parametrize("variant", VARIANTS)
def test_chaos_is_not_taken_for_a_result(x64, variant) -> None:
    """Even at T iterations, where every equation holds: two roundings apart, trajectories part within 100 steps."""
    step, weights, state0, guess = random_network(3.0, size=32, steps=150)
    options = {"length": 150, "guess": guess, **VARIANTS[variant]}
    for most in (20, 151):
        found = deer(step, weights, state0, max_iterations=most, **options)
        assert not found.converged
        assert np.isnan(found.states).all()
    assert float(found.residual) <= 100 * np.finfo(np.float64).eps
    assert float(found.error) > 1e-6


def pulse(at: int, size: float) -> np.ndarray:
    xs = np.full(60, 0.0)
    xs[at] = size
    return xs


LARGE_NUMBERS = {
    "start": (lambda p, h, x: jnp.tanh(1.5 * h), lambda big: jnp.asarray([big]), None),
    "start, by vmap": (lambda p, h, x: jnp.tanh(h) + 0.1, lambda big: jnp.asarray([big]), None),
    "beside": (
        lambda p, h, x: jnp.stack([jnp.tanh(1.5 * h[0] + 0.1), h[1] + 1]),
        lambda big: jnp.asarray([-0.01, big]),
        None,
    ),
    "pulse": (lambda p, h, x: jnp.tanh(3 * h) + x, lambda big: jnp.asarray([-0.5]), pulse),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", covering(LARGE_NUMBERS, "pulse"))
def test_a_large_number_does_not_cover_the_others(dtype, name, variant) -> None:
    """Whatever is taken for a result agrees with the sequential one, entry by entry."""
    step, start, inputs = LARGE_NUMBERS[name]
    for big in (1e4, 1e7) if dtype == jnp.float32 else (1e8, 1e14):
        state0 = start(jnp.asarray(big, dtype))
        xs = None if inputs is None else jnp.asarray(inputs(20, big), dtype)
        found = deer(step, None, state0, xs, length=60, **VARIANTS[variant])
        assert int(found.iterations) > 0
        if name != "pulse" or variant == "full":
            assert found.converged
        if found.converged:
            exact = bptt.unroll(step, None, state0, xs, length=60)
            np.testing.assert_allclose(found.states, exact, rtol=3e-4 if dtype == jnp.float32 else 1e-8)


@pytest.mark.parametrize("variant", FORMS)
def test_states_that_decay_beyond_their_digits(dtype, variant) -> None:
    """Against a start of one, the last are 1e-133. Each iteration settles the states that are more than a rounding of
    what it began with."""
    of, steps = jnp.finfo(dtype), 600
    w = 0.6 * jnp.eye(8, dtype=dtype) + 0.004 * jax.random.normal(jax.random.key(0), (8, 8), dtype)
    arguments = network_step, w, jnp.ones(8, dtype)
    guess = jnp.ones((steps, 8), dtype)
    found = deer(*arguments, length=steps, guess=guess, **FORMS[variant])
    assert found.converged
    states = np.asarray(bptt.unroll(*arguments, length=steps))
    largest = np.abs(states).max(axis=1)  # of each step
    off, seen = np.abs(found.states - states).max(axis=1), largest > of.tiny / of.eps
    assert seen.sum() > 120
    assert (off[seen] < 1e3 * of.eps * largest[seen]).all()
    assert (off[~seen] <= of.tiny / of.eps).all()


@pytest.mark.parametrize("variant", ["full", "windows"])
def test_of_many_numbers_that_forget_some_pass_zero(variant) -> None:
    """Their errors are roundings all the same, not large beside themselves."""
    cell = bptt.gru(16)
    params, xs = cell.init(jax.random.key(0), 2), jax.random.normal(jax.random.key(1), (10_000, 2))
    arguments = cell.step, params, cell.initial_state(), xs
    options = {"window": 1000} if variant == "windows" else {}
    found = deer(*arguments, **options)
    assert found.converged
    assert found.error < 1e-5
    assert relative_error(found.states, bptt.unroll(*arguments)) < 1e-5


def test_error_is_how_far_roundings_grow(x64) -> None:
    """A scalar that doubles: one rounding at each of T steps, carried on, is a random sum of size 2^T."""
    found = deer(lambda p, h, x: p * h + x, 2.0, jnp.ones(()), jnp.zeros(20))
    # Relative to twice the state, which doubles too: |sum of +-1| over 20, at most, at least the last of them.
    assert 0.3 < float(found.error) / np.finfo(np.float64).eps <= 20
    unstable = deer(lambda p, h, x: p * h + x, 2.0, jnp.zeros(()), jnp.zeros(60).at[0].set(1.0).at[1].set(-2.0))
    # 1, then exactly 0 for ever: rounding errors double 58 times while the state does not.
    assert not unstable.converged
    assert float(unstable.error) > 1
    # A state that stays at 1: after 36 doublings more than half of its digits are wrong.
    coarse = deer(lambda p, h, x: p * h + x, 2.0, jnp.ones(()), jnp.full(36, -1.0))
    assert math.sqrt(np.finfo(np.float64).eps) < float(coarse.error) < 1
    assert not coarse.converged


@pytest.mark.parametrize("resets", [False, True])
def test_error_does_not_depend_on_the_chunks_of_time(x64, resets, monkeypatch) -> None:
    """Also where a chunk begins with a reset, over which no rounding is carried."""
    found = {}
    for numbers in (1 << 22, 9 * 4, 1):  # all at once; 4 at a time, 3 in the last; one by one
        monkeypatch.setattr(newton, "_CHUNK_NUMBERS", numbers)
        e = cell_example("rnn", jnp.float64, steps=23)
        xs = bptt.Sequence(e.xs, resets=jnp.arange(23) % 4 == 0) if resets else e.xs

        def fresh(p, h, x, step=e.step):
            return step(p, h, x)  # looked up by identity, another one is compiled anew

        params = jax.tree.map(lambda a: 2 * a, e.params)  # roundings grow
        exact = deer(fresh, params, e.state0, xs, jacobian="diagonal")  # ends with a residual of 0
        found[numbers] = float(exact.error)
    np.testing.assert_allclose(list(found.values()), found[1 << 22], rtol=1e-10)


@pytest.mark.parametrize("kind", ["scale", "kalman"])
def test_damping_tames_what_overshoots(x64, kind) -> None:
    """Contracting recurrences with steep slopes off their trajectories: Newton's iterates leave these by many orders of
    magnitude, and come back one state after the other; damped ones stay near, and all converge."""

    def step(p, h, x):
        return 0.3 * jnp.cos(p * h) + x

    p, h0 = 4.5, jnp.full(1, 2.0)
    xs = jnp.asarray(0.5 * np.random.default_rng(0).standard_normal((10, 200, 1)))
    states = jax.jit(jax.vmap(lambda xs: bptt.unroll(step, p, h0, xs)))(xs)
    rates = np.mean(np.log(np.abs(0.3 * p * np.sin(p * states))), axis=(1, 2))
    assert np.all(rates < -0.2)
    plain, damped = (
        jax.jit(jax.vmap(partial(deer, step, p, h0, damping=damping, max_iterations=60)))(xs)
        for damping in (None, kind)
    )
    assert not np.any(plain.converged)
    assert np.all(np.nanmax(plain.residuals, axis=1) > 1e10)
    assert np.all(damped.converged)
    assert np.nanmax(damped.residuals) < 100
    np.testing.assert_allclose(damped.states, states, atol=1e-12)


@pytest.mark.parametrize("variant", [*VARIANTS, "kalman"])
def test_first_iterates_that_overflow_do_not_hold_up_what_follows(variant) -> None:
    """The start is an unstable fixed point: about it, differences grow by 1.3 in every one of 5000 steps, to 1e569."""
    xs = jnp.zeros((5000, 2)).at[0].set(jnp.asarray([1e-3, -2e-3]))
    arguments = lambda p, h, x: jnp.tanh(p * h + x), 1.3, jnp.zeros(2), xs
    found = deer(*arguments, **(VARIANTS | {"kalman": {"damping": "kalman"}})[variant])
    assert found.converged
    assert int(found.iterations) <= 12
    assert relative_error(found.states, bptt.unroll(*arguments)) < 1e-5


@pytest.mark.parametrize("kind", [None, "scale", "kalman"])
def test_a_limit_cycle(x64, kind) -> None:
    """Differences about the start grow by 1.5 and turn by half a radian at every step. Held at their phase, they tell
    where on the cycle states arrive; with each number held by itself it takes twice as many iterations."""
    w = 1.5 * jnp.asarray([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]])
    arguments = lambda w, h, x: jnp.tanh(w @ h), w, jnp.full(2, 0.3)
    found = deer(*arguments, length=1000, damping=kind)
    assert found.converged
    assert int(found.iterations) <= 40
    assert relative_error(found.states, bptt.unroll(*arguments, length=1000)) < 1e-9


@pytest.mark.parametrize("kind", ["scale", "kalman"])
def test_what_is_left_may_grow_with_the_states(kind) -> None:
    """Up to 1e32: that is no overshoot, and nothing is damped."""
    w = jnp.asarray([[0.8, 0.5, -0.2], [-0.3, 0.9, 0.6], [0.5, -0.2, 0.8]], jnp.float32)
    arguments = lambda w, h, x: jax.nn.relu(w @ h), w, jnp.ones(3, jnp.float32)
    states, plain = bptt.unroll(*arguments, length=600), deer(*arguments, length=600)
    assert 1e31 < jnp.max(states) < np.inf
    found = deer(*arguments, length=600, damping=kind)
    assert found.converged
    assert int(found.iterations) <= int(plain.iterations) + 2
    assert relative_error(found.states, states) < 1e-4


def test_trajectories_that_are_not_finite_do_not_converge() -> None:
    found = deer(lambda p, h, x: p * h * h, jnp.float32(2), jnp.float32(3), length=40)
    assert not found.converged
    assert np.isnan(found.states).all()
    nan = deer(linear_step, jnp.eye(2), jnp.ones(2), jnp.ones((5, 2)).at[2].set(jnp.nan), max_iterations=9)
    assert not nan.converged
    assert nan.residual == np.inf
    assert int(nan.iterations) == 9


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_precision(variant) -> None:
    e = cell_example("gru", jnp.float32, steps=100)
    found = bptt.deer(*e[:4], **VARIANTS[variant])
    assert found.converged
    assert found.states.dtype == jnp.float32
    assert relative_error(found.states, bptt.unroll(*e[:4])) < 3e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_right_or_nan(variant) -> None:
    """Right to half of its digits, which roundings take away where differences do not shrink."""
    e = cell_example("gru", jnp.bfloat16, steps=100)
    found = bptt.deer(*e[:4], **VARIANTS[variant])
    assert found.converged
    assert found.states.dtype == jnp.bfloat16
    params, h0, xs = jax.tree.map(lambda a: a.astype(jnp.float32), e[1:4])
    assert relative_error(found.states.astype(jnp.float32), bptt.unroll(e[0], params, h0, xs)) < 0.09
    network = jax.tree.map(lambda a: a.astype(jnp.bfloat16), random_network(1.2)[1:])
    lost = bptt.deer(network_step, *network[:2], length=200, guess=network[2], **VARIANTS[variant])
    assert not lost.converged
    assert np.isnan(lost.states.astype(np.float32)).all()


REAL = np.asarray([0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0], bool)
RESETS = np.asarray([0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1], bool)  # the first before step 4, the last before none


@jax.custom_vjp
def spike(v):
    return (v > 0).astype(v.dtype)


spike.defvjp(lambda v: (spike(v), v), lambda v, g: (g / (1 + 10 * jnp.abs(v)) ** 2,))


@jax.checkpoint
def noisy_step(p, state, x):
    """A counter that says where to write, and a key that drives noise."""
    key, now = jax.random.split(state["key"])
    noise = jax.random.bits(now, x.shape, jnp.uint16).astype(x.dtype) / 2**16
    h = jnp.tanh(p["w"] @ state["h"] + p["b"] * x + noise)
    return {"h": h.at[state["t"] % 3].multiply(0.5), "t": state["t"] + p["stride"], "key": key}


def cond_step(p, state, x):
    """The counter goes through both branches."""

    def move(state):
        return state | {"h": jnp.tanh(p["w"] @ state["h"] + x), "t": state["t"] + 1}

    return jax.lax.cond(x[0] > 0, move, lambda s: s | {"h": 0.9 * s["h"] + p["b"], "t": 2 * s["t"]}, state)


def spiking_step(p, state, x):
    h = 0.5 * state["h"] + spike(p["w"] @ state["h"] + p["b"] * x)
    return state | {"h": h, "t": jax.jit(lambda h, t: (h, t + 1))(h, state["t"])[1]}


def problem_of(step):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(0.8 * rng.standard_normal((3, 3))), "b": jnp.asarray(rng.standard_normal(3))}
    state0, reset_state = (
        {"h": jnp.asarray(rng.standard_normal(3)), "t": jnp.asarray(k), "key": jax.random.key(k)} for k in (0, 1)
    )
    xs = jnp.asarray(rng.standard_normal((len(REAL), 3)))
    return step, params | {"stride": jnp.asarray(2)}, state0, reset_state, xs


@pytest.mark.parametrize("variant", FORMS)
@pytest.mark.parametrize("step", covering([noisy_step, cond_step, spiking_step], noisy_step))
def test_padding_resets_and_other_leaves(step, variant, x64) -> None:
    """States and gradients, of both starts and of the inputs too, are those of `unroll`; the padding is NaN."""
    step, params, state0, reset_state, xs = problem_of(step)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((len(REAL), 3)))
    spoilt = jnp.where(jnp.asarray(REAL)[:, None], xs, jnp.nan)
    moving = {"w": params["w"], "b": params["b"], "h0": state0["h"], "again": reset_state["h"], "xs": spoilt}

    def of(evaluate):
        def total(moving):
            sequence = bptt.Sequence(
                moving["xs"],
                mask=jnp.asarray(REAL),
                resets=jnp.asarray(RESETS),
                reset_state=reset_state | {"h": moving["again"]},
            )
            weights_and_bias = params | {"w": moving["w"], "b": moving["b"]}
            found = evaluate(step, weights_and_bias, state0 | {"h": moving["h0"]}, sequence)
            states = found.states if isinstance(found, bptt.parallel.DeerSolution) else found
            return jnp.sum(weights * jnp.sin(states["h"])), found

        return jax.value_and_grad(total, has_aux=True)(moving)

    @jax.jit
    def both():
        return of(lambda *arguments: bptt.deer(*arguments, **FORMS[variant])), of(bptt.unroll)

    ((_, found), gradient), ((_, expected), expected_gradient) = both()
    assert found.converged
    assert float(found.error) < 1e-12
    np.testing.assert_array_equal(found.states["t"], expected["t"])
    np.testing.assert_array_equal(*(jax.random.key_data(s["key"]) for s in (found.states, expected)))
    np.testing.assert_allclose(found.states["h"], expected["h"], rtol=1e-12, atol=1e-13)
    for name, value in expected_gradient.items():
        np.testing.assert_allclose(gradient[name], value, rtol=1e-10, atol=1e-13, err_msg=name)
    assert np.all(np.asarray(gradient["xs"])[~REAL] == 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_costs_no_iterations_and_no_digits(x64, variant) -> None:
    """Measured over real steps alone, and held states are no unknowns."""
    e = cell_example("gru", jnp.float64, steps=9)
    where = np.asarray([1, 2, 3, 7, 8, 9, 10, 12, 13])
    xs = jnp.full((16, 2), jnp.nan).at[where].set(e.xs)
    bare = deer(*e[:4], **VARIANTS[variant])
    mask = jnp.zeros(16, bool).at[where].set(True)
    padded = deer(*e[:3], bptt.Sequence(xs, mask=mask), **VARIANTS[variant])
    np.testing.assert_allclose(padded.states[where], bare.states, rtol=1e-12)
    assert int(padded.iterations) == int(bare.iterations)
    large = np.asarray(bare.residuals) > 1e-10
    np.testing.assert_allclose(padded.residuals[large], bare.residuals[large], rtol=1e-3)


def test_other_leaves_that_depend_on_the_state_are_refused() -> None:
    def flagged(w, state, x):
        h, _ = state
        h = jnp.tanh(w @ h + x)
        return h, h > 0

    def counting(w, state, x):
        h, t = state["h"], state["t"]
        return {"h": jnp.tanh(w @ h + x), "t": t + jnp.argmax(h)}

    xs = jnp.ones((4, 2))
    with pytest.raises(TypeError, match=r"step: state\[1\] is no floating number and depends on those that are"):
        bptt.deer(flagged, jnp.eye(2), (jnp.ones(2), jnp.zeros(2, bool)), xs)
    with pytest.raises(TypeError, match=r"step: state\['t'\] is no floating number"):
        bptt.deer(counting, jnp.eye(2), {"h": jnp.ones(2), "t": jnp.asarray(0)}, xs)


def test_a_loop_of_unknown_length_goes_forward(x64) -> None:
    def step(w, h, x):
        return jax.lax.while_loop(lambda c: c[0] < x, lambda c: (c[0] + 1, jnp.tanh(w @ c[1])), (0, h))[1]

    arguments = step, jnp.asarray([[0.9, -0.4], [0.3, 0.8]]), jnp.asarray([0.3, -0.2]), jnp.asarray([1, 2, 3, 1])
    found = bptt.deer(*arguments)
    assert found.converged
    np.testing.assert_allclose(found.states, bptt.unroll(*arguments), rtol=1e-13)


def test_a_guess_saves_iterations(x64) -> None:
    e = cell_example("lstm", jnp.float64, steps=100)
    cold = deer(*e[:4])
    moved = jax.tree.map(lambda a: a * (1 + 1e-9), e.params)
    warm = deer(e.step, moved, *e[2:4], guess=cold.states)
    assert int(warm.iterations) < int(cold.iterations)
    assert relative_error(warm.states, bptt.unroll(e.step, moved, *e[2:4])) < 1e-13
    done = deer(*e[:4], guess=cold.states)
    assert int(done.iterations) <= 2
    assert done.converged
    # A guess that is not finite is no worse than another bad one.
    assert deer(*e[:4], guess=jax.tree.map(lambda a: a * jnp.nan, cold.states)).converged
    # And of one in the padding nothing is taken.
    real = jnp.arange(100) % 5 < 3
    padded = (*e[:3], bptt.Sequence(e.xs, mask=real))
    spoilt = jax.tree.map(lambda a: jnp.where(real[:, None], a, jnp.nan), deer(*padded).states)
    assert int(deer(*padded, guess=spoilt).iterations) <= 2


def test_a_unit_that_rests_at_zero_converges() -> None:
    """It reaches zero to the last bit and stays there for a step: no size of its own, but one rounding behind it."""
    xs = jnp.asarray([[-0.5, 1.0], [0.0, 0.0], [0.5, 0.0]])
    e = (lambda w, h, x: w * h + x), jnp.float32(0.5), jnp.ones(2), xs
    states = bptt.unroll(*e)
    found = deer(*e, guess=states)
    assert found.converged
    assert float(found.error) < 1e-6
    np.testing.assert_array_equal(found.states, states)


@pytest.mark.parametrize("name", covering(EXAMPLES, "complex"))
def test_gradients_are_those_of_unroll_and_of_the_parallel_adjoint(x64, name) -> None:
    e = EXAMPLES[name](jnp.float64)
    steps = e.length or len(e.xs)
    loss = weighted_loss(losses(steps, jnp.float64)["all"])

    def of(evaluate):
        def total(params, state0):
            return loss(evaluate(e.step, params, state0, e.xs, length=e.length))

        return jax.jit(jax.grad(total, argnums=(0, 1), allow_int=True))(e.params, e.state0)

    def floats(tree):
        return [a for a in jax.tree.leaves(tree) if a.dtype != jax.dtypes.float0]

    got = of(lambda *args, **options: bptt.deer(*args, **options).states)
    assert relative_error(floats(got), floats(of(bptt.unroll))) < 1e-12

    def vector(tree):
        return bptt.ravel_state(jax.tree.map(jnp.conj, tree))[0]

    @jax.jit
    def both():
        known = bptt.adjoints(*e[:4], loss, length=e.length)
        immediate = jax.vmap(vector)(jax.grad(loss)(known.states))
        parallel = bptt.parallel.parallel_adjoints(bptt.jacobians(*e[:4], length=e.length), immediate)
        return parallel, jax.vmap(vector)(known.adjoints), vector(known.state0_grad), known.log_norms

    parallel, adjoints, state0_grad, log_norms = both()
    assert relative_error(parallel.adjoints, adjoints) < 1e-12
    np.testing.assert_allclose(parallel.log_norms, log_norms, atol=1e-12)
    assert relative_error(parallel.state0_grad, state0_grad) < 1e-12


def test_second_derivatives_and_inputs(x64) -> None:
    e = cell_example("rnn", jnp.float64)

    def of(evaluate):
        def total(h0, xs):
            return jnp.sum(jnp.sin(evaluate(e.step, e.params, h0, xs)))

        return jax.jit(jax.hessian(total, argnums=(0, 1)))(e.state0, e.xs)

    assert relative_error(of(lambda *args: bptt.deer(*args).states), of(bptt.unroll)) < 1e-11


def test_the_gradient_is_parallel_too(x64) -> None:
    """On a GPU no loop over time in the backward pass: Newton's while alone remains, in the forward pass."""
    e = cell_example("rnn", jnp.float64)

    def program(evaluate):
        _, pull = jax.vjp(lambda p: evaluate(e.step, p, *e[2:4]), e.params)
        return jax.jit(pull).trace(jnp.ones((7, 3))).lower(lowering_platforms=("cuda",)).as_text()

    assert "stablehlo.while" not in program(lambda *given: bptt.deer(*given).states)
    assert "stablehlo.while" in program(bptt.unroll)


def test_gradients_where_it_has_not_converged_are_nan(x64) -> None:
    step, weights, state0, _ = random_network(3.0, size=10, steps=50)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(bptt.deer(step, w, state0, length=50, max_iterations=2).states)))(
        weights
    )
    assert np.isnan(gradient).all()


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_blocks_are_right_in_the_mean(x64, mode) -> None:
    """Hutchinson's estimate of the blocks of the exact Jacobians, over the signs of 400 iterations."""
    cell = bptt.lstm(3)
    step, params, state0 = cell.step, cell.init(jax.random.key(0), 2), cell.initial_state()
    params, state0 = jax.tree.map(lambda a: 2 * a.astype(jnp.float64), (params, state0))
    places = [[[0, 3], [1, 4], [2, 5]]]
    xs = jax.random.normal(jax.random.key(1), (3, 2))
    recurrence = check_step(bind(step, params, state0, bptt.Sequence(xs, mask=jnp.asarray([True, True, False]))))
    starts = recurrence.starts(bptt.unroll(step, params, state0, xs))
    np.testing.assert_array_equal(units(state0), places)

    def at(count):
        return factors.blocks(recurrence, starts, recurrence.instants, mode, count)[0][0]

    @jax.jit
    def both(counts):
        return jax.vmap(at)(counts), factors.full(recurrence, starts, recurrence.instants, mode)[0]

    found, full = map(np.asarray, both(jnp.arange(400)))
    index = np.asarray(places[0])
    expected = full[:, index[:, :, None], index[:, None, :]]
    errors = found.std(axis=0) / np.sqrt(400)
    assert errors[:2].max() > 1e-3  # units meet
    assert (np.abs(found.mean(axis=0) - expected) < 4 * errors + 1e-12).all()
    np.testing.assert_array_equal(found[:, 2], np.broadcast_to(np.eye(index.shape[1]), found[:, 2].shape))


@pytest.mark.parametrize("name", ["indrnn", "lru"])
def test_blocks_are_exact_where_units_do_not_meet(x64, name) -> None:
    """Newton's method in full, iteration by iteration, from one product with a Jacobian a leaf."""
    cell = getattr(bptt.cells, name)(5, dtype=jnp.float64)
    xs = jax.random.normal(jax.random.key(1), (60, 2))
    given = cell.step, cell.init(jax.random.key(0), 2), cell.initial_state(), xs
    found, newton = deer(*given, jacobian="blocks"), deer(*given)
    assert found.converged
    assert int(found.iterations) == int(newton.iterations)
    large = np.asarray(newton.residuals) > 1e-10
    np.testing.assert_allclose(found.residuals[large], newton.residuals[large], rtol=1e-6)
    assert relative_error(found.states, bptt.unroll(*given)) < 1e-13


@pytest.mark.parametrize("window", covering([1, 7, 12, 13], 7))
def test_windows_of_any_length(x64, window) -> None:
    """A trajectory of 13 steps, its error and its gradients, with a guess; padding at the seams and a reset on one."""
    e = cell_example("lstm", jnp.float64, steps=13)
    mask, resets = jnp.arange(13) % 7 != 6, jnp.arange(13) == 7

    def of(evaluate):
        def total(params, state0, xs):
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(evaluate(e.step, params, state0, xs(params))))

        sequence = lambda p: bptt.Sequence(e.xs, mask=mask, resets=resets)  # noqa: E731
        return jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)(e.params, e.state0, sequence)

    xs = bptt.Sequence(e.xs, mask=mask, resets=resets)
    found, whole = deer(*e[:3], xs, window=window), deer(*e[:3], xs)
    assert found.converged
    assert relative_error(found.states, bptt.unroll(*e[:3], xs)) < 1e-13
    np.testing.assert_allclose(found.error, whole.error, rtol=0.3)  # of the same roundings
    assert int(found.iterations) <= window + 1
    assert int(np.isfinite(found.residuals).sum()) == int(found.iterations)
    assert int(deer(*e[:3], xs, window=window, guess=found.states).iterations) <= 2
    by_windows = of(lambda *given: bptt.deer(*given, window=window).states)
    assert relative_error(by_windows, of(bptt.unroll)) < 1e-12


def test_errors_are_carried_from_window_to_window(x64) -> None:
    """A scalar that doubles: its roundings after 36 steps are those of all windows."""
    arguments = (lambda p, h, x: p * h + x), 2.0, jnp.ones(()), jnp.full(36, -1.0)
    for window in (5, 12):
        found = deer(*arguments, window=window)
        assert math.sqrt(np.finfo(np.float64).eps) < float(found.error) < 1
        assert not found.converged
        assert np.isnan(found.states).all()


@pytest.mark.parametrize("window", [2, 16, 48])
def test_roundings_of_windows_are_those_of_the_whole(window) -> None:
    """A counter, which makes none: all of the error are the signs, of every step its own."""
    arguments = (lambda p, h, x: h + p), 1.0, jnp.zeros(2)
    whole = deer(*arguments, length=512)
    assert whole.converged
    assert whole.residual == 0
    np.testing.assert_allclose(deer(*arguments, length=512, window=window).error, whole.error, rtol=1e-5)


def test_memory_of_windows() -> None:
    """Of the gradient too, in which all exact Jacobians are needed once: T of them are 64 MiB."""
    cell = bptt.rnn(64)
    params = jax.eval_shape(lambda key: cell.init(key, 2), jax.random.key(0))
    shapes = (params, jax.ShapeDtypeStruct((64,), jnp.float32), jax.ShapeDtypeStruct((4096, 2), jnp.float32))

    def memory(window):
        def total(p, h, xs):
            return jnp.sum(bptt.deer(cell.step, p, h, xs, window=window).states)

        return jax.jit(jax.grad(total)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert memory(None) > 1 << 26
    assert memory(64) < 1 << 24


def test_memory_of_the_diagonal_variant() -> None:
    """T Jacobians of this size are 1 GiB."""
    cell = bptt.rnn(512)
    params = jax.eval_shape(lambda key: cell.init(key, 2), jax.random.key(0))
    shapes = (params, jax.ShapeDtypeStruct((512,), jnp.float32), jax.ShapeDtypeStruct((1024, 2), jnp.float32))

    def memory(jacobian):
        run = jax.jit(lambda p, h, xs: bptt.deer(cell.step, p, h, xs, jacobian=jacobian))
        return run.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert memory("full") > 1 << 30
    assert memory("diagonal") < 1 << 28


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"jacobian": "dense"}, ValueError, "jacobian: expected 'full', 'diagonal' or 'blocks', got 'dense'"),
        ({"window": 0}, ValueError, "window: expected at least 1"),
        ({"damping": True}, ValueError, "damping: expected None, 'scale' or 'kalman', got True"),
        ({"max_iterations": 0}, ValueError, "max_iterations: expected at least 1"),
        ({"guess": np.zeros((4, 3), np.float32)}, ValueError, "guess: expected a trajectory, like"),
        ({"guess": {"h": 1.0}}, ValueError, "guess: expected a trajectory, like"),
        ({"length": 3}, ValueError, "length: expected 7"),
    ],
)
def test_bad_arguments(options, error, message) -> None:
    e = cell_example("rnn", jnp.float32)
    with pytest.raises(error, match=message):
        bptt.deer(*e[:4], **options)


@pytest.mark.parametrize("jacobian", ["full", "diagonal"])
def test_a_start_at_log_zero(jacobian) -> None:
    """Forgotten by the first real step, and held in the padding before it."""

    def step(p, h, x):
        return jnp.logaddexp(h - 1, x)

    xs = jnp.linspace(-1, 1, 12)[:, None]
    for sequence in (xs, bptt.Sequence(xs, mask=jnp.arange(12) > 3)):
        given = step, None, jnp.full(1, -jnp.inf), sequence
        found = bptt.deer(*given, jacobian=jacobian)
        assert found.converged
        np.testing.assert_allclose(found.states, bptt.unroll(*given), rtol=1e-5)


def test_sizes_are_those_of_the_solution():
    """From zero, where the Jacobian is 1e10, an iterate comes to where it is 1/2: what is left there is no rounding."""
    weights = 1e10 * jnp.asarray([[-1.0, 0.5, 0.3], [0.2, 0.6, 0.9], [-0.7, -0.8, 0.1]])

    def step(w, h, x):
        return 0.5 * h + jax.nn.sigmoid(w @ h)

    found = bptt.deer(step, weights, jnp.zeros(3), length=4)
    exact = bptt.unroll(step, weights, jnp.zeros(3), length=4)
    assert not found.converged or np.allclose(found.states, exact, rtol=1e-3)
    assert not found.converged or found.residual < 1e-4
