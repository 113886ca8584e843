"""Linear attention whose memory, a matrix for each head, fades: at fixed rates, or as a gate says."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.initializers import Initializer, check_initializer
from bptt_jax.cells.weights import check_heads, draw_gates
from bptt_jax.checks import check_floating, check_key, check_positive_int
from bptt_jax.recurrence.diagonal import DiagonalStep
from bptt_jax.step import Array, Cell

# That of Glorot and Bengio with a gain of 2^-2.5, from DeepNet (Wang et al. 2022, arXiv:2203.00555).
_small_glorot = jax.nn.initializers.variance_scaling(2**-5, "fan_avg", "uniform")
_GATE_ROOT = 16  # tau of gla


class RetNetParams(NamedTuple):
    """Parameters of `retnet`, with H heads, keys of K numbers: ``key [H, K, I]``, ``value [H, N / H, I]``."""

    key: Array
    value: Array


class GLAParams(NamedTuple):
    """Parameters of `gla`, with H heads, keys of K numbers and gates of rank R.

    ``key [H, K, I]``, ``value [H, N / H, I]``, ``gate_down [R, I]``, ``gate_up [H, K, R]``, ``gate_bias [H, K]``.
    """

    key: Array
    value: Array
    gate_down: Array
    gate_up: Array
    gate_bias: Array


def retnet(
    hidden_size: int,
    *,
    heads: int = 2,
    key_size: int = 8,
    input_init: Initializer = _small_glorot,
    dtype: Any = None,
) -> Cell:
    """The retention of RetNet (Sun et al. 2023, arXiv:2307.08621), of several heads.

    ::

        k = W_K x_t
        v = W_V x_t
        S_t = gamma S_{t-1} + k v^T

    in each of H = `heads` heads, with S of K = `key_size` rows and N / H columns, and the decays of the paper,
    ``gamma = 1 - 2^(-5 - head)``, head = 0 .. H - 1, which are not trained. Queries, which read ``q^T S``, the norm
    and the gate behind them are a readout. The rotation of queries and keys by their position is left out: it is an
    encoding of position, for which a step has no name.

    Weights as of Glorot and Bengio with a gain of 2^-2.5, as released. The Jacobian is a constant, gamma times the
    identity in each head: memories last 32, 64, ... steps whatever is trained.

    Args:
      hidden_size: N, of all columns, a multiple of `heads`.
      heads: H.
      key_size: K.
      input_init: initialiser ``(key, shape, dtype)`` of W_K and W_V, of shapes ``(I, H K)`` and ``(I, N)``.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `RetNetParams`, a state ``[H, K, N / H]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    floating = check_floating("dtype", dtype)
    n, rows = check_positive_int("hidden_size", hidden_size), check_positive_int("key_size", key_size)
    columns = check_heads(n, heads)
    check_initializer("input_init", input_init)

    def init(key: Array, input_size: int) -> RetNetParams:
        fan_in = check_positive_int("input_size", input_size)
        keys = jax.random.split(check_key("key", key))
        to_key, to_value = (
            draw_gates("input_init", input_init, k, 1, heads * size, fan_in, floating).reshape(heads, size, fan_in)
            for k, size in zip(keys, (rows, columns), strict=True)
        )
        return RetNetParams(to_key, to_value)

    return Cell(init, lambda: jnp.zeros((heads, rows, columns), floating), _retnet_step)


def gla(
    hidden_size: int,
    *,
    heads: int = 2,
    key_size: int = 8,
    rank: int = 16,
    input_init: Initializer = _small_glorot,
    dtype: Any = None,
) -> Cell:
    """Gated linear attention (Yang et al. 2023, arXiv:2312.06635), of several heads.

    ::

        k = W_K x_t
        v = W_V x_t
        alpha = sigmoid(W_up W_down x_t + b)^(1/16)
        S_t = diag(alpha) S_{t-1} + k v^T

    in each of H = `heads` heads, with S of K = `key_size` rows, each of which has a gate of its own, and N / H
    columns. Queries, which read ``q^T S``, the norm and the output gate are a readout. The gates are of rank R =
    `rank`, 16 in the paper, and there are 4 heads with keys half as wide as values there.

    Weights as of Glorot and Bengio with a gain of 2^-2.5 and a bias of 0, as first released: the gates start near
    ``2^(-1/16) = 0.96``, memories of 23 steps. The Jacobian is diagonal, alpha along each row: the error signal never
    grows.

    Args:
      hidden_size: N, of all columns, a multiple of `heads`.
      heads: H.
      key_size: K.
      rank: R.
      input_init: initialiser ``(key, shape, dtype)`` of W_K, W_V and W_down, of shapes ``(I, H K)``, ``(I, N)`` and
        ``(I, R)``, and of W_up, ``(R, H K)``.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GLAParams`, a state ``[H, K, N / H]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range; from `init`, an initialiser draws another shape.
    """
    floating = check_floating("dtype", dtype)
    n, rows = check_positive_int("hidden_size", hidden_size), check_positive_int("key_size", key_size)
    columns, rank = check_heads(n, heads), check_positive_int("rank", rank)
    check_initializer("input_init", input_init)

    def init(key: Array, input_size: int) -> GLAParams:
        fan_in = check_positive_int("input_size", input_size)
        k_key, k_value, k_down, k_up = jax.random.split(check_key("key", key), 4)

        def drawn(k: Array, size: int, fan_in: int) -> Array:
            return draw_gates("input_init", input_init, k, 1, size, fan_in, floating)

        return GLAParams(
            drawn(k_key, heads * rows, fan_in).reshape(heads, rows, fan_in),
            drawn(k_value, n, fan_in).reshape(heads, columns, fan_in),
            drawn(k_down, rank, fan_in),
            drawn(k_up, heads * rows, rank).reshape(heads, rows, rank),
            jnp.zeros((heads, rows), floating),
        )

    return Cell(init, lambda: jnp.zeros((heads, rows, columns), floating), _gla_step)


def _written(params: RetNetParams | GLAParams, x: Array) -> Array:
    """``k v^T`` of each head."""
    return (params.key @ x)[:, :, None] * (params.value @ x)[:, None, :]


# One object each: cells that differ only in size or initialisation share what JAX has compiled.
@DiagonalStep
def _retnet_step(params: RetNetParams, x: Array) -> tuple[Array, Array]:
    head = jnp.arange(params.key.shape[0], dtype=params.key.dtype)
    return (1 - jnp.exp2(-5 - head))[:, None, None], _written(params, x)


@DiagonalStep
def _gla_step(params: GLAParams, x: Array) -> tuple[Array, Array]:
    gate = params.gate_up @ (params.gate_down @ x) + params.gate_bias
    return jnp.exp(jax.nn.log_sigmoid(gate) / _GATE_ROOT)[..., None], _written(params, x)
