"""Gated cells: gru and lstm."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh, weighted_mean
from bptt_jax.cells.initializers import Initializer, check_initializer, draw_weights
from bptt_jax.cells.sharing import recalled
from bptt_jax.cells.weights import (
    check_hidden_size,
    check_initializers,
    constants,
    draw_gates,
    fan_in_normal,
    orthogonal,
    times,
)
from bptt_jax.checks import check_choice, check_finite, check_floating, check_key, check_positive_int
from bptt_jax.step import Array, Cell


class GRUParams(NamedTuple):
    """Parameters of `gru`, gates stacked in the order r, z, n.

    ``recurrent [3N, N]``, ``input [3N, I]``, ``bias [3N]``, ``recurrent_bias [N]``: c_n, inside the reset; None with
    ``reset_after=False``, where it would be a second b_n.
    """

    recurrent: Array
    input: Array
    bias: Array
    recurrent_bias: Array | None = None


class LSTMParams(NamedTuple):
    """Parameters of `lstm`, gates stacked in the order i, f, g, o.

    ``recurrent [4N, N]``, ``input [4N, I]``, ``bias [4N]``.
    """

    recurrent: Array
    input: Array
    bias: Array


class LSTMState(NamedTuple):
    """State of `lstm`: the output ``h [N]`` and the cell ``c [N]``; as a vector, h first."""

    h: Array
    c: Array


@recalled
def gru(
    hidden_size: int,
    *,
    reset_after: bool = True,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    bias_init: Initializer = jax.nn.initializers.zeros,
    dtype: Any = None,
) -> Cell:
    """The gated recurrent unit (Cho et al. 2014, arXiv:1406.1078), by default with the reset after the product.

    ::

        r = sigmoid(W_r h_{t-1} + U_r x_t + b_r)
        z = sigmoid(W_z h_{t-1} + U_z x_t + b_z)
        n = tanh(U_n x_t + b_n + r * (W_n h_{t-1} + c_n))
        h_t = (1 - z) * n + z * h_{t-1}

    This is the variant of cuDNN, PyTorch, Equinox and Keras (``reset_after=True``), whose weights are transposed and
    lie in the order z, r, n. The paper's own resets before the product, ``tanh(U_n x_t + b_n + W_n (r * h_{t-1}))``:
    ``reset_after=False``, as Haiku's, which exchanges z and 1 - z.

    Args:
      hidden_size: N, of units.
      reset_after: whether r multiplies the product with W_n, or the state before it.
      recurrent_init, input_init: initialisers as in `rnn`, applied gate by gate.
      bias_init: initialiser of the biases r, z, n, of shape ``(3, N)``; c_n starts at 0.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GRUParams` and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.

    Example:
      >>> jax.tree.map(jnp.shape, bptt.gru(4).init(jax.random.key(0), 3))
      GRUParams(recurrent=(12, 4), input=(12, 3), bias=(12,), recurrent_bias=(4,))
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 3, dtype)
    check_choice("reset_after", reset_after, True, False)
    check_initializers(recurrent_init, input_init)
    check_initializer("bias_init", bias_init)

    def init(key: Array, input_size: int) -> GRUParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in, k_bias = jax.random.split(check_key("key", key), 3)
        return GRUParams(
            draw_gates("recurrent_init", recurrent_init, k_rec, 3, n, n, dtype),
            draw_gates("input_init", input_init, k_in, 3, n, fan_in, dtype),
            draw_weights("bias_init", bias_init, k_bias, (3, n), dtype).ravel(),
            jnp.zeros(n, dtype) if reset_after else None,
        )

    return Cell(init, lambda: jnp.zeros(n, dtype), _gru_step if reset_after else _gru_step_reset_before)


@recalled
def lstm(
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    bias_init: Initializer | None = None,
    dtype: Any = None,
) -> Cell:
    """The long short-term memory (Hochreiter, Schmidhuber 1997) with a forget gate (Gers et al. 2000).

    ::

        i = sigmoid(W_i h_{t-1} + U_i x_t + b_i)      f = sigmoid(W_f h_{t-1} + U_f x_t + b_f)
        g = tanh(W_g h_{t-1} + U_g x_t + b_g)         o = sigmoid(W_o h_{t-1} + U_o x_t + b_o)
        c_t = f * c_{t-1} + i * g                     h_t = o * tanh(c_t)

    No peepholes. The error carousel is ``dc_t/dc_{t-1} = f``: at ``forget_bias`` b it starts near
    ``sigmoid(b)`` per step (Jozefowicz et al. 2015 recommend 1).

    Args:
      hidden_size: N, of units.
      forget_bias: initial b_f; the other biases start at 0. It may be traced, and is then checked when it runs.
      recurrent_init, input_init: initialisers as in `rnn`, applied gate by gate.
      bias_init: initialiser of the biases i, f, g, o, of shape ``(4, N)``, instead of `forget_bias`; see
        `bptt_jax.cells.initializers.chrono`.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `LSTMParams` and an `LSTMState`, D = 2N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.

    Example:
      >>> params = bptt.lstm(2, forget_bias=3.0).init(jax.random.key(0), 3)
      >>> params.bias.reshape(4, 2)[1]
      Array([3., 3.], dtype=float32)
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 4, dtype)
    forget_bias = check_finite("forget_bias", forget_bias)
    check_initializers(recurrent_init, input_init)

    started = constants(0.0, forget_bias, 0.0, 0.0)
    biases = started if bias_init is None else check_initializer("bias_init", bias_init)

    def init(key: Array, input_size: int) -> LSTMParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in, k_bias = jax.random.split(check_key("key", key), 3)
        return LSTMParams(
            draw_gates("recurrent_init", recurrent_init, k_rec, 4, n, n, dtype),
            draw_gates("input_init", input_init, k_in, 4, n, fan_in, dtype),
            draw_weights("bias_init", biases, k_bias, (4, n), dtype).ravel(),
        )

    return Cell(init, lambda: LSTMState(jnp.zeros(n, dtype), jnp.zeros(n, dtype)), _lstm_step)


# One step object each, so that cells which differ only in size or initialisation share what JAX has compiled.
# The gates are taken apart by jnp.split, whose transpose is one concatenation; that of slicing is a sum of
# zero-padded arrays, which costs a training step up to 40 % more.
def _gru_step(params: GRUParams, h: Array, x: Array) -> Array:
    r_h, z_h, n_h = jnp.split(times(params.recurrent, h), 3)
    r_x, z_x, n_x = jnp.split(times(params.input, x) + params.bias, 3)
    r = sigmoid(r_h + r_x)
    z = sigmoid(z_h + z_x)
    n = tanh(n_x + r * (n_h + cast(Array, params.recurrent_bias)))
    return weighted_mean(z, n, h)


def _gru_step_reset_before(params: GRUParams, h: Array, x: Array) -> Array:
    gates, candidate = jnp.split(params.recurrent, [2 * h.size])
    r_h, z_h = jnp.split(times(gates, h), 2)
    r_x, z_x, n_x = jnp.split(times(params.input, x) + params.bias, 3)
    r = sigmoid(r_h + r_x)
    z = sigmoid(z_h + z_x)
    n = tanh(n_x + times(candidate, r * h))
    return weighted_mean(z, n, h)


def _lstm_step(params: LSTMParams, state: LSTMState, x: Array) -> LSTMState:
    i, f, g, o = jnp.split(times(params.recurrent, state.h) + times(params.input, x) + params.bias, 4)
    c = sigmoid(f) * state.c + sigmoid(i) * tanh(g)
    return LSTMState(sigmoid(o) * tanh(c), c)
