"""Orthonormal rows that span what other rows span, and the factors to these: A = L Q."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from bptt_jax.linalg.lapack import on_one_thread
from bptt_jax.linalg.precision import matmul

ROUNDINGS = 4.0  # of the largest length: what is no longer than that may be zero


@jax.custom_jvp
def orthonormal(frames: Float[Array, "... M N"]) -> tuple[Float[Array, "... M M"], Float[Array, "... M N"]]:
    """A = L Q for real ``[..., M, N]``, M <= N: L ``[..., M, M]`` lower triangular, Q with orthonormal rows.

    In the derivative a row that is lost in the rounding of the others is a constant, but for staying orthogonal.
    """
    q, r = _qr(frames.mT)
    return r.mT, q.mT


_qr = on_one_thread(jnp.linalg.qr, (2, 2))


@orthonormal.defjvp
def _orthonormal_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    # From dA = dL Q + L dQ with a lower triangular dL and an antisymmetric dQ Q^T.
    l, q = orthonormal(*primals)
    lengths = jnp.abs(jnp.diagonal(l, axis1=-2, axis2=-1))
    bound = ROUNDINGS * float(jnp.finfo(l.dtype).eps) * jnp.max(lengths, axis=-1, keepdims=True)
    lost = (lengths <= bound)[..., None]
    safe = jnp.where(lost, jnp.eye(l.shape[-1], dtype=l.dtype), l)
    moved = jnp.where(lost, 0, tangents[0])
    change = jax.lax.linalg.triangular_solve(safe, moved, left_side=True, lower=True)  # L^-1 dA
    inside = matmul(change, q.mT)
    upper = jnp.triu(inside, 1)
    turn = upper - upper.mT
    return (l, q), (matmul(l, inside - turn), change - matmul(inside - turn, q))
