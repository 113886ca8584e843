"""Leaves of the state that no loss depends on: they may overflow, and no gradient is NaN that is none to `jax.grad`."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracles import Example, floating, perturbation_gradients
from slices import covering

import bptt_jax as bptt
from bptt_jax.analysis.backward import linearize_for
from bptt_jax.analysis.loss import bind_loss
from bptt_jax.step import bind

STEPS = 12


class Pair(NamedTuple):
    a: jax.Array
    b: jax.Array


def tame(p, h, x):
    return jnp.tanh(p["w"] * h["a"] + x)


def wild(p, h):
    """Infinite from the third step on, and so are its derivatives, that by the other leaf too."""
    return p["v"] * h["b"] ** 2 * (1 + h["a"])


def by_product(p, h, x):
    return {"a": tame(p, h, x), "b": wild(p, h)}


def by_product_without_a_gradient(p, h, x):
    met = jnp.where(jnp.isinf(lax.stop_gradient(h["b"])), 1.0, 0.0)
    return {"a": tame(p, h, x + met), "b": wild(p, h)}


def times_zero(p, h, x):
    return {"a": tame(p, h, x) + 0 * jnp.minimum(h["b"], 1), "b": p["v"] * h["b"]}


def linear(p, h, x):
    return {"a": tame(p, h, x), "b": p["v"] * h["b"]}


def in_branches(p, h, x):
    return lax.cond(x > 0, lambda h: by_product(p, h, x), lambda h: h, h)


def in_a_loop(p, h, x):
    return lax.fori_loop(0, 2, lambda _, h: by_product(p, h, x), h)


def in_layers(p, h, x):
    weights = {"w": jnp.stack([p["w"], 2 * p["w"]]), "v": jnp.stack([p["v"], p["v"]])}
    return lax.scan(lambda h, p: (by_product(p, h, x), None), h, weights)[0]


def in_layers_that_hand_it_on(p, h, x):
    """In the second layer, what is read reads what the first has made of the other leaf."""

    def layer(carry, _):
        h, between = carry
        return ({"a": tame(p, h, x) + 0 * jnp.minimum(between, 1), "b": p["v"] * h["b"]}, h["b"]), None

    return lax.scan(layer, (h, jnp.zeros_like(x)), None, length=2)[0][0]


def jitted(p, h, x):
    return jax.jit(jax.checkpoint(by_product))(p, h, x)


def with_tuples(p, h, x):
    pair, (c,) = h
    new = by_product(p, pair._asdict(), x)
    return Pair(**new), [c * c + pair.b]


def chain_of_unread(p, h, x):
    """`c` reads `b`, and nothing reads `c`."""
    return {**by_product(p, h, x), "c": p["w"] * h["c"] * h["b"]}


def chain_of_read(p, h, x):
    """`a` reads `c` by way of `d`, two steps later, and nothing reads `b`."""
    return {
        "a": tame(p, h, x) + h["d"],
        "b": wild(p, h) + h["c"],
        "c": jnp.tanh(0.1 * p["v"] ** 0.01 * h["c"] + p["w"]),
        "d": 0.3 * h["c"],
    }


@jax.custom_vjp
def opaque(p, h, x):
    return by_product(p, h, x)


opaque.defvjp(
    lambda *given: (by_product(*given), given), lambda given, cotangent: jax.vjp(by_product, *given)[1](cotangent)
)


@jax.custom_vjp
def surrogate(z):
    return jnp.tanh(z)


surrogate.defvjp(lambda z: (jnp.tanh(z), z), lambda z, g: (g / (1 + z * z),))


def with_a_backward_pass_of_its_own(p, h, x):
    return {"a": surrogate(p["w"] * h["a"] + x), "b": wild(p, h)}


@jax.custom_jvp
def clipped(z):
    return jnp.clip(z, -1, 1)


clipped.defjvp(lambda z, dz: (clipped(*z), 0.5 * dz[0]))


def with_a_forward_pass_of_its_own(p, h, x):
    return {"a": clipped(p["w"] * h["a"] + x), "b": wild(p, h)}


def of_other_kinds(p, h, x):
    """A complex leaf and a counter are read, a complex one is not."""
    z = lax.complex(jnp.tanh(h["z"].imag * p["w"] + x), h["a"] * jnp.sin(0.1 * h["count"].astype(x.dtype)))
    new = by_product(p, h, x)
    return {**new, "z": z, "u": lax.complex(p["v"], h["a"]) * h["u"] ** 2 * h["z"], "count": h["count"] + 1}


def squares(states):
    return jnp.sum(states["a"] ** 2)


def squares_and_first(states):
    return squares(states) + states["b"][0]


def squares_of_others(states):
    return squares(states) + jnp.sum(jnp.abs(states["z"]))


def squares_of_pair(states):
    return jnp.sum(states[0].a ** 2)


def squares_and_a_count(states):
    """The count has no gradient, though the loop that counts has the other leaf and a tangent of it."""
    count = lax.while_loop(lambda count: count < 3, lambda count: count + states["b"][0], 0 * states["b"][0])
    return squares(states) * lax.stop_gradient(count)


def nothing(states):
    return jnp.sum(lax.stop_gradient(states["a"]))


# The step, the loss, the leaves beside `a` and `b`, which leaves the loss depends on in the order of the state's, and
# whether `jax.grad` is NaN all the same.
CASES = {
    "product": (by_product, squares, {}, [True, False], False),
    "stop_gradient": (by_product_without_a_gradient, squares, {}, [True, False], False),
    "times zero": (times_zero, squares, {}, [True, True], True),
    "first step": (linear, squares_and_first, {}, [True, True], True),
    "cond": (in_branches, squares, {}, [True, False], False),
    "loop": (in_a_loop, squares, {}, [True, False], False),
    "layers": (in_layers, squares, {}, [True, False], False),
    "layers that hand on": (in_layers_that_hand_it_on, squares, {}, [True, True], True),
    "jit": (jitted, squares, {}, [True, False], False),
    "tuples": (with_tuples, squares_of_pair, None, [True, False, False], False),
    "unread chain": (chain_of_unread, squares, {"c": 1.0}, [True, False, False], False),
    "read chain": (chain_of_read, squares, {"c": 0.1, "d": 0.2}, [True, False, True, True], False),
    "custom_vjp of all": (opaque, squares, {}, [True, True], True),
    "custom_vjp": (with_a_backward_pass_of_its_own, squares, {}, [True, False], False),
    "custom_jvp": (with_a_forward_pass_of_its_own, squares, {}, [True, False], False),
    "other kinds": (of_other_kinds, squares_of_others, {"z": 0.3 + 0.2j, "u": 1j, "count": 0},
                    [True, False, False, True], False),
    "while": (by_product, squares_and_a_count, {}, [True, False], False),
    "nothing": (by_product, nothing, {}, [False, False], False),
}  # fmt: skip


def problem(name, dtype=jnp.float32):
    step, loss, more, live, spoilt = CASES[name]
    most = float(jnp.finfo(dtype).max)
    params = {"w": jnp.asarray(0.5, dtype), "v": jnp.asarray(most**0.3, dtype)}
    a, b = jnp.asarray(0.1, dtype), jnp.asarray(1, dtype)
    if more is None:
        state0 = Pair(a, b), [b]
    else:
        kinds = {float: dtype, complex: jnp.result_type(1j * np.zeros(1, dtype)), int: jnp.int32}
        state0 = {"a": a, "b": b, **{k: jnp.asarray(v, kinds[type(v)]) for k, v in more.items()}}
    return (step, params, state0, jnp.linspace(0.5, 1, STEPS, dtype=dtype), loss), live, spoilt


def assert_same(got, expected, rtol=1e-5):
    """NaN, infinity and None at the same places."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * 1e-2)


# Segments are differentiated alike, whatever the step is; of every kind of state there is one.
IN_SEGMENTS = ("product", "times zero", "layers that hand on", "tuples", "custom_vjp", "other kinds", "nothing")


@pytest.mark.parametrize(
    ("name", "segments"),
    covering(
        ((name, segments) for name in CASES for segments in (False, True)),
        *((name, name in IN_SEGMENTS) for name in CASES),
    ),
)
def test_gradients_are_those_of_jax_grad(name, segments):
    given, live, spoilt = problem(name)
    step, params, state0, xs, loss = given
    assert linearize_for(bind(*given[:4]), bind_loss(loss)).live == live

    @jax.jit
    def found(params, state0):
        example = Example(step, params, state0, xs)
        expected = tuple(map(floating, perturbation_gradients(example, loss)))
        plain = bptt.adjoints(step, params, state0, xs, loss)
        both = [plain, bptt.adjoints(step, params, state0, xs, loss, remat=5)] if segments else [plain]
        return expected, [(g.params_grad, g.state0_grad, g.adjoints) for g in both], plain.states

    expected, ours, states = found(params, state0)
    assert np.any([np.isinf(a).any() for a in jax.tree.leaves(states)])
    assert np.any([np.isnan(a).any() for a in jax.tree.leaves(expected)]) == spoilt
    for gradients in ours:
        assert_same(gradients, expected)


def alone(p, h, x):
    """`by_product` without the leaf that is not read."""
    return {"a": tame(p, h, x)}


def batch_of(xs):
    return jnp.stack([xs, 0.5 * xs, 0.8 * xs])


def of_each(step, params, state0, xs, loss):
    def one(a, xs):
        return bptt.adjoints(step, params, {**state0, "a": a}, xs, loss)

    found = jax.vmap(one)(jnp.asarray([0.1, -0.2, 0.3], state0["a"].dtype), batch_of(xs))
    return found.params_grad, found.log_norms, found.leaf_log_norms["a"]


def of_flow(*given):
    flow = bptt.gradient_flow(*given, spectra=False)
    numerics = flow.numerics.params_grad_log_norm, flow.numerics.finite, flow.numerics.in_range
    leaf = flow.leaves.log_norms[..., :1], flow.leaves.growth_rate[..., :1], flow.leaves.horizon[..., :1]
    return flow.loss, flow.growth_rate, flow.horizon, flow.end_gain, flow.peak_gain, flow.signal, numerics, leaf


def of_inputs(*given):
    found = bptt.adjoints(*given, inputs=True)
    return found.xs_grad, found.xs_log_norms, found.params_grad, found.params_log_norm, found.log_norms


def in_segments(*given):
    found = bptt.adjoints(*given, inputs=True, remat=4)
    return found.xs_grad, found.params_grad, found.log_norms, found.leaf_log_norms["a"]


def of_noise(step, params, state0, xs, loss):
    found = bptt.analysis.gradient_noise(step, params, state0, batch_of(xs), loss)
    return found.log_norms, found.log_spreads, found.signal_to_noise, found.whole


def of_precision(*given):
    with jax.enable_x64(True):
        found = bptt.analysis.gradient_precision(*given, dtype="float32")
    return found.log_norms, found.underflows, found.loss_scales_log2


# Of a step with a leaf that is not read these tell what they tell of the step without it.
MEASURED = {
    "adjoints": of_inputs,
    "adjoints in segments": in_segments,
    "adjoints of each": of_each,
    "temporal_contributions": bptt.temporal_contributions,
    "gradient_by_lag": lambda *given: bptt.analysis.gradient_by_lag(*given, parts=(0, 3)),
    "truncation_bias": bptt.truncation_bias,
    "rtrl": bptt.estimators.rtrl,
    "snap": bptt.estimators.snap,
    "rflo": bptt.estimators.rflo,
    "tbptt": lambda *given: bptt.estimators.tbptt(*given, k1=2, k2=4),
    "gradient_noise": of_noise,
    "gradient_precision": of_precision,
    "gradient_flow": of_flow,
}


@pytest.mark.parametrize("name", MEASURED)
def test_it_is_as_if_the_leaf_were_not_there(name):
    (step, params, state0, xs, loss), _, _ = problem("product")
    without = {"a": state0["a"]}
    assert_same(
        MEASURED[name](step, params, state0, xs, loss), MEASURED[name](alone, params, without, xs, loss), 1e-4
    )


@pytest.mark.parametrize("name", ["uoro", "kf_rtrl"])
def test_noise_is_of_what_the_loss_depends_on(name):
    """Not of the other leaf, which has overflowed; a later part may read it."""
    given, _, _ = problem("product")
    keys = jax.random.split(jax.random.key(0), 200)
    estimate = getattr(bptt.estimators, name)
    found = jax.jit(jax.vmap(lambda key: estimate(*given, key=key)))(keys)
    exact = bptt.adjoints(*given).params_grad
    assert np.all(found["v"] == 0)
    error = np.std(found["w"]) / math.sqrt(len(keys))
    np.testing.assert_allclose(np.mean(found["w"]), exact["w"], rtol=1e-4, atol=4 * error)
    part, _ = estimate(*given, key=keys[0], has_carry=True)
    assert np.isnan(part["v"])


def test_in_padding_and_across_resets():
    (step, params, state0, xs, loss), _, _ = problem("product")
    resets = jnp.arange(STEPS) == 7
    again = {"a": jnp.float32(-0.3), "b": jnp.float32(2)}

    def sequence(reset_state):
        return bptt.Sequence(xs, mask=jnp.arange(STEPS) != 9, resets=resets, reset_state=reset_state)

    @jax.jit
    def expected(params, state0, reset_state):
        return jax.grad(lambda *g: loss(bptt.unroll(step, *g[:2], sequence(g[2]))), (0, 1, 2))(
            params, state0, reset_state
        )

    for remat in (False, 4):
        found = bptt.adjoints(step, params, state0, sequence(again), loss, remat=remat)
        got = found.params_grad, found.state0_grad, found.reset_state_grad
        assert_same(got, expected(params, state0, again))
    assert_same(
        bptt.analysis.gradient_by_lag(step, params, state0, sequence(again), loss),
        bptt.analysis.gradient_by_lag(alone, params, {"a": state0["a"]}, sequence({"a": again["a"]}), loss),
    )


@pytest.mark.parametrize("remat", [False, 4])
def test_the_only_leaf(remat):
    """The loss may depend on none."""

    def step(p, h, x):
        return p * h**2 + x

    def loss(states, args):
        return jnp.sum(args**2) + 0 * jnp.sum(lax.stop_gradient(jnp.minimum(states, 1)))

    given = step, jnp.float32(1e10), jnp.float32(1), jnp.ones(STEPS)
    found = bptt.adjoints(*given, loss, args=jnp.ones(2), remat=remat)
    assert np.isinf(found.states[-1])
    assert found.params_grad == found.state0_grad == 0
    assert (found.adjoints == 0).all()
    np.testing.assert_array_equal(found.args_grad, [2, 2])


def test_a_parameter_that_only_an_unread_leaf_reads_has_a_gradient_of_exactly_zero():
    (step, params, state0, xs, loss), _, _ = problem("product")
    found = bptt.adjoints(step, params, state0, xs, loss)
    assert found.params_grad["v"] == found.state0_grad["b"] == 0
    assert found.scaled.params_grad.log_magnitudes["v"] == -np.inf
    assert np.all(found.leaf_log_norms["b"] == -np.inf)


@pytest.mark.parametrize("where", ["args", "aux", "custom_vjp"])
def test_what_a_loss_reads(where):
    """Whatever else it is given and gives; of a `jax.custom_vjp`, all that it is given, as by `jax.grad`."""
    (step, params, state0, xs, _), _, _ = problem("product")

    @jax.custom_vjp
    def both(states):
        return squares(states)

    both.defvjp(
        lambda states: (squares(states), states),
        lambda states, g: ({"a": 2 * g * states["a"], "b": 0 * states["b"]},),
    )

    def loss(states, args):
        if where == "custom_vjp":
            return both(states) * args, None
        return squares(states) * args, states["b"][-1]

    def total(params, args):
        return loss(bptt.unroll(step, params, state0, xs), args)[0]

    args = jnp.float32(1.5)
    if where == "args":
        found = bptt.adjoints(step, params, state0, xs, lambda *given: loss(*given)[0], args=args)
    else:
        found = bptt.adjoints(step, params, state0, xs, loss, args=args, has_aux=True)
    assert_same((found.params_grad, found.args_grad), jax.jit(jax.grad(total, (0, 1)))(params, args))
    assert np.isnan(found.params_grad["v"]) == (where == "custom_vjp")


def test_products_and_spectra_are_of_all_leaves():
    """Whichever the loss reads."""
    params = {"w": jnp.float32(0.5), "v": jnp.float32(0.9)}
    given = linear, params, {"a": jnp.float32(0.1), "b": jnp.float32(1)}, jnp.ones(6), squares
    dense, free = bptt.gradient_flow(*given), bptt.gradient_flow(*given, num=1)
    np.testing.assert_allclose(dense.products.log_norms, np.log(0.9) * np.arange(6, 0, -1), rtol=1e-4)
    np.testing.assert_allclose(free.products.log_norms, dense.products.log_norms, atol=1e-3)
    np.testing.assert_allclose(free.spectra.singular_values[:, 0], 0.9, rtol=1e-4)


def test_an_infinite_leaf_that_is_not_read_is_no_fault():
    (step, params, state0, xs, loss), _, _ = problem("product")
    flow = bptt.gradient_flow(step, params, state0, xs, loss, spectra=False)
    assert (flow.verdict, int(flow.numerics.first_nonfinite_state)) == ("vanishing", 2)
    monitor = bptt.Monitor(step, loss)
    record = monitor(0, params, state0, batch_of(xs))
    assert (record.verdict, record.nonfinite) == ("vanishing", None)
    assert monitor.locate(params, state0, batch_of(xs)) is None


def test_one_that_is_nan_is_named_though_the_gradient_is_finite():
    def step(p, h, x):
        return {"a": tame(p, h, x), "b": wild(p, h) - wild(p, h)}

    (_, params, state0, xs, loss), _, _ = problem("product")
    state0["b"] = jnp.float32(1e30)
    flow = bptt.gradient_flow(step, params, state0, xs, loss, spectra=False)
    assert np.isfinite(flow.numerics.params_grad_log_norm)
    assert (flow.verdict, int(flow.numerics.first_nonfinite_state)) == ("non-finite", 0)
