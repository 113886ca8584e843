"""How do time and memory grow with the length, the size of the state and the batch?

One function after the other, on a tanh recurrence in float32: T, D and B are doubled with the other two held, and
time and planned memory (of the compiler: intermediate results and what is returned) are fitted by a power law over
the larger half of the sizes, where the leading term shows. Beside each exponent is the theory's, that of the
leading term, which a matrix-vector product (memory-bound) or a batch that fills idle lanes need not have reached.
Batches are `jax.vmap`, weights shared.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from measure import compiled, parser, print_table, save, write

import bptt_jax as bptt
from bptt_jax.experiments.timing import interleaved_medians

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INPUT_SIZE = 8
FULL: dict[str, Any] = {
    "T": [64, 128, 256, 512, 1024, 2048],
    "D": [16, 32, 64, 128, 256],
    "B": [1, 2, 4, 8, 16, 32],
    "held": {"T": 64, "D": 64, "B": 1},
    "repeats": 5,
}
QUICK: dict[str, Any] = FULL | {
    "functions": ["gradient", "jacobians"],
    "T": [16, 32, 64],
    "D": [8, 16, 32],
    "B": [1, 2, 4],
    "repeats": 3,
}


def last(states: jax.Array) -> jax.Array:
    return jnp.sum(states[-1])


def gradient(remat: bool, step: bptt.Step, p: Any, h0: jax.Array, xs: jax.Array) -> Any:
    return jax.grad(lambda p: jnp.sum(bptt.final_state(step, p, h0, xs, remat=remat)))(p)


Run = Callable[[bptt.Step, Any, jax.Array, jax.Array], Any]
FUNCTIONS: dict[str, Run] = {
    "gradient": partial(gradient, False),
    "gradient, remat": partial(gradient, True),
    "adjoints": lambda step, p, h0, xs: bptt.adjoints(step, p, h0, xs, last),
    "jacobians": bptt.jacobians,
    "gradient_flow": lambda step, p, h0, xs: bptt.gradient_flow(step, p, h0, xs, last),
    "lyapunov_exponents": bptt.lyapunov_exponents,
    "leading_singular_values": partial(bptt.analysis.leading_singular_values, num=1),
    "deer": bptt.deer,
}
# Of the leading terms; time, memory. A batch multiplies both by B, what is shared aside.
THEORY: dict[str, dict[str, tuple[float, float]]] = {
    "gradient": {"T": (1, 1), "D": (2, 2)},  # D^2 of memory: the weights' gradient
    "gradient, remat": {"T": (1, 0.5), "D": (2, 2)},
    "adjoints": {"T": (1, 1), "D": (2, 2)},
    "jacobians": {"T": (1, 1), "D": (2, 2)},  # of this cell: W is differentiated once for all steps
    "gradient_flow": {"T": (1, 1), "D": (3, 2)},
    "lyapunov_exponents": {"T": (1, 1), "D": (3, 2)},
    "leading_singular_values": {"T": (1, 1), "D": (2, 1)},
    "deer": {"T": (1, 1), "D": (3, 2)},
}


def prepared(function: Run, length: int, size: int, batch: int) -> tuple[Callable[[], Any], int]:
    cell = bptt.rnn(size, gain=0.8)
    params, h0 = cell.init(jax.random.key(0), INPUT_SIZE), cell.initial_state()
    xs = jax.random.normal(jax.random.key(1), (batch, length, INPUT_SIZE))
    executable, _ = compiled(
        lambda p, h0, xs: jax.vmap(lambda x: function(cell.step, p, h0, x))(xs), params, h0, xs
    )
    plan = executable.memory_analysis()
    return partial(executable, params, h0, xs), plan.temp_size_in_bytes + plan.output_size_in_bytes


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Slope of the larger half in the log-log plane."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def grown(name: str, along: str, s: dict[str, Any]) -> dict[str, Any]:
    runs, memory = {}, []
    for size in s[along]:
        at = s["held"] | {along: size}
        runs[str(size)], planned = prepared(FUNCTIONS[name], at["T"], at["D"], at["B"])
        memory.append(planned)
    seconds = list(interleaved_medians(runs, s["repeats"]).values())
    theory = THEORY[name][along] if along != "B" else (1, 1)
    return {
        "function": name,
        "along": along,
        "sizes": s[along],
        "seconds": seconds,
        "bytes": memory,
        "time": exponent(s[along], seconds),
        "time, theory": theory[0],
        "memory": exponent(s[along], memory),
        "memory, theory": theory[1],
    }


def figure(rows: list[dict[str, Any]]) -> Any:
    fig, axes = plt.subplots(2, 3, figsize=(13, 11), layout="constrained")
    for column, along in enumerate(("T", "D", "B")):
        of_column = [r for r in rows if r["along"] == along]
        for axis, what, values in zip(axes[:, column], ("time", "memory"), ("seconds", "bytes"), strict=True):
            for line, row in enumerate(of_column):
                label = f"{row['function']} {row[what]:.2f} ({row[f'{what}, theory']:g})"
                axis.plot(row["sizes"], row[values], "o-", ms=3, lw=1, color=f"C{line}", label=label)
            axis.set(xlabel={"T": "steps T", "D": "state size D", "B": "sequences B"}[along], yscale="log")
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.2)
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
            axis.legend(**below, frameon=False, fontsize="x-small", title="fitted exponent (theory)")
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("bytes, planned")
    return fig


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    rows = []
    for name in s.get("functions", FUNCTIONS):
        rows += [grown(name, along, s) for along in ("T", "D", "B")]
        print(name, {r["along"]: round(r["time"], 2) for r in rows[-3:]}, flush=True)
    columns = ("function", "along", "time", "time, theory", "memory", "memory, theory")
    held = ", ".join(f"{k} = {v}" for k, v in s["held"].items())
    print_table(f"Fitted exponents; held: {held}", columns, [[r[c] for c in columns] for r in rows])
    write(a.out / "growth.png", lambda path: figure(rows).savefig(path, dpi=130))
    save(a.out, "growth", s, {"rows": rows})


if __name__ == "__main__":
    main()
