"""Cells made for parallel time, whose steps are linear in the state or nearly so.

Those of lru, min_gru, min_lstm, hgrn and rg_lru are `DiagonalStep`s, for `bptt_jax.unroll_linear`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh, weighted_mean
from bptt_jax.cells.initializers import Initializer, check_initializer, draw_weights, ring
from bptt_jax.cells.sharing import recalled
from bptt_jax.cells.weights import check_complex, check_hidden_size, draw_gates, fan_in_normal, times
from bptt_jax.checks import check_finite, check_floating, check_key, check_positive_int, check_share
from bptt_jax.linalg.precision import at_least_single
from bptt_jax.recurrence.diagonal import DiagonalStep
from bptt_jax.step import Array, Cell

_RG_LRU_POWER = 8  # the paper's c, of its appendix A


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


class MinLSTMParams(NamedTuple):
    """Parameters of `min_lstm`: gates and candidate stacked in the order f, i, h: ``input [3N, I]``, ``bias [3N]``."""

    input: Array
    bias: Array


class SRUParams(NamedTuple):
    """Parameters of `sru`, gate and candidate stacked in the order f, c.

    ``input [2N, I]``, ``recurrent [N]`` (v_f), ``bias [N]`` (b_f).
    """

    input: Array
    recurrent: Array
    bias: Array


class QRNNParams(NamedTuple):
    """Parameters of `qrnn`, gate and candidate stacked in the order f, z.

    ``past [2N, I]`` and ``input [2N, I]``, for the previous and the present input; ``bias [2N]``.
    """

    past: Array
    input: Array
    bias: Array


class QRNNState(NamedTuple):
    """State of `qrnn`: the output ``h [N]`` and what the previous input adds to gate and candidate, ``past [2N]``."""

    h: Array
    past: Array


class HGRNParams(NamedTuple):
    """Parameters of `hgrn`, all real; gate and real and imaginary part of the candidate in the order f, re, im.

    ``input [3N, I]``, ``bias [3N]``, ``bound [N]`` (the logit of gamma), ``theta [N]``.
    """

    input: Array
    bias: Array
    bound: Array
    theta: Array


class RGLRUParams(NamedTuple):
    """Parameters of `rg_lru`, gates stacked in the order r, i.

    ``input [N, I]``, ``gates [2N, N]``, ``bias [2N]``, ``decay [N]`` (Lambda).
    """

    input: Array
    gates: Array
    bias: Array
    decay: Array


@recalled
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
    real = check_complex("dtype", dtype)

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


@recalled
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
    z lets in, where `bptt_jax.gru`'s keeps. Published code has the initialisation of PyTorch's linear layer; here the
    input weights are those of `bptt_jax.gru`, which keep an input's size, and the biases 0, so that
    `bias_init` says how long the gates remember. The Jacobian is ``diag(1 - z)``: the error signal never grows.

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


@recalled
def min_lstm(
    hidden_size: int,
    *,
    forget_bias: float = 0.0,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The minimal long short-term memory (Feng et al. 2024, arXiv:2410.01201), whose gates do not see the state.

    ::

        f = sigmoid(W_f x_t + b_f)
        i = sigmoid(W_i x_t + b_i)
        h_t = (f * h_{t-1} + i * (W_h x_t + b_h)) / (f + i)

    This is the plain form with normalised gates; the paper's variant for evaluation in log space makes the candidate
    positive. ``f / (f + i)`` is formed from the logarithms of the gates, so that it is right where both are 0 in
    their dtype. It is the diagonal of the Jacobian: the error signal never grows. Weights start at N(0, 1 / I), biases
    at 0 but b_f, of which the paper finds that more learns faster. Published code has otherwise the initialisation
    of PyTorch's linear layer, uniform within ``1 / sqrt(I)``; here the weights are those of `min_gru`.

    Args:
      hidden_size: N, of units.
      forget_bias: initial b_f. It may be traced, and is then checked when it runs.
      input_init: initialiser ``(key, shape, dtype)`` of W_f, W_i and W_h, each of shape ``(I, N)``.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `MinLSTMParams`, a state ``[N]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    n = check_positive_int("hidden_size", hidden_size)
    floating = check_floating("dtype", dtype)
    forget_bias = check_finite("forget_bias", forget_bias)
    check_initializer("input_init", input_init)

    def init(key: Array, input_size: int) -> MinLSTMParams:
        fan_in = check_positive_int("input_size", input_size)
        weights = draw_gates("input_init", input_init, check_key("key", key), 3, n, fan_in, floating)
        return MinLSTMParams(weights, jnp.zeros(3 * n, floating).at[:n].set(jnp.asarray(forget_bias, floating)))

    return Cell(init, lambda: jnp.zeros(n, floating), _min_lstm_step)


@recalled
def sru(hidden_size: int, *, input_init: Initializer = fan_in_normal, dtype: Any = None) -> Cell:
    """The simple recurrent unit (Lei et al. 2018, arXiv:1709.02755): its light recurrence, without highway.

    ::

        f = sigmoid(W_f x_t + v_f * c_{t-1} + b_f)
        c_t = f * c_{t-1} + (1 - f) * (W x_t)

    The layer's output ``r * c_t + (1 - r) * x_t`` is a readout: nothing of it comes back. As in the paper from its
    second version on, each gate sees the state of its own unit, so that the step is not linear in it; with v_f = 0 it
    is that of `min_gru`. The Jacobian is diagonal all the same, ``f + f (1 - f) v_f (c_{t-1} - W x_t)``:
    `bptt_jax.deer` with ``jacobian="diagonal"`` is Newton's iteration in full.

    As released, W starts with variance 1 / I, W_f with 1 / (2 I), v_f uniform with variance 1 / 2, b_f at 0. There all
    weights are uniform; here W and W_f have the distribution of `input_init`, by default normal.

    Args:
      hidden_size: N, of units.
      input_init: initialiser ``(key, shape, dtype)`` of W and, before it is scaled by ``sqrt(1/2)``, of W_f.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `SRUParams` and a state ``[N]``, which is c.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    n = check_positive_int("hidden_size", hidden_size)
    floating = check_floating("dtype", dtype)
    check_initializer("input_init", input_init)

    def init(key: Array, input_size: int) -> SRUParams:
        fan_in = check_positive_int("input_size", input_size)
        k_in, k_rec = jax.random.split(check_key("key", key))
        weights = draw_gates("input_init", input_init, k_in, 2, n, fan_in, floating)
        half = jnp.asarray(math.sqrt(0.5), floating)
        recurrent = jax.random.uniform(k_rec, (n,), floating, -math.sqrt(1.5), math.sqrt(1.5))
        return SRUParams(weights.at[:n].multiply(half), recurrent, jnp.zeros(n, floating))

    return Cell(init, lambda: jnp.zeros(n, floating), _sru_step)


@recalled
def qrnn(hidden_size: int, *, input_init: Initializer = fan_in_normal, dtype: Any = None) -> Cell:
    """The quasi-recurrent network (Bradbury et al. 2017, arXiv:1611.01576): a window of 2 and f-pooling.

    ::

        z = tanh(V_z x_{t-1} + W_z x_t + b_z)
        f = sigmoid(V_f x_{t-1} + W_f x_t + b_f)
        h_t = f * h_{t-1} + (1 - f) * z

    What the previous input adds, ``V x_{t-1}``, is part of the state, and 0 before the first one, as if the sequence
    were padded by a zero. The output gate of fo-pooling is a readout. The step as a whole is not linear in the state;
    its Jacobian is ``[diag(f), G; 0, 0]``, so that signals live by f alone: `bptt_jax.deer` needs two iterations.
    Weights start at N(0, 1 / (2 I)), biases at 0, where the authors' code leaves both to PyTorch's linear layer.

    Args:
      hidden_size: N, of units.
      input_init: initialiser ``(key, shape, dtype)`` of the weights of gate and candidate, each of shape
        ``(2 I, N)``: those of the previous input first.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `QRNNParams` and a `QRNNState`, D = 3N.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    n = check_positive_int("hidden_size", hidden_size)
    floating = check_floating("dtype", dtype)
    check_initializer("input_init", input_init)

    def init(key: Array, input_size: int) -> QRNNParams:
        fan_in = check_positive_int("input_size", input_size)
        weights = draw_gates("input_init", input_init, check_key("key", key), 2, n, 2 * fan_in, floating)
        past, present = jnp.split(weights, 2, axis=1)
        return QRNNParams(past, present, jnp.zeros(2 * n, floating))

    return Cell(init, lambda: QRNNState(jnp.zeros(n, floating), jnp.zeros(2 * n, floating)), _qrnn_step)


@recalled
def hgrn(
    hidden_size: int,
    *,
    lower_bound: float = 0.5,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The hierarchically gated recurrent network (Qin et al. 2023, arXiv:2311.04823), complex, one layer of it.

    ::

        f = gamma + (1 - gamma) * sigmoid(W_f x_t + b_f)
        c = silu(W_re x_t + b_re) + i silu(W_im x_t + b_im)
        h_t = f * exp(i theta) * h_{t-1} + (1 - f) * c

    with complex h and a bound gamma below which no gate falls, higher from layer to layer: a cumulative softmax over
    them. Here it is ``sigmoid(bound)``, as the second of two layers has it; initially `lower_bound`, 1/2 there. The
    output gate and the norm are a readout. theta starts at ``10000^(-2 k / N)`` for unit k, as released; weights at
    N(0, 1 / I), biases at 0; the code that was read leaves these to PyTorch's linear layer. Each unit's Jacobian
    is a rotation by theta times f: the error signal never grows, and per step never shrinks below gamma.

    Args:
      hidden_size: N, of units.
      lower_bound: initial gamma, above 0 and below 1. It may be traced, and is then checked when it runs.
      input_init: initialiser ``(key, shape, dtype)`` of W_f, W_re and W_im, each of shape ``(I, N)``.
      dtype: of the parameters, single or double precision; the state is complex of the same. By default JAX's
        floating type.

    Returns:
      A `Cell` with `HGRNParams`, a complex state ``[N]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range; `dtype` has no complex partner; from `init`, an
        initialiser draws another shape.
    """
    n = check_positive_int("hidden_size", hidden_size)
    lower_bound = check_share("lower_bound", lower_bound)
    check_initializer("input_init", input_init)
    real = check_complex("dtype", dtype)

    def init(key: Array, input_size: int) -> HGRNParams:
        fan_in = check_positive_int("input_size", input_size)
        weights = draw_gates("input_init", input_init, check_key("key", key), 3, n, fan_in, real)
        bound = jnp.full(n, jax.scipy.special.logit(jnp.asarray(lower_bound, real)))
        theta = jnp.exp(jnp.arange(n, dtype=real) * (-2 / n * math.log(10000)))
        return HGRNParams(weights, jnp.zeros(3 * n, real), bound, theta)

    return Cell(init, lambda: jax.lax.complex(jnp.zeros(n, real), jnp.zeros(n, real)), _hgrn_step)


@recalled
def rg_lru(hidden_size: int, *, input_init: Initializer = fan_in_normal, dtype: Any = None) -> Cell:
    """The real-gated linear recurrent unit of Griffin (De et al. 2024, arXiv:2402.19427), behind its projection.

    ::

        u = W x_t
        r = sigmoid(W_a u + b_a)
        i = sigmoid(W_i u + b_i)
        a = exp(-8 r softplus(Lambda))
        h_t = a * h_{t-1} + sqrt(1 - a^2) * (i * u)

    W brings the input to the N units, as the block's linear layer does; the convolution and the gelu branch of the
    block are no part of the recurrence. The paper writes ``a = sigmoid(Lambda)^(8 r)`` and in its appendix the form
    above, in which Lambda has the other sign: this is the released one. The released code also begins sequences by
    ``h_1 = i * u``, without the square root; here as in the paper. Gates are dense, as in the paper; the released code
    has them block by block.

    ``exp(-8 softplus(Lambda))``, the decay of an open gate, starts uniform between 0.9 and 0.999, as the paper has it
    (the released code draws its eighth root there); weights at N(0, 1 / fan in), biases at 0. The Jacobian is
    ``diag(a)``: the error signal never grows.

    Args:
      hidden_size: N, of units.
      input_init: initialiser ``(key, shape, dtype)`` of W, of shape ``(I, N)``, and of W_a and W_i, ``(N, N)``.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `RGLRUParams`, a state ``[N]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    floating = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 2, floating)
    check_initializer("input_init", input_init)

    def init(key: Array, input_size: int) -> RGLRUParams:
        fan_in = check_positive_int("input_size", input_size)
        k_in, k_gates, k_decay = jax.random.split(check_key("key", key), 3)
        decay = -jnp.log(jax.random.uniform(k_decay, (n,), jnp.float32, 0.9, 0.999)) / _RG_LRU_POWER
        return RGLRUParams(
            draw_gates("input_init", input_init, k_in, 1, n, fan_in, floating),
            draw_gates("input_init", input_init, k_gates, 2, n, n, floating),
            jnp.zeros(2 * n, floating),
            jnp.log(jnp.expm1(decay)).astype(floating),
        )

    return Cell(init, lambda: jnp.zeros(n, floating), _rg_lru_step)


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


@DiagonalStep
def _min_lstm_step(params: MinLSTMParams, x: Array) -> tuple[Array, Array]:
    f, i, candidate = jnp.split(times(params.input, x) + params.bias, 3)
    log_ratio = jax.nn.softplus(-f) - jax.nn.softplus(-i)  # of the gates, i to f
    return sigmoid(-log_ratio), sigmoid(log_ratio) * candidate


def _sru_step(params: SRUParams, c: Array, x: Array) -> Array:
    gate, candidate = jnp.split(times(params.input, x), 2)
    return weighted_mean(sigmoid(gate + params.recurrent * c + params.bias), candidate, c)


def _qrnn_step(params: QRNNParams, state: QRNNState, x: Array) -> QRNNState:
    f, z = jnp.split(state.past + times(params.input, x) + params.bias, 2)
    return QRNNState(weighted_mean(sigmoid(f), tanh(z), state.h), times(params.past, x))


@DiagonalStep
def _hgrn_step(params: HGRNParams, x: Array) -> tuple[Array, Array]:
    gate, re, im = jnp.split(times(params.input, x) + params.bias, 3)
    lets_in = sigmoid(-params.bound) * sigmoid(-gate)  # 1 - f, of which the difference would lose digits
    keeps = 1 - lets_in
    a = jax.lax.complex(keeps * jnp.cos(params.theta), keeps * jnp.sin(params.theta))
    return a, jax.lax.complex(lets_in * jax.nn.silu(re), lets_in * jax.nn.silu(im))


@DiagonalStep
def _rg_lru_step(params: RGLRUParams, x: Array) -> tuple[Array, Array]:
    # In single precision at least, as the released code: of large inputs derivatives overflow in half precision
    # though the gradients do not.
    own = jnp.result_type(params.decay, x)
    params, x = jax.tree.map(lambda a: jnp.asarray(a, at_least_single(own)), (params, x))
    u = times(params.input, x)
    r, i = jnp.split(sigmoid(times(params.gates, u) + params.bias), 2)
    log_a = -_RG_LRU_POWER * r * jax.nn.softplus(params.decay)
    # The square root has no finite slope at 0, which is 1 - a^2 where the gate r is 0 in its dtype.
    square = -jnp.expm1(2 * log_a)
    is_open = square > float(jnp.finfo(log_a.dtype).tiny)
    admitted = jnp.where(is_open, jnp.sqrt(jnp.where(is_open, square, 1)), 0)
    return jnp.exp(log_a).astype(own), (admitted * i * u).astype(own)
