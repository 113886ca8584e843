"""The error signal at every step, in parallel over time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bptt_jax import devices
from bptt_jax.checks import check_flags, check_leaves, check_matrices
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.results import Result, field
from bptt_jax.step import choose
from bptt_jax.timeline import resets_at_real_steps


class ParallelAdjoints(Result):
    """The error signal at every step, computed from given Jacobians.

    Attributes:
      adjoints: ``[T, D]``, the total derivatives dL/dh_1 .. dL/dh_T; 0 or inf beyond the range of the dtype.
      log_norms: ``[T]``, natural log of their norms, which holds there too.
      state0_grad: ``[D]``, dL/dh_0; zero if the state is reset before the first step.
      reset_state_grad: ``[D]``, the sum of what arrives at the states that steps start from after resets: the
        derivative with respect to what they are reset to. None without `resets`.
    """

    adjoints: Float[Array, "T D"] = field(dims=("time", "unit"))
    log_norms: Float[Array, " T"] = field(dims=("time",))
    state0_grad: Float[Array, " D"] = field(dims=("unit",))
    reset_state_grad: Float[Array, " D"] | None = field(dims=("unit",), default=None)

    def _headline(self) -> str:
        first, last = float(self.log_norms[0]), float(self.log_norms[-1])
        return f"log ||dL/dh_t|| is {first:.3g} at the first step, {last:.3g} at the last of {self.log_norms.size}"


def parallel_adjoints(
    jacobians: Float[Array, "T D D"],
    immediate: Float[Array, "T D"],
    *,
    resets: Bool[Array, " T"] | None = None,
    mask: Bool[Array, " T"] | None = None,
) -> ParallelAdjoints:
    """``lambda_t = J_{t+1}^T lambda_{t+1} + dl/dh_t`` for all t by associative scan: O(log T) rounds, in log scale.

    For any step whose Jacobians are at hand. It takes some 2 T products of matrices where `adjoints`, one after the
    other, takes T products of a matrix and a vector, so it pays on parallel hardware alone.

    Args:
      jacobians: ``[T, D, D]`` in order of time, as from `bptt_jax.jacobians`: entry k is dh_{k+1}/dh_k.
      immediate: ``[T, D]``, entry k is the immediate derivative dl/dh_{k+1}; in padding that with respect to the
        state that is held.
      resets, mask: those of the `bptt_jax.Sequence`. Nothing passes a reset; in padding the Jacobian counts as the
        identity, whatever stands there, and a reset takes place before the next real step.

    Returns:
      `ParallelAdjoints`.

    Raises:
      TypeError, ValueError: `jacobians` is no ``[T, D, D]`` array of numbers, or the others do not fit.

    Example:
      >>> only_last = jnp.array([[0.0], [0.0], [1.0]])
      >>> bptt.parallel.parallel_adjoints(jnp.full((3, 1, 1), 0.5), only_last).adjoints.ravel()
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
    for name, flags in (("resets", resets), ("mask", mask)):
        if flags is not None:
            check_flags(name, flags, len(jacobians))
    return _parallel_adjoints(jacobians, jnp.asarray(immediate, jacobians.dtype), resets, mask)


class _Back(NamedTuple):
    """The map from lambda_k to an earlier one: ``matrix lambda + offset``, or `offset` alone where it `begins`."""

    matrix: LogScaled
    offset: LogScaled
    begins: Array | None


@devices.compiled
def _parallel_adjoints(
    jacobians: Array, immediate: Array, resets: Array | None, mask: Array | None
) -> ParallelAdjoints:
    if mask is not None:
        eye = jnp.eye(jacobians.shape[-1], dtype=jacobians.dtype)
        jacobians = jnp.where(mask[:, None, None], jacobians, eye)
        resets = None if resets is None else resets_at_real_steps(resets, mask)
    # Row k of what is scanned leads from lambda_{k+1} to lambda_k; that at the end from nothing.
    rows = _Back(
        LogScaled.of(jnp.concatenate([jacobians.mT, jnp.zeros_like(jacobians[:1])]), axes=1),
        LogScaled.of(jnp.concatenate([jnp.zeros_like(immediate[:1]), immediate]), axes=1),
        None if resets is None else jnp.append(resets, False),
    )

    def combine(near: _Back, far: _Back) -> _Back:
        matrix, offset = far.matrix @ near.matrix, far.matrix @ near.offset + far.offset
        if near.begins is None or far.begins is None:
            return _Back(matrix, offset, None)
        return _Back(matrix, jax.vmap(choose)(far.begins, far.offset, offset), near.begins | far.begins)

    signal = jax.lax.associative_scan(combine, rows, reverse=True).offset
    adjoints = signal.value
    to_reset = None
    if resets is not None:
        arrived = LogScaled.of(jacobians.mT, axes=1) @ jax.tree.map(lambda a: a[1:], signal)
        to_reset = jnp.sum(arrived.zero_where(~resets).value, axis=0)
    return ParallelAdjoints(adjoints[1:], signal.log_norm[1:], adjoints[0], to_reset)
