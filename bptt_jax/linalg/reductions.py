"""Sums and maxima over all numbers of an array, as two reductions of short axes.

On a CPU, XLA reduces along an axis of more than 32 by windows: in up to ten times the time, and with two programs more
to compile. So axes are cut where they can be. Sums of many numbers, and of matrices of many, it has kernels for.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int, PyTree, Shaped

BITS = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}
_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
_LONGEST = 32
_MANY = 1 << 9
# From here on one reduction over all is slower than what XLA has for matrices by more than it saves.
_LARGE = 1 << 12


def total(a: Float[Array, "..."]) -> Float[Array, ""]:
    """The sum."""
    if a.size > _MANY:
        return jnp.sum(a)
    a = _cut(a)
    # Apart, lest XLA makes one of both.
    return jnp.sum(jax.lax.optimization_barrier(jnp.sum(a, axis=range(a.ndim - 1))))


def largest(a: Float[Array, "..."]) -> Float[Array, ""]:
    """The largest of numbers >= 0, 0 of none, NaN if there is one; no derivative.

    By their bits, whose order is that of integers: on a CPU, XLA's maximum of a thousand numbers may pass over NaN.
    """
    bits = bits_of(a)
    if bits.ndim <= 1 or a.size <= _LARGE:
        bits = _cut(bits)
    columns = jnp.max(bits, axis=range(bits.ndim - 1), initial=0)
    # Of another type, lest XLA makes one reduction of both.
    rest = jax.lax.bitcast_convert_type(columns, _UNSIGNED[a.dtype.itemsize])
    return jax.lax.bitcast_convert_type(jnp.max(_cut(rest), initial=0), a.dtype)


def most(a: Shaped[Array, "..."]) -> Shaped[Array, ""]:
    """The largest of numbers of any kind, one at least. It may pass over NaN."""
    return jnp.max(_cut(a))


def real_parts(tree: PyTree[Inexact[Array, "..."]]) -> list[Float[Array, "..."]]:
    """The leaves; of complex ones the real and the imaginary part."""
    return [part for a in jax.tree.leaves(tree) for part in ((a.real, a.imag) if jnp.iscomplexobj(a) else (a,))]


def bits_of(a: Float[Array, "..."]) -> Int[Array, "..."]:
    """As integers of the same size."""
    return jax.lax.bitcast_convert_type(a, BITS[a.dtype.itemsize])


def _cut(a: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The same numbers, with no axis longer than 32 if its length can be divided."""
    shape: list[int] = []
    for length in a.shape:
        parts: list[int] = []
        while length > _LONGEST:
            part = next(k for k in range(_LONGEST, 0, -1) if length % k == 0)
            if part == 1:
                break
            parts, length = [part, *parts], length // part
        shape += [length, *parts]
    return a.reshape(shape or (1,))
