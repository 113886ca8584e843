"""The differentials kept from the forward pass: right, and small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun
from oracles import EXAMPLES, T, cell_params, floating, relative_error

import bptt_jax as bptt
from bptt_jax.recurrence import linearization
from bptt_jax.recurrence.linearization import linearize
from bptt_jax.recurrence.programs import depends, divided
from bptt_jax.step import bind


def jitted(step):
    return jax.jit(lambda params, h, x: step(params, h, x))


@pytest.mark.parametrize("wrap", [lambda step: step, jitted, lambda step: jitted(jitted(step))])
@pytest.mark.parametrize(("name", "arrays"), [("rnn", 2), ("gru", 5), ("lstm", 7)])
def test_what_is_kept_at_every_step(name, arrays, wrap):
    """The input; of an rnn h_{t-1} and h_t; of a gru h_{t-1}, r, z, n and what r multiplies; of an lstm h_{t-1},
    c_{t-1}, i, f, g, o and tanh(c_t). No matrix, and nothing twice."""
    n, inputs, steps = 64, 2, 5
    cell = getattr(bptt.cells, name)(n)
    params = cell_params(name, jnp.float32, n)

    def residuals(params, h, xs):
        return linearize(bind(wrap(cell.step), params, h, xs)).residuals

    kept = jax.eval_shape(residuals, params, cell.initial_state(), jnp.zeros((steps, inputs)))
    shapes = sorted(a.shape for a in jax.tree.leaves(kept))
    assert shapes == [(steps, inputs)] + [(steps, n)] * arrays


def test_what_the_parameters_alone_give_is_made_once():
    """Here sorted weights, in the step itself, and again for its derivative; not once for every step."""

    def step(w, h, x):
        return jnp.tanh(jnp.sort(w, axis=0).T @ h + x)

    w, h, xs = jnp.eye(3), jnp.zeros(3), jnp.ones((4, 3))
    program = jax.make_jaxpr(lambda w, h, xs: linearize(bind(step, w, h, xs)).residuals)(w, h, xs)
    (loop,) = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
    assert " sort[" in str(program)
    assert " sort[" not in str(loop)


@pytest.mark.parametrize(
    ("varies", "handed"), [([False, True], 3), ([True, False], 2), ([True, True], 0), ([False, False], 4)]
)
def test_a_divided_program_gives_the_same(varies, handed):
    def program(a, b):
        return a, jnp.sin(a) * b, jnp.cos(jnp.sin(a)), 3.0, jnp.exp(b)

    whole = jax.make_jaxpr(program)(1.0, 2.0)
    before, rest = map(jaxpr_as_fun, divided(whole, varies))
    inputs = [jnp.float32(0.3), jnp.float32(0.7)]
    given = before(*(v for v, changes in zip(inputs, varies, strict=True) if not changes))
    assert len(given) == handed
    changing = (v for v, changes in zip(inputs, varies, strict=True) if changes)
    np.testing.assert_array_equal(rest(*given, *changing), program(*inputs))


def test_which_results_may_depend_on_what_is_marked():
    """Through calls, and through branches, of which an input chooses one."""

    def found(*marks):
        def program(chosen, a, b):
            in_a_call = jax.jit(lambda a, b: (a + 1, b + 1))(a, b)
            in_branches = jax.lax.cond(chosen, lambda a, b: (a + 1, b + 1), lambda a, b: (2 * a, 2 * b), a, b)
            return *in_a_call, *in_branches, a * b

        return depends(jax.make_jaxpr(program)(True, 1.0, 2.0), list(marks))

    assert found(True, False, False) == [False, False, True, True, False]
    assert found(False, True, False) == [True, False, True, False, True]
    assert found(False, False, True) == [False, True, False, True, True]


def test_which_results_of_a_loop_may_depend_on_what_is_marked():
    """What is handed on from round to round takes as many rounds as there are hands."""

    def found(*marks):
        def program(constant, a, b, c, still, slices):
            def body(carry, slice):
                a, b, c, still = carry
                return (a + constant, b + a, c + b, still), (slice, 2 * still)

            return jax.lax.scan(body, (a, b, c, still), slices)

        one = 1.0
        return depends(jax.make_jaxpr(program)(one, one, one, one, one, jnp.ones(2)), list(marks))

    def marked(k):
        return found(*(i == k for i in range(6)))

    assert marked(0) == [True, True, True, False, False, False]
    assert marked(1) == [True, True, True, False, False, False]
    assert marked(2) == [False, True, True, False, False, False]
    assert marked(3) == [False, False, True, False, False, False]
    assert marked(4) == [False, False, False, True, False, True]
    assert marked(5) == [False, False, False, False, True, False]


def test_which_results_of_a_loop_of_unknown_length_may_depend_on_what_is_marked():
    """All, where the number of rounds does."""

    def found(*marks):
        def program(most, constant, count, a, b, still):
            def body(carry):
                count, a, b, still = carry
                return count + 1, a + constant, b + a, 2 * still

            return jax.lax.while_loop(lambda carry: carry[0] < most, body, (count, a, b, still))

        return depends(jax.make_jaxpr(program)(3, 1.0, 0, 1.0, 1.0, 1.0), list(marks))

    def marked(k):
        return found(*(i == k for i in range(6)))

    assert marked(0) == marked(2) == [True] * 4
    assert marked(1) == [False, True, True, False]
    assert marked(3) == [False, True, True, False]
    assert marked(4) == [False, False, True, False]
    assert marked(5) == [False, False, False, True]


def test_what_a_jitted_step_makes_of_its_weights_is_kept_once():
    """Inside the jitted call, half the weights are neither a parameter nor, in form, apart from state and input."""
    n, steps = 64, 5

    @jax.jit
    def step(w, h, x):
        return jnp.tanh((0.5 * w) @ h + x)

    def residuals(w, h, xs):
        return linearize(bind(step, w, h, xs)).residuals

    kept = jax.eval_shape(residuals, jnp.zeros((n, n)), jnp.zeros(n), jnp.zeros((steps, n)))
    assert sum(a.size for a in jax.tree.leaves(kept)) <= 5 * steps * n


def test_a_step_that_does_change_its_weights_keeps_them():
    """The other side: what depends on the input is kept for every step, or the differential would be wrong."""

    def step(w, h, x):
        return jnp.tanh((w * x) @ h)

    w, xs = jnp.asarray([[0.5, 1.0], [-1.0, 0.2]]), jnp.asarray([1.0, 2.0, -1.0])

    @jax.jit
    def both(h):
        along = linearize(bind(step, w, h, xs))
        starts = jnp.concatenate([h[None], along.states[:-1]])
        ones = jnp.ones((3, 2))
        pulled = jax.vmap(along.pull)(along.residuals, ones)
        return pulled, jax.vmap(lambda h, x, dh: jax.vjp(lambda h: step(w, h, x), h)[1](dh)[0])(starts, xs, ones)

    got, expected = both(jnp.asarray([0.3, -0.1]))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "chunk", "few"),
    [
        *((name, T, 0) for name in EXAMPLES),
        ("lstm", 3, 0),
        ("complex", 1, 0),
        *((name, T, 1 << 20) for name in EXAMPLES),
    ],
)
def test_differentials_against_vjp(name, chunk, few, x64, monkeypatch):
    """The gradient of the parameters by one contraction, by chunks, and step by step."""
    step, params, state0, xs, _ = EXAMPLES[name](jnp.float64)
    size = sum(a.size for a in jax.tree.leaves(state0))
    monkeypatch.setattr(linearization, "_CHUNK_NUMBERS", chunk * size)
    monkeypatch.setattr(linearization, "_FEW_PARAMS", few)
    rng = np.random.default_rng(5)

    def like(tree, *lead):
        return jax.tree.map(
            lambda a: jnp.asarray(rng.standard_normal((*lead, *a.shape)) * np.asarray(1, a.dtype)), tree
        )

    cotangents = like(state0, T)

    @jax.jit
    def both(cotangents):
        along = linearize(bind(step, params, state0, xs, T))
        starts = jax.tree.map(lambda h0, h: jnp.concatenate([h0[None], h[:-1]]), state0, along.states)
        got = (
            jax.vmap(along.pull)(along.residuals, cotangents),
            along.pull_made(along.contract_made(along.residuals, cotangents)),
            jax.vmap(along.pull_params)(along.residuals, cotangents),
        )

        def at(h, x, cotangent):
            d_params, d_h = jax.vjp(lambda p, h: step(p, h, x), params, h)[1](cotangent)
            return d_h, floating(d_params)

        d_h, d_params = jax.vmap(at)(starts, xs, cotangents)
        return got, (d_h, jax.tree.map(lambda d: jnp.sum(d, axis=0), d_params), d_params)

    for got, expected in zip(*both(cotangents), strict=True):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        assert relative_error(got, expected) <= 1e-12


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_all_of_one_differential_whichever_way_it_was_taken(mode):
    w, h, ones = jnp.asarray([[0.5, 1.0], [-1.0, 0.2]]), jnp.asarray([0.3, -0.1]), jnp.ones(2)
    xs = jnp.asarray([[0.2, -0.4]])

    def step(w, h, x):
        return jnp.tanh(w @ h + x**2)

    @jax.jit
    def both(xs):
        along = linearize(bind(step, w, h, xs), mode=mode, inputs=True)
        one = jax.tree.map(lambda a: a[0], along.residuals)
        made, pulled = along.pull_both(one, ones)
        pulled = along.pull_made(made), pulled, along.pull_inputs(one, ones), along.pull(one, ones)
        by_state = jax.jacobian(step, 1)(w, h, xs[0])
        pushed = along.push(one, h), by_state @ h
        return *zip(pulled, (*jax.vjp(step, w, h, xs[0])[1](ones), ones @ by_state), strict=True), pushed

    for got, expected in both(xs):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_in_padding_the_state_is_held_and_nothing_else_counts(mode):
    """Its differential is the identity with respect to the state, and zero with respect to parameters and input."""
    w, h, ones = jnp.asarray([[0.5, 1.0], [-1.0, 0.2]]), jnp.asarray([0.3, -0.1]), jnp.ones(2)

    def step(w, h, x):
        return jnp.tanh(w @ h + x)

    @jax.jit
    def of_padding(xs):
        along = linearize(bind(step, w, h, bptt.Sequence(xs, mask=jnp.arange(3) < 2)), mode=mode, inputs=True)
        padding = jax.tree.map(lambda a: a[2:], along.residuals)
        one = jax.tree.map(lambda a: a[0], padding)
        held = along.push(one, ones), along.pull(one, ones), along.pull_both(one, ones)[1]
        nothing = along.pull_inputs(one, ones), along.pull_made(along.pull_both(one, ones)[0])
        contracted = along.pull_made(along.contract_made(padding, ones[None]))
        return along.states[2] - along.states[1], held, (*nothing, along.pull_params(one, ones), contracted)

    moved, held, nothing = of_padding(jnp.ones((3, 2)))
    np.testing.assert_array_equal(moved, 0)
    for one in held:
        np.testing.assert_array_equal(one, ones)
    for one in nothing:
        np.testing.assert_array_equal(one, 0)
