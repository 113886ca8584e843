"""Exponents where steps erase, hold, overflow or are NaN, against closed forms; and what is made of them."""

from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slices import covering

import bptt_jax as bptt

T, WARMUP = 120, 40
NAN = (np.nan, np.nan)
LOG = np.log
INF = np.inf


def apply(p: Any, h: Any, x: Any) -> Any:
    return x @ h


class Case(NamedTuple):
    """What is done to a product of 120 diagonal matrices, and what it must give.

    Attributes:
      rates: of the two units.
      at: steps whose matrix is another; None: all of them.
      matrix: the other.
      exponents: two; the first of them with ``num=1``.
      first_nonfinite: the step.
      mask, resets: real steps, and steps before which the state is reset, if there are.
    """

    rates: tuple[float, float]
    exponents: tuple[float, float]
    at: Any = ()
    matrix: Any = np.zeros((2, 2))
    first_nonfinite: int = -1
    mask: Any = None
    resets: Any = None
    warmup: int = WARMUP
    state: float = 0.0

    def matrices(self) -> np.ndarray:
        xs = np.broadcast_to(np.diag(self.rates), (T, 2, 2)).copy()
        xs[slice(None) if self.at is None else list(self.at)] = self.matrix
        return xs

    def sequence(self, dtype: Any) -> bptt.Sequence:
        def flags(steps: Any) -> Any:
            return None if steps is None else jnp.asarray(np.isin(np.arange(T), list(steps)))

        return bptt.Sequence(jnp.asarray(self.matrices(), dtype), mask=flags(self.mask), resets=flags(self.resets))


APART, TWO = (0.1, 0.9), (0.5, 0.9)
KEPT = (LOG(0.9), LOG(0.5))
FAR = (LOG(0.9), LOG(0.1))
FIRST, SECOND = np.diag([0.1, 0.0]), np.diag([0.0, 0.9])  # a step that keeps one unit alone
POOLED = (25 * LOG(0.5) + 45 * LOG(0.9)) / 70
TURN = np.array([[0.6, -0.8], [0.8, 0.6]])
CASES = {
    # Steps that erase.
    "nothing": Case(TWO, KEPT),
    "all in the warm-up": Case(TWO, KEPT, [1]),
    "all in the warm-up of a growing one": Case((0.5, 1.3), (LOG(1.3), LOG(0.5)), [1]),
    "all, thrice in the warm-up": Case(TWO, KEPT, [0, 1, 5]),
    "all in the first step": Case((0.7, 0.7), (-INF, -INF), [0], warmup=0),
    "all in the last step of the warm-up": Case((0.7, 0.7), (LOG(0.7),) * 2, [39]),
    "all in the first measured step": Case(TWO, (-INF, -INF), [40]),
    "all in a measured step": Case(TWO, (-INF, -INF), [80]),
    "all in the last step": Case(TWO, (-INF, -INF), [119]),
    "all at every step": Case((0.0, 0.0), (-INF, -INF)),
    "all at every other step": Case(TWO, (-INF, -INF), range(0, T, 2)),
    "one unit, always": Case((0.0, 0.9), (LOG(0.9), -INF)),
    "the slower unit in the warm-up": Case(APART, FAR, [1], SECOND),
    "the faster unit in the warm-up": Case(APART, FAR, [1], FIRST),
    "the slower unit in a measured step": Case(TWO, (LOG(0.9), -INF), [80], np.diag([0.0, 0.9])),
    "one after the other in the warm-up": Case(APART, FAR, [1, 4], np.diag([0.1, 0.0])),
    "rank one, turned, in the warm-up": Case(APART, FAR, [1], np.outer([0.6, 0.8], [1.0, -1.0])),
    "rank one at every step": Case(TWO, (0.0, -INF), None, np.full((2, 2), 0.5)),
    "nilpotent at every step": Case(TWO, (-INF, -INF), None, np.array([[0.0, 1.0], [0.0, 0.0]])),
    "nilpotent in the warm-up": Case(APART, FAR, [1, 2], np.array([[0.0, 1.0], [0.0, 0.0]])),
    # Resets.
    "all at a reset": Case(TWO, KEPT, [60], resets=[60], warmup=25),
    "all at a reset without a warm-up": Case((0.7, 0.7), (LOG(0.7),) * 2, [60], resets=[60], warmup=0),
    "a reset at the start": Case(TWO, KEPT, resets=[0], warmup=25),
    "two resets, one piece shorter than the warm-up": Case(TWO, KEPT, range(50, 60), resets=[50, 60], warmup=25),
    "pieces of different rates": Case(
        (0.5, 0.5), (POOLED, POOLED), range(50, T), 0.9 * np.eye(2), resets=[50], warmup=25
    ),
    "a reset before every step": Case((0.7, 0.7), (LOG(0.7),) * 2, resets=range(T), warmup=0),
    "a reset in padding": Case(TWO, KEPT, [63], mask=[*range(60), *range(62, T)], resets=[60], warmup=25),
    # Steps that hold.
    "padding at the end": Case(TWO, KEPT, mask=range(80)),
    "padding at the start": Case(TWO, KEPT, mask=range(30, T)),
    "every third step is padding": Case(TWO, KEPT, mask=[t for t in range(T) if t % 3]),
    "zeros in the padding": Case(TWO, KEPT, range(90, T), mask=range(90)),
    "NaN in the padding": Case(TWO, KEPT, range(90, T), np.nan, mask=range(90)),
    "NaN in padding at the start": Case(TWO, KEPT, range(20), np.nan, mask=range(20, T), state=1.0),
    "all is padding": Case(TWO, NAN, mask=[]),
    "no longer than the warm-up": Case(TWO, NAN, mask=range(WARMUP)),
    "the identity": Case((1.0, 1.0), (0.0, 0.0), state=1.0),
    "a rotation": Case(TWO, (0.0, 0.0), None, TURN, state=1.0),
    # Numbers at the ends of floats.
    "growth, the state at zero": Case((1e10, 1e10), (LOG(1e10),) * 2),
    "growth as large as a float": Case((1e30, 1e30), (LOG(1e30),) * 2),
    "decay, the state underflows": Case((1e-10, 1e-10), (LOG(1e-10),) * 2, state=1.0),
    "decay as small as a float": Case((1e-30, 1e-30), (LOG(1e-30),) * 2, state=1.0),
    "growth and decay by turns": Case((1e20, 1e20), (0.0, 0.0), range(0, T, 2), 1e-20 * np.eye(2), state=1.0),
    "the state overflows": Case((1e150, 1e150), NAN, first_nonfinite=2, state=1.0),
    # Steps that are not finite.
    "NaN in a measured step": Case(TWO, NAN, [60], np.nan, first_nonfinite=60, state=1.0),
    "NaN in the warm-up": Case(TWO, NAN, [5], np.nan, first_nonfinite=5, state=1.0),
    "NaN in the first step": Case(TWO, NAN, [0], np.nan, first_nonfinite=0),
    "NaN in the last step": Case(TWO, NAN, [119], np.nan, first_nonfinite=119),
    "infinity": Case(TWO, NAN, [60], np.inf, first_nonfinite=60, state=1.0),
    "NaN before a reset": Case(TWO, NAN, [5], np.nan, first_nonfinite=5, resets=[60], warmup=25),
    "NaN from the start": Case(TWO, NAN, first_nonfinite=0, state=np.nan),
}


# What is compiled serves all sequences that have the same parts; twice for each number of exponents is enough.
NUMBERS = covering(product([1, 2], ["float32", "float64"]), (1, "float32"), (2, "float64"))


@pytest.mark.parametrize(("num", "dtype"), NUMBERS, indirect=["dtype"])
@pytest.mark.parametrize("name", CASES)
def test_closed_forms(name, num, dtype) -> None:
    case = CASES[name]
    if name == "the state overflows" and dtype == jnp.float32:
        case = case._replace(rates=(1e20, 1e20), first_nonfinite=1)
    state0 = jnp.full(2, case.state, dtype)
    found = bptt.lyapunov_exponents(apply, None, state0, case.sequence(dtype), num=num, warmup=case.warmup)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-9
    assert found.exponents.dtype == dtype
    np.testing.assert_allclose(found.exponents, case.exponents[:num], rtol=tolerance, atol=tolerance)
    assert int(found.first_nonfinite) == case.first_nonfinite
    assert found.statement.startswith("not finite from step") == (case.first_nonfinite >= 0)


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 30


@pytest.mark.parametrize(
    ("steps", "dtype"),
    covering(product([40, 400], ["float32", "float64"]), (40, "float64"), (400, "float32")),
    indirect=["dtype"],
)
def test_the_faster_unit_in_a_measured_step(steps, dtype) -> None:
    """What is left of a vector is its slower part: of the first direction, until that is below the rounding; then
    the first direction is lost, and the second one's rate is the slower unit's."""
    rates, at = np.array([0.5, 0.9]), steps // 2
    xs = np.ones((steps, 2))
    xs[at, 1] = 0
    state0, xs = jnp.zeros(2, dtype), jnp.asarray(xs, dtype)
    frame = np.asarray([[0.8, 0.6], [-0.6, 0.8]], dtype)
    found = bptt.lyapunov_exponents(scaled, jnp.asarray(rates, dtype), state0, xs, initial_frame=frame)
    first, second = frame.T.astype(np.float64)
    # Of the second only what is orthogonal to the first counts: their area over the length of the first.
    area = np.log(np.abs(first[0] * second[1] - first[1] * second[0]))
    part = np.log(np.abs(first[0])) if steps == 40 else area - np.log(np.abs(first[1]))
    tolerance = 1e-3 if dtype == jnp.float32 else 1e-9
    np.testing.assert_allclose(found.exponents, [np.log(0.5) + part / steps, -np.inf], rtol=tolerance)


def scaled(p, h, x):
    return x * p * h


@pytest.mark.parametrize(
    ("num", "segments", "dtype"),
    covering(product([1, 2], [1, 5], ["float32", "float64"]), (1, 5, "float32"), (2, 1, "float64")),
    indirect=["dtype"],
)
def test_side_by_side(num, segments, dtype) -> None:
    for name in ("all in the warm-up", "all in a measured step", "padding at the end", "all at a reset"):
        case = CASES[name]
        found = bptt.lyapunov_exponents(
            apply, None, jnp.zeros(2, dtype), case.sequence(dtype), num=num, warmup=case.warmup, segments=segments
        )
        np.testing.assert_allclose(found.exponents, case.exponents[:num], rtol=1e-5)


def test_lost_directions_come_back_among_many(x64) -> None:
    """Of nine units, six directions: more than are orthonormalised at every step, fewer than there are."""
    rates = np.linspace(0.1, 0.9, 9)
    xs = np.ones((200, 9))
    xs[3, 4:] = 0  # rank 4 for 6 directions
    xs[7, [0, 8]] = 0
    found = bptt.lyapunov_exponents(scaled, jnp.asarray(rates), jnp.zeros(9), jnp.asarray(xs), num=6, warmup=170)
    np.testing.assert_allclose(found.exponents, np.log(rates[::-1][:6]), atol=1e-4)
    xs[190, 4:] = 0
    found = bptt.lyapunov_exponents(scaled, jnp.asarray(rates), jnp.zeros(9), jnp.asarray(xs), num=6, warmup=170)
    assert float(found.exponents[0]) == pytest.approx(np.log(rates[3]), rel=1e-9)  # of the six, this one is kept
    np.testing.assert_array_equal(found.exponents[4:], -np.inf)


@pytest.mark.parametrize("num", covering([1, 3, 8], 1, 8))
def test_a_network_that_is_erased_once(x64, num) -> None:
    """Afterwards nothing tells: it is as if it had begun there, however many directions are carried along."""
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    w, xs = jnp.asarray((turn * 2.0 ** -np.arange(8)) @ turn.T), jnp.ones(260).at[5].set(0)

    def step(w, h, x):
        return jnp.tanh(w @ (x * h) + 0.1)

    erased = bptt.lyapunov_exponents(step, w, jnp.ones(8), xs, num=num, warmup=200)
    after = bptt.lyapunov_exponents(step, w, jnp.zeros(8), xs[5:].at[0].set(1), num=num, warmup=195)
    np.testing.assert_allclose(erased.exponents, after.exponents, rtol=1e-6)


@pytest.mark.parametrize("dtype", covering(["float32", "float64"], "float32"), indirect=True)
def test_predicted(dtype) -> None:
    """A step that erases is passed over: of growing differences "parallel" is never said."""
    state0 = jnp.ones(2, dtype)
    for rates, verdict in (((0.5, 0.9), "parallel"), ((0.5, 1.3), "sequential")):
        for erasing in ([1], [200], [1, 200, 399], range(0, 400, 40)):
            xs = jnp.ones(400, dtype).at[jnp.asarray([*erasing])].set(0)
            found = bptt.predict_parallel(scaled, jnp.asarray(rates, dtype), state0, xs)
            assert found.verdict == verdict
            assert abs(float(found.exponent) - np.log(max(rates))) < 0.03
        always = bptt.predict_parallel(scaled, jnp.asarray(rates, dtype), state0, jnp.zeros(400, dtype))
        assert always.verdict == "parallel"
        assert float(always.exponent) == -np.inf


def test_predicted_where_the_jacobian_shows_nothing() -> None:
    def relu(w, h, x):
        return jax.nn.relu(w @ h + x)

    w = jnp.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0], jnp.float32)
    xs = jnp.ones((200, 4)).at[50].set(jnp.nan)
    found = bptt.lyapunov_exponents(relu, w, jnp.ones(4), xs, num=2)
    assert np.isnan(found.exponents).all()
    assert int(found.first_nonfinite) == 50
    for state0, inputs in ((jnp.ones(4), xs), (jnp.full(4, jnp.nan), jnp.ones((200, 4)))):
        prediction = bptt.predict_parallel(relu, w, state0, inputs)
        assert prediction.verdict == "sequential"
        assert "the trajectory of 200 steps is not finite" in prediction.statement
    assert bptt.predict_parallel(lambda p, h, x: p * h, 2.0, jnp.ones(2), length=1000).verdict == "sequential"


@pytest.mark.parametrize(
    ("case", "dtype"),
    covering(
        product(["in the warm-up", "undeclared", "declared"], ["float32", "float64"]),
        ("in the warm-up", "float32"),
        ("undeclared", "float64"),
        ("declared", "float32"),
    ),
    indirect=["dtype"],
)
def test_flossing(case, dtype) -> None:
    """Its value and its gradient are those of what lives."""
    rates = jnp.asarray([0.5, 0.9], dtype)
    xs = jnp.ones(400, dtype).at[1 if case == "in the warm-up" else 250].set(0)
    sequence = bptt.Sequence(xs, resets=jnp.arange(400) == 250) if case == "declared" else xs

    def penalty(w):
        return bptt.remedies.flossing_penalty(scaled, w, jnp.ones(2, dtype), sequence, num=2, warmup=50)

    value, gradient = jax.jit(jax.value_and_grad(penalty))(rates)
    np.testing.assert_allclose(value, np.mean(np.log(rates) ** 2), rtol=0.02)
    np.testing.assert_allclose(gradient, np.log(rates) / np.asarray(rates), rtol=0.1)
