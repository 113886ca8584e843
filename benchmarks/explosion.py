"""What does one line of clipping do for a recurrent network whose gradients explode?

The same network, seed, batches and rate, by plain SGD, without and with ``bptt.with_clipping(..., max_norm=1)``
(Pascanu, Mikolov, Bengio 2013, arXiv:1211.5063): a growing network whose loss is NaN at the second update; the
same at another task, thrown off so far that it never learns; and an orthogonal one whose loss is thrown about.
Clipping nearly every update amounts to a smaller rate, so plain SGD with smaller rates is in the table too. Beside
each, what `gradient_flow` says of the network before the first update, on fresh sequences: it speaks of the signal
within one sequence, and two of the three are steady by it.
"""

import math
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
import optax
from measure import parser, print_table, save, write

import bptt_jax as bptt
from bptt_jax.experiments.loop import init_state, train
from bptt_jax.experiments.network import Network, network
from bptt_jax.experiments.records import Metrics, describe
from bptt_jax.experiments.tasks import adding, temporal_order

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FULL: dict[str, Any] = {"updates": 6000, "chunk": 100, "batch": 20, "seed": 0, "max_norm": 1.0, "hidden": 50,
                        "divisors": [3, 10, 100]}  # fmt: skip
QUICK = FULL | {"updates": 100, "chunk": 50, "hidden": 16, "divisors": []}


class Scene(NamedTuple):
    """A network and the rate of its SGD."""

    name: str
    network: Network
    rate: float


def scenes(hidden: int) -> list[Scene]:
    normal, orthogonal = jax.nn.initializers.normal, jax.nn.initializers.orthogonal()
    growing = bptt.rnn(
        hidden,
        activation=jax.nn.relu,
        recurrent_init=bptt.cells.initializers.identity(1.1),
        input_init=normal(0.01),
    )
    learning = bptt.rnn(hidden, recurrent_init=orthogonal, input_init=normal(0.1))
    return [
        Scene("relu, 1.1 I, adding, T = 100", network(growing, adding(100)), 0.001),
        Scene("relu, 1.1 I, temporal order, T = 50", network(growing, temporal_order(50)), 0.01),
        Scene("tanh, orthogonal, temporal order, T = 20", network(learning, temporal_order(20)), 0.1),
    ]


def verdict(net: Network, s: dict[str, Any]) -> dict[str, Any]:
    """The gradient flow of one batch before training."""

    @jax.jit
    def flows() -> bptt.analysis.GradientFlow:
        params = init_state(net, optax.identity(), s["seed"]).params  # the very weights that are trained
        data = net.task.sample(jax.random.key(s["seed"] + 1), s["batch"])

        def one(xs: jax.Array, target: jax.Array) -> bptt.analysis.GradientFlow:
            loss = lambda states: net.loss_of_states(states, net.loss_args(params, xs, target))  # noqa: E731
            h0 = net.cell.initial_state()
            return bptt.gradient_flow(net.cell.step, params.cell, h0, xs, loss, stride=net.task.length)

        return jax.vmap(one)(*data)

    summary = flows().summary()
    return {"verdict": summary["verdict"], "growth_rate": summary["growth_rate"]["mean"]}


def run(scene: Scene, optimizer: optax.GradientTransformation, s: dict[str, Any]) -> dict[str, Any]:
    seen: list[Metrics] = []
    done = train(
        scene.network,
        optimizer,
        seeds=[s["seed"]],
        on_chunk=lambda m: seen.append(jax.tree.map(np.asarray, m)),
        **{k: s[k] for k in ("updates", "chunk", "batch")},
    )
    losses = np.concatenate([m.loss[:, 0] for m in seen]).astype(float)
    norms = np.concatenate([m.gradient_log_norm[:, 0] for m in seen]).astype(float)
    finite = np.isfinite(losses)
    chunks = [r for r in done.records if "event" not in r]
    return {
        "first_non_finite": None if finite.all() else int(np.argmin(finite)) + 1,
        "largest_loss": float(np.max(losses, where=finite, initial=0.0)),
        "last_loss": float(chunks[-1]["validation_loss"][0]),
        "largest_log_norm": float(np.max(norms, where=np.isfinite(norms), initial=-math.inf)),
        "clipped": float(np.mean([r["clipped"][0] for r in chunks])) if chunks[0]["clipped"] else None,
        "last_error": float(chunks[-1]["validation_error"][0]),
        "solved_at": chunks[-1]["solved_at"][0],
        "events": [describe(e) for e in done.events],
        "losses": losses.tolist(),
        "log_norms": norms.tolist(),
    }


def figure(rows: list[dict[str, Any]]) -> Any:
    fig, axes = plt.subplots(2, len(rows), figsize=(4 * len(rows), 5.6), squeeze=False, layout="constrained")
    for (top, bottom), row in zip(axes.T, rows, strict=True):
        for name, colour, width in (("plain", "#c8102e", 0.9), ("clipped", "k", 0.9)):
            run = row[name]
            at = np.arange(1, len(run["losses"]) + 1)
            for ax, values in ((top, np.array(run["losses"])), (bottom, np.exp(np.array(run["log_norms"])))):
                ax.plot(at, np.where(np.isfinite(values), values, np.nan), color=colour, lw=width, label=name)
                if run["first_non_finite"] and ax is top:
                    n = run["first_non_finite"]
                    before = values[n - 2] if n > 1 else row["baseline"]
                    ax.plot(n, before, "x", color=colour, ms=9, mew=2, label="not finite from here on")
        top.axhline(row["baseline"], color="0.5", lw=0.8, ls=":")
        bottom.axhline(1.0, color="0.5", lw=0.8, ls=":")
        top.set(title=row["scene"], xscale="log", yscale="log")
        bottom.set(xlabel="updates", xscale="log", yscale="log")
    axes[0][0].set_ylabel("loss of the batch")
    axes[1][0].set_ylabel("gradient norm before clipping")
    axes[0][0].legend(frameon=False, fontsize="small")
    return fig


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    rows: list[dict[str, Any]] = []
    for scene in scenes(s["hidden"]):
        sgd = optax.sgd(scene.rate)
        row: dict[str, Any] = {"scene": scene.name, "rate": scene.rate, "baseline": scene.network.task.baseline}
        row |= verdict(scene.network, s)
        row |= {"plain": run(scene, sgd, s), "clipped": run(scene, bptt.with_clipping(sgd, s["max_norm"]), s)}
        for divisor in s["divisors"]:
            row[f"plain, rate / {divisor}"] = run(scene, optax.sgd(scene.rate / divisor), s)
        names = [k for k in row if isinstance(row[k], dict)]
        for name in names:
            for event in row[name]["events"][:3]:
                print(f"{scene.name}, {name}: {event}", flush=True)
        rows.append(row)
    columns = ("largest_loss", "first_non_finite", "last_loss", "last_error", "clipped", "solved_at")
    print_table(
        f"The same network without and with clipping to norm {s['max_norm']}: SGD, batch {s['batch']}, at most "
        f"{s['updates']} updates",
        ("network and task", "verdict", "growth rate", "trivial loss", "clipping", "largest loss",
         "not finite from", "last loss", "error", "clipped share", "solved at"),
        [
            (r["scene"], r["verdict"], r["growth_rate"], r["baseline"], name, *(r[name][c] for c in columns))
            for r in rows for name in r if isinstance(r[name], dict)
        ],
    )  # fmt: skip
    write(arguments.out / "explosion.png", lambda path: figure(rows).savefig(path, dpi=130))
    without_curves = [
        {k: {n: v for n, v in r[k].items() if n not in ("losses", "log_norms")} if isinstance(r[k], dict) else r[k]
         for k in r} for r in rows
    ]  # fmt: skip
    save(arguments.out, "explosion", s, without_curves)


if __name__ == "__main__":
    main()
