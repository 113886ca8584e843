"""Recurrent layers of Keras, from a layer or from the arrays that it has saved.

Keras is never imported here: a layer is there only where it has been already, with the backend that it has.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from bptt_jax.cells.gated import GRUParams, LSTMParams, LSTMState, gru, lstm
from bptt_jax.cells.layers import stacked
from bptt_jax.cells.simple import RNNParams, rnn
from bptt_jax.checks import check_leaves, type_name
from bptt_jax.step import Array, Params, State, Step

if TYPE_CHECKING:
    import keras

Kind = Literal["SimpleRNN", "GRU", "LSTM"]

GATES: Mapping[Kind, int] = {"SimpleRNN": 1, "GRU": 3, "LSTM": 4}
# As Keras defines them, whose gelu is the exact one.
_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "elu": jax.nn.elu,
    "exponential": jnp.exp,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "linear": jax.nn.identity,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "tanh": jnp.tanh,
}


def from_keras(layer: "keras.layers.Layer") -> tuple[Step, Params, State]:
    """A recurrent layer of Keras 3, with any of its backends, with its weights.

    Taken are `SimpleRNN`, `GRU` with the reset after the product or before it, `LSTM`, their cells, `RNN` around one
    of these, and `StackedRNNCells`. The weights are transposed, the gates of a GRU put from z, r, h into r, z, n, its
    two biases joined but for the one inside the reset. Without biases (``use_bias=False``) ours are zeros. Dropout acts
    while training only, and is left out.

    Args:
      layer: a layer, or cell, that has been built, by a call or by ``layer.build``.

    Returns:
      ``(step, params, state0)``: `RNNParams` and a state ``[N]``, `GRUParams` and ``[N]``, `LSTMParams` and an
      `LSTMState`; of L > 1 stacked cells `params` and `state0` are tuples of L, and `step` is their `stack`. The state
      is zero. Copies, in the weights' own dtype (double becomes single unless JAX has it switched on).

    Raises:
      TypeError: it is no such layer.
      ValueError: it has not been built, runs backwards or both ways, or has an activation that ours have not.
    """
    keras = sys.modules.get("keras")
    expected = "layer: expected a SimpleRNN, GRU, LSTM or RNN of Keras, or a cell of one"
    if keras is None or not isinstance(layer, keras.layers.Layer):
        raise TypeError(f"{expected}, got {type_name(layer)}")
    if isinstance(layer, keras.layers.Bidirectional):
        raise ValueError(
            "layer: expected a recurrence that runs one way, got a Bidirectional, which is two: give "
            "layer.forward_layer, and for reversed sequences layer.backward_layer.cell"
        )
    cell = layer
    if isinstance(layer, keras.layers.RNN):
        _check_call(layer, (keras.layers.RNN, *(getattr(keras.layers, kind) for kind in GATES)))
        if layer.go_backwards:
            raise ValueError(
                "layer: expected a layer that runs forwards, got go_backwards=True; give its cell, and reversed "
                "sequences"
            )
        cell = layer.cell
    kinds: dict[Kind, Any] = {
        "SimpleRNN": keras.layers.SimpleRNNCell,
        "GRU": keras.layers.GRUCell,
        "LSTM": keras.layers.LSTMCell,
    }
    made = []
    for inner in _flat(keras, cell):
        kind = next((k for k, of in kinds.items() if isinstance(inner, of)), None)
        if kind is None:
            raise TypeError(f"{expected}, got {type_name(inner)}")
        _check_call(inner, (kinds[kind],))
        if not inner.built:
            raise ValueError(
                f"layer: expected one that has its weights, got {inner.name!r}; build it first, by a call or by "
                "layer.build((None, None, I))"
            )
        variables = [inner.kernel, inner.recurrent_kernel, *([inner.bias] if inner.use_bias else [])]
        arrays = [keras.ops.convert_to_numpy(variable.value) for variable in variables]
        made.append(keras_layer(f"layer: {inner.name}", kind, arrays, inner.get_config()))
    return stacked(made)


def keras_layer(
    name: str, kind: Kind, arrays: Sequence[Any], config: Mapping[str, Any]
) -> tuple[Step, Params, State]:
    """One layer from its kernel ``[I, GN]``, recurrent kernel ``[N, GN]`` and bias, where it has one.

    Of its `config`, as Keras writes it, what is missing is as by default.
    """
    gates = GATES[kind]
    reset_after = bool(config.get("reset_after", True))
    for array in arrays:
        check_leaves(name, array, keys=False)
    shapes, n = [tuple(a.shape) for a in arrays], arrays[1].shape[0]
    biases: tuple[int, ...] = (2, 3 * n) if kind == "GRU" and reset_after else (gates * n,)
    if shapes != [(shapes[0][0], gates * n), (n, gates * n), biases][: len(shapes)] or 0 in shapes[0]:
        given = ", ".join(str(list(shape)) for shape in shapes)
        raise ValueError(
            f"{name}: expected a kernel [I, {gates}N], a recurrent kernel [N, {gates}N] and a bias {list(biases)} of a "
            f"{kind}, got {given}"
        )
    if any(not jnp.issubdtype(a.dtype, jnp.floating) for a in arrays) or len({a.dtype for a in arrays}) > 1:
        given = ", ".join(str(a.dtype) for a in arrays)
        raise TypeError(f"{name}: expected floating weights of one dtype, got {given}")
    activation = config.get("activation", "tanh")
    known = _ACTIVATIONS if kind == "SimpleRNN" else {"tanh": jnp.tanh}
    _check_activation(name, "activation", activation, known, kind)
    if kind != "SimpleRNN":
        _check_activation(
            name, "recurrent_activation", config.get("recurrent_activation", "sigmoid"), {"sigmoid": None}, kind
        )
    kernel, recurrent, *bias = (jnp.array(a, copy=True) for a in arrays)
    matrices, nothing = (recurrent.T, kernel.T), jnp.zeros(gates * n, kernel.dtype)
    state0 = jnp.zeros(n, kernel.dtype)
    if kind == "SimpleRNN":
        return rnn(n, activation=_ACTIVATIONS[activation]).step, RNNParams(*matrices, *(bias or [nothing])), state0
    if kind == "LSTM":
        return lstm(n).step, LSTMParams(*matrices, *(bias or [nothing])), LSTMState(state0, state0)
    step = gru(n, reset_after=reset_after).step
    swapped = _swap(recurrent.T), _swap(kernel.T)
    if not reset_after:
        return step, GRUParams(*swapped, _swap(bias[0] if bias else nothing), None), state0
    outer, inner = map(_swap, bias[0]) if bias else (nothing, nothing)
    r, z, new = jnp.split(inner, 3)
    return step, GRUParams(*swapped, outer + jnp.concatenate([r, z, jnp.zeros_like(new)]), new), state0


def _check_activation(name: str, option: str, given: Any, known: Mapping[str, Any], kind: str) -> None:
    if not (isinstance(given, str) and given in known):
        raise ValueError(
            f"{name}: expected {option}={' or '.join(map(repr, known))}, as the {kind} here has, got {given!r}"
        )


def _swap(stacked: Array) -> Array:
    """Gates z, r, h in the order r, z, n."""
    z, r, h = jnp.split(stacked, 3)
    return jnp.concatenate([r, z, h])


def _check_call(layer: Any, classes: Sequence[Any]) -> None:
    of = next(c for c in classes[::-1] if isinstance(layer, c))
    if type(layer).call is not of.call:
        raise TypeError(
            f"layer: expected the call of {of.__name__}, got {type_name(layer)}, which has one of its own"
        )


def _flat(keras: Any, cell: Any) -> list[Any]:
    if not isinstance(cell, keras.layers.StackedRNNCells):
        return [cell]
    _check_call(cell, (keras.layers.StackedRNNCells,))
    return [inner for each in cell.cells for inner in _flat(keras, each)]
