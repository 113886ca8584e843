"""How fast are the exact Jacobians of all steps, against PyTorch's and against formulas coded by hand?

Ours is `bptt_jax.jacobians`, which unrolls the cell and differentiates its step. By hand are the closed formulas of
the three cells in JAX, after the same unrolling. PyTorch is `torch.func.vmap` of `jacfwd` and of `jacrev`, on its
own number of threads and on one, of which the fastest counts; it is given the states, so that its loop over time
is not measured, and is held against ours at the same given states (`jacobians_at`, of which `jacobians` is made).
T is such that the Jacobians fill at most 300 MB. Float32; answers are compared before times.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import limits
import peers
from measure import Claim, Rows, compiled, parser, print_claims, print_table, relative_error, save
from peers import closed_jacobians

import bptt_jax as bptt
from bptt_jax.experiments.timing import interleaved_medians
from bptt_jax.recurrence.jacobians import jacobians_at
from bptt_jax.step import prepend

INPUT_SIZE = 16
FULL: dict[str, Any] = {
    "cells": ["rnn", "gru", "lstm"],
    "hidden": [16, 64, 128, 256, 512],
    "length": 1000,
    "bytes": 3e8,
    "repeats": 7,
}
QUICK = FULL | {"hidden": [16, 32], "length": 100, "repeats": 3}
AT_STATES = "ours, states given"
TORCH_AIM, HAND_AIM = 5.0, 1.5
DEVIATION = 1e-4


def measure(name: str, hidden: int, torch_peer: Any, s: dict[str, Any], machine: limits.Machine) -> dict[str, Any]:
    cell = getattr(bptt.cells, name)(hidden)
    k_params, k_xs = jax.random.split(jax.random.key(0))
    params, state0 = cell.init(k_params, INPUT_SIZE), cell.initial_state()
    size = bptt.ravel_state(state0)[0].size
    length = min(s["length"], int(s["bytes"] / (4 * size**2)))
    xs = jax.random.normal(k_xs, (length, INPUT_SIZE))
    jobs = {
        "ours": partial(bptt.jacobians, cell.step),
        "by hand": partial(closed_jacobians.JACOBIANS[name], cell.step),
        AT_STATES: partial(jacobians_at, cell.step, mode="forward"),
    }
    before = prepend(state0, bptt.unroll(cell.step, params, state0, xs))
    runs: dict[str, Callable[[], Any]] = {}
    compile_seconds = {}
    for label, job in jobs.items():
        arguments = params, before if label == AT_STATES else state0, xs
        executable, compile_seconds[label] = compiled(job, *arguments)
        runs[label] = partial(executable, *arguments)
    if torch_peer is not None:
        vectors = jax.vmap(lambda h: bptt.ravel_state(h)[0])(before)
        for mode in torch_peer.MODES:
            runs[f"torch {mode}"] = torch_peer.jacobians(name, mode, params, vectors, xs)
            runs[f"torch {mode}, 1 thread"] = torch_peer.jacobians(name, mode, params, vectors, xs, threads=1)
    expected = runs["ours"]()
    deviations = {label: relative_error(run(), expected) for label, run in runs.items()}
    wrong = {label: e for label, e in deviations.items() if not e < DEVIATION}
    if wrong:
        raise SystemExit(f"{name} {hidden}: these deviate from ours: {wrong}")
    times = interleaved_medians(runs, s["repeats"])
    return {
        "cell": name,
        "N": hidden,
        "T": length,
        "ms": {label: 1e3 * t for label, t in times.items()},
        "ratios": {
            label: t / times[AT_STATES if label.startswith("torch") else "ours"]
            for label, t in times.items()
            if label not in ("ours", AT_STATES)
        },
        "limits": limits.shares(
            partial(bptt.jacobians, cell.step), params, state0, xs, taken=times["ours"], machine=machine
        ),
        "deviations": deviations,
        "compile_seconds": compile_seconds,
    }


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    modules, missing = peers.installed({"torch": "torch_jacobians"})
    machine = limits.measured(a.quick)
    rows = Rows(a.out, "jacobian_speed", s)
    for name in s["cells"]:
        for hidden in s["hidden"]:
            rows.measure(partial(measure, torch_peer=modules.get("torch"), s=s, machine=machine), name, hidden)
    labels = ("by hand", *(f"torch {mode}{n}" for mode in ("jacfwd", "jacrev") for n in ("", ", 1 thread")))
    absent = "no torch" if missing else None
    print_table(
        "Time of the peer over ours, PyTorch's over ours at given states (above 1: ours is faster)",
        ("cell", "N", "T", "ours, ms", f"{AT_STATES}, ms", *labels, "limit"),
        [
            (
                r["cell"],
                r["N"],
                r["T"],
                r["ms"]["ours"],
                r["ms"][AT_STATES],
                *(r["ratios"].get(label, absent) for label in labels),
                limits.named(r["limits"]),
            )
            for r in rows
        ],
    )

    claims = []
    for r in rows:
        claim = partial(Claim, "Jacobians", f"{r['cell']} {r['N']}", limit=limits.named(r["limits"]))
        claims.append(claim("time over by hand", 1 / r["ratios"]["by hand"], HAND_AIM, at_most=True))
        if not missing:
            claims.append(
                claim(
                    "torch.func's time over ours, states given", min(r["ratios"][k] for k in labels[1:]), TORCH_AIM
                )
            )
    print_claims(claims)
    save(
        a.out,
        "jacobian_speed",
        s | {"input_size": INPUT_SIZE, "machine": machine._asdict()},
        rows.results | {"missing": missing},
        claims,
    )
    rows.end()


if __name__ == "__main__":
    main()
