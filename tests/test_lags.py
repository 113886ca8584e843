"""The gradient's parts by lag, against numbers known by hand; the contract has them on every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract_cases import Case, at_step, loss_args, real_vector
from contract_spine import only_loss
from equinox.internal import while_loop
from oracles import relative_error
from registry import REGISTRY
from slices import covering

import bptt_jax as bptt
from bptt_jax.analysis.lags import gradient_by_lag


def linear(w, h, x):
    return w * h + x


def last(states):
    return states[-1]


def test_parts_by_hand(x64) -> None:
    """w h + x, read at the end: the part of lag k is ``w^k h_{T-1-k}``."""
    xs = np.random.default_rng(0).standard_normal(6)
    states = [0.3]
    for x in xs:
        states.append(0.7 * states[-1] + x)
    found = gradient_by_lag(linear, 0.7, jnp.asarray(0.3), jnp.asarray(xs), last, parts=(5, 0, 3))
    parts = np.asarray([0.7**k * states[5 - k] for k in range(6)])
    np.testing.assert_allclose(found.parts.value, parts[[5, 0, 3]], rtol=1e-13)
    np.testing.assert_allclose(found.log_norms, np.log(np.abs(parts)), rtol=1e-12)
    np.testing.assert_allclose(found.shares, parts / parts.sum(), rtol=1e-12)
    assert float(found.whole_log_norm) == pytest.approx(np.log(abs(parts.sum())))
    short = gradient_by_lag(linear, 0.7, jnp.asarray(0.3), jnp.asarray(xs), last, longest=2)
    assert short.parts is None
    np.testing.assert_allclose(short.shares, found.shares[:2], rtol=1e-12)


@pytest.mark.parametrize("w", covering([0.9, 2.0], 0.9))
def test_log_norms_beyond_the_range_of_the_dtype(w) -> None:
    """In float32, of w h + b at the origin: ``k log w``, down to 1e-229 and up to 1e1505."""
    found = gradient_by_lag(lambda b, h, x: w * h + b, 0.0, 0.0, None, last, length=5000)
    np.testing.assert_allclose(found.log_norms, np.arange(5000) * np.log(w), rtol=1e-6)
    assert float(jnp.sum(found.shares)) == pytest.approx(1, rel=1e-5)


def test_lags_are_real_steps_and_end_at_resets() -> None:
    """Of w h + 1 from 1: before each step h is 1, 1.5, 1.75 in a piece; one loss at the end of each."""
    mask = jnp.asarray([1, 0, 1, 1, 0, 1, 1, 0], bool)
    resets = jnp.asarray([0, 0, 0, 0, 1, 0, 0, 0], bool)
    sequence = bptt.Sequence(jnp.where(mask, 1, jnp.nan), mask=mask, resets=resets)
    found = gradient_by_lag(linear, 0.5, 1.0, sequence, lambda states: states[3] + states[7], parts=range(8))
    np.testing.assert_allclose(found.parts.value, [1.75 + 1.5, 0.75 + 0.5, 0.25, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.log_norms[3:], -np.inf)


@pytest.mark.parametrize("name", covering((name for name, entry in REGISTRY.items() if entry.pulls), "complex"))
def test_parts_sum_to_the_gradient(name) -> None:
    """Of every step, with padding and resets, to a few roundings of the largest part."""
    case = Case(name, REGISTRY[name].dtypes[0], "both")
    plan = case.plans[0]
    with jax.enable_x64(case.dtype == "float64"):
        given, args = (*case.arguments(plan), only_loss), loss_args(plan.weights, case.dtype)
        found = gradient_by_lag(*given, args=args, parts=range(plan.steps)).parts.value
        parts = np.stack([real_vector(at_step(found, lag)) for lag in range(plan.steps)])
        whole = real_vector(bptt.adjoints(*given, args=args).params_grad)
    np.testing.assert_allclose(
        parts.sum(axis=0), whole, rtol=0, atol=case.tolerance * np.max(np.abs(parts), initial=0)
    )


@pytest.mark.exhaustive
def test_truncated_gradients_are_the_first_parts(x64) -> None:
    cell = bptt.gru(3)
    given = cell.step, cell.init(jax.random.key(0), 2), cell.initial_state(), jnp.ones((7, 2))

    def loss(states):
        return jnp.sum(jnp.square(states))

    parts = gradient_by_lag(*given, loss, parts=range(7)).parts.value
    for window in (1, 4, 7):
        first = jax.tree.map(lambda a, window=window: a[:window].sum(axis=0), parts)
        assert relative_error(first, bptt.estimators.tbptt(*given, loss, k1=1, k2=window)) < 1e-13


def test_a_step_with_a_loop_that_ends_when_it_is_done() -> None:
    """As that of an adaptive solver: its backward pass takes other numbers of rounds at other steps."""

    def by_loop(p, h, x):
        def again(carry):
            return carry[0] + 1, jnp.tanh(p * carry[1] + x[1])

        start = jnp.zeros((), jnp.int32), h
        return while_loop(lambda carry: carry[0] < x[0], again, start, kind="checkpointed", checkpoints=2)[1]

    def unrolled(p, h, x):
        for k in range(3):
            h = jnp.where(k < x[0], jnp.tanh(p * h + x[1]), h)
        return h

    def square(states):
        return jnp.sum(jnp.square(states[-1]))

    given = jnp.array([0.9, -1.1]), jnp.ones(2), (jnp.array([1, 3, 2]), jnp.array([0.1, -0.2, 0.3])), square
    found, expected = (gradient_by_lag(step, *given, parts=range(3)) for step in (by_loop, unrolled))
    np.testing.assert_allclose(found.parts.value, expected.parts.value, rtol=1e-5)
    np.testing.assert_allclose(found.shares, expected.shares, rtol=1e-4)
    by_input, of_input = (bptt.adjoints(step, *given, inputs=True).xs_grad[1] for step in (by_loop, unrolled))
    np.testing.assert_allclose(by_input, of_input, rtol=1e-5)


def test_what_it_says() -> None:
    given = linear, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0]
    assert (
        "half of the gradient comes from the loss steps themselves, the farthest part from 2 steps back\n"
        in repr(gradient_by_lag(*given))
    )
    assert "from the loss steps themselves\n" in repr(gradient_by_lag(*given, longest=1))
    assert "half of the gradient comes from at most 1 step back" in repr(gradient_by_lag(linear, 1.2, *given[2:]))
    nothing = gradient_by_lag(*given[:4], lambda states: 0 * states[0, 0])
    assert "the gradient is zero up to a lag of 3\n" in repr(nothing)
    assert np.all(np.isnan(nothing.shares))


def test_what_it_says_of_a_gradient_that_is_lost_beside_the_largest_adjoint() -> None:
    """Of ``dL/db = 0.1^199``, all from the first step: no number of single precision, nor beside dL/dh_T = 1."""
    first = jnp.zeros((200, 1)).at[0].set(1.0)
    given = lambda b, h, x: 0.1 * h + b * x, 0.5, jnp.zeros(1), first, lambda states: states[-1, 0]
    found = gradient_by_lag(*given)
    np.testing.assert_allclose(found.log_norms, [-np.inf] * 199 + [199 * np.log(0.1)], rtol=1e-6)
    assert np.all(np.isnan(found.shares))
    said = (
        f"the gradient underflows or cancels: its largest part, at lag 199, has log norm {199 * np.log(0.1):.4g}\n"
    )
    assert f"GradientByLag: {said}" in repr(found)
    assert "the gradient is zero up to a lag of 49\n" in repr(gradient_by_lag(*given, longest=50))


def test_what_it_says_of_a_batch_in_which_gradients_are_lost() -> None:
    first = jnp.zeros((200, 1)).at[0].set(1.0)

    def found(scales):
        def of_one(scale):
            return gradient_by_lag(step, 0.5, jnp.zeros(1), first + scale, lambda states: states[-1, 0])

        return repr(jax.vmap(of_one)(jnp.asarray(scales))).splitlines()[0].partition(": ")[2]

    def step(b, h, x):
        return 0.1 * h + b * x

    assert found([0.0, 0.0]) == "2 of 2 underflow or cancel"
    assert found([0.0, 1.0]).startswith("1 of 2 underflow or cancel; half of the gradient comes from the loss ")
    assert found([1.0, 1.0]) == "half of the gradient comes from the loss steps themselves (median of 2)"


def test_what_it_says_of_parts_that_cancel() -> None:
    given = lambda b, h, x: h + b, 0.5, jnp.zeros(1), jnp.ones(2), lambda states: states[1, 0] - 2 * states[0, 0]
    found = gradient_by_lag(*given)
    np.testing.assert_array_equal([found.log_norms[0], found.log_norms[1], found.whole_log_norm], [0, 0, -np.inf])
    assert "the gradient underflows or cancels: its largest part, at lag 0, has log norm 0\n" in repr(found)


def test_what_it_says_of_a_batch() -> None:
    def of(weights, longest, xs, h):
        found = jax.vmap(lambda w: gradient_by_lag(linear, w, h, xs, last_one, longest=longest))
        return found(jnp.asarray(weights))._headline()

    def last_one(states):
        return states[-1, 0]

    zeros, one, early = jnp.zeros((3, 1)), jnp.ones(1), jnp.zeros((30, 1)).at[0].set(1.0)
    half = "half of the gradient comes from at most 1 step back (median of 2)"
    assert of([1.2, 1.2], 3, zeros, one) == half
    assert of([1.2, 1.2, jnp.nan], 3, zeros, one) == f"1 of 3 not finite; {half}"
    assert of([jnp.nan, jnp.nan], 2, zeros, one) == "2 of 2 not finite"
    assert of([1.2, 1.2], 3, zeros, 0 * one) == "2 of 2 zero up to a lag of 2"
    assert of([1.2, 1.3], 2, early, 0 * one) == "of no gradient half comes from at most 1 step back"
    assert of([1.2, jnp.nan], 2, early, 0 * one) == (
        "1 of 2 not finite; of no other gradient half comes from at most 1 step back"
    )


def test_what_it_says_of_a_gradient_that_is_not_finite_or_from_farther_away() -> None:
    given = linear, 2.0, jnp.ones(1), jnp.zeros((200, 1)), lambda states: states[-1, 0]
    assert repr(gradient_by_lag(*given, longest=3)).startswith("GradientByLag: the gradient is not finite")
    passed_on = (
        lambda w, h, x: jnp.stack([w * x, h[0]]),
        0.5,
        jnp.zeros(2),
        jnp.ones(4),
        lambda states: states[-1, 1],
    )
    assert "nothing of the gradient comes from the loss steps" in repr(gradient_by_lag(*passed_on, longest=1))
    grown = lambda b, h, x: 2 * h + b, 0.5, jnp.zeros(1), jnp.ones(8), lambda states: states[-1, 0]
    assert "less than half of the gradient comes from at most 2 steps" in repr(gradient_by_lag(*grown, longest=3))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        (2, TypeError, "parts: expected a sequence of integers, got int"),
        ("02", TypeError, "parts: expected a sequence of integers, got str"),
        ((1.0,), TypeError, "parts: expected integers, got float"),
        ((True,), TypeError, "parts: expected integers, got bool"),
        ((2,), ValueError, "parts: expected lags of at least 0 and below 2, got 2"),
        ((-1,), ValueError, "parts: expected lags of at least 0 and below 2, got -1"),
    ],
)
def test_bad_parts(parts, error, message) -> None:
    with pytest.raises(error, match=message):
        gradient_by_lag(linear, 0.5, 0.0, jnp.ones(4), last, longest=2, parts=parts)
