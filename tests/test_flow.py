"""`gradient_flow`: equal to the functions that do not stream, small in memory, and right in its verdict."""

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import EXAMPLES, T, cell_example, cell_params, linear_step, losses, users_jit, weighted_loss
from slices import covering

import bptt_jax as bptt
from bptt_jax.analysis import flow as flow_module
from bptt_jax.linalg.scattered import scattered_before
from bptt_jax.plots import plot_gradient_flow

STEPS = 40
EYE = np.eye(2)


@lru_cache
def compiled(steps):
    """One compilation for all linear maps, inputs, losses and thresholds."""

    @(users_jit if steps == STEPS else jax.jit)
    def measure(a, h0, xs, weights, threshold):
        return bptt.gradient_flow(
            linear_step, a, h0, xs, lambda states: weights @ jnp.sum(states, axis=1), threshold=threshold
        )

    return measure


def linear_flow(a, *, weights=None, h0=(1, 1), xs=None, threshold=1e-3, steps=STEPS):
    """Of ``h = A h + x`` with a loss that reads ``sum_t weights_t (1, 1) h_t``; by default the last state."""
    weights = np.eye(steps)[-1] if weights is None else weights
    xs = np.zeros((steps, 2)) if xs is None else xs
    return compiled(steps)(*(jnp.asarray(v, jnp.float32) for v in (a, h0, xs, weights, threshold)))


def one_hot(k):
    return np.eye(STEPS)[k]


BACK = np.arange(STEPS, 0, -1)


@pytest.mark.parametrize(
    ("a", "verdict", "horizon"),
    [(0.5, "vanishing", 10), (0.9, "steady", np.log(1e-3) / np.log(0.9)), (2.0, "exploding", np.inf)],
)
def test_scalar_maps_in_closed_form(a, verdict, horizon):
    """0.5^9 is the last power above 1e-3; 0.9^40 is still above it, so the horizon lies beyond T."""
    flow = linear_flow(a * EYE)
    assert flow.verdict == verdict
    np.testing.assert_allclose(flow.growth_rate, np.log(a), rtol=1e-5)
    np.testing.assert_allclose(flow.horizon, horizon, rtol=1e-4)
    np.testing.assert_allclose(flow.signal.log_gains, BACK * np.log(a), rtol=1e-5)
    np.testing.assert_allclose(flow.products.log_norms, BACK * np.log(a), rtol=1e-5)
    np.testing.assert_allclose(
        flow.signal.adjoint_log_norms, (BACK - 1) * np.log(a) + np.log(2) / 2, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(flow.end_gain, STEPS * np.log(a), rtol=1e-5)
    np.testing.assert_allclose(flow.peak_gain, max(0, (STEPS - 1) * np.log(a)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flow.spectra.singular_values, a, rtol=1e-6)
    np.testing.assert_allclose(flow.spectra.eigenvalues, a, rtol=1e-6)
    np.testing.assert_array_equal(flow.spectra.steps, np.arange(1, STEPS + 1))
    # dL/dA = sum_t lambda_t h_{t-1}^T, and every term is a^(T-1).
    np.testing.assert_allclose(
        flow.numerics.params_grad_log_norm, np.log(2 * STEPS) + (STEPS - 1) * np.log(a), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        flow.contributions.log_norms, np.log(2) + (STEPS - 1) * np.log(a), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(flow.contributions.shares, 1 / STEPS, rtol=1e-5)
    numerics = flow.numerics
    assert (numerics.first_nonfinite_state, numerics.first_nonfinite_adjoint) == (-1, -1)
    assert numerics.finite
    assert numerics.in_range
    assert flow.growth_rate_error < 1e-6
    assert (flow.reach, flow.cut_lag) == (STEPS, -1)
    assert bool(flow.horizon_extrapolated) == (verdict != "vanishing")


def test_orthogonal_step_is_steady():
    c, s = np.cos(0.7), np.sin(0.7)
    flow = linear_flow([[c, -s], [s, c]])
    assert flow.verdict == "steady"
    assert flow.advice() == []
    np.testing.assert_allclose(flow.spectra.singular_values, 1, atol=1e-6)
    np.testing.assert_allclose(flow.growth_rate, 0, atol=1e-6)
    np.testing.assert_allclose(flow.signal.adjoint_log_norms, np.log(2) / 2, atol=1e-5)
    assert flow.horizon > 1e5  # inf, or what a slope of one rounding gives


def test_jordan_block_is_judged_by_what_was_measured():
    """Its eigenvalues, 0.96, say decay at any length; over 40 steps the signal grows more than fivefold."""
    n = np.arange(1, 401)
    signal = np.stack([0.96**n, 0.96**n + n * 0.96 ** (n - 1)])
    gains = np.log(np.linalg.norm(signal, axis=0) / np.sqrt(2))
    short, long = (linear_flow([[0.96, 1], [0, 0.96]], threshold=f, steps=s) for s, f in ((40, 0.2), (400, 1e-3)))
    for flow, steps in ((short, 40), (long, 400)):
        assert np.all(np.abs(flow.spectra.eigenvalues) < 0.97)
        np.testing.assert_allclose(flow.signal.log_gains[::-1], gains[:steps], atol=1e-4)
    assert short.verdict == "exploding"
    assert short.end_gain > np.log(5)
    assert replace(short, threshold=jnp.float32(1e-3)).verdict == "steady"
    assert long.verdict == "vanishing"
    # It has fallen below 1e-3 for good, not when it first did so.
    assert int(long.horizon) == 1 + np.max(n[gains >= np.log(1e-3)])


@pytest.mark.parametrize("k", [1, 20, STEPS - 1])
def test_loss_on_one_step(k):
    """The error signal starts there; later steps have none, and the rate is measured over the steps before."""
    flow = linear_flow(0.8 * EYE, weights=one_hot(k))
    back = k + 1 - np.arange(STEPS)
    np.testing.assert_array_equal(flow.signal.lags, np.maximum(back, 0))
    np.testing.assert_allclose(flow.signal.log_gains, np.where(back > 0, back * np.log(0.8), np.nan), rtol=1e-5)
    np.testing.assert_allclose(flow.growth_rate, np.log(0.8), rtol=1e-5)
    np.testing.assert_allclose(flow.end_gain, (k + 1) * np.log(0.8), rtol=1e-5)
    np.testing.assert_allclose(flow.horizon, np.log(1e-3) / np.log(0.8), atol=1)
    assert np.all(flow.signal.adjoint_log_norms[k + 1 :] == -np.inf)
    assert flow.verdict == ("vanishing" if k == STEPS - 1 else "steady")


def test_one_step_back_tells_nothing():
    flow = linear_flow(1e-4 * EYE, weights=one_hot(0))
    assert flow.verdict == "unmeasured"
    assert "less than two steps" in flow.statement
    assert np.isnan([flow.growth_rate, flow.growth_rate_error, flow.horizon, flow.end_gain]).all()
    assert flow.advice() == []
    # Nor do two, of which the first erases everything.
    flow = linear_flow(0 * EYE)
    assert flow.cut_lag == 1
    assert np.isnan([flow.growth_rate, flow.growth_rate_error, *flow.leaves.growth_rate_error]).all()


def test_loss_on_all_steps():
    """The adjoints are refreshed by later losses, the error signal of the last one is not."""
    flow = linear_flow(0.5 * EYE, weights=np.ones(STEPS))
    np.testing.assert_allclose(flow.signal.adjoint_log_norms, np.log(np.sqrt(2) * 2 * (1 - 0.5**BACK)), rtol=1e-5)
    assert flow.verdict == "vanishing"
    np.testing.assert_allclose(flow.end_gain, STEPS * np.log(0.5), rtol=1e-5)
    flow = linear_flow(2 * EYE, weights=np.ones(STEPS))
    np.testing.assert_allclose(flow.peak_gain, np.log((2.0**STEPS - 1) / STEPS), rtol=1e-5)
    assert flow.verdict == "exploding"
    assert linear_flow(EYE, weights=np.ones(STEPS)).verdict == "steady"


def test_many_losses_alone_are_no_explosion():
    """2000 times a loss make a large gradient, but the recurrence has amplified nothing."""
    flow = linear_flow(EYE, weights=np.full(STEPS, 2000.0))
    assert flow.verdict == "steady"
    np.testing.assert_allclose(flow.peak_gain, 0, atol=1e-5)


def test_nothing_is_said_of_a_loss_that_reads_no_state():
    """Whatever the products do, and though ``0 * sum`` is a function of the states."""
    flow = linear_flow(0.5 * EYE, weights=np.zeros(STEPS))
    assert flow.verdict == "unmeasured"
    assert flow.advice() == []
    assert "exactly zero at every state" in flow.statement
    assert "later states" not in flow.statement
    assert np.isnan([flow.growth_rate, flow.horizon, flow.end_gain]).all()
    assert np.all(flow.signal.lags == 0)
    assert np.all(np.isnan(flow.contributions.shares))
    np.testing.assert_allclose(flow.products.log_norms, BACK * np.log(0.5), rtol=1e-5)


def test_of_states_that_decay_a_loss_of_squares_reads_few():
    """What is measured is the way from the last state whose derivative counts, and that is said."""
    square = bptt.gradient_flow(
        lambda a, h, x: a * h, 0.5, jnp.ones(2), None, lambda s: jnp.mean(s**2), length=1000
    )
    assert square.reach == 10  # 2^-10 is the first below 1e-3 of the largest, which is that of h_1
    assert "hardly depends on the 990 later states" in square.statement
    last = bptt.gradient_flow(lambda a, h, x: a * h, 0.5, jnp.ones(2), None, lambda s: jnp.sum(s[-1]), length=1000)
    assert "later states" not in last.statement

    resets = jnp.zeros(1000, bool).at[700].set(True)
    mask = jnp.arange(1000) < 990
    pieces = bptt.Sequence(mask=mask, resets=resets)
    square = bptt.gradient_flow(lambda a, h, x: a * h, 0.5, jnp.ones(2), pieces, lambda s: jnp.mean(s**2))
    assert "hardly depends on the 690 later states" in square.statement
    square = bptt.gradient_flow(lambda a, h, x: a * h, 0.5, jnp.zeros(2), None, lambda s: jnp.mean(s**2), length=9)
    assert square.verdict == "unmeasured"
    assert "or is flat there" in square.statement


def test_of_a_batch_it_is_said_where_most_losses_read_few_states():
    """Each loss reads one state of 100."""
    measure = jax.jit(
        jax.vmap(
            lambda a, weights: bptt.gradient_flow(
                lambda a, h, x: a * h, a, jnp.ones(1), weights, lambda s: s[:, 0] @ weights
            ),
            (None, 0),
        )
    )

    def statement(*last: int) -> str:
        found: bptt.GradientFlow = measure(0.5, (np.arange(1, 101) == np.asarray(last)[:, None]).astype(float))
        return found.statement

    few, fewer, most, none = 10, 5, 60, 0
    assert "hardly depends on the 90 later states" in statement(few)
    assert "hardly depends on the 90 later states" in statement(few, fewer)
    assert "hardly depends on the 95 later states" in statement(fewer, fewer, few, most, none, none)
    assert "later states" not in statement(few, most)
    assert "later states" not in statement(most, none)
    weights = (np.arange(1, 101) == few).astype(float)
    assert "later states" not in measure(0.5, np.stack([weights, weights, np.nan * weights])).statement


def test_signal_that_dies_exactly():
    flow = linear_flow([[0, 1], [0, 0]])
    gains = [-np.inf] * (STEPS - 1) + [-np.log(2) / 2]
    np.testing.assert_allclose(flow.signal.log_gains, gains, rtol=1e-6)
    assert (flow.horizon, flow.cut_lag, flow.end_gain) == (2, 2, -np.inf)
    assert np.isnan(flow.growth_rate)  # of one step
    assert flow.verdict == "vanishing"
    assert "exactly zero after 2 of 40 steps" in flow.statement
    (line,) = flow.advice()
    assert "declared as a reset" in line


@pytest.mark.parametrize("cut", [1, 15, STEPS - 1])
def test_a_step_that_erases_the_state_cuts_the_rate(cut):
    """Without a reset declared: the rate is that of the stretch after it, and the lag of the cut is told."""

    def step(w, h, x):
        return w * h * x

    @jax.jit
    def measure(xs):
        return bptt.gradient_flow(step, 0.9, jnp.ones(2), xs, lambda states: jnp.sum(states[-1]), spectra=False)

    flow = measure(jnp.ones((STEPS, 1)).at[STEPS - cut].set(0))
    assert flow.cut_lag == cut
    assert flow.verdict == "vanishing"
    assert flow.horizon == cut
    if cut > 2:
        np.testing.assert_allclose(flow.growth_rate, np.log(0.9), rtol=1e-5)
    np.testing.assert_array_equal(np.isinf(flow.signal.log_gains), flow.signal.lags >= cut)


def test_of_an_episode_that_has_just_begun_nothing_is_said():
    """The last step begins anew: what the loss reads has one step behind it, whatever the sequence's length."""
    episodes = bptt.Sequence(jnp.zeros((12, 1)), resets=jnp.arange(12) == 11)
    flow = bptt.gradient_flow(lambda w, h, x: w * h + x, 0.1, jnp.ones(1), episodes, last_sum, spectra=False)
    assert (flow.verdict, flow.reach, flow.advice()) == ("unmeasured", 1, [])
    assert "less than two steps" in flow.statement


def test_a_dead_first_step_is_no_loss_of_memory():
    """Log-domain cells begin at -inf: nothing passes to h_0, and that is all."""

    def step(w, h, x):
        return w * h * x

    flow = bptt.gradient_flow(
        step, 0.9, jnp.ones(2), jnp.ones((STEPS, 1)).at[0].set(0), lambda states: jnp.sum(states[-1]), spectra=False
    )
    assert flow.cut_lag == STEPS
    assert flow.verdict == "steady"
    np.testing.assert_allclose(flow.growth_rate, np.log(0.9), rtol=1e-5)
    np.testing.assert_allclose(flow.end_gain, (STEPS - 1) * np.log(0.9), rtol=1e-5)
    np.testing.assert_allclose(flow.horizon, np.log(1e-3) / np.log(0.9), rtol=1e-4)
    assert flow.horizon_extrapolated


def test_log_zero_that_padding_holds_is_no_fault():
    def step(p, h, x):
        return jnp.logaddexp(h - 1, x)

    sequence = bptt.Sequence(jnp.ones((8, 1)), mask=jnp.arange(8) > 2)
    flow = bptt.gradient_flow(step, None, jnp.full(1, -jnp.inf), sequence, last_sum, spectra=False)
    assert flow.numerics.finite
    assert flow.numerics.first_nonfinite_state == -1
    broken = replace(sequence, xs=jnp.ones((8, 1)).at[4].set(jnp.nan))
    flow = bptt.gradient_flow(step, None, jnp.full(1, -jnp.inf), broken, last_sum, spectra=False)
    assert flow.numerics.first_nonfinite_state == 4


def test_horizon_is_where_the_signal_has_fallen_for_good():
    """Low at every other step and back at the next: A^T (1, 1) = (1, -1) / 16, A^T (1, -1) = -8 (1, 1), halved."""
    u, v = np.asarray([[1, 1], [1, -1]])
    flow = linear_flow((np.outer(v, u) / 16 - 8 * np.outer(u, v)).T / 2, threshold=0.1)
    halves = np.log(0.5) * np.arange(1, 21)
    np.testing.assert_allclose(flow.signal.log_gains[::-1][1::2], halves, rtol=1e-6)
    np.testing.assert_allclose(flow.signal.log_gains[::-1][::2], halves - np.log(8), rtol=1e-6)
    assert flow.horizon == 7  # 0.5^(6 / 2) is the last above 0.1


def test_growth_beyond_float32():
    """Adjoints of 1e1200 have a finite logarithm and a finite verdict."""
    flow = linear_flow(1e30 * EYE, h0=(0, 0))
    np.testing.assert_allclose(flow.end_gain, STEPS * np.log(1e30), rtol=1e-5)
    assert flow.verdict == "exploding"
    assert "overflow" not in " ".join(flow.advice())  # h is 0, so is the gradient of A
    assert "reach 1e" in " ".join(linear_flow(5 * EYE).advice())


def test_nan_in_an_input():
    xs = np.zeros((STEPS, 2))
    xs[17, 1] = np.nan
    flow = linear_flow(0.9 * EYE, xs=xs)
    assert flow.verdict == "non-finite"
    assert flow.numerics.first_nonfinite_state == 17
    assert flow.numerics.first_nonfinite_adjoint == -1  # the Jacobian of a linear step does not look at h
    assert "h_18" in flow.advice()[0]


def test_overflow_in_a_state():
    flow = linear_flow(1e3 * EYE, h0=(1e30, 0))
    assert flow.verdict == "non-finite"
    assert flow.numerics.first_nonfinite_state == 2


def test_nan_in_the_backward_pass():
    weights = one_hot(STEPS - 1)
    weights[20] = np.nan
    flow = linear_flow(0.9 * EYE, weights=weights)
    assert flow.verdict == "non-finite"
    assert (flow.numerics.first_nonfinite_state, flow.numerics.first_nonfinite_adjoint) == (-1, 20)
    assert "dL/dh_21" in flow.advice()[0]
    assert flow.summary()["verdicts"] == {"non-finite": 1}


@pytest.mark.parametrize(
    ("start", "first"), [(3e38 + 3e38j, -1), (complex(1.0, np.nan), 0), (complex(np.inf, 0.0), 0)]
)
def test_a_complex_state_is_finite_if_both_parts_are(start, first):
    """The modulus of the first leaves the range of its dtype."""
    found = bptt.gradient_flow(
        lambda _, h, x: h, None, jnp.asarray([start], jnp.complex64), None, lambda s: s[-1, 0].real * 0.5, length=3
    )
    assert found.numerics.first_nonfinite_state == first


def test_an_infinity_that_the_step_bounds():
    """tanh makes 1 of an infinite input, with a derivative of 0; in the gradient stands 0 times infinity."""
    cell = bptt.rnn(2)
    params = cell.init(jax.random.key(0), 1)._replace(input=jnp.ones((2, 1)))
    xs = jnp.zeros((STEPS, 1)).at[17].set(jnp.inf)
    flow = bptt.gradient_flow(cell.step, params, cell.initial_state(), xs, lambda states: jnp.sum(states[-1]))
    assert (flow.numerics.first_nonfinite_state, flow.numerics.first_nonfinite_adjoint) == (-1, -1)
    assert np.isnan(flow.numerics.params_grad_log_norm)
    assert flow.verdict == "non-finite"
    assert "(x_18)" in flow.advice()[0]


def test_an_infinite_derivative_at_the_start():
    """sqrt has one at 0, from which nothing but dL/dh_0 suffers."""

    def root(w, h, x):
        return jnp.sqrt(h) + w * x

    flow = bptt.gradient_flow(root, 1.0, jnp.zeros(1), jnp.ones((STEPS, 1)), lambda states: states[-1, 0])
    assert np.isfinite(flow.numerics.params_grad_log_norm)
    assert flow.verdict == "non-finite"
    assert "dh_1/dh_0" in flow.advice()[0]


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, 2.0, np.nan])
def test_traced_threshold_out_of_range(threshold):
    with pytest.raises(Exception, match="threshold: expected a number between 0 and 1"):
        jax.block_until_ready(linear_flow(0.9 * EYE, threshold=threshold))


def test_another_threshold():
    flow = linear_flow(0.9 * EYE, threshold=0.1)
    assert flow.verdict == "vanishing"
    assert flow.horizon == 22  # 0.9^21 = 0.109
    assert replace(flow, threshold=jnp.float32(1e-3)).verdict == "steady"


@pytest.mark.parametrize(("name", "chunk", "stride"), covering([("lstm", 3, 4), ("complex", 4, 1)], ("lstm", 3, 4)))
def test_streaming_changes_nothing(name, chunk, stride, x64, monkeypatch):
    """In chunks of Jacobians that do not divide T, against the functions that hold all of them."""
    step, params, state0, xs, length = EXAMPLES[name](jnp.float64)
    size = bptt.ravel_state(state0)[0].size
    monkeypatch.setattr(flow_module, "_CHUNK_NUMBERS", chunk * size**2)

    def fresh(params, h, x):  # what was compiled for another chunk is not looked up
        return step(params, h, x)

    @jax.jit
    def both(weights):
        arguments, loss = (params, state0, xs), weighted_loss(weights)
        jacobians = bptt.jacobians(step, *arguments, length=length)
        return (
            bptt.gradient_flow(fresh, *arguments, loss, length=length, stride=stride),
            jacobians,
            bptt.product_log_norms(jacobians),
            bptt.adjoints(step, *arguments, loss, length=length),
            bptt.temporal_contributions(step, *arguments, loss, length=length),
        )

    for weights in losses(T, jnp.float64).values():
        flow, jacobians, products, adjoints, contributions = both(weights)
        for got, expected in (
            (flow.products.log_norms, products),
            (flow.loss, adjoints.loss),
            (flow.signal.adjoint_log_norms, adjoints.log_norms),
            (flow.contributions.log_norms, contributions.log_norms),
            (flow.contributions.shares, contributions.shares),
        ):
            np.testing.assert_allclose(got, expected, atol=1e-11)
        chosen = np.asarray(flow.spectra.steps) - 1
        np.testing.assert_array_equal(chosen, np.arange(T)[::-stride][::-1])
        # Of the singular values, those at rounding level are free; of the eigenvalues, the order within a modulus.
        np.testing.assert_allclose(
            flow.spectra.singular_values, np.linalg.svd(jacobians[chosen], compute_uv=False), atol=1e-12
        )
        moduli = np.sort(np.abs(np.linalg.eigvals(np.asarray(jacobians)[chosen])), axis=-1)[:, ::-1]
        np.testing.assert_allclose(np.abs(flow.spectra.eigenvalues), moduli, atol=1e-7)

        last = np.flatnonzero(weights)[-1]
        gains, signal = np.full(T, np.nan), error_at(last, adjoints, weights)
        start = np.linalg.norm(signal)
        for t in reversed(range(last + 1)):
            signal = np.asarray(jacobians[t]).T @ signal
            gains[t] = np.log(np.linalg.norm(signal) / start)
        np.testing.assert_allclose(flow.signal.log_gains, gains, atol=1e-11)


@pytest.mark.parametrize("name", covering(["rnn", "lstm"], "rnn"))
def test_leading_values_only(name, x64):
    """Where the Krylov spaces are everything: in all fields what the Jacobians say, of the spectra the first."""
    step, params, state0, xs, _ = EXAMPLES[name](jnp.float64)

    @jax.jit
    def both(weights):
        arguments = step, params, state0, xs, weighted_loss(weights)
        return bptt.gradient_flow(*arguments, stride=2), bptt.gradient_flow(*arguments, stride=2, num=2)

    for weights in losses(T, jnp.float64).values():
        dense, leading = both(weights)
        assert leading.verdict == dense.verdict
        assert leading.summary()["verdicts"] == dense.summary()["verdicts"]
        moduli = np.abs(dense.spectra.eigenvalues[:, :2])
        np.testing.assert_allclose(np.abs(leading.spectra.eigenvalues), moduli, atol=1e-10)
        few = replace(
            dense.spectra,
            singular_values=dense.spectra.singular_values[:, :2],
            eigenvalues=leading.spectra.eigenvalues,
        )
        expected = replace(dense, spectra=few, products=replace(dense.products, block_log_norms=None))
        got, want = (jax.tree_util.tree_leaves_with_path(flow) for flow in (leading, expected))
        assert [path for path, _ in got] == [path for path, _ in want]
        for (path, a), (_, b) in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11, err_msg=str(path))


@pytest.mark.exhaustive
def test_leading_values_of_a_larger_state():
    """D = 200 in float32: the spaces are far smaller, and what is found is good to 1e-3."""
    step, params, state0, xs, _ = cell_example("rnn", jnp.float32, 200, 12)
    params = params._replace(recurrent=params.recurrent / np.sqrt(200))

    @jax.jit
    def both(params, state0, xs):
        arguments = step, params, state0, xs, lambda states: jnp.sum(states[-1])
        jacobians = bptt.jacobians(*arguments[:4])
        return bptt.gradient_flow(*arguments, num=3), jacobians, bptt.product_log_norms(jacobians)

    flow, jacobians, products = both(params, state0, xs)
    assert not flow.spectra.complete
    np.testing.assert_allclose(flow.products.log_norms, products, atol=1e-3)
    exact = np.linalg.svd(jacobians, compute_uv=False)[:, :3]
    np.testing.assert_allclose(flow.spectra.singular_values, exact, rtol=1e-3)
    radius = np.max(np.abs(np.linalg.eigvals(jacobians)), axis=1)
    np.testing.assert_allclose(np.abs(flow.spectra.eigenvalues[:, 0]), radius, rtol=1e-2)


def test_leading_values_of_special_maps():
    """Orthogonal, zero, rank one, nilpotent, and beyond the range of float32."""
    c, s = np.cos(0.7), np.sin(0.7)
    cases = {
        "orthogonal": ([[c, -s], [s, c]], np.zeros(STEPS), "steady"),
        "zero": (np.zeros((2, 2)), np.full(STEPS, -np.inf), "vanishing"),
        "rank one": ([[0.5, 0.5], [0.5, 0.5]], np.zeros(STEPS), "steady"),
        "nilpotent": ([[0, 1], [0, 0]], np.append(np.full(STEPS - 1, -np.inf), 0.0), "vanishing"),
        "huge": (1e30 * EYE, BACK * np.log(1e30), "exploding"),
    }

    @jax.jit
    @jax.vmap
    def measure(a):
        return bptt.gradient_flow(
            linear_step, a, jnp.zeros(2), None, lambda states: jnp.sum(states[-1]), length=STEPS, num=2
        )

    flows = measure(jnp.asarray([a for a, _, _ in cases.values()], jnp.float32))
    for k, (name, (a, norms, verdict)) in enumerate(cases.items()):
        flow = jax.tree.map(lambda x, k=k: x[k], flows)
        assert flow.verdict == verdict, name
        np.testing.assert_allclose(flow.products.log_norms, norms, rtol=1e-6, atol=1e-5, err_msg=name)
        exact, size = np.linalg.svd(a, compute_uv=False), np.linalg.norm(a, 2)
        np.testing.assert_allclose(
            flow.spectra.singular_values, np.tile(exact, (STEPS, 1)), atol=1e-6 * size, err_msg=name
        )
        moduli = np.sort(np.abs(np.linalg.eigvals(a)))[::-1]
        np.testing.assert_allclose(
            np.abs(flow.spectra.eigenvalues),
            np.tile(moduli, (STEPS, 1)),
            rtol=1e-6,
            atol=(2e-3 if name == "nilpotent" else 1e-6) * size,  # the square root of what one rounding does
        )


def test_num_beyond_the_state():
    with pytest.raises(ValueError, match="num: expected at most 2, the numbers of the state, got 3"):
        bptt.gradient_flow(linear_step, EYE, np.ones(2), None, lambda s: jnp.sum(s), length=3, num=3)


def error_at(k, adjoints, weights):
    """dl/dh_k of `weighted_loss` as a real vector: ``(1 + Re, 1/2 + Im)``."""
    leaves = [np.ravel(np.asarray(a)[k]) for a in jax.tree.leaves(adjoints.states)]
    parts = [part for a in leaves for part in ((1 + a.real, 0.5 + a.imag) if np.iscomplexobj(a) else (1 + a,))]
    return np.asarray(weights)[k] * np.concatenate(parts)


def test_memory():
    """At D = 256, T = 4000 all Jacobians are 1 GB; what the compiled function takes is 15 times less."""
    n, steps = 256, 4000
    step, params = bptt.rnn(n).step, cell_params("rnn", jnp.float32, n)

    def flow(params, h0, xs):
        return bptt.gradient_flow(step, params, h0, xs, lambda states: jnp.sum(states[-1]))

    compiled = jax.jit(flow).lower(params, np.zeros(n, np.float32), np.zeros((steps, 2), np.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * steps * n * n / 15


@pytest.fixture(scope="module")
def batch():
    """Four sequences by their matrices: two vanish, one explodes, one is steady."""
    matrices = jnp.asarray([0.5, 0.6, 2.0, 0.95], jnp.float32)[:, None, None] * jnp.eye(2)[None]

    def flow(a):
        return bptt.gradient_flow(
            linear_step, a, jnp.ones(2), None, lambda states: jnp.sum(states[-1]), length=STEPS
        )

    return jax.jit(jax.vmap(flow))(matrices)


def test_sequences_too_short_to_measure_are_left_out_of_a_summary():
    """One of a single step has no rate; a rate that is NaN because the states are spoils the mean."""

    def summary(lengths, first=1.0, step=linear_step):
        masks = jnp.asarray(np.arange(STEPS) < np.asarray(lengths)[:, None])
        sequences = bptt.Sequence(None, mask=masks)
        starts = jnp.ones((len(lengths), 2)).at[0].set(first)
        flow = jax.vmap(lambda h, xs: bptt.gradient_flow(step, 0.5 * jnp.eye(2), h, xs, lambda hs: jnp.sum(hs[-1])))
        return flow(starts, sequences).summary()

    found = summary([STEPS, 1, STEPS])
    assert found["verdicts"] == {"unmeasured": 1, "vanishing": 2}
    np.testing.assert_allclose([found["growth_rate"][k] for k in ("mean", "median")], np.log(0.5), rtol=1e-5)
    np.testing.assert_allclose(found["growth_rate"]["std"], 0, atol=1e-6)
    assert found["horizon"]["median"] == 10
    bad = summary([STEPS, 1, STEPS], np.nan, lambda w, h, _: jnp.tanh(w @ h))
    assert np.isnan(bad["growth_rate"]["mean"])
    assert np.isnan(summary([1, 1])["growth_rate"]["mean"])


def test_batch_has_a_mean_and_a_spread(batch):
    assert batch.verdicts.tolist() == ["vanishing", "vanishing", "exploding", "steady"]
    assert batch.verdict == "vanishing"
    rates = np.log([0.5, 0.6, 2.0, 0.95])
    summary = batch.summary()
    assert summary["verdict"] == "vanishing"
    assert summary["verdicts"] == {"steady": 1, "vanishing": 2, "exploding": 1}
    np.testing.assert_allclose(summary["growth_rate"]["mean"], rates.mean(), rtol=1e-5)
    np.testing.assert_allclose(summary["growth_rate"]["std"], rates.std(), rtol=1e-5)
    np.testing.assert_allclose(summary["growth_rate"]["median"], np.sort(rates)[1], rtol=1e-5)
    np.testing.assert_allclose(summary["end_gain"]["q75"], STEPS * np.log(0.95), rtol=1e-5)
    np.testing.assert_allclose(summary["spectral_norm"]["mean"], np.mean([0.5, 0.6, 2.0, 0.95]), rtol=1e-5)
    np.testing.assert_allclose(summary["spectral_radius"]["std"], np.std([0.5, 0.6, 2.0, 0.95]), rtol=1e-5)
    assert summary["horizon"]["mean"] == np.inf
    assert summary["clip_threshold"] == batch.clip_threshold


def test_one_nan_spoils_the_batch(batch):
    finite = np.asarray([True, True, False, True])
    assert replace(batch, numerics=replace(batch.numerics, finite=finite)).verdict == "non-finite"


@pytest.mark.parametrize(
    ("norms", "before", "expected"),
    [
        (np.arange(1.0, 21.0), np.full(20, 1e3), 2.0),  # the 10th percentile
        (np.full(20, 1e30), np.full(20, 0.3), 3.0),  # at most ten times the norm before any Jacobian
        ([np.nan, np.inf, 2.0, np.nan], np.full(4, 1.0), 2.0),  # what overflowed is larger than all
        ([np.nan, np.inf], np.full(2, 0.2), 2.0),
    ],
)
def test_clip_threshold(batch, norms, before, expected):
    """`before`: the norms of what the steps contribute whose states the loss reads."""
    added = np.full((len(before), STEPS), 100.0)
    added[:, -1] = np.log(before)
    flow = replace(
        batch,
        numerics=replace(batch.numerics, params_grad_log_norm=np.log(norms)),
        contributions=replace(batch.contributions, log_norms=added),
        signal=replace(batch.signal, lags=np.tile(BACK, (len(before), 1))),
    )
    np.testing.assert_allclose(flow.clip_threshold, expected, rtol=1e-12)


def test_advice_has_the_measured_numbers():
    tries = linear_flow(0.5 * EYE).advice(gated=False)
    assert "falls to 0.001 in 10 steps of 40" in tries[0]
    flow = linear_flow(2 * EYE)
    tries = flow.advice()
    assert f"{flow.clip_threshold:.2g}" in tries[0]
    assert any("truncate at 9 steps" in line for line in tries)  # 2^9 = 512 < 1000


def test_dtype_follows_the_input(x64):
    """float64 being available does not turn float32 into it; half precision is summed in single."""
    for given, expected in (("float32", "float32"), ("bfloat16", "float32")):
        step, params, state0, xs, _ = EXAMPLES["rnn"](jnp.dtype(given))

        def flow(params, state0, xs, step=step):
            return bptt.gradient_flow(step, params, state0, xs, lambda states: states[-1, 0])

        shapes = jax.eval_shape(flow, params, state0, xs)
        for path, leaf in jax.tree_util.tree_leaves_with_path(replace(shapes, loss=None, threshold=None)):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                assert jnp.finfo(leaf.dtype).dtype == expected, path


def test_growth_as_a_power_of_the_lag_is_no_matter_of_the_weights():
    """A body that moves freely: x' = x + dt v."""
    flow = linear_flow([[1, 20], [0, 1]], steps=400)
    assert flow.verdict == "exploding"
    assert "as lag^1.0" in flow.statement
    tries = " | ".join(flow.advice())
    assert "polynomial, as lag^1.0" in tries
    assert "recommend_gain" not in tries
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[flow] * 3)
    assert "3 exploding; as lag^1.0" in batch.statement


@pytest.mark.parametrize(("a", "conserves"), [([[2, 0], [0, 0.5]], True), (2 * EYE, False)])
def test_motion_without_friction_is_told_from_weights_that_are_too_large(a, conserves):
    tries = " | ".join(linear_flow(a).advice())
    assert ("|det| = 1" in tries) == conserves
    assert ("recommend_gain" in tries) != conserves


def test_what_is_known_of_a_part_of_the_spectrum_is_not_said_of_all():
    """The leading eigenvalue alone is no share that units keep."""

    flow = linear_flow([[0.7, 0], [0, 0.6]])
    assert "keeps 0.65 of itself" in " | ".join(flow.advice())
    part = replace(flow, spectra=replace(flow.spectra, complete=False))
    assert "of itself" not in " | ".join(part.advice())
    free = linear_flow([[2, 0], [0, 0.5]])
    assert "|det|" not in " | ".join(replace(free, spectra=replace(free.spectra, complete=False)).advice())


def test_middle_loss_is_advised_by_the_steps_that_it_can_reach():
    flow = bptt.gradient_flow(lambda p, h, x: 0.5 * h, None, jnp.ones(2), None, lambda s: jnp.sum(s[20]), length=50)
    assert int(flow.reach) == 21
    assert "10 steps of 21" in flow.advice()[0]


def test_no_clipping_threshold_without_a_gradient():
    flow = bptt.gradient_flow(lambda p, h, x: 3.0 * h, None, jnp.ones(2), None, lambda s: jnp.sum(s[-1]), length=20)
    assert flow.verdict == "exploding"
    assert np.isnan(flow.clip_threshold)
    assert not any("clip" in line for line in flow.advice())


@pytest.mark.parametrize("name", covering(["rnn", "lstm"]))
def test_every_segment_is_as_alone_and_padding_changes_nothing(name, x64):
    """Three episodes in one sequence, with padding between and after: gains, products, spectra of each alone."""
    step, params, state0, xs, _ = cell_example(name, jnp.float64, 3, 30)
    spoilt = jnp.full((6, xs.shape[1]), jnp.nan)
    whole = jnp.concatenate([xs[:12], spoilt[:2], xs[12:], spoilt])
    mask = np.r_[np.ones(12, bool), [False] * 2, np.ones(18, bool), [False] * 6]
    resets = np.isin(np.arange(38), [5, 14])

    def loss(states, weights):
        return jnp.sum(weights @ jax.tree.leaves(states)[0])

    @jax.jit
    def measure(xs, weights):
        return bptt.gradient_flow(step, params, state0, xs, loss, args=weights)

    flow = measure(bptt.Sequence(whole, mask=mask, resets=resets), jnp.asarray(mask, float))
    pieces = [(0, 5), (5, 12), (12, 30)]
    real = np.flatnonzero(mask)
    for a, b in (pieces[0], pieces[2]):  # each is compiled by itself
        one = measure(xs[a:b], jnp.ones(b - a))
        at = real[a:b]
        for got, want in (
            (flow.signal.lags[at], one.signal.lags),
            (flow.products.log_norms[at], one.products.log_norms),
            (flow.spectra.singular_values[a:b], one.spectra.singular_values),
            (flow.contributions.log_norms[at], one.contributions.log_norms),
        ):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(flow.signal.lags[real[:5]], [5, 4, 3, 2, 1])
    assert np.isnan(flow.products.log_norms[~mask]).all()
    assert (flow.reach, flow.cut_lag) == (18, -1)
    np.testing.assert_array_equal(flow.spectra.steps[:30], real + 1)
    assert np.all(flow.spectra.steps[30:] == -1)
    # The slope that all three lines have in common.
    parts = [np.r_[0.0, flow.signal.log_gains[real[a:b]][::-1]] for a, b in pieces]
    centred = [(np.arange(len(g)) - (len(g) - 1) / 2, g) for g in parts]
    rate = sum(lag @ g for lag, g in centred) / sum(lag @ lag for lag, _ in centred)
    np.testing.assert_allclose(flow.growth_rate, rate, rtol=1e-9)


def test_padding_at_the_end_changes_nothing():
    step, params, state0, xs, _ = cell_example("gru", jnp.float32, 3, 40)
    padded = bptt.Sequence(jnp.concatenate([xs, jnp.full((60, xs.shape[1]), jnp.nan)]), mask=np.arange(100) < 40)
    measure = jax.jit(lambda xs: bptt.gradient_flow(step, params, state0, xs, lambda s: jnp.sum(s[-1]), stride=7))
    alone, flow = measure(xs), measure(padded)
    for name in ("growth_rate", "growth_rate_error", "horizon", "horizon_error", "end_gain", "peak_gain", "reach"):
        np.testing.assert_allclose(getattr(flow, name), getattr(alone, name), rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(
        flow.spectra.eigenvalues[: len(alone.spectra.steps)], alone.spectra.eigenvalues, rtol=1e-4
    )
    np.testing.assert_array_equal(flow.spectra.steps, np.r_[alone.spectra.steps, np.full(15 - 6, -1)])
    assert flow.verdict == alone.verdict


def test_the_error_of_the_rate_is_the_spread_of_rates(x64):
    """Of random walks whose steps resemble their neighbours."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((400, 300))
    for k in range(1, 300):
        noise[:, k] += 0.5 * noise[:, k - 1]
    measure = jax.jit(
        jax.vmap(lambda x: bptt.gradient_flow(growing_step, None, jnp.ones(1), x, last_sum, spectra=False))
    )
    flow = measure(jnp.asarray(0.1 * noise[:, 50:, None] - 0.02))
    ratio = np.sqrt(np.mean(flow.growth_rate_error**2)) / np.std(flow.growth_rate)
    assert 0.8 < ratio < 1.25
    np.testing.assert_allclose(np.mean(flow.growth_rate), -0.02, atol=4 * np.std(flow.growth_rate) / 20)


@pytest.mark.parametrize(("frequency", "resemble"), [(0.2, True), (0.5, False)])
def test_the_error_of_the_rate_by_batches(x64, frequency, resemble):
    """Of two segments: sqrt(n) consecutive increments a batch, and what each passes on to the next."""
    increments = np.sin(frequency * np.arange(STEPS))
    begins = np.arange(STEPS) == 12
    sequence = bptt.Sequence(jnp.asarray(increments[:, None]), resets=jnp.asarray(begins))
    flow = bptt.gradient_flow(growing_step, None, jnp.ones(1), sequence, jnp.sum, spectra=False)
    lengths = [12, STEPS - 12]
    places = np.concatenate([np.arange(n, 0, -1) for n in lengths])
    sizes = np.repeat(lengths, lengths)
    shares = places * (sizes + 1 - places) / 2 / sum(n * (n + 1) * (n + 2) / 12 for n in lengths)
    rate = shares @ increments
    np.testing.assert_allclose(flow.growth_rate, rate, rtol=1e-9)
    edges = np.arange(0, STEPS, round(np.sqrt(STEPS)))
    sums = np.add.reduceat(shares * (increments - rate), edges)
    passed_on = sums[1:] @ sums[:-1]
    assert (passed_on > 0) == resemble
    held = np.sum(np.add.reduceat(shares, edges) ** 2)
    variance = (sums @ sums + 2 * max(passed_on, 0)) / (1 - held)
    np.testing.assert_allclose(flow.growth_rate_error, np.sqrt(variance), rtol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_rounding_is_no_growth(x64, dtype):
    """What an isometry's adjoints are off is the same at every step, of every sequence, and has no scatter."""
    turn = jnp.asarray(np.linalg.qr(scattered_before((8, 8)))[0], dtype)
    starts = jnp.ones((3, 8), dtype)
    measure = jax.jit(
        jax.vmap(lambda h0: bptt.gradient_flow(linear_step, turn, h0, None, last_sum, length=400, spectra=False))
    )
    flow = measure(starts)
    assert np.all(flow.growth_rate != 0)
    for found in (flow, flow.pooled()):
        assert np.all(np.abs(found.growth_rate) <= found.growth_rate_error)
        assert np.all(found.growth_rate_error <= 10 * jnp.finfo(dtype).eps)


def test_sequences_are_pooled_by_the_weight_of_their_lines(x64):
    """The longer ones tell more; those that tell nothing are left out."""
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((4, 20, 1)))
    masks = np.arange(20) < np.asarray([5, 10, 20, 1])[:, None]

    def measure(xs, mask):
        sequence = bptt.Sequence(xs, mask=mask)
        return bptt.gradient_flow(growing_step, None, jnp.ones(1), sequence, last_sum, spectra=False)

    flow = jax.jit(jax.vmap(measure))(noise, masks)
    rates, weights = (np.asarray(a)[:3] for a in (flow.growth_rate, flow.signal.weight))
    assert np.isnan(flow.growth_rate[3])
    rate = weights @ rates / weights.sum()
    scatter = np.sqrt(np.sum((weights * (rates - rate)) ** 2) * 3 / 2) / weights.sum()
    pooled = flow.pooled()
    np.testing.assert_allclose([pooled.growth_rate, pooled.growth_rate_error], [rate, scatter], rtol=1e-12)
    assert pooled.sequences == 3


def growing_step(w, h, x):
    return h * jnp.exp(x)


def last_sum(states):
    return jnp.sum(states[-1])


def test_a_small_penalty_on_later_states_is_no_reading():
    flow = linear_flow(0.8 * EYE, weights=one_hot(20) + 1e-12 * np.ones(STEPS))
    plain = linear_flow(0.8 * EYE, weights=one_hot(20))
    assert int(flow.reach) == 21
    np.testing.assert_allclose(flow.growth_rate, plain.growth_rate, rtol=1e-5)
    np.testing.assert_allclose(flow.horizon, plain.horizon, rtol=1e-4)


def test_a_small_weight_is_a_reading_in_a_segment_that_has_no_larger_one():
    weights = jnp.asarray(one_hot(14) + 1e-12 * one_hot(STEPS - 1), jnp.float32)
    sequence = bptt.Sequence(jnp.zeros((STEPS, 2)), resets=jnp.arange(STEPS) == 15)
    arguments = (
        linear_step,
        0.8 * jnp.eye(2),
        jnp.ones(2),
        sequence,
        lambda states: weights @ jnp.sum(states, axis=1),
    )
    flow = bptt.gradient_flow(*arguments, spectra=False)
    np.testing.assert_array_equal(flow.signal.lags, np.r_[15:0:-1, STEPS - 15 : 0 : -1])


def test_the_dense_path_of_a_large_state_is_refused_with_its_cost():
    with pytest.raises(ValueError, match=r"D = 16384 numbers.*1\.5e\+14 operations.*spectra=False"):
        bptt.gradient_flow(lambda p, h, x: h, None, jnp.zeros(16384), None, lambda s: jnp.sum(s[-1]), length=2)
    flow = bptt.gradient_flow(
        lambda p, h, x: 0.5 * h, None, jnp.ones(16384), None, lambda s: jnp.sum(s[-1]), length=20, spectra=False
    )
    assert flow.verdict == "vanishing"
    assert flow.products is None
    assert flow.spectra is None


def test_a_batch_of_two_axes_has_a_verdict_for_each_of_the_first():
    gains = jnp.asarray([0.5, 1.0, 2.0])

    def measure(w, h0):
        return bptt.gradient_flow(
            lambda w, h, x: w * h, w, h0, None, lambda s: jnp.sum(s[-1]), length=STEPS, spectra=False
        )

    flow = jax.jit(jax.vmap(jax.vmap(measure, (None, 0)), (0, None)))(gains, jnp.ones((4, 2)))
    assert flow.verdict.tolist() == ["vanishing", "steady", "exploding"]
    assert flow.verdicts.shape == (3, 4)
    assert [line.startswith("4 sequences") for line in flow.statement.splitlines()] == [True] * 3
    assert [s["verdict"] for s in flow.summary()] == flow.verdict.tolist()
    assert len(flow.advice()) == 3
    np.testing.assert_allclose(flow.pooled().growth_rate, np.log(gains), atol=1e-6)


def test_what_reads_like_a_sentence_is_short():
    flow = linear_flow(0.9 * EYE)
    lines = repr(flow).splitlines()
    assert len(lines) <= 10
    assert "horizon 65.6" in lines[0]
    assert "extrapolated" in lines[0]


def test_args_and_aux_and_a_step_without_forward_mode():
    @jax.custom_vjp
    def spike(v):
        return jnp.where(v > 0, 1.0, 0.0)

    spike.defvjp(lambda v: (spike(v), v), lambda v, g: (g / (1 + 10 * jnp.abs(v)) ** 2,))

    def step(w, h, x):
        return 0.9 * h + w * spike(h - 0.5) + x

    def loss(states, args):
        return args @ states[-1], jnp.sum(states)

    flow = bptt.gradient_flow(step, 0.1, jnp.zeros(2), jnp.ones((12, 1)), loss, args=jnp.ones(2), has_aux=True)
    assert flow.mode == "reverse"
    assert np.isfinite(flow.aux)
    assert np.isfinite(flow.growth_rate)
    with pytest.raises(TypeError, match="while_loop"):
        bptt.gradient_flow(
            lambda w, h, x: jax.lax.while_loop(lambda h: jnp.sum(h) > 1, lambda h: w * h, h),
            0.5, jnp.ones(2), None, lambda s: jnp.sum(s[-1]), length=3,
        )  # fmt: skip


def test_nothing_but_padding_is_unmeasured():
    """Numbers and figure say so."""
    cell = bptt.rnn(2)
    params, h0, mask = cell.init(jax.random.key(0), 1), cell.initial_state(), np.zeros(3, bool)
    flow = bptt.gradient_flow(
        cell.step, params, h0, bptt.Sequence(jnp.ones((3, 1)), mask=mask), lambda h: jnp.sum(h[-1])
    )
    assert flow.verdict == "unmeasured"
    assert np.isnan(flow.summary()["spectral_norm"]["median"])
    plot_gradient_flow(flow)


def test_advice_against_vanishing_is_of_those_that_vanish() -> None:
    """Two kinds that together are more than they, with no horizon at all, are not what it speaks of."""

    def flow(gain, length):
        sequence = bptt.Sequence(jnp.full((40, 1), gain), mask=jnp.arange(40) < length)
        return bptt.gradient_flow(lambda _, h, x: x * h, None, jnp.ones(1), sequence, lambda states: states[-1, 0])

    gains = jnp.array([0.5, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5])
    flows = jax.vmap(flow)(gains, jnp.array([40, 30, 20, 5, 5, 22, 22]))
    assert flows.verdicts.tolist() == ["vanishing"] * 3 + ["steady"] * 2 + ["exploding"] * 2
    assert flows.verdict == "vanishing"
    assert "the signal falls to 0.001 in 10 steps of 30: nothing older is learned" in flows.advice()
