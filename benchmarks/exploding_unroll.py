"""How noisy are gradients of an unroll that explodes, by backpropagation, evolution strategies and persistent ones?

Two chaotic systems: the Lorenz equations (step of a Runge-Kutta method; rho, sigma and beta are the parameters) and a
tanh network with weights of gain 3 (its gain and its biases are). The loss is a mean over all steps, from random
initial states. For each length of the unroll the variance of the gradient over initial states and perturbations:

- Metz et al. 2021 ("Gradients are not all you need", arXiv:2111.05803) and Metz et al. 2019 (arXiv:1810.10180),
  reduced: that of backpropagation grows exponentially with the length, by about twice the Lyapunov exponent in each
  step; that of evolution strategies is bounded by the loss's own, and does not.
- Vicol et al. 2021 (arXiv:2112.13835), reduced: evolution strategies on windows by themselves are biased, persistent
  ones are not, at some more variance, which levels off too. On influence balancing (Tallec and Ollivier 2017,
  arXiv:1705.08209), where short windows have the wrong sign.

Lengths are masks of one sequence, so that everything is compiled once.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from measure import parser, print_table, save, write

import bptt_jax as bptt
from bptt_jax.experiments.influence_balancing import influence_balancing
from bptt_jax.linalg import LogScaled
from bptt_jax.step import Array

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FULL: dict[str, Any] = {
    "lengths": [10, 20, 50, 100, 200, 400],
    "samples": 200,
    "pairs": 4,
    "window": 10,
    "sigma": {"lorenz": 0.1, "rnn": 0.1},
    "windows": [5, 10, 20, 40, 100, 200],
    "stream": 200,
    "many": 1600,
}
QUICK = FULL | {"lengths": [10, 50, 200], "samples": 50, "windows": [5, 40, 200], "many": 320}
DT, UNITS, GAIN = 0.05, 32, 3.0


def lorenz(params: Any, h: Array, x: None) -> Array:
    """One step of DT in time; the state in tens."""

    def rate(h: Array) -> Array:
        a, b, c = 10 * h
        return jnp.stack([params["sigma"] * (b - a), a * (params["rho"] - c) - b, a * b - params["beta"] * c]) / 10

    k1 = rate(h)
    k2 = rate(h + DT / 2 * k1)
    k3 = rate(h + DT / 2 * k2)
    return h + DT / 6 * (k1 + 2 * k2 + 2 * k3 + rate(h + DT * k3))


WEIGHTS = np.random.default_rng(0).standard_normal((UNITS, UNITS)).astype(np.float32) / math.sqrt(UNITS)


def rnn(params: Any, h: Array, x: None) -> Array:
    return jnp.tanh(params["gain"] * (WEIGHTS @ h) + params["bias"])


SYSTEMS: dict[str, Any] = {
    "lorenz": (lorenz, {"sigma": jnp.float32(10), "rho": jnp.float32(28), "beta": jnp.float32(8 / 3)}, 3),
    "rnn": (rnn, {"gain": jnp.float32(GAIN), "bias": jnp.zeros(UNITS)}, UNITS),
}


def loss(states: Array, weights: Array) -> Array:
    """The mean square of the last number of the state."""
    return weights @ jnp.square(states[:, -1])


def log_variance(gradients: LogScaled) -> float:
    """Natural logarithm of the trace of the covariance, of gradients with a power of two each."""
    top = jnp.max(gradients.exponent)
    rows = [a.reshape(len(a), -1) for a in jax.tree.leaves(gradients.over(jnp.full_like(gradients.exponent, top)))]
    stacked = np.concatenate([np.asarray(a, np.float64) for a in rows], axis=1)
    return float(np.log(np.sum(np.var(stacked, axis=0, ddof=1))) + 2 * float(top) * math.log(2))


def measured(name: str, s: dict[str, Any]) -> list[dict[str, Any]]:
    """Variances of one system, by length."""
    step, params, size = SYSTEMS[name]
    longest, key = max(s["lengths"]), jax.random.key(0)
    starts = 0.5 * jax.random.normal(key, (s["samples"], size))
    starts = jax.vmap(lambda h: bptt.final_state(step, params, h, length=500))(starts)
    keys = jax.random.split(jax.random.key(1), s["samples"])
    options = {"sigma": s["sigma"][name], "pairs": s["pairs"]}

    def given(h: Array, steps: Array) -> tuple[Any, ...]:
        mask = jnp.arange(longest) < steps
        return step, params, h, bptt.Sequence(mask=mask), loss, mask / steps

    def of(estimator: Any) -> Any:
        def one(h: Array, key: Array, steps: Array) -> LogScaled:
            *problem, weights = given(h, steps)
            return LogScaled.of(estimator(*problem, args=weights, key=key, **options))

        return jax.jit(jax.vmap(one, (0, 0, None)))

    def exact(h: Array, key: Array, steps: Array) -> LogScaled:
        *problem, weights = given(h, steps)
        return bptt.adjoints(*problem, args=weights).scaled.params_grad

    estimators = {
        "bptt": jax.jit(jax.vmap(exact, (0, 0, None))),
        "es": of(bptt.estimators.es),
        "pes": of(partial(bptt.estimators.pes, window=s["window"])),
    }
    exponent = float(bptt.lyapunov_exponents(step, params, starts[0], None, num=1, length=4000).exponents[0])
    rows = []
    for steps in s["lengths"]:
        variances = {
            f"log_variance_{of}": log_variance(each(starts, keys, jnp.float32(steps)))
            for of, each in estimators.items()
        }
        rows.append({"system": name, "length": steps, "lyapunov": exponent, **variances})
    return rows


def mean_state(states: Array) -> Array:
    return jnp.mean(states[:, 0])


def biases(s: dict[str, Any]) -> list[dict[str, Any]]:
    """Of evolution strategies on windows by themselves, and of persistent ones, by the length of the windows."""
    task, keys = influence_balancing(1.0), jax.random.split(jax.random.key(2), 32)
    length, options = s["stream"], {"pairs": s["many"] // 32, "sigma": 0.1}
    problem = task.step, task.params, task.state0, None, mean_state
    exact = float(bptt.adjoints(*problem, length=length).params_grad)

    def mean_and_error(estimator: Any, **more: Any) -> tuple[float, float]:
        found = jax.vmap(lambda key: estimator(*problem, key=key, **options, **more))(keys)
        return float(jnp.mean(found)), float(jnp.std(found, ddof=1)) / math.sqrt(len(keys))

    rows = []
    for window in s["windows"]:
        # The state rests, so that every window begins as the first does.
        alone, alone_error = mean_and_error(bptt.estimators.es, length=window)
        kept, kept_error = mean_and_error(bptt.estimators.pes, length=length, window=window)
        rows.append(
            {
                "window": window,
                "exact": exact,
                "es": alone,
                "es_error": alone_error,
                "pes": kept,
                "pes_error": kept_error,
            }
        )
    return rows


def growth(rows: list[dict[str, Any]], name: str) -> float:
    """Nats per step by which a variance grows from a quarter of the longest length on."""
    late = [r for r in rows if 4 * r["length"] >= rows[-1]["length"]]
    return float(np.polyfit([r["length"] for r in late], [r[f"log_variance_{name}"] for r in late], 1)[0])


def figure(systems: dict[str, list[dict[str, Any]]], bias: list[dict[str, Any]]) -> Any:
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    looks = {"bptt": ("k", "-"), "es": ("#c8102e", "--"), "pes": ("#3a86c8", "-.")}
    for ax, (name, rows) in zip(axes, systems.items(), strict=False):
        for of, (colour, dash) in looks.items():
            decades = [r[f"log_variance_{of}"] / math.log(10) for r in rows]
            ax.plot([r["length"] for r in rows], decades, color=colour, ls=dash, marker=".", label=of)
        ax.set(
            xscale="log", xlabel="steps of the unroll", ylabel=r"$\log_{10}$ variance of the gradient", title=name
        )
    axes[0].legend(frameon=False)
    windows = [r["window"] for r in bias]
    axes[2].axhline(bias[0]["exact"], color="0.7", lw=0.8)
    for of, label in (("es", "es, windows alone"), ("pes", "pes")):
        values, errors = ([r[f"{of}{what}"] for r in bias] for what in ("", "_error"))
        colour, dash = looks[of]
        axes[2].errorbar(windows, values, errors, color=colour, ls=dash, marker=".", capsize=2, label=label)
    axes[2].set(xscale="log", xlabel="steps of a window", ylabel="mean estimate", title="influence balancing")
    axes[2].legend(frameon=False)
    return fig


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    systems = {name: measured(name, s) for name in SYSTEMS}
    for name, rows in systems.items():
        print_table(
            f"{name}: natural logarithm of the gradient's variance over {s['samples']} initial states; largest "
            f"Lyapunov exponent {rows[0]['lyapunov']:.3f} per step, the variance of backpropagation grows by "
            f"{growth(rows, 'bptt'):.3f}, of es by {growth(rows, 'es'):.4f}, of pes by {growth(rows, 'pes'):.4f}",
            ("length", "bptt", "es", "pes"),
            [(r["length"], *(r[f"log_variance_{of}"] for of in ("bptt", "es", "pes"))) for r in rows],
        )
    bias = biases(s)
    print_table(
        f"Influence balancing, mean over {s['many']} pairs",
        ("window", "exact", "es of windows alone", "+-", "pes", "+-"),
        [tuple(r.values()) for r in bias],
    )
    write(arguments.out / "exploding_unroll.png", lambda path: figure(systems, bias).savefig(path, dpi=130))
    growths = {name: {of: growth(rows, of) for of in ("bptt", "es", "pes")} for name, rows in systems.items()}
    results = {"variances": [r for rows in systems.values() for r in rows], "growths": growths, "bias": bias}
    save(arguments.out, "exploding_unroll", s, results)


if __name__ == "__main__":
    main()
