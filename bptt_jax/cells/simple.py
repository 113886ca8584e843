"""The simple recurrent network, and the leaky one."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh
from bptt_jax.cells.initializers import Initializer
from bptt_jax.cells.weights import check_hidden_size, check_initializers, draw_gates, fan_in_normal, times
from bptt_jax.checks import (
    check_finite,
    check_floating,
    check_function,
    check_key,
    check_number,
    check_positive_int,
)
from bptt_jax.step import Array, Cell, Input, Step

_KEEPING_LESS: dict[Any, Callable[[Array], Array]] = {jnp.tanh: tanh, jax.nn.sigmoid: sigmoid}


class RNNParams(NamedTuple):
    """Parameters of `rnn` and of `leaky_rnn`: ``recurrent [N, N]``, ``input [N, I]``, ``bias [N]``."""

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
    """The simple recurrent network (Elman 1990, Cogn. Sci. 14: 179).

    ::

        h_t = phi(W h_{t-1} + U x_t + b)

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


def leaky_rnn(
    hidden_size: int,
    *,
    alpha: float = 0.2,
    noise: float = 0.0,
    activation: Callable[[Array], Array] = jnp.tanh,
    gain: float = 1.0,
    recurrent_init: Initializer = fan_in_normal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The continuous-time network of rates, in steps of Euler's method (Yang et al. 2019, Nat. Neurosci. 22: 297).

    ::

        tau dr/dt = -r + phi(W r + U x + b + sqrt(2 tau) noise xi)
        h_t = (1 - alpha) h_{t-1} + alpha phi(W h_{t-1} + U x_t + b + sqrt(2 / alpha) noise n_t)

    with ``alpha = dt / tau`` and n_t ~ N(0, 1) for every unit. The state is the rates r, so it stays where phi does.
    Of currents (Sompolinsky et al. 1988; Song et al. 2016, PLOS Comput. Biol. 12: e1004792) phi stands inside,
    ``W phi(u)``: for fixed inputs, u = W r + U x + b is the same system in other coordinates (Miller and Fumarola
    2012, Neural Comput. 24: 25), with the same eigenvalues and exponents if W is invertible.

    The Jacobian is ``(1 - alpha) I + alpha diag(phi'(a_t)) W``. W is drawn as by `bptt_jax.rnn`; a gain below 1 is a
    memory of some ``1 / (alpha (1 - gain))`` steps.

    Args:
      hidden_size: N, of units.
      alpha: above 0 and at most 1, where this is `bptt_jax.rnn`. It may be traced, and is then checked when it runs.
      noise: in the units of the input of phi; independent of alpha where that is small. It may be traced likewise.
        The noise of a step comes from a key beside its input, ``x = (x_t, key)``, so that it is the same whenever
        the step is called again, in single and in double precision; where the input comes alone there is none, as
        for fixed points.
      activation, gain, recurrent_init, input_init, dtype: as for `bptt_jax.rnn`.

    Returns:
      A `Cell` with `RNNParams` and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape; from
        the step, an input has no key beside it though it is a pair.

    Example:
      >>> cell = bptt.cells.leaky_rnn(4, alpha=0.1, noise=0.05)
      >>> params = cell.init(jax.random.key(0), 3)
      >>> xs = jnp.ones((5, 3)), jax.random.split(jax.random.key(1), 5)
      >>> bptt.unroll(cell.step, params, cell.initial_state(), xs).shape
      (5, 4)
    """
    alpha = check_number("alpha", alpha, "a number above 0 and at most 1", lambda v: (v > 0) & (v <= 1))
    noise = check_number("noise", noise, "a finite number of at least 0", lambda v: (v >= 0) & (v < math.inf))
    like = rnn(
        hidden_size,
        activation=activation,
        gain=gain,
        recurrent_init=recurrent_init,
        input_init=input_init,
        dtype=dtype,
    )
    activation = _KEEPING_LESS.get(activation, activation)
    traced = any(isinstance(a, jax.core.Tracer) for a in (alpha, noise))
    step = (
        _leaky_step(activation, alpha, noise)
        if traced
        else _shared_leaky_step(activation, float(alpha), float(noise))
    )
    return Cell(like.init, like.initial_state, step)


def _leaky_step(activation: Callable[[Array], Array], alpha: float | Array, noise: float | Array) -> Step:
    def leaky_step(params: RNNParams, h: Array, x: Input) -> Array:
        x, key = x if isinstance(x, tuple) else (x, None)
        drive = times(params.recurrent, h) + times(params.input, x) + params.bias
        leak = jnp.asarray(alpha, h.dtype)
        if key is not None:
            scale = jnp.asarray(noise, h.dtype) * jnp.sqrt(2 / leak)
            # In single precision, so that it is the same in double.
            drive += scale * jax.random.normal(check_key("key", key), h.shape, jnp.float32).astype(h.dtype)
        return (1 - leak) * h + leak * activation(drive)

    return leaky_step


_shared_leaky_step = lru_cache(_leaky_step)
