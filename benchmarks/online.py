"""How do the online estimators of the gradient rank, where a network learns while a stream goes by?

The two tasks of Marschall, Cho, Savin 2020 (arXiv:1907.02649; their vanilla-rtrl), one stream a seed:

- Add (Pitis 2016): bits x_t by coin, target y_t = 1/2 + x_{t-t1} / 2 - x_{t-t2} / 4, cross-entropy, so that what has
  been learned is read off the loss: 0.66 for the mean of y alone, 0.52 with t1, 0.45 with both.
- Mimic: as many bits by coin as the network has units, targets are the outputs of a fixed random network of the same
  kind and size, half the mean squared error; 0 where that network has been found.

An rnn, Adam, an update every few steps; the influence goes on from update to update (`carry`), truncated
backpropagation sees the steps since the last update. "none" trains the readout alone.

Reduced: their code has, at the time of submission, 32 units, orthogonal recurrent weights, gradient descent at a rate
of 0.001 with an update at every step, 100,000 steps, lags 6 and 10, 20 seeds, and backpropagation through 10 steps.

Counted seed by seed is what follows from bias and variance: the exact RTRL before all others; of the random ones
KF-RTRL before UORO (Mujika et al. 2018, arXiv:1805.10842: less variance); every one before the readout alone. Nothing
follows of UORO and RFLO, nor of RFLO and truncation to few steps; these are counted beside. Marschall et al. find
that performances form clusters, by whether an algorithm is random and by the form of what it carries, and that the
angle with the exact gradient alone does not explain them, least of all those of random ones. So it is on Mimic, where
all that is not random learns alike and UORO comes last; on Add, KF-RTRL is as good as exact, and UORO no worse than
RFLO.

Of this network SnAp-1 and RFLO are the same, and SnAp-2 is RTRL.
"""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

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

FULL: dict[str, Any] = {"steps_per_update": 4, "rate": 2e-3, "windows": 24}
TASKS: dict[str, dict[str, Any]] = {
    "add": {"hidden": 24, "lags": [4, 7], "updates": 12_000, "seeds": 6},
    "mimic": {"hidden": 16, "updates": 6_000, "seeds": 3},
}
QUICK = {"hidden": 8, "updates": 300, "seeds": 2, "windows": 3}
QUICK_METHODS = ("rtrl", "kf_rtrl", "truncated", "none")  # compiling one takes some five seconds
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
EXPECTED = (
    *(("rtrl", other) for other in METHODS if other != "rtrl"),
    ("kf_rtrl", "uoro"),
    *((other, "none") for other in METHODS if other not in ("rtrl", "none")),
)
OPEN = (("uoro", "rflo"), ("rflo", "truncated"))


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


class Stream(NamedTuple):
    """Inputs ``[T, I]`` and targets ``[T, O]``, O = 1 of the Add task, and the loss of a step's outputs."""

    inputs: Array
    targets: Array
    loss: Callable[[Array, Array], Array]


def stream(task: str, key: Array, steps: int, s: dict[str, Any]) -> Stream:
    if task == "add":
        t1, t2 = s["lags"]
        bits = jax.random.bernoulli(key, 0.5, (steps + t2,)).astype(jnp.float32)
        targets = 0.5 + 0.5 * bits[t2 - t1 : len(bits) - t1] - 0.25 * bits[: len(bits) - t2]
        inputs = jnp.stack([bits, 1 - bits], axis=1)[t2:]
        return Stream(inputs, targets[:, None], optax.sigmoid_binary_cross_entropy)
    n, keys = s["hidden"], jax.random.split(key, 4)
    bits = jax.random.bernoulli(keys[0], 0.5, (steps, n)).astype(jnp.float32)
    cell, orthogonal = bptt.rnn(n), jax.nn.initializers.orthogonal()
    params = cell.init(keys[1], n)._replace(
        recurrent=orthogonal(keys[2], (n, n)), bias=0.1 * jax.random.normal(keys[3], (n,))
    )
    outputs = jax.random.normal(jax.random.fold_in(key, 4), (n, n)) / math.sqrt(n)
    targets = bptt.unroll(cell.step, params, cell.initial_state(), bits) @ outputs
    return Stream(bits, targets, lambda found, right: 0.5 * jnp.square(found - right) / n)


def learn(name: str, task: str, s: dict[str, Any]) -> np.ndarray:
    """The mean loss a step ``[seeds, windows]``, in each of the windows of updates."""
    cell, estimator, steps = bptt.rnn(s["hidden"]), METHODS[name], s["steps_per_update"]
    optimizer = optax.adam(s["rate"])

    def run(key: Array) -> Array:
        keys = jax.random.split(key, 4)
        inputs, targets, loss_of_outputs = stream(task, keys[0], s["updates"] * steps, s)
        size, outputs = inputs.shape[1], targets.shape[1]

        def loss(states: Array, args: tuple[Any, Array]) -> Array:
            readout, targets = args
            return jnp.sum(loss_of_outputs(states @ readout["w"] + readout["b"][None], targets))

        def gradient(params: Any, state: Array, carry: Any, x: Array, args: Any) -> tuple[Any, Any]:
            given = cell.step, params, state, x, loss
            if name == "none":
                return jax.tree.map(jnp.zeros_like, params), None
            if estimator is None:
                return estimators.tbptt(*given, args=args, k1=steps, k2=steps), None
            return estimator(*given, args=args, key=keys[3], carry=carry, has_carry=True)

        weights = jax.random.normal(keys[2], (s["hidden"], outputs)) / math.sqrt(s["hidden"])
        params = {"recurrent": cell.init(keys[1], size), "readout": {"w": weights, "b": jnp.zeros(outputs)}}

        def update(carry: Any, at: tuple[Array, Array]) -> tuple[Any, Array]:
            params, optimizer_state, state, influence = carry
            x, y = at
            states = bptt.unroll(cell.step, params["recurrent"], state, x)
            value, of_readout = jax.value_and_grad(lambda readout: loss(states, (readout, y)))(params["readout"])
            found, influence = gradient(params["recurrent"], state, influence, x, (params["readout"], y))
            updates, optimizer_state = optimizer.update(
                {"recurrent": found, "readout": of_readout}, optimizer_state, params
            )
            return (optax.apply_updates(params, updates), optimizer_state, states[-1], influence), value / steps

        parts = jax.tree.map(lambda a: a.reshape(-1, steps, a.shape[1]), (inputs, targets))
        first, others = (jax.tree.map(lambda a, p=p: a[p], parts) for p in (0, slice(1, None)))
        begun, value = update((params, optimizer.init(params), cell.initial_state(), None), first)
        return jnp.append(value, jax.lax.scan(update, begun, others)[1])

    losses = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), s["seeds"]))
    return np.asarray(losses).reshape(s["seeds"], s["windows"], -1).mean(axis=2)


def title(task: str, s: dict[str, Any]) -> str:
    return f"Add task, lags {s['lags'][0]} and {s['lags'][1]}" if task == "add" else "Mimic task"


def figure(task: str, curves: dict[str, np.ndarray], s: dict[str, Any]) -> Any:
    fig, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    updates = (1 + np.arange(s["windows"])) * s["updates"] / s["windows"]
    for number, (name, found) in enumerate(curves.items()):
        colour = "k" if name == "rtrl" else "0.7" if name == "none" else f"C{number}"
        ax.plot(updates, np.mean(found, axis=0), color=colour, lw=1.6, label=name)
    for name, value in floors().items() if task == "add" else ():
        ax.axhline(value, color="0.85", lw=0.8, zorder=0)
        ax.annotate(name, (updates[-1], value), fontsize=8, color="0.5", ha="right", va="bottom")
    ax.set(xlabel="updates", ylabel="cross-entropy (nats per step)" if task == "add" else "loss per step")
    ax.set_yscale("linear" if task == "add" else "log")
    ax.set_title(f"{title(task, s)}: mean of {s['seeds']} streams")
    ax.legend(frameon=False, ncols=2)
    return fig


def judge(task: str, s: dict[str, Any], methods: Iterable[str], out: Path) -> None:
    curves, rows = {}, []
    for name in methods:
        start = time.perf_counter()
        curves[name] = learn(name, task, s)
        ends = curves[name][:, -1]
        rows.append(
            {"estimator": name, "loss": float(ends.mean()), "least": float(ends.min()), "most": float(ends.max())}
            | {"curves": curves[name].tolist(), "seconds": time.perf_counter() - start}
        )
        print(f"{task}, {name}: {rows[-1]['loss']:.4g}, {rows[-1]['seconds']:.0f} s", flush=True)
    limits = floors() if task == "add" else {}
    known = ", by what is known " + ", ".join(f"{k} {v:.3f}" for k, v in limits.items()) if limits else ""
    print_table(
        f"{title(task, s)}, rnn of {s['hidden']} units, {s['updates']} updates of {s['steps_per_update']} steps;\n"
        f"loss at the end{known}",
        ("estimator", "loss", "least", "most of the seeds", "seconds"),
        [(r["estimator"], r["loss"], r["least"], r["most"], r["seconds"]) for r in rows],
    )
    ranks = []
    for better, worse in (*EXPECTED, *OPEN):
        if not {better, worse} <= set(curves):
            continue
        ahead = int(np.sum(curves[better][:, -1] < curves[worse][:, -1]))
        of = {"better": better, "worse": worse, "expected": (better, worse) in EXPECTED}
        ranks.append(of | {"seeds_ahead": ahead, "seeds": s["seeds"]})
    print_table(
        "Who is ahead of whom, in how many of the seeds",
        ("ahead", "of", "seeds", "expected"),
        [(r["better"], r["worse"], f"{r['seeds_ahead']} of {r['seeds']}", r["expected"]) for r in ranks],
    )
    name = "online" if task == "add" else f"online_{task}"
    write(out / f"{name}.png", lambda path: figure(task, curves, s).savefig(path, dpi=130))
    save(out, name, s | {"floors": limits}, rows + ranks)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="only these (all of them)")
    arguments = p.parse_args()
    for task in arguments.tasks:
        s = FULL | TASKS[task] | (QUICK if arguments.quick else {})
        judge(task, s, QUICK_METHODS if arguments.quick else METHODS, arguments.out)


if __name__ == "__main__":
    main()
