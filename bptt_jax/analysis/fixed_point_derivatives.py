"""How do fixed points move with parameters and input? By the implicit function theorem."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax.analysis.fixed_point_search import Map
from bptt_jax.checks import differentiated_by_rule
from bptt_jax.linalg.krylov import least_squares
from bptt_jax.linalg.lapack import solve
from bptt_jax.linalg.precision import matmul, wide
from bptt_jax.recurrence.linearization import Mode, differentiation_mode
from bptt_jax.step import Array, PyTree, Recurrence, differentiable_part, full_precision

_STEPS = 1000  # of conjugate gradients without a matrix


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def attached_to_equation(
    recurrence: Recurrence, others: list[Array], vectors: Array, converged: Array, dense: bool
) -> Array:
    """`vectors`, those that converged with the derivatives of fixed points, the others constant."""
    return differentiated_by_rule(vectors, differentiable_part((recurrence.params, recurrence.instants))[0])


@attached_to_equation.defjvp
def _attached_jvp(dense: bool, primals: PyTree, tangents: PyTree) -> tuple[Array, Array]:
    recurrence, others, _, converged = primals
    vectors = attached_to_equation(*primals, dense)
    moving, merge = differentiable_part((recurrence.params, recurrence.instants))
    changes = differentiable_part((tangents[0].params, tangents[0].instants))[0]
    mode = differentiation_mode(recurrence)
    numbers = jnp.arange(len(vectors), dtype=jnp.int32)
    numbers = jnp.where(converged, numbers, jnp.argmax(converged).astype(jnp.int32))
    # Where none has converged there is no safe one: of a singular matrix, or a NaN, zero times would be NaN. There the
    # system becomes one that can be solved.
    some = jnp.any(converged)
    safe = jnp.where(some, vectors[numbers], 0)

    def moved(moving: PyTree) -> Array:
        params, instants = merge(moving)
        of = Map(replace(recurrence, params=params, instants=instants), others)
        with full_precision():
            return jax.vmap(lambda v, k: of(v, k))(safe, numbers)

    if mode == "forward":
        offsets = jax.jvp(moved, (moving,), (changes,))[1]
    else:
        new, pull = jax.vjp(moved, moving)
        offsets = jax.linear_transpose(pull, new)((changes,))[0]
    of = Map(recurrence, others)
    each = jax.vmap(partial(_solve_dense if dense else _solve_matrix_free, of, mode, some))
    found = each(safe, numbers, wide(offsets))
    return vectors, jnp.where(converged[:, None], found, 0).astype(vectors.dtype)


def _solve_dense(of: Map, mode: Mode, regular: Array, vector: Array, k: Array, offset: Array) -> Array:
    """``(I - J)^-1`` of it; of the identity where it is not `regular`."""
    a = jnp.eye(len(offset), dtype=offset.dtype) - jnp.where(regular, of.jacobian(vector, k, mode), 0)

    def by_lapack(a: Array) -> Callable[[Any, Array], Array]:
        constant = jax.lax.stop_gradient(a)
        return lambda _, b: solve(jnp.concatenate([constant, b[:, None]], axis=1))[0]

    return jax.lax.custom_linear_solve(partial(matmul, a), offset, by_lapack(a), by_lapack(a.T))


def _solve_matrix_free(of: Map, mode: Mode, regular: Array, vector: Array, k: Array, offset: Array) -> Array:
    """As `_solve_dense`, by products with vectors."""
    _, push, _ = of.differential(vector, k, mode)
    steps = min(4 * len(offset), _STEPS)
    tol = 4 * math.sqrt(len(offset)) * float(jnp.finfo(offset.dtype).eps)

    def by_gradients(product: Callable[[Array], Array], b: Array) -> Array:
        def pull(u: Array) -> Array:
            return jax.linear_transpose(product, b)(u)[0]

        return least_squares(product, pull, b, damping=jnp.zeros((), b.dtype), steps=steps, tol=tol)

    return jax.lax.custom_linear_solve(
        lambda v: jnp.where(regular, -push(v), v), offset, by_gradients, by_gradients
    )
