"""The simple recurrent network and what differs from it by one idea: a leak, an identity, a diagonal, a slow half."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh, weighted_mean
from bptt_jax.cells.initializers import Initializer, draw_weights, identity
from bptt_jax.cells.sharing import recalled, shared
from bptt_jax.cells.weights import (
    check_hidden_size,
    check_initializers,
    draw_gates,
    fan_in_normal,
    orthogonal,
    times,
)
from bptt_jax.checks import (
    check_finite,
    check_floating,
    check_function,
    check_key,
    check_nonnegative_finite,
    check_number,
    check_positive_int,
    check_share,
)
from bptt_jax.step import Array, Cell, Input, Step

_KEEPING_LESS: dict[Any, Callable[[Array], Array]] = {jnp.tanh: tanh, jax.nn.sigmoid: sigmoid}
_faint, _small = jax.nn.initializers.normal(0.001), jax.nn.initializers.normal(0.05)
_below_one = jax.nn.initializers.uniform(1.0)


class RNNParams(NamedTuple):
    """Parameters of `rnn` and of cells with the same weights: ``recurrent [N, N]``, ``input [N, I]``, ``bias [N]``."""

    recurrent: Array
    input: Array
    bias: Array


class IndRNNParams(NamedTuple):
    """Parameters of `indrnn`: ``recurrent [N]``, a weight for each unit, ``input [N, I]``, ``bias [N]``."""

    recurrent: Array
    input: Array
    bias: Array


class SCRNParams(NamedTuple):
    """Parameters of `scrn`, with M units of context.

    ``recurrent [N, N]`` (R), ``input [N, I]`` (A), ``from_context [N, M]`` (P), ``to_context [M, I]`` (B).
    """

    recurrent: Array
    input: Array
    from_context: Array
    to_context: Array


class SCRNState(NamedTuple):
    """State of `scrn`: the hidden units ``h [N]`` and the context ``s [M]``."""

    h: Array
    s: Array


class MinimalRNNParams(NamedTuple):
    """Parameters of `minimal_rnn`.

    ``recurrent [N, N]`` (U_h), ``latent [N, N]`` (U_z), ``bias [N]`` (b_u), and of the map of the inputs ``input
    [N, I]`` (W_x) and ``input_bias [N]`` (b_z).
    """

    recurrent: Array
    latent: Array
    bias: Array
    input: Array
    input_bias: Array


@recalled
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

    return Cell(init, lambda: jnp.zeros(n, dtype), shared(_rnn_step, _KEEPING_LESS.get(activation, activation)))


def _rnn_step(activation: Callable[[Array], Array]) -> Step:
    def rnn_step(params: RNNParams, h: Array, x: Array) -> Array:
        return activation(times(params.recurrent, h) + times(params.input, x) + params.bias)

    return rnn_step


@recalled
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

    The Jacobian is ``(1 - alpha) I + alpha diag(phi'(a_t)) W``. W and U are drawn as by `bptt_jax.rnn`, which for
    tanh is one of the ways of the authors' code; a gain below 1 is a memory of some ``1 / (alpha (1 - gain))`` steps.

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
    noise = check_nonnegative_finite("noise", noise)
    like = rnn(
        hidden_size,
        activation=activation,
        gain=gain,
        recurrent_init=recurrent_init,
        input_init=input_init,
        dtype=dtype,
    )
    activation = _KEEPING_LESS.get(activation, activation)
    return Cell(like.init, like.initial_state, shared(_leaky_step, activation, alpha, noise))


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


@recalled
def irnn(
    hidden_size: int,
    *,
    scale: float = 1.0,
    input_init: Initializer = _faint,
    dtype: Any = None,
) -> Cell:
    """The network of rectified linear units that starts at the identity (Le et al. 2015, arXiv:1504.00941).

    ::

        h_t = relu(W h_{t-1} + U x_t + b)      W_0 = scale I

    A `bptt_jax.rnn` in all but its beginning: U starts at N(0, 0.001^2), b = 0. As long as no unit falls silent the
    Jacobian is W: signals neither grow nor fade until W has learned, and a unit that falls silent sends none.

    Args:
      hidden_size: N, of units.
      scale: of the identity; the paper takes 0.01 where memory is to be short (speech). It may be traced, and is then
        checked when it runs.
      input_init, dtype: as for `bptt_jax.rnn`.

    Returns:
      A `Cell` with `RNNParams` and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    scale = check_finite("scale", scale)
    return rnn(
        hidden_size,
        activation=jax.nn.relu,
        recurrent_init=identity(scale),
        input_init=input_init,
        dtype=dtype,
    )


@recalled
def indrnn(
    hidden_size: int,
    *,
    activation: Callable[[Array], Array] = jax.nn.relu,
    recurrent_init: Initializer = _below_one,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The independently recurrent network, whose units see only themselves (Li et al. 2018, arXiv:1803.04831).

    ::

        h_t = phi(u * h_{t-1} + U x_t + b)

    Units meet in the next layer, so the paper stacks several (`bptt_jax.stack`). u starts uniform on [0, 1); over T
    steps its authors keep ``|u|`` below ``2^(1/T)`` by clipping it after each update, which is not done here. U starts
    at N(0, 1 / I), where their code has other scales from task to task, mostly with batch normalisation; b = 0.
    The Jacobian is ``diag(phi'(a_t) * u)``: with relu every unit carries its signal by u^lag, or not at all.

    Args:
      hidden_size: N, of units.
      activation: phi, as for `bptt_jax.rnn`.
      recurrent_init: initialiser ``(key, shape, dtype)`` of u, of shape ``(N,)``.
      input_init, dtype: as for `bptt_jax.rnn`.

    Returns:
      A `Cell` with `IndRNNParams` and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    dtype = check_floating("dtype", dtype)
    n = check_positive_int("hidden_size", hidden_size)
    activation = check_function("activation", activation, "activation(array) -> array")
    check_initializers(recurrent_init, input_init)

    def init(key: Array, input_size: int) -> IndRNNParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in = jax.random.split(check_key("key", key))
        return IndRNNParams(
            draw_weights("recurrent_init", recurrent_init, k_rec, (n,), dtype),
            draw_gates("input_init", input_init, k_in, 1, n, fan_in, dtype),
            jnp.zeros(n, dtype),
        )

    return Cell(init, lambda: jnp.zeros(n, dtype), shared(_indrnn_step, _KEEPING_LESS.get(activation, activation)))


def _indrnn_step(activation: Callable[[Array], Array]) -> Step:
    def indrnn_step(params: IndRNNParams, h: Array, x: Array) -> Array:
        return activation(params.recurrent * h + times(params.input, x) + params.bias)

    return indrnn_step


@recalled
def scrn(
    hidden_size: int,
    *,
    context_size: int | None = None,
    alpha: float = 0.95,
    recurrent_init: Initializer = _small,
    input_init: Initializer = _small,
    dtype: Any = None,
) -> Cell:
    """The structurally constrained network, half of whose state is slow (Mikolov et al. 2014, arXiv:1412.7753).

    ::

        s_t = (1 - alpha) B x_t + alpha s_{t-1}
        h_t = sigmoid(P s_t + A x_t + R h_{t-1})

    There are no biases. The output ``f(U h_t + V s_t)`` is a readout, no part of the recurrence. The paper leaves open
    how the weights begin: here R and P by `recurrent_init`, A and B by `input_init`, all N(0, 0.05^2) by default, as in
    the authors' code (facebookarchive/SCRNNs, for 100 units). There states start at 0.1, here at 0.

    The Jacobian is block-triangular: the context forgets by alpha at every step, whatever is learned, so its share of
    the signal lives for ``1 / (1 - alpha)`` steps, 20 by default; that of h fades as in any sigmoid network.

    Args:
      hidden_size: N, of hidden units.
      context_size: M, of units of context; by default N.
      alpha: between 0 and 1; the paper keeps it at 0.95. It may be traced, and is then checked when it runs.
      recurrent_init, input_init, dtype: as for `bptt_jax.rnn`.

    Returns:
      A `Cell` with `SCRNParams` and an `SCRNState`, D = N + M.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 1, dtype)
    m = n if context_size is None else check_positive_int("context_size", context_size)
    alpha = check_share("alpha", alpha)
    check_initializers(recurrent_init, input_init)

    def init(key: Array, input_size: int) -> SCRNParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in, k_from, k_to = jax.random.split(check_key("key", key), 4)
        return SCRNParams(
            draw_gates("recurrent_init", recurrent_init, k_rec, 1, n, n, dtype),
            draw_gates("input_init", input_init, k_in, 1, n, fan_in, dtype),
            draw_gates("recurrent_init", recurrent_init, k_from, 1, n, m, dtype),
            draw_gates("input_init", input_init, k_to, 1, m, fan_in, dtype),
        )

    return Cell(init, lambda: SCRNState(jnp.zeros(n, dtype), jnp.zeros(m, dtype)), shared(_scrn_step, alpha))


def _scrn_step(alpha: float | Array) -> Step:
    def scrn_step(params: SCRNParams, state: SCRNState, x: Array) -> SCRNState:
        kept = jnp.asarray(alpha, state.s.dtype)
        s = (1 - kept) * times(params.to_context, x) + kept * state.s
        drive = times(params.from_context, s) + times(params.input, x) + times(params.recurrent, state.h)
        return SCRNState(sigmoid(drive), s)

    return scrn_step


@recalled
def minimal_rnn(
    hidden_size: int,
    *,
    recurrent_init: Initializer = orthogonal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The minimal network with a gate, which keeps or takes what the input maps to (Chen 2017, arXiv:1711.06788).

    ::

        z_t = tanh(W_x x_t + b_z)
        u_t = sigmoid(U_h h_{t-1} + U_z z_t + b_u)
        h_t = u_t * h_{t-1} + (1 - u_t) * z_t

    The state stays among the z, between -1 and 1. The paper leaves the map of the inputs open, and takes this one; how
    the weights begin it does not say: here U_h and U_z orthogonal, W_x at N(0, 1 / I), biases 0, at which u = 1/2.

    The Jacobian is ``diag(u_t) + diag((h_{t-1} - z_t) * u_t * (1 - u_t)) U_h``: near its first term for small U_h
    (Chen et al. 2018, arXiv:1806.05394, who study it at random weights).

    Args:
      hidden_size: N, of units.
      recurrent_init: initialiser of U_h and of U_z.
      input_init, dtype: as for `bptt_jax.rnn`.

    Returns:
      A `Cell` with `MinimalRNNParams` and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 2, dtype)
    check_initializers(recurrent_init, input_init)

    def init(key: Array, input_size: int) -> MinimalRNNParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_latent, k_in = jax.random.split(check_key("key", key), 3)
        return MinimalRNNParams(
            draw_gates("recurrent_init", recurrent_init, k_rec, 1, n, n, dtype),
            draw_gates("recurrent_init", recurrent_init, k_latent, 1, n, n, dtype),
            jnp.zeros(n, dtype),
            draw_gates("input_init", input_init, k_in, 1, n, fan_in, dtype),
            jnp.zeros(n, dtype),
        )

    return Cell(init, lambda: jnp.zeros(n, dtype), _minimal_rnn_step)


def _minimal_rnn_step(params: MinimalRNNParams, h: Array, x: Array) -> Array:
    z = tanh(times(params.input, x) + params.input_bias)
    u = sigmoid(times(params.recurrent, h) + times(params.latent, z) + params.bias)
    return weighted_mean(u, z, h)
