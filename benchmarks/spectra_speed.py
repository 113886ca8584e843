"""Are singular values, spectral norms and eigenvalues of a stack of matrices faster than by the libraries at hand?

Stacks of random matrices in float32. On a CPU, with the numbers of threads that each library takes by itself: ours
against jitted `jnp.linalg`, NumPy and PyTorch, whole stacks and few matrices. On a GPU, against `jnp.linalg` alone,
256 matrices, and no norms, which are singular values there. Medians with their quartiles, since times may have two
modes (JAX 0.10.0 to 0.11.1 divides a stack among threads that may turn out to be one). Before times, answers: largest
error relative to the largest singular value of the matrix, against LAPACK in float64, of the stack and of one whose
singular values fall from 1 to 1e-6.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import limits
import numpy as np
import peers
from measure import Claim, compiled, parser, print_claims, print_table, save

import bptt_jax as bptt
from bptt_jax.experiments.timing import interleaved

# `checked`: matrices whose answers are compared; on a GPU enough of them to be computed as the whole stack is.
FULL: dict[str, dict[str, Any]] = {
    "cpu": {
        "sizes": [4, 16, 32, 64, 128, 256, 512], "numbers": 4_000_000, "most": 4000, "few": 40, "repeats": 7,
        "checked": 8, "peers": ["jax", "numpy", "torch"], "aim": 2.0,
        "jobs": ["singular values", "spectral norms", "eigenvalues"],
    },
    "gpu": {
        "sizes": [64, 128, 256], "numbers": 256 * 256**2, "most": 256, "few": 0, "repeats": 1,
        "checked": 64, "peers": ["jax"], "aim": 10.0, "jobs": ["singular values", "eigenvalues"],
    },
}  # fmt: skip
QUICK: dict[str, dict[str, Any]] = {
    "cpu": FULL["cpu"] | {"sizes": [16, 64], "numbers": 200_000, "most": 400, "few": 8, "repeats": 3},
    "gpu": FULL["gpu"] | {"sizes": [64], "most": 64},
}
# For a matrix of N rows over N^3 (Golub and Van Loan, Matrix Computations, 4th edition, 7.5.6 and 8.6.4).
OPERATIONS = {"singular values": 8 / 3, "spectral norms": 1 + 4 / 3, "eigenvalues": 10.0}
# Of an eigenvalue: the square root of rounding at worst.
DEVIATION = {"singular values": 1e-5, "spectral norms": 1e-5, "eigenvalues": 1e-3}


def stacks(size: int, count: int, checked: int) -> tuple[np.ndarray, np.ndarray]:
    """As random recurrent weights have them; and with singular values in geometric progression from 1 to 1e-6."""
    rng = np.random.default_rng(size)
    random = rng.standard_normal((count, size, size)) / np.sqrt(size)
    (u, _), (v, _) = (np.linalg.qr(rng.standard_normal((checked, size, size))) for _ in range(2))
    graded = u * np.geomspace(1, 1e-6, size) @ v
    return random.astype(np.float32), graded.astype(np.float32)


def singular_error(found: Any, matrices: np.ndarray) -> float:
    """Of the largest, or of all."""
    exact = np.linalg.svd(matrices.astype(np.float64), compute_uv=False)
    values = np.asarray(found).reshape(len(matrices), -1)
    return float(np.max(np.abs(values - exact[:, : values.shape[1]]) / exact[:, :1]))


def eigenvalue_error(found: Any, matrices: np.ndarray) -> float:
    """From each exact one to the nearest that was found, and back."""
    wide = matrices.astype(np.float64)
    apart = np.abs(np.asarray(found)[:, :, None] - np.linalg.eigvals(wide)[:, None, :])
    return float(np.max(np.maximum(apart.min(1), apart.min(2)) / np.linalg.norm(wide, 2, (1, 2))[:, None]))


def candidates(matrices: np.ndarray, s: dict[str, Any], torch: Any) -> dict[str, dict[str, Callable[[], Any]]]:
    on_device = jnp.asarray(matrices)
    norm = {"ord": 2, "axis": (-2, -1)}
    jitted: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "singular values": (bptt.singular_values, partial(jnp.linalg.svd, compute_uv=False)),
        "spectral norms": (bptt.linalg.spectral_norm, partial(jnp.linalg.norm, **norm)),
        "eigenvalues": (bptt.eigenvalues, jnp.linalg.eigvals),
    }
    numpys: dict[str, Callable[..., Any]] = {
        "singular values": partial(np.linalg.svd, compute_uv=False),
        "spectral norms": partial(np.linalg.norm, **norm),
        "eigenvalues": np.linalg.eigvals,
    }
    found: dict[str, dict[str, Callable[[], Any]]] = {}
    for job in s["jobs"]:
        mine, theirs = jitted[job]
        found[job] = {
            "ours": partial(compiled(mine, on_device)[0], on_device),
            "jax": partial(compiled(theirs, on_device)[0], on_device),
        }
        if "numpy" in s["peers"]:
            found[job]["numpy"] = partial(numpys[job], matrices)
        if "torch" in s["peers"] and torch is not None:
            found[job]["torch"] = getattr(torch, job.replace(" ", "_"))(matrices)
    return found


def measure(size: int, s: dict[str, Any], torch: Any, machine: limits.Machine) -> list[dict[str, Any]]:
    count, checked = max(4, min(s["most"], s["numbers"] // size**2)), s["checked"]
    matrices, graded = stacks(size, count, checked)
    rows = []
    small = candidates(graded, s, torch)
    for job, runs in candidates(matrices[:checked], s, torch).items():
        error = eigenvalue_error if job == "eigenvalues" else singular_error
        errors = {name: error(run(), matrices[:checked]) for name, run in runs.items()}
        wrong = {name: e for name, e in errors.items() if not e < DEVIATION[job]}
        if wrong:
            raise SystemExit(f"{job}, N = {size}: relative errors {wrong}")
        rows.append({"job": job, "N": size, "errors": errors})
        if job == "singular values":
            rows[-1]["small_errors"] = {name: singular_error(run(), graded) for name, run in small[job].items()}
    stacks_of = [matrices, *([matrices[: s["few"]]] if 0 < s["few"] < count else [])]
    found = [largest_that_fits(stack, partial(times_of, s=s, torch=torch)) for stack in stacks_of]
    return [row | timed(row, fitted, times[row["job"]], machine) for fitted, times in found for row in rows]


def timed(
    row: dict[str, Any], stack: int, seconds: dict[str, list[float]], machine: limits.Machine
) -> dict[str, Any]:
    quartiles = {name: np.quantile(1e3 * np.asarray(t), (0.25, 0.5, 0.75)).tolist() for name, t in seconds.items()}
    ms = {name: q[1] for name, q in quartiles.items()}
    ratios = {name: t / ms["ours"] for name, t in ms.items() if name != "ours"}
    size, taken = row["N"], ms["ours"] / 1e3
    shares = {
        "flops": OPERATIONS[row["job"]] * stack * size**3 / machine.flops / taken,
        "bytes": 4 * stack * size**2 / machine.bytes / taken,
    }
    return {"stack": stack, "ms": ms, "quartiles_ms": quartiles, "ratios": ratios, "limits": shares}


def times_of(matrices: np.ndarray, s: dict[str, Any], torch: Any) -> dict[str, dict[str, list[float]]]:
    runs = candidates(matrices, s, torch)
    return {job: interleaved(of_job, s["repeats"], 2.0) for job, of_job in runs.items()}


def largest_that_fits(matrices: np.ndarray, run: Callable[[np.ndarray], Any]) -> tuple[int, Any]:
    """Of the stack, halved until the device has memory for it: how many matrices, and ``run`` of them."""
    try:
        return len(matrices), run(matrices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or len(matrices) < 2:
            raise
    return largest_that_fits(matrices[: len(matrices) // 2], run)


def spread(row: dict[str, Any], name: str) -> str:
    low, _, high = row["quartiles_ms"][name]
    return f"{low:.3g} to {high:.3g}"


def main() -> None:
    a = parser(__doc__).parse_args()
    platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    s = (QUICK if a.quick else FULL)[platform]
    modules, missing = peers.installed({"torch": "torch_spectra"} if "torch" in s["peers"] else {})
    machine = limits.measured(a.quick)
    rows = [row for size in s["sizes"] for row in measure(size, s, modules.get("torch"), machine)]
    print_table(
        f"Time of the peer over ours (above 1: ours is faster), float32, {jax.devices()[0].device_kind}",
        (
            "job", "N", "stack", "ours, ms", "quartiles", *s["peers"], "best peer", "its quartiles", "error",
            "of small ones", "best peer's",
        ),
        [
            (
                row["job"], row["N"], row["stack"], row["ms"]["ours"], spread(row, "ours"),
                *(row["ratios"].get(n) for n in s["peers"]),
                min(row["ratios"].values()), spread(row, min(row["ratios"], key=lambda n: row["ratios"][n])),
                row["errors"]["ours"], row.get("small_errors", {}).get("ours"),
                min((e for n, e in row.get("small_errors", {}).items() if n != "ours"), default=None),
            )
            for row in rows
        ],
    )  # fmt: skip
    claims = [
        Claim(
            row["job"],
            f"N = {row['N']}, {row['stack']} matrices",
            "best peer's time over ours",
            min(row["ratios"].values()),
            s["aim"],
            limit=limits.named(row["limits"]),
        )
        for row in rows
    ]
    print_claims(claims)
    save(a.out, "spectra_speed", s | {"machine": machine._asdict()}, {"rows": rows, "missing": missing}, claims)


if __name__ == "__main__":
    main()
