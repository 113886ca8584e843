"""Which recurrences learn to add two numbers far apart, and after how many updates do they beat the trivial answer?

The adding problem with the trivial mean squared error of 0.167. The lstm, without and with the chrono
initialisation of its gates' biases (T_max = T), is trained as by Tallec and Ollivier 2018 (arXiv:1804.11188): 128
units, RMSprop with rate 0.001 and decay 0.9, no clipping; their claim is that at T = 200 chrono beats 0.167 within
1000 updates, while the ordinary one stays on the plateau. The gru likewise. The simple networks get clipping to
norm 1; the irnn (identity, relu, small input weights) has the initialisation of Le et al. 2015 (arXiv:1504.00941),
not their recipe: SGD, 100 units; it beats the trivial answer up to T = 300 there. "Below" means on 1000 fresh
sequences, looked at after every 100 updates; the noise of such a mean is 0.007 at the plateau, so 0.15 stands
beside 0.167. "Learned" means less than 1 % of 10,000 off by more than 0.2.
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
from bptt_jax.experiments.network import network
from bptt_jax.experiments.records import Record
from bptt_jax.experiments.tasks import adding

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FULL: dict[str, Any] = {
    "hidden": 128,
    "lengths": [100, 200, 400],
    "cells": ["rnn", "irnn", "gru", "lstm", "lstm, chrono"],
    "updates": 2500,
    "chunk": 100,
    "batch": 50,
    "seeds": 1,
    "rate": 1e-3,
    "decay": 0.9,
    "max_norm": 1.0,
    "beats": 0.15,
}
QUICK = FULL | {"hidden": 16, "lengths": [20], "updates": 200, "cells": ["rnn", "lstm, chrono"]}


def recurrence(name: str, hidden: int, length: int) -> bptt.Cell:
    init = bptt.cells.initializers
    match name:
        case "rnn":
            return bptt.rnn(hidden)
        case "irnn":
            small = jax.nn.initializers.normal(0.001)
            return bptt.rnn(hidden, activation=jax.nn.relu, recurrent_init=init.identity(), input_init=small)
        case "gru":
            return bptt.gru(hidden)
        case "lstm":
            return bptt.lstm(hidden)
        case "lstm, chrono":
            return bptt.lstm(hidden, bias_init=init.chrono(length))
    raise ValueError(name)


def run(name: str, length: int, s: dict[str, Any]) -> dict[str, Any]:
    net = network(recurrence(name, s["hidden"], length), adding(length))
    rmsprop = optax.rmsprop(s["rate"], decay=s["decay"])
    start = time.perf_counter()
    done = train(
        net,
        bptt.with_clipping(rmsprop, s["max_norm"]) if name in ("rnn", "irnn") else rmsprop,
        seeds=range(s["seeds"]),
        **{k: s[k] for k in ("updates", "chunk", "batch")},
    )
    chunks = [r for r in done.records if "event" not in r]
    return {
        "cell": name,
        "T": length,
        "below_trivial_at": [first_below(chunks, i, 0.167) for i in range(s["seeds"])],
        "beats_at": [first_below(chunks, i, s["beats"]) for i in range(s["seeds"])],
        "solved_at": np.asarray(done.states.solved_at).tolist(),
        "updates": [r["updates"] for r in chunks],
        "validation_loss": [r["validation_loss"] for r in chunks],
        "events": done.events,
        "seconds": round(time.perf_counter() - start, 1),
    }


def first_below(chunks: list[Record], seed: int, threshold: float) -> int:
    """Number of updates after which the loss on fresh sequences first was below; -1 if never."""
    for record in chunks:
        loss = record["validation_loss"][seed]
        if loss is not None and float(loss) < threshold:
            return int(record["updates"])
    return -1


def figure(rows: list[dict[str, Any]], s: dict[str, Any]) -> Any:
    fig, axes = plt.subplots(1, len(s["lengths"]), figsize=(4 * len(s["lengths"]) + 1, 3.8), squeeze=False,
                             sharey=True, layout="constrained")  # fmt: skip
    looks = ("-", (0, (6, 2))), ("#000000", "#c8102e", "#3a86c8", "#e09f1f", "#5b3a8c")
    for ax, length in zip(axes[0], s["lengths"], strict=True):
        for i, row in enumerate(r for r in rows if r["T"] == length):
            losses = np.array(row["validation_loss"], dtype=float)  # None, where a seed had stopped, is NaN
            lines = ax.plot(row["updates"], losses, color=looks[1][i], ls=looks[0][i % 2], lw=1.2)
            lines[0].set_label(row["cell"])
        ax.axhline(1 / 6, color="0.5", lw=0.8, ls=":")
        ax.set(yscale="log", ylim=(5e-4, 1), xlabel="updates", title=f"T = {length}")
    axes[0][0].set_ylabel("mean squared error, fresh sequences")
    axes[0][0].legend(frameon=False, fontsize="small")
    return fig


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    rows = []
    for length in s["lengths"]:
        for name in s["cells"]:
            rows.append(run(name, length, s))
            print({k: v for k, v in rows[-1].items() if k not in ("updates", "validation_loss")}, flush=True)
    published = {
        ("lstm, chrono", 200): "below 0.167 within 1000 (Tallec)",
        ("irnn", 100): "beats it up to T = 300 (Le, other recipe)",
        ("irnn", 200): "beats it up to T = 300 (Le, other recipe)",
    }
    print_table(
        f"Adding, {s['hidden']} units, RMSprop {s['rate']}, batch {s['batch']}, at most {s['updates']} updates, "
        f"{s['seeds']} seed(s); a number for each, - if never",
        ("cell", "T", "below 0.167 at", f"below {s['beats']} at", "learned at", "last loss", "published"),
        [
            (
                r["cell"],
                r["T"],
                *(
                    ", ".join(str(n) if n >= 0 else "-" for n in r[k])
                    for k in ("below_trivial_at", "beats_at", "solved_at")
                ),
                ", ".join(f"{last(r, i):.3g}" for i in range(s["seeds"])),
                published.get((r["cell"], r["T"])),
            )
            for r in rows
        ],
    )
    write(arguments.out / "adding.png", lambda path: figure(rows, s).savefig(path, dpi=130))
    save(arguments.out, "adding", s, rows)


def last(row: dict[str, Any], seed: int) -> float:
    """The seed's last loss on fresh sequences."""
    return [float(of[seed]) for of in row["validation_loss"] if of[seed] is not None][-1]


if __name__ == "__main__":
    main()
