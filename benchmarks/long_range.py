"""Does the horizon that gradient_flow measures before training predict the longest lag that is then learned?

For each recurrence the horizon (how far back a thousandth of the error signal arrives) is measured at its
initialisation, on sequences of the task of 400 steps. Then it is trained, by one and the same recipe and within
5000 updates, to keep the first symbol of T through T - 1 distractors: `random_permutation`, where nothing but the
first step helps. The longest T at which most seeds succeed (less than 1 % wrong of 10,000 fresh sequences) is put
beside the horizon, and beside the horizon of those networks that succeeded there, on sequences of that T: training
may lengthen it. After two lengths in a row at which no seed succeeds, longer ones are not tried. The chrono
initialisations are told the longest length tried, so theirs is made for the test.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from measure import parser, print_table, save, write

import bptt_jax as bptt
from bptt_jax.experiments.loop import init_state, train
from bptt_jax.experiments.network import Network, NetworkParams, network
from bptt_jax.experiments.tasks import random_permutation

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FULL: dict[str, Any] = {
    "hidden": 32,
    "lengths": [5, 10, 20, 40, 80, 160, 320, 640],
    "updates": 5000,
    "chunk": 250,
    "batch": 20,
    "seeds": 3,
    "rate": 2e-3,
    "max_norm": 1.0,
    "horizon_length": 400,
    "horizon_sequences": 8,
}
QUICK = FULL | {"hidden": 16, "lengths": [5], "updates": 250, "seeds": 1, "cells": ["rnn, gain 0.5", "gru"]}


def recurrences(hidden: int, longest: int) -> dict[str, bptt.Cell]:
    """From gradients that die at once to gradients that last."""
    orthogonal, init = jax.nn.initializers.orthogonal(), bptt.cells.initializers
    return {
        "rnn, gain 0.5": bptt.rnn(hidden, gain=0.5),
        "rnn, gain 0.8": bptt.rnn(hidden, gain=0.8),
        "rnn, gain 1": bptt.rnn(hidden),
        "rnn, gain 1.5": bptt.rnn(hidden, gain=1.5),
        "rnn, orthogonal": bptt.rnn(hidden, recurrent_init=orthogonal),
        "irnn": bptt.rnn(hidden, activation=jax.nn.relu, recurrent_init=init.identity()),
        "gru": bptt.gru(hidden),
        "gru, chrono": bptt.gru(hidden, bias_init=init.chrono(longest)),
        "lstm, bias 0": bptt.lstm(hidden, forget_bias=0.0),
        "lstm, bias 1": bptt.lstm(hidden),
        "lstm, bias 3": bptt.lstm(hidden, forget_bias=3.0),
        "lstm, chrono": bptt.lstm(hidden, bias_init=init.chrono(longest)),
    }


def horizons(net: Network, params: NetworkParams, s: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Horizon and growth rate, of every seed and sequence; `params` has a leading axis of seeds."""
    cell = net.cell

    @jax.jit
    def flows(params: NetworkParams) -> bptt.analysis.GradientFlow:
        data = net.task.sample(jax.random.key(1000), s["horizon_sequences"])

        def one(xs: jax.Array, target: jax.Array) -> bptt.analysis.GradientFlow:
            loss = lambda states: net.loss_of_states(states, net.loss_args(params, xs, target))  # noqa: E731
            return bptt.gradient_flow(cell.step, params.cell, cell.initial_state(), xs, loss, stride=xs.shape[0])

        return jax.vmap(one)(*data)

    seeds = range(len(jax.tree.leaves(params)[0]))
    found = [flows(jax.tree.map(lambda a, i=i: a[i], params)) for i in seeds]
    return np.stack([f.horizon for f in found]), np.stack([f.growth_rate for f in found])


def before_training(cell: bptt.Cell, s: dict[str, Any]) -> dict[str, float]:
    """Medians over seeds and sequences."""
    net = network(cell, random_permutation(s["horizon_length"]))
    states = jax.vmap(lambda seed: init_state(net, optax.identity(), seed))(jnp.arange(s["seeds"]))
    found, rates = horizons(net, states.params, s)
    low, middle, high = np.quantile(found, [0.1, 0.5, 0.9], method="inverted_cdf").tolist()
    return {"horizon": middle, "horizon_q10": low, "horizon_q90": high, "growth_rate": float(np.median(rates))}


def learn(cell: bptt.Cell, length: int, s: dict[str, Any]) -> dict[str, Any]:
    """For every seed the number of updates until success, -1 if there was none; the horizon of those that did."""
    net = network(cell, random_permutation(length))
    optimizer = bptt.with_clipping(optax.adam(s["rate"]), s["max_norm"])
    options = {k: s[k] for k in ("updates", "batch", "chunk")}
    states = train(net, optimizer, seeds=range(s["seeds"]), **options).states
    solved_at = np.asarray(states.solved_at)
    middle = None
    if max(solved_at) >= 0:
        after, _ = horizons(net, jax.tree.map(lambda a: a[solved_at >= 0], states.params), s)
        middle = float(np.quantile(after, 0.5, method="inverted_cdf"))
    return {"T": length, "solved_at": solved_at.tolist(), "horizon": middle}


def climb(learned: Callable[[int], dict[str, Any]], lengths: list[int]) -> list[dict[str, Any]]:
    """Shortest first, until two in a row are learned by no seed."""
    tried: list[dict[str, Any]] = []
    for length in lengths:
        tried.append(learned(length))
        if len(tried) > 1 and all(max(t["solved_at"]) < 0 for t in tried[-2:]):
            break
    return tried


def longest_learned(tried: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial of the largest T at which most seeds succeeded; T = 0 if there is none."""
    most = [t for t in tried if 2 * sum(n >= 0 for n in t["solved_at"]) > len(t["solved_at"])]
    return most[-1] if most else {"T": 0, "horizon": None}


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's; ties get their mean rank, pairs with a NaN are left out."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if not np.isnan(a + b)]

    def ranks(values: Sequence[float]) -> np.ndarray:
        a = np.asarray(values)
        return np.array([(a < v).sum() + ((a == v).sum() - 1) / 2 for v in a])

    first, second = zip(*pairs, strict=True)
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def figure(rows: list[dict[str, Any]], s: dict[str, Any]) -> Any:
    fig, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    top, least = 30 * s["lengths"][-1], s["lengths"][0] / 2
    for ax, which in zip(axes, ("before", "after"), strict=True):
        for row in rows:
            x = row["horizon"] if which == "before" else row["horizon_after"]
            if x is None or np.isnan(x):
                continue
            look = "^" if row["longest"] == s["lengths"][-1] else "o"
            ax.plot(min(x, top), max(row["longest"], least), look, color="0.1" if x < top else "0.6", ms=6)
            ax.annotate(row["name"], (min(x, top), max(row["longest"], least)), xytext=(2, 5),
                        textcoords="offset points", fontsize="x-small", rotation=40)  # fmt: skip
        ends = np.array([least, s["lengths"][-1]])
        ax.plot(ends, ends, "k--", lw=0.8, label="longest T learned = horizon")
        ax.plot([], [], "k^", ls="", label="the longest T that was tried")
        ax.plot([], [], "o", color="0.6", ls="", label=f"horizon beyond {top}")
        ax.set(xscale="log", yscale="log", xlim=(least / 2, 4 * top), ylim=(least / 1.3, 3 * s["lengths"][-1]))
        ax.set_xlabel(f"horizon {which} training (steps until a thousandth is left)")
    axes[0].set_ylabel("longest T learned")
    axes[0].legend(frameon=False, fontsize="small")
    fig.suptitle(f"keeping the first of T symbols, {s['hidden']} units")
    return fig


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    rows: list[dict[str, Any]] = []
    for name, cell in recurrences(s["hidden"], s["lengths"][-1]).items():
        if name not in s.get("cells", [name]):
            continue
        tried = climb(partial(learn, cell, s=s), s["lengths"])
        longest = longest_learned(tried)
        row: dict[str, Any] = {"name": name, **before_training(cell, s), "longest": longest["T"]}
        rows.append(row | {"horizon_after": longest["horizon"], "tried": tried})
        print(rows[-1], flush=True)

    def steps(horizon: float | None) -> Any:
        return horizon if horizon is None or not np.isfinite(horizon) else round(horizon)

    print_table(
        f"Keeping the first of T symbols: {s['hidden']} units, Adam {s['rate']}, clip {s['max_norm']}, batch "
        f"{s['batch']}, at most {s['updates']} updates, {s['seeds']} seeds; median updates until success, by T, "
        "and how many seeds succeeded if not all",
        (
            "recurrence",
            "growth rate",
            "horizon",
            *(f"T = {n}" for n in s["lengths"]),
            "longest",
            "horizon of the learned",
        ),
        [
            (
                r["name"],
                r["growth_rate"],
                steps(r["horizon"]),
                *(cell_of(next((t for t in r["tried"] if t["T"] == n), None)) for n in s["lengths"]),
                r["longest"],
                steps(r["horizon_after"]),
            )
            for r in rows
        ],
    )
    correlation = rank_correlation([r["horizon"] for r in rows], [r["longest"] for r in rows])
    ends = [sum(r["longest"] == n for r in rows) for n in (0, s["lengths"][-1])]
    print(f"rank correlation of horizon before training and longest T learned: {correlation:.2f}")
    print(f"({len(rows)} recurrences, of which {ends[0]} learn nothing and {ends[1]} the longest T that was tried)")
    plain = [r for r in rows if "rnn" in r["name"]]
    among = (
        rank_correlation([r["horizon"] for r in plain], [r["longest"] for r in plain]) if len(plain) > 2 else None
    )
    print(f"among those without gates: {among if among is None else round(among, 2)}")
    write(arguments.out / "long_range.png", lambda path: figure(rows, s).savefig(path, dpi=130))
    results = {"rows": rows, "rank_correlation": correlation, "rank_correlation_without_gates": among}
    save(arguments.out, "long_range", s, results)


def cell_of(trial: dict[str, Any] | None) -> str | None:
    """Of the table: the median of the updates until success, and the seeds that had it."""
    if trial is None:
        return None
    solved = [n for n in trial["solved_at"] if n >= 0]
    seeds = len(trial["solved_at"])
    return (
        f"0 of {seeds}"
        if not solved
        else f"{np.median(solved):.0f}" + (f" ({len(solved)} of {seeds})" if len(solved) < seeds else "")
    )


if __name__ == "__main__":
    main()
