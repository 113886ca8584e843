"""What do Lyapunov exponents cost?

Against the QR recursion as one writes it by hand, on the same float32 trajectory, a step that contracts, so that
rounding does not lead it elsewhere: the Jacobian by hand (or, once, by `torch.func.jacrev`), J @ Q, QR at every
step; and, the fair control, "seldom", QR at the very steps at which ours makes one. Compilation is timed apart. One
thread for OpenBLAS, which is faster for all that call it here; for PyTorch one or its default, whichever is faster.
Answers are compared before times.

Segments: all exponents with the steps cut into segments that are worked on side by side, against one piece.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of NumPy: several are slower on small matrices

import jax
import jax.numpy as jnp
import numpy as np
import peers
from measure import Claim, Rows, compiled, parser, print_claims, print_rows, save

import bptt_jax as bptt
from bptt_jax.experiments.timing import interleaved_medians
from bptt_jax.linalg.scattered import scattered

FULL: dict[str, Any] = {
    "cost": {
        "cases": [
            *(("rnn", size, None) for size in (32, 128, 256)),
            ("rnn", 256, 10),
            ("gru", 32, None),
            ("gru", 128, None),
            ("gru, jacrev", 32, None),
        ],
        "steps": 200,
        "repeats": 5,
    },
    "segments": {"sizes": [8, 32], "steps": {"cpu": 20_000, "gpu": 100_000}, "cuts": [16, 256], "repeats": 3},
}
QUICK = FULL | {
    "cost": {"cases": [("rnn", 32, None)], "steps": 100, "repeats": 1},
    "segments": {"sizes": [4], "steps": {"cpu": 1000, "gpu": 1000}, "cuts": [8], "repeats": 1},
}
AIM, PARALLEL_AIM = 3.0, 10.0


def recursions(
    modules: dict[str, Any], name: str, params: Any, xs: Any, frame: Any, when: np.ndarray
) -> dict[str, Callable[[], np.ndarray]]:
    """Of every peer that is installed, with QR when told."""
    cell = name.removesuffix(", jacrev")
    if name != cell:
        torch = modules.get("PyTorch")
        return {"PyTorch": torch.recursion(cell, params, xs, frame, when, jacrev=True)} if torch else {}
    return {peer: module.recursion(cell, params, xs, frame, when) for peer, module in modules.items()}


def cost(modules: dict[str, Any], name: str, size: int, num: int | None, c: dict[str, Any]) -> dict[str, Any]:
    cell = bptt.rnn(size, gain=0.9) if name == "rnn" else bptt.gru(size)
    params, xs = cell.init(jax.random.key(0), 8), 0.3 * jax.random.normal(jax.random.key(1), (c["steps"], 8))

    def exponents(params: Any, xs: Any) -> bptt.analysis.LyapunovSpectrum:
        return bptt.lyapunov_exponents(cell.step, params, cell.initial_state(), xs, num=num)

    ours, compiling = compiled(exponents, params, xs)
    spectrum = ours(params, xs)
    frame = jnp.linalg.qr(scattered((size, num or size), jnp.dtype(jnp.float32)))[0]
    always, seldom = np.ones(c["steps"], bool), np.any(np.asarray(spectrum.growth) != 0, axis=1)
    theirs = recursions(modules, name, params, xs, frame, always)
    fewer = {f"{k}, seldom": run for k, run in recursions(modules, name, params, xs, frame, seldom).items()}
    found = {k: run() for k, run in (theirs | fewer).items()}
    answers = {k: float(np.max(np.abs(a - np.asarray(spectrum.exponents)))) for k, a in found.items()}
    if max(answers.values(), default=0) > 2e-3:
        raise SystemExit(f"{name} {size}: exponents differ from those by hand by {answers}")
    threads = modules["PyTorch"].quickest_threads(theirs["PyTorch"]) if "PyTorch" in theirs else None
    times = interleaved_medians({"ours": lambda: ours(params, xs), **theirs, **fewer}, c["repeats"])
    ratios = {f"{k} / ours": times[k] / times["ours"] if k in times else None
              for k in ("NumPy", "NumPy, seldom", "PyTorch", "PyTorch, seldom")}  # fmt: skip
    return {
        "step": name,
        "D": size,
        "exponents": num or size,
        "QRs": int(seldom.sum()),
        "compiled in s": compiling,
        "us per step": 1e6 * times["ours"] / c["steps"],
        **ratios,
        "difference": f"{max(answers.values(), default=math.nan):.1e}",
        "PyTorch's threads": threads,
    }


def side_by_side(size: int, s: dict[str, Any]) -> list[dict[str, Any]]:
    """All exponents with the steps cut into segments, in parallel over time, against one piece."""
    steps = s["steps"]["cpu" if jax.default_backend() == "cpu" else "gpu"]
    cell = bptt.rnn(size, gain=0.9)
    params, xs = cell.init(jax.random.key(0), 8), 0.3 * jax.random.normal(jax.random.key(1), (steps, 8))

    def exponents(segments: int, params: Any, xs: Any) -> bptt.analysis.LyapunovSpectrum:
        return bptt.lyapunov_exponents(
            cell.step, params, cell.initial_state(), xs, warmup=steps // 100, segments=segments
        )

    runs = {n: partial(compiled(partial(exponents, n), params, xs)[0], params, xs) for n in (1, *s["cuts"])}
    whole = runs[1]()
    off = {n: jnp.abs(runs[n]().exponents - whole.exponents) / whole.standard_errors for n in s["cuts"]}
    wrong = {n: float(jnp.max(o)) for n, o in off.items() if not jnp.max(o) < 0.1}
    if wrong:
        raise SystemExit(f"D = {size}: cut into segments the exponents are off by {wrong} standard errors")
    times = interleaved_medians({str(n): run for n, run in runs.items()}, s["repeats"])
    return [
        {
            "D": size,
            "steps": steps,
            "segments": n,
            "one piece / segments": times["1"] / times[str(n)],
            "off, in standard errors": float(jnp.max(off[n])),
        }
        for n in s["cuts"]
    ]


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    modules, missing = peers.installed({"NumPy": "numpy_lyapunov", "PyTorch": "torch_lyapunov"})
    if missing:
        print(f"not installed: {', '.join(missing)}; those columns are empty")
    costs, by_size = (Rows(arguments.out, f"lyapunov_cost.{part}", s) for part in ("cost", "segments"))
    for size in s["segments"]["sizes"]:
        by_size.measure(partial(side_by_side, s=s["segments"]), size)
    for name, size, num in s["cost"]["cases"]:
        costs.measure(partial(cost, modules, c=s["cost"]), name, size, num)
    cuts = [row for rows in by_size for row in rows]
    print_rows(f"Cost of {s['cost']['steps']} steps, float32; ratios above 1: ours is faster", costs)
    print_rows("All exponents with the steps cut into segments, float32; above 1: faster than in one piece", cuts)
    claims = [
        Claim(
            "Lyapunov exponents",
            f"{r['step']} {r['D']}, {r['exponents']} of them",
            f"{k}, QR at every step",
            r[k],
            AIM,
        )
        for r in costs
        for k in ("NumPy / ours", "PyTorch / ours")
        if r[k] is not None and (k.startswith("PyTorch") or jax.default_backend() == "cpu")
    ]
    if jax.default_backend() != "cpu":
        claims += [
            Claim(
                "Lyapunov exponents",
                f"D = {rows[0]['D']}, {rows[0]['steps']} steps",
                "one piece over segments side by side",
                max(r["one piece / segments"] for r in rows),
                PARALLEL_AIM,
            )
            for rows in by_size
        ]
    print_claims(claims)
    failed = costs.failed | by_size.failed
    save(
        arguments.out,
        "lyapunov_cost",
        s,
        {"cost": costs, "segments": cuts, "failed": failed, "missing": missing},
        claims,
    )
    costs.end()
    by_size.end()


if __name__ == "__main__":
    main()
