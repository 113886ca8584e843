"""Is what a GPU computes right? What the suite, which runs on a CPU, cannot see.

Every analysis on the default device, jitted and under `vmap`, against the same in float64 on the CPU; products and
spectra at the default precision of the device's products (TF32, where a user has set nothing); each routine for
spectra on matrices that are hard for one; and no call back to Python in any program. On a CPU the same, which then
only shows that the checks work.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import Rows, parser, print_rows, relative_error, save
from pallas_spectra import jacobi_singular_values
from spectra_speed import eigenvalue_error, singular_error

import bptt_jax as bptt
from bptt_jax.linalg.batched_spectra import batched_eigenvalues

FULL: dict[str, Any] = {"hidden": 24, "length": 40, "batch": 3, "sizes": (1, 2, 3, 17, 64, 130), "stack": 96}
QUICK = FULL | {"hidden": 4, "length": 7, "batch": 2, "sizes": (3, 8), "stack": 8}
CELLS = ("rnn", "gru", "lstm")


def loss(states: Any) -> jax.Array:
    return sum(jnp.mean(jnp.square(h[-1])) for h in jax.tree.leaves(states))  # type: ignore[return-value]


def influence(*about: Any) -> jax.Array:
    log_norms = bptt.influence_map(*about).log_norms
    return jnp.where(jnp.isfinite(log_norms), log_norms, 0)


def adjoints(step: bptt.Step, params: Any, state0: Any, xs: Any) -> Any:
    found = bptt.adjoints(step, params, state0, xs, loss)
    return found.loss, found.log_norms, found.params_grad


def flow(step: bptt.Step, params: Any, state0: Any, xs: Any) -> Any:
    found = bptt.gradient_flow(step, params, state0, xs, loss)
    assert found.products is not None
    return found.signal.adjoint_log_norms, found.contributions.log_norms, found.products.log_norms


ANALYSES: dict[str, Callable[..., Any]] = {
    "unroll": bptt.unroll,
    "jacobians": bptt.jacobians,
    "gradient": lambda step, p, h, x: jax.grad(lambda p: loss(bptt.unroll(step, p, h, x)))(p),
    "adjoints": adjoints,
    "gradient_flow": flow,
    # The sum of all depends on no frame to start from, which is drawn, otherwise in each precision.
    "lyapunov_exponents": lambda *a: jnp.sum(bptt.lyapunov_exponents(*a).exponents),
    "lyapunov_exponents, segments": lambda *a: jnp.sum(bptt.lyapunov_exponents(*a, segments=2).exponents),
    "influence_map": influence,
    "leading_singular_values": lambda *a: bptt.analysis.leading_singular_values(*a, num=2).values,
    "deer": lambda *a: bptt.deer(*a).states,
}
LINEAR: dict[str, Callable[[jax.Array], Any]] = {
    "jacobian_product": lambda w: bptt.jacobian_product(w).value,
    "product_log_norms": bptt.product_log_norms,
    "prefix_products": lambda w: bptt.linalg.prefix_products(w).value,
    "singular_values": bptt.singular_values,
    "spectral_norm": bptt.linalg.spectral_norm,
}


def analysis(name: str, kind: str, dtype: str, s: dict[str, Any]) -> dict[str, Any]:
    """With products in full precision, as a user sets them who compares."""
    cell = getattr(bptt.cells, kind)(s["hidden"], dtype=jnp.float64)
    params, state0 = cell.init(jax.random.key(0), 2), cell.initial_state()
    xs = jax.random.normal(jax.random.key(1), (s["batch"], s["length"], 2), jnp.float64)
    run = jax.vmap(partial(ANALYSES[name], cell.step), (None, None, 0))
    with jax.default_device(jax.devices("cpu")[0]):
        exact = jax.jit(run)(*jax.device_put((params, state0, xs), jax.devices("cpu")[0]))
    given = jax.tree.map(lambda a: a.astype(dtype), (params, state0, xs))
    with jax.default_matmul_precision("float32"):
        program = jax.jit(run).lower(*given).compile()
    deviation = relative_error(jax.tree.map(np.asarray, program(*given)), exact)
    return judged(
        f"{name}, {kind}, {dtype}", deviation, {"float32": 2e-3, "float64": 1e-8}[dtype], program.as_text()
    )


def linear(name: str, s: dict[str, Any]) -> dict[str, Any]:
    """At the device's own precision: the package asks for full precision by itself."""
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((s["length"], s["hidden"], s["hidden"])) / np.sqrt(s["hidden"])
    narrow = jnp.asarray(wide, jnp.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        exact = jax.jit(LINEAR[name])(jax.device_put(narrow.astype(jnp.float64), jax.devices("cpu")[0]))
    program = jax.jit(LINEAR[name]).lower(narrow).compile()
    deviation = relative_error(np.asarray(program(narrow)), exact)
    return judged(f"{name}, default precision of products", deviation, 1e-4, program.as_text())


def judged(what: str, deviation: float, limit: float, program: str | None) -> dict[str, Any]:
    callbacks = [
        line.strip()[:100] for line in (program or "").splitlines() if "custom-call" in line and "callback" in line
    ]
    if not deviation < limit or callbacks:
        raise SystemExit(f"{what}: deviates by {deviation}, at most {limit}; calls back: {callbacks}")
    return {"what": what, "deviation": float(deviation), "limit": limit}


def hard(kind: str, size: int, stack: int) -> np.ndarray:
    """``[stack, size, size]``, float32."""
    rng = np.random.default_rng(size)
    random = rng.standard_normal((stack, size, size)) / np.sqrt(size)
    if kind == "jordan":
        random = np.broadcast_to(0.9 * np.eye(size) + np.eye(size, k=1), random.shape)
    elif kind == "low rank":
        random = random[:, :, :1] * random[:, :1]
    elif kind == "equal":
        random = np.broadcast_to(np.eye(size), random.shape)
    elif kind == "zero":
        random = 0 * random
    elif kind == "symmetric":
        random = random + random.swapaxes(1, 2)
    return np.ascontiguousarray(random, np.float32)


KINDS = ("random", "jordan", "low rank", "equal", "zero", "symmetric", "huge", "tiny", "beside NaN")
# The last two of stacks of finite numbers only.
ROUTINES = {
    "singular values": (jax.jit(bptt.singular_values), singular_error),
    "eigenvalues": (jax.jit(bptt.eigenvalues), eigenvalue_error),
    "batched eigenvalues": (jax.jit(batched_eigenvalues), eigenvalue_error),
    "singular values, Pallas": (
        jax.jit(partial(jacobi_singular_values, interpret=jax.default_backend() == "cpu")),
        singular_error,
    ),
}


def spectra(job: str, kind: str, size: int, s: dict[str, Any]) -> dict[str, Any]:
    matrices, scale = hard(kind, size, s["stack"]), {"huge": 1e30, "tiny": 1e-30}.get(kind, 1.0)
    given = matrices * np.float32(scale)
    if kind == "beside NaN":
        given[1] = np.nan
    routine, error = ROUTINES[job]
    found = np.asarray(routine(jnp.asarray(given)))
    rest = np.ones(len(given), bool)
    if kind == "beside NaN":
        assert np.isnan(found[1]).all(), "a NaN is lost"
        rest[1] = False
    zero = not matrices[rest].any()
    worst = np.max(np.abs(found[rest])) if zero else error(found[rest] / scale, matrices[rest])
    # Eigenvalues of a Jordan block err by the N-th root of rounding.
    limit = 2e-5 if error is singular_error else 0.9 if kind == "jordan" else 2e-2
    return judged(f"{job}, {kind}, N = {size}", float(worst), limit, None)


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", None)  # a user's who has set nothing
    cells = CELLS[:1] if a.quick else CELLS
    cases: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(linear, (name,)) for name in LINEAR]
    cases += [(analysis, (name, kind, "float32")) for name in ANALYSES for kind in cells]
    for job in ROUTINES:
        kinds = KINDS if job in ("singular values", "eigenvalues") else KINDS[:-1]
        cases += [(spectra, (job, kind, size)) for size in s["sizes"] for kind in kinds]
    cases += [(analysis, (name, kind, "float64")) for name in ANALYSES for kind in cells]
    rows = Rows(a.out, "gpu_checks", s)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # nearly all the time is compilation
        pending = [(pool.submit(check, *case, s=s), case) for check, case in cases]
        for found, case in pending:
            rows.measure(lambda *_, found=found: found.result(), *case)
    print_rows(f"Largest relative deviations, {jax.devices()[0].device_kind}", rows)
    print(f"{len(rows)} right, {len(rows.failed)} not")
    save(a.out, "gpu_checks", s, rows.results)
    rows.end()


if __name__ == "__main__":
    main()
