"""Do the online estimators of the gradient rank as published, where a network learns while a stream goes by?

The Add task (Pitis 2016; Marschall, Cho, Savin 2020, arXiv:1907.02649; their vanilla-rtrl): bits x_t by coin, target
y_t = 1/2 + x_{t-t1} / 2 - x_{t-t2} / 4, cross-entropy, so that what has been learned is read off the loss: 0.66 for
the mean of y alone, 0.52 with t1, 0.45 with both. One rnn, one stream a seed, Adam, an update every few steps; the
influence goes on from update to update (`carry`), truncated backpropagation sees the steps since the last update.
"none" trains the readout alone.

The ranks that are counted here, seed by seed: the exact RTRL before all others, then the random ones, KF-RTRL before
UORO (Mujika et al. 2018, arXiv:1805.10842: less variance), then the biased ones, RFLO before truncation to few steps;
every one before the readout alone, which has what an untrained network remembers. Of this network SnAp-1 and RFLO are
the same, and SnAp-2 is RTRL.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from measure import parser, print_table, save, write

import bptt_jax as bptt
from bptt_jax import estimators
from bptt_jax.step import Array

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FULL: dict[str, Any] = {
    "hidden": 24,
    "lags": [4, 7],
    "steps_per_update": 4,
    "updates": 12_000,
    "rate": 2e-3,
    "seeds": 6,
    "windows": 24,
}
QUICK = FULL | {"hidden": 8, "updates": 300, "seeds": 2, "windows": 3}
# With carry= and has_carry=True; those that are None carry nothing on.
METHODS: dict[str, Callable[..., Any] | None] = {
    "rtrl": estimators.rtrl,
    "kf_rtrl": estimators.kf_rtrl,
    "uoro": estimators.uoro,
    "snap 1": estimators.snap,
    "rflo": estimators.rflo,
    "truncated": None,
    "none": None,
}
CLAIMS = (
    *(("rtrl", other) for other in METHODS if other != "rtrl"),
    ("kf_rtrl", "uoro"),
    ("uoro", "rflo"),
    ("rflo", "truncated"),
    *((other, "none") for other in METHODS if other not in ("rtrl", "none")),
)


def floors() -> dict[str, float]:
    """The least cross-entropy by what is known of the past."""

    def entropy(p: float) -> float:
        return -sum(q * math.log(q) for q in (p, 1 - p) if q)

    both = [0.5 + 0.5 * a - 0.25 * b for a in (0, 1) for b in (0, 1)]
    first = [float(np.mean(both[:2])), float(np.mean(both[2:]))]
    return {
        "nothing": entropy(float(np.mean(both))),
        "t1": float(np.mean([entropy(p) for p in first])),
        "both": float(np.mean([entropy(p) for p in both])),
    }


def loss(states: Array, args: tuple[Any, Array]) -> Array:
    readout, targets = args
    logits = states @ readout["w"] + readout["b"]
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets))


def learn(name: str, s: dict[str, Any]) -> np.ndarray:
    """The mean loss a step ``[seeds, windows]``, in each of the windows of updates."""
    cell, estimator, steps = bptt.rnn(s["hidden"]), METHODS[name], s["steps_per_update"]
    optimizer = optax.adam(s["rate"])

    def gradient(params: Any, state: Array, carry: Any, x: Array, args: Any, key: Array) -> tuple[Any, Any]:
        given = cell.step, params, state, x, loss
        if name == "none":
            return jax.tree.map(jnp.zeros_like, params), None
        if estimator is None:
            return estimators.tbptt(*given, args=args, k1=steps, k2=steps), None
        return estimator(*given, args=args, key=key, carry=carry, has_carry=True)

    def run(key: Array) -> Array:
        keys = jax.random.split(key, 4)
        t1, t2 = s["lags"]
        bits = jax.random.bernoulli(keys[0], 0.5, (s["updates"] * steps + t2,)).astype(jnp.float32)
        targets = 0.5 + 0.5 * bits[t2 - t1 : len(bits) - t1] - 0.25 * bits[: len(bits) - t2]
        xs = jnp.stack([bits, 1 - bits], axis=1)[t2:]
        scale = 1 / math.sqrt(s["hidden"])
        params = {
            "recurrent": cell.init(keys[1], 2),
            "readout": {"w": scale * jax.random.normal(keys[2], (s["hidden"],)), "b": jnp.zeros(())},
        }

        def update(carry: Any, at: tuple[Array, Array]) -> tuple[Any, Array]:
            params, optimizer_state, state, influence = carry
            x, y = at
            states = bptt.unroll(cell.step, params["recurrent"], state, x)
            value, of_readout = jax.value_and_grad(lambda readout: loss(states, (readout, y)))(params["readout"])
            args = params["readout"], y
            found, influence = gradient(params["recurrent"], state, influence, x, args, keys[3])
            updates, optimizer_state = optimizer.update(
                {"recurrent": found, "readout": of_readout}, optimizer_state, params
            )
            return (optax.apply_updates(params, updates), optimizer_state, states[-1], influence), value / steps

        parts = xs.reshape(-1, steps, 2), targets.reshape(-1, steps)
        first, others = (jax.tree.map(lambda a, p=p: a[p], parts) for p in (0, slice(1, None)))
        begun, value = update((params, optimizer.init(params), cell.initial_state(), None), first)
        return jnp.append(value, jax.lax.scan(update, begun, others)[1])

    losses = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), s["seeds"]))
    return np.asarray(losses).reshape(s["seeds"], s["windows"], -1).mean(axis=2)


def figure(curves: dict[str, np.ndarray], s: dict[str, Any]) -> Any:
    fig, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    updates = (1 + np.arange(s["windows"])) * s["updates"] / s["windows"]
    for number, (name, found) in enumerate(curves.items()):
        colour = "k" if name == "rtrl" else "0.7" if name == "none" else f"C{number}"
        ax.plot(updates, np.mean(found, axis=0), color=colour, lw=1.6, label=name)
    for name, value in floors().items():
        ax.axhline(value, color="0.85", lw=0.8, zorder=0)
        ax.annotate(name, (updates[-1], value), fontsize=8, color="0.5", ha="right", va="bottom")
    ax.set(xlabel="updates", ylabel="cross-entropy (nats per step)")
    ax.set_title(f"Add task, lags {s['lags'][0]} and {s['lags'][1]}: mean of {s['seeds']} streams")
    ax.legend(frameon=False, ncols=2)
    return fig


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    curves, rows = {}, []
    for name in METHODS:
        start = time.perf_counter()
        curves[name] = learn(name, s)
        ends = curves[name][:, -1]
        rows.append(
            {"estimator": name, "loss": float(ends.mean()), "least": float(ends.min()), "most": float(ends.max())}
            | {"by_seed": ends.tolist(), "seconds": time.perf_counter() - start}
        )
    limits = floors()
    print_table(
        f"Add task, lags {s['lags']}, rnn of {s['hidden']} units, {s['updates']} updates of {s['steps_per_update']} "
        "steps;\ncross-entropy at the end, by what is known "
        + ", ".join(f"{k} {v:.3f}" for k, v in limits.items()),
        ("estimator", "loss", "least", "most of the seeds", "seconds"),
        [(r["estimator"], r["loss"], r["least"], r["most"], r["seconds"]) for r in rows],
    )
    claims = []
    for better, worse in CLAIMS:
        ahead = int(np.sum(curves[better][:, -1] < curves[worse][:, -1]))
        claims.append({"better": better, "worse": worse, "seeds_ahead": ahead, "seeds": s["seeds"]})
    print_table(
        "Ranks as published, in how many of the seeds",
        ("ahead", "of", "seeds"),
        [(c["better"], c["worse"], f"{c['seeds_ahead']} of {c['seeds']}") for c in claims],
    )
    write(arguments.out / "online.png", lambda path: figure(curves, s).savefig(path, dpi=130))
    save(arguments.out, "online", s | {"floors": limits}, rows + claims)


if __name__ == "__main__":
    main()
