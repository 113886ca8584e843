"""tanh, sigmoid and the gru's weighted mean, with derivatives formed from what the backward pass keeps anyway.

JAX's own keep more beside the values: tanh 1 - y, sigmoid y(1 - y), in all an lstm 12 arrays at every step instead
of 7. That is memory, and the time to write and read it. In reverse JAX's tanh also cancels where y is near -1: in
float32 its slope at -4.5 is 1e-4 off, relatively.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from bptt_jax.step import Array

# Only the arguments are kept, the rest is formed again. `prevent_cse` is not needed: through time, the forward and
# the backward pass are two loops; elsewhere a compiler that merges them keeps what it then need not compute.
_keep_arguments = partial(jax.checkpoint, prevent_cse=False)


def _with_slope(
    name: str, function: Callable[[Array], Array], slope: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    """`function` with the derivative ``slope(y)`` at y = function(x); it is found in this module by its name."""

    def named(x: Array) -> Array:
        return function(x)

    named.__name__ = named.__qualname__ = name
    activation = jax.custom_jvp(named)

    @_keep_arguments
    def push(y: Array, dx: Array) -> Array:
        return dx * slope(y)

    @activation.defjvp
    def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        y = activation(*primals)
        return y, push(y, *tangents)

    return activation


# In factors, for 1 - y and 1 + y are exact near 1 and -1, where 1 - y * y and y - y * y cancel.
tanh = _with_slope("tanh", jnp.tanh, lambda y: (1 - y) * (1 + y))
sigmoid = _with_slope("sigmoid", jax.nn.sigmoid, lambda y: y * (1 - y))


@_keep_arguments
def weighted_mean(weight: Array, a: Array, b: Array) -> Array:
    """``(1 - weight) * a + weight * b``."""
    return (1 - weight) * a + weight * b
