"""Cells made for parallel time: their steps are `DiagonalStep`s, for `bptt_jax.unroll_linear`."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.initializers import Initializer, check_initializer, draw_weights, ring
from bptt_jax.cells.weights import draw_gates, fan_in_normal
from bptt_jax.checks import check_floating, check_key, check_positive_int
from bptt_jax.recurrence.diagonal import DiagonalStep
from bptt_jax.step import Array, Cell


class LRUParams(NamedTuple):
    """Parameters of `lru`, all real: ``nu_log, theta_log, gamma_log [N]``, ``input_re, input_im [N, I]``."""

    nu_log: Array
    theta_log: Array
    gamma_log: Array
    input_re: Array
    input_im: Array


class MinGRUParams(NamedTuple):
    """Parameters of `min_gru`, gate and candidate stacked in the order z, h: ``input [2N, I]``, ``bias [2N]``."""

    input: Array
    bias: Array


def lru(
    hidden_size: int,
    *,
    r_min: float = 0.0,
    r_max: float = 1.0,
    max_phase: float = 2 * math.pi,
    dtype: Any = None,
) -> Cell:
    """The linear recurrent unit (Orvieto et al. 2023, arXiv:2303.06349), without its readout.

    ::

        lambda = exp(-exp(nu_log) + i exp(theta_log))
        h_t = lambda * h_{t-1} + exp(gamma_log) * (B x_t)

    with complex h and ``B = input_re + i input_im``. The layer's output ``Re(C h_t) + D x_t`` is a readout, no part
    of the recurrence. lambda starts uniform on a ring by `bptt_jax.cells.initializers.ring`; B with real and imaginary
    parts N(0, 1 / (2 I)); gamma at ``sqrt(1 - |lambda|^2)``, so that a white input of unit variance keeps
    ``E |h|^2`` at that of B x, 1 on average, however long the memory.

    Each unit's Jacobian is a rotation by ``exp(theta_log)`` times ``|lambda| < 1``: with D = 2N real numbers, every
    ``log |lambda|`` is a Lyapunov exponent twice. The error signal never grows, and fades at known rates.

    Args:
      hidden_size: N, of units.
      r_min, r_max, max_phase: of the ring, as for `bptt_jax.cells.initializers.ring`. Near 1, memories are long from
        the start: 1 / (1 - r_max) steps at most.
      dtype: of the parameters, single or double precision; the state is complex of the same. By default JAX's
        floating type.

    Returns:
      A `Cell` with `LRUParams`, a complex state ``[N]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: `hidden_size` is no positive integer; the ring is none; `dtype` has no complex partner.

    Example:
      >>> cell = bptt.cells.lru(4, r_min=0.9, r_max=0.999)
      >>> params = cell.init(jax.random.key(0), 3)
      >>> states = bptt.unroll_linear(cell.step, params, cell.initial_state(), jnp.ones((5, 3)))
      >>> states.shape, states.dtype
      ((5, 4), dtype('complex64'))
    """
    n = check_positive_int("hidden_size", hidden_size)
    recurrent_init = ring(r_min, r_max, max_phase=max_phase)
    real = check_floating("dtype", dtype)
    if real not in (jnp.float32, jnp.float64):
        raise TypeError(f"dtype: expected float32 or float64, whose complex numbers there are, got {real}")

    def init(key: Array, input_size: int) -> LRUParams:
        fan_in = check_positive_int("input_size", input_size)
        k_ring, k_in = jax.random.split(check_key("key", key))
        nu_log, theta_log = recurrent_init(k_ring, (2, n), real)
        # 1 - |lambda|^2 by expm1: for |lambda| near 1 the difference would keep no digit.
        gamma_log = 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(nu_log)))
        input_re, input_im = jax.random.normal(k_in, (2, n, fan_in), real) / math.sqrt(2 * fan_in)
        return LRUParams(nu_log, theta_log, gamma_log, input_re, input_im)

    def initial_state() -> Array:
        return jax.lax.complex(jnp.zeros(n, real), jnp.zeros(n, real))

    return Cell(init, initial_state, _lru_step)


def min_gru(
    hidden_size: int,
    *,
    input_init: Initializer = fan_in_normal,
    bias_init: Initializer = jax.nn.initializers.zeros,
    dtype: Any = None,
) -> Cell:
    """The minimal gated recurrent unit (Feng et al. 2024, arXiv:2410.01201), whose gate does not see the state.

    ::

        z = sigmoid(W_z x_t + b_z)
        h_t = (1 - z) * h_{t-1} + z * (W_h x_t + b_h)

    This is the plain form; the paper's variant for evaluation in log space makes the candidate positive. Note that
    z lets in, where `bptt_jax.gru`'s keeps. The Jacobian is ``diag(1 - z)``: the error signal never grows.

    Args:
      hidden_size: N, of units.
      input_init: initialiser ``(key, shape, dtype)`` of W_z and W_h, each of shape ``(I, N)``, by default
        N(0, 1 / I).
      bias_init: initialiser of the biases z, h, of shape ``(2, N)``; see `bptt_jax.cells.initializers.chrono`.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `MinGRUParams`, a state ``[N]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.

    Example:
      >>> cell = bptt.cells.min_gru(4, bias_init=bptt.cells.initializers.chrono(100))
      >>> params = cell.init(jax.random.key(0), 3)
      >>> bptt.unroll_linear(cell.step, params, cell.initial_state(), jnp.ones((5, 3))).shape
      (5, 4)
    """
    n = check_positive_int("hidden_size", hidden_size)
    floating = check_floating("dtype", dtype)
    check_initializer("input_init", input_init)
    check_initializer("bias_init", bias_init)

    def init(key: Array, input_size: int) -> MinGRUParams:
        fan_in = check_positive_int("input_size", input_size)
        k_in, k_bias = jax.random.split(check_key("key", key))
        biases = draw_weights("bias_init", bias_init, k_bias, (2, n), floating)
        return MinGRUParams(draw_gates("input_init", input_init, k_in, 2, n, fan_in, floating), biases.ravel())

    return Cell(init, lambda: jnp.zeros(n, floating), _min_gru_step)


# One object each: cells that differ only in size or initialisation share what JAX has compiled.
@DiagonalStep
def _lru_step(params: LRUParams, x: Array) -> tuple[Array, Array]:
    modulus, phase, gain = jnp.exp(-jnp.exp(params.nu_log)), jnp.exp(params.theta_log), jnp.exp(params.gamma_log)
    a = jax.lax.complex(modulus * jnp.cos(phase), modulus * jnp.sin(phase))
    return a, jax.lax.complex(gain * (params.input_re @ x), gain * (params.input_im @ x))


@DiagonalStep
def _min_gru_step(params: MinGRUParams, x: Array) -> tuple[Array, Array]:
    gate, candidate = jnp.split(params.input @ x + params.bias, 2)
    z = jax.nn.sigmoid(gate)
    return 1 - z, z * candidate
