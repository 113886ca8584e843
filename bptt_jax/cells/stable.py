"""Cells that are steps of differential equations, or near the identity, so that signals can neither grow nor fade."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh
from bptt_jax.cells.gating import GatedParams, gated_cell
from bptt_jax.cells.initializers import Initializer
from bptt_jax.cells.sharing import recalled, shared
from bptt_jax.cells.simple import RNNParams, rnn
from bptt_jax.cells.weights import (
    check_hidden_size,
    constants,
    draw_gates,
    draw_within,
    fan_in_normal,
    linear_default,
    times,
)
from bptt_jax.checks import (
    check_floating,
    check_key,
    check_nonnegative_finite,
    check_number,
    check_positive_finite,
    check_positive_int,
)
from bptt_jax.step import Array, Cell, Step

_small = jax.nn.initializers.normal(0.1)


class FastRNNParams(NamedTuple):
    """Parameters of `fastrnn`: ``recurrent [N, N]``, ``input [N, I]``, ``bias [N]``; before the sigmoid, ``alpha []``
    and ``beta []``."""

    recurrent: Array
    input: Array
    bias: Array
    alpha: Array
    beta: Array


class LipschitzParams(NamedTuple):
    """Parameters of `lipschitz`: ``linear [N, N]`` (M_A), ``recurrent [N, N]`` (M_W), ``input [N, I]``,
    ``bias [N]``."""

    linear: Array
    recurrent: Array
    input: Array
    bias: Array


@recalled
def fastrnn(
    hidden_size: int,
    *,
    recurrent_init: Initializer = _small,
    input_init: Initializer = _small,
    dtype: Any = None,
) -> Cell:
    """The network with a weighted residual connection (Kusupati et al. 2018, arXiv:1901.02358).

    ::

        c_t = tanh(W h_{t-1} + U x_t + b)
        h_t = sigmoid(alpha) c_t + sigmoid(beta) h_{t-1}

    with two numbers alpha and beta that are learned. As in the authors' code W and U start at N(0, 0.1^2), b = 1,
    alpha = -3 and beta = 3: shares of 0.047 and 0.953, which add up to 1. With these it begins as a `leaky_rnn`, but
    neither the leak nor the sum of the shares stays.

    The Jacobian is ``sigmoid(beta) I + sigmoid(alpha) diag(1 - c_t^2) W``: where the first share is some
    1 / T and both add up to 1, products over T steps are bounded, and so is their condition number.

    Args:
      hidden_size: N, of units.
      recurrent_init, input_init, dtype: as for `bptt_jax.rnn`.

    Returns:
      A `Cell` with `FastRNNParams` and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    like = gated_cell(_fastrnn_step, hidden_size, dtype, recurrent_init, input_init, (1, 1, 1), constants(1.0))

    def init(key: Array, input_size: int) -> FastRNNParams:
        drawn: GatedParams = like.init(key, input_size)
        return FastRNNParams(*drawn, jnp.full((), -3, drawn.bias.dtype), jnp.full((), 3, drawn.bias.dtype))

    return Cell(init, like.initial_state, like.step)


def _fastrnn_step(params: FastRNNParams, h: Array, x: Array) -> Array:
    candidate = tanh(times(params.recurrent, h) + times(params.input, x) + params.bias)
    return sigmoid(params.alpha) * candidate + sigmoid(params.beta) * h


@recalled
def antisymmetric(
    hidden_size: int,
    *,
    epsilon: float = 0.1,
    gamma: float = 0.01,
    recurrent_init: Initializer = fan_in_normal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The antisymmetric network, a step of a differential equation that keeps (Chang et al. 2019, arXiv:1902.09689).

    ::

        h_t = h_{t-1} + epsilon tanh((W - W^T - gamma I) h_{t-1} + V x_t + b)

    W - W^T has imaginary eigenvalues alone, so that in continuous time perturbations would neither grow nor fade but
    for gamma. The paper counts the numbers above the diagonal of W; here W is whole, and only its antisymmetric half
    acts. W starts at N(0, 1 / N) and V at N(0, 1 / I), which are the paper's families; b = 0. Its epsilon and gamma
    are chosen for every task.

    The Jacobian is ``I + epsilon diag(1 - tanh(a_t)^2) (W - W^T - gamma I)``: an eigenvalue i omega of the
    antisymmetric part grows by ``epsilon^2 omega^2 / 2`` in a step of Euler's method, and gamma takes
    ``epsilon gamma`` from it.

    Args:
      hidden_size: N, of units.
      epsilon: the length of a step, above 0.
      gamma: the diffusion, at least 0. Both may be traced, and are then checked when they run.
      recurrent_init, input_init, dtype: as for `bptt_jax.rnn`.

    Returns:
      A `Cell` with `RNNParams` and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    epsilon, gamma = check_positive_finite("epsilon", epsilon), check_nonnegative_finite("gamma", gamma)
    like = rnn(hidden_size, recurrent_init=recurrent_init, input_init=input_init, dtype=dtype)
    return Cell(like.init, like.initial_state, shared(_antisymmetric_step, epsilon, gamma))


def _antisymmetric_step(epsilon: float | Array, gamma: float | Array) -> Step:
    def antisymmetric_step(params: RNNParams, h: Array, x: Array) -> Array:
        w = params.recurrent
        drive = times(w - w.T, h) - _as(gamma, h) * h + times(params.input, x) + params.bias
        return h + _as(epsilon, h) * tanh(drive)

    return antisymmetric_step


@recalled
def gated_antisymmetric(
    hidden_size: int,
    *,
    epsilon: float = 0.1,
    gamma: float = 0.01,
    recurrent_init: Initializer = fan_in_normal,
    input_init: Initializer = fan_in_normal,
    dtype: Any = None,
) -> Cell:
    """The antisymmetric network with a gate on its step (Chang et al. 2019, arXiv:1902.09689).

    ::

        z_t = sigmoid((W - W^T - gamma I) h_{t-1} + V_z x_t + b_z)
        h_t = h_{t-1} + epsilon z_t * tanh((W - W^T - gamma I) h_{t-1} + V_h x_t + b_h)

    Gate and candidate share W, so that at a gate of ones this is `antisymmetric`. All weights begin as there, with
    b_z = b_h = 0, at which the step is half as long.

    Args:
      hidden_size: N, of units.
      epsilon, gamma, recurrent_init, input_init, dtype: as for `antisymmetric`.

    Returns:
      A `Cell` with `GatedParams`, ``input`` and ``bias`` in the order z, h, ``recurrent`` of both, and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    epsilon, gamma = check_positive_finite("epsilon", epsilon), check_nonnegative_finite("gamma", gamma)
    step = shared(_gated_antisymmetric_step, epsilon, gamma)
    return gated_cell(step, hidden_size, dtype, recurrent_init, input_init, (1, 2, 2))


def _gated_antisymmetric_step(epsilon: float | Array, gamma: float | Array) -> Step:
    def gated_antisymmetric_step(params: GatedParams, h: Array, x: Array) -> Array:
        w = params.recurrent
        turned = times(w - w.T, h) - _as(gamma, h) * h
        gate, candidate = jnp.split(times(params.input, x) + params.bias, 2)
        return h + _as(epsilon, h) * (sigmoid(turned + gate) * tanh(turned + candidate))

    return gated_antisymmetric_step


@recalled
def lipschitz(
    hidden_size: int,
    *,
    epsilon: float = 0.03,
    beta: float = 0.75,
    gamma: float = 0.001,
    dtype: Any = None,
) -> Cell:
    """The Lipschitz network, a linear part and a tanh, in steps of Euler's method (Erichson et al. 2021,
    arXiv:2006.12070).

    ::

        A = (1 - beta) (M_A + M_A^T) + beta (M_A - M_A^T) - gamma I      W likewise, of M_W
        h_t = h_{t-1} + epsilon (A h_{t-1} + tanh(W h_{t-1} + U x_t + b))

    beta says how antisymmetric A and W are (at 1 wholly), gamma how much they damp. The paper allows one beta and
    one gamma for each of the two; its code and its tables have the same for both, as here, and epsilon, beta and gamma
    are those of its commands for MNIST. As with these M_A and M_W start at N(0, (0.1 / N)^2), U and b as of PyTorch's
    linear layer, uniform within ``1 / sqrt(I)``.

    The Jacobian is ``I + epsilon (A + diag(1 - tanh(a_t)^2) W)``: near the identity. Where A's symmetric half is
    negative enough for W, all of the dynamics contracts.

    Args:
      hidden_size: N, of units.
      epsilon: the length of a step, above 0.
      beta: from 0, symmetric, to 1, antisymmetric.
      gamma: the damping, at least 0. All three may be traced, and are then checked when they run.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `LipschitzParams` and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range.
    """
    dtype = check_floating("dtype", dtype)
    n = check_hidden_size(hidden_size, 2, dtype)
    epsilon, gamma = check_positive_finite("epsilon", epsilon), check_nonnegative_finite("gamma", gamma)
    beta = check_number("beta", beta, "a number from 0 to 1", lambda v: (v >= 0) & (v <= 1))
    small = jax.nn.initializers.normal(0.1 / n)

    def init(key: Array, input_size: int) -> LipschitzParams:
        fan_in = check_positive_int("input_size", input_size)
        k_lin, k_rec, k_in, k_bias = jax.random.split(check_key("key", key), 4)
        return LipschitzParams(
            draw_gates("linear", small, k_lin, 1, n, n, dtype),
            draw_gates("recurrent", small, k_rec, 1, n, n, dtype),
            draw_gates("input", linear_default, k_in, 1, n, fan_in, dtype),
            draw_within(k_bias, (n,), fan_in**-0.5, dtype),
        )

    return Cell(init, lambda: jnp.zeros(n, dtype), shared(_lipschitz_step, epsilon, beta, gamma))


def _lipschitz_step(epsilon: float | Array, beta: float | Array, gamma: float | Array) -> Step:
    def turn(m: Array, h: Array) -> Array:
        # (1 - beta) (M + M^T) + beta (M - M^T), taken together
        return times(m + (1 - 2 * _as(beta, h)) * m.T, h) - _as(gamma, h) * h

    def lipschitz_step(params: LipschitzParams, h: Array, x: Array) -> Array:
        drive = turn(params.recurrent, h) + times(params.input, x) + params.bias
        return h + _as(epsilon, h) * (turn(params.linear, h) + tanh(drive))

    return lipschitz_step


def _as(number: float | Array, like: Array) -> Array:
    return jnp.asarray(number, like.dtype)
