"""When does evaluating a recurrence in parallel over time pay?

1. Answers first: parallel against sequential, values and gradients, in float64.
2. Iterations against the gain of ``s' = W tanh(s)``, beside the largest exponent, what `predict_parallel` says of
   it, and the published counts (Gonzalez et al. 2025, arXiv:2508.16817: mean squared residual below 1e-10).
3. Time against the sequential scan, by length and size, forward and with the gradient, in float32.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from measure import Claim, Rows, compiled, parser, print_claims, print_table, relative_error, save, write

import bptt_jax as bptt
from bptt_jax.experiments.timing import interleaved_medians

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FULL: dict[str, Any] = {
    "answers": ("rnn", "gru", "lstm", "indrnn"),
    "variants": ("full", "scaled", "kalman", "diagonal", "blocks"),
    "size": 100,
    "length": 1000,
    "gains": (0.5, 0.8, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0),
    "networks": 1,
    "most": {"full": 200, "scaled": 100, "kalman": 50, "diagonal": 30, "blocks": 30},
    "cells": ("rnn", "gru"),
    "linear_cells": ("lru", "min_gru"),
    "sizes": (4, 16, 64),
    "lengths": (100, 1000, 10_000, 100_000),
    "most_numbers": 3e7,
    "batches": (("gru", 2, 10_000, 16), ("gru", 16, 10_000, 16)),
    "repeats": 5,
}
QUICK = FULL | {
    "answers": ("gru",),
    "variants": ("full",),
    "size": 20,
    "length": 100,
    "gains": (0.5, 2.0),
    "networks": 1,
    "most": {"full": 20},
    "cells": ("gru",),
    "linear_cells": ("lru",),
    "sizes": (4,),
    "lengths": (100, 500),
    "batches": (),
    "repeats": 3,
}
ON_GPU = FULL | {"sizes": (16,), "lengths": (1000, 10_000, 100_000)}  # a row takes half a minute to compile
PUBLISHED = {0.5: "3", 0.8: "4", 1.0: "5-14", 1.1: "13-21", 1.2: "37", 1.3: "67-91", 1.5: "170-200", 2.0: "> 750"}
GPU_AIM = 68.0  # of the demonstration in DEER's README: gru of 2 units, T = 10,000, batch 16, on a V100
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "scaled": {"damping": "scale"},
    "kalman": {"damping": "kalman"},
    "diagonal": {"jacobian": "diagonal"},
    "blocks": {"jacobian": "blocks"},
}


def network_step(w: jax.Array, s: jax.Array, x: None) -> jax.Array:
    return w @ jnp.tanh(s)


def answers(s: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Largest relative deviation from the sequential evaluation and its gradient, float64, T = 1000; NaN of what says
    that it did not converge."""
    rows = []
    for name in s["answers"]:
        cell = bptt.rnn(16, gain=0.8) if name == "rnn" else getattr(bptt.cells, name)(16)
        params, h0 = cell.init(jax.random.key(0), 2), cell.initial_state()
        xs = jax.random.normal(jax.random.key(1), (1000, 2))

        def total(evaluate: Callable[..., Any], p: Any, cell: bptt.Cell = cell, h0: Any = h0, xs: Any = xs) -> Any:
            states = evaluate(cell.step, p, h0, xs)
            return sum(jnp.mean(jnp.square(h)) for h in jax.tree.leaves(states)), states

        (_, want), gradient = jax.jit(jax.value_and_grad(partial(total, bptt.unroll), has_aux=True))(params)
        for variant in s["variants"]:
            options = VARIANTS[variant]

            def parallel(*args: Any, options: dict[str, Any] = options) -> Any:
                return bptt.deer(*args, **options).states

            (_, states), found = jax.jit(jax.value_and_grad(partial(total, parallel), has_aux=True))(params)
            alone = bptt.deer(cell.step, params, h0, xs, **options)
            off = relative_error(states, want), relative_error(found, gradient)
            rows.append((name, variant, int(alone.iterations), *off))
            if not (max(off) < 1e-9 if alone.converged else math.isnan(off[0])):
                raise SystemExit(f"{name}, {variant}: parallel and sequential evaluation differ by {off}")
    return rows


def by_gain(s: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for gain in s["gains"]:
        for number in range(s["networks"]):
            k_w, k_0, k_guess = jax.random.split(jax.random.key(10 + number), 3)
            weights = gain * jax.random.normal(k_w, (s["size"], s["size"])) / math.sqrt(s["size"])
            uniform = partial(jax.random.uniform, minval=-1.0, maxval=1.0)
            state0, guess = uniform(k_0, (s["size"],)), uniform(k_guess, (s["length"], s["size"]))
            prediction = bptt.predict_parallel(network_step, weights, state0, length=s["length"])
            row: dict[str, Any] = {
                "gain": gain,
                "network": number,
                "exponent": float(prediction.exponent),
                "standard_error": float(prediction.standard_error),
                "predicted": prediction.verdict,
            }
            for variant in s["variants"]:
                found = bptt.deer(
                    network_step, weights, state0, length=s["length"], guess=guess,
                    max_iterations=s["most"][variant], **VARIANTS[variant],
                )  # fmt: skip
                small = np.square(np.asarray(found.residuals)) <= 1e-10
                row[variant] = int(np.argmax(small)) + 1 if small.any() else math.inf
                row[f"{variant}_converged"] = bool(found.converged)
                row[f"{variant}_error"] = float(found.error)
            rows.append(row)
            print(row, flush=True)
    return rows


def recurrence(kind: str, size: int, length: int) -> tuple[Any, ...]:
    cell = {
        "rnn": lambda: bptt.rnn(size, gain=0.8),
        "gru": lambda: bptt.gru(size),
        "lru": lambda: bptt.cells.lru(size, r_min=0.9, r_max=0.999),
        "min_gru": lambda: bptt.cells.min_gru(size),
    }[kind]()
    params = cell.init(jax.random.key(0), 2)
    return cell.step, params, cell.initial_state(), jax.random.normal(jax.random.key(1), (length, 2))


def times(kind: str, size: int, length: int, batch: int, s: dict[str, Any]) -> dict[str, Any]:
    """Time of the sequential evaluation over that of the parallel one: above 1 the parallel one is faster."""
    step, params, h0, xs = recurrence(kind, size, length)
    linear = isinstance(step, (bptt.parallel.DiagonalStep, bptt.parallel.DeltaStep))
    inputs = jax.random.normal(jax.random.key(2), (batch, length, 2)) if batch > 1 else xs

    def parallel(params: Any, xs: Any) -> Any:
        return bptt.unroll_linear(step, params, h0, xs) if linear else bptt.deer(step, params, h0, xs).states

    def sequential(params: Any, xs: Any) -> Any:
        return bptt.unroll(step, params, h0, xs)

    def forward(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        return jax.vmap(evaluate, (None, 0)) if batch > 1 else evaluate

    def gradient(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def loss(params: Any, xs: Any) -> Any:
            return jnp.mean(jnp.square(jnp.abs(forward(evaluate)(params, xs))))

        return jax.grad(loss)

    row: dict[str, Any] = {"cell": kind, "D": h0.size * (2 if jnp.iscomplexobj(h0) else 1), "T": length}
    row |= {"batch": batch, "iterations": None}
    if not linear:
        found = jax.jit(lambda p, x: bptt.deer(step, p, h0, x))(params, xs)
        row["iterations"] = int(found.iterations)
    for name, of in (("forward", forward), ("gradient", gradient)):
        runs, results = {}, {}
        for label, evaluate in (("sequential", sequential), ("parallel", parallel)):
            executable, _ = compiled(of(evaluate), params, inputs)
            runs[label] = partial(executable, params, inputs)
            results[label] = runs[label]()
        error = relative_error(
            jax.tree.map(jnp.abs, results["parallel"]), jax.tree.map(jnp.abs, results["sequential"])
        )
        if not error < 1e-3:
            raise SystemExit(f"{row}: {name} of the parallel evaluation deviates by {error}")
        medians = interleaved_medians(runs, s["repeats"])
        row[name] = medians["sequential"] / medians["parallel"]
        row[f"{name}_error"] = error
    return row


def figure(gains: list[dict[str, Any]], timed: Sequence[dict[str, Any]], s: dict[str, Any]) -> Any:
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.3), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(VARIANTS)}
    for variant in s["variants"]:
        colour, most = colours[variant], s["most"][variant]
        made = [(r["gain"], min(r[variant], most)) for r in gains]
        done = [p for p, r in zip(made, gains, strict=True) if math.isfinite(r[variant])]
        open_ = [p for p, r in zip(made, gains, strict=True) if not math.isfinite(r[variant])]
        left.plot(*zip(*done, strict=True), "o", ms=5, color=colour, label=variant) if done else None
        left.plot(*zip(*open_, strict=True), "^", ms=6, mfc="none", color=colour) if open_ else None
    left.plot([], [], "k^", mfc="none", label=f"not within {', '.join(str(s['most'][v]) for v in s['variants'])}")
    left.set(yscale="log", ylim=(0.9, None), xlabel="gain of the recurrent weights", ylabel="iterations")
    left.legend(frameon=False, loc="lower right", fontsize="small")
    exponents = left.twinx()
    means = [np.mean([r["exponent"] for r in gains if r["gain"] == g]) for g in s["gains"]]
    exponents.plot(s["gains"], means, "k-", lw=1)
    exponents.axhline(0, color="k", lw=0.6, ls=":")
    exponents.set_ylabel("largest exponent (line), nats per step")
    for kind, style in zip((*s["cells"], *s["linear_cells"]), ("-", "--", "-.", ":"), strict=False):
        for size in sorted({r["D"] for r in timed if r["cell"] == kind}):
            line = [
                (r["T"], r["forward"]) for r in timed if r["cell"] == kind and r["D"] == size and r["batch"] == 1
            ]
            if line:
                right.plot(*zip(*line, strict=True), style, marker="o", ms=3, label=f"{kind}, D = {size}")
    right.axhline(1, color="k", lw=0.6)
    device = jax.devices()[0].platform
    right.set(xscale="log", yscale="log", xlabel="T", ylabel=f"sequential time / parallel time ({device})")
    right.legend(frameon=False, fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def timed_rows(out: Path, s: dict[str, Any]) -> Rows:
    # Full Jacobians are what is large: three arrays of them live at a time.
    cases = [
        *s["batches"],
        *(
            (kind, size, length, 1)
            for kind in (*s["cells"], *s["linear_cells"])
            for size in s["sizes"]
            for length in s["lengths"]
            if kind in s["linear_cells"] or length * size**2 <= s["most_numbers"]
        ),
    ]
    rows = Rows(out, "deer", s)
    for case in cases:
        rows.measure(partial(times, s=s), *case)
    print_table(
        "Time of the sequential evaluation over that of the parallel one (above 1: parallel is faster), float32, "
        f"medians of {s['repeats']} or more by turns",
        ("cell", "D", "T", "batch", "iterations", "forward", "with gradient"),
        [tuple(r[k] for k in ("cell", "D", "T", "batch", "iterations", "forward", "gradient")) for r in rows],
    )
    return rows


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--times", action="store_true", help="3 alone")
    arguments = p.parse_args()
    on_gpu = jax.default_backend() == "gpu"
    s = QUICK if arguments.quick else ON_GPU if on_gpu else FULL
    results: dict[str, Any] = {}
    if not arguments.times:
        with jax.enable_x64(True):
            results = {"answers": answers(s), "gains": by_gain(s)}
        print_table(
            "Parallel against sequential, 16 units, T = 1000, float64",
            ("cell", "variant", "iterations", "deviation", "of the gradient"),
            results["answers"],
        )
        print_table(
            f"s' = W tanh(s), D = {s['size']}, T = {s['length']}, float64: iterations until the mean squared residual "
            "is below 1e-10",
            ("gain", "exponent", "predicted", *s["variants"], "published, full (D = 100, T = 1000)", "converged, full"),
            [
                (
                    r["gain"], f"{r['exponent']:.4f} +- {r['standard_error']:.4f}", r["predicted"],
                    *(r[v] if math.isfinite(r[v]) else f"> {s['most'][v]}" for v in s["variants"]),
                    PUBLISHED[r["gain"]], r["full_converged"],
                )
                for r in results["gains"]
            ],
        )  # fmt: skip
    timed = timed_rows(arguments.out, s)
    if not arguments.times:
        write(arguments.out / "deer.png", lambda path: figure(results["gains"], timed, s).savefig(path, dpi=130))
    claims = [
        Claim("DEER", f"{r['cell']} {r['D']}, T = {r['T']}, batch {r['batch']}", "sequential time over ours",
              r["forward"], GPU_AIM)
        for r in timed
        if on_gpu and r["batch"] > 1 and r["D"] == 2
    ]  # fmt: skip
    print_claims(claims)
    save(arguments.out, "deer", s, results | {"times": list(timed), "failed": timed.failed}, claims)
    timed.end()


if __name__ == "__main__":
    main()
