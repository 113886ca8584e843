"""Unrolling against a Python loop; rematerialisation by its values, its gradients, its jaxpr and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import EXAMPLES, T, cell_example, cell_params, relative_error, weighted_loss

import bptt_jax as bptt


@pytest.mark.parametrize("name", ["lstm", "tokens", "complex"])
def test_equal_to_a_python_loop(name, dtype):
    step, params, state0, xs, length = EXAMPLES[name](dtype)
    one_step = jax.jit(step)
    states, h = [], state0
    for k in range(T):
        h = one_step(params, h, jax.tree.map(lambda a, k=k: np.asarray(a)[k], xs))
        states.append(h)
    expected = jax.tree.map(lambda *hs: np.stack(hs), *states)
    got = bptt.unroll(step, params, state0, xs, length=length)
    # A fused step rounds otherwise than one on its own, and T steps stretch the difference.
    tolerance = 100 * jnp.finfo(dtype).eps
    assert relative_error(got, expected) <= tolerance
    assert jax.tree.structure(got) == jax.tree.structure(state0)
    last = bptt.final_state(step, params, state0, xs, length=length)
    assert relative_error(last, jax.tree.map(lambda a: a[-1], expected)) <= tolerance


def test_options_change_neither_values_nor_gradients():
    step, params, state0, xs, _ = cell_example("lstm", jnp.float32)
    options = [{}, {"remat": True}, {"remat": 2}, {"remat": 100, "unroll": 3}, {"unroll": 2}]

    @jax.jit
    def with_all(params):
        def value(params, **options):
            states = bptt.unroll(step, params, state0, xs, **options)
            last = bptt.final_state(step, params, state0, xs, **options)
            return weighted_loss(jnp.arange(1.0, T + 1))(states) + last.h[0], (states, last)

        evaluate = jax.value_and_grad(value, has_aux=True)
        return [evaluate(params, **option) for option in options]

    plain, *others = with_all(params)
    for option, other in zip(options[1:], others, strict=True):
        assert relative_error(other, plain) <= 1e-6, option


@pytest.mark.parametrize(("platform", "asked", "at_once"), [("gpu", None, 4), ("gpu", 2, 2), ("cpu", None, 1)])
def test_a_round_of_the_loop_takes_several_steps_on_a_gpu(platform, asked, at_once, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    for function in (bptt.unroll, bptt.final_state):
        run = jax.make_jaxpr(lambda h, f=function: f(lambda p, h, x: p * h, 0.5, h, length=7, unroll=asked))
        assert f"unroll={at_once}\n" in str(run(jnp.ones(2)))


def test_autonomous_step_receives_none():
    def step(p, h, x):
        assert x is None
        return p * h

    got = bptt.unroll(step, jnp.float32(2), jnp.float32(1), length=5, remat=2)
    np.testing.assert_array_equal(got, [2, 4, 8, 16, 32])


def test_segments_of_square_root_length():
    """The jaxpr has a checkpoint of ceil(sqrt(10)) = 4 steps, and one of the 2 that rest; the plain one none."""
    step, params, state0, xs, _ = cell_example("rnn", jnp.float32, steps=10)

    def jaxpr(remat):
        return str(jax.make_jaxpr(lambda p: bptt.final_state(step, p, state0, xs, remat=remat))(params))

    assert "checkpoint" not in jaxpr(False)
    assert jaxpr(True).count("checkpoint[") + jaxpr(True).count("remat2[") == 2  # whole segments, and the rest
    assert "length=4" in jaxpr(True)
    assert "length=2" in jaxpr(True)
    assert "length=5" in jaxpr(5)


@pytest.mark.parametrize(("remat", "growth"), [(True, 4), (False, 16)])
def test_memory_of_the_gradient(remat, growth):
    """From T to 16 T: four times as much with segments of sqrt(T), sixteen times without. Bytes, as compiled."""
    step = bptt.rnn(64).step
    params = cell_params("rnn", jnp.float32, 64)

    def temporary(steps):
        def loss(params, h0, xs):
            return jnp.sum(bptt.final_state(step, params, h0, xs, remat=remat))

        inputs = jnp.zeros(64), jnp.zeros((steps, 2))
        return jax.jit(jax.grad(loss)).lower(params, *inputs).compile().memory_analysis().temp_size_in_bytes

    # What does not depend on T (the weights' gradient) is taken off; ceil(sqrt) and padding make it inexact.
    small, middle, large = temporary(400), temporary(6400), temporary(102_400)
    np.testing.assert_allclose((large - middle) / (middle - small), growth, rtol=0.15)


def test_one_trace_for_one_shape():
    traces = []

    def step(p, h, x):
        traces.append(None)
        return p * h + x

    for p in (0.5, 0.7):
        bptt.unroll(step, jnp.float32(p), jnp.zeros(()), p * np.ones(4, np.float32), remat=2)
        if p == 0.5:
            first = len(traces)
    assert len(traces) == first


def test_without_compilation_the_step_sees_numbers():
    """As in `jax.lax.scan`: one can print them, or stop there."""
    seen = []

    def step(w, h, x):
        if not isinstance(h, jax.core.Tracer):
            seen.append(float(h[0]))
        return jnp.sin(w) * h + x

    with jax.disable_jit():
        states = bptt.unroll(step, jnp.asarray(0.5), jnp.zeros(1), jnp.ones((3, 1)))
    assert seen == [0.0, *map(float, states[:-1, 0])]
