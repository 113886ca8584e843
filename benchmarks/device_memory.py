"""How much of a device's memory do the analyses take? The plan of the compiler beside the peak that the device saw.

Each case in a process of its own, for a device counts one peak for a process. A CPU's devices count none: the plan
alone. Jacobians: what an array of all of them would take.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else the first case takes three quarters

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from measure import Rows, in_child, parser, print_rows, save

import bptt_jax as bptt

FULL: dict[str, Any] = {
    "cases": [  # the longest last: a million steps are as many waits for a kernel, many times over
        ("gradient_flow", 256, 4000),
        ("gradient_flow", 1024, 2000),
        ("gradient_flow, num=4", 8192, 100),
        ("adjoints", 128, 100_000),
        ("adjoints, remat", 128, 100_000),
        ("lyapunov_exponents", 256, 4000),
        ("deer", 16, 100_000),
        ("gradient, remat", 128, 1_000_000),
        ("gradient_flow", 64, 1_000_000),
    ],
}
QUICK: dict[str, Any] = {"cases": [(name, 8, 50) for name, *_ in FULL["cases"][2:-1]]}
INPUTS = 8
MB = 1e6


def last(states: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(states[-1]))


def job(name: str, step: bptt.Step, params: Any, state0: Any, xs: jax.Array) -> Any:
    about = step, params, state0, xs
    match name:
        case "gradient_flow":
            return bptt.gradient_flow(*about, last, stride=max(1, len(xs) // 10))
        case "gradient_flow, num=4":
            return bptt.gradient_flow(*about, last, num=4)
        case "adjoints" | "adjoints, remat":
            return bptt.adjoints(*about, last, remat=name.endswith("remat"))
        case "lyapunov_exponents":
            return bptt.lyapunov_exponents(*about)
        case "deer":
            return bptt.deer(*about)
    return jax.grad(lambda p: jnp.sum(jnp.square(bptt.final_state(step, p, state0, xs, remat=True))))(params)


def peak(name: str, hidden: int, length: int) -> dict[str, Any]:
    cell = bptt.rnn(hidden, gain=0.9)
    given = cell.init(jax.random.key(0), INPUTS), cell.initial_state(), jnp.ones((length, INPUTS))
    program = jax.jit(partial(job, name, cell.step)).lower(*given).compile()
    plan: Any = program.memory_analysis()
    device = jax.devices()[0]
    jax.block_until_ready(program(*given))
    seen = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "what": name,
        "D": hidden,
        "T": length,
        "device": device.device_kind,
        "plan_MB": (plan.temp_size_in_bytes + plan.output_size_in_bytes) / MB,
        "peak_MB": seen and seen / MB,
        "jacobians_MB": 4 * length * hidden**2 / MB,
    }


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    rows = Rows(a.out, "device_memory", s)
    for case in s["cases"]:
        rows.measure(partial(in_child, peak), *case)
    print_rows("Plan, results included, and peak, arguments included", rows)
    save(a.out, "device_memory", s, rows.results)
    rows.end()


if __name__ == "__main__":
    main()
