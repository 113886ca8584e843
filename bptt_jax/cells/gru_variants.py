"""Variants of the gated recurrent unit, most of them with fewer gates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh, weighted_mean
from bptt_jax.cells.initializers import Initializer, check_initializer, draw_weights
from bptt_jax.cells.weights import (
    check_hidden_size,
    check_initializers,
    draw_gates,
    fan_in_normal,
    orthogonal,
    times,
)
from bptt_jax.checks import check_finite, check_floating, check_key, check_positive_int
from bptt_jax.step import Array, Cell, Step


class GatedParams(NamedTuple):
    """Parameters of most cells of this module: ``recurrent [R N, N]``, ``input [G N, I]``, ``bias [B N]``.

    Blocks are stacked in the order that the cell says; where it says nothing else, R = G = B.
    """

    recurrent: Array
    input: Array
    bias: Array


def mgu(
    hidden_size: int,
    *,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    bias_init: Initializer = jax.nn.initializers.zeros,
    dtype: Any = None,
) -> Cell:
    """The minimal gated unit (Zhou et al. 2016, Int. J. Autom. Comput. 13: 226): one gate to forget and to reset.

    ::

        f = sigmoid(W_f h_{t-1} + U_f x_t + b_f)
        n = tanh(W_n (f * h_{t-1}) + U_n x_t + b_n)
        h_t = (1 - f) * h_{t-1} + f * n

    What the paper calls to forget is to let in: at f = 0 the state is kept, and the Jacobian is the identity.
    `bptt_jax.cells.initializers.chrono` as `bias_init` begins with long memories. The weights start as those of
    `bptt_jax.gru`, the biases at 0.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      bias_init: initialiser of the biases f, n, of shape ``(2, N)``.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, in the order f, n, and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    check_initializer("bias_init", bias_init)
    return _cell(_mgu_step, hidden_size, dtype, recurrent_init, input_init, (2, 2, 2), bias_init)


def ugrnn(
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The update gate network (Collins et al. 2017, arXiv:1611.09913): a simple network with one gate.

    ::

        g = sigmoid(W_g h_{t-1} + U_g x_t + b_g)
        c = tanh(W_c h_{t-1} + U_c x_t + b_c)
        h_t = g * h_{t-1} + (1 - g) * c

    `forget_bias` is 1 in the authors' code, where it is a constant added to b_g; here b_g starts there. The weights
    start as those of `bptt_jax.gru`. The Jacobian is ``diag(g)`` and what passes through the weights.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      forget_bias: initial b_g; b_c starts at 0. It may be traced, and is then checked when it runs.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, in the order g, c, and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    biases = _constants(check_finite("forget_bias", forget_bias), 0.0)
    return _cell(_ugrnn_step, hidden_size, dtype, recurrent_init, input_init, (2, 2, 2), biases)


def _constants(*biases: float | Array) -> Initializer:
    """One to a gate."""

    def init(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
        del key
        return jnp.broadcast_to(jnp.stack([jnp.asarray(b, dtype) for b in biases])[:, None], shape)

    return init


def _cell(
    step: Step,
    hidden_size: int,
    dtype: Any,
    recurrent_init: Initializer,
    input_init: Initializer,
    blocks: tuple[int, int, int],
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Cell:
    """With `GatedParams` of so many blocks, and a state ``[N]``."""
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, blocks[0], dtype)
    check_initializers(recurrent_init, input_init)

    def init(key: Array, input_size: int) -> GatedParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in, k_bias = jax.random.split(check_key("key", key), 3)
        return GatedParams(
            draw_gates("recurrent_init", recurrent_init, k_rec, blocks[0], n, n, dtype),
            draw_gates("input_init", input_init, k_in, blocks[1], n, fan_in, dtype),
            draw_weights("bias_init", bias_init, k_bias, (blocks[2], n), dtype).ravel(),
        )

    return Cell(init, lambda: jnp.zeros(n, dtype), step)


def _mgu_step(params: GatedParams, h: Array, x: Array) -> Array:
    w_f, w_n = jnp.split(params.recurrent, 2)
    f_x, n_x = jnp.split(times(params.input, x) + params.bias, 2)
    f = sigmoid(times(w_f, h) + f_x)
    return weighted_mean(f, h, tanh(times(w_n, f * h) + n_x))


def _ugrnn_step(params: GatedParams, h: Array, x: Array) -> Array:
    g, c = jnp.split(times(params.recurrent, h) + times(params.input, x) + params.bias, 2)
    return weighted_mean(sigmoid(g), tanh(c), h)
