"""Estimators that go forward in time: in parts, in the mean over keys, and where they are exact."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slices import covering
from test_estimators import REAL, RESETS, _problem, _vector, _weighted, cond_step, spiking_step

import bptt_jax as bptt
from bptt_jax import estimators
from bptt_jax.estimators import influence, kronecker, rank_one
from bptt_jax.recurrence.programs import multiplied_axes

KEY = jax.random.key(0)
ONLINE = {
    "rtrl": estimators.rtrl,
    "snap": estimators.snap,
    "snap 2": partial(estimators.snap, n=2),
    "rflo": estimators.rflo,
    "uoro": partial(estimators.uoro, key=KEY),
    "kf_rtrl": partial(estimators.kf_rtrl, key=KEY),
}


def _sequence(xs, real, resets, reset_state=None):
    spoilt = jnp.where(real[:, None], xs, jnp.nan)
    return bptt.Sequence(spoilt, mask=real, resets=resets, reset_state=reset_state)


IN_PARTS = [(name, cuts) for cuts in ((3,), (5,), (7, 8)) for name in ONLINE]


@pytest.mark.parametrize(
    ("name", "cuts"), covering(IN_PARTS, ("snap 2", (7, 8)), ("kf_rtrl", (3,)), ("uoro", (5,)))
)
def test_parts_are_the_whole(name, cuts, x64) -> None:
    """Of a loss that is a sum over steps. Resets lead to state0, which is not where later parts begin; or there is one
    in the padding at the end of the first, and what the second reads of the state is from before."""
    step, params, state0, _, xs = _problem(cond_step)
    real, resets = jnp.asarray(REAL), jnp.asarray(RESETS).at[6].set(len(cuts) > 1)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(len(REAL)))

    def of(part, **options):
        sequence = _sequence(xs[part], real[part], resets[part])
        args = {"weights": weights[part], "scale": jnp.asarray(1.3)}
        return ONLINE[name](step, params, state0, sequence, _weighted, args=args, **options)

    whole, end = of(slice(None), has_carry=True)
    total, carry = 0, None
    for begin, stop in pairwise((0, *cuts, len(REAL))):
        part, carry = of(slice(begin, stop), carry=carry, has_carry=True)
        total += _vector(part)
        assert int(carry.steps) == REAL[:stop].sum()
    np.testing.assert_allclose(total, _vector(whole), rtol=1e-11)
    assert end.pending
    numbers = (jax.tree.leaves((c.state["h"], c.influence, c.pending)) for c in (end, carry))
    for a, b in zip(*numbers, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)


@pytest.mark.parametrize("padded", [False, True])
def test_a_reset_in_the_padding_of_one_part_takes_place_in_the_next(padded) -> None:
    """Which has none of its own, and perhaps no padding; it leads to the state0 of that part."""

    def step(w, h, x):
        return w * h + x

    w, xs = jnp.asarray(0.5), jnp.asarray([[1.0], [2.0], [4.0]])
    before = bptt.Sequence(xs, mask=jnp.arange(3) < 2, resets=jnp.arange(3) == 2)
    _, carry = estimators.rtrl(step, w, jnp.ones(1), before, jnp.sum, has_carry=True)
    part = bptt.Sequence(xs, mask=jnp.arange(3) > 0) if padded else xs[1:]
    got = estimators.rtrl(step, w, jnp.full(1, 3.0), part, lambda states: states[-1, 0], carry=carry)
    assert float(got) == (0.5 * 3 + 2) + 0.5 * 3


def twice_step(p, state, x):
    """A matrix that is used twice, complex numbers, and a product that is turned."""
    z = jnp.tanh(jnp.abs(p["z"] @ state["h"]) * 0.5) * jnp.angle(p["z"][0, 0])
    h = jnp.tanh(p["w"] @ jnp.tanh(p["w"] @ state["h"].real + p["b"] * x) + state["h"].imag @ p["w"])
    return {"h": jax.lax.complex(h, 0.5 * z)}


def loop_step(p, state, x):
    """No backward pass."""

    def once(c):
        return c[0] + 1, jnp.tanh(p["w"] @ c[1] + p["b"] * x)

    return state | {"h": jax.lax.while_loop(lambda c: c[0] < 2, once, (0, state["h"]))[1]}


def _real_loss(states, args):
    h = states["h"]
    parts = jnp.sin(args["scale"] * h.real) + (jnp.sin(h.imag) if jnp.iscomplexobj(h) else 0)
    return args["weights"] @ jnp.sum(parts, axis=1)


@pytest.mark.parametrize(
    ("name", "step"),
    covering(
        [(name, step) for name in ("uoro", "kf_rtrl") for step in (cond_step, spiking_step, twice_step, loop_step)],
        ("uoro", spiking_step),
        ("kf_rtrl", twice_step),
    ),
)
def test_the_mean_over_keys_is_the_gradient(name, step, x64) -> None:
    """Over 2,000 keys, with padding and resets: every number, and the part along the gradient, within what the
    standard errors allow of so many."""
    _, params, state0, reset_state, xs = _problem(step)
    steps = 8
    if step is twice_step:
        params = params | {"z": jax.lax.complex(params["w"], 0.3 * params["w"].T)}
        state0, reset_state = ({"h": jax.lax.complex(s["h"], 0.2 * s["h"])} for s in (state0, reset_state))
    sequence = _sequence(xs[:steps], jnp.asarray(REAL[:steps]), jnp.asarray(RESETS[:steps]), reset_state)
    args = {"weights": jnp.asarray(np.random.default_rng(1).standard_normal(steps)), "scale": jnp.asarray(1.3)}
    given = step, params, state0, sequence, _real_loss

    def numbers(tree):
        leaves = [np.asarray(a) for a in jax.tree.leaves(tree)]
        return np.concatenate(
            [np.reshape(part, (len(keys), -1)) for a in leaves for part in (a.real, a.imag)], axis=1
        )

    keys = jax.random.split(KEY, 2000)
    estimator = getattr(estimators, name)
    exact = numbers(
        jax.tree.map(lambda a: jnp.broadcast_to(a, (len(keys), *a.shape)), estimators.rtrl(*given, args=args))
    )[0]
    found = numbers(jax.jit(jax.vmap(lambda key: estimator(*given, args=args, key=key)))(keys))
    errors = found.std(axis=0) / np.sqrt(len(keys))
    random = errors > 1e-12
    np.testing.assert_allclose(found.mean(axis=0)[~random], exact[~random], rtol=1e-9, atol=1e-12)
    assert np.abs((found.mean(axis=0) - exact)[random] / errors[random]).max() < 4
    along = found @ exact / (exact @ exact)
    error = along.std() / np.sqrt(len(keys))
    assert abs(along.mean() - 1) < 3 * error
    assert error < 0.1


def test_within_many_steps_nothing_is_lost(x64) -> None:
    step, params, state0, _, xs = _problem(cond_step)
    args = {"weights": jnp.ones(len(REAL)), "scale": jnp.asarray(1.3)}
    given = step, params, state0, xs, _weighted
    exact = _vector(estimators.rtrl(*given, args=args))
    np.testing.assert_allclose(_vector(estimators.snap(*given, n=3, args=args)), exact, rtol=1e-11)
    assert np.abs(_vector(estimators.snap(*given, n=1, args=args)) - exact).max() > 1e-3


def test_what_a_parameter_has_reached_it_reaches_from_then_on() -> None:
    """By way of the first unit, which the input moves at step 1 alone, and which moves the second at step 2 alone."""

    def step(w, h, x):
        return jnp.stack([0.5 * h[0] + x[0] * w, 0.5 * h[1] + x[1] * h[0]])

    given = step, jnp.asarray(0.3), jnp.zeros(2), jnp.asarray([[1.0, 0], [0, 1], [0, 0]])
    assert float(estimators.snap(*given, lambda states: states[-1, 0])) == 0.25
    assert float(estimators.snap(*given, lambda states: states[-1, 1])) == 0
    assert float(estimators.snap(*given, lambda states: states[-1, 1], n=2)) == 0.5


def test_where_a_parameter_touches_one_number_both_are_the_diagonal(x64) -> None:
    step, params, state0, _, xs = _problem(cond_step)
    given = step, params, state0, xs, lambda states: jnp.sum(jnp.sin(states["h"]))
    snap, rflo = _vector(estimators.snap(*given)), _vector(estimators.rflo(*given))
    np.testing.assert_allclose(snap, rflo, rtol=1e-11)
    assert np.abs(snap - _vector(estimators.rtrl(*given))).max() > 1e-3


def test_parameters_of_one_axis_have_no_noise(x64) -> None:
    def step(p, h, x):
        return jnp.tanh(p["own"] * h + p["beside"] * jnp.roll(h, 1) + x * p["all"])

    params = {
        "own": jnp.asarray([0.5, -0.3, 0.8]),
        "beside": jnp.asarray([0.4, 0.6, -0.2]),
        "all": jnp.asarray(0.7),
    }
    given = step, params, jnp.ones(3), jnp.asarray(np.random.default_rng(0).standard_normal((5, 3))), jnp.sum
    np.testing.assert_allclose(
        _vector(estimators.kf_rtrl(*given, key=KEY)), _vector(estimators.rtrl(*given)), rtol=1e-11
    )


def test_a_matrix_may_stand_on_either_side(x64) -> None:
    """Flax's and Keras's stand on the right."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3)))
    xs = jnp.asarray(np.random.default_rng(1).standard_normal((6, 3)))
    left = estimators.kf_rtrl(lambda w, h, x: jnp.tanh(w @ h + x), w, jnp.ones(3), xs, jnp.sum, key=KEY)
    right = estimators.kf_rtrl(lambda w, h, x: jnp.tanh(h @ w + x), w.T, jnp.ones(3), xs, jnp.sum, key=KEY)
    np.testing.assert_allclose(right.T, left, rtol=1e-11)


def test_the_axis_of_a_product_is_found() -> None:
    def step(p, h):
        gate = jax.jit(lambda w, h: jnp.split(0.5 * w, 2)[0] @ h)(p["stacked"], h)
        new = jax.lax.cond(h[0] > 0, lambda h: h @ p["right"], lambda h: -h, h)
        return gate + new + p["bias"] + jnp.outer(p["outer"][:, 0], h)[0] + p["turned"].T.astype(h.dtype) @ h

    shapes = {"bias": (2,), "outer": (2, 2), "right": (2, 2), "stacked": (4, 2), "turned": (2, 2)}
    given = {name: jnp.ones(shape) for name, shape in shapes.items()}
    found = multiplied_axes(jax.make_jaxpr(step)(given, jnp.ones(2)), 5)
    assert found == {2: 0, 3: 1, 4: 0}


def test_what_a_unit_does_to_itself_is_all_where_units_do_not_meet(x64) -> None:
    """Over all arrays of the state: RFLO is exact."""

    def step(w, state, x):
        h, c, z = state
        c = w * h + 0.5 * c + x
        return jnp.tanh(c) + 0.3 * h, c, 0.7j * z + w[0].astype(z.dtype) * z.conj()

    state0 = jnp.ones(3), jnp.zeros(3), jnp.asarray([1.0 + 0.5j])
    given = step, jnp.asarray([0.4, -0.3, 0.6]), state0, jnp.linspace(-1, 1, 15).reshape(5, 3)
    loss = lambda states: jnp.sum(jnp.sin(states[0])) + jnp.sum(states[2].real ** 2)  # noqa: E731
    np.testing.assert_allclose(estimators.rflo(*given, loss), estimators.rtrl(*given, loss), rtol=1e-12)


def test_a_complex_number_is_one_unit(x64) -> None:
    """A parameter that moves its real part alone, and the imaginary one by way of it."""

    def step(p, h, x):
        return p["a"] * h + (p["b"] * x).astype(h.dtype)

    params = {"a": jnp.asarray([0.5 + 0.3j, 0.8j]), "b": jnp.ones(2)}
    given = step, params, jnp.zeros(2, complex), jnp.ones((5, 2)), lambda states: jnp.sum(states[-1].imag)
    exact, got = estimators.rtrl(*given), estimators.snap(*given)
    assert np.all(exact["b"] != 0)
    for name in params:
        np.testing.assert_allclose(got[name], exact[name], rtol=1e-12)


@pytest.mark.parametrize("name", covering(ONLINE, "rtrl", "uoro"))
def test_a_sum_over_many_steps_in_half_precision(name) -> None:
    """Each step adds 1 by a parameter that it alone has seen, of which bfloat16 can add up 256."""
    step = lambda b, h, x: 0 * h + b  # noqa: E731
    given = step, jnp.zeros(1, jnp.bfloat16), jnp.zeros(1, jnp.bfloat16), None, jnp.sum
    assert float(ONLINE[name](*given, length=1024)[0]) == 1024


def test_no_rule_is_taken_for_another() -> None:
    """JAX looks programs up by what is static, by equality and hash."""
    rules = [influence._Whole(), influence._Local(), influence._Within(1), influence._Within(2)]
    rules += [kronecker._Kronecker(), rank_one._RankOne()]
    assert len(set(rules)) == len(rules)
    assert influence._Within(2) == influence._Within(2)


@pytest.mark.parametrize("name", covering(ONLINE, "snap", "uoro", "kf_rtrl"))
def test_states_that_nothing_reads_may_overflow(name) -> None:
    def step(w, h, x):
        return jnp.sum(w) * h * h

    w = jnp.full((2, 2), 0.75, jnp.float32)
    given = step, w, jnp.full(2, 2.0, jnp.float32), None, lambda states: jnp.sum(states[2])
    assert np.isinf(bptt.unroll(*given[:4], length=9)[-1]).all()
    assert np.isfinite(ONLINE[name](*given, length=9)).all()


@pytest.mark.parametrize("name", ["uoro", "kf_rtrl"])
def test_a_key_is_wanted(name) -> None:
    given = lambda w, h, x: w @ h, jnp.eye(2), jnp.ones(2), None, jnp.sum
    with pytest.raises(TypeError, match="key: expected a random key"):
        getattr(estimators, name)(*given, key=None, length=2)


@pytest.mark.parametrize("name", ["snap", "uoro", "kf_rtrl"])
def test_without_parameters_there_is_nothing(name) -> None:
    assert ONLINE[name](lambda p, h, x: x * h, None, jnp.ones(2), jnp.ones((3, 2)), jnp.sum) is None


def test_a_carry_is_that_of_the_same(x64) -> None:
    given = lambda w, h, x: w @ h, jnp.eye(2), jnp.ones(2), None, jnp.sum
    _, carry = estimators.rtrl(*given, length=2, has_carry=True)
    assert "2 steps so far" in repr(carry)
    with pytest.raises(ValueError, match="carry: expected that of the same estimator"):
        estimators.snap(*given, length=2, carry=carry)
    with pytest.raises(ValueError, match="carry: expected that of the same estimator"):
        estimators.rtrl(given[0], jnp.eye(3), jnp.ones(3), None, jnp.sum, length=2, carry=carry)
    with pytest.raises(TypeError, match="carry: expected what has_carry=True returned, got tuple"):
        estimators.rtrl(*given, length=2, carry=(carry.state, carry.influence))
    with pytest.raises(TypeError, match="has_carry: expected True or False, got int"):
        estimators.rtrl(*given, length=2, has_carry=1)
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        estimators.snap(*given, length=2, n=0)
