"""Products of matrices in full precision: GPUs and TPUs multiply float32 with an error of 1e-3 by default."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact


def matmul(a: Inexact[Array, "..."], b: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """`jax.numpy.matmul` in full precision."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
