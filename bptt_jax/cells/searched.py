"""Cells that a search found, by mutations (mut1, mut2, mut3) or by a controller that learned to propose them (nas)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh, weighted_mean
from bptt_jax.cells.gated import LSTMState
from bptt_jax.cells.gating import GatedParams, gated_cell, with_cell
from bptt_jax.cells.initializers import Initializer
from bptt_jax.cells.sharing import recalled, shared
from bptt_jax.cells.weights import fan_in_normal, orthogonal, times
from bptt_jax.step import Array, Cell, Step


@recalled
def mut1(
    hidden_size: int,
    *,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The first of three mutants that a search found (Jozefowicz et al. 2015, ICML, "MUT1").

    ::

        z = sigmoid(U_z x_t + b_z)
        r = sigmoid(W_r h_{t-1} + U_r x_t + b_r)
        n = tanh(W_n (r * h_{t-1}) + tanh(U_n x_t) + b_n)
        h_t = (1 - z) * h_{t-1} + z * n

    The update does not see the state. The paper has x_t in the place of ``U_n x_t``, for inputs as wide as the state:
    that is ``U_n = I``. The paper searched for the scale of the initial weights; here they start as those of
    `bptt_jax.gru`, biases at 0.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, ``input`` and ``bias`` in the order z, r, n, ``recurrent`` r, n, and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    return gated_cell(_mut1_step, hidden_size, dtype, recurrent_init, input_init, (2, 3, 3))


@recalled
def mut2(
    hidden_size: int,
    *,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The second of three mutants that a search found (Jozefowicz et al. 2015, ICML, "MUT2").

    ::

        z = sigmoid(W_z h_{t-1} + U_z x_t + b_z)
        r = sigmoid(W_r h_{t-1} + U_r x_t + b_r)
        n = tanh(W_n (r * h_{t-1}) + U_n x_t + b_n)
        h_t = (1 - z) * h_{t-1} + z * n

    The paper has x_t in the place of ``U_r x_t``, for inputs as wide as the state: that is ``U_r = I``. With weights
    U_r it is `bptt_jax.gru` with ``reset_after=False`` and z and 1 - z exchanged. The weights start as those of
    `bptt_jax.gru`, biases at 0.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, in the order z, r, n, and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    return gated_cell(_mut2_step, hidden_size, dtype, recurrent_init, input_init, (3, 3, 3))


@recalled
def mut3(
    hidden_size: int,
    *,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The third of three mutants that a search found (Jozefowicz et al. 2015, ICML, "MUT3").

    ::

        z = sigmoid(W_z tanh(h_{t-1}) + U_z x_t + b_z)
        r = sigmoid(W_r h_{t-1} + U_r x_t + b_r)
        n = tanh(W_n (r * h_{t-1}) + U_n x_t + b_n)
        h_t = (1 - z) * h_{t-1} + z * n

    It differs from `bptt_jax.cells.mut2` in what z sees of the state. The weights start as those of `bptt_jax.gru`,
    biases at 0.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, in the order z, r, n, and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    return gated_cell(_mut3_step, hidden_size, dtype, recurrent_init, input_init, (3, 3, 3))


@recalled
def nas(
    hidden_size: int,
    *,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The cell that a neural architecture search found (Zoph, Le 2017, arXiv:1611.01578).

    ::

        a_k = W_k h_{t-1} + b_k,   u_k = U_k x_t,   k = 0 ... 7
        l_0 = tanh(sigmoid(u_0 + a_0) * relu(u_1 + a_1))
        l_1 = tanh(sigmoid(u_2 + a_2) + relu(u_3 * a_3))
        l_2 = tanh(tanh(u_4 + a_4) * sigmoid(u_5 + a_5))
        l_3 = sigmoid(tanh(u_6 + a_6) + sigmoid(u_7 + a_7))
        c_t = tanh(l_0 + c_{t-1}) * l_1
        h_t = tanh(c_t * tanh(l_2 + l_3))

    In the form of TensorFlow's NASCell, a product in the fourth pair and biases at the recurrent side included. The
    weights start as in `bptt_jax.lstm`, the biases at 0. No carousel: ``dc_t/dc_{t-1} = sech^2(l_0 + c_{t-1}) * l_1``
    is below 1, and tanh(1/2) = 0.46 where all is zero.

    Args:
      hidden_size: N, of units.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, of 8 blocks, and a state ``h [N], c [N]``, D = 2N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    like = gated_cell(_nas_step, hidden_size, dtype, recurrent_init, input_init, (8, 8, 8))
    return Cell(like.init, with_cell(like), like.step)


def _mut1_step(params: GatedParams, h: Array, x: Array) -> Array:
    w_r, w_n = jnp.split(params.recurrent, 2)
    z_x, r_x, n_x = jnp.split(times(params.input, x), 3)
    b_z, b_r, b_n = jnp.split(params.bias, 3)
    r = sigmoid(times(w_r, h) + r_x + b_r)
    return weighted_mean(sigmoid(z_x + b_z), h, tanh(times(w_n, r * h) + tanh(n_x) + b_n))


def _mutant_step(seen: Callable[[Array], Array]) -> Step:
    """The update sees this of the state."""

    def mutant_step(params: GatedParams, h: Array, x: Array) -> Array:
        w_z, w_r, w_n = jnp.split(params.recurrent, 3)
        z_x, r_x, n_x = jnp.split(times(params.input, x) + params.bias, 3)
        r = sigmoid(times(w_r, h) + r_x)
        return weighted_mean(sigmoid(times(w_z, seen(h)) + z_x), h, tanh(times(w_n, r * h) + n_x))

    return mutant_step


_mut2_step, _mut3_step = shared(_mutant_step, jax.nn.identity), shared(_mutant_step, tanh)


def _nas_step(params: GatedParams, state: LSTMState, x: Array) -> LSTMState:
    a = jnp.split(times(params.recurrent, state.h) + params.bias, 8)
    u = jnp.split(times(params.input, x), 8)
    l_0 = tanh(sigmoid(u[0] + a[0]) * jax.nn.relu(u[1] + a[1]))
    l_1 = tanh(sigmoid(u[2] + a[2]) + jax.nn.relu(u[3] * a[3]))
    l_2 = tanh(tanh(u[4] + a[4]) * sigmoid(u[5] + a[5]))
    l_3 = sigmoid(tanh(u[6] + a[6]) + sigmoid(u[7] + a[7]))
    c = tanh(l_0 + state.c) * l_1
    return LSTMState(tanh(c * tanh(l_2 + l_3)), c)
