"""What cells share whose states are matrices ``[heads, values, keys]``."""

import math
from typing import Any, NamedTuple

from bptt_jax.cells.initializers import Initializer
from bptt_jax.cells.weights import check_heads, draw_gates, fan_in_normal, orthogonal, times
from bptt_jax.checks import check_positive_int
from bptt_jax.step import Array


class Sizes(NamedTuple):
    """H heads, each with V values and K keys."""

    heads: int
    values: int
    keys: int


def check_sizes(hidden_size: Any, heads: Any, key_size: Any) -> Sizes:
    """Returns the sizes if `hidden_size` is that of `heads` heads of equally many values each."""
    values = check_heads(check_positive_int("hidden_size", hidden_size), heads)
    return Sizes(int(heads), values, check_positive_int("key_size", key_size))


def project(weights: Array, x: Array) -> Array:
    """``[...]``: weights ``[..., I]`` times an input ``[I]``."""
    return times(weights.reshape(-1, weights.shape[-1]), x).reshape(weights.shape[:-1])


def outer(values: Array, keys: Array) -> Array:
    """``[H, V, K]`` of ``[H, V]`` and ``[H, K]``: what a step writes."""
    return values[:, :, None] * keys[:, None, :]


def draw_heads(
    key: Array,
    heads: int,
    size: int,
    fan_in: int,
    dtype: Any,
    init: Initializer = fan_in_normal,
) -> Array:
    """``[heads, size, fan_in]``, of all heads at once."""
    return draw_gates("input_init", init, key, 1, heads * size, fan_in, dtype).reshape(heads, size, fan_in)


def draw_orthogonal(key: Array, heads: int, size: int, fan_in: int, dtype: Any) -> Array:
    """``[heads, size, fan_in]``, of all heads at once, with a gain where they are more than the inputs, as RWKV."""
    return math.sqrt(max(heads * size / fan_in, 1)) * draw_heads(key, heads, size, fan_in, dtype, orthogonal)
