"""The commonest slips: what is said names the argument, what came, what was expected, and what to write."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt

GRU, LSTM, RNN = bptt.gru(4), bptt.lstm(4), bptt.rnn(4)
NOISY, MATRIX = bptt.cells.leaky_rnn(4, noise=0.1), bptt.cells.mlstm(4, heads=1)
KEY = jax.random.key(0)
GRU_PARAMS, LSTM_PARAMS, RNN_PARAMS = (cell.init(KEY, 3) for cell in (GRU, LSTM, RNN))
H, HC = GRU.initial_state(), LSTM.initial_state()
STARTS = jnp.ones((2, 4))
XS, BATCH, TIME_FIRST = np.ones((5, 3), np.float32), np.ones((2, 5, 3), np.float32), np.ones((5, 2, 3), np.float32)
LISTS = [[0.5, 0.0], [0.0, 0.5]]


def last(states):
    return jnp.sum(jax.tree.leaves(states)[0][-1])


def bare(params, h, x):
    return jnp.tanh(params @ h + x)


def embedded(params, h, token):
    return RNN.step(params["cell"], h, params["rows"][token].reshape(3))


def returning(f):
    """The adjoints of a step that makes something of the new state."""
    return lambda: bptt.adjoints(lambda p, h, x: f(GRU.step(p, h, x)), GRU_PARAMS, H, XS, last)


def with_loss(loss, **options):
    return lambda: bptt.adjoints(GRU.step, GRU_PARAMS, H, XS, loss, **options)


def of(step, params, state0, xs):
    return lambda: bptt.adjoints(step, params, state0, xs, last)


SLIPS = {
    # a batch
    "Keras's [B, T, F]": (
        of(GRU.step, GRU_PARAMS, H, BATCH),
        "xs: expected one sequence [T, ...], got float32[2,5,3]…a batch…jax.vmap(lambda xs: f(step, params, state0, xs",
    ),
    "PyTorch's [T, B, F]": (of(GRU.step, GRU_PARAMS, H, TIME_FIRST), "xs: …float32[5,2,3]…jax.vmap(..., in_axes=1)"),
    "a batch with states": (
        of(GRU.step, GRU_PARAMS, jnp.zeros((2, 4)), BATCH),
        "state0, xs: expected…got float32[2,4] and float32[2,5,3]: a batch; jax.vmap over both…(state0, xs)",
    ),
    "PyTorch's h [1, B, H]": (
        of(GRU.step, GRU_PARAMS, jnp.zeros((1, 2, 4)), TIME_FIRST),
        "state0, xs: …got float32[1,2,4] and…jax.vmap(lambda h, xs: f(…))(state0[0], xs), with in_axes=(0, 1)",
    ),
    "a state of a batch": (
        of(GRU.step, GRU_PARAMS, jnp.zeros((2, 4)), XS),
        "state0: expected the state of one sequence, got float32[2,4]…one axis less; give state0[0]",
    ),
    "a state of layers and batch": (
        of(LSTM.step, LSTM_PARAMS, jax.tree.map(lambda a: jnp.zeros((1, 1, 4)), HC), XS),
        "state0: …two axes less; give jax.tree.map(lambda a: a[0, 0], state0)",
    ),
    "a batch with keys": (
        of(NOISY.step, NOISY.init(KEY, 3), H, (BATCH, jax.random.split(KEY, (2, 5)))),
        "xs: expected one sequence [T, ...], got (float32[2,5,3], key<fry>[2,5])…a batch",
    ),
    "a batch of tokens": (
        of(embedded, {"rows": jnp.ones((9, 3)), "cell": RNN_PARAMS}, H, jnp.zeros((2, 5), int)),
        "xs: expected one sequence [T, ...], got int32[2,5], of which step takes one axis less: a batch",
    ),
    "one key for all steps": (
        of(NOISY.step, NOISY.init(KEY, 3), H, (XS, KEY)),
        "xs[1]: expected time as the first axis, got one random key; give one for each step, jax.random.split(key, T)",
    ),
    "a mask of a batch": (
        of(GRU.step, GRU_PARAMS, H, bptt.Sequence(BATCH, mask=np.ones((2, 5), bool))),
        "mask: expected shape [T], got [2, 5]; for a batch, jax.vmap",
    ),
    "lengths for a mask": (
        of(GRU.step, GRU_PARAMS, H, bptt.Sequence(XS, mask=np.array([5, 4]))),
        "mask: expected booleans [T], got int64; compare, as in jnp.arange(T) < length",
    ),
    "time last": (of(GRU.step, GRU_PARAMS, H, XS.T), "xs: expected time as the first axis, got float32[3,5]…xs.T"),
    "one instant for a sequence": (
        of(GRU.step, GRU_PARAMS, H, XS[0]),
        "xs: expected time as the first axis, got float32[3], all of which step takes at one instant…give xs[None]",
    ),
    "one sequence for a batch": (
        lambda: bptt.analysis.gradient_noise(GRU.step, GRU_PARAMS, H, XS, last),
        "xs: …where a batch [B, T, ...] is expected, that of the batch",
    ),
    "the same to a monitor": (
        lambda: bptt.Monitor(GRU.step, last)(0, GRU_PARAMS, H, XS),
        "xs: …where a batch [B, T, ...] is expected, that of the batch",
    ),
    "a list, one for each step": (of(GRU.step, GRU_PARAMS, H, list(XS)), "xs: …list of 5 inputs…jnp.stack(xs)"),
    "a list of pairs": (
        of(lambda p, h, x: GRU.step(p, h, x[0] + x[1]), GRU_PARAMS, H, [(XS[0], XS[1])] * 6),
        "xs: expected…a list of 6 inputs, one for each step; give jax.tree.map(lambda *x: jnp.stack(x), *xs)",
    ),
    "a list of sequences of different lengths": (
        of(GRU.step, GRU_PARAMS, H, [XS, XS[:3]]),
        "xs: expected one number of steps…different lengths: pad each, Sequence(x).pad_to(longest)…jax.tree.map(lambda",
    ),
    "a Sequence within others": (of(GRU.step, GRU_PARAMS, H, (bptt.Sequence(XS),)), "xs: expected a Sequence in place"),
    "no inputs": (
        lambda: bptt.unroll(GRU.step, GRU_PARAMS, H, length=5),
        "xs: expected inputs [T, ...], since the step uses its x, got None",
    ),
    "one state for many starts": (
        lambda: bptt.fixed_points(GRU.step, GRU_PARAMS, H, XS[0]),
        "starts: expected an axis of starts in front, got one state, float32[4]; give starts[None]",
    ),
    "many inputs for one": (
        lambda: bptt.fixed_points(GRU.step, GRU_PARAMS, STARTS, XS),
        "x: expected one constant input, got float32[5,3], many of them; give one, or jax.vmap",
    ),
    "an input of another size to rest at": (
        lambda: bptt.fixed_points(GRU.step, GRU_PARAMS, np.ones((2, 4), np.float32), np.ones(7, np.float32)),
        "x: expected an input of the step; with an axis in front, xs: expected [T, 3]…got float32[1,7]",
    ),
    "no input to rest at": (
        lambda: bptt.fixed_points(GRU.step, GRU_PARAMS, STARTS),
        "x: expected the input at which to rest, since the step uses it, got None",
    ),
    "inputs of another size": (
        of(GRU.step, GRU_PARAMS, H, np.ones((7, 5), np.float32)),
        "xs: expected [T, 3], since params.input is [12, 3], got float32[7,5]",
    ),
    "tokens to a cell": (
        of(GRU.step, GRU_PARAMS, H, np.arange(3)),
        "xs: expected [T, 3], since params.input is [12, 3], got int32[3]; of tokens, jax.nn.one_hot(xs, 3)",
    ),
    "a state of another size": (
        of(LSTM.step, LSTM_PARAMS, bptt.lstm(5).initial_state(), XS),
        "state0: expected [4], since params.recurrent is [16, 4], got LSTMState(h=float32[5], c=float32[5])",
    ),
    # steps
    "(carry, y) as for lax.scan": (
        returning(lambda h: (h, h[:2])),
        "step: must return the new state alone, not (carry, y)…return the state alone, step(params, state, x)[0]",
    ),
    "(carry, None)": (returning(lambda h: (h, None)), "return the state alone, step(params, state, x)[0]"),
    "(output, states) as of Keras": (returning(lambda h: (h[:2], h)), "return step(params, state, x)[1]"),
    "lax.scan's arguments": (
        of(lambda h, x: (jnp.tanh(h), x), None, H, XS),
        "step: expected a function called as step(params, state, x), got one that works as step(state, x)[0]; wrap it",
    ),
    "two arguments in vain": (
        of(lambda a, b: a @ b, None, H, XS),
        "step: expected a function called as step(params, state, x), got <lambda>(a, b)",
    ),
    "a cell": (
        of(GRU, GRU_PARAMS, H, XS),
        "step: expected a function step(params, state, x) -> state, got Cell; give its step, as in cell.step",
    ),
    "cells for a stack": (
        lambda: bptt.stack(RNN, GRU),
        "steps[0]: expected a function step(params, state, x) -> state, got Cell; give its step, as in cell.step",
    ),
    "a layer whose state is no vector": (
        of(bptt.stack(MATRIX.step, GRU.step), (MATRIX.init(KEY, 3), GRU_PARAMS), (MATRIX.initial_state(), H), XS),
        "since a state is MLSTMState(C=float32[1,4,8], n=float32[1,8], m=float32[1]), got None",
    ),
    "a cell for what makes it": (
        lambda: bptt.analysis.calibrate_cell(GRU, XS, low=0.5, high=2.0),
        "make: expected a function make(value) -> Cell, got Cell; give what makes it, as in lambda gain:",
    ),
    "what makes a cell": (of(bptt.gru, GRU_PARAMS, H, XS), "step: …which makes cells; give gru(hidden_size).step"),
    "all that from_torch returns": (
        of((GRU.step, GRU_PARAMS, H), GRU_PARAMS, H, XS),
        "step: …got tuple; give its entry, as in step, params, state0 = ...",
    ),
    # parameters and states
    "params and state swapped": (
        of(GRU.step, H, GRU_PARAMS, XS),
        "params, state0, xs: expected in this order, got them in the order state0, params, xs",
    ),
    "state and inputs swapped": (of(GRU.step, GRU_PARAMS, XS, H), "in this order, got…params, xs, state0"),
    "all three in a circle": (of(GRU.step, H, XS, GRU_PARAMS), "xs"),
    "weights of another cell": (
        of(LSTM.step, GRU_PARAMS, HC, XS),
        "params: expected LSTMParams(recurrent, input, bias), got GRUParams, which are of another cell",
    ),
    "an LSTM's weights in a simple network": (
        of(RNN.step, type(RNN_PARAMS)(jnp.ones((16, 4)), jnp.ones((16, 3)), jnp.ones(16)), H, XS),
        "step: must keep the shape of state, [4], got [16]; weights [4H, H] are for the step of bptt_jax.lstm(4)",
    ),
    "PyTorch's (h, c)": (
        of(LSTM.step, LSTM_PARAMS, tuple(HC), XS),
        "state0: expected LSTMState(h, c), got tuple; give LSTMState(*state0)",
    ),
    "Keras's list of states": (of(GRU.step, GRU_PARAMS, [H], XS), "state0: expected the state itself…give state0[0]"),
    "init, not called": (of(GRU.step, GRU.init, H, XS), "params: …got function; call it, as in cell.init(key, "),
    "initial_state, not called": (of(GRU.step, GRU_PARAMS, GRU.initial_state, XS), "state0: …cell.initial_state()"),
    "a state of integers": (
        of(bare, jnp.eye(2), jnp.zeros(2, int), XS[:, :2]),
        "state0: expected at least one floating number, got int32[2]; give them as floats, 0.0 for 0",
    ),
    # Python's lists
    "a state in a list": (
        of(bare, jnp.eye(2), [0.0, 0.0], XS[:, :2]),
        "state0: expected an array, got a list of 2 numbers…jnp.asarray",
    ),
    "parameters in lists": (of(bare, LISTS, jnp.zeros(2), XS[:, :2]), "params: …a list of 4 numbers…jnp.asarray"),
    "parameters in lists in a dict": (
        of(lambda p, h, x: bare(p["w"], h, x), {"w": LISTS}, jnp.zeros(2), XS[:, :2]),
        "params: …a list of 4 numbers…jnp.asarray",
    ),
    "inputs in a list": (of(GRU.step, GRU_PARAMS, H, XS.tolist()), "xs[0][0]: …got a scalar; give jnp.asarray(xs)"),
    # losses
    "a loss of one state": (
        with_loss(lambda h: h @ jnp.ones(4)),
        "loss: must return a scalar, got shape [5]; it is given all states at once, T = 5: reduce it…states[-1]",
    ),
    "a loss that is a vector": (with_loss(lambda states: states[-1]), "loss: …got shape [4]; reduce it to one number"),
    "a loss and more": (with_loss(lambda states: (last(states), states)), "loss: …wants has_aux=True"),
    "a loss that wants args": (
        with_loss(lambda states, args: last(states) * args),
        "loss: expected a function called as loss(states), since args is not given, got…(states, args); give args=",
    ),
    "args that no loss wants": (
        with_loss(last, args=1.0),
        "loss: expected a function called as loss(states, args), since args are given, got last(states)",
    ),
    "a loss made a float": (
        with_loss(lambda states: float(last(states))),
        "loss is traced: no number in it is known to float() or `if` yet; jnp.where chooses",
    ),
    "a family that asks for its value": (
        lambda: bptt.calibrate(lambda g: (GRU.step, GRU_PARAMS if g > 1 else None), H, XS, low=0.5, high=2.0),
        "make is traced: no number in it is known to float() or `if` yet",
    ),
    "a monitor within jit": (
        lambda: jax.jit(lambda xs: bptt.Monitor(GRU.step, last)(0, GRU_PARAMS, H, xs))(BATCH),
        "Monitor: expected arrays of known numbers, got traced ones; call it in the loop, outside of jax.jit",
    ),
    "an initial state as a guess": (
        lambda: bptt.deer(GRU.step, GRU_PARAMS, H, XS, guess=H),
        "guess: expected a trajectory, like the result's states, float32[5,4], got float32[4]",
    ),
    "a loss in NumPy": (with_loss(lambda states: np.tanh(np.asarray(states)).sum()), "loss is traced: use jax.numpy"),
}  # fmt: skip


@pytest.mark.parametrize("name", SLIPS)
def test_what_is_said(name, compilations) -> None:
    call, message = SLIPS[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert re.search("(?s)" + ".*".join(map(re.escape, message.split("…"))), told), told
    # Arrays are made of numbers first: by JAX 0.8.0 of a list, by all of the ends of a calibration.
    assert compilations == [] or name in ("a state in a list", "a family that asks for its value")


def test_what_step_itself_raises_is_kept() -> None:
    """Where nothing better is known, and as the cause of what is said instead."""

    def broken(params, h, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        bptt.unroll(broken, None, H, XS)
    with pytest.raises(TypeError, match="NoneType"):  # which is not x, though that is None as well
        bptt.unroll(lambda params, h, x: params["w"] @ h, {"w": None}, H, length=5)
    with pytest.raises(ValueError, match="a batch") as caught:
        bptt.unroll(GRU.step, GRU_PARAMS, H, BATCH)
    assert "batch" not in str(caught.value.__cause__)
