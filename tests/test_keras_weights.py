"""Weights of Keras: its own states where it is installed, and everywhere saved arrays that need no Keras."""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.cells.keras_weights import _ACTIVATIONS, keras_layer

try:
    import keras
except ModuleNotFoundError:
    keras = None


@pytest.fixture
def lenient() -> Iterator[None]:
    """Keras on JAX wants its promotions, and reads its variables in a way that NumPy will not have for ever."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        yield


def needs_keras(test: Any) -> Any:
    return pytest.mark.skipif(keras is None, reason="needs Keras")(pytest.mark.usefixtures("lenient")(test))


N, I, T, B = 4, 3, 6, 2
XS = np.random.default_rng(0).standard_normal((T, I)).astype(np.float32)


def saved(gates: int, bias: tuple[int, ...] | None) -> list[Any]:
    rng = np.random.default_rng(1)
    shapes = [(I, gates * N), (N, gates * N), *([] if bias is None else [bias])]
    return [0.5 * rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def sigmoid(a: Any) -> Any:
    return 1 / (1 + np.exp(-a))


def in_numpy(kind: str, arrays: list[Any], xs: Any, reset_after: bool = True) -> Any:
    """The outputs by the equations of Keras's documentation, with weights where Keras has them."""
    kernel, recurrent, *rest = arrays
    bias = rest[0] if rest else np.zeros((2, 3 * N) if kind == "GRU" and reset_after else kernel.shape[1])
    h = c = np.zeros(N)
    outputs = []
    for x in xs:
        if kind == "SimpleRNN":
            h = np.tanh(x @ kernel + h @ recurrent + bias)
        elif kind == "LSTM":
            i, f, g, o = np.split(x @ kernel + h @ recurrent + bias, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            outer, inner = bias if reset_after else (bias, np.zeros(3 * N))
            of_x, of_h = np.split(x @ kernel + outer, 3), np.split(h @ recurrent + inner, 3)
            z, r = sigmoid(of_x[0] + of_h[0]), sigmoid(of_x[1] + of_h[1])
            candidate = r * of_h[2] if reset_after else (r * h) @ recurrent[:, 2 * N :]
            h = z * h + (1 - z) * np.tanh(of_x[2] + candidate)
        outputs.append(h)
    return np.stack(outputs)


def outputs(made: Any, xs: Any) -> Any:
    step, params, state0 = made
    states = bptt.unroll(step, params, state0, xs)
    top = states[-1] if type(states) is tuple else states
    return np.asarray(top.h if hasattr(top, "h") else top)


# --- Saved arrays, without Keras.


@pytest.mark.parametrize(
    ("kind", "bias", "reset_after"),
    [
        ("SimpleRNN", (N,), True),
        ("GRU", (2, 3 * N), True),
        ("GRU", None, True),
        ("GRU", (3 * N,), False),
        ("LSTM", (4 * N,), True),
        ("LSTM", None, True),
    ],
)
def test_arrays(kind: Any, bias: Any, reset_after: bool) -> None:
    arrays = saved({"SimpleRNN": 1, "GRU": 3, "LSTM": 4}[kind], bias)
    made = keras_layer("layer", kind, arrays, {"reset_after": reset_after})
    np.testing.assert_allclose(outputs(made, XS), in_numpy(kind, arrays, XS, reset_after), atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "arrays", "config", "error", "message"),
    [
        ("LSTM", saved(3, (3 * N,)), {}, ValueError, "expected a kernel [I, 4N]"),
        ("GRU", saved(3, (3 * N,)), {}, ValueError, "a bias [2, 12] of a GRU, got [3, 12], [4, 12], [12]"),
        ("GRU", saved(3, None), {"activation": "relu"}, ValueError, "expected activation='tanh'"),
        (
            "LSTM",
            saved(4, None),
            {"recurrent_activation": "hard_sigmoid"},
            ValueError,
            "expected recurrent_activation='sigmoid', as the LSTM here has, got 'hard_sigmoid'",
        ),
        ("SimpleRNN", saved(1, None), {"activation": {"class_name": "own"}}, ValueError, "activation='elu' or"),
        ("LSTM", [a.astype(int) for a in saved(4, None)], {}, TypeError, "got int64, int64"),
    ],
)
def test_arrays_that_are_refused(kind: Any, arrays: Any, config: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        keras_layer("layer", kind, arrays, config)


@pytest.mark.parametrize("given", [None, 3, "lstm", bptt.lstm(3)])
def test_what_is_no_layer(given: Any) -> None:
    with pytest.raises(TypeError, match=f"layer: expected .* got {bptt.checks.type_name(given)}"):
        bptt.from_keras(given)


# --- Keras's own layers.

LAYERS: dict[str, Callable[[], Any]] = {
    "simple": lambda: keras.layers.SimpleRNN(N),
    "simple relu, no bias": lambda: keras.layers.SimpleRNN(N, activation="relu", use_bias=False),
    "gru": lambda: keras.layers.GRU(N),
    "gru, no bias": lambda: keras.layers.GRU(N, use_bias=False),
    "gru, reset before": lambda: keras.layers.GRU(N, reset_after=False),
    "gru, reset before, no bias": lambda: keras.layers.GRU(N, reset_after=False, use_bias=False),
    "lstm": lambda: keras.layers.LSTM(N, dropout=0.3, recurrent_dropout=0.2),
    "lstm, no bias": lambda: keras.layers.LSTM(N, use_bias=False, unit_forget_bias=False),
    "around a cell": lambda: keras.layers.RNN(keras.layers.LSTMCell(N)),
    "stacked": lambda: keras.layers.RNN(
        [keras.layers.LSTMCell(5), keras.layers.GRUCell(3), keras.layers.SimpleRNNCell(N)]
    ),
}


def moved(layer: Any) -> Any:
    """With weights after an update or two: none is zero, none as it was drawn."""
    rng = np.random.default_rng(2)
    layer.build((None, T, I))
    layer.set_weights([w + 0.3 * rng.standard_normal(w.shape).astype(w.dtype) for w in layer.get_weights()])
    return layer


@needs_keras
@pytest.mark.parametrize("name", LAYERS)
def test_states(name: str) -> None:
    layer = moved(LAYERS[name]())
    layer.return_sequences = True
    theirs = keras.ops.convert_to_numpy(layer(XS[None]))[0]
    made = bptt.from_keras(layer)
    np.testing.assert_allclose(outputs(made, XS), theirs, atol=3e-6)
    again = bptt.from_keras(layer.cell)
    assert again[0] == made[0]
    for a, b in zip(jax.tree.leaves(again[1:]), jax.tree.leaves(made[1:]), strict=True):
        np.testing.assert_array_equal(a, b)


@needs_keras
def test_a_trained_network() -> None:
    """Weights that Keras itself has trained, on masked batches, and the loss that it reports of them."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((T, I))
    layer, out = keras.layers.GRU(N), keras.layers.Dense(1)
    model = keras.Model(inputs, out(layer(keras.layers.Masking(-9.0)(inputs))))
    xs, lengths = np.random.default_rng(3).standard_normal((B, T, I)).astype(np.float32), [T, 3]
    xs[1, 3:] = -9.0
    targets = np.asarray([[1.0], [-1.0]], np.float32)
    model.compile(keras.optimizers.SGD(0.3), "mse")
    model.fit(xs, targets, epochs=3, verbose=0)
    step, params, state0 = bptt.from_keras(layer)
    kernel, bias = out.get_weights()
    losses = []
    for x, length, target in zip(xs, lengths, targets, strict=True):
        last = bptt.final_state(step, params, state0, bptt.Sequence(x, mask=np.arange(T) < length))
        losses.append(jnp.square(jnp.dot(last, kernel[:, 0]) + bias[0] - target[0]))
    np.testing.assert_allclose(np.mean(losses), model.evaluate(xs, targets, verbose=0), rtol=1e-5)


@needs_keras
@pytest.mark.parametrize("name", _ACTIVATIONS)
def test_activations(name: str) -> None:
    a = np.linspace(-5, 5, 41).astype(np.float32)
    theirs = keras.ops.convert_to_numpy(keras.activations.get(name)(a))
    np.testing.assert_allclose(_ACTIVATIONS[name](a), theirs, rtol=2e-6, atol=1e-6)


@needs_keras
def test_layers_that_are_refused() -> None:
    class Own(keras.layers.LSTMCell):
        def call(self, *arguments: Any, **options: Any) -> Any:
            return super().call(*arguments, **options)

    class OwnLayer(keras.layers.GRU):
        def call(self, *arguments: Any, **options: Any) -> Any:
            return 2 * super().call(*arguments, **options)

    class OwnStack(keras.layers.StackedRNNCells):
        def call(self, *arguments: Any, **options: Any) -> Any:
            return super().call(*arguments, **options)

    lstm = keras.layers.LSTM
    for layer, error, message in (
        (keras.layers.Bidirectional(lstm(N)), ValueError, "give layer.forward_layer, and for reversed sequences"),
        (lstm(N, go_backwards=True), ValueError, "go_backwards=True"),
        (lstm(N), ValueError, "build it first"),
        (moved(lstm(N, activation="relu")), ValueError, "activation='tanh', as the LSTM here has, got 'relu'"),
        (keras.layers.Dense(3), TypeError, "got Dense"),
        (keras.layers.RNN(Own(N)), TypeError, "the call of LSTMCell, got Own, which has one of its own"),
        (moved(OwnLayer(N)), TypeError, "the call of GRU, got OwnLayer, which has one of its own"),
        (OwnStack([keras.layers.GRUCell(N)]), TypeError, "the call of StackedRNNCells, got OwnStack"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            bptt.from_keras(layer)


@needs_keras
def test_the_way_out_of_both_directions() -> None:
    layer = keras.layers.Bidirectional(keras.layers.GRU(N, return_sequences=True))
    layer.build((None, T, I))
    theirs = keras.ops.convert_to_numpy(layer(XS[None]))[0]
    forward = outputs(bptt.from_keras(layer.forward_layer), XS)
    backward = outputs(bptt.from_keras(layer.backward_layer.cell), XS[::-1])[::-1]
    np.testing.assert_allclose(np.concatenate([forward, backward], axis=1), theirs, atol=2e-6)
