"""`recommend_gain`: what is said of a factor is what it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import cell_example

import bptt_jax as bptt
from bptt_jax.analysis import recommend_gain
from bptt_jax.recurrence.frozen import multiplies_state

STEPS = 200
UNITS = 64


def last(states):
    return jnp.sum(states[-1])


def leaky(params, h, x):
    return 0.8 * h + 0.2 * jnp.tanh(params["recurrent"] @ h + params["input"] @ x)


def network(seed, gain):
    rng = np.random.default_rng(seed)
    params = {
        "recurrent": gain * rng.standard_normal((UNITS, UNITS)) / np.sqrt(UNITS),
        "input": rng.standard_normal((UNITS, 8)) / np.sqrt(8),
    }
    xs = rng.standard_normal((STEPS, 8))
    return jax.tree.map(jnp.float32, (params, xs))


@pytest.fixture(scope="module")
def recommended():
    @jax.jit
    @jax.vmap
    def measure(params, xs):
        return recommend_gain(leaky, params, jnp.zeros(UNITS), xs, last)

    problems = [network(seed, 0.5) for seed in range(3)]
    return problems, measure(*jax.tree.map(lambda *a: jnp.stack(a), *problems))


def test_a_leaky_network_is_told_the_gain_with_which_it_reaches_back(recommended):
    """exp(-rate) = 1.15, which would be right without a leak, takes the horizon from 45 steps to 48."""
    problems, found = recommended

    @jax.jit
    def flow(params, xs, factor):
        changed = params | {"recurrent": factor * params["recurrent"]}
        return bptt.gradient_flow(leaky, changed, jnp.zeros(UNITS), xs, last, spectra=False)

    for i, (params, xs) in enumerate(problems):
        factor = found.factor[i]
        assert 2 < factor < 8
        before, naive, short, after = (
            flow(params, xs, jnp.float32(f)) for f in (1, np.exp(0.15), 0.97 * factor, factor)
        )
        assert (before.verdict, naive.verdict, short.verdict) == ("vanishing",) * 3
        assert naive.horizon < 60
        assert after.verdict == "steady"
        # What is said is what is then measured.
        at = int(found.chosen[i])
        np.testing.assert_allclose(found.trials.horizon[i, at], after.horizon, rtol=1e-3)
        np.testing.assert_allclose(found.trials.growth_rate[i, at], after.growth_rate, rtol=1e-3)
        np.testing.assert_allclose(found.trials.growth_rate[i, 0], before.growth_rate, rtol=1e-3)
        spread = np.sqrt(UNITS) * np.std(np.asarray(params["recurrent"]))
        np.testing.assert_allclose(found.gain[i], spread * factor, rtol=1e-5)


def test_what_is_said(recommended):
    _, found = recommended
    one = jax.tree.map(lambda a: a[0], found)
    assert f"(recurrent) times {float(one.factor):.4g}, a gain of {float(one.gain):.3g}, were measured" in (
        one.statement
    )
    assert "over 200 steps" in one.statement
    assert found.statement.startswith("3 sequences, 3 with a factor")
    assert f"the median: recurrent weights (recurrent) times {np.median(found.factor):.4g}" in found.statement
    assert found.to_dict()["factor"] == found.factor.tolist()


@pytest.fixture(scope="module")
def of_map():
    """One compilation for all maps, lengths aside, and losses."""

    @jax.jit
    def measure(a, weight):
        return recommend_gain(
            lambda a, h, x: a @ h, a, jnp.ones(2), None, lambda s, w: w * last(s), args=weight, length=STEPS
        )

    return lambda a, weight=1.0: measure(jnp.asarray(a, jnp.float32), jnp.float32(weight))


@pytest.mark.parametrize(("a", "edge"), [(0.5, 1e-3), (1.5, 1e3)])
def test_of_a_linear_map_in_closed_form(of_map, a, edge):
    """f a, to the power of the steps (one fewer arrive at h_1), is the threshold or its inverse; to two digits."""
    found = of_map(a * np.eye(2))
    exact = edge ** (1 / (STEPS - (edge > 1))) / a
    digits = 0.01 if exact > 1 else 0.001
    inwards = 1 if exact > 1 else -1  # to the side on which it is enough
    assert 0 <= inwards * (found.factor - exact) < 1.1 * digits
    np.testing.assert_allclose(found.factor / digits, np.round(found.factor / digits), atol=1e-3)


def test_a_factor_with_which_the_states_overflow_is_too_large():
    """The first that is tried, sqrt(2), leads from 1e30 beyond float32; the one that is wanted does not."""
    found = recommend_gain(lambda a, h, x: a @ h, 0.95 * jnp.eye(2), jnp.full(2, 1e30), None, last, length=STEPS)
    assert found.trials.factors[1] == np.float32(1.41)
    assert 0 <= found.factor - 1e-3 ** (1 / STEPS) / 0.95 < 0.011


def test_no_factor_where_none_is_wanted_or_helps(of_map):
    assert of_map(np.eye(2)).factor == 1
    assert "steady as it is over 200 steps" in of_map(np.eye(2)).statement
    dead = of_map([[0, 1], [0, 0]])
    assert np.isnan(dead.factor)
    assert "of those tried, 1 to 16, none makes" in dead.statement
    unread = of_map(0.5 * np.eye(2), 0.0)
    assert np.isnan(unread.factor)
    assert "no signal to go by" in unread.statement
    assert np.isnan(of_map(np.full((2, 2), np.nan)).factor)


def test_no_factor_for_what_moves_freely(of_map):
    """With weights times 0.99 the growth ends, and so does the motion."""
    found = of_map([[1, 20], [0, 1]])
    assert np.isfinite(found.nearest)
    assert np.isnan(found.factor)
    assert "as a power of the lag" in found.statement
    assert np.isfinite(of_map([[1.1, 1], [0, 1.1]]).factor)


def test_which_leaves_multiply_the_state():
    """Neither input weights nor biases, though the Jacobian depends on them, nor what is a function of a leaf."""
    expected = {
        "rnn": {"recurrent"},
        "gru": {"recurrent"},
        "lstm": {"recurrent"},
    }
    for name, leaves in expected.items():
        step, params, state0, xs, _ = cell_example(name, jnp.float32, 3, 2)
        marks = multiplies_state(step, params, state0, xs[0])
        names = [path[-1].name for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        assert {name for name, m in zip(names, marks, strict=True) if m} == leaves, name

    def step(params, h, x):
        decay, (first, second) = params["decay"], params["layers"]
        return (
            jnp.exp(-decay) * h + first @ jnp.tanh(second @ h + params["bias"]) + jax.nn.sigmoid(params["gate"]) * x
        )

    params = {"decay": jnp.ones(3), "layers": (jnp.eye(3),) * 2, "bias": jnp.ones(3), "gate": jnp.ones(3), "n": 2}
    marks = multiplies_state(step, params, jnp.ones(3), jnp.ones(3))
    assert jax.tree.unflatten(jax.tree.structure(params), marks) == {
        "decay": False, "layers": (True, True), "bias": False, "gate": False, "n": False,
    }  # fmt: skip


def test_what_is_scaled_can_be_said():
    def step(log_decay, h, x):
        return jnp.exp(log_decay) * h

    given = step, jnp.log(0.5), jnp.ones(2), None, last
    with pytest.raises(ValueError, match=r"scale: expected scale\(params, factor\) -> params, since the step"):
        recommend_gain(*given, length=30)

    def scale(log_decay, factor):
        return log_decay + jnp.log(factor)

    found = recommend_gain(*given, length=30, scale=scale)
    np.testing.assert_allclose(found.factor, 2e-3 ** (1 / 30) / 0.5 * 0.5 ** (1 / 30), atol=0.011)
    assert found.names == ()
    assert np.isnan(found.gain)
    with pytest.raises(ValueError, match="scale: must return params as it was given"):
        recommend_gain(*given, length=30, scale=lambda params, factor: jnp.ones(3))
