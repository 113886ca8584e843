"""Are singular values and eigenvalues of a stack of matrices faster than by the libraries at hand?

Stacks of random matrices in float32, with the numbers of threads that each library takes by itself: ours against
jitted `jnp.linalg`, NumPy and PyTorch. Before times, answers: largest error relative to the largest singular value
of the matrix, against LAPACK in float64, of the stack and of one whose singular values fall from 1 to 1e-6.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
from measure import Claim, compiled, interleaved_medians, parser, print_claims, print_table, save

import bptt_jax as bptt

FULL: dict[str, Any] = {"sizes": [16, 32, 64, 128, 256, 512], "numbers": 4_000_000, "most": 4000, "repeats": 7}
QUICK: dict[str, Any] = {"sizes": [16, 64], "numbers": 200_000, "most": 400, "repeats": 3}
AIM = 2.0
DEVIATION = {"singular values": 1e-5, "eigenvalues": 1e-3}  # of an eigenvalue: the square root of rounding at worst


def stacks(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """As random recurrent weights have them; and with singular values in geometric progression from 1 to 1e-6."""
    rng = np.random.default_rng(size)
    random = rng.standard_normal((count, size, size)) / np.sqrt(size)
    (u, _), (v, _) = (np.linalg.qr(rng.standard_normal((3, size, size))) for _ in range(2))
    graded = u * np.geomspace(1, 1e-6, size) @ v
    return random.astype(np.float32), graded.astype(np.float32)


def singular_error(found: Any, matrices: np.ndarray) -> float:
    exact = np.linalg.svd(matrices.astype(np.float64), compute_uv=False)
    return float(np.max(np.abs(np.asarray(found) - exact) / exact[:, :1]))


def eigenvalue_error(found: Any, matrices: np.ndarray) -> float:
    """From each exact one to the nearest that was found, and back."""
    wide = matrices.astype(np.float64)
    apart = np.abs(np.asarray(found)[:, :, None] - np.linalg.eigvals(wide)[:, None, :])
    return float(np.max(np.maximum(apart.min(1), apart.min(2)) / np.linalg.norm(wide, 2, (1, 2))[:, None]))


def candidates(matrices: np.ndarray, torch: Any) -> dict[str, dict[str, Callable[[], Any]]]:
    ours: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "singular values": (bptt.singular_values, partial(jnp.linalg.svd, compute_uv=False)),
        "eigenvalues": (bptt.eigenvalues, jnp.linalg.eigvals),
    }
    numpys: dict[str, Callable[..., Any]] = {
        "singular values": partial(np.linalg.svd, compute_uv=False),
        "eigenvalues": np.linalg.eigvals,
    }
    on_device = jnp.asarray(matrices)
    found: dict[str, dict[str, Callable[[], Any]]] = {}
    for job, (mine, theirs) in ours.items():
        found[job] = {
            "ours": partial(compiled(mine, on_device)[0], on_device),
            "jax": partial(compiled(theirs, on_device)[0], on_device),
            "numpy": partial(numpys[job], matrices),
        }
        if torch is not None:
            found[job]["torch"] = getattr(torch, job.replace(" ", "_"))(matrices)
    return found


def measure(size: int, s: dict[str, Any], torch: Any) -> list[dict[str, Any]]:
    matrices, graded = stacks(size, max(4, min(s["most"], s["numbers"] // size**2)))
    rows = []
    small = candidates(graded, torch)
    for job, runs in candidates(matrices[:8], torch).items():
        error = singular_error if job == "singular values" else eigenvalue_error
        errors = {name: error(run(), matrices[:8]) for name, run in runs.items()}
        wrong = {name: e for name, e in errors.items() if not e < DEVIATION[job]}
        if wrong:
            raise SystemExit(f"{job}, N = {size}: relative errors {wrong}")
        rows.append({"job": job, "N": size, "stack": len(matrices), "errors": errors})
        if job == "singular values":
            rows[-1]["small_errors"] = {name: singular_error(run(), graded) for name, run in small[job].items()}
    for row, runs in zip(rows, candidates(matrices, torch).values(), strict=True):
        times = interleaved_medians(runs, s["repeats"])
        row["ms"] = {name: 1e3 * t for name, t in times.items()}
        row["ratios"] = {name: t / times["ours"] for name, t in times.items() if name != "ours"}
    return rows


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    modules, missing = peers.installed({"torch": "torch_spectra"})
    rows = [row for size in s["sizes"] for row in measure(size, s, modules.get("torch"))]
    names = ("jax", "numpy", "torch")
    print_table(
        f"Time of the peer over ours (above 1: ours is faster), float32, {jax.devices()[0].device_kind}",
        ("job", "N", "stack", "ours, ms", *names, "best peer", "error", "of small ones", "best peer's"),
        [
            (
                row["job"], row["N"], row["stack"], row["ms"]["ours"], *(row["ratios"].get(n) for n in names),
                min(row["ratios"].values()), row["errors"]["ours"], row.get("small_errors", {}).get("ours"),
                min((e for n, e in row.get("small_errors", {}).items() if n != "ours"), default=None),
            )
            for row in rows
        ],
    )  # fmt: skip
    claims = [
        Claim(row["job"], f"N = {row['N']}", "best peer's time over ours", min(row["ratios"].values()), AIM)
        for row in rows
    ]
    print_claims(claims)
    save(a.out, "spectra_speed", s, {"rows": rows, "missing": missing}, claims)


if __name__ == "__main__":
    main()
