"""The classical cells, each a `Cell` of three pure functions."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from bptt_jax.recurrence.activations import sigmoid, tanh, weighted_mean
from bptt_jax.recurrence.initializers import Initializer, check_initializer, drawn
from bptt_jax.step import (
    Array,
    Cell,
    Step,
    check_finite,
    check_floating,
    check_function,
    check_key,
    check_positive_int,
)

_normal = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_orthogonal = jax.nn.initializers.orthogonal()
_KEEPING_LESS: dict[Any, Callable[[Array], Array]] = {jnp.tanh: tanh, jax.nn.sigmoid: sigmoid}
# Numbers in a matrix of weights, of which `_product` makes a transposed copy, or lets the compiler make one.
_COPIED_UP_TO, _TRANSPOSED_UP_TO = 1 << 15, 1 << 18


class RNNParams(NamedTuple):
    """Parameters of `rnn`: ``recurrent [N, N]``, ``input [N, I]``, ``bias [N]``."""

    recurrent: Array
    input: Array
    bias: Array


class GRUParams(NamedTuple):
    """Parameters of `gru`, gates stacked in the order r, z, n.

    ``recurrent [3N, N]``, ``input [3N, I]``, ``bias [3N]``, ``recurrent_bias [N]`` (b_hn, inside the reset).
    """

    recurrent: Array
    input: Array
    bias: Array
    recurrent_bias: Array


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


def rnn(
    hidden_size: int,
    *,
    activation: Callable[[Array], Array] = jnp.tanh,
    gain: float = 1.0,
    recurrent_init: Initializer = _normal,
    input_init: Initializer = _normal,
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
      gain: factor of the initial recurrent weights.
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
    n, dtype = check_positive_int("hidden_size", hidden_size), check_floating("dtype", dtype)
    check_function("activation", activation, "activation(array) -> array")
    check_finite("gain", gain)
    _check_initializers(recurrent_init, input_init)

    def init(key: Array, input_size: int) -> RNNParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in = jax.random.split(check_key("key", key))
        return RNNParams(
            gain * _stacked("recurrent_init", recurrent_init, k_rec, 1, n, n, dtype),
            _stacked("input_init", input_init, k_in, 1, n, fan_in, dtype),
            jnp.zeros(n, dtype),
        )

    return Cell(init, lambda: jnp.zeros(n, dtype), _rnn_step(_KEEPING_LESS.get(activation, activation)))


def gru(
    hidden_size: int,
    *,
    recurrent_init: Initializer = _orthogonal,
    input_init: Initializer = _normal,
    bias_init: Initializer = jax.nn.initializers.zeros,
    dtype: Any = None,
) -> Cell:
    """The gated recurrent unit (Cho et al. 2014, arXiv:1406.1078), with the reset after the product.

    ::

        r = sigmoid(W_r h_{t-1} + U_r x_t + b_r)
        z = sigmoid(W_z h_{t-1} + U_z x_t + b_z)
        n = tanh(U_n x_t + b_n + r * (W_n h_{t-1} + c_n))
        h_t = (1 - z) * n + z * h_{t-1}

    This is the variant of cuDNN, PyTorch, Equinox and Keras (``reset_after=True``). Cho's first version
    resets before the product, ``W_n (r * h_{t-1})``, and exchanges z and 1 - z.

    Args:
      hidden_size: N, of units.
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
    n, dtype = check_positive_int("hidden_size", hidden_size), check_floating("dtype", dtype)
    _check_initializers(recurrent_init, input_init)
    check_initializer("bias_init", bias_init)

    def init(key: Array, input_size: int) -> GRUParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in, k_bias = jax.random.split(check_key("key", key), 3)
        return GRUParams(
            _stacked("recurrent_init", recurrent_init, k_rec, 3, n, n, dtype),
            _stacked("input_init", input_init, k_in, 3, n, fan_in, dtype),
            drawn("bias_init", bias_init, k_bias, (3, n), dtype).ravel(),
            jnp.zeros(n, dtype),
        )

    return Cell(init, lambda: jnp.zeros(n, dtype), _gru_step)


def lstm(
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    recurrent_init: Initializer = _orthogonal,
    input_init: Initializer = _normal,
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
      forget_bias: initial b_f; the other biases start at 0.
      recurrent_init, input_init: initialisers as in `rnn`, applied gate by gate.
      bias_init: initialiser of the biases i, f, g, o, of shape ``(4, N)``, instead of `forget_bias`; see
        `bptt_jax.initializers.chrono`.
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
    n, dtype = check_positive_int("hidden_size", hidden_size), check_floating("dtype", dtype)
    check_finite("forget_bias", forget_bias)
    _check_initializers(recurrent_init, input_init)

    def constant(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
        return jnp.zeros(shape, dtype).at[1].set(forget_bias)

    biases = constant if bias_init is None else check_initializer("bias_init", bias_init)

    def init(key: Array, input_size: int) -> LSTMParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in, k_bias = jax.random.split(check_key("key", key), 3)
        return LSTMParams(
            _stacked("recurrent_init", recurrent_init, k_rec, 4, n, n, dtype),
            _stacked("input_init", input_init, k_in, 4, n, fan_in, dtype),
            drawn("bias_init", biases, k_bias, (4, n), dtype).ravel(),
        )

    return Cell(init, lambda: LSTMState(jnp.zeros(n, dtype), jnp.zeros(n, dtype)), _lstm_step)


def _check_initializers(recurrent_init: Initializer, input_init: Initializer) -> None:
    check_initializer("recurrent_init", recurrent_init)
    check_initializer("input_init", input_init)


def _stacked(name: str, init: Initializer, key: Array, gates: int, n: int, fan_in: int, dtype: jnp.dtype) -> Array:
    """`gates` matrices [n, fan_in], each initialised on its own, stacked to [gates * n, fan_in]."""
    wide = dtype if dtype.itemsize >= 4 else jnp.float32  # LAPACK, behind orthogonal, knows no half precision
    keys = jax.random.split(key, gates)
    return jnp.concatenate([drawn(name, init, k, (fan_in, n), wide).astype(dtype).T for k in keys])


def _product(weights: Array, vector: Array) -> Array:
    # Which of the three is fastest was measured on CPU: training steps, 32 to 512 units, batches of 32 (5 to 25 %).
    if weights.size > _TRANSPOSED_UP_TO:
        return weights @ vector  # where they lie: a copy of 4096 x 4096 is 67 MB
    columns = weights.T
    if weights.size <= _COPIED_UP_TO:
        # Behind the barrier the copy is no part of the product, so it is made once, before the loop over time.
        columns = jax.lax.optimization_barrier(columns)
    return jnp.dot(vector, columns)


@jax.custom_jvp
def _times(weights: Array, vector: Array) -> Array:
    """``weights @ vector``."""
    return _product(weights, vector)


@partial(_times.defjvp, symbolic_zeros=True)
def _times_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    (weights, vector), (d_weights, d_vector) = primals, tangents
    if isinstance(d_weights, SymbolicZero):
        # With respect to the state alone: of a basis of tangents the product is the weights themselves, one tangent
        # to a column, as the Jacobian has them. By rows Jacobians took 1.2 to 3.6 times as long on CPU, and the
        # compiler, if it may, puts this product by rows for the sake of what follows it.
        return _times(weights, vector), jax.lax.optimization_barrier(weights @ d_vector)
    if isinstance(d_vector, SymbolicZero):
        return jax.jvp(lambda w: _product(w, vector), (weights,), (d_weights,))
    return jax.jvp(_product, primals, tangents)


# One step object per activation, and one each for gru and lstm: cells that differ only in size or
# initialisation share what JAX has compiled.
@lru_cache
def _rnn_step(activation: Callable[[Array], Array]) -> Step:
    def rnn_step(params: RNNParams, h: Array, x: Array) -> Array:
        return activation(_times(params.recurrent, h) + _times(params.input, x) + params.bias)

    return rnn_step


# The gates are taken apart by jnp.split, whose transpose is one concatenation; that of slicing is a sum of
# zero-padded arrays, which costs a training step up to 40 % more.
def _gru_step(params: GRUParams, h: Array, x: Array) -> Array:
    r_h, z_h, n_h = jnp.split(_times(params.recurrent, h), 3)
    r_x, z_x, n_x = jnp.split(_times(params.input, x) + params.bias, 3)
    r = sigmoid(r_h + r_x)
    z = sigmoid(z_h + z_x)
    n = tanh(n_x + r * (n_h + params.recurrent_bias))
    return weighted_mean(z, n, h)


def _lstm_step(params: LSTMParams, state: LSTMState, x: Array) -> LSTMState:
    i, f, g, o = jnp.split(_times(params.recurrent, state.h) + _times(params.input, x) + params.bias, 4)
    c = sigmoid(f) * state.c + sigmoid(i) * tanh(g)
    return LSTMState(sigmoid(o) * tanh(c), c)
