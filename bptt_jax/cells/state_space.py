"""State-space models: linear systems in continuous time, made discrete; of the selective ones at steps of their own."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.cells.activations import tanh
from bptt_jax.cells.initializers import Initializer, check_initializer
from bptt_jax.cells.sharing import recalled, shared
from bptt_jax.cells.weights import (
    check_complex,
    check_heads,
    check_hidden_size,
    draw_gates,
    fan_in_normal,
    glorot_normal,
    lecun_uniform,
    linear_default,
    times,
)
from bptt_jax.checks import (
    check_choice,
    check_floating,
    check_key,
    check_number,
    check_positive_finite,
    check_positive_int,
)
from bptt_jax.linalg.precision import at_least_single
from bptt_jax.recurrence.diagonal import DiagonalStep
from bptt_jax.step import Array, Cell

_SMALLEST_DT = 1e-4  # of the selective models, below which none starts, as released


class S4DParams(NamedTuple):
    """Parameters of `s4d`, all real, with M the state size.

    ``input [N, I]``, ``log_dt [N]``, ``log_neg_re [N, M]`` and ``im [N, M]`` (A = -exp(log_neg_re) + i im).
    """

    input: Array
    log_dt: Array
    log_neg_re: Array
    im: Array


class S5Params(NamedTuple):
    """Parameters of `s5`, all real: ``input_re, input_im [N, I]``, ``log_dt, re, im [N]`` (Lambda = re + i im)."""

    input_re: Array
    input_im: Array
    log_dt: Array
    re: Array
    im: Array


class MambaParams(NamedTuple):
    """Parameters of `mamba`, with S the state size and R the rank of the steps.

    ``input [N, I]``, ``select [R + S, N]`` (for Delta, then B), ``dt [N, R]``, ``dt_bias [N]``, ``a_log [N, S]``.
    """

    input: Array
    select: Array
    dt: Array
    dt_bias: Array
    a_log: Array


class Mamba2Params(NamedTuple):
    """Parameters of `mamba2`, with H heads and S the state size.

    ``input [N, I]``, ``key [S, I]`` (B), ``dt [H, I]``, ``dt_bias [H]``, ``a_log [H]``.
    """

    input: Array
    key: Array
    dt: Array
    dt_bias: Array
    a_log: Array


class LMUParams(NamedTuple):
    """Parameters of `lmu`, with M the order.

    ``encode_input [I]``, ``encode_hidden [N]``, ``encode_memory [M]``; ``input [N, I]``, ``recurrent [N, N]``,
    ``memory [N, M]``.
    """

    encode_input: Array
    encode_hidden: Array
    encode_memory: Array
    input: Array
    recurrent: Array
    memory: Array


class LMUState(NamedTuple):
    """State of `lmu`: the output ``h [N]`` and the memory ``m [M]``; as a vector, h first."""

    h: Array
    m: Array


@recalled
def s4d(
    hidden_size: int,
    *,
    state_size: int = 4,
    spectrum: str = "lin",
    discretization: str = "zoh",
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dtype: Any = None,
) -> Cell:
    """The diagonal state-space model S4D (Gu et al. 2022, arXiv:2206.11893), one for each feature, without readout.

    ::

        u = W x_t
        Delta = exp(log_dt)
        A = -exp(log_neg_re) + i im
        h_t = exp(Delta A) * h_{t-1} + (exp(Delta A) - 1) / A * u                              (zoh)
        h_t = (1 + Delta A / 2) / (1 - Delta A / 2) * h_{t-1} + Delta / (1 - Delta A / 2) * u  (bilinear)

    with complex h of N features by M = `state_size` numbers each, for each of which there is a conjugate that is not
    kept: the paper's state size is 2 M, and it takes M = 32. ``B = 1``: what B would scale, the readout
    ``2 Re(C h_t) + D u`` scales too. W brings the input to the N features.

    A starts as S4D-Lin, ``-1/2 + i pi k``, or S4D-Inv, ``-1/2 + i (2 M / pi) (2 M / (2 k + 1) - 1)``, k = 0 .. M - 1;
    Delta log-uniform between `dt_min` and `dt_max`; W at N(0, 1 / I). Every ``-Delta / 2`` is a Lyapunov exponent 2 M
    times: memories last ``2 / Delta`` steps, 20 to 2000.

    Args:
      hidden_size: N, of features.
      state_size: M.
      spectrum: "lin" or "inv", the initial A.
      discretization: "zoh" (zero-order hold) or "bilinear".
      dt_min, dt_max: of the initial Delta. They may be traced, and are then checked when they run.
      dtype: of the parameters, single or double precision; the state is complex of the same. By default JAX's
        floating type.

    Returns:
      A `Cell` with `S4DParams`, a complex state ``[N, M]``, D = 2 N M, and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range; `dtype` has no complex partner.
    """
    n, m = check_positive_int("hidden_size", hidden_size), check_positive_int("state_size", state_size)
    check_choice("spectrum", spectrum, "lin", "inv")
    step = _S4D_STEPS[check_choice("discretization", discretization, "zoh", "bilinear")]
    dt_min, dt_max = _check_dt(dt_min, dt_max)
    real = check_complex("dtype", dtype)

    def init(key: Array, input_size: int) -> S4DParams:
        fan_in = check_positive_int("input_size", input_size)
        k_in, k_dt = jax.random.split(check_key("key", key))
        k = jnp.arange(m, dtype=real)
        im = math.pi * k if spectrum == "lin" else (2 * m / math.pi) * (2 * m / (2 * k + 1) - 1)
        return S4DParams(
            draw_gates("input_init", fan_in_normal, k_in, 1, n, fan_in, real),
            _draw_log_dt(k_dt, n, dt_min, dt_max, real),
            jnp.full((n, m), math.log(0.5), real),
            jnp.broadcast_to(im, (n, m)),
        )

    return Cell(init, lambda: jax.lax.complex(jnp.zeros((n, m), real), jnp.zeros((n, m), real)), step)


@recalled
def s5(
    hidden_size: int,
    *,
    discretization: str = "zoh",
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dtype: Any = None,
) -> Cell:
    """The simplified state-space layer S5 (Smith et al. 2023, arXiv:2208.04933), without its readout.

    ::

        Delta = exp(log_dt)
        Lambda = re + i im
        h_t = exp(Lambda Delta) * h_{t-1} + (exp(Lambda Delta) - 1) / Lambda * (B x_t)                 (zoh)
        h_t = (1 + Lambda Delta / 2) / (1 - Lambda Delta / 2) * h_{t-1}
              + Delta / (1 - Lambda Delta / 2) * (B x_t)                                               (bilinear)

    with complex h and B; for each of the N numbers there is a conjugate that is not kept, so that the paper's P is
    2 N. Lambda and B start as of HiPPO-N: the eigenvalues of the normal part of a HiPPO-LegS matrix of size 2 N, all
    with real part -1/2, those with imaginary part below 0, and ``V^* B`` with V its eigenvectors and B normal of
    variance 1 / (2 N), as released (the initialiser there takes the state for the fan in). One block; Delta
    log-uniform between `dt_min` and `dt_max`. Nothing keeps re below 0, as in the released code where eigenvalues are
    not clipped. Every ``Delta re`` is a Lyapunov exponent twice.

    Args:
      hidden_size: N, of complex numbers.
      discretization: "zoh" (zero-order hold) or "bilinear".
      dt_min, dt_max: of the initial Delta. They may be traced, and are then checked when they run.
      dtype: of the parameters, single or double precision; the state is complex of the same. By default JAX's
        floating type.

    Returns:
      A `Cell` with `S5Params`, a complex state ``[N]``, D = 2 N, and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range; `dtype` has no complex partner.
    """
    real = check_complex("dtype", dtype)
    n = check_hidden_size(hidden_size, 8, real)
    step = _S5_STEPS[check_choice("discretization", discretization, "zoh", "bilinear")]
    dt_min, dt_max = _check_dt(dt_min, dt_max)

    def init(key: Array, input_size: int) -> S5Params:
        fan_in = check_positive_int("input_size", input_size)
        k_in, k_dt = jax.random.split(check_key("key", key))
        eigenvalues, to_modes = _normal_hippo(n)
        b = jax.nn.initializers.lecun_normal()(k_in, (2 * n, fan_in), real)
        return S5Params(
            jnp.asarray(to_modes.real, real) @ b,
            jnp.asarray(to_modes.imag, real) @ b,
            _draw_log_dt(k_dt, n, dt_min, dt_max, real),
            jnp.asarray(eigenvalues.real, real),
            jnp.asarray(eigenvalues.imag, real),
        )

    return Cell(init, lambda: jax.lax.complex(jnp.zeros(n, real), jnp.zeros(n, real)), step)


@recalled
def mamba(
    hidden_size: int,
    *,
    state_size: int = 8,
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dtype: Any = None,
) -> Cell:
    """The selective state-space model of Mamba (Gu and Dao 2023, arXiv:2312.00752), behind its projection.

    ::

        u = W x_t
        Delta = softplus(W_up W_down u + b)
        B = W_B u
        A = -exp(a_log)
        h_t = exp(Delta A) * h_{t-1} + (Delta * u) B^T

    with one row of S = `state_size` numbers for each of the N channels. W is the block's first projection; its
    convolution with the silu behind it, the readout ``C_t``, the skip D and the gated branch are no part of the
    recurrence. The paper discretises B by zero-order hold, the released code as here, by Euler's rule.

    As released: A starts at ``-1 .. -S`` in every channel, Delta log-uniform between `dt_min` and `dt_max` by its
    bias, weights uniform as of PyTorch's linear layer. W_down is of rank ``N / 16``, rounded up, where the released
    code has a sixteenth of its model's width, half of N. The paper takes S = 16. The Jacobian is diagonal,
    ``exp(-Delta s)`` where it starts: what the input selects is how long each channel remembers, at most 1 / Delta
    steps.

    Args:
      hidden_size: N, of channels.
      state_size: S, of numbers for each.
      dt_min, dt_max: of the initial Delta. They may be traced, and are then checked when they run.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `MambaParams`, a state ``[N, S]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range.
    """
    floating = check_floating("dtype", dtype)
    n, size = check_hidden_size(hidden_size, 1, floating), check_positive_int("state_size", state_size)
    dt_min, dt_max = _check_dt(dt_min, dt_max)
    rank = -(-n // 16)

    def init(key: Array, input_size: int) -> MambaParams:
        fan_in = check_positive_int("input_size", input_size)
        k_in, k_down, k_b, k_up, k_dt = jax.random.split(check_key("key", key), 5)
        down = draw_gates("input_init", linear_default, k_down, 1, rank, n, floating)
        to_b = draw_gates("input_init", linear_default, k_b, 1, size, n, floating)
        return MambaParams(
            draw_gates("input_init", linear_default, k_in, 1, n, fan_in, floating),
            jnp.concatenate([down, to_b]),
            jax.random.uniform(k_up, (n, rank), floating, -1, 1) * rank**-0.5,
            draw_dt_bias(k_dt, n, dt_min, dt_max, floating),
            jnp.broadcast_to(jnp.log(jnp.arange(1, size + 1, dtype=floating)), (n, size)),
        )

    return Cell(init, lambda: jnp.zeros((n, size), floating), _mamba_step)


@recalled
def mamba2(
    hidden_size: int,
    *,
    heads: int = 2,
    state_size: int = 8,
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dtype: Any = None,
) -> Cell:
    """The state-space dual model of Mamba-2 (Dao and Gu 2024, arXiv:2405.21060): one decay for each head.

    ::

        u = W x_t
        Delta = softplus(W_dt x_t + b)
        B = W_B x_t
        A = -exp(a_log)
        h_t = exp(Delta A) h_{t-1} + Delta u B^T

    in each of H = `heads` heads, of N / H rows of S = `state_size` numbers, with B the same in all of them (one
    group). The convolution with the silu behind it, the readout ``C_t``, the skip D, the gated branch and the norm
    are no part of the recurrence.

    As released: -A starts uniform between 1 and 16, Delta log-uniform between `dt_min` and `dt_max` by its bias,
    weights uniform as of PyTorch's linear layer. The paper takes S from 64 and heads of 64 rows. The Jacobian is a
    number times the identity in each head.

    Args:
      hidden_size: N, a multiple of `heads`.
      heads: H.
      state_size: S.
      dt_min, dt_max: of the initial Delta. They may be traced, and are then checked when they run.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `Mamba2Params`, a state ``[H, N / H, S]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range.
    """
    floating = check_floating("dtype", dtype)
    n, size = check_positive_int("hidden_size", hidden_size), check_positive_int("state_size", state_size)
    rows = check_heads(n, heads)
    dt_min, dt_max = _check_dt(dt_min, dt_max)

    def init(key: Array, input_size: int) -> Mamba2Params:
        fan_in = check_positive_int("input_size", input_size)
        k_in, k_key, k_dt, k_bias, k_a = jax.random.split(check_key("key", key), 5)
        return Mamba2Params(
            draw_gates("input_init", linear_default, k_in, 1, n, fan_in, floating),
            draw_gates("input_init", linear_default, k_key, 1, size, fan_in, floating),
            draw_gates("input_init", linear_default, k_dt, 1, heads, fan_in, floating),
            draw_dt_bias(k_bias, heads, dt_min, dt_max, floating),
            jnp.log(jax.random.uniform(k_a, (heads,), floating, 1, 16)),
        )

    return Cell(init, lambda: jnp.zeros((heads, rows, size), floating), _mamba2_step)


@recalled
def lmu(
    hidden_size: int,
    *,
    order: int = 8,
    theta: float = 100.0,
    input_init: Initializer = glorot_normal,
    dtype: Any = None,
) -> Cell:
    """The Legendre memory unit (Voelker et al. 2019, NeurIPS 32): a linear memory that a tanh network writes and reads.

    ::

        u = e_x . x_t + e_h . h_{t-1} + e_m . m_{t-1}
        m_t = A m_{t-1} + B u
        h_t = tanh(W_x x_t + W_h h_{t-1} + W_m m_t)

    A and B are not trained: those of ``theta dm/dt = A m + B u``, ``A_ij = (2 i + 1) (-1 if i < j else
    (-1)^(i-j+1))``, ``B_i = (2 i + 1) (-1)^i``, under zero-order hold for steps of 1. m then has the last `theta`
    inputs u as its M = `order` Legendre coefficients. The memory is linear, the step as a whole is not.

    e_x and e_h start uniform, of variance 1 / fan in, e_m at 0, W as of Glorot and Bengio.

    Args:
      hidden_size: N, of units.
      order: M, of Legendre polynomials.
      theta: length of the window in steps, known before compilation.
      input_init: initialiser ``(key, shape, dtype)`` of W_x, W_h and W_m, of shapes ``(fan in, N)``.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `LMUParams` and an `LMUState`, D = N + M.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    floating = check_floating("dtype", dtype)
    n, m = check_hidden_size(hidden_size, 1, floating), check_positive_int("order", order)
    step = shared(_lmu_step, m, float(check_positive_finite("theta", theta)))
    check_initializer("input_init", input_init)

    def init(key: Array, input_size: int) -> LMUParams:
        fan_in = check_positive_int("input_size", input_size)
        k_x, k_h, *keys = jax.random.split(check_key("key", key), 5)
        return LMUParams(
            draw_gates("input_init", lecun_uniform, k_x, 1, 1, fan_in, floating)[0],
            draw_gates("input_init", lecun_uniform, k_h, 1, 1, n, floating)[0],
            jnp.zeros(m, floating),
            *(
                draw_gates("input_init", input_init, k, 1, n, size, floating)
                for k, size in zip(keys, (fan_in, n, m), strict=True)
            ),
        )

    return Cell(init, lambda: LMUState(jnp.zeros(n, floating), jnp.zeros(m, floating)), step)


def _check_dt(dt_min: Any, dt_max: Any) -> tuple[Any, Any]:
    dt_max = check_positive_finite("dt_max", dt_max)
    return check_number(
        "dt_min", dt_min, "a number above 0, up to dt_max", lambda dt: (dt > 0) & (dt <= dt_max)
    ), dt_max


def _draw_log_dt(key: Array, n: int, dt_min: Any, dt_max: Any, dtype: jnp.dtype) -> Array:
    lowest, highest = (jnp.log(jnp.asarray(dt, dtype)) for dt in (dt_min, dt_max))
    return jax.random.uniform(key, (n,), dtype, lowest, highest)


def draw_dt_bias(key: Array, n: int, dt_min: Any, dt_max: Any, dtype: jnp.dtype) -> Array:
    """Biases of which the softplus is log-uniform between the two."""
    dt = jnp.maximum(jnp.exp(_draw_log_dt(key, n, dt_min, dt_max, at_least_single(dtype))), _SMALLEST_DT)
    return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)


def _normal_hippo(n: int) -> tuple[np.ndarray, np.ndarray]:
    """n eigenvalues with imaginary part below 0 of the normal part of HiPPO-LegS of size 2n, and ``V^* [n, 2n]``."""
    root = np.sqrt(2 * np.arange(2 * n) + 1)
    skew = np.tril(np.outer(root, root), -1) / -2
    imaginary, vectors = np.linalg.eigh(-1j * (skew - skew.T))
    return -0.5 + 1j * imaginary[:n], vectors[:, :n].conj().T


def _discretized(method: str, log_dt: Array, re: Array, im: Array) -> tuple[Array, Array]:
    """The factors of the state and of the input of ``dh/dt = (re + i im) h + u`` in steps of dt."""
    dt = jnp.exp(log_dt)
    z = jax.lax.complex(dt * re, dt * im)
    if method == "zoh":
        # (e^z - 1) / z has a derivative that cancels next to 0, and divides by the square of z.
        small = jnp.square(z.real) + jnp.square(z.imag) < float(jnp.finfo(dt.dtype).eps) ** (2 / 3)
        far = jnp.where(small, 1, z)
        return jnp.exp(z), dt.astype(z.dtype) * jnp.where(small, 1 + z / 2 * (1 + z / 3), jnp.expm1(far) / far)
    return (1 + z / 2) / (1 - z / 2), dt.astype(z.dtype) / (1 - z / 2)


def _s4d_coefficients(method: str, params: S4DParams, x: Array) -> tuple[Array, Array]:
    a, gain = _discretized(method, params.log_dt[:, None], -jnp.exp(params.log_neg_re), params.im)
    return a, gain * times(params.input, x)[:, None].astype(a.dtype)


def _s5_coefficients(method: str, params: S5Params, x: Array) -> tuple[Array, Array]:
    a, gain = _discretized(method, params.log_dt, params.re, params.im)
    return a, gain * jax.lax.complex(times(params.input_re, x), times(params.input_im, x))


# One object each: cells that differ only in size or initialisation share what JAX has compiled.
_S4D_STEPS, _S5_STEPS = (
    {method: DiagonalStep(shared(partial, coefficients, method)) for method in ("zoh", "bilinear")}
    for coefficients in (_s4d_coefficients, _s5_coefficients)
)


@DiagonalStep
def _mamba_step(params: MambaParams, x: Array) -> tuple[Array, Array]:
    u = times(params.input, x)
    down, b = jnp.split(times(params.select, u), [params.dt.shape[1]])
    dt = jax.nn.softplus(times(params.dt, down) + params.dt_bias)
    return jnp.exp(-dt[:, None] * jnp.exp(params.a_log)), (dt * u)[:, None] * b[None]


@DiagonalStep
def _mamba2_step(params: Mamba2Params, x: Array) -> tuple[Array, Array]:
    u = times(params.input, x).reshape(params.dt_bias.shape[0], -1)
    dt = jax.nn.softplus(times(params.dt, x) + params.dt_bias)
    b = (dt[:, None] * u)[..., None] * times(params.key, x)[None, None]
    return jnp.exp(-dt * jnp.exp(params.a_log))[:, None, None], b


def _lmu_step(order: int, theta: float) -> Any:
    i = np.arange(order)
    rows, columns = i[:, None], i[None, :]
    system = np.zeros((order + 1, order + 1))  # of m and, held, u
    system[:-1, :-1] = np.where(rows < columns, -1.0, (-1.0) ** (rows - columns + 1))
    system[:-1, -1] = (-1.0) ** i
    system[:-1] *= (2 * i + 1)[:, None] / theta
    import scipy.linalg  # costs as much as a third of this package

    both = scipy.linalg.expm(system)[:-1]

    def step(params: LMUParams, state: LMUState, x: Array) -> LMUState:
        a, b = jnp.asarray(both[:, :-1], state.m.dtype), jnp.asarray(both[:, -1], state.m.dtype)
        u = params.encode_input @ x + params.encode_hidden @ state.h + params.encode_memory @ state.m
        m = a @ state.m + b * u
        h = tanh(times(params.input, x) + times(params.recurrent, state.h) + times(params.memory, m))
        return LMUState(h, m)

    return step
