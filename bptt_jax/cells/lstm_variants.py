"""Variants of the long short-term memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh, weighted_mean
from bptt_jax.cells.gated import LSTMParams, LSTMState, lstm
from bptt_jax.cells.gating import GatedParams, gated_cell, with_cell
from bptt_jax.cells.initializers import Initializer, chrono
from bptt_jax.cells.sharing import recalled
from bptt_jax.cells.weights import constants, draw_gates, fan_in_normal, orthogonal, times, within
from bptt_jax.checks import check_finite
from bptt_jax.linalg.precision import at_least_single
from bptt_jax.step import Array, Cell

# Of the layer normalisation, beneath the root, as in the authors' code: the variance of a state of zeros is zero.
_LEAST_VARIANCE = 1e-5
_tenth = within(0.1)


class PeepholeLSTMParams(NamedTuple):
    """Parameters of `peephole_lstm`, gates stacked in the order i, f, g, o, and of `coupled_lstm`, which has no f.

    ``recurrent [4N, N]``, ``input [4N, I]``, ``bias [4N]``, ``peephole [3N]`` in the order i, f, o; without f
    ``[3N, N]``, ``[3N, I]``, ``[3N]`` and ``[2N]``.
    """

    recurrent: Array
    input: Array
    bias: Array
    peephole: Array


class LayerNormLSTMParams(NamedTuple):
    """Parameters of `layer_norm_lstm`, gates stacked in the order i, f, g, o.

    ``recurrent [4N, N]``, ``input [4N, I]``, ``bias [4N]``; gains of what is normalised: ``recurrent_gain [4N]``,
    ``input_gain [4N]``, ``cell_gain [N]``; ``cell_bias [N]``.
    """

    recurrent: Array
    input: Array
    bias: Array
    recurrent_gain: Array
    input_gain: Array
    cell_gain: Array
    cell_bias: Array


class ResidualLSTMParams(NamedTuple):
    """Parameters of `residual_lstm`, gates stacked in the order i, f, g, o.

    ``recurrent [4N, N]``, ``input [4N, I]``, ``bias [4N]``, ``peephole [3N]`` in the order i, f, o,
    ``projection [N, N]``, ``shortcut [N, I]``.
    """

    recurrent: Array
    input: Array
    bias: Array
    peephole: Array
    projection: Array
    shortcut: Array


class MultiplicativeLSTMParams(NamedTuple):
    """Parameters of `multiplicative_lstm`, gates stacked in the order i, f, g, o.

    ``recurrent [4N, N]``, by which m is multiplied, ``input [4N, I]``, ``bias [4N]``; the factors of m:
    ``state_factor [N, N]``, ``input_factor [N, I]``.
    """

    recurrent: Array
    input: Array
    bias: Array
    state_factor: Array
    input_factor: Array


class WorkingMemoryLSTMParams(NamedTuple):
    """Parameters of `wmc_lstm`, gates stacked in the order i, f, g, o.

    ``recurrent [4N, N]``, ``input [4N, I]``, ``bias [4N]``, ``memory [3N, N]`` in the order i, f, o.
    """

    recurrent: Array
    input: Array
    bias: Array
    memory: Array


@recalled
def original_lstm(
    hidden_size: int,
    *,
    recurrent_init: Initializer = _tenth,
    input_init: Initializer = _tenth,
    dtype: Any = None,
) -> Cell:
    """The long short-term memory as it was first, which cannot forget (Hochreiter and Schmidhuber 1997, Neural Comput.
    9: 1735).

    ::

        i = sigmoid(W_i h_{t-1} + U_i x_t + b_i)
        g = tanh(W_g h_{t-1} + U_g x_t + b_g)
        o = sigmoid(W_o h_{t-1} + U_o x_t + b_o)
        c_t = c_{t-1} + i * g
        h_t = o * tanh(c_t)

    The paper's ``4 sigmoid(a) - 2`` for g is ``2 tanh(a / 2)`` and its ``2 sigmoid(c) - 1`` is ``tanh(c / 2)``: the
    same cell, with the weights of g and the cell halved. Weights start uniform between -0.1 and 0.1, as in most of its
    experiments, biases at 0; it gives some gates negative ones, to begin closed.

    The carousel ``dc_t/dc_{t-1} = I`` is all that remains of the Jacobian where it is cut at the gates, as the paper
    does. Here nothing is cut: along c the signal neither grows nor fades, and what passes through h adds to it.

    Args:
      hidden_size: N, of units.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, in the order i, g, o, and a state ``h [N], c [N]``, D = 2N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    like = gated_cell(_original_step, hidden_size, dtype, recurrent_init, input_init, (3, 3, 3))
    return Cell(like.init, with_cell(like), like.step)


@recalled
def peephole_lstm(
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The long short-term memory whose gates see the cell (Gers et al. 2002, J. Mach. Learn. Res. 3: 115).

    ::

        i = sigmoid(W_i h_{t-1} + U_i x_t + p_i * c_{t-1} + b_i)
        f = sigmoid(W_f h_{t-1} + U_f x_t + p_f * c_{t-1} + b_f)
        g = tanh(W_g h_{t-1} + U_g x_t + b_g)
        c_t = f * c_{t-1} + i * g
        o = sigmoid(W_o h_{t-1} + U_o x_t + p_o * c_t + b_o)
        h_t = o * tanh(c_t)

    In the form of Graves (2013, arXiv:1308.0850, equations 7 to 11). The peepholes start at 0, all else as in
    `bptt_jax.lstm`: the first step is the same. They make ``dc_t/dc_{t-1}`` diagonal still, but
    ``f + i' * g * p_i + f' * c_{t-1} * p_f`` instead of f.

    Args:
      hidden_size: N, of units.
      forget_bias, recurrent_init, input_init, dtype: as for `bptt_jax.lstm`.

    Returns:
      A `Cell` with `PeepholeLSTMParams` and a state ``h [N], c [N]``, D = 2N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    like = lstm(
        hidden_size, forget_bias=forget_bias, recurrent_init=recurrent_init, input_init=input_init, dtype=dtype
    )

    def init(key: Array, input_size: int) -> PeepholeLSTMParams:
        drawn: LSTMParams = like.init(key, input_size)
        return PeepholeLSTMParams(*drawn, jnp.zeros_like(drawn.bias, shape=3 * hidden_size))

    return Cell(init, like.initial_state, _peephole_step)


@recalled
def coupled_lstm(
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The long short-term memory with one gate to let in and to forget (CIFG; Greff et al. 2017, arXiv:1503.04069).

    ::

        i = sigmoid(W_i h_{t-1} + U_i x_t + p_i * c_{t-1} + b_i)
        g = tanh(W_g h_{t-1} + U_g x_t + b_g)
        c_t = (1 - i) * c_{t-1} + i * g
        o = sigmoid(W_o h_{t-1} + U_o x_t + p_o * c_t + b_o)
        h_t = o * tanh(c_t)

    With the peepholes that all variants of the paper have but the one without; TensorFlow's cell of that name has
    them if asked. They start at 0, b_i at ``-forget_bias``, the weights as in `bptt_jax.lstm`. The cell is a mean of
    what it was and g: it stays between -1 and 1, and ``dc_t/dc_{t-1}`` begins near ``sigmoid(forget_bias)``.

    Args:
      hidden_size: N, of units.
      forget_bias, recurrent_init, input_init, dtype: as for `bptt_jax.lstm`.

    Returns:
      A `Cell` with `PeepholeLSTMParams`, in the order i, g, o, and a state ``h [N], c [N]``, D = 2N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    biases = constants(-check_finite("forget_bias", forget_bias), 0.0, 0.0)
    like = gated_cell(_coupled_step, hidden_size, dtype, recurrent_init, input_init, (3, 3, 3), biases)

    def init(key: Array, input_size: int) -> PeepholeLSTMParams:
        drawn: GatedParams = like.init(key, input_size)
        return PeepholeLSTMParams(*drawn, jnp.zeros_like(drawn.bias, shape=2 * hidden_size))

    return Cell(init, with_cell(like), like.step)


@recalled
def layer_norm_lstm(
    hidden_size: int,
    *,
    forget_bias: float = 0.0,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The long short-term memory with layer normalisation (Ba et al. 2016, arXiv:1607.06450, equations 20 to 22).

    ::

        a = alpha_1 * N(W h_{t-1}) + alpha_2 * N(U x_t) + b,   a = (a_i, a_f, a_g, a_o)
        c_t = sigmoid(a_f) * c_{t-1} + sigmoid(a_i) * tanh(a_g)
        h_t = sigmoid(a_o) * tanh(alpha_3 * N(c_t) + beta_3)
        N(v) = (v - mean(v)) / sqrt(var(v) + 1e-5)

    N is over all numbers of its vector, of the four gates together, as in the authors' code. The paper's beta_1 and
    beta_2 add to b, and are left out. Gains start at 1, biases at 0, the weights as in `bptt_jax.lstm`.

    N does not change when h_{t-1} is multiplied: the derivative with respect to the state is as much larger as the
    state is smaller, at zeros ``1e-5 ** -0.5``, some 316, times W. So the adjoint at the first of a sequence's
    states is large without meaning anything, and while inputs are zero too, all states stay zero and it grows so at
    every step, in float16 beyond all numbers within two. The cell's own part of the Jacobian is ``sigmoid(a_f)``.

    Args:
      hidden_size: N, of units.
      forget_bias, recurrent_init, input_init, dtype: as for `bptt_jax.lstm`; the bias as in the authors' code.

    Returns:
      A `Cell` with `LayerNormLSTMParams` and a state ``h [N], c [N]``, D = 2N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    like = lstm(
        hidden_size, forget_bias=forget_bias, recurrent_init=recurrent_init, input_init=input_init, dtype=dtype
    )

    def init(key: Array, input_size: int) -> LayerNormLSTMParams:
        drawn: LSTMParams = like.init(key, input_size)
        ones, cell_bias = jnp.ones_like(drawn.bias), jnp.zeros_like(drawn.bias, shape=hidden_size)
        return LayerNormLSTMParams(*drawn, ones, ones, jnp.ones_like(cell_bias), cell_bias)

    return Cell(init, like.initial_state, _layer_norm_step)


@recalled
def residual_lstm(
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The long short-term memory with a shortcut of its input (Kim et al. 2017, arXiv:1701.03360).

    ::

        i = sigmoid(W_i h_{t-1} + U_i x_t + p_i * c_{t-1} + b_i)
        f = sigmoid(W_f h_{t-1} + U_f x_t + p_f * c_{t-1} + b_f)
        g = tanh(W_g h_{t-1} + U_g x_t + b_g)
        c_t = f * c_{t-1} + i * g
        o = sigmoid(W_o h_{t-1} + U_o x_t + p_o * c_t + b_o)
        h_t = o * (P tanh(c_t) + S x_t)

    S may be the identity, says the paper, where x_t is as wide as h_t, from a layer below; here it is learned always.
    P is drawn by `recurrent_init` and S by `input_init`, all else starts as in `peephole_lstm`. The shortcut is one
    between layers: of the Jacobian it changes what the output gate lets through.

    Args:
      hidden_size: N, of units.
      forget_bias, recurrent_init, input_init, dtype: as for `bptt_jax.lstm`.

    Returns:
      A `Cell` with `ResidualLSTMParams` and a state ``h [N], c [N]``, D = 2N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    like = peephole_lstm(
        hidden_size, forget_bias=forget_bias, recurrent_init=recurrent_init, input_init=input_init, dtype=dtype
    )

    def init(key: Array, input_size: int) -> ResidualLSTMParams:
        drawn: PeepholeLSTMParams = like.init(key, input_size)
        more = _two_more(key, hidden_size, input_size, recurrent_init, input_init, drawn.bias.dtype)
        return ResidualLSTMParams(*drawn, *more)

    return Cell(init, like.initial_state, _residual_step)


@recalled
def multiplicative_lstm(
    hidden_size: int,
    *,
    forget_bias: float = 3.0,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The multiplicative LSTM (Krause et al. 2016, arXiv:1609.07959): the input chooses the recurrent weights.

    ::

        m = (F_x x_t) * (F_h h_{t-1})
        i = sigmoid(W_i m + U_i x_t + b_i)      f = sigmoid(W_f m + U_f x_t + b_f)
        g = tanh(W_g m + U_g x_t + b_g)         o = sigmoid(W_o m + U_o x_t + b_o)
        c_t = f * c_{t-1} + i * g               h_t = o * tanh(c_t)

    With biases of the gates alone, as in OpenAI's model of 2017 (arXiv:1704.01444). F_h is drawn by `recurrent_init`
    and F_x by `input_init`; b_f starts at 3, as in the authors' code (benkrause/mLSTM), all else as in `bptt_jax.lstm`.
    What passes from h_{t-1} goes through ``W diag(F_x x_t) F_h``: where the input is zero, nothing does, and the cell
    alone remembers.

    Args:
      hidden_size: N, of units.
      forget_bias, recurrent_init, input_init, dtype: as for `bptt_jax.lstm`.

    Returns:
      A `Cell` with `MultiplicativeLSTMParams` and a state ``h [N], c [N]``, D = 2N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    like = lstm(
        hidden_size, forget_bias=forget_bias, recurrent_init=recurrent_init, input_init=input_init, dtype=dtype
    )

    def init(key: Array, input_size: int) -> MultiplicativeLSTMParams:
        drawn: LSTMParams = like.init(key, input_size)
        more = _two_more(key, hidden_size, input_size, recurrent_init, input_init, drawn.bias.dtype)
        return MultiplicativeLSTMParams(*drawn, *more)

    return Cell(init, like.initial_state, _multiplicative_step)


@recalled
def wmc_lstm(
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The long short-term memory with working memory connections (Landi et al. 2021, arXiv:2109.00020).

    ::

        i = sigmoid(W_i h_{t-1} + U_i x_t + tanh(M_i c_{t-1}) + b_i)
        f = sigmoid(W_f h_{t-1} + U_f x_t + tanh(M_f c_{t-1}) + b_f)
        g = tanh(W_g h_{t-1} + U_g x_t + b_g)
        c_t = f * c_{t-1} + i * g
        o = sigmoid(W_o h_{t-1} + U_o x_t + tanh(M_o c_t) + b_o)
        h_t = o * tanh(c_t)

    Peepholes that are whole matrices, and bounded. M is drawn by `recurrent_init`, all else starts as in
    `bptt_jax.lstm`. ``dc_t/dc_{t-1}`` is diagonal no more: the cells write to one another.

    Args:
      hidden_size: N, of units.
      forget_bias, recurrent_init, input_init, dtype: as for `bptt_jax.lstm`.

    Returns:
      A `Cell` with `WorkingMemoryLSTMParams` and a state ``h [N], c [N]``, D = 2N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    like = lstm(
        hidden_size, forget_bias=forget_bias, recurrent_init=recurrent_init, input_init=input_init, dtype=dtype
    )

    def init(key: Array, input_size: int) -> WorkingMemoryLSTMParams:
        drawn: LSTMParams = like.init(key, input_size)
        k_memory, n, kind = jax.random.fold_in(key, 1), hidden_size, drawn.bias.dtype
        memory = draw_gates("recurrent_init", recurrent_init, k_memory, 3, n, n, kind)
        return WorkingMemoryLSTMParams(*drawn, memory)

    return Cell(init, like.initial_state, _working_memory_step)


@recalled
def janet(
    hidden_size: int,
    *,
    longest: int | None = None,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """Just another network: the LSTM with its forget gate alone (van der Westhuizen, Lasenby 2018, arXiv:1804.04849).

    ::

        s = W_f h_{t-1} + U_f x_t + b_f
        g = tanh(W_g h_{t-1} + U_g x_t + b_g)
        h_t = sigmoid(s) * h_{t-1} + (1 - sigmoid(s - 1)) * g

    The 1 is the paper's beta: more is let in than is forgotten, so that the state may leave [-1, 1]. The paper's cell
    c is h. With `longest`, b_f starts as `bptt_jax.cells.initializers.chrono` has it, ``log U[1, longest - 1]``, as in
    the paper; without, at 1, as in the authors' code; b_g at 0, the weights as in `bptt_jax.lstm`. The Jacobian is
    ``diag(sigmoid(s))`` and what passes through the weights.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      longest: T_max, the longest memory in steps, at least 3.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, in the order f, g, and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    biases = constants(1.0, 0.0) if longest is None else _kept_for(longest)
    return gated_cell(_janet_step, hidden_size, dtype, recurrent_init, input_init, (2, 2, 2), biases)


def _kept_for(longest: int) -> Initializer:
    """Of `chrono` for a gate that keeps, where it has two gates for one that lets in."""
    let_in = chrono(longest)
    return lambda key, shape, dtype: -let_in(key, shape, dtype)


def _two_more(
    key: Array, n: int, fan_in: int, recurrent_init: Initializer, input_init: Initializer, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """Matrices [n, n] and [n, fan_in], beside those that come of the same key."""
    k_rec, k_in = jax.random.split(jax.random.fold_in(key, 1))
    return (
        draw_gates("recurrent_init", recurrent_init, k_rec, 1, n, n, dtype),
        draw_gates("input_init", input_init, k_in, 1, n, fan_in, dtype),
    )


def _peephole_cell(
    params: PeepholeLSTMParams | ResidualLSTMParams, state: LSTMState, x: Array
) -> tuple[Array, Array]:
    """c_t and the output gate."""
    i, f, g, o = jnp.split(times(params.recurrent, state.h) + times(params.input, x) + params.bias, 4)
    p_i, p_f, p_o = jnp.split(params.peephole, 3)
    c = sigmoid(f + p_f * state.c) * state.c + sigmoid(i + p_i * state.c) * tanh(g)
    return c, sigmoid(o + p_o * c)


def _peephole_step(params: PeepholeLSTMParams, state: LSTMState, x: Array) -> LSTMState:
    c, o = _peephole_cell(params, state, x)
    return LSTMState(o * tanh(c), c)


def _residual_step(params: ResidualLSTMParams, state: LSTMState, x: Array) -> LSTMState:
    c, o = _peephole_cell(params, state, x)
    return LSTMState(o * (times(params.projection, tanh(c)) + times(params.shortcut, x)), c)


def _multiplicative_step(params: MultiplicativeLSTMParams, state: LSTMState, x: Array) -> LSTMState:
    m = times(params.input_factor, x) * times(params.state_factor, state.h)
    i, f, g, o = jnp.split(times(params.recurrent, m) + times(params.input, x) + params.bias, 4)
    c = sigmoid(f) * state.c + sigmoid(i) * tanh(g)
    return LSTMState(sigmoid(o) * tanh(c), c)


def _normalized(v: Array) -> Array:
    # In single precision at least: squares of half precision overflow above 256.
    wide = v.astype(at_least_single(v.dtype))
    centred = wide - jnp.mean(wide)
    return (centred * jax.lax.rsqrt(jnp.mean(centred * centred) + _LEAST_VARIANCE)).astype(v.dtype)


def _layer_norm_step(params: LayerNormLSTMParams, state: LSTMState, x: Array) -> LSTMState:
    of_state = params.recurrent_gain * _normalized(times(params.recurrent, state.h))
    of_input = params.input_gain * _normalized(times(params.input, x))
    i, f, g, o = jnp.split(of_state + of_input + params.bias, 4)
    c = sigmoid(f) * state.c + sigmoid(i) * tanh(g)
    return LSTMState(sigmoid(o) * tanh(params.cell_gain * _normalized(c) + params.cell_bias), c)


def _original_step(params: GatedParams, state: LSTMState, x: Array) -> LSTMState:
    i, g, o = jnp.split(times(params.recurrent, state.h) + times(params.input, x) + params.bias, 3)
    c = state.c + sigmoid(i) * tanh(g)
    return LSTMState(sigmoid(o) * tanh(c), c)


def _coupled_step(params: PeepholeLSTMParams, state: LSTMState, x: Array) -> LSTMState:
    i, g, o = jnp.split(times(params.recurrent, state.h) + times(params.input, x) + params.bias, 3)
    p_i, p_o = jnp.split(params.peephole, 2)
    c = weighted_mean(sigmoid(i + p_i * state.c), state.c, tanh(g))
    return LSTMState(sigmoid(o + p_o * c) * tanh(c), c)


def _working_memory_step(params: WorkingMemoryLSTMParams, state: LSTMState, x: Array) -> LSTMState:
    i, f, g, o = jnp.split(times(params.recurrent, state.h) + times(params.input, x) + params.bias, 4)
    before, after = jnp.split(params.memory, [2 * state.h.size])
    m_i, m_f = jnp.split(tanh(times(before, state.c)), 2)
    c = sigmoid(f + m_f) * state.c + sigmoid(i + m_i) * tanh(g)
    return LSTMState(sigmoid(o + tanh(times(after, c))) * tanh(c), c)


def _janet_step(params: GatedParams, h: Array, x: Array) -> Array:
    s, g = jnp.split(times(params.recurrent, h) + times(params.input, x) + params.bias, 2)
    return sigmoid(s) * h + sigmoid(1 - s) * tanh(g)  # 1 - sigmoid(s - 1)
