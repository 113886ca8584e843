"""Cells with exponential gates, kept within the range of floats by a stabiliser: slstm and mlstm."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh
from bptt_jax.cells.heads import check_sizes, draw_heads, outer, project
from bptt_jax.cells.initializers import Initializer, check_initializer
from bptt_jax.cells.sharing import recalled
from bptt_jax.cells.weights import check_heads, check_hidden_size, draw_gates, times
from bptt_jax.checks import check_floating, check_key, check_positive_int
from bptt_jax.step import Array, Cell

# N(0, 2 / (5 I)), of Nguyen and Salazar 2019 (arXiv:1910.05895).
_small = jax.nn.initializers.variance_scaling(0.4, "fan_in", "normal")


class SLSTMParams(NamedTuple):
    """Parameters of `slstm`, gates stacked in the order i, f, z, o.

    ``recurrent [H, 4, N/H, N/H]``, of each head for itself; ``input [4N, I]``, ``bias [4N]``.
    """

    recurrent: Array
    input: Array
    bias: Array


class SLSTMState(NamedTuple):
    """State of `slstm`: output h, cell c, normaliser n and stabiliser m, each ``[N]``."""

    h: Array
    c: Array
    n: Array
    m: Array


class MLSTMParams(NamedTuple):
    """Parameters of `mlstm`: ``key [H, K, I]``, ``value [H, V, I]``, ``gates [2, H, I]`` and ``bias [2, H]``, in the
    order i, f."""

    key: Array
    value: Array
    gates: Array
    bias: Array


class MLSTMState(NamedTuple):
    """State of `mlstm`: the memory ``C [H, V, K]``, its normaliser ``n [H, K]`` and the stabiliser ``m [H]``."""

    C: Array
    n: Array
    m: Array


@recalled
def slstm(
    hidden_size: int,
    *,
    heads: int = 1,
    recurrent_init: Initializer = jax.nn.initializers.zeros,
    dtype: Any = None,
) -> Cell:
    """The scalar LSTM of xLSTM, with exponential input gates (Beck et al. 2024, arXiv:2405.04517, eq. 8 to 18).

    ::

        i = W_i h_{t-1} + U_i x_t + b_i               f = W_f h_{t-1} + U_f x_t + b_f
        z = tanh(W_z h_{t-1} + U_z x_t + b_z)         o = sigmoid(W_o h_{t-1} + U_o x_t + b_o)
        m_t = max(log sigmoid(f) + m_{t-1}, i)
        i' = exp(i - m_t)                             f' = exp(log sigmoid(f) + m_{t-1} - m_t)
        c_t = f' * c_{t-1} + i' * z                   n_t = f' * n_{t-1} + i'
        h_t = o * c_t / n_t

    Of the paper's two forget gates, sigmoid and exponential, it has the first, as the released code. m keeps the
    exponentials at most 1; h does not depend on it. All four start at 0, as in the released code, which where all n
    are 0 sets ``m_t = i`` besides: the same h, from other c and n. So do here the units of n = 0 whose i' would vanish
    beside m, as with i below -29 (float16: -3): without it, h would be 0 / 0. Convolution, normalisation by groups and
    output projection of the published block are no part of the recurrence.

    The weights W act within heads. They start at 0, U at N(0, 2 / (5 I)), the biases of a head's forget gates fall
    from 5 to -7 as ``5 - 12 (j / (N/H - 1))^0.3`` (the released code's first block), the others at 0.

    To scale c and n, and to lower m by the logarithm of the factor, is to say the same memory otherwise: along this
    direction the Jacobian holds what comes in while the forget gate wins the maximum, and drops it when the input
    gate does.

    Args:
      hidden_size: N, of units.
      heads: H, a divisor of N.
      recurrent_init: initialiser as in `rnn`, of each W of each head, of shape ``(N/H, N/H)``.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `SLSTMParams` and an `SLSTMState`, D = 4N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 4, dtype)
    size = check_heads(n, heads)
    h = n // size
    check_initializer("recurrent_init", recurrent_init)

    def init(key: Array, input_size: int) -> SLSTMParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in = jax.random.split(check_key("key", key))
        recurrent = draw_gates("recurrent_init", recurrent_init, k_rec, 4 * h, size, size, dtype)
        forget = 5 - 12 * (jnp.arange(size) / max(size - 1, 1)) ** 0.3
        bias = jnp.zeros((4, h, size), dtype).at[1].set(forget.astype(dtype)[None])
        return SLSTMParams(
            recurrent.reshape(h, 4, size, size),
            draw_gates("input", _small, k_in, 4, n, fan_in, dtype),
            bias.ravel(),
        )

    def initial_state() -> SLSTMState:
        return SLSTMState(*(jnp.zeros(n, dtype) for _ in SLSTMState._fields))

    return Cell(init, initial_state, _slstm_step)


@recalled
def mlstm(hidden_size: int, *, heads: int = 2, key_size: int = 8, dtype: Any = None) -> Cell:
    """The matrix LSTM of xLSTM: an associative memory with exponential gates (Beck et al. 2024, arXiv:2405.04517,
    eq. 19 to 27).

    ::

        k = W_k x_t / sqrt(K)                         v = W_v x_t
        i = w_i x_t + b_i                             f = w_f x_t + b_f
        m_t = max(log sigmoid(f) + m_{t-1}, i)
        i' = exp(i - m_t)                             f' = exp(log sigmoid(f) + m_{t-1} - m_t)
        C_t = f' C_{t-1} + i' v k^T                   n_t = f' n_{t-1} + i' k

    for each of H heads, with V = N/H values and K keys. What is read, ``C_t q / max(|n_t^T q|, exp(-m_t))`` with a
    query q of x_t, the output gate and the normalisation are no part of the recurrence. The gates see x_t, as in the
    paper, where the released code's see q, k and v; k and v have no biases, as there; of the paper's two forget
    gates it has the sigmoid. m starts at 0, as C and n, so that no derivative is lost in the first step; to start it
    at -inf, as the paper's parallel form does, gives other C and n, and the same reading.

    W_k and W_v start at N(0, 2 / (5 I)), w_i and w_f at 0, b_i at N(0, 0.01), b_f of the heads evenly from 3 to 6.

    No gate sees C or n, which a step multiplies by ``f' <= 1``: the memory's share of the error signal never grows.

    Args:
      hidden_size: N, of values in all heads.
      heads: H, a divisor of N.
      key_size: K, of each head.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `MLSTMParams` and an `MLSTMState`, D = N K + H K + H.

    Raises:
      TypeError, ValueError: an argument is out of its range.
    """
    floating = check_floating("dtype", dtype)
    h, values, keys = check_sizes(hidden_size, heads, key_size)

    def init(key: Array, input_size: int) -> MLSTMParams:
        fan_in = check_positive_int("input_size", input_size)
        k_key, k_value, k_bias = jax.random.split(check_key("key", key), 3)
        admit = 0.1 * jax.random.normal(k_bias, (h,), floating)
        return MLSTMParams(
            draw_heads(k_key, h, keys, fan_in, floating, _small),
            draw_heads(k_value, h, values, fan_in, floating, _small),
            jnp.zeros((2, h, fan_in), floating),
            jnp.stack([admit, jnp.linspace(3, 6, h, dtype=floating)]),
        )

    def initial_state() -> MLSTMState:
        shapes = (h, values, keys), (h, keys), (h,)
        return MLSTMState(*(jnp.zeros(shape, floating) for shape in shapes))

    return Cell(init, initial_state, _mlstm_step)


def _stabilised(i: Array, kept: Array) -> tuple[Array, Array, Array]:
    """``i', f', m_t``, with ``kept`` the forget gate's logarithm and m_{t-1}."""
    new = jnp.maximum(kept, i)
    return jnp.exp(i - new), jnp.exp(kept - new), new


def _slstm_step(params: SLSTMParams, state: SLSTMState, x: Array) -> SLSTMState:
    heads = state.h.reshape(params.recurrent.shape[0], -1)
    recurrent = jnp.einsum("hgij,hj->ghi", params.recurrent, heads).ravel()
    i, f, z, o = jnp.split(recurrent + times(params.input, x) + params.bias, 4)
    kept = jax.nn.log_sigmoid(f) + state.m
    # So that n, once it is above 0, and the cube of it, by which second derivatives divide, are so in floats too.
    least = math.log(float(jnp.finfo(i.dtype).tiny)) / 3
    kept = jnp.where((state.n == 0) & (i - kept < least), -jnp.inf, kept)
    i, f, m = _stabilised(i, kept)
    c, n = f * state.c + i * tanh(z), f * state.n + i
    return SLSTMState(sigmoid(o) * c / n, c, n, m)


def _mlstm_step(params: MLSTMParams, state: MLSTMState, x: Array) -> MLSTMState:
    k = project(params.key, x) / math.sqrt(params.key.shape[1])
    v = project(params.value, x)
    gates = project(params.gates, x) + params.bias
    i, f, m = _stabilised(gates[0], jax.nn.log_sigmoid(gates[1]) + state.m)
    written = outer(i[:, None] * v, k)
    return MLSTMState(f[:, None, None] * state.C + written, f[:, None] * state.n + i[:, None] * k, m)
