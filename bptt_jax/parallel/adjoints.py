"""The error signal at every step, in parallel over time."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from bptt_jax.checks import check_leaves, check_matrices
from bptt_jax.linalg import logscale
from bptt_jax.linalg.precision import matmul
from bptt_jax.results import Result, field
from bptt_jax.step import PyTree


class ParallelAdjoints(Result):
    """The error signal at every step, from Jacobians that are at hand.

    Attributes:
      adjoints: ``[T, D]``, the total derivatives dL/dh_1 .. dL/dh_T; 0 or inf beyond the range of the dtype.
      log_norms: ``[T]``, natural log of their norms, which holds there too.
      state0_grad: ``[D]``, dL/dh_0.
    """

    adjoints: Float[Array, "T D"] = field(dims=("time", "unit"))
    log_norms: Float[Array, " T"] = field(dims=("time",))
    state0_grad: Float[Array, " D"] = field(dims=("unit",))

    def _headline(self) -> str:
        first, last = float(self.log_norms[0]), float(self.log_norms[-1])
        return f"log ||dL/dh_t|| is {first:.3g} at the first step, {last:.3g} at the last of {self.log_norms.size}"


def parallel_adjoints(jacobians: Array, immediate: Array) -> ParallelAdjoints:
    """``lambda_t = J_{t+1}^T lambda_{t+1} + dl/dh_t`` for all t by associative scan: O(log T) rounds, in log scale.

    For any step whose Jacobians are at hand. It takes some 2 T products of matrices where `adjoints`, one after the
    other, takes T products of a matrix and a vector, so it pays on parallel hardware alone.

    Args:
      jacobians: ``[T, D, D]`` in order of time, as from `bptt_jax.jacobians`: entry k is dh_{k+1}/dh_k.
      immediate: ``[T, D]``, entry k is the immediate derivative dl/dh_{k+1}.

    Returns:
      `ParallelAdjoints`.

    Raises:
      TypeError, ValueError: `jacobians` is no ``[T, D, D]`` array of numbers, or `immediate` does not fit.

    Example:
      >>> only_last = jnp.array([[0.0], [0.0], [1.0]])
      >>> bptt.parallel_adjoints(jnp.full((3, 1, 1), 0.5), only_last).adjoints.ravel()
      Array([0.25, 0.5 , 1.  ], dtype=float32)
    """
    jacobians = check_matrices("jacobians", jacobians, square=True, ndim=3)
    check_leaves("immediate", immediate, keys=False)
    if not jax.tree_util.all_leaves([immediate]):
        raise TypeError(f"immediate: expected an array, got {type(immediate).__name__}")
    given = jnp.result_type(immediate)
    with jax.numpy_dtype_promotion("standard"):
        fits = jnp.promote_types(given, jacobians.dtype) == jacobians.dtype
    if not fits:
        raise TypeError(
            f"immediate: expected {jacobians.dtype}, as the jacobians, got {given}; Jacobians act on real vectors, "
            "as of bptt_jax.ravel_state of the conjugate of a gradient"
        )
    if jnp.shape(immediate) != jacobians.shape[:2]:
        expected, got = list(jacobians.shape[:2]), list(jnp.shape(immediate))
        raise ValueError(f"immediate: expected shape {expected}, as the jacobians, got {got}")
    return _parallel_adjoints(jacobians, jnp.asarray(immediate, jacobians.dtype))


@jax.jit
def _parallel_adjoints(jacobians: Array, immediate: Array) -> ParallelAdjoints:
    # Row k of what is scanned is the map from lambda_{k+1} to lambda_k, in log scale: (matrix, e), (vector, e).
    nothing = jnp.zeros_like(immediate[:1])
    zeros = jnp.zeros(len(jacobians) + 1, jnp.int32)
    start = jnp.zeros_like(jacobians[:1])
    normalize = jax.vmap(logscale.normalize)
    maps = normalize(jnp.concatenate([jacobians.mT, start]), zeros)
    added = normalize(jnp.concatenate([nothing, immediate]), zeros)

    def combine(near: PyTree, far: PyTree) -> PyTree:
        (a, e_a), (b, e_b) = near
        (a_far, e_far), (b_far, e_b_far) = far
        moved = matmul(a_far, b[..., None])[..., 0]
        total = jax.vmap(logscale.add)(moved, e_far + e_b, b_far, e_b_far)
        return normalize(matmul(a_far, a), e_far + e_a), total

    _, (mantissas, exponents) = jax.lax.associative_scan(combine, (maps, added), reverse=True)
    adjoints = jax.vmap(logscale.shift)(mantissas, exponents)
    log_norms = jax.vmap(logscale.log_norm)(mantissas, exponents)
    return ParallelAdjoints(adjoints[1:], log_norms[1:], adjoints[0])
