"""The simple recurrent network."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh
from bptt_jax.cells.initializers import Initializer
from bptt_jax.cells.weights import check_hidden_size, check_initializers, draw_gates, fan_in_normal, times
from bptt_jax.checks import check_finite, check_floating, check_function, check_key, check_positive_int
from bptt_jax.step import Array, Cell, Step

_KEEPING_LESS: dict[Any, Callable[[Array], Array]] = {jnp.tanh: tanh, jax.nn.sigmoid: sigmoid}


class RNNParams(NamedTuple):
    """Parameters of `rnn`: ``recurrent [N, N]``, ``input [N, I]``, ``bias [N]``."""

    recurrent: Array
    input: Array
    bias: Array


def rnn(
    hidden_size: int,
    *,
    activation: Callable[[Array], Array] = jnp.tanh,
    gain: float = 1.0,
    recurrent_init: Initializer = fan_in_normal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The simple recurrent network (Elman 1990): ``h_t = phi(W h_{t-1} + U x_t + b)``.

    W starts as ``gain`` times ``recurrent_init``, by default entries N(0, gain^2 / N), whose eigenvalues fill
    a disc of radius ``gain`` (circular law); U by default N(0, 1 / I); b = 0. The Jacobian is
    ``diag(phi'(a_t)) W``.

    Args:
      hidden_size: N, of units.
      activation: phi, elementwise: ``jnp.tanh``, ``jax.nn.relu``, ``jax.nn.identity`` (a linear network), ...
        ``jnp.tanh`` and ``jax.nn.sigmoid`` are replaced by equals that keep less for the backward pass.
      gain: factor of the initial recurrent weights. It may be traced, and is then checked when it runs.
      recurrent_init, input_init: initialisers ``(key, shape, dtype)`` as in `jax.nn.initializers`; they see the
        transposed shape ``(fan_in, fan_out)`` that those expect.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `RNNParams` and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.

    Example:
      >>> cell = bptt.rnn(4, gain=0.9)
      >>> params = cell.init(jax.random.key(0), 3)
      >>> jax.tree.map(jnp.shape, params)
      RNNParams(recurrent=(4, 4), input=(4, 3), bias=(4,))
      >>> cell.step(params, cell.initial_state(), jnp.ones(3)).shape
      (4,)
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 1, dtype)
    activation = check_function("activation", activation, "activation(array) -> array")
    gain = check_finite("gain", gain)
    check_initializers(recurrent_init, input_init)

    def init(key: Array, input_size: int) -> RNNParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in = jax.random.split(check_key("key", key))
        return RNNParams(
            jnp.asarray(gain, dtype) * draw_gates("recurrent_init", recurrent_init, k_rec, 1, n, n, dtype),
            draw_gates("input_init", input_init, k_in, 1, n, fan_in, dtype),
            jnp.zeros(n, dtype),
        )

    return Cell(init, lambda: jnp.zeros(n, dtype), _rnn_step(_KEEPING_LESS.get(activation, activation)))


# One step object per activation: cells that differ only in size or initialisation share what JAX has compiled.
@lru_cache
def _rnn_step(activation: Callable[[Array], Array]) -> Step:
    def rnn_step(params: RNNParams, h: Array, x: Array) -> Array:
        return activation(times(params.recurrent, h) + times(params.input, x) + params.bias)

    return rnn_step
