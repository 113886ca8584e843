"""Do clipping and Pascanu's regulariser lengthen what a simple recurrent network learns? (Reduced.)

Temporal order as in Pascanu, Mikolov, Bengio 2013 (arXiv:1211.5063, section 4.1.1) and its released code: 50 units,
SGD with rate 0.01, batch 20; without remedy (SGD), with gradients clipped to norm 1 (SGD-C), and with the
regulariser Omega of weight 4 as well (SGD-CR); three initialisations; success means less than 1 % wrong of 10,000
fresh sequences. Reduced: the paper goes to longer sequences, and one of its code's logs to 336,000 updates; here T
is at most 100, and updates are few. A rate of success here is that within these updates, not the paper's.
"""

import time
from typing import Any

import jax
import matplotlib
import numpy as np
import optax
from measure import parser, print_table, save, write

import bptt_jax as bptt
from bptt_jax.experiments.loop import train
from bptt_jax.experiments.network import NetworkParams, network
from bptt_jax.experiments.tasks import Batch, temporal_order

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = ("SGD", "SGD-C", "SGD-CR")
FULL: dict[str, Any] = {
    "hidden": 50,
    "lengths": [20, 50, 100],
    "inits": ["sigmoid", "basic tanh", "smart tanh"],
    "updates": {"20": 40_000, "50": 20_000, "100": 10_000},
    "chunk": 1000,
    "batch": 20,
    "seeds": 5,
    "rate": 0.01,
    "max_norm": 1.0,
    "omega": 4.0,
}
QUICK = FULL | {"lengths": [20], "inits": ["smart tanh"], "updates": {"20": 600}, "chunk": 300, "seeds": 2}


def recurrence(init: str, hidden: int) -> tuple[bptt.Cell, Any]:
    """The cell and the initialiser of its readout."""
    normal = jax.nn.initializers.normal
    match init:
        case "sigmoid":
            wide = normal(0.01)
            return bptt.rnn(hidden, activation=jax.nn.sigmoid, recurrent_init=wide, input_init=wide), wide
        case "basic tanh":
            wide = normal(0.1)
            return bptt.rnn(hidden, recurrent_init=wide, input_init=wide), wide
        case "smart tanh":
            sparse = bptt.cells.initializers.sparse(15, spectral_radius=0.95)
            return bptt.rnn(hidden, recurrent_init=sparse, input_init=normal(0.01)), normal(0.01)
    raise ValueError(f"init: {init!r}")


def run(method: str, init: str, length: int, s: dict[str, Any]) -> dict[str, Any]:
    cell, readout_init = recurrence(init, s["hidden"])
    net = network(cell, temporal_order(length), readout_init=readout_init)
    sgd = optax.sgd(s["rate"])

    def omega(params: NetworkParams, data: Batch) -> jax.Array:
        return s["omega"] * bptt.remedies.omega_penalty(net.omega_terms(params, data), version="code")

    start = time.perf_counter()
    done = train(
        net,
        sgd if method == "SGD" else bptt.with_clipping(sgd, s["max_norm"]),
        penalty=omega if method == "SGD-CR" else None,
        updates=s["updates"][str(length)],
        seeds=range(s["seeds"]),
        batch=s["batch"],
        chunk=s["chunk"],
    )
    chunks = [r for r in done.records if "event" not in r]
    errors = [[r["validation_error"][i] for r in chunks] for i in range(s["seeds"])]
    clipped = [c for r in chunks for c in r["clipped"] or () if c is not None]
    return {
        "init": init,
        "method": method,
        "T": length,
        "solved_at": np.asarray(done.states.solved_at).tolist(),
        "last_error": [[e for e in of_seed if e is not None][-1] for of_seed in errors],
        "clipped": float(np.mean(clipped)) if clipped else None,
        "lost": sum(e["event"] == "lost" for e in done.events),
        "jumps": sum(e["event"] == "jump" for e in done.events),
        "seconds": round(time.perf_counter() - start, 1),
    }


def rate(row: dict[str, Any]) -> float:
    return float(np.mean(np.array(row["solved_at"]) >= 0))


def figure(rows: list[dict[str, Any]], s: dict[str, Any]) -> Any:
    fig, axes = plt.subplots(1, len(s["inits"]), figsize=(3.6 * len(s["inits"]) + 1, 3.4), squeeze=False,
                             sharey=True, layout="constrained")  # fmt: skip
    looks = dict(zip(METHODS, (("o:", "0.55"), ("s--", "0.3"), ("^-", "#c8102e")), strict=True))
    for ax, init in zip(axes[0], s["inits"], strict=True):
        for i, method in enumerate(METHODS):
            of = [r for r in rows if (r["init"], r["method"]) == (init, method)]
            # Side by side, for equal rates would hide each other.
            ax.plot([r["T"] + i - 1 for r in of], [rate(r) for r in of], looks[method][0],
                    color=looks[method][1], label=method)  # fmt: skip
        budgets = [f"{n}\n{s['updates'][str(n)] // 1000}k updates" for n in s["lengths"]]
        ax.set(title=init, xlabel="T", ylim=(-0.08, 1.08), xticks=s["lengths"])
        ax.set_xticklabels(budgets, fontsize="small")
    axes[0][0].set_ylabel(f"share of {s['seeds']} seeds that succeed")
    axes[0][0].legend(frameon=False)
    fig.suptitle("temporal order, reduced: within few updates")
    return fig


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    rows = []
    for length in s["lengths"]:
        for init in s["inits"]:
            for method in METHODS:
                rows.append(run(method, init, length, s))
                print(rows[-1], flush=True)
    print_table(
        f"Temporal order, REDUCED: at most {s['updates']} updates by T, {s['seeds']} seeds;\n"
        "compare the methods at one T, for with T the budget falls too.\n"
        "Published: the rate of success falls with T for SGD, later for SGD-C, latest for SGD-CR.",
        (
            "init",
            "method",
            "T",
            "succeed",
            "of",
            "median updates of these",
            "median error",
            "clipped",
            "chunks with a jump",
            "lost",
        ),
        [
            (
                r["init"],
                r["method"],
                r["T"],
                sum(a >= 0 for a in r["solved_at"]),
                s["seeds"],
                float(np.median([a for a in r["solved_at"] if a >= 0])) if max(r["solved_at"]) >= 0 else None,
                float(np.median(r["last_error"])),
                r["clipped"],
                r["jumps"],
                r["lost"],
            )
            for r in rows
        ],
    )
    write(arguments.out / "temporal_order.png", lambda path: figure(rows, s).savefig(path, dpi=130))
    save(arguments.out, "temporal_order", s, rows)


if __name__ == "__main__":
    main()
