"""Variants of the gated recurrent unit, most of them with fewer gates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh, weighted_mean
from bptt_jax.cells.gating import GatedParams, gated_cell
from bptt_jax.cells.initializers import Initializer, check_initializer
from bptt_jax.cells.sharing import recalled
from bptt_jax.cells.weights import (
    constants,
    draw_gates,
    fan_in_normal,
    glorot_uniform,
    orthogonal,
    times,
    within,
)
from bptt_jax.checks import check_finite, check_key, check_positive_int
from bptt_jax.step import Array, Cell

_tenth, _twentieth = jax.nn.initializers.normal(0.1), within(0.05)


class FastGRNNParams(NamedTuple):
    """Parameters of `fastgrnn`: ``recurrent [N, N]``, ``input [N, I]``, ``bias [2N]`` (z, n), ``zeta, nu []``."""

    recurrent: Array
    input: Array
    bias: Array
    zeta: Array
    nu: Array


class IntersectionParams(NamedTuple):
    """Parameters of `intersection_rnn`, gates stacked in the order v, n, y, h.

    ``recurrent [4N, N]``, ``input [4N, N]``, ``bias [4N]``, ``projection [N, I]``, ``projection_bias [N]``.
    """

    recurrent: Array
    input: Array
    bias: Array
    projection: Array
    projection_bias: Array


class IntersectionState(NamedTuple):
    """State of `intersection_rnn`: the output ``y [N]``, which no later step sees, and ``h [N]``."""

    y: Array
    h: Array


@recalled
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
    return gated_cell(_mgu_step, hidden_size, dtype, recurrent_init, input_init, (2, 2, 2), bias_init)


@recalled
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

    `forget_bias` is 1 in TensorFlow's implementation, as a constant added to b_g; here b_g starts there. The weights
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
    biases = constants(check_finite("forget_bias", forget_bias), 0.0)
    return gated_cell(_ugrnn_step, hidden_size, dtype, recurrent_init, input_init, (2, 2, 2), biases)


@recalled
def li_gru(
    hidden_size: int,
    *,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = glorot_uniform,
    dtype: Any = None,
) -> Cell:
    """The light gated recurrent unit (Ravanelli et al. 2018, arXiv:1803.10225): no reset, and ReLU.

    ::

        z = sigmoid(W_z h_{t-1} + U_z x_t + b_z)
        n = relu(W_n h_{t-1} + U_n x_t + b_n)
        h_t = z * h_{t-1} + (1 - z) * n

    The paper normalises ``U_z x_t`` and ``U_n x_t`` over the batch. That mixes sequences while training; of a trained
    network it is a fixed scale and shift, which U and b take in, so that this is the whole recurrence. Recurrent
    weights start orthogonal, input weights by Glorot's rule, as in the paper, biases at 0. Nothing bounds the state:
    where W_n expands, states and gradients can explode.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, in the order z, n, and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    return gated_cell(_li_gru_step, hidden_size, dtype, recurrent_init, input_init, (2, 2, 2))


@recalled
def fastgrnn(
    hidden_size: int,
    *,
    zeta: float = 1.0,
    nu: float = -4.0,
    recurrent_init: Initializer = _tenth,
    input_init: Initializer = _tenth,
    dtype: Any = None,
) -> Cell:
    """The fast gated network (Kusupati et al. 2018, arXiv:1901.02358): gate and candidate share their weights.

    ::

        a = W h_{t-1} + U x_t
        z = sigmoid(a + b_z)
        n = tanh(a + b_n)
        h_t = (sigmoid(zeta) (1 - z) + sigmoid(nu)) * n + z * h_{t-1}

    with numbers zeta and nu that are learned. W and U are of full rank, where the paper makes them low-rank and sparse
    to be small. Entries start N(0, 0.01), biases at 1, zeta at 1, nu at -4, as in the authors' code. The Jacobian is
    ``diag(z)`` and what passes through W, twice.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      zeta, nu: initial ones. They may be traced, and are then checked when they run.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `FastGRNNParams` and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    scalars = check_finite("zeta", zeta), check_finite("nu", nu)
    like = gated_cell(
        _fastgrnn_step, hidden_size, dtype, recurrent_init, input_init, (1, 1, 2), constants(1.0, 1.0)
    )

    def init(key: Array, input_size: int) -> FastGRNNParams:
        gated = like.init(key, input_size)
        return FastGRNNParams(*gated, *(jnp.asarray(scalar, gated.bias.dtype) for scalar in scalars))

    return Cell(init, like.initial_state, like.step)


@recalled
def sgu(
    hidden_size: int,
    *,
    recurrent_init: Initializer = fan_in_normal,
    input_init: Initializer = _twentieth,
    dtype: Any = None,
) -> Cell:
    """The simple gated unit (Gao and Glowacka 2016, arXiv:1604.02910): the input multiplies the state.

    ::

        g = tanh(W_g ((U_g x_t + b_g) * h_{t-1}))
        o = softplus(g * h_{t-1})
        z = hard_sigmoid(W_z h_{t-1} + U_z x_t + b_z)
        h_t = (1 - z) * h_{t-1} + z * o

    with the hard sigmoid of Theano, ``clip(a / 5 + 1 / 2, 0, 1)``, whose slope is 0 beyond 2.5. Where z is 0, the
    Jacobian is exactly the identity. As in the authors' code (gaoyuankidult/einstein) W starts at N(0, 1 / N), U
    uniform between -0.05 and 0.05, and biases at 0.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, in the order g, z, and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    return gated_cell(_sgu_step, hidden_size, dtype, recurrent_init, input_init, (2, 2, 2))


@recalled
def dsgu(
    hidden_size: int,
    *,
    recurrent_init: Initializer = fan_in_normal,
    input_init: Initializer = _twentieth,
    dtype: Any = None,
) -> Cell:
    """The deep simple gated unit (Gao and Glowacka 2016, arXiv:1604.02910): one more matrix than the simple one.

    ::

        g = tanh(W_g ((U_g x_t + b_g) * h_{t-1}))
        o = sigmoid(W_o (g * h_{t-1}))
        z = hard_sigmoid(W_z h_{t-1} + U_z x_t + b_z)
        h_t = (1 - z) * h_{t-1} + z * o

    with the hard sigmoid of `bptt_jax.cells.sgu`. The state stays between 0 and 1 once it is there. Weights
    and biases begin as those of `bptt_jax.cells.sgu`.

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedParams`, ``recurrent`` in the order g, o, z, ``input`` and ``bias`` g, z, and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    return gated_cell(_dsgu_step, hidden_size, dtype, recurrent_init, input_init, (3, 2, 2))


@recalled
def intersection_rnn(
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The intersection network (Collins et al. 2017, arXiv:1611.09913): one gate through time, one through depth.

    ::

        u = P x_t + b_u
        v = relu(W_v h_{t-1} + U_v u + b_v)           n = tanh(W_n h_{t-1} + U_n u + b_n)
        g_y = sigmoid(W_y h_{t-1} + U_y u + b_y)      g_h = sigmoid(W_h h_{t-1} + U_h u + b_h)
        y_t = g_y * u + (1 - g_y) * v                 h_t = g_h * h_{t-1} + (1 - g_h) * n

    The paper has x_t in the place of u, for inputs as wide as the state, and projects those of the first layer, as is
    done here in all. The output y goes to the next layer; no later step sees it, so its N columns of the Jacobian are
    0. The recurrence of h alone is that of `bptt_jax.cells.ugrnn`. The weights start as those of `bptt_jax.gru`.

    Args:
      hidden_size: N, of units; the state is D = 2N numbers.
      forget_bias: initial b_y and b_h, 1 as in TensorFlow's implementation; the other biases start at 0. It may be
        traced, and is then checked when it runs.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `IntersectionParams` and an `IntersectionState`.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    bias = check_finite("forget_bias", forget_bias)
    like = gated_cell(
        _intersection_step,
        hidden_size,
        dtype,
        recurrent_init,
        input_init,
        (4, 4, 4),
        constants(0.0, 0.0, bias, bias),
    )
    zeros = like.initial_state()

    def init(key: Array, input_size: int) -> IntersectionParams:
        fan_in = check_positive_int("input_size", input_size)
        k_gates, k_in = jax.random.split(check_key("key", key))
        projection = draw_gates("input_init", input_init, k_in, 1, zeros.size, fan_in, zeros.dtype)
        gates = like.init(k_gates, zeros.size)
        return IntersectionParams(gates.recurrent, gates.input, gates.bias, projection, zeros)

    return Cell(init, lambda: IntersectionState(zeros, zeros), like.step)


def _mgu_step(params: GatedParams, h: Array, x: Array) -> Array:
    w_f, w_n = jnp.split(params.recurrent, 2)
    f_x, n_x = jnp.split(times(params.input, x) + params.bias, 2)
    f = sigmoid(times(w_f, h) + f_x)
    return weighted_mean(f, h, tanh(times(w_n, f * h) + n_x))


def _ugrnn_step(params: GatedParams, h: Array, x: Array) -> Array:
    g, c = jnp.split(times(params.recurrent, h) + times(params.input, x) + params.bias, 2)
    return weighted_mean(sigmoid(g), tanh(c), h)


def _li_gru_step(params: GatedParams, h: Array, x: Array) -> Array:
    z, n = jnp.split(times(params.recurrent, h) + times(params.input, x) + params.bias, 2)
    return weighted_mean(sigmoid(z), jax.nn.relu(n), h)


def _fastgrnn_step(params: FastGRNNParams, h: Array, x: Array) -> Array:
    b_z, b_n = jnp.split(params.bias, 2)
    shared = times(params.recurrent, h) + times(params.input, x)
    z = sigmoid(shared + b_z)
    return (sigmoid(params.zeta) * (1 - z) + sigmoid(params.nu)) * tanh(shared + b_n) + z * h


def _sgu_step(params: GatedParams, h: Array, x: Array) -> Array:
    w_g, w_z = jnp.split(params.recurrent, 2)
    g_x, z_x = jnp.split(times(params.input, x) + params.bias, 2)
    out = jax.nn.softplus(tanh(times(w_g, g_x * h)) * h)
    return weighted_mean(_hard_sigmoid(times(w_z, h) + z_x), h, out)


def _dsgu_step(params: GatedParams, h: Array, x: Array) -> Array:
    w_g, w_o, w_z = jnp.split(params.recurrent, 3)
    g_x, z_x = jnp.split(times(params.input, x) + params.bias, 2)
    out = sigmoid(times(w_o, tanh(times(w_g, g_x * h)) * h))
    return weighted_mean(_hard_sigmoid(times(w_z, h) + z_x), h, out)


def _hard_sigmoid(a: Array) -> Array:
    return jnp.clip(0.2 * a + 0.5, 0, 1)


def _intersection_step(params: IntersectionParams, state: IntersectionState, x: Array) -> IntersectionState:
    u = times(params.projection, x) + params.projection_bias
    gates = times(params.recurrent, state.h) + times(params.input, u) + params.bias
    v, n, g_y, g_h = jnp.split(gates, 4)
    y = weighted_mean(sigmoid(g_y), jax.nn.relu(v), u)
    return IntersectionState(y, weighted_mean(sigmoid(g_h), tanh(n), state.h))
