"""Memories of outer products, which fade key by key: linear_transformer, hgrn2, rwkv6."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh
from bptt_jax.cells.heads import check_sizes, draw_heads, outer, project
from bptt_jax.cells.weights import orthogonal, times
from bptt_jax.checks import check_floating, check_key, check_positive_int, check_share
from bptt_jax.recurrence.diagonal import DiagonalStep
from bptt_jax.step import Array, Cell


class LinearTransformerParams(NamedTuple):
    """Parameters of `linear_transformer`: ``key [H, K, I]``, ``value [H, V, I]``."""

    key: Array
    value: Array


class LinearTransformerState(NamedTuple):
    """State of `linear_transformer`: the memory ``S [H, V, K]`` and its normaliser ``z [H, K]``."""

    S: Array
    z: Array


class HGRN2Params(NamedTuple):
    """Parameters of `hgrn2`: ``forget [H, K, I]``, ``value [H, V, I]``, and ``bound``, a number."""

    forget: Array
    value: Array
    bound: Array


class RWKV6Params(NamedTuple):
    """Parameters of `rwkv6`: ``key [H, K, I]``, ``value [H, V, I]``, and of the decay ``decay [H, K]``,
    ``decay_in [R, I]``, ``decay_out [H, K, R]``."""

    key: Array
    value: Array
    decay: Array
    decay_in: Array
    decay_out: Array


def linear_transformer(hidden_size: int, *, heads: int = 2, key_size: int = 8, dtype: Any = None) -> Cell:
    """Causal attention with a kernel in place of the softmax, as a recurrence (Katharopoulos et al. 2020,
    arXiv:2006.16236, eq. 16 to 20).

    ::

        k = elu(W_k x_t) + 1                          v = W_v x_t
        S_t = S_{t-1} + v k^T                         z_t = z_{t-1} + k

    for each of H heads, with V = N/H values and K keys. What is read, ``S_t q / (z_t^T q)`` with a query q of x_t,
    is no part of the recurrence. The weights start at N(0, 1 / I).

    The Jacobian is the identity: the error signal neither fades nor grows, and nothing is ever forgotten.

    Args:
      hidden_size: N, of values in all heads.
      heads: H, a divisor of N.
      key_size: K, of each head.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `LinearTransformerParams`, a `LinearTransformerState`, D = N K + H K, and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range.
    """
    floating = check_floating("dtype", dtype)
    h, values, keys = check_sizes(hidden_size, heads, key_size)

    def init(key: Array, input_size: int) -> LinearTransformerParams:
        fan_in = check_positive_int("input_size", input_size)
        k_key, k_value = jax.random.split(check_key("key", key))
        return LinearTransformerParams(
            draw_heads(k_key, h, keys, fan_in, floating), draw_heads(k_value, h, values, fan_in, floating)
        )

    def initial_state() -> LinearTransformerState:
        return LinearTransformerState(jnp.zeros((h, values, keys), floating), jnp.zeros((h, keys), floating))

    return Cell(init, initial_state, _linear_transformer_step)


def hgrn2(
    hidden_size: int, *, heads: int = 2, key_size: int = 8, lower_bound: float = 0.5, dtype: Any = None
) -> Cell:
    """The second hierarchically gated linear recurrence: what is forgotten makes room for what is written (Qin et al.
    2024, arXiv:2404.07904, eq. 6).

    ::

        gamma = sigmoid(bound)
        f = gamma + (1 - gamma) * sigmoid(W_f x_t)
        S_t = S_{t-1} diag(f) + (W_v x_t) (1 - f)^T

    for each of H heads, with V = N/H values and K keys, for which ``1 - f`` stands. What is read, ``S_t q`` with a
    query q of x_t, is no part of the recurrence. The lower bound gamma is learned, in the paper a cumulative softmax
    over layers, 0 at the lowest; here, as for `hgrn`, by a parameter of its own, initially `lower_bound`, 1/2 as the
    second of two layers has it. The weights start at N(0, 1 / I).

    The Jacobian is diagonal, f for the entries of each key: the error signal never grows, and fades by
    ``-log(gamma)`` a step at most.

    Args:
      hidden_size: N, of values in all heads.
      heads: H, a divisor of N.
      key_size: K, of each head.
      lower_bound: initial gamma, above 0 and below 1. It may be traced, and is then checked when it runs.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `HGRN2Params`, a state ``[H, V, K]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range.
    """
    floating = check_floating("dtype", dtype)
    h, values, keys = check_sizes(hidden_size, heads, key_size)
    lower_bound = check_share("lower_bound", lower_bound)

    def init(key: Array, input_size: int) -> HGRN2Params:
        fan_in = check_positive_int("input_size", input_size)
        k_forget, k_value = jax.random.split(check_key("key", key))
        return HGRN2Params(
            draw_heads(k_forget, h, keys, fan_in, floating),
            draw_heads(k_value, h, values, fan_in, floating),
            jax.scipy.special.logit(jnp.asarray(lower_bound, floating)),
        )

    return Cell(init, lambda: jnp.zeros((h, values, keys), floating), _hgrn2_step)


def rwkv6(hidden_size: int, *, heads: int = 2, key_size: int = 8, decay_rank: int = 4, dtype: Any = None) -> Cell:
    """The memory of RWKV-6, "Finch", whose decay depends on the input (Peng et al. 2024, arXiv:2404.05892, eq. 16 to
    20).

    ::

        k = W_k x_t                                   v = W_v x_t
        w = exp(-exp(d + B tanh(A x_t)))
        S_t = S_{t-1} diag(w) + v k^T

    for each of H heads, with V = N/H values and K keys (the paper writes the transpose). What is read, ``(S_{t-1} +
    v (u * k)^T) r`` with a receptance r of x_t, its normalisation and gate are no part of the recurrence. Neither is
    the token shift: it mixes x_t with x_{t-1}, not with a state, so it is a map of the inputs; to have it, give this
    cell the mixed inputs.

    The weights start as in the released code's lowest layer: W_v orthogonal and W_k a tenth of that; d over the keys
    of all heads from -6 to -1 as ``-6 + 5 (j / (H K - 1))^0.7``, which keeps memories of 400 to 3 steps; A at 0; B
    uniform within 0.01 of 0.

    The Jacobian is diagonal, w for the entries of each key, between 0 and 1: the error signal never grows.

    Args:
      hidden_size: N, of values in all heads.
      heads: H, a divisor of N.
      key_size: K, of each head.
      decay_rank: R, of the decay's dependence on the input.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `RWKV6Params`, a state ``[H, V, K]`` and a `DiagonalStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range.
    """
    floating = check_floating("dtype", dtype)
    h, values, keys = check_sizes(hidden_size, heads, key_size)
    rank = check_positive_int("decay_rank", decay_rank)

    def init(key: Array, input_size: int) -> RWKV6Params:
        fan_in = check_positive_int("input_size", input_size)
        k_key, k_value, k_decay = jax.random.split(check_key("key", key), 3)
        place = jnp.arange(h * keys) / max(h * keys - 1, 1)
        return RWKV6Params(
            0.1 * draw_orthogonal(k_key, h, keys, fan_in, floating),
            draw_orthogonal(k_value, h, values, fan_in, floating),
            (-6 + 5 * place**0.7).astype(floating).reshape(h, keys),
            jnp.zeros((rank, fan_in), floating),
            jax.random.uniform(k_decay, (h, keys, rank), floating, -0.01, 0.01),
        )

    return Cell(init, lambda: jnp.zeros((h, values, keys), floating), _rwkv6_step)


def draw_orthogonal(key: Array, heads: int, size: int, fan_in: int, dtype: Any) -> Array:
    """``[heads, size, fan_in]``, of all heads at once, with a gain where they are more than the inputs, as RWKV."""
    return math.sqrt(max(heads * size / fan_in, 1)) * draw_heads(key, heads, size, fan_in, dtype, orthogonal)


# One object each, whatever the sizes, so that cells share what JAX has compiled.
@DiagonalStep
def _linear_transformer_step(
    params: LinearTransformerParams, x: Array
) -> tuple[LinearTransformerState, LinearTransformerState]:
    k = jax.nn.elu(project(params.key, x)) + 1
    one = jnp.ones((), k.dtype)
    return LinearTransformerState(one, one), LinearTransformerState(outer(project(params.value, x), k), k)


@DiagonalStep
def _hgrn2_step(params: HGRN2Params, x: Array) -> tuple[Array, Array]:
    # 1 - f as a product of small numbers, which the difference would lose.
    room = sigmoid(-params.bound) * sigmoid(-project(params.forget, x))
    return (1 - room)[:, None], outer(project(params.value, x), room)


@DiagonalStep
def _rwkv6_step(params: RWKV6Params, x: Array) -> tuple[Array, Array]:
    decay = params.decay + project(params.decay_out, tanh(times(params.decay_in, x)))
    keep = jnp.exp(-jnp.exp(decay))
    return keep[:, None], outer(project(params.value, x), project(params.key, x))
