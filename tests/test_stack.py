"""Layers as one step, against one layer after the other over the whole sequence."""

from typing import Any, NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import I, N, T, cell_example, cell_params, relative_error

import bptt_jax as bptt
from bptt_jax.cells.layers import stacked


def test_matrices_are_read_as_the_caller_says_and_not_otherwise():
    """Whatever the layer above makes of them: an error, or a state of another shape."""
    below, above = bptt.cells.deltanet(4, heads=2, key_size=4), bptt.rnn(4)
    params = below.init(jax.random.key(0), I), above.init(jax.random.key(1), 8)
    state0, xs = (below.initial_state(), above.initial_state()), jnp.ones((T, I))
    for wrong, end in (
        (above.step, "got None; layer 1 says: "),
        (lambda params, h, x: h[None] + x[0], "got None\\n"),
    ):
        with pytest.raises(
            ValueError, match=rf"output: expected .* from the state of layer 0, which is \[2, 2, 4\], {end}"
        ):
            bptt.unroll(bptt.stack(below.step, wrong), params, state0, xs)
    read = bptt.stack(below.step, above.step, output=lambda s: s[..., 0].ravel())
    params = params[0], above.init(jax.random.key(1), 4)
    states = bptt.unroll(read, params, state0, xs)
    alone = bptt.unroll(above.step, params[1], state0[1], states[0][..., 0].reshape(T, 4))
    np.testing.assert_allclose(states[1], alone, rtol=1e-5)
    images = bptt.stack(lambda params, h, x: h + x, lambda params, h, x: h + x)  # these are read as they are
    assert bptt.unroll(images, (None, None), (jnp.zeros((2, 2)),) * 2, jnp.ones((T, 2, 2)))[1].shape == (T, 2, 2)


def test_layers_one_after_the_other(x64):
    """The states of layer n are those of its own step over the outputs of layer n - 1; so are the gradients."""
    bottom, middle, top = (cell_example(name, jnp.float64) for name in ("gru", "lstm", "rnn"))
    step = bptt.stack(bottom.step, middle.step, top.step)
    params = (bottom.params, *(cell_params(name, jnp.float64, inputs=N, seed=7) for name in ("lstm", "rnn")))
    state0 = (bottom.state0, middle.state0, top.state0)

    def layer_by_layer(params, state0):
        first = bptt.unroll(bottom.step, params[0], state0[0], bottom.xs)
        second = bptt.unroll(middle.step, params[1], state0[1], first)
        return first, second, bptt.unroll(top.step, params[2], state0[2], second.h)

    def loss(states):
        return jnp.sum(states[2][-1]) + jnp.sum(jnp.square(states[1].c))

    @jax.jit
    def both(params, state0):
        got = jax.value_and_grad(
            lambda p, h: (lambda s: (loss(s), s))(bptt.unroll(step, p, h, bottom.xs)), (0, 1), True
        )
        expected = jax.value_and_grad(lambda p, h: (lambda s: (loss(s), s))(layer_by_layer(p, h)), (0, 1), True)
        return got(params, state0), expected(params, state0), bptt.jacobians(step, params, state0, bottom.xs)

    got, expected, jacobians = both(params, state0)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert relative_error(got, expected) < 1e-13
    size = np.cumsum([0, N, 2 * N, N])
    for row in range(3):  # block lower triangular, and every block below the diagonal is there
        for column in range(3):
            block = jacobians[:, size[row] : size[row + 1], size[column] : size[column + 1]]
            assert bool(np.any(block)) == (column <= row)


def test_output_says_what_a_layer_hands_on():
    """Of Equinox's ``(h, c)`` h, of a Flax-like ``(c, h)`` h too, and the top is never asked."""

    def carry_step(params, carry, x):
        return 0.5 * carry[0] + params * x, jnp.tanh(carry[1] + x)

    cell = eqx.filter_eval_shape(eqx.nn.LSTMCell, I, N, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    cell = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32), cell)
    equinox_step, params = bptt.from_equinox(cell)
    top = cell_example("rnn", jnp.float32)
    state0 = ((jnp.zeros(N), jnp.zeros(N)), (jnp.zeros(N), jnp.full(N, 0.1)), top.state0)
    x, w = jnp.ones(I), cell_params("rnn", jnp.float32, inputs=N)

    def never(state):
        raise AssertionError

    step = bptt.stack(equinox_step, carry_step, top.step, output=[lambda s: s[0], lambda s: s[1], never])
    got = step((params, jnp.float32(2), w), state0, x)
    lower = cell(x, state0[0])
    between = carry_step(jnp.float32(2), state0[1], lower[0])
    assert relative_error(got, (lower, between, top.step(w, top.state0, between[1]))) == 0
    alike = bptt.stack(carry_step, carry_step, output=lambda s: s[1])
    got = alike((jnp.float32(1), jnp.float32(2)), (state0[1], state0[1]), jnp.ones(N))
    between = carry_step(jnp.float32(1), state0[1], jnp.ones(N))
    assert relative_error(got, (between, carry_step(jnp.float32(2), state0[1], between[1]))) == 0


def test_one_layer_and_stacks_of_stacks():
    step, params, state0, xs, _ = cell_example("rnn", jnp.float32)
    deeper = cell_params("rnn", jnp.float32, inputs=N)
    assert relative_error(bptt.stack(step)((params,), (state0,), xs[0]), step(params, state0, xs[0])) == 0
    nested = bptt.stack(bptt.stack(step, step), step, output=lambda states: states[-1])
    flat = bptt.stack(step, step, step)(*(((a, b, b)) for a, b in ((params, deeper), (state0, state0))), xs[0])
    got = nested(((params, deeper), deeper), ((state0, state0), state0), xs[0])
    assert relative_error(got, flat) == 0


class Layers(NamedTuple):
    """From the input upwards, in the order that the alphabet does not have."""

    noisy: Any
    counting: Any


def noisy_step(params, state, x):
    key, new = jax.random.split(state["key"])
    h = jnp.tanh(params @ state["h"] + x + 0.1 * jax.random.normal(new, state["h"].shape))
    return {"h": h, "key": key}


def counting_step(params, state, x):
    h, count = state
    return jnp.where(count % 2 == 0, jnp.tanh(params @ h + x), 0.9 * h), count + 1


@pytest.mark.parametrize("layers", [list, Layers._make])
def test_layers_with_names_counters_and_keys(layers):
    """States and gradients of one layer over the other's whole sequence; the container stays as it came."""
    rng = np.random.default_rng(4)
    params = layers([jnp.asarray(rng.standard_normal((N, N)), jnp.float32) for _ in range(2)])
    h0 = jnp.asarray(rng.standard_normal(N), jnp.float32)
    state0 = layers([{"h": h0, "key": jax.random.key(1)}, (h0, jnp.asarray(0))])
    xs = jnp.asarray(rng.standard_normal((T, N)), jnp.float32)
    step = bptt.stack(noisy_step, counting_step, output=lambda state: state["h"])

    def upper(states):
        return jnp.sum(jnp.square(states[1][0]))

    def layer_by_layer(params):
        lower = bptt.unroll(noisy_step, params[0], state0[0], xs)
        states = lower, bptt.unroll(counting_step, params[1], state0[1], lower["h"])
        return upper(states), states

    found = bptt.adjoints(step, params, state0, xs, upper)
    (loss, states), gradient = jax.jit(jax.value_and_grad(layer_by_layer, has_aux=True))(params)
    assert jax.tree.structure(found.states) == jax.tree.structure(state0)
    np.testing.assert_array_equal(found.states[1][1], np.arange(1, T + 1))
    chex.assert_trees_all_close(
        (found.loss, found.states[0]["h"], found.states[1][0], found.params_grad),
        (loss, states[0]["h"], states[1][0], gradient),
        rtol=1e-5,
        atol=1e-6,
    )


def test_dtypes_that_differ():
    """A layer that would leave its dtype is told what casts; layers of one file are cast, states and gradients."""
    lower, upper = bptt.gru(2, dtype=jnp.float32), bptt.lstm(2, dtype=jnp.bfloat16)
    params = lower.init(jax.random.key(0), 2), upper.init(jax.random.key(1), 2)
    h0, xs = (lower.initial_state(), upper.initial_state()), jnp.ones((3, 2))
    message = "output: expected .* layer 1 its input in the dtype of its state, bfloat16, got float32 from layer 0"
    with jax.numpy_dtype_promotion("standard"), pytest.raises(TypeError, match=message):
        bptt.unroll(bptt.stack(lower.step, upper.step), params, h0, xs)
    step, same, state0 = stacked([(lower.step, params[0], h0[0]), (upper.step, params[1], h0[1])])
    assert step == stacked([(lower.step, params[0], h0[0]), (upper.step, params[1], h0[1])])[0]

    def both(x):
        below = bptt.unroll(lower.step, params[0], h0[0], x)
        return below, bptt.unroll(upper.step, params[1], h0[1], below.astype(jnp.bfloat16))

    def gradient(of):
        return jax.grad(lambda x: jnp.sum(of(x)[1].h[-1].astype(jnp.float32)))(xs)

    got = bptt.unroll(step, same, state0, xs)
    jax.tree.map(np.testing.assert_array_equal, got, both(xs))
    np.testing.assert_allclose(gradient(lambda x: bptt.unroll(step, same, state0, x)), gradient(both), rtol=0.03)


def test_wrong_arguments():
    step, params, h, xs, _ = cell_example("rnn", jnp.float32)
    two = bptt.stack(step, step)
    for make, error, message in (
        (lambda: bptt.stack(), ValueError, "steps: expected at least one layer, got none"),
        (lambda: bptt.stack(step, bptt.rnn(3)), TypeError, r"steps\[1\]: expected a function step.* got Cell"),
        (lambda: bptt.stack(step, output=3), TypeError, "output: expected a function of a layer's state.* got 3"),
        (lambda: bptt.stack(step, output=[None]), TypeError, r"output: expected a function .* got \[None\]"),
        (lambda: bptt.stack(step, output=[max, max]), ValueError, "output: expected one function for each of 1"),
        (lambda: bptt.unroll(two, params, (h, h), xs), ValueError, "params: expected 2, one for each layer, got 3"),
        (lambda: bptt.unroll(two, (params, params), h, xs), TypeError, "state: expected a tuple of 2, .* got "),
        (lambda: bptt.unroll(two, (params, params), (h,), xs), ValueError, "state: expected 2, .* got 1"),
    ):
        with pytest.raises(error, match=message):
            make()

    def pair_step(params, state, x):
        return state

    with pytest.raises(TypeError, match=r"output: expected a function that reads a layer's output .* got None"):
        bptt.unroll(bptt.stack(pair_step, step), ((), params), ((h, h), h), jnp.ones((T, N)))


@pytest.mark.parametrize("name", ["slstm", "clockwork", "intersection_rnn"])
def test_a_layer_of_several_arrays_hands_on_its_first(name):
    lower, upper = getattr(bptt.cells, name)(4), bptt.rnn(3)
    params = lower.init(jax.random.key(0), 2), upper.init(jax.random.key(1), 4)
    h0, x = (lower.initial_state(), upper.initial_state()), jnp.ones(2)
    below, above = bptt.stack(lower.step, upper.step)(params, h0, x)
    np.testing.assert_array_equal(above, upper.step(params[1], h0[1], below[0]))
    assert np.any(below[0])
