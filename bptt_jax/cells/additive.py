"""Gated cells whose candidate is a function of the input alone: they add to their state, and do not transform it."""

from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh, weighted_mean
from bptt_jax.cells.gated import LSTMState
from bptt_jax.cells.gating import GatedParams, gated_cell, with_cell
from bptt_jax.cells.initializers import Initializer, check_initializer
from bptt_jax.cells.sharing import recalled
from bptt_jax.cells.weights import constants, fan_in_normal, orthogonal, times, within
from bptt_jax.checks import check_finite
from bptt_jax.step import Array, Cell

_small = within(0.07)


@recalled
def atr(
    hidden_size: int,
    *,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The addition-subtraction twin-gated unit (Zhang et al. 2018, arXiv:1810.12546): both gates of one sum.

    ::

        p = U x_t + b                   q = W h_{t-1}
        i = sigmoid(p + q)              f = sigmoid(p - q)
        h_t = i * p + f * h_{t-1}

    One matrix each for input and state, as few as `bptt_jax.rnn`. Nothing bounds the state but the gates: for one that
    stays, h = i p / (1 - f). The weights start as those of `bptt_jax.gru`, b at 0. The Jacobian is
    ``diag(f) + diag(i (1 - i) p - f (1 - f) h) W``.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams` of one block each, and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    return gated_cell(_atr_step, hidden_size, dtype, recurrent_init, input_init, (1, 1, 1))


@recalled
def ran(
    hidden_size: int,
    *,
    forget_bias: float = 0.0,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The recurrent additive network (Lee et al. 2017, arXiv:1705.07393): the cell is a weighted sum of inputs.

    ::

        i = sigmoid(W_i h_{t-1} + U_i x_t + b_i)      f = sigmoid(W_f h_{t-1} + U_f x_t + b_f)
        c_t = i * (U_c x_t) + f * c_{t-1}             h_t = tanh(c_t)

    `bptt_jax.lstm` without its candidate's recurrence and without output gate; the paper has it with
    ``h_t = c_t`` too. The content ``U_c x_t`` has no bias. The error carousel is ``dc_t/dc_{t-1} = f``; h_t is a
    function of c_t, so of the 2N singular values of the Jacobian N are 0, and as many exponents -inf. The weights
    start as those of `bptt_jax.gru`.

    Args:
      hidden_size: N, of units; the state is D = 2N numbers.
      forget_bias: initial b_f; b_i starts at 0. It may be traced, and is then checked when it runs.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, ``recurrent`` and ``bias`` in the order i, f, ``input`` i, f, c, and a state
      ``h [N], c [N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    biases = constants(0.0, check_finite("forget_bias", forget_bias))
    like = gated_cell(_ran_step, hidden_size, dtype, recurrent_init, input_init, (2, 3, 2), biases)
    return Cell(like.init, with_cell(like), like.step)


@recalled
def cfn(
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    recurrent_init: Initializer = _small,
    input_init: Initializer = _small,
    dtype: Any = None,
) -> Cell:
    """The chaos-free network (Laurent and von Brecht 2017, arXiv:1612.06212): left alone, it comes to rest.

    ::

        theta = sigmoid(W_theta h_{t-1} + U_theta x_t + b_theta)
        eta = sigmoid(W_eta h_{t-1} + U_eta x_t + b_eta)
        h_t = theta * tanh(h_{t-1}) + eta * tanh(U_h x_t)

    The weights start uniform in [-0.07, 0.07], and ``b_theta = 1``, ``b_eta = -1``. Without input every unit shrinks,
    ``|h_t| < |h_{t-1}|``, whatever the weights, and zero is the only attractor. The Jacobian is
    ``diag(theta (1 - tanh(h)^2))`` and what passes through the gates.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      forget_bias: initial b_theta, and -b_eta. It may be traced, and is then checked when it runs.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, ``recurrent`` and ``bias`` in the order theta, eta, ``input`` theta, eta, h, and a
      state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    bias = check_finite("forget_bias", forget_bias)
    return gated_cell(_cfn_step, hidden_size, dtype, recurrent_init, input_init, (2, 3, 2), constants(bias, -bias))


@recalled
def star(
    hidden_size: int,
    *,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = orthogonal,
    bias_init: Initializer = jax.nn.initializers.zeros,
    dtype: Any = None,
) -> Cell:
    """The stackable recurrent cell (Turkoglu et al. 2019, arXiv:1911.11033), made for deep stacks.

    ::

        k = sigmoid(W_k h_{t-1} + U_k x_t + b_k)
        z = tanh(U_z x_t + b_z)
        h_t = tanh((1 - k) * h_{t-1} + k * z)

    The authors' code lets z in by ``sigmoid(a_k + 1)``, a_k being the argument of k; here it is the paper's k. All
    weights start orthogonal, as there. Its b_k are those of ``chrono(t_max + 1)``, t_max = 784; here they start at 0
    by default. The Jacobian is ``diag(1 - h_t^2) (diag(1 - k) + diag(k (1 - k) (z - h_{t-1})) W_k)``: the outer tanh
    damps at every step what the gate keeps.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      bias_init: initialiser of the biases k, z, of shape ``(2, N)``; `bptt_jax.cells.initializers.chrono` fits.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, ``input`` and ``bias`` in the order k, z, ``recurrent`` of k alone, and a state
      ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    check_initializer("bias_init", bias_init)
    return gated_cell(_star_step, hidden_size, dtype, recurrent_init, input_init, (1, 2, 2), bias_init)


@recalled
def light_ru(
    hidden_size: int,
    *,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The light recurrent unit (Ye et al. 2024, Electronics 13: 3204): one gate, and a candidate of the input alone.

    ::

        f = sigmoid(W_f h_{t-1} + U_f x_t + b_f)
        n = tanh(U_n x_t)
        h_t = (1 - f) * h_{t-1} + f * n

    Between `bptt_jax.cells.mgu`, whose candidate sees the state, and `bptt_jax.cells.min_gru`, whose gate does not.
    The weights start as those of `bptt_jax.gru`, b_f at 0. The Jacobian is
    ``diag(1 - f) + diag(f (1 - f) (n - h)) W_f``.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, ``input`` in the order f, n, ``recurrent`` and ``bias`` of f alone, and a state
      ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    return gated_cell(_light_ru_step, hidden_size, dtype, recurrent_init, input_init, (1, 2, 1))


def _atr_step(params: GatedParams, h: Array, x: Array) -> Array:
    p, q = times(params.input, x) + params.bias, times(params.recurrent, h)
    return sigmoid(p + q) * p + sigmoid(p - q) * h


def _ran_step(params: GatedParams, state: LSTMState, x: Array) -> LSTMState:
    i_h, f_h = jnp.split(times(params.recurrent, state.h) + params.bias, 2)
    i_x, f_x, content = jnp.split(times(params.input, x), 3)
    c = sigmoid(i_h + i_x) * content + sigmoid(f_h + f_x) * state.c
    return LSTMState(tanh(c), c)


def _cfn_step(params: GatedParams, h: Array, x: Array) -> Array:
    theta_h, eta_h = jnp.split(times(params.recurrent, h) + params.bias, 2)
    theta_x, eta_x, h_x = jnp.split(times(params.input, x), 3)
    return sigmoid(theta_h + theta_x) * tanh(h) + sigmoid(eta_h + eta_x) * tanh(h_x)


def _star_step(params: GatedParams, h: Array, x: Array) -> Array:
    k_x, z_x = jnp.split(times(params.input, x) + params.bias, 2)
    return tanh(weighted_mean(sigmoid(times(params.recurrent, h) + k_x), h, tanh(z_x)))


def _light_ru_step(params: GatedParams, h: Array, x: Array) -> Array:
    f_x, n_x = jnp.split(times(params.input, x), 2)
    return weighted_mean(sigmoid(times(params.recurrent, h) + f_x + params.bias), h, tanh(n_x))
