"""tanh, sigmoid and the weighted mean of a gate, with derivatives formed from what the backward pass keeps anyway.

JAX's own keep more beside the values: tanh 1 - y, sigmoid y(1 - y), in all an lstm 12 arrays at every step instead
of 7. That is memory, and the time to write and read it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax.step import Array

# Keeps the arguments, forms the rest again. In a loop over time the compiler cannot merge that with the first run.
_keep_arguments = partial(jax.checkpoint, prevent_cse=False)


def _with_slope(function: Callable[[Array], Array], slope: Callable[[Array], Array]) -> Any:
    """`function` with the derivative ``slope(y)`` at y = function(x)."""

    @jax.custom_jvp
    def activation(x: Array) -> Array:
        return function(x)

    @_keep_arguments
    def push(y: Array, dx: Array) -> Array:
        return dx * slope(y)

    @activation.defjvp
    def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        y = activation(*primals)
        return y, push(y, *tangents)

    return activation


# Not 1 - y^2 and y - y^2: 1 - y is exact where y is near 1.
tanh = _with_slope(jnp.tanh, lambda y: (1 - y) * (1 + y))
sigmoid = _with_slope(jax.nn.sigmoid, lambda y: y * (1 - y))


@_keep_arguments
def weighted_mean(weight: Array, a: Array, b: Array) -> Array:
    """``(1 - weight) * a + weight * b``."""
    return (1 - weight) * a + weight * b
