"""Products of matrices in full precision, for GPUs and TPUs multiply float32 with an error of 1e-3 by default; and
numbers in single precision at least, for LAPACK knows no other, and half has too few digits for a difference."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact


def matmul(a: Inexact[Array, "..."], b: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """`jax.numpy.matmul` in full precision."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def at_least_single(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of numbers, or single precision for half, which LAPACK does not know."""
    return max(dtype, jnp.dtype(jnp.float32), key=lambda dtype: dtype.itemsize)


def wide(a: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """In single precision at least; complex numbers are."""
    return a if jnp.iscomplexobj(a) else a.astype(at_least_single(a.dtype))
