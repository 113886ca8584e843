"""Does descent by truncated gradients reach the optimum, where short-term influences have the wrong sign?

Influence balancing (Tallec and Ollivier 2017, arXiv:1705.08209): one parameter, optimum theta* = -1/6. Worked out
from the system, truncation to 40 steps or fewer turns the gradient round. Plain gradient descent from theta = 0,
the state going on from sequence to sequence, by truncated backpropagation with windows K on either side of 41, by
full backpropagation, by real-time recurrent learning, by SnAp-1 and KF-RTRL, which are exact here (theta moves every
unit at once, and is one number), by UORO, which is right in the mean (at a smaller rate: at that of the others its
noise diverges), and by RFLO, which sees every unit's own memory alone: the sum 2 of the powers of a half, the sign of
truncation. The order is published for truncation and UORO (Tallec and Ollivier 2018, arXiv:1702.05043, abstract): that
diverges unless the span is much longer than the range of the interactions, this converges.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from measure import parser, print_table, save, write

import bptt_jax as bptt
from bptt_jax.experiments.influence_balancing import influence_balancing
from bptt_jax.step import Array

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FULL: dict[str, Any] = {
    "windows": [1, 5, 10, 20, 30, 35, 39, 40, 41, 42, 45, 50, 60, 80, 100],
    "length": 150,
    "updates": 2000,
    "rate": 0.02,
    "noisy_rate": 0.001,
}
QUICK = FULL | {"windows": [10, 40, 41, 60], "updates": 500}
SYSTEM = influence_balancing()
# ds_0/dtheta as truncation to K steps sees it, worked out by hand from the system's binomial powers.
BY_HAND = {1: 1.0, 10: 10.0, 20: 16.476, 30: 9.870, 40: 0.566, 41: -0.219, 50: -4.753}


def seen(steps: int | None) -> float:
    """What a change of theta `steps` steps ago, kept up since, has done to s_0 by now; without any to s_0 alone."""
    if steps is None:
        return 2.0

    def run(theta: Array) -> Array:
        return bptt.final_state(SYSTEM.step, theta, SYSTEM.state0, length=steps)[0]

    return float(jax.jvp(run, (SYSTEM.params,), (jnp.ones(()),))[1])


Gradient = Callable[[Array, Array, Array], Array]


def gradients(s: dict[str, Any]) -> dict[str, Gradient]:
    """By name, gradient(theta, state, key) of the loss at the end of one sequence."""
    given = {"loss": SYSTEM.loss, "length": s["length"]}

    def by(estimator: Callable[..., Array], **options: Any) -> Gradient:
        return lambda theta, h, key: estimator(SYSTEM.step, theta, h, None, key=key, **given, **options)

    return {
        **{f"truncated, K = {k}": by(bptt.estimators.tbptt, k1=1, k2=k) for k in s["windows"]},
        "full": lambda theta, h, key: bptt.adjoints(SYSTEM.step, theta, h, None, **given).params_grad,
        **{name: by(getattr(bptt.estimators, name)) for name in ("rtrl", "snap", "kf_rtrl", "uoro", "rflo")},
    }


def descend(gradient: Gradient, rate: float, s: dict[str, Any]) -> np.ndarray:
    """Theta after every update."""

    def update(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
        theta, h = carry
        moved = theta - rate * gradient(theta, h, key)
        return (moved, bptt.final_state(SYSTEM.step, theta, h, length=s["length"])), moved

    keys = jax.random.split(jax.random.key(0), s["updates"])
    run = jax.jit(lambda carry: jax.lax.scan(update, carry, keys)[1])
    return np.asarray(run((SYSTEM.params, SYSTEM.state0)))


def outcome(thetas: np.ndarray) -> tuple[str, int | None]:
    """ "reaches" theta* (the updates after which it stays within 1 %), "diverges" or "neither"."""
    solved = np.asarray(SYSTEM.solved(jnp.asarray(thetas)))
    if solved[-1]:
        return "reaches", int(np.max(np.flatnonzero(~solved), initial=-1)) + 2
    # A loss a thousand times that of theta = 0, or no number at all.
    far = not math.isfinite(thetas[-1]) or abs(thetas[-1] / SYSTEM.optimum - 1) > math.sqrt(1000)
    return ("diverges" if far else "neither"), None


def figure(curves: dict[str, np.ndarray]) -> Any:
    fig, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    shown = [f"truncated, K = {k}" for k in (10, 40, 41, 60)]
    looks = iter(
        (("0.6", ":"), ("0.6", "--"), ("#c8102e", "--"), ("#c8102e", ":"), ("k", "-"), ("#3a86c8", (0, (1, 3))))
    )
    for name in [*shown, "full", "rtrl"]:
        colour, dash = next(looks)
        ax.plot(np.arange(1, len(curves[name]) + 1), curves[name], color=colour, ls=dash, lw=1.6, label=name)
    ax.axhline(SYSTEM.optimum, color="0.8", lw=0.8, zorder=0)
    ax.set(
        xscale="log",
        ylim=(-0.5, 1.0),
        xlabel="updates",
        ylabel=r"$\theta$",
    )
    ax.set_title(r"influence balancing, $\theta^* = -1/6$")
    ax.legend(frameon=False)
    return fig


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    rates = {"uoro": s["noisy_rate"]}
    curves = {name: descend(found, rates.get(name, s["rate"]), s) for name, found in gradients(s).items()}
    rows = []
    for name, thetas in curves.items():
        window = int(name.split("= ")[1]) if "=" in name else None if name == "rflo" else s["length"]
        what, at = outcome(thetas)
        row = {"gradient": name, "influence": seen(window), "by_hand": BY_HAND.get(window or 0)}
        rows.append(row | {"theta": float(thetas[-1]), "outcome": what, "updates": at})
    print_table(
        f"Influence balancing: gradient descent, rate {s['rate']} (uoro {s['noisy_rate']}), {s['updates']} updates "
        f"on sequences of {s['length']} steps;\npublished: theta* = -1/6, and that truncation can diverge",
        ("gradient", "ds_0/dtheta seen", "by hand", "theta at the end", "theta*", "outcome", "updates"),
        [(*list(r.values())[:4], SYSTEM.optimum, r["outcome"], r["updates"]) for r in rows],
    )
    write(arguments.out / "influence_balancing.png", lambda path: figure(curves).savefig(path, dpi=130))
    save(arguments.out, "influence_balancing", s, rows)


if __name__ == "__main__":
    main()
