"""How long does the first answer take, beside that of `jax.value_and_grad` of the same unroll?

Every analysis, on the same gru, is traced, lowered, compiled and called twice, anew in each round (a new step, so that
nothing is reused), by turns with `jax.value_and_grad`. What counts is the time of the compiler, over that of
`value_and_grad`'s: medians, wall time, and processor time, which a busy machine disturbs less. Equations: of the
jaxpr, loops' bodies once; which is what is compiled.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from measure import Claim, parser, print_claims, print_table, save

import bptt_jax as bptt

FULL: dict[str, Any] = {"hidden": 64, "length": 200, "batch": 8, "repeats": 5}
QUICK: dict[str, Any] = {"hidden": 4, "length": 10, "batch": 2, "repeats": 1}
INPUTS = 8
BASE = "value_and_grad"


def last(states: Any) -> jax.Array:
    return jnp.sum(jnp.square(states[-1]))


def value_and_grad(step: bptt.Step, params: Any, state0: Any, xs: Any) -> Any:
    return jax.value_and_grad(lambda p: last(bptt.unroll(step, p, state0, xs)))(params)


def measured(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda *about: function(*about, loss=last, **options)


def of_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda step, params, state0, xs: jax.vmap(partial(function, step), (None, None, 0))(params, state0, xs)


JOBS: dict[str, Callable[..., Any]] = {
    BASE: value_and_grad,
    "unroll": bptt.unroll,
    "final_state, remat": partial(bptt.final_state, remat=True),
    "jacobians": bptt.jacobians,
    "adjoints": measured(bptt.adjoints),
    "temporal_contributions": measured(bptt.temporal_contributions),
    "gradient_flow": measured(bptt.gradient_flow),
    "gradient_flow, spectra=False": measured(bptt.gradient_flow, spectra=False),
    "gradient_flow, num=2": measured(bptt.gradient_flow, num=2),
    "gradient_flow of a batch": of_batch(measured(bptt.gradient_flow)),
    "lyapunov_exponents": bptt.lyapunov_exponents,
    "influence_map": bptt.influence_map,
    "deer": bptt.deer,
    "predict_parallel": bptt.predict_parallel,
    "leading_singular_values": partial(bptt.analysis.leading_singular_values, num=2),
    "leading_eigenvalues": partial(bptt.analysis.leading_eigenvalues, num=2),
    "product_singular_values": partial(bptt.analysis.product_singular_values, num=2),
}
AIMS = {
    "adjoints": 1.6,
    "lyapunov_exponents": 2.0,
    "deer": 4.0,
    "gradient_flow": 4.5,
    "gradient_flow of a batch": 5.5,
    "gradient_flow, num=2": 7.0,
}
STAGES = ("trace", "lower", "compile", "first call", "second call")


def once(name: str, s: dict[str, Any]) -> dict[str, float]:
    """Seconds of each stage, and of the processor for the compilation."""
    cell = bptt.gru(s["hidden"])
    params, state0 = cell.init(jax.random.key(0), INPUTS), cell.initial_state()
    shape = (s["batch"],) if name.endswith("batch") else ()
    xs = jax.random.normal(jax.random.key(1), (*shape, s["length"], INPUTS))

    def anew(params: Any, state: Any, x: Any) -> Any:
        return cell.step(params, state, x)

    times = [time.perf_counter()]

    def tick() -> None:
        times.append(time.perf_counter())

    traced = jax.jit(partial(JOBS[name], anew)).trace(params, state0, xs)
    tick()
    lowered = traced.lower()
    tick()
    processor = time.process_time()
    program = lowered.compile()
    processor = time.process_time() - processor
    tick()
    for _ in range(2):
        jax.block_until_ready(program(params, state0, xs))
        tick()
    stages = dict(zip(STAGES, (b - a for a, b in pairwise(times)), strict=True))
    return stages | {"processor": processor, "equations": float(equations(traced.jaxpr.jaxpr))}


def equations(jaxpr: Any) -> int:
    count = 0
    for eqn in jaxpr.eqns:
        inner = [equations(sub) for sub in jaxprs_in_params(eqn.params)]
        count += sum(inner) or 1
    return count


def medians(rounds: list[dict[str, float]]) -> dict[str, Any]:
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    once(BASE, s)  # what only the first compilation of a process waits for
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in JOBS}
    for _ in range(s["repeats"]):
        for name in JOBS:
            seen[name].append(once(name, s))
    rows = {name: medians(rounds) for name, rounds in seen.items()}
    for row in rows.values():
        row |= {f"{key} ratio": row[key] / rows[BASE][key] for key in ("compile", "processor", "equations")}
    print_table(
        f"Seconds, gru of {s['hidden']}, T = {s['length']}; ratios are of the compilation over {BASE}'s: of wall time, "
        "of the processor's, of equations",
        ("what", *STAGES, "wall", "processor", "equations", "aim"),
        [
            (name, *(r[k] for k in STAGES), *(r[f"{k} ratio"] for k in ("compile", "processor", "equations")),
             AIMS.get(name))
            for name, r in rows.items()
        ],
    )  # fmt: skip
    claims = [
        Claim("compilation", name, f"over that of {BASE}", rows[name]["compile ratio"], aim, True)
        for name, aim in AIMS.items()
    ]
    print_claims(claims)
    save(a.out, "compile_time", s, rows, claims)


if __name__ == "__main__":
    main()
