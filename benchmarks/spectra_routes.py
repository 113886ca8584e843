"""Which way to singular values and eigenvalues of a stack is the fastest on a GPU, by size and number of matrices?

Every way that there is, in one run: the batched routines of `bptt_jax.linalg` (singular values by the Gram matrix in
float64 and by [[0, A], [A^H, 0]]), `jnp.linalg` with each of its algorithms, one-sided Jacobi with one matrix to a
block (`pallas_spectra.py`), eigenvalues by each of JAX's implementations, and LAPACK on all cores of the host, with the
way there and back. Float32; errors against LAPACK in float64 before times, and whoever errs, or is not
to be had on the platform, is out, with the reason. The last table says which was the fastest: the routes of
`bptt_jax.linalg.spectra` are written from it.
"""

import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a matrix for each core

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import linalg
from measure import Rows, compiled, parser, print_table, save
from pallas_spectra import jacobi_singular_values
from spectra_speed import DEVIATION, eigenvalue_error, singular_error, stacks

from bptt_jax.experiments.timing import interleaved_medians
from bptt_jax.linalg.batched_spectra import batched_eigenvalues, batched_singular_values

FULL: dict[str, Any] = {
    # The sizes and stacks that matter most first: what there is no time for at the end is the least.
    "cases": [
        *((size, count) for count in (256, 4096, 16, 1) for size in (64, 128, 32, 256, 16)),
        *((512, count) for count in (1, 16, 256)),
    ],
    "checked": 16,
    "repeats": 3,
    "slow": 5.0,  # times the fastest: not measured again
    "hopeless": 20.0,  # times the fastest, and over a second: not tried with more or larger matrices
}
QUICK = FULL | {"cases": [(8, 16), (16, 1)], "checked": 2, "repeats": 1}
POOL = ThreadPoolExecutor(os.cpu_count())
JOBS = ("singular values", "eigenvalues")
HOPELESS: list[tuple[str, str, int, int]] = []  # job, way, size and number of matrices at which it was far behind


def embedded(matrices: jax.Array) -> jax.Array:
    with jax.enable_x64(False):
        return batched_singular_values(matrices)


def on_host(
    pool: ThreadPoolExecutor, routine: Callable[[np.ndarray], np.ndarray], matrices: jax.Array
) -> jax.Array:
    """Divided among all cores."""
    parts = np.array_split(np.asarray(matrices), min(len(matrices), os.cpu_count() or 1))
    return jnp.asarray(np.concatenate(list(pool.map(routine, parts))))


def ways(job: str) -> dict[str, Callable[[jax.Array], Any]]:
    if job == "singular values":
        found: dict[str, Callable[[jax.Array], Any]] = {
            "eigvalsh, Gram in float64": batched_singular_values,
            "eigvalsh, embedded": embedded,
        }
        for algorithm in linalg.SvdAlgorithm:
            found[f"svd, {algorithm.value}"] = partial(
                linalg.svd, full_matrices=False, compute_uv=False, algorithm=algorithm
            )
        found["Jacobi, Pallas"] = jacobi_singular_values
        return found
    found = {"batched": batched_eigenvalues}
    for implementation in linalg.EigImplementation:
        found[f"eig, {implementation.value}"] = partial(of_eig, implementation)
    return found


def of_eig(implementation: Any, matrices: jax.Array) -> jax.Array:
    options = {"compute_left_eigenvectors": False, "compute_right_eigenvectors": False}
    return linalg.eig(matrices, implementation=implementation, **options)[0]


def attempt(function: Callable[[Any], Any], given: Any) -> Any:
    """``function(given)``, or in one line why not: no memory for it, say."""
    try:
        return function(given)
    except Exception as reason:
        return f"{type(reason).__name__}: {reason}".splitlines()[0][:200]


def timed(run: Callable[[], Any]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    found = np.asarray(run())
    return time.perf_counter() - start, found


def measure(job: str, size: int, count: int, s: dict[str, Any]) -> dict[str, Any]:
    matrices = jnp.asarray(stacks(size, count, 1)[0])
    checked = np.asarray(matrices[: s["checked"]])
    error = singular_error if job == "singular values" else eigenvalue_error
    routine: Any = partial(np.linalg.svd, compute_uv=False) if job == "singular values" else np.linalg.eigvals
    out: dict[str, str] = {}
    late = {name for of, name, n, many in HOPELESS if of == job and n <= size and many <= count}
    out |= dict.fromkeys(late, "far behind with fewer or smaller matrices")
    tried = {name: way for name, way in ways(job).items() if name not in late}
    # All at once: a way that is not for this platform, or not built into this jaxlib, says so here.
    built = POOL.map(partial(attempt, lambda way: partial(compiled(way, matrices)[0], matrices)), tried.values())
    runs: dict[str, Any] = {"host": partial(on_host, POOL, routine, matrices)} | dict(
        zip(tried, built, strict=True)
    )
    errors: dict[str, float] = {}
    first: dict[str, float] = {}
    for name, run in list(runs.items()):
        found = run if isinstance(run, str) else attempt(timed, run)
        if not isinstance(found, str):
            first[name], values = found
            errors[name] = error(values[: s["checked"]], checked)
        if isinstance(found, str) or not errors[name] < DEVIATION[job]:
            out[name] = found if isinstance(found, str) else f"errs by {errors[name]}"
            del runs[name]
    quick = {name: run for name, run in runs.items() if first[name] < s["slow"] * min(first[n] for n in runs)}
    times = {name: first[name] for name in runs} | interleaved_medians(quick, s["repeats"], at_least=0.3)
    behind = max(1.0, s["hopeless"] * min(times.values()))
    HOPELESS.extend((job, name, size, count) for name, t in times.items() if t > behind and name != "host")
    return {
        "job": job,
        "N": size,
        "matrices": count,
        "ms": {name: 1e3 * t for name, t in times.items()},
        "errors": errors,
        "out": out,
        "fastest": min(times, key=lambda name: times[name]),
    }


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    jax.config.update("jax_enable_x64", True)
    rows = Rows(a.out, "spectra_routes", s)
    for size, count in s["cases"]:
        for job in JOBS:
            rows.measure(partial(measure, s=s), job, size, count)
    for job in JOBS:
        of_job = [r for r in rows if r["job"] == job]
        names = list(dict.fromkeys(name for r in of_job for name in r["ms"]))
        print_table(
            f"{job}, milliseconds, float32, {jax.devices()[0].device_kind}; -: not to be had there",
            ("N", "matrices", *names, "fastest"),
            [(r["N"], r["matrices"], *(r["ms"].get(n) for n in names), r["fastest"]) for r in of_job],
        )
        for name, reason in {name: reason for r in of_job for name, reason in r["out"].items()}.items():
            print(f"{name}: {reason}")
    save(a.out, "spectra_routes", s, rows.results)
    rows.end()


if __name__ == "__main__":
    main()
