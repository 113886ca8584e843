"""The loss: what it is given beside the states, what it may return, and what being made anew costs."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax import checks
from bptt_jax.analysis.loss import bind_loss

W, H, XS = jnp.asarray([[0.5, -0.3], [0.8, 0.1]]), jnp.asarray([0.2, -0.4]), jnp.arange(10.0).reshape(5, 2) / 7


def step(w, h, x):
    return jnp.tanh(w @ h + x)


adjoints = functools.partial(bptt.adjoints, step, W, H, XS)


def read_out(states, args):
    chosen = states[args["when"]] @ args["readout"]
    return jnp.sum((chosen - args["target"]) ** 2), {"chosen": chosen, "args": args}


ARGS = {"when": jnp.asarray([1, 4]), "readout": jnp.ones(2), "target": jnp.asarray([0.5, -1.0]), "none": None}


# --- What it is given, and what it may return


def test_gradient_of_what_the_loss_is_given():
    """Against `jax.grad`, None at what is no floating number; what stands beside the loss comes back as it is."""
    found = bptt.adjoints(step, W, H, XS, read_out, args=ARGS, has_aux=True)
    states = bptt.unroll(step, W, H, XS)

    def of_floats(readout, target):
        return read_out(states, ARGS | {"readout": readout, "target": target})[0]

    value, (readout, target) = jax.value_and_grad(of_floats, (0, 1))(ARGS["readout"], ARGS["target"])
    np.testing.assert_allclose(found.loss, value, rtol=1e-6)
    assert found.args_grad.keys() == ARGS.keys()
    assert found.args_grad["when"] is None
    assert found.args_grad["none"] is None
    np.testing.assert_allclose(found.args_grad["readout"], readout, rtol=1e-5)
    np.testing.assert_allclose(found.args_grad["target"], target, rtol=1e-5)
    np.testing.assert_allclose(found.aux["chosen"], states[ARGS["when"]] @ ARGS["readout"], rtol=1e-6)
    np.testing.assert_array_equal(found.aux["args"]["when"], ARGS["when"])


def test_without_args_there_is_no_gradient_of_them():
    found = adjoints(lambda states: jnp.sum(states))
    assert found.args_grad is None
    assert found.aux is None


@pytest.mark.parametrize("args", [0.5, np.float32(0.5), jnp.asarray(0.5), (jnp.asarray(0.5),), jnp.asarray([0.5])])
def test_args_are_any_pytree(args):
    def loss(states, args):
        return jnp.sum(states[-1] * jnp.reshape(jax.tree.leaves(args)[0], ()))

    found = adjoints(loss, args=args)
    assert jax.tree.structure(found.args_grad) == jax.tree.structure(args)
    np.testing.assert_allclose(jax.tree.leaves(found.args_grad)[0], jnp.sum(found.states[-1]), rtol=1e-6)


def test_args_of_integers_alone():
    found = adjoints(lambda states, when: states[when, 0], args=3)
    assert found.args_grad is None
    np.testing.assert_array_equal(found.log_norms[3:], [0, -np.inf])


# (loss, options, exception, message), in which … stands for anything.
BAD = [
    (
        lambda states: (states[0, 0], 1.0),
        {},
        TypeError,
        "loss: must return one number, got (float32[], float32[]); a pair (loss, aux) wants has_aux=True, or "
        "where there is no such option the loss alone",
    ),
    (
        lambda states: states[0, 0],
        {"has_aux": True},
        TypeError,
        "loss: with has_aux=True it must return a pair (loss, aux), got float32[]",
    ),
    (
        lambda states: (states[0, 0], 1.0, 2.0),
        {"has_aux": True},
        TypeError,
        "loss: with has_aux=True it must return a pair (loss, aux), got (float32[], float32[], float32[])",
    ),
    (lambda states: (states[0], 1.0), {"has_aux": True}, ValueError, "loss: must return a scalar, got shape [2]"),
    (lambda states: states[0, 0], {"has_aux": 1}, TypeError, "has_aux: expected True or False, got int"),
    (lambda states, args: states[0, 0], {"args": "a"}, TypeError, "args: expected an array of numbers, got str"),
    (
        lambda states: states[0, 0],
        {"args": 1.0},
        TypeError,
        "loss: expected a function called as loss(states, args), since args are given, got <lambda>(states)",
    ),
    (
        lambda states, args: states[0, 0],
        {},
        TypeError,
        "loss: expected a function called as loss(states), since args is not given, got…; give args=",
    ),
]


@pytest.mark.parametrize(("loss", "options", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_loss(loss, options, error, message, compilations):
    with pytest.raises(error) as caught:
        adjoints(loss, **options)
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert re.search("(?s)" + ".*".join(re.escape(part) for part in message.split("…")), said)
    assert compilations == []


# --- What being made anew costs


def test_one_compilation_however_often_the_args_change(compilations):
    def loss(states, target):
        return jnp.sum((states[-1] - target) ** 2)

    for target in (1.0, 2.0, -3.0):
        found = adjoints(loss, args=jnp.full(2, target))
        counted = len(compilations)
        expected = jnp.sum((found.states[-1] - target) ** 2)
        np.testing.assert_allclose(found.loss, expected, rtol=1e-6)
        del compilations[:]
        if target != 1.0:
            assert counted == 0
    assert counted == 0


@pytest.fixture
def warned(monkeypatch):
    """Warnings of this test, of a memory of its own."""
    monkeypatch.setattr(checks, "_seen", {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", bptt.RecompilationWarning)
        yield caught


def total(scale, states):
    return scale * jnp.sum(states[-1])


MADE_ANEW = {
    "lambda": lambda k: lambda states: k * jnp.sum(states[-1]),
    "partial": lambda k: functools.partial(total, k),
    "jitted": lambda k: jax.jit(lambda states: k * jnp.sum(states[-1])),
    "wrapped": lambda k: functools.wraps(total)(lambda states: k * jnp.sum(states[-1])),
}


@pytest.mark.parametrize("make", MADE_ANEW.values(), ids=MADE_ANEW)
def test_a_loss_made_anew_at_every_call_is_noticed_once(make, warned):
    for k in range(6):
        bind_loss(make(float(k)))
        assert len(warned) == (k >= 2)  # the third is no chance
    (message,) = [str(w.message) for w in warned]
    assert "loss: " in message
    assert "is made anew at every call, so everything is compiled anew each time" in message
    assert "args=" in message
    assert __file__ in message
    assert warned[0].category is bptt.RecompilationWarning


def test_the_warning_points_at_the_call(warned):
    for k in range(3):
        adjoints(lambda states, k=k: k * jnp.sum(states))
    assert warned[0].filename == __file__


class Losses:
    def __init__(self, scale):
        self.scale = scale

    def loss(self, states):
        return self.scale * jnp.sum(states[-1])


def test_what_jax_finds_again_is_not_noticed(warned, compilations):
    """The same function, and a method of the same object, though every access to it makes another one."""
    owner = Losses(2.0)
    for k in range(5):
        adjoints(owner.loss)
        bind_loss(total, 1.0)
        if k == 0:
            del compilations[:]
    assert warned == []
    assert compilations == []
    for k in range(5):
        bind_loss(Losses(float(k)).loss)
    assert len(warned) == 1


def test_two_functions_by_turns_are_noticed_where_they_are_made_anew(warned):
    """Those of other code are counted for themselves."""
    first, second = MADE_ANEW["lambda"], MADE_ANEW["jitted"]
    for k in range(6):
        bind_loss(first(k))
        bind_loss(second(k))
    assert len(warned) == 2


def test_within_a_traced_function_nothing_is_looked_up(warned):
    @jax.jit
    def update(w):
        for k in range(6):
            w = w - bptt.adjoints(step, w, H, XS, lambda states, k=k: k * jnp.sum(states)).params_grad
        return w

    jax.eval_shape(update, W)
    assert warned == []
