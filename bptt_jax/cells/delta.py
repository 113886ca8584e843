"""Memories that erase before they write, by a delta rule: deltanet, gated_deltanet, rwkv7."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.cells.activations import sigmoid, tanh
from bptt_jax.cells.heads import check_sizes, draw_heads, draw_orthogonal, outer, project
from bptt_jax.cells.sharing import recalled
from bptt_jax.cells.state_space import draw_dt_bias
from bptt_jax.cells.weights import orthogonal, times
from bptt_jax.checks import check_floating, check_key, check_positive_int
from bptt_jax.recurrence.delta import DeltaStep
from bptt_jax.step import Array, Cell

_EPSILON = 1e-6  # beside the squared norm of a key, as in flash-linear-attention: keys of 0 stay such


class DeltaNetParams(NamedTuple):
    """Parameters of `deltanet`: ``key [H, K, I]``, ``value [H, V, I]``, ``rate [H, I]``."""

    key: Array
    value: Array
    rate: Array


class GatedDeltaNetParams(NamedTuple):
    """Parameters of `gated_deltanet`: ``key [H, K, I]``, ``value [H, V, I]``, ``rate [H, I]``, and of the decay
    ``decay [H, I]``, ``decay_bias [H]``, ``decay_log [H]``."""

    key: Array
    value: Array
    rate: Array
    decay: Array
    decay_bias: Array
    decay_log: Array


class RWKV7Params(NamedTuple):
    """Parameters of `rwkv7`: ``key [H, K, I]``, ``value [H, V, I]``.

    Of the decay ``decay [H, K]``, ``decay_in [R, I]``, ``decay_out [H, K, R]``; of the rate ``rate [H, K]``, ``rate_in
    [R, I]``, ``rate_out [H, K, R]``; ``removal [H, K]`` (the paper's xi) and ``replacement [H, K]`` (its alpha).
    """

    key: Array
    value: Array
    decay: Array
    decay_in: Array
    decay_out: Array
    rate: Array
    rate_in: Array
    rate_out: Array
    removal: Array
    replacement: Array


@recalled
def deltanet(hidden_size: int, *, heads: int = 2, key_size: int = 8, dtype: Any = None) -> Cell:
    """A memory of outer products written by the delta rule: the new value takes the place of what its key had
    (Schlag et al. 2021, arXiv:2102.11174), with the keys of Yang et al. 2024 (arXiv:2406.06484).

    ::

        k = silu(W_k x_t) / |silu(W_k x_t)|           v = W_v x_t
        beta = sigmoid(w_beta x_t)
        S_t = S_{t-1} + beta (v - S_{t-1} k) k^T
            = S_{t-1} (1 - beta k k^T) + beta v k^T

    for each of H heads, with V = N/H values and K keys. 1e-6 beside the squared norm keeps keys of 0. What is read,
    ``S_t q`` with a query q of x_t, normalisation and output gate are no part of the recurrence; neither are the
    convolutions of the released code, after which its values go through silu too. Schlag's keys are rectified and sum
    to 1. The weights start at N(0, 1 / I); in published code the model around draws them.

    The Jacobian takes ``1 - beta`` of what lies along k, and leaves the rest: the error signal never grows.

    Args:
      hidden_size: N, of values in all heads.
      heads: H, a divisor of N.
      key_size: K, of each head.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `DeltaNetParams`, a state ``[H, V, K]`` and a `bptt_jax.parallel.DeltaStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range.
    """
    floating = check_floating("dtype", dtype)
    h, values, keys = check_sizes(hidden_size, heads, key_size)

    def init(key: Array, input_size: int) -> DeltaNetParams:
        fan_in = check_positive_int("input_size", input_size)
        k_key, k_value, k_rate = jax.random.split(check_key("key", key), 3)
        return DeltaNetParams(
            draw_heads(k_key, h, keys, fan_in, floating),
            draw_heads(k_value, h, values, fan_in, floating),
            draw_heads(k_rate, h, 1, fan_in, floating)[:, 0],
        )

    return Cell(init, lambda: jnp.zeros((h, values, keys), floating), _deltanet_step)


@recalled
def gated_deltanet(hidden_size: int, *, heads: int = 2, key_size: int = 8, dtype: Any = None) -> Cell:
    """`deltanet` that fades besides: a gate forgets all, the delta rule what a key had (Yang et al. 2024,
    arXiv:2412.06464, eq. 10).

    ::

        k = silu(W_k x_t) / |silu(W_k x_t)|           v = W_v x_t
        beta = sigmoid(w_beta x_t)
        alpha = exp(-exp(A) softplus(w_alpha x_t + b_alpha))
        S_t = alpha S_{t-1} (1 - beta k k^T) + beta v k^T

    for each of H heads, with V = N/H values and K keys; the decay is that of Mamba-2. What is read is no part of the
    recurrence, as for `deltanet`. ``exp(A)`` starts uniform between 0 and 16, ``softplus(b_alpha)`` log-uniform
    between 0.001 and 0.1, as in the released code; the weights, which there the model around draws, at N(0, 1 / I).

    The Jacobian takes ``alpha (1 - beta)`` of what lies along k, and alpha of the rest: the error signal never grows.

    Args:
      hidden_size: N, of values in all heads.
      heads: H, a divisor of N.
      key_size: K, of each head.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `GatedDeltaNetParams`, a state ``[H, V, K]`` and a `bptt_jax.parallel.DeltaStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range.
    """
    floating = check_floating("dtype", dtype)
    ungated = deltanet(hidden_size, heads=heads, key_size=key_size, dtype=dtype)

    def init(key: Array, input_size: int) -> GatedDeltaNetParams:
        fan_in = check_positive_int("input_size", input_size)
        k_ungated, k_decay, k_dt, k_log = jax.random.split(check_key("key", key), 4)
        decay = 16 * (1 - jax.random.uniform(k_log, (heads,), jnp.float32))  # never 0
        key_weights, value_weights, rate = ungated.init(k_ungated, fan_in)
        return GatedDeltaNetParams(
            key_weights,
            value_weights,
            rate,
            draw_heads(k_decay, heads, 1, fan_in, floating)[:, 0],
            draw_dt_bias(k_dt, heads, 0.001, 0.1, floating),
            jnp.log(decay).astype(floating),
        )

    return Cell(init, ungated.initial_state, _gated_deltanet_step)


@recalled
def rwkv7(hidden_size: int, *, heads: int = 2, key_size: int = 8, rank: int = 4, dtype: Any = None) -> Cell:
    """The memory of RWKV-7, "Goose": a delta rule of its own rate for each key, which decays key by key (Peng et al.
    2025, arXiv:2503.14456, eq. 4 to 17).

    ::

        k = W_k x_t                                   v = W_v x_t
        w = exp(-e^{-1/2} sigmoid(d + B tanh(A x_t)))
        a = sigmoid(d' + B' A' x_t)
        r = xi * k / |xi * k|                         k' = k * (1 + (a - 1) * alpha)
        S_t = S_{t-1} (diag(w) - r (a * r)^T) + v k'^T

    for each of H heads, with V = N/H values and K keys. 1e-6 beside the squared norm keeps keys of 0. Token shift, and
    the values of the lowest layer that higher ones mix in, are maps of the inputs; what is read, its normalisation
    and gate are no part of the recurrence either.

    The weights start as in the released code's lowest layer: W_v orthogonal and W_k a tenth of that; A and A' at 0, B
    and B' a tenth of orthogonal; d over the keys of all heads from -6 to 0, and in each head besides from -2 to 3; d'
    near 0; xi near 0.7, alpha 1.02.

    w is between ``exp(-e^{-1/2})``, 0.55, and 1. The eigenvalues of a step's Jacobian do not exceed 1 in modulus; where
    a differs among keys, its singular values may, up to 1.15: the error signal can grow for a while.

    Args:
      hidden_size: N, of values in all heads.
      heads: H, a divisor of N.
      key_size: K, of each head.
      rank: R, of the dependence on the input of decay and rate.
      dtype: of parameters and state; by default JAX's floating type.

    Returns:
      A `Cell` with `RWKV7Params`, a state ``[H, V, K]`` and a `bptt_jax.parallel.DeltaStep`.

    Raises:
      TypeError, ValueError: an argument is out of its range.
    """
    floating = check_floating("dtype", dtype)
    h, values, keys = check_sizes(hidden_size, heads, key_size)
    rank = check_positive_int("rank", rank)

    def init(key: Array, input_size: int) -> RWKV7Params:
        fan_in = check_positive_int("input_size", input_size)
        k_key, k_value, k_decay, k_rate = jax.random.split(check_key("key", key), 4)
        place = (jnp.arange(h * keys) / max(h * keys - 1, 1)).reshape(h, keys)
        within = 2 * jnp.arange(keys)[None] / max(keys - 1, 1) - 1
        bend, slope = within * jnp.abs(within), place - 0.5
        no_input = jnp.zeros((rank, fan_in), floating)
        return RWKV7Params(
            0.1 * draw_orthogonal(k_key, h, keys, fan_in, floating),
            draw_orthogonal(k_value, h, values, fan_in, floating),
            (-5.5 + 6 * place + 2.5 * bend).astype(floating),
            no_input,
            0.1 * draw_heads(k_decay, h, keys, rank, floating, orthogonal),
            (-0.19 + 0.3 * bend + 0.4 * slope).astype(floating),
            no_input,
            0.1 * draw_heads(k_rate, h, keys, rank, floating, orthogonal),
            (0.71 - 0.1 * slope).astype(floating),
            jnp.full((h, keys), 1.02, floating),
        )

    return Cell(init, lambda: jnp.zeros((h, values, keys), floating), _rwkv7_step)


def _unit(keys: Array) -> Array:
    return keys * jax.lax.rsqrt(jnp.sum(keys * keys, axis=-1, keepdims=True) + _EPSILON)


# One object each, whatever the sizes, so that cells share what JAX has compiled.
@DeltaStep
def _deltanet_step(params: DeltaNetParams, x: Array) -> tuple[Array, Array, Array, Array]:
    k, beta = _unit(jax.nn.silu(project(params.key, x))), sigmoid(project(params.rate, x))[:, None]
    return jnp.ones((), k.dtype), -beta * k, k, outer(beta * project(params.value, x), k)


@DeltaStep
def _gated_deltanet_step(params: GatedDeltaNetParams, x: Array) -> tuple[Array, Array, Array, Array]:
    _, u, w, b = _deltanet_step.coefficients(params, x)
    time = jax.nn.softplus(project(params.decay, x) + params.decay_bias)
    alpha = jnp.exp(-jnp.exp(params.decay_log) * time)[:, None]
    return alpha, alpha * u, w, b


@DeltaStep
def _rwkv7_step(params: RWKV7Params, x: Array) -> tuple[Array, Array, Array, Array]:
    k, v = project(params.key, x), project(params.value, x)
    decay = params.decay + project(params.decay_out, tanh(times(params.decay_in, x)))
    keep = jnp.exp(-math.exp(-0.5) * sigmoid(decay))
    rate = sigmoid(params.rate + project(params.rate_out, times(params.rate_in, x)))
    removed = _unit(params.removal * k)
    return keep, -removed, rate * removed, outer(v, k * (1 + (rate - 1) * params.replacement))
