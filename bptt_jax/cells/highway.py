"""The recurrent highway network."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh, weighted_mean
from bptt_jax.cells.initializers import Initializer
from bptt_jax.cells.sharing import recalled
from bptt_jax.cells.weights import check_hidden_size, check_initializers, draw_gates, draw_within, times, within
from bptt_jax.checks import check_finite, check_floating, check_key, check_positive_int
from bptt_jax.step import Array, Cell

_SCALE = 0.04
_small = within(_SCALE)


class RHNParams(NamedTuple):
    """Parameters of `rhn` of L layers, n and t stacked.

    ``recurrent [L, 2N, N]``, ``input [2N, I]``, ``bias [L, 2N]``.
    """

    recurrent: Array
    input: Array
    bias: Array


@recalled
def rhn(
    hidden_size: int,
    *,
    depth: int = 3,
    transform_bias: float = -2.0,
    recurrent_init: Initializer = _small,
    input_init: Initializer = _small,
    dtype: Any = None,
) -> Cell:
    """The recurrent highway network (Zilly et al. 2017, arXiv:1607.03474): several highway layers within one step.

    ::

        s_0 = h_{t-1}
        n_l = tanh(R_l s_{l-1} + [l = 1] U x_t + b_l)
        t_l = sigmoid(R'_l s_{l-1} + [l = 1] U' x_t + b'_l)
        s_l = t_l * n_l + (1 - t_l) * s_{l-1},   l = 1 ... L
        h_t = s_L

    With the carry gate ``1 - t``, as in all of the paper's experiments. All starts as in the authors' code: weights
    and n's biases uniform between -0.04 and 0.04 (for some thousand units), t's biases at -2.

    The Jacobian is the product of L of the form ``diag(1 - t) + diag(t n') R + ...``: near 0.88^L I at first, so the
    deeper, the shorter the memory, unless `transform_bias` is lowered with L (the authors' code has -4 too).

    Args:
      hidden_size: N, of units; the state is D = N numbers.
      depth: L, of layers.
      transform_bias: initial biases of t. It may be traced, and is then checked when it runs.
      recurrent_init, input_init: initialisers as in `bptt_jax.rnn`, applied gate by gate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `RHNParams` and a state ``[N]``.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    dtype = check_floating("dtype", dtype)
    depth = check_positive_int("depth", depth)
    n = check_hidden_size(hidden_size, 2 * depth, dtype)
    transform_bias = check_finite("transform_bias", transform_bias)
    check_initializers(recurrent_init, input_init)

    def init(key: Array, input_size: int) -> RHNParams:
        fan_in = check_positive_int("input_size", input_size)
        k_rec, k_in, k_bias = jax.random.split(check_key("key", key), 3)
        recurrent = draw_gates("recurrent_init", recurrent_init, k_rec, 2 * depth, n, n, dtype)
        return RHNParams(
            recurrent.reshape(depth, 2 * n, n),
            draw_gates("input_init", input_init, k_in, 2, n, fan_in, dtype),
            draw_within(k_bias, (depth, 2 * n), _SCALE, dtype).at[:, n:].set(jnp.asarray(transform_bias, dtype)),
        )

    return Cell(init, lambda: jnp.zeros(n, dtype), _rhn_step)


def _rhn_step(params: RHNParams, h: Array, x: Array) -> Array:
    drive = times(params.input, x)
    for layer, (weights, bias) in enumerate(
        zip(jnp.unstack(params.recurrent), jnp.unstack(params.bias), strict=True)
    ):
        a = times(weights, h) + bias
        n, t = jnp.split(a + drive if layer == 0 else a, 2)
        h = weighted_mean(sigmoid(t), h, tanh(n))
    return h
