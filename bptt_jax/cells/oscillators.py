"""Cells with oscillating units, and with several time scales."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.cells.activations import sigmoid, tanh, weighted_mean
from bptt_jax.cells.sharing import recalled, shared
from bptt_jax.cells.simple import RNNParams
from bptt_jax.cells.weights import check_hidden_size, draw_within, times
from bptt_jax.checks import (
    check_floating,
    check_key,
    check_nonnegative_finite,
    check_positive_finite,
    check_positive_int,
)
from bptt_jax.step import Array, Cell, Input, Step


class CoRNNParams(NamedTuple):
    """Parameters of `cornn`: ``recurrent [N, 2N]`` (columns of h, then of z), ``input [N, I]``, ``bias [N]``."""

    recurrent: Array
    input: Array
    bias: Array


class UnICORNNParams(NamedTuple):
    """Parameters of `unicornn`: ``recurrent, bias, control [N]``, ``input [N, I]``."""

    recurrent: Array
    input: Array
    bias: Array
    control: Array


class LEMParams(NamedTuple):
    """Parameters of `lem`.

    ``recurrent [3N, N]`` in the order of the step of h, the step of z, the candidate of z; ``input [4N, I]`` and
    ``bias [4N]`` with the candidate of h after them; ``memory [N, N]``, by which the candidate of h reads z.
    """

    recurrent: Array
    input: Array
    bias: Array
    memory: Array


class CfCParams(NamedTuple):
    """Parameters of `cfc`, of a backbone of B units.

    ``recurrent [B, N]``, ``input [B, I]``, ``bias [B]``; ``heads [4N, B]`` and ``heads_bias [4N]`` in the order of the
    two candidates, the rate and the offset of the gate.
    """

    recurrent: Array
    input: Array
    bias: Array
    heads: Array
    heads_bias: Array


class TauGRUParams(NamedTuple):
    """Parameters of `tau_gru`.

    ``recurrent [3N, N]`` in the order u, g, a; ``delayed [N, N]``; ``input [4N, I]`` and ``bias [4N]`` in the order
    u, g, a, z.
    """

    recurrent: Array
    delayed: Array
    input: Array
    bias: Array


class OscillatorState(NamedTuple):
    """State of `cornn`, `unicornn` and `lem`: ``h [N]``, the y of the papers, and ``z [N]``; as a vector, h first."""

    h: Array
    z: Array


class ClockworkState(NamedTuple):
    """State of `clockwork`: ``h [N]`` and the time, ``t []``, an integer."""

    h: Array
    t: Array


class TauGRUState(NamedTuple):
    """State of `tau_gru`: ``h [N]`` and those before it, ``past [d, N]``, the last first; as a vector, h first."""

    h: Array
    past: Array


@recalled
def cornn(
    hidden_size: int,
    *,
    dt: float = 0.042,
    gamma: float = 2.7,
    epsilon: float = 4.7,
    dtype: Any = None,
) -> Cell:
    """The coupled oscillatory network (Rusch and Mishra 2021, arXiv:2010.00951).

    ::

        z_t = z_{t-1} + dt (tanh(W h_{t-1} + V z_{t-1} + U x_t + b) - gamma h_{t-1} - epsilon z_{t-1})
        h_t = h_{t-1} + dt z_t

    Driven, damped oscillators, ``y'' = tanh(W y + V y' + U x + b) - gamma y - epsilon y'``, in steps of an
    implicit-explicit method. Damping acts on z_{t-1}, as in the released code; the paper also has it on z_t. The
    paper's y is h.

    W, V and U start uniform within ``1 / sqrt(fan in)``, 2N for W and V; so does b, within ``1 / sqrt(I)``: the
    defaults of the linear layers that the released code has for IMDB. The Jacobian is ``I + O(dt)``: the error signal
    changes little in one step, and over ``1 / dt`` of them decays with epsilon.

    Args:
      hidden_size: N, of oscillators.
      dt: the time step, in the time of the oscillators; by default that of the released code for sequential MNIST,
        as are gamma and epsilon.
      gamma: the squared frequency.
      epsilon: the damping.
      dtype: of parameters and state; by default JAX's floating type.

    `dt`, `gamma` and `epsilon` may be traced, and are then checked when they run.

    Returns:
      A `Cell` with `CoRNNParams` and an `OscillatorState`, D = 2N.

    Raises:
      TypeError, ValueError: `hidden_size` is no positive integer; another number is not finite or not above 0.
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 2, dtype)
    numbers = (
        check_positive_finite("dt", dt),
        check_positive_finite("gamma", gamma),
        check_positive_finite("epsilon", epsilon),
    )

    def init(key: Array, input_size: int) -> CoRNNParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in, k_bias = jax.random.split(check_key("key", key), 3)
        return CoRNNParams(
            draw_within(k_rec, (n, 2 * n), 1 / math.sqrt(2 * n), dtype),
            draw_within(k_in, (n, fan_in), 1 / math.sqrt(fan_in), dtype),
            draw_within(k_bias, (n,), 1 / math.sqrt(fan_in), dtype),
        )

    return Cell(init, lambda: _at_rest(n, dtype), shared(_cornn_step, *numbers))


@recalled
def unicornn(hidden_size: int, *, dt: float = 0.19, stiffness: float = 30.65, dtype: Any = None) -> Cell:
    """The undamped, independent oscillators of UnICORNN (Rusch and Mishra 2021, arXiv:2103.05487), one layer.

    ::

        s = dt sigmoid(c)
        z_t = z_{t-1} - s * (tanh(w * h_{t-1} + U x_t + b) + stiffness h_{t-1})
        h_t = h_{t-1} + s * z_t

    Each unit is on its own, with a time step s of its own, and Hamiltonian: a step is two shears, so that the
    determinant of each unit's 2 x 2 Jacobian is 1, and the exponents of a unit are opposite. `stiffness` is the
    paper's alpha, h its y.

    w starts uniform in [0, 1], c in [-0.1, 0.1], U within ``sqrt(6 / (65 I))`` (He's, for a leaky unit of slope 8),
    b at 0, as in the released code.

    Args:
      hidden_size: N, of oscillators.
      dt: the largest time step; by default that of the released code for permuted MNIST, as is `stiffness`.
      stiffness: the squared frequency of the free oscillator, at least 0.
      dtype: of parameters and state; by default JAX's floating type.

    `dt` and `stiffness` may be traced, and are then checked when they run.

    Returns:
      A `Cell` with `UnICORNNParams` and an `OscillatorState`, D = 2N.

    Raises:
      TypeError, ValueError: `hidden_size` is no positive integer; `dt` or `stiffness` is out of its range.
    """
    dtype = check_floating("dtype", dtype)
    n = check_positive_int("hidden_size", hidden_size)
    dt = check_positive_finite("dt", dt)
    stiffness = check_nonnegative_finite("stiffness", stiffness)

    def init(key: Array, input_size: int) -> UnICORNNParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in, k_control = jax.random.split(check_key("key", key), 3)
        return UnICORNNParams(
            jax.random.uniform(k_rec, (n,), dtype),
            draw_within(k_in, (n, fan_in), math.sqrt(6 / (65 * fan_in)), dtype),
            jnp.zeros(n, dtype),
            draw_within(k_control, (n,), 0.1, dtype),
        )

    return Cell(init, lambda: _at_rest(n, dtype), shared(_unicornn_step, dt, stiffness))


@recalled
def lem(hidden_size: int, *, dt: float = 1.0, dtype: Any = None) -> Cell:
    """The long expressive memory (Rusch et al. 2022, arXiv:2110.04744).

    ::

        s = dt sigmoid(W_2 h_{t-1} + U_2 x_t + b_2)      r = dt sigmoid(W_1 h_{t-1} + U_1 x_t + b_1)
        z_t = (1 - s) * z_{t-1} + s * tanh(W_z h_{t-1} + U_z x_t + b_z)
        h_t = (1 - r) * h_{t-1} + r * tanh(M z_t + U_h x_t + b_h)

    Two coupled ordinary differential equations whose time steps, s and r, are learned, between 0 and dt; the paper's
    y is h. All weights and biases start uniform within ``1 / sqrt(N)``, as in the released code.

    Args:
      hidden_size: N, of units.
      dt: the largest time step. It may be traced, and is then checked when it runs.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `LEMParams` and an `OscillatorState`, D = 2N.

    Raises:
      TypeError, ValueError: `hidden_size` is no positive integer; `dt` is not finite or not above 0.
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 3, dtype)
    dt = check_positive_finite("dt", dt)

    def init(key: Array, input_size: int) -> LEMParams:
        fan_in = check_positive_int("input_size", input_size)
        keys = jax.random.split(check_key("key", key), 4)
        shapes = (3 * n, n), (4 * n, fan_in), (4 * n,), (n, n)
        return LEMParams(
            *(draw_within(k, shape, 1 / math.sqrt(n), dtype) for k, shape in zip(keys, shapes, strict=True))
        )

    return Cell(init, lambda: _at_rest(n, dtype), shared(_lem_step, dt))


@recalled
def clockwork(hidden_size: int, *, modules: int = 7, dtype: Any = None) -> Cell:
    """The clockwork network (Koutnik et al. 2014, arXiv:1402.3511): modules that step at periods 1, 2, 4, ...

    ::

        h_t = tanh(W h_{t-1} + U x_t + b)    of the modules with t mod 2^m = 0
        h_t = h_{t-1}                        of the others
        W = 0 from modules of shorter period to those of longer

    Module m, of g, has period ``2^m`` and the units j with ``floor(g j / N) = m``; W is block upper triangular, and
    entries of `recurrent` below its blocks have no effect. The first step is at t = 0, where all modules step. A
    reset sets the time back with the state.

    W and U start as N(0, 0.1^2), as published, b at 0. The Jacobian has rows of the identity where a module waits:
    through module m the error signal passes unchanged for ``2^m`` steps at a time.

    Args:
      hidden_size: N, of units. With fewer units than modules, some modules are empty.
      modules: g, at most 31; the paper's numbers were 9 to generate sequences, 7 to classify words.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `RNNParams` and a `ClockworkState`, whose time is not differentiated, D = N.

    Raises:
      TypeError, ValueError: an argument is no positive integer, or there are more than 31 modules.
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 1, dtype)
    if check_positive_int("modules", modules) > 31:
        raise ValueError(f"modules: expected at most 31, whose periods an int32 holds, got {modules}")

    def init(key: Array, input_size: int) -> RNNParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in = jax.random.split(check_key("key", key))
        scale = jnp.asarray(0.1, dtype)
        return RNNParams(
            scale * jax.random.normal(k_rec, (n, n), dtype),
            scale * jax.random.normal(k_in, (n, fan_in), dtype),
            jnp.zeros(n, dtype),
        )

    return Cell(
        init,
        lambda: ClockworkState(jnp.zeros(n, dtype), jnp.zeros((), jnp.int32)),
        shared(_clockwork_step, int(modules)),
    )


@recalled
def cfc(hidden_size: int, *, backbone_units: int = 128, dtype: Any = None) -> Cell:
    """The closed-form continuous-time network (Hasani et al. 2022, Nat. Mach. Intell. 4: 992), with a gate.

    ::

        y = 1.7159 tanh(0.666 (W h_{t-1} + U x_t + b))
        g = sigmoid((R y + r) dt_t + (Q y + q))
        h_t = (1 - g) * tanh(F y + f) + g * tanh(G y + e)

    What a liquid time-constant network tends to, without a solver: dt_t is the time that has passed since the last
    input, beside it, ``x = (x_t, dt_t)``, or 1 where the input comes alone. This is the released code, with one layer
    of backbone; in the paper the gate is ``sigmoid(-f dt)``, with no part that time does not act on.

    h_{t-1} is heard through the backbone alone: nothing carries it over, and the Jacobian is that of a network
    without memory of its own.

    All matrices start Glorot uniform, W and U as one; biases uniform within ``1 / sqrt(fan in)``, as in the released
    code.

    Args:
      hidden_size: N, of units.
      backbone_units: B.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `CfCParams` and a state ``[N]``, D = N.

    Raises:
      TypeError, ValueError: an argument is no positive integer, or `dtype` no floating type.
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 1, dtype)
    units = check_positive_int("backbone_units", backbone_units)

    def init(key: Array, input_size: int) -> CfCParams:
        inputs = check_positive_int("input_size", input_size)
        fan_in = n + inputs
        k_back, k_bias, k_heads, k_biases = jax.random.split(check_key("key", key), 4)
        backbone = draw_within(k_back, (units, fan_in), math.sqrt(6 / (fan_in + units)), dtype)
        heads = draw_within(k_heads, (4 * n, units), math.sqrt(6 / (n + units)), dtype)
        return CfCParams(
            backbone[:, inputs:],
            backbone[:, :inputs],
            draw_within(k_bias, (units,), 1 / math.sqrt(fan_in), dtype),
            heads,
            draw_within(k_biases, (4 * n,), 1 / math.sqrt(units), dtype),
        )

    return Cell(init, lambda: jnp.zeros(n, dtype), _cfc_step)


@recalled
def tau_gru(hidden_size: int, *, delay: int = 5, dtype: Any = None) -> Cell:
    """The gated unit with weighted feedback of a delayed state (Erichson et al. 2022, arXiv:2212.00228).

    ::

        u = tanh(W_u h_{t-1} + U_u x_t + b_u)         z = tanh(W_z h_{t-1-d} + U_z x_t + b_z)
        g = sigmoid(W_g h_{t-1} + U_g x_t + b_g)      a = sigmoid(W_a h_{t-1} + U_a x_t + b_a)
        h_t = (1 - g) * h_{t-1} + g * (u + a * z)

    Euler's method for a differential equation with a delay. The states between are part of the state, zero before the
    first: the error signal reaches h_{t-1-d} in one step, beside the way through all between.

    Weights and biases start uniform within ``1 / sqrt(N)``, as those of PyTorch's gated units.

    Args:
      hidden_size: N, of units.
      delay: d, in steps, at least 1.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `TauGRUParams` and a `TauGRUState`, D = (1 + d) N.

    Raises:
      TypeError, ValueError: an argument is no positive integer, or `dtype` no floating type.
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 3, dtype)
    delay = check_positive_int("delay", delay)

    def init(key: Array, input_size: int) -> TauGRUParams:
        fan_in = check_positive_int("input_size", input_size)
        keys = jax.random.split(check_key("key", key), 4)
        shapes = (3 * n, n), (n, n), (4 * n, fan_in), (4 * n,)
        return TauGRUParams(
            *(draw_within(k, shape, 1 / math.sqrt(n), dtype) for k, shape in zip(keys, shapes, strict=True))
        )

    return Cell(init, lambda: TauGRUState(jnp.zeros(n, dtype), jnp.zeros((delay, n), dtype)), _tau_gru_step)


def _at_rest(n: int, dtype: jnp.dtype) -> OscillatorState:
    return OscillatorState(jnp.zeros(n, dtype), jnp.zeros(n, dtype))


def _cornn_step(dt: float | Array, gamma: float | Array, epsilon: float | Array) -> Step:
    def cornn_step(params: CoRNNParams, state: OscillatorState, x: Array) -> OscillatorState:
        h, z = state
        step, stiffness, damping = (jnp.asarray(a, h.dtype) for a in (dt, gamma, epsilon))
        drive = times(params.recurrent, jnp.concatenate([h, z])) + times(params.input, x) + params.bias
        z = z + step * (tanh(drive) - stiffness * h - damping * z)
        return OscillatorState(h + step * z, z)

    return cornn_step


def _unicornn_step(dt: float | Array, stiffness: float | Array) -> Step:
    def unicornn_step(params: UnICORNNParams, state: OscillatorState, x: Array) -> OscillatorState:
        h, z = state
        step = jnp.asarray(dt, h.dtype) * sigmoid(params.control)
        force = tanh(params.recurrent * h + times(params.input, x) + params.bias)
        z = z - step * (force + jnp.asarray(stiffness, h.dtype) * h)
        return OscillatorState(h + step * z, z)

    return unicornn_step


def _lem_step(dt: float | Array) -> Step:
    def lem_step(params: LEMParams, state: OscillatorState, x: Array) -> OscillatorState:
        h, z = state
        longest = jnp.asarray(dt, h.dtype)
        *driven, read = jnp.split(times(params.input, x) + params.bias, 4)
        of_h, of_z, candidate = (
            a + b for a, b in zip(driven, jnp.split(times(params.recurrent, h), 3), strict=True)
        )
        z = weighted_mean(longest * sigmoid(of_z), z, tanh(candidate))
        h = weighted_mean(longest * sigmoid(of_h), h, tanh(times(params.memory, z) + read))
        return OscillatorState(h, z)

    return lem_step


def _clockwork_step(modules: int) -> Step:
    def clockwork_step(params: RNNParams, state: ClockworkState, x: Array) -> ClockworkState:
        h, t = state
        n = len(h)
        periods = 2 ** (np.arange(n, dtype=np.int32) * modules // n)
        weights = jnp.where(periods[:, None] <= periods, params.recurrent, 0)
        new = tanh(times(weights, h) + times(params.input, x) + params.bias)
        return ClockworkState(jnp.where(t % periods == 0, new, h), t + 1)

    return clockwork_step


def _cfc_step(params: CfCParams, h: Array, x: Input) -> Array:
    x, elapsed = x if isinstance(x, tuple) else (x, None)
    drive = times(params.recurrent, h) + times(params.input, x) + params.bias
    heads = times(params.heads, 1.7159 * tanh(0.666 * drive)) + params.heads_bias
    first, second, rate, offset = jnp.split(heads, 4)
    if elapsed is not None:
        rate = rate * jnp.asarray(elapsed, h.dtype)
    return weighted_mean(sigmoid(rate + offset), tanh(first), tanh(second))


def _tau_gru_step(params: TauGRUParams, state: TauGRUState, x: Array) -> TauGRUState:
    h, past = state
    *of_input, z_x = jnp.split(times(params.input, x) + params.bias, 4)
    u, g, a = (i + j for i, j in zip(of_input, jnp.split(times(params.recurrent, h), 3), strict=True))
    z = tanh(times(params.delayed, past[-1]) + z_x)
    new = weighted_mean(sigmoid(g), h, tanh(u) + sigmoid(a) * z)
    return TauGRUState(new, jnp.concatenate([h[None], past[:-1]]))
