"""Does the horizon that gradient_flow measures before training predict the longest lag that training bridges?

For each recurrence the horizon (how far back a thousandth of the error signal arrives) is measured at its
initialisation, on the task's own sequences. Then it is trained, by one and the same recipe, to keep the first
symbol of T through T - 1 distractors: `random_permutation`, where nothing but the first step helps. The longest T
at which most seeds succeed (less than 1 % wrong of 10,000 fresh sequences) is put beside the horizon. After two
lengths in a row at which no seed succeeds, longer ones are not tried.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from measure import parser, print_table, save, write

import bptt_jax as bptt
from bptt_jax.training.loop import train
from bptt_jax.training.network import network
from bptt_jax.training.tasks import random_permutation

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FULL: dict[str, Any] = {
    "hidden": 32,
    "lengths": [5, 10, 20, 40, 80, 160, 320],
    "updates": 5000,
    "chunk": 250,
    "batch": 20,
    "seeds": 3,
    "rate": 2e-3,
    "max_norm": 1.0,
    "horizon_length": 400,
    "horizon_sequences": 8,
}
QUICK = FULL | {"hidden": 16, "lengths": [5, 10], "updates": 250, "cells": ["rnn, gain 0.5", "gru"]}


def recurrences(hidden: int, longest: int) -> dict[str, bptt.Cell]:
    """From gradients that die at once to gradients that last."""
    orthogonal, init = jax.nn.initializers.orthogonal(), bptt.initializers
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


def measure_horizon(cell: bptt.Cell, s: dict[str, Any]) -> dict[str, float]:
    """Medians over seeds and sequences, at initialisation."""
    net = network(cell, random_permutation(s["horizon_length"]))

    @jax.jit
    def flows(seed: jax.Array) -> bptt.GradientFlow:
        params = net.init(jax.random.key(seed))
        data = net.task.sample(jax.random.key(seed + 1000), s["horizon_sequences"])

        def one(xs: jax.Array, target: jax.Array) -> bptt.GradientFlow:
            loss = net.loss_of_states(params, target)
            return bptt.gradient_flow(cell.step, params.cell, cell.initial_state(), xs, loss, stride=xs.shape[0])

        return jax.vmap(one)(*data)

    found = [flows(jnp.int32(seed)) for seed in range(s["seeds"])]
    horizons, rates = (np.stack([np.asarray(getattr(f, k)) for f in found]) for k in ("horizon", "growth_rate"))
    low, middle, high = np.quantile(horizons, [0.1, 0.5, 0.9], method="inverted_cdf").tolist()
    return {"horizon": middle, "horizon_q10": low, "horizon_q90": high, "growth_rate": float(np.median(rates))}


def learn(cell: bptt.Cell, length: int, s: dict[str, Any]) -> list[int]:
    """For every seed the number of updates until success; -1 if there was none."""
    net = network(cell, random_permutation(length))
    optimizer = bptt.clipped(optax.adam(s["rate"]), s["max_norm"])
    options = {k: s[k] for k in ("updates", "batch", "chunk")}
    return np.asarray(train(net, optimizer, seeds=range(s["seeds"]), **options).states.solved_at).tolist()


def climb(learned: Callable[[int], list[int]], lengths: list[int]) -> dict[int, list[int]]:
    """Updates until success by length, shortest first, until two in a row have none."""
    tried: dict[int, list[int]] = {}
    for length in lengths:
        tried[length] = learned(length)
        if len(tried) > 1 and all(max(tried[n]) < 0 for n in list(tried)[-2:]):
            break
    return tried


def longest_learned(tried: dict[int, list[int]]) -> int:
    """The largest T at which most seeds succeeded; 0 if none."""
    return max((n for n, at in tried.items() if 2 * sum(a >= 0 for a in at) > len(at)), default=0)


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's; ties get their mean rank."""

    def ranks(values: list[float]) -> np.ndarray:
        a = np.asarray(values)
        return np.array([(a < v).sum() + ((a == v).sum() - 1) / 2 for v in a])

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def figure(rows: list[dict[str, Any]], s: dict[str, Any]) -> Any:
    fig, ax = plt.subplots(figsize=(7.5, 5.2), layout="constrained")
    top = 30 * s["lengths"][-1]
    for row in rows:
        x = min(row["horizon"], top)
        y = max(row["longest"], s["lengths"][0] / 2)
        ax.errorbar(
            x, y, xerr=[[x - min(row["horizon_q10"], x)], [max(min(row["horizon_q90"], top), x) - x]],
            fmt="^" if row["longest"] == s["lengths"][-1] else "o", color="0.1", ecolor="0.6", ms=6, capsize=2,
        )  # fmt: skip
        ax.annotate(row["name"], (x, y), xytext=(6, 5), textcoords="offset points", fontsize="small")
    ends = np.array([s["lengths"][0] / 2, s["lengths"][-1]])
    ax.plot(ends, ends, "k--", lw=0.8, label="longest T learned = horizon")
    ax.set(
        xscale="log", yscale="log", xlabel="horizon at initialisation (steps until a thousandth is left)",
        ylabel="longest T learned", title=f"keeping the first of T symbols, {s['hidden']} units",
    )  # fmt: skip
    ax.plot([], [], "k^", ls="", label="the longest T that was tried")
    ax.legend(frameon=False)
    return fig


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    rows: list[dict[str, Any]] = []
    for name, cell in recurrences(s["hidden"], s["lengths"][-1]).items():
        if name not in s.get("cells", [name]):
            continue
        tried = climb(partial(learn, cell, s=s), s["lengths"])
        row: dict[str, Any] = {
            "name": name,
            **measure_horizon(cell, s),
            "longest": longest_learned(tried),
            "solved_at": tried,
        }
        print(row, flush=True)
        rows.append(row)
    print_table(
        f"Keeping the first of T symbols: {s['hidden']} units, Adam {s['rate']}, clip {s['max_norm']}, batch "
        f"{s['batch']}, at most {s['updates']} updates, {s['seeds']} seeds; seeds that succeed, by T",
        ("recurrence", "growth rate", "horizon", *(f"T = {n}" for n in s["lengths"]), "longest learned"),
        [
            (
                r["name"],
                r["growth_rate"],
                round(r["horizon"]) if np.isfinite(r["horizon"]) else "inf",
                *(sum(a >= 0 for a in r["solved_at"][n]) if n in r["solved_at"] else None for n in s["lengths"]),
                r["longest"],
            )
            for r in rows
        ],
    )
    correlation = rank_correlation([r["horizon"] for r in rows], [r["longest"] for r in rows])
    print(f"rank correlation of horizon and longest T learned, {len(rows)} recurrences: {correlation:.2f}")
    write(arguments.out / "long_range.png", lambda path: figure(rows, s).savefig(path, dpi=130))
    save(arguments.out, "long_range", s, {"rows": rows, "rank_correlation": correlation})


if __name__ == "__main__":
    main()
