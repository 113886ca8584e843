"""Bistable cells, whose units hold one of two values each."""

from typing import Any

import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh, weighted_mean
from bptt_jax.cells.gating import GatedParams, gated_cell
from bptt_jax.cells.initializers import Initializer
from bptt_jax.cells.sharing import recalled
from bptt_jax.cells.weights import glorot_uniform, times
from bptt_jax.step import Array, Cell


@recalled
def brc(hidden_size: int, *, input_init: Initializer = glorot_uniform, dtype: Any = None) -> Cell:
    """The bistable recurrent cell (Vecoven et al. 2021, PLOS ONE 16: e0252676): units that remember each by itself.

    ::

        a = 1 + tanh(U_a x_t + w_a * h_{t-1} + b_a)
        c = sigmoid(U_c x_t + w_c * h_{t-1} + b_c)
        h_t = c * h_{t-1} + (1 - c) * tanh(U_h x_t + a * h_{t-1})

    A unit with a > 1 has two stable states, and keeps the one that it is in, for as long as its input allows; one with
    a < 1 fades. With the biases of the authors' code, which the paper does not write. As in that code w_a and w_c start
    at 1, U by Glorot and Bengio's uniform numbers, biases at 0.

    A unit sees itself alone: the Jacobian is diagonal, its entries the exponents' factors, unit by unit.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      input_init: initialiser as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, in the order a, c, h: ``recurrent [2N]``, ``input [3N, I]``, ``bias [2N]``; and a
      state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    like = nbrc(hidden_size, input_init=input_init, dtype=dtype)

    def init(key: Array, input_size: int) -> GatedParams:
        drawn: GatedParams = like.init(key, input_size)
        return drawn._replace(recurrent=jnp.ones_like(drawn.bias))

    return Cell(init, like.initial_state, _brc_step)


@recalled
def nbrc(
    hidden_size: int,
    *,
    recurrent_init: Initializer = glorot_uniform,
    input_init: Initializer = glorot_uniform,
    dtype: Any = None,
) -> Cell:
    """The neuromodulated bistable cell (Vecoven et al. 2021, PLOS ONE 16: e0252676): units that set each other's gates.

    ::

        a = 1 + tanh(U_a x_t + W_a h_{t-1} + b_a)
        c = sigmoid(U_c x_t + W_c h_{t-1} + b_c)
        h_t = c * h_{t-1} + (1 - c) * tanh(U_h x_t + a * h_{t-1})

    As `brc`, but that its gates see the whole state. With the biases of the authors' code, and as there W and U start
    by Glorot and Bengio's uniform numbers, biases at 0. The Jacobian at zero state and input is the identity whatever
    c is: a = 1 is the brink of bistability.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, in the order a, c, h: ``recurrent [2N, N]``, ``input [3N, I]``, ``bias [2N]``; and a
      state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    return gated_cell(_nbrc_step, hidden_size, dtype, recurrent_init, input_init, (2, 3, 2))


def _brc_step(params: GatedParams, h: Array, x: Array) -> Array:
    w_a, w_c = jnp.split(params.recurrent, 2)
    return _bistable(params, w_a * h, w_c * h, h, x)


def _nbrc_step(params: GatedParams, h: Array, x: Array) -> Array:
    a_h, c_h = jnp.split(times(params.recurrent, h), 2)
    return _bistable(params, a_h, c_h, h, x)


def _bistable(params: GatedParams, a_h: Array, c_h: Array, h: Array, x: Array) -> Array:
    a_x, c_x, h_x = jnp.split(times(params.input, x), 3)
    b_a, b_c = jnp.split(params.bias, 2)
    a = 1 + tanh(a_x + a_h + b_a)
    return weighted_mean(sigmoid(c_x + c_h + b_c), tanh(h_x + a * h), h)
