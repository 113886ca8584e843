"""What a step makes of its parameters alone: made once, differentiated once, and the same as if it were not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.recurrence.preparation import preparation
from bptt_jax.step import bind, check_step, differentiable_part

T, N = 5, 3


@jax.custom_vjp
def doubled(w):
    return 2 * w


doubled.defvjp(lambda w: (2 * w, None), lambda _, g: (2 * g,))


def weights(params):
    """An orthogonal matrix, some of whose columns are left out by an order that does not move."""
    a = params["a"] - params["a"].T
    w = jnp.linalg.solve(jnp.eye(N) + a, jnp.eye(N) - a)
    return w[:, jnp.argsort(params["order"])] * jnp.where(params["a"] > 0, 1.0, 0.5)


def step(params, h, x):
    halves = jnp.split(params["halves"], 2)
    chosen = jax.lax.cond(params["a"][0, 1] > 0, lambda: halves[0], lambda: halves[1])
    kept = jax.lax.stop_gradient(params["scale"])
    return jnp.tanh(weights(params) @ h + chosen * x + kept * h)


def batched(params, h, x):
    """The batch written into the step, which then broadcasts the bias."""
    return jnp.tanh(h @ params["a"].T + x + jnp.broadcast_to(params["halves"][:N], x.shape))


@pytest.fixture
def x64():
    """In every thread: callbacks may run in another, where JAX makes singles of their numbers if it has no doubles."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def backwards_alone(params, h, x):
    return jnp.tanh(doubled(params["a"]) @ h + x)


def without_derivative(params, h, x):
    """What is made comes from outside of JAX."""
    made = jax.pure_callback(np.sin, params["a"], params["a"], vmap_method="sequential")
    return jnp.tanh(made @ h + x)


def with_constants_outside(params, h, x):
    """What is made of integers, and the inputs, go where there is no derivative."""
    order = jnp.sin(params["order"].astype(x.dtype))
    moved = jax.pure_callback(lambda a, b: np.multiply(a, b, dtype=x.dtype), x, order, x, vmap_method="sequential")
    return jnp.tanh(weights(params) @ h + moved)


def case(batch=()):
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(0.4 * rng.standard_normal((N, N))),
        "halves": jnp.asarray(rng.standard_normal(2 * N)),
        "scale": jnp.asarray(0.3),
        "order": jnp.asarray([2, 0, 1]),
        "unread": jnp.ones((7, 7)),
    }
    return params, jnp.asarray(rng.standard_normal((*batch, N))), jnp.asarray(rng.standard_normal((T, *batch, N)))


def loss(states):
    return jnp.sum(jnp.sin(states) * jnp.arange(1.0, T + 1).reshape(-1, *[1] * (states.ndim - 1)))


STEPS = {
    "plain": (step, ()),
    "compiled": (jax.jit(step), ()),
    "compiled twice": (jax.jit(lambda *given: jax.jit(step)(*given)), ()),
    "rematerialised": (jax.checkpoint(step), ()),
    "batched": (batched, (2,)),
    "backwards alone": (backwards_alone, ()),
    "constants outside": (with_constants_outside, ()),
}


@pytest.mark.parametrize("name", STEPS)
def test_gradients_are_those_of_a_plain_scan(name, x64):
    step, batch = STEPS[name]
    params, h, xs = case(batch)
    floating, merge = differentiable_part(params)

    def plain(p):
        return loss(jax.lax.scan(lambda h, x: (new := step(merge(p), h, x), new), h, xs)[1])

    value, expected = jax.jit(jax.value_and_grad(plain))(floating)
    ways = {
        "unroll": jax.jit(jax.value_and_grad(lambda p: loss(bptt.unroll(step, merge(p), h, xs))))(floating),
        "in segments": jax.jit(jax.value_and_grad(lambda p: loss(bptt.unroll(step, merge(p), h, xs, remat=2))))(
            floating
        ),
    }
    for remat in (False, 2):
        found = bptt.adjoints(step, params, h, xs, loss, remat=remat)
        ways["adjoints", remat] = found.loss, found.params_grad
    ways["truncated"] = value, bptt.estimators.tbptt(step, params, h, xs, loss, k1=1, k2=T)
    for got, gradient in ways.values():
        np.testing.assert_allclose(got, value, rtol=1e-12)
        assert jax.tree.structure(gradient) == jax.tree.structure(expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), gradient, expected)
    parts = bptt.temporal_contributions(step, params, h, xs, loss)
    np.testing.assert_allclose(np.sum(parts.shares), 1, rtol=1e-12)


def test_second_derivatives_are_those_of_a_plain_scan(x64):
    params, h, xs = case()
    floating, merge = differentiable_part(params)
    ways = (
        lambda p: loss(jax.lax.scan(lambda h, x: (new := step(merge(p), h, x), new), h, xs)[1]),
        lambda p: loss(bptt.unroll(step, merge(p), h, xs)),
    )

    def of_gradient(way):
        return jax.jit(jax.grad(lambda p: jnp.sum(jax.grad(way)(p)["a"] ** 2)))(floating)

    expected, found = map(of_gradient, ways)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected)


@pytest.mark.parametrize("name", ["plain", "compiled", "compiled twice"])
def test_what_is_made(name):
    """The matrix and one half move with the parameters; the scale, whose derivative is stopped, does not."""
    given, _ = STEPS[name]
    recurrence = check_step(bind(given, *case()))
    parts = preparation(recurrence, live=[True])
    made, constants = parts.make(differentiable_part(recurrence.params)[0])
    assert sorted(a.shape for a in made) == [(N,), (N, N)]
    assert [a.shape for a in constants] == [()]
    new = parts.finish(made, constants).advance(
        recurrence.state0, jax.tree.map(lambda a: a[0], recurrence.instants)
    )
    expected = step(recurrence.params, recurrence.state0, recurrence.instants.x[0])
    np.testing.assert_allclose(new, expected, rtol=1e-6)


def rounds(params, h, x):
    return jnp.tanh(rounded(params["a"]) @ rounded(h) + rounded(params["halves"][:N]) + rounded(x)).astype(h.dtype)


def rounds_within(params, h, x):
    w = jax.checkpoint(lambda a: 2 * rounded(a).astype(a.dtype))(params["a"])
    return jnp.tanh(w @ h + x)


def rounded(a):
    return a.astype(jnp.bfloat16)


@pytest.mark.parametrize("step", [rounds, rounds_within])
def test_what_comes_back_from_rounded_parameters_is_added_up_as_finely_as_these_are(step):
    """Of more than 256 numbers alike the sum in bfloat16 grows no more, and one in float32 is not rounded."""
    params, h, xs = jax.tree.map(lambda a: a.astype(jnp.float32), case())
    xs, floating = jnp.tile(xs, (200, 1)) + 1, {k: params[k] for k in ("a", "halves")}

    def plain(p):
        return jnp.mean(jax.lax.scan(lambda h, x: (new := step(p, h, x), new), h, xs)[1])

    expected = jax.jit(jax.grad(plain))(floating)
    for found in (
        jax.grad(lambda p: jnp.mean(bptt.unroll(step, p, h, xs)))(floating),
        bptt.adjoints(step, floating, h, xs, jnp.mean).params_grad,
        bptt.estimators.tbptt(step, floating, h, xs, jnp.mean, k1=1000, k2=1000),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


def test_what_would_be_larger_is_not_made():
    recurrence = check_step(bind(batched, *case((20,))))
    made, _ = preparation(recurrence).make(differentiable_part(recurrence.params)[0])
    assert sorted(a.shape for a in made) == [(N,), (N, N)]


@pytest.mark.parametrize("name", ["plain", "compiled"])
def test_no_loop_solves(name):
    """Neither forwards nor backwards."""
    given, _ = STEPS[name]
    params, h, xs = case()
    floating, merge = differentiable_part(params)

    def plain(p):
        return loss(jax.lax.scan(lambda h, x: (new := given(merge(p), h, x), new), h, xs)[1])

    assert solving_loops(jax.grad(plain), floating)
    for way in (
        jax.grad(lambda p: loss(bptt.unroll(given, merge(p), h, xs))),
        lambda p: bptt.adjoints(given, merge(p), h, xs, loss).params_grad,
        lambda p: bptt.estimators.tbptt(given, merge(p), h, xs, loss, k1=1, k2=2),
    ):
        assert not solving_loops(way, floating)


def counts(params, h, x):
    """Beside what a loss may read, a leaf that it may not."""
    new = jnp.tanh(params["a"] @ h["h"] + x)
    return {"h": new, "other": h["other"] + jnp.sqrt(params["zeros"])}


def compares(params, h, x):
    new = params["a"] @ h["h"] + jnp.where(h["h"] > jnp.sqrt(params["zeros"]), x, -x)
    return {"h": jnp.tanh(new), "other": h["other"]}


def adds(params, h, x):
    return {"h": jnp.tanh(params["a"] @ h["h"] + x + jnp.sqrt(params["zeros"])), "other": h["other"]}


@pytest.mark.parametrize("step", [counts, compares, adds])
def test_an_infinite_derivative_of_what_is_made_and_not_read(step, x64):
    """There is no cotangent to multiply it: it is not NaN."""
    params, h, xs = case()
    params = {"a": params["a"], "zeros": jnp.zeros(N)}
    h = {"h": h, "other": jnp.zeros(N)}
    if step is adds:  # read at every step, of which none is real
        xs = bptt.Sequence(xs, mask=jnp.zeros(T, bool))
        expected = jax.tree.map(jnp.zeros_like, params)
    else:
        expected = jax.jit(
            jax.grad(
                lambda p: loss(jax.lax.scan(lambda h, x: (new := step(p, h, x), new), h, xs)[1]["h"]),
            )
        )(params)
    ways = [bptt.adjoints(step, params, h, xs, lambda s: loss(s["h"]), remat=r).params_grad for r in (False, 2)]
    ways.append(bptt.estimators.tbptt(step, params, h, xs, lambda s: loss(s["h"]), k1=1, k2=T))
    for found in ways:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected)


def test_what_is_made_needs_no_derivative(x64):
    """Where none is asked for; and what does not come from there has its own."""
    params, h, xs = case()

    def plain(xs):
        return jax.lax.scan(lambda h, x: (new := without_derivative(params, h, x), new), h, xs)[1]

    def prepared(xs):
        return bptt.unroll(without_derivative, params, h, xs)

    np.testing.assert_allclose(prepared(xs), plain(xs), rtol=1e-12)
    last = bptt.final_state(without_derivative, params, h, xs, remat=2)
    np.testing.assert_allclose(last, plain(xs)[-1], rtol=1e-12)
    of_inputs, expected = (jax.grad(lambda xs, way=way: loss(way(xs)))(xs) for way in (prepared, plain))
    np.testing.assert_allclose(of_inputs, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="callbacks do not support JVP"):
        jax.grad(lambda p: loss(bptt.unroll(without_derivative, differentiable_part(params)[1](p), h, xs)))(
            differentiable_part(params)[0]
        )
    with pytest.raises(TypeError, match="step: it cannot be differentiated"):
        bptt.adjoints(without_derivative, params, h, xs, loss)
    with pytest.raises(TypeError, match="step: it cannot be differentiated"):
        bptt.jacobians(without_derivative, params, h, xs)


def test_why_a_step_goes_neither_way_is_said_of_both():
    @jax.custom_vjp
    def solved(h):
        return jnp.tanh(h)

    def backward(kept, g):
        raise ValueError("a solve without max_steps has no backward pass")

    solved.defvjp(lambda h: (jnp.tanh(h), None), backward)
    both = r"forwards \(TypeError: .*custom_vjp.*\) nor backwards \(ValueError: a solve without max_steps"
    with pytest.raises(TypeError, match=both):
        bptt.jacobians(lambda w, h, x: w * solved(h), jnp.ones(3), jnp.ones(3), length=4)


def test_a_loop_of_unknown_length_over_the_parameters_alone():
    """Forwards it works; what goes backwards says that it cannot."""

    def step(params, h, x):
        def shrink(a):
            return a / 2

        return jnp.tanh(jax.lax.while_loop(lambda a: jnp.max(jnp.abs(a)) > 0.3, shrink, params["a"]) @ h + x)

    given = step, *case()
    assert bptt.jacobians(*given).shape == (T, N, N)
    with pytest.raises(TypeError, match="step: the error signal needs its backward pass, and it has none"):
        bptt.adjoints(*given, loss)


def solving_loops(function, *args):
    """Loops over T instants within which a triangular system is solved."""
    found = []

    def look(jaxpr, loop):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "triangular_solve" and loop is not None:
                found.append(loop)
            inside = eqn if eqn.primitive.name == "scan" and eqn.params["length"] == T else loop
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    look(inner, inside)

    look(jax.make_jaxpr(function)(*args).jaxpr, None)
    return found
