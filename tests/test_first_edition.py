"""What the first edition refused, got wrong or could not give, one test for each; all of them were red on it.

Steps, states, losses and sequences as people bring them. What becomes of measurements made of these (rates,
spectra, exponents) is tested with the measurements.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error
from registry import spike

import bptt_jax as bptt


def last(states):
    return states[-1].sum()


# --- Steps


def branching(p, h, x):
    return jax.lax.cond(x[0] > 0, lambda h: p @ h, lambda h: 0.99 * h, h)


def switching(p, h, x):
    return jax.lax.switch(jnp.asarray(x[0] > 0, jnp.int32), [lambda h: 0.99 * h, lambda h: p @ h], h)


MIXED = np.asarray([1, -1, 1, 1, -1, 1], np.float32)[:, None] * np.ones(3, np.float32)


@pytest.mark.parametrize("step", [branching, switching])
@pytest.mark.parametrize("xs", [np.ones((6, 3), np.float32), MIXED], ids=["one branch", "both"])
def test_a_step_that_branches(step, xs):
    """The transpose of a batched branch is not known to JAX; that of one branch, batched afterwards, is."""
    problem = step, jnp.asarray([[0.9, 0.2, 0.0], [-0.3, 0.8, 0.1], [0.0, 0.1, 1.1]]), jnp.ones(3), xs, last

    def total(p):
        h = problem[2]
        for x in xs:
            h = step(p, h, x)
        return h.sum()

    expected = jax.grad(total)(problem[1])
    assert relative_error(bptt.adjoints(*problem).params_grad, expected) <= 1e-5
    assert relative_error(bptt.estimators.tbptt(*problem, k1=6, k2=6), expected) <= 1e-5
    bias = bptt.truncation_bias(*problem)
    assert bias.relative_error[-1] <= 1e-5 < bias.relative_error[0]
    contributions = bptt.temporal_contributions(*problem)
    assert np.all(np.isfinite(contributions.log_norms) == (xs[:, 0] > 0))
    np.testing.assert_allclose(np.sum(contributions.shares), 1, rtol=1e-5)


def firing(p, state, x):
    v = 0.8 * state["v"] * (1 - state["s"]) + p @ state["s"] + x
    return {"v": v, "s": spike(v)}


def test_a_step_with_a_backward_pass_of_its_own():
    """A surrogate gradient: the gradient is `jax.grad`'s, the Jacobians are those that make it up."""
    p = jnp.asarray([[0.5, -0.4], [0.3, 0.2]])
    state0 = {"v": jnp.asarray([0.1, -0.2]), "s": jnp.asarray([1.0, 0.0])}
    xs = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2)), jnp.float32)

    def loss(states):
        return jnp.sum(states["v"][-1] ** 2) + states["s"].sum()

    found = bptt.adjoints(firing, p, state0, xs, loss)
    expected = jax.grad(lambda p: loss(jax.lax.scan(lambda h, x: 2 * (firing(p, h, x),), state0, xs)[1]))(p)
    assert np.linalg.norm(expected) > 0.1
    assert relative_error(found.params_grad, expected) <= 1e-5
    got = bptt.jacobians(firing, p, state0, xs)
    at_start = jax.jacrev(firing, 1)(p, state0, xs[0])
    blocks = [[at_start[to][of] for of in ("s", "v")] for to in ("s", "v")]
    np.testing.assert_allclose(got[0], np.block(blocks), rtol=1e-6)
    with pytest.raises(TypeError, match='mode: this step cannot be differentiated by "forward"'):
        bptt.jacobians(firing, p, state0, xs, mode="forward")


def test_a_loop_of_unknown_length_is_refused_where_it_has_to_be():
    """Its Jacobians are known, a backward pass through it is not, and what helps is said."""

    def settling(w, h, times):
        return jax.lax.fori_loop(0, times, lambda i, h: jnp.tanh(w @ h), h)

    problem = settling, jnp.asarray([[0.5, 0.2], [0.1, -0.4]]), jnp.ones(2), jnp.asarray([1, 3, 2])
    assert bptt.jacobians(*problem).shape == (3, 2, 2)
    for analyse in (bptt.adjoints, bptt.temporal_contributions):
        with pytest.raises(TypeError, match=r"needs its backward pass, and it has none.*use lax.scan"):
            analyse(*problem, last)


# --- States


def counting(w, state, x):
    h, t, key = state["h"], state["t"], state["key"]
    key, now = jax.random.split(key)
    new = jnp.tanh(w @ h + x + jax.random.normal(now, h.shape)) / (1 + t.astype(h.dtype))
    return {"h": new, "t": t + 1, "key": key}


def test_what_is_no_floating_number_passes_through():
    w, xs = jnp.asarray([[0.5, 0.2], [0.1, -0.4]]), jnp.ones((4, 2))
    state0 = {"h": jnp.ones(2), "t": 0, "key": jax.random.key(3)}
    states = bptt.unroll(counting, w, state0, xs)
    np.testing.assert_array_equal(states["t"], [1, 2, 3, 4])
    assert bptt.jacobians(counting, w, state0, xs).shape == (4, 2, 2)
    found = bptt.adjoints(counting, w, state0, xs, lambda states: states["h"][-1].sum())
    assert found.adjoints["t"] is None
    assert found.adjoints["key"] is None

    def total(w):
        h = {**state0, "t": jnp.asarray(0)}
        for x in xs:
            h = counting(w, h, x)
        return h["h"].sum()

    assert relative_error(found.params_grad, jax.grad(total)(w)) <= 1e-5


def test_the_state_with_a_key_beside_it():
    found = bptt.adjoints(
        lambda w, state, x: (jnp.tanh(w * state[0] + x), state[1]),
        jnp.full(2, 0.5),
        (jnp.ones(2), jax.random.key(0)),
        jnp.ones((3, 2)),
        lambda states: states[0][-1].sum(),
    )
    assert found.state0_grad[1] is None
    assert found.adjoints[0].shape == (3, 2)


# --- Losses


def read_out(states, args):
    return jnp.mean((states @ args["out"] + args["b"] - 1) ** 2)


def test_a_readout_learns():
    """What the loss closed over had a gradient of zero, silently: 20 updates left the loss where it was."""
    cell = bptt.rnn(3)
    xs = jnp.asarray(np.random.default_rng(1).standard_normal((6, 2)), jnp.float32)
    params = {"cell": cell.init(jax.random.key(0), 2), "out": jnp.zeros(3), "b": jnp.zeros(())}
    losses = []
    for _ in range(20):
        args = {"out": params["out"], "b": params["b"]}
        found = bptt.adjoints(cell.step, params["cell"], cell.initial_state(), xs, read_out, args=args)
        losses.append(float(found.loss))
        grads = {"cell": found.params_grad, **found.args_grad}
        params = jax.tree.map(lambda p, g: p - 0.2 * g, params, grads)
    assert losses[0] == 1
    assert losses[-1] < 0.1


def test_layers_as_time_have_the_gradient_of_their_weights():
    rng = np.random.default_rng(2)
    layers = {"w": rng.standard_normal((4, 3, 3)) / 2, "b": rng.standard_normal((4, 3)) / 2}
    layers, h0 = jax.tree.map(jnp.float32, layers), jnp.ones(3)

    def step(params, h, layer):
        return jnp.tanh(layer["w"] @ h + layer["b"])

    found = bptt.adjoints(step, None, h0, layers, last, inputs=True)
    expected = jax.grad(lambda xs: jax.lax.scan(lambda h, x: (step(None, h, x), None), h0, xs)[0].sum())(layers)
    assert found.params_grad is None
    assert relative_error(found.xs_grad, expected) <= 1e-5
    norms = [np.sqrt(np.sum(w**2) + np.sum(b**2)) for w, b in zip(expected["w"], expected["b"], strict=True)]
    np.testing.assert_allclose(found.xs_log_norms, np.log(norms), rtol=1e-5)


def test_a_loss_beside_which_something_is_returned():
    found = bptt.adjoints(
        lambda w, h, x: w * h, 0.5, jnp.ones(1), None, lambda s: (s[-1, 0], s.sum()), has_aux=True, length=3
    )
    np.testing.assert_allclose(found.loss, 0.125)
    np.testing.assert_allclose(found.aux, 0.875)


def test_a_loss_for_new_targets_compiles_nothing(compilations):
    def loss(states, target):
        return jnp.sum((states[-1] - target) ** 2)

    def call(target):
        return bptt.adjoints(linear, 0.5, jnp.zeros(2), jnp.ones((3, 2)), loss, args=target).args_grad

    grads = [call(np.full(2, k, np.float32)) for k in (0, 1)]
    before = len(compilations)
    grads.append(call(np.full(2, 2, np.float32)))
    assert len(compilations) == before
    np.testing.assert_allclose(np.diff(grads, axis=0), 2, rtol=1e-6)


def linear(w, h, x):
    return w * h + x


def test_a_loss_made_anew_is_warned_of():
    def train():
        for k in range(3):
            bptt.adjoints(linear, 0.5, jnp.zeros(2), jnp.ones((3, 2)), lambda s, k=k: k * s.sum())

    with pytest.warns(bptt.RecompilationWarning, match=r"is made anew at every call.*args="):
        train()


def test_by_unit_where_float32_ends():
    """`adjoints` are 0 there; the logarithms of every entry and every leaf are not lost."""
    state0 = {"a": jnp.ones(2), "b": jnp.ones(())}

    def both(states):
        return states["a"][-1] @ jnp.asarray([1.0, 2.0**-60]) + 2.0**-100 * states["b"][-1]

    found = bptt.adjoints(lambda w, h, x: jax.tree.map(lambda h: w * h, h), 0.5, state0, None, both, length=400)
    assert found.adjoints["a"][0, 0] == 0
    np.testing.assert_allclose(found.log_magnitudes["a"][0] / np.log(2), [-399, -459], rtol=1e-5)
    np.testing.assert_allclose(found.leaf_log_norms["b"][0] / np.log(2), -499, rtol=1e-5)


# --- Sequences


def test_padding_is_as_if_it_were_not_there():
    """A trial of 6 steps, held to 15, the loss on the last state: the error signal dies over 6 steps, not 15."""
    cell = bptt.gru(4)
    params, h0 = cell.init(jax.random.key(0), 2), cell.initial_state()
    xs = jnp.asarray(np.random.default_rng(3).standard_normal((6, 2)), jnp.float32)
    padded = bptt.Sequence(jnp.concatenate([xs, jnp.full((9, 2), jnp.nan)]), mask=np.arange(15) < 6)
    got = bptt.adjoints(cell.step, params, h0, padded, last)
    alone = bptt.adjoints(cell.step, params, h0, xs, last)
    np.testing.assert_allclose(got.log_norms[:6], alone.log_norms, atol=1e-5)
    assert relative_error(got.params_grad, alone.params_grad) <= 1e-5
    added = bptt.temporal_contributions(cell.step, params, h0, padded, last)
    np.testing.assert_array_equal(added.log_norms[6:], -np.inf)


def test_an_episode_begins_anew():
    """Done flags: what came before is not lost by a Jacobian of zero, but is another piece."""
    cell = bptt.lstm(3)
    params, h0 = cell.init(jax.random.key(0), 2), cell.initial_state()
    xs = jnp.asarray(np.random.default_rng(4).standard_normal((8, 2)), jnp.float32)
    episodes = bptt.Sequence(xs, resets=np.arange(8) == 5)
    got = bptt.jacobians(cell.step, params, h0, episodes)
    for part in (slice(0, 5), slice(5, 8)):
        alone = bptt.jacobians(cell.step, params, h0, xs[part])
        np.testing.assert_allclose(got[part], alone, atol=1e-6)


# --- What is said


def test_a_batch_without_vmap_is_told_of_vmap():
    with pytest.raises(
        ValueError, match=r"xs: expected one sequence \[T, \.\.\.\], got float32\[4,5,2\].*jax.vmap"
    ):
        bptt.unroll(bptt.gru(3).step, bptt.gru(3).init(jax.random.key(0), 2), jnp.zeros(3), np.ones((4, 5, 2), "f"))


def test_a_step_that_returns_an_output_beside_the_state():
    with pytest.raises(ValueError, match=r"step: must return the new state alone, .* got a pair"):
        bptt.unroll(lambda w, h, x: (w * h, h), 0.5, jnp.zeros(2), length=3)


class Swapped(eqx.Module):
    """Called as ``cell(x, state) -> (output, state)``."""

    weight: jax.Array

    def __call__(self, x, state):
        state = jnp.tanh(self.weight @ state + x)
        return state.sum(), state


def test_a_module_that_is_called_in_the_other_order_is_not_run_with_its_arguments_exchanged():
    module = Swapped(jnp.eye(3))
    with pytest.raises(ValueError, match=r"second entry is like state0; return step\(params, state, x\)\[1\]"):
        bptt.unroll(lambda params, h, x: module(h, x), None, jnp.ones(3), jnp.ones((4, 3)))
