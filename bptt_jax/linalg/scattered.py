"""Numbers without any pattern, of their places alone: directions that no matrix singles out, signs of roundings."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def scattered(shape: tuple[int, ...], dtype: jnp.dtype, *, after: Int[Array, ""] | int = 0) -> Float[Array, "..."]:
    """Always the same numbers, spread evenly over [-1, 1), of which none tells of another; the first `after` left out.

    The finaliser of MurmurHash3 (Appleby 2011) of their places: `jax.random.normal` takes a fifth of the time in which
    exponents are compiled.
    """
    # Not a constant, which the compiler would evaluate.
    first = jax.lax.optimization_barrier(jnp.uint32(1))
    places = first + jnp.asarray(after, jnp.uint32) + jax.lax.iota(jnp.uint32, math.prod(shape))
    return _numbers(places).astype(dtype).reshape(shape)


def scattered_before(shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """The same, an array of NumPy in double precision, known before anything is compiled."""
    places = np.arange(1, math.prod(shape) + 1, dtype=np.uint32)
    return _numbers(places).astype(np.float64).reshape(shape)


def _numbers(bits: Any) -> Any:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    bits = bits ^ (bits >> 16)
    return (bits >> 8).astype(np.float32) * 2.0**-23 - 1


def signs(shape: tuple[int, ...], dtype: jnp.dtype, *, after: Int[Array, ""] | int = 0) -> Float[Array, "..."]:
    """Those of the numbers."""
    return jnp.where(scattered(shape, dtype, after=after) < 0, -1, 1).astype(dtype)
