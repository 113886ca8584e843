"""LAPACK in compiled programs on a CPU: on one thread, and one thread of BLAS.

JAX gives LAPACK a whole stack at a time, and jaxlib 0.10.0 to 0.11.1 shares it out among XLA's own threads: a call
waits there for parts that are queued behind other calls, and where as many wait as there are threads, all wait for
good. A call for one matrix has no parts: one after the other, then. Other versions share nothing out, and take a stack
of small matrices, for which a round of a loop costs as much as LAPACK does, at once. jaxlib takes LAPACK from SciPy,
whose OpenBLAS divides matrices from some hundred rows on among threads of its own: that takes two to four times as
long, and can block as well.
"""

import itertools
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh
from jaxlib.version import __version_info__ as jaxlib_version

from bptt_jax.checks import differentiated_by_rule
from bptt_jax.devices import is_manual

_SWITCH = "BPTT_JAX_BLAS_THREADS"
_SHARED_OUT = (0, 10) <= jaxlib_version < (0, 11, 2)
_SMALL = 32 * 32  # numbers of a matrix; a stack of larger ones would be copied as a whole


def on_one_thread(routine: Callable[[Array], Any], ranks: tuple[int, ...]) -> Callable[[Array], tuple[Array, ...]]:
    """`routine`, of a stack ``[..., M, N]``, as a tuple of arrays; on a CPU by one thread.

    A stack that lies on several devices stays there, each with its own matrices; axes of `jax.vmap` join the stack.
    It has no derivative, and whoever takes one is refused.

    Args:
      routine: one of `jnp.linalg` that takes stacks.
      ranks: of each of its results, for one matrix.
    """

    def of_all(matrices: Array) -> tuple[Array, ...]:
        return tuple(jax.tree.leaves(routine(matrices)))

    def of_each(matrices: Array) -> tuple[Array, ...]:
        *batch, rows, columns = matrices.shape
        small = rows * columns <= _SMALL
        if not batch or (small and not _SHARED_OUT):
            return of_all(matrices)
        found = jax.lax.map(of_all, matrices.reshape(-1, rows, columns))
        return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), found)

    def of_part(matrices: Array) -> tuple[Array, ...]:
        with use_abstract_mesh(AbstractMesh((), ())):  # traced when all is divided already
            return of_each(matrices)

    def partition(mesh: Mesh, given: tuple[Any], wanted: tuple[Any, ...]) -> tuple[Any, ...]:
        along = NamedSharding(mesh, PartitionSpec(*given[0].sharding.spec[:-2]))
        return mesh, of_part, (along,) * len(wanted), (along,)

    axes = iter("cdefgh")
    rule = ", ".join(" ".join(["...", *itertools.islice(axes, rank)]) for rank in ranks)
    in_parts = custom_partitioning(of_each)
    in_parts.def_partition(partition, sharding_rule=f"... a b -> {rule}")

    @custom_vmap
    def compute(matrices: Array) -> tuple[Array, ...]:
        hold_blas_threads()
        matrices = differentiated_by_rule(matrices, matrices)
        # Within a shard_map every device has its own part.
        return jax.lax.platform_dependent(matrices, cpu=of_each if is_manual() else in_parts, default=of_all)

    @compute.def_vmap
    def _(size: int, is_batched: list[bool], matrices: Array) -> tuple[Any, Any]:
        return compute(matrices), (True,) * len(ranks)

    return compute


@cache
def hold_blas_threads() -> None:
    """Holds SciPy's BLAS to one thread, from the first spectrum on and for the whole process.

    NumPy's is another copy, and keeps its threads. Nothing is done where the environment variable
    `BPTT_JAX_BLAS_THREADS` is "keep".

    Raises:
      ValueError: the variable is anything else.
    """
    if (wish := os.environ.get(_SWITCH)) is not None:
        if wish != "keep":
            raise ValueError(f'{_SWITCH}: expected "keep" or no such variable, got {wish!r}')
        return
    from scipy.linalg import cython_lapack  # loads it, that it may be found
    from threadpoolctl import ThreadpoolController  # whose import sets KMP_DUPLICATE_LIB_OK

    found = ThreadpoolController().select(user_api="blas")
    folder = os.sep + cython_lapack.__name__.split(".")[0]
    own = [lib.filepath for lib in found.lib_controllers if folder in lib.filepath]
    (found.select(filepath=own) if own else found).limit(limits=1)


svd = on_one_thread(lambda matrices: jnp.linalg.svd(matrices, full_matrices=False), (2, 1, 2))
eig = on_one_thread(jnp.linalg.eig, (1, 2))
inverse = on_one_thread(jnp.linalg.inv, (2,))


def by_modulus(values: Array) -> Array:
    """The order of eigenvalues ``[..., N]`` by descending modulus.

    Stable, so that conjugate pairs, whose moduli are equal to the last bit, keep LAPACK's order.
    """
    return jnp.argsort(-jnp.abs(values), axis=-1, stable=True)


def _solve_augmented(systems: Array) -> Array:
    return jnp.linalg.solve(systems[..., :-1], systems[..., -1:])[..., 0]


# Of systems ``[A, b]``, ``[..., N, N + 1]``, the solutions ``[..., N]``; not finite where A is singular.
solve = on_one_thread(_solve_augmented, (1,))


def _solve_positive(systems: Array) -> Array:
    factors = jnp.linalg.cholesky(systems[..., :-1], symmetrize_input=False)
    half = jax.lax.linalg.triangular_solve(factors, systems[..., -1:], left_side=True, lower=True)
    return jax.lax.linalg.triangular_solve(factors, half, left_side=True, lower=True, transpose_a=True)[..., 0]


# The same of symmetric positive definite A; NaN where it is not positive definite.
solve_positive = on_one_thread(_solve_positive, (1,))
