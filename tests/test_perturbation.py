"""Evolution strategies against what they estimate: gradients of smoothed losses, by quadrature or in closed form."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slices import covering

import bptt_jax as bptt
from bptt_jax.estimators.perturbation import PESCarry, es, pes

SIGMA = 0.3
KEYS = 2000


def linear(w, h, x):
    return w * h + x


def last(states):
    return states[-1]


def mixed(states):
    """No sum over steps."""
    return states[1] * states[-1] ** 2 + jnp.sum(states) * states[2]


def mean_and_error(estimator, *given, **options):
    """Over keys, one pair each."""
    keys = jax.random.split(jax.random.key(7), KEYS)
    found = jax.jit(jax.vmap(lambda key: estimator(*given, key=key, sigma=SIGMA, pairs=1, **options)))(keys)
    return float(jnp.mean(found)), float(jnp.std(found)) / KEYS**0.5


def smoothed_gradient(w, h0, xs, loss, groups, real=None, resets=None, reset_state=0.0):
    """``E[L sum of e] / SIGMA`` by Gauss-Hermite quadrature over one e for each group of steps; -1 has none."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    weights = weights / weights.sum()
    count, total = max(groups) + 1, 0.0
    for choice in product(range(len(nodes)), repeat=count):
        h, states = h0, []
        for t, x in enumerate(xs):
            if real is None or real[t]:
                h = reset_state if resets is not None and resets[t] else h
                e = 0.0 if groups[t] < 0 else nodes[choice[groups[t]]]
                h = (w + SIGMA * e) * h + x
            states.append(h)
        chosen = list(choice)
        total += np.prod(weights[chosen]) * float(loss(np.asarray(states))) * nodes[chosen].sum() / SIGMA
    return total


XS = np.asarray([0.4, -0.8, 0.9, 1.0, 0.5])
WINDOWS = {"es": (es, {}, [0, 0, 0, 0, 0])} | {
    f"pes {k}": (pes, {"window": k}, [t // k for t in range(5)]) for k in (2, 3, 5)
}


@pytest.mark.parametrize("name", covering(WINDOWS, "es", "pes 2"))
def test_mean_over_keys_is_the_gradient_of_the_smoothed_loss(name, x64) -> None:
    estimator, options, groups = WINDOWS[name]
    given = linear, jnp.asarray(0.7), jnp.asarray(1.0), jnp.asarray(XS)
    mean, error = mean_and_error(estimator, *given, mixed, **options)
    expected = smoothed_gradient(0.7, 1.0, XS, mixed, groups)
    assert abs(mean - expected) < 3 * error
    truncated = smoothed_gradient(0.7, 1.0, XS, mixed, [-1, -1, -1, -1, 0])
    assert abs(mean - truncated) > 6 * error


def test_closed_form(x64) -> None:
    """``w^3 + w^2 + w + 1``: with one e, E(w + s e)^3 = w^3 + 3 w s^2; with an e for every step there is no square."""
    given = linear, jnp.asarray(0.5), jnp.asarray(0.0), jnp.ones(4), last
    plain = 3 * 0.25 + 2 * 0.5 + 1
    for estimator, options, expected in (
        (es, {}, plain + 3 * SIGMA**2),
        (pes, {"window": 1}, plain),
        (pes, {"window": 2}, plain + SIGMA**2),
    ):
        mean, error = mean_and_error(estimator, *given, **options)
        assert abs(mean - expected) < 3 * error


REAL = np.asarray([0, 1, 1, 0, 1, 1, 1, 0, 1, 1], bool)
RESETS = np.asarray([0, 0, 0, 0, 0, 1, 0, 0, 0, 0], bool)
PIECES = [[0, 0, 0, 0, 1, -1, -1, -1, -1, -1], [-1, -1, -1, -1, -1, 0, 0, 0, 1, 1]]  # windows of two, in each


def test_masks_and_resets(x64) -> None:
    """What the pieces give, each with the other as it is unperturbed; the loss multiplies states of both."""
    rng = np.random.default_rng(3)
    xs = rng.standard_normal(10)
    sequence = bptt.Sequence(
        jnp.where(jnp.asarray(REAL), jnp.asarray(xs), jnp.nan),
        mask=jnp.asarray(REAL),
        resets=jnp.asarray(RESETS),
        reset_state=jnp.asarray(0.6),
    )

    def loss(states):
        return states[3] * states[-1] + states[6] ** 2 + states[4]

    given = linear, jnp.asarray(0.7), jnp.asarray(1.0), sequence, loss
    how = {"real": REAL, "resets": RESETS, "reset_state": 0.6}
    mean, error = mean_and_error(pes, *given, window=2)
    expected = sum(smoothed_gradient(0.7, 1.0, xs, loss, groups, **how) for groups in PIECES)
    assert abs(mean - expected) < 3 * error
    mean, error = mean_and_error(es, *given)
    assert abs(mean - smoothed_gradient(0.7, 1.0, xs, loss, [0] * 10, **how)) < 3 * error


def algorithm(params, state0, xs, key, before=None, window=2, sigma=0.1):
    """Algorithm 2 of Vicol et al. for one pair and a loss that is the sum of squares of the states, in NumPy."""
    (above, below), accumulated = before or ((state0, state0), 0.0)
    total = 0.0
    for w in range(-(-len(xs) // window)):
        e = np.asarray(jax.random.normal(jax.random.fold_in(key, w + 1), params.shape, params.dtype))
        accumulated, losses = accumulated + e, [0.0, 0.0]
        for x in xs[w * window : (w + 1) * window]:
            above, below = (params + sigma * e) @ above + x, (params - sigma * e) @ below + x
            losses = [value + np.sum(h**2) for value, h in zip(losses, (above, below), strict=True)]
        total = total + (losses[0] - losses[1]) / (2 * sigma) * accumulated
    return total, ((above, below), accumulated)


def matrix_step(w, h, x):
    return w @ h + x


def sum_of_squares(states):
    return jnp.sum(states**2)


def test_of_a_sum_over_steps_it_is_the_published_algorithm(x64) -> None:
    """From batch to batch too, each with the parameters of its time."""
    rng = np.random.default_rng(0)
    w, start, xs = rng.standard_normal((2, 2)), rng.standard_normal(2), rng.standard_normal((2, 5, 2))
    carry, before = None, None
    for number, batch in enumerate(xs):
        key = jax.random.key(number)
        given = matrix_step, jnp.asarray(w), jnp.asarray(start), jnp.asarray(batch)
        options = {"window": 2, "sigma": 0.1, "pairs": 1}
        got, carry = pes(*given, sum_of_squares, key=key, **options, carry=carry, has_carry=True)
        expected, before = algorithm(w, start, batch, jax.random.split(key, 1)[0], before)
        np.testing.assert_allclose(got, expected, rtol=1e-9)
        np.testing.assert_allclose(carry.state, bptt.final_state(*given), rtol=1e-12)
        np.testing.assert_allclose(carry.perturbed[0], np.stack(before[0]), rtol=1e-12)
        np.testing.assert_allclose(carry.accumulated[0], before[1].ravel(), rtol=1e-12)
        start, w = np.asarray(carry.state), w - 0.1 * np.asarray(got) / np.linalg.norm(got)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("reset", [False, True])
def test_a_stream_goes_on_through_padding(reset, padding, x64) -> None:
    """And begins anew, from state0, after a reset in that at its end. What is read in that of the next part is from
    before, and credited to the perturbations of that time."""
    rng = np.random.default_rng(0)
    w, start, xs = map(jnp.asarray, (rng.standard_normal((2, 2)), np.ones(2), rng.standard_normal((4, 2))))
    options = {"window": 2, "pairs": 3, "sigma": 0.1}
    before = bptt.Sequence(xs, mask=jnp.arange(4) < 3, resets=(jnp.arange(4) == 3) & reset)
    given = matrix_step, w, start, before, sum_of_squares
    _, carry = pes(*given, **options, key=jax.random.key(2), has_carry=True)

    def of(xs, carry):
        return pes(matrix_step, w, 5 * start, xs, sum_of_squares, **options, key=jax.random.key(3), carry=carry)

    real = jnp.arange(padding + 4) >= padding
    got = of(bptt.Sequence(jnp.concatenate([xs[:padding], xs]), mask=real), carry)
    above, below = np.sum(np.square(carry.perturbed), axis=2).T
    held = np.mean((padding * (above - below) / (2 * 0.1))[:, None] * np.asarray(carry.accumulated), axis=0)
    after = of(xs, None if reset else carry)
    np.testing.assert_allclose(got, held.reshape(2, 2) + after, rtol=1e-9)


def test_a_window_of_the_whole_is_es(x64) -> None:
    rng = np.random.default_rng(0)
    given = matrix_step, *map(jnp.asarray, (rng.standard_normal((2, 2)), np.ones(2), rng.standard_normal((5, 2))))
    options = {"key": jax.random.key(3), "pairs": 3}
    got = pes(*given, sum_of_squares, window=9, **options)
    np.testing.assert_allclose(got, es(*given, sum_of_squares, **options), rtol=1e-9)


def test_a_stream_in_batches_is_unbiased_with_its_carry(x64) -> None:
    """The sum of squares after each of six batches of one step; without the carry there is no past."""
    w, xs = jnp.asarray(0.8), jnp.asarray(XS)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def total(key, carries):
        def fresh(h):
            return PESCarry(h, jnp.full((1, 2), h), jnp.zeros((1, 1)))

        def batch(before, x):
            carry, key = before
            key, now = jax.random.split(key)
            carry = jax.tree.map(partial(jnp.where, carries), carry, fresh(carry.state))
            options = {"window": 1, "sigma": SIGMA, "carry": carry, "has_carry": True}
            estimate, carry = pes(linear, w, jnp.asarray(99.0), x[None], sum_of_squares, key=now, **options)
            return (carry, key), estimate

        start = fresh(jnp.asarray(1.0)), key
        return jnp.sum(jax.lax.scan(batch, start, xs)[1])

    keys = jax.random.split(jax.random.key(0), KEYS)
    expected = smoothed_gradient(0.8, 1.0, XS, lambda s: np.sum(s**2), [0, 1, 2, 3, 4])
    for carries in (True, False):
        found = total(keys, carries)
        error = float(jnp.std(found)) / KEYS**0.5
        assert (abs(float(jnp.mean(found)) - expected) < 3 * error) == carries


@pytest.mark.parametrize("estimator", covering(["es", "pes"], "pes"))
def test_a_step_that_nothing_can_differentiate(estimator) -> None:
    """Loops of unknown length, counters and complex parameters, and a loss with jumps."""
    estimator = es if estimator == "es" else partial(pes, window=2)

    def step(p, state, x):  # of x turns
        h = jax.lax.while_loop(lambda c: c[0] < x, lambda c: (c[0] + 1, p["w"] * c[1]), (0, state["h"]))[1]
        return {"h": h + p["b"].astype(h.dtype), "t": state["t"] + p["stride"]}

    params = {"w": jnp.asarray(0.5 - 0.2j, jnp.complex64), "b": jnp.float32(0.3), "stride": 2}
    state0 = {"h": jnp.ones(2, jnp.complex64), "t": 0}
    given = step, params, state0, jnp.asarray([1, 2, 1])

    def loss(states):
        return jnp.sum(jnp.abs(states["h"]) ** 2) + jnp.sum(states["h"].imag) + states["t"][-1].astype(jnp.float32)

    got = estimator(*given, loss, key=jax.random.key(0), pairs=4000, sigma=0.003)
    assert got["stride"] is None

    def plain(w, b):
        h, total = jnp.ones(2, jnp.complex64), 0.0
        for n in (1, 2, 1):
            h = w**n * h + b.astype(w.dtype)
            total += jnp.sum(jnp.abs(h) ** 2) + jnp.sum(h.imag)
        return total

    exact = jax.grad(plain, (0, 1))(params["w"], params["b"])
    for name, value in zip("wb", exact, strict=True):
        np.testing.assert_allclose(got[name], value, atol=0.1 * abs(exact[0]))
    jumps = estimator(*given, lambda s: jnp.sum(jnp.round(s["h"].real)), key=jax.random.key(0), sigma=0.5)
    assert np.all(np.isfinite(jumps["w"]))
    assert jumps["b"] != 0


@pytest.mark.parametrize("dtype", covering(["float16", "bfloat16"]))
def test_half_precision(dtype) -> None:
    """A perturbation is rounded to the parameters' dtype, by chance up or down."""
    given = linear, jnp.asarray(0.5, dtype), jnp.zeros((), dtype), jnp.ones(4, dtype), last
    for got in (
        es(*given, key=jax.random.key(0), sigma=0.1, pairs=4000),
        pes(*given, key=jax.random.key(0), sigma=0.1, pairs=4000, window=2),
    ):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float32), 2.75, rtol=0.1)


def test_without_parameters_there_is_no_gradient() -> None:
    given = lambda p, h, x: x * h, None, jnp.ones(2), jnp.ones((3, 2)), jnp.sum
    assert es(*given, key=jax.random.key(0)) is None
    assert pes(*given, key=jax.random.key(0), window=2) is None


GIVEN = linear, jnp.asarray(0.5), jnp.zeros(()), jnp.ones(3), last
CARRY = PESCarry(jnp.zeros(()), jnp.zeros((4, 2)), jnp.zeros((4, 1)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma": 0.0}, ValueError, "sigma: expected a finite number above 0, got 0"),
        ({"pairs": 0}, ValueError, "pairs: expected at least 1, got 0"),
        ({"window": 1.5}, TypeError, "window: expected an integer"),
        ({"key": None}, TypeError, "key: expected a random key"),
        ({"has_carry": 1}, TypeError, "has_carry: expected True or False, got int"),
        ({"carry": jnp.zeros(2)}, TypeError, "carry: expected a PESCarry, as pes gives with has_carry=True, got"),
        (
            {"carry": CARRY._replace(perturbed=jnp.zeros((4, 3)))},
            ValueError,
            r"carry: expected state, .*float32\[4,2\]",
        ),
        ({"carry": CARRY._replace(accumulated=jnp.zeros((4, 2)))}, ValueError, r"accumulated \[pairs, 1\], got"),
        ({"carry": CARRY._replace(accumulated=jnp.zeros(()))}, ValueError, r"accumulated \[pairs, 1\], got"),
    ],
)
def test_bad_arguments(options, error, message) -> None:
    with pytest.raises(error, match=message):
        pes(*GIVEN, **{"key": jax.random.key(0), "window": 2} | options)


def test_a_carry_has_its_own_number_of_pairs() -> None:
    _, after = pes(*GIVEN, key=jax.random.key(0), window=2, carry=CARRY, has_carry=True)
    assert after.perturbed.shape == (4, 2)
