"""Does gradient flossing make long delays learnable?

Engelken 2023 (arXiv:2312.17306): the mean square of the first k Lyapunov exponents is minimised over the weights
before training (`bptt_jax.flossing`, Adam), so that k directions of the error signal neither vanish nor explode.
First, what it does to a network: exponents, and the condition number of dh_T/dh_0 in its first k directions and in
all, from the growth of the QR recursion in float64 (the ratio of singular values itself is beyond floats after some
tens of steps; at 10 steps it stands beside, from the singular values of the product).

Then a task, the delayed copy: inputs are +1 or -1, and at every step the output is to be the input `delay` steps
earlier (squared error; an output of the wrong sign is an error; chance is half). "plain" is not flossed; "longer"
neither, but trained for as many more updates as flossing takes; "largest alone" is flossed with k = 1, so that the
largest exponent is right and the condition is not; "flossed" with all k. These four start from the same weights.
"orthogonal" is the remedy that costs nothing: orthogonal recurrent weights, not flossed. All are trained alike.
"""

from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from measure import parser, print_table, save, write

import bptt_jax as bptt

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FULL: dict[str, Any] = {
    "size": 40,
    "flossed": 20,
    "flossing": {"updates": 250, "steps": 60, "warmup": 10, "rate": 1e-2},
    "measured": {"steps": 100, "sequences": 8, "short": 10, "warmup": 50},
    "delays": [10, 20, 30],
    "updates": 2000,
    "evaluations": 20,
    "batch": 16,
    "rate": 1e-3,
    "max_norm": 1.0,
    "seeds": 4,
}
QUICK = FULL | {
    "size": 16,
    "flossed": 4,
    "flossing": FULL["flossing"] | {"updates": 20, "steps": 30},
    "measured": {"steps": 40, "sequences": 2, "short": 5, "warmup": 10},
    "delays": [5],
    "updates": 60,
    "evaluations": 3,
    "seeds": 2,
}
COLOURS = {
    "plain": "tab:gray", "longer": "black", "largest alone": "tab:orange", "flossed": "tab:blue",
    "orthogonal": "tab:green",
}  # fmt: skip


def signs(key: Any, *shape: int) -> Any:
    return jax.random.rademacher(key, shape, float)


def floss(cell: bptt.Cell, starts: list[Any], num: int, f: dict[str, Any]) -> tuple[list[Any], np.ndarray]:
    """Weights with the first `num` exponents near zero, and the penalty before each update."""
    optimizer = optax.adam(f["rate"])

    def update(carry: Any, key: Any) -> Any:
        params, state = carry

        def penalty(params: Any) -> Any:
            xs = signs(key, f["steps"] + f["warmup"], 1)
            return bptt.remedies.flossing_penalty(
                cell.step, params, cell.initial_state(), xs, num=num, warmup=f["warmup"]
            )

        value, gradient = jax.value_and_grad(penalty)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(100), f["updates"])
    run = jax.jit(lambda params: jax.lax.scan(update, (params, optimizer.init(params)), keys))
    done = [run(params) for params in starts]
    return [params for (params, _), _ in done], np.array([values for _, values in done])


def measure(cell: bptt.Cell, networks: dict[str, Any], num: int, m: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of sequences that flossing has not seen: exponents, and log10 of the condition numbers; in float64."""
    start = np.zeros(cell.initial_state().shape)
    decades = m["steps"] / np.log(10)

    def one(params: Any, key: Any) -> Any:
        xs = signs(key, m["steps"] + m["warmup"], 1)
        spectrum = bptt.lyapunov_exponents(cell.step, params, start, xs, warmup=m["warmup"])
        on = bptt.final_state(cell.step, params, start, xs[: m["warmup"]])
        jacobians = bptt.jacobians(cell.step, params, on, xs[m["warmup"] : m["warmup"] + m["short"]])
        return spectrum.exponents, bptt.singular_values(bptt.jacobian_product(jacobians).mantissa)

    found = {}
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(200), m["sequences"])
        of_all = jax.jit(jax.vmap(one, (None, 0)))
        for name, params in networks.items():
            wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), params)
            each, values = (np.asarray(a) for a in of_all(wide, keys))
            found[name] = {
                "exponents": each.mean(axis=0).tolist(),
                "first": float(each[:, 0].mean()),
                "last_flossed": float(each[:, num - 1].mean()),
                "log10_condition_flossed": float(decades * np.mean(each[:, 0] - each[:, num - 1])),
                "log10_condition": float(decades * np.mean(each[:, 0] - each[:, -1])),
                "log10_condition_flossed_short": float(np.mean(np.log10(values[:, 0] / values[:, num - 1]))),
            }
    return found


def learn(cell: bptt.Cell, starts: dict[str, list[Any]], delay: int, s: dict[str, Any]) -> dict[str, Any]:
    """The delayed copy from several initial weights side by side: loss and share of errors on fresh sequences."""
    length = 2 * delay + 10
    optimizer = bptt.with_clipping(optax.adam(s["rate"]), s["max_norm"])

    def scores(params: Any, key: Any, batch: int) -> tuple[Any, Any]:
        rnn, (weights, bias) = params

        def one(xs: Any) -> tuple[Any, Any]:
            states = bptt.unroll(cell.step, rnn, cell.initial_state(), xs)
            outputs, targets = states[delay:] @ weights + bias, xs[:-delay, 0]
            return jnp.mean(jnp.square(outputs - targets)), jnp.mean(outputs * targets <= 0, dtype=float)

        loss, wrong = jax.vmap(one)(signs(key, batch, length, 1))
        return jnp.mean(loss), jnp.mean(wrong)

    def update(carry: Any, key: Any) -> Any:
        params, state = carry
        gradient = jax.grad(lambda p: scores(p, key, s["batch"])[0])(params)
        changes, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, changes), state), None

    def stretch(carry: Any, key: Any) -> Any:
        k_train, k_test = jax.random.split(key)
        carry, _ = jax.lax.scan(update, carry, jax.random.split(k_train, s["updates"] // s["evaluations"]))
        return carry, scores(carry[0], k_test, 200)

    @jax.jit
    @jax.vmap
    def run(start: Any, keys: Any) -> Any:
        params = (start, (jnp.zeros(s["size"]), jnp.zeros(())))
        return jax.lax.scan(stretch, (params, optimizer.init(params)), keys)[1]

    found, seeds = {}, jax.random.split(jax.random.key(300 + delay), s["seeds"])
    for name, params in starts.items():
        extra = s["flossing"]["updates"] if name == "longer" else 0
        stretches = -(-s["evaluations"] * (s["updates"] + extra) // s["updates"])
        keys = jnp.stack([jax.random.split(seed, stretches) for seed in seeds])
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        loss, wrong = (np.asarray(a, np.float64) for a in run(stacked, keys))
        found[name] = {"loss": loss.tolist(), "wrong": wrong[:, -1].tolist()}
    return found


def figure(before: Any, after: Any, curves: dict[str, Any], s: dict[str, Any]) -> Any:
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    i = np.arange(1, s["size"] + 1)
    axes[0].axhline(0, color="0.85", lw=0.8, zorder=0)
    axes[0].axvspan(0.5, s["flossed"] + 0.5, color="tab:blue", alpha=0.08, lw=0, label="flossed")
    axes[0].plot(i, before["exponents"], "o", ms=4, color=COLOURS["plain"], label="before")
    axes[0].plot(i, after["exponents"], "o", ms=4, color=COLOURS["flossed"], label="after")
    axes[0].set(xlabel="i", ylabel="exponent i (nats per step)", title=f"rnn, {s['size']} units")
    delays, names = s["delays"], list(curves[str(s["delays"][0])])
    shown = max(delays, key=lambda d: abs(contrast(curves[str(d)])))
    step = s["updates"] // s["evaluations"]
    for name in names:
        losses = np.asarray(curves[str(shown)][name]["loss"])
        x = step * np.arange(1, losses.shape[1] + 1)
        axes[1].plot(x, np.median(losses, axis=0), color=COLOURS[name], label=name, lw=1.6)
        axes[1].fill_between(x, losses.min(axis=0), losses.max(axis=0), color=COLOURS[name], alpha=0.12, lw=0)
        right = [100 * (1 - np.asarray(curves[str(d)][name]["wrong"])) for d in delays]
        axes[2].plot(delays, [np.median(r) for r in right], "o-", ms=4, color=COLOURS[name], label=name, lw=1.6)
    axes[1].set(xlabel="updates", ylabel="test loss", title=f"copy after {shown} steps: median, range of seeds")
    axes[1].set_ylim(bottom=0)
    axes[2].set(
        xlabel="delay", xticks=delays, ylabel="right (%)", title="after training, median of seeds", ylim=(45, 103)
    )
    axes[2].axhline(50, color="0.85", lw=0.8, zorder=0)
    axes[0].legend(frameon=False, loc="lower left")
    for ax in axes[1:]:
        ax.legend(frameon=False, loc="lower left")
    return fig


def contrast(of_delay: dict[str, Any]) -> float:
    """How much flossing has changed."""
    return float(np.median(of_delay["flossed"]["wrong"]) - np.median(of_delay["plain"]["wrong"]))


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    cell, num = bptt.rnn(s["size"]), s["flossed"]
    keys = jax.random.split(jax.random.key(0), s["seeds"])
    plain = [cell.init(key, 1) for key in keys]
    flossed, penalties = floss(cell, plain, num, s["flossing"])
    alone, _ = floss(cell, plain, 1, s["flossing"])
    orthogonal = bptt.rnn(s["size"], recurrent_init=jax.nn.initializers.orthogonal())
    starts = {"plain": plain, "longer": plain, "largest alone": alone, "flossed": flossed}
    starts["orthogonal"] = [orthogonal.init(key, 1) for key in keys]
    found = measure(cell, {k: v[0] for k, v in starts.items() if k != "longer"}, num, s["measured"])
    steps, short = s["measured"]["steps"], s["measured"]["short"]
    print_table(
        f"rnn, {s['size']} units, of the first seed; log10 of the condition number of {steps} steps, in the first "
        f"{num} directions and in all; and of {short} steps, from singular values",
        ("weights", "exponent 1", f"exponent {num}", f"first {num}", "all", f"first {num}, {short} steps"),
        [[name, *list(row.values())[1:]] for name, row in found.items()],
    )
    medians = np.median(penalties, axis=0)
    print(f"flossing: {medians[0]:.4g} before, {medians[-1]:.2g} after {len(medians)} updates (median of seeds)")
    curves = {str(delay): learn(cell, starts, delay, s) for delay in s["delays"]}
    print_table(
        f"Delayed copy, {s['updates']} updates, {s['seeds']} seeds: right (%), median (least .. most)",
        ("weights", *(f"delay {d}" for d in s["delays"])),
        [[name, *(share(curves[str(d)][name]["wrong"]) for d in s["delays"])] for name in starts],
    )
    print_table(
        "Test loss after training, median of seeds (1: nothing learned)",
        ("weights", *(f"delay {d}" for d in s["delays"])),
        [
            [n, *(float(np.median(np.asarray(curves[str(d)][n]["loss"])[:, -1])) for d in s["delays"])]
            for n in starts
        ],
    )
    write(
        arguments.out / "flossing.png",
        lambda path: figure(found["plain"], found["flossed"], curves, s).savefig(path, dpi=130),
    )
    save(arguments.out, "flossing", s, {"networks": found, "penalties": penalties.tolist(), "copy": curves})


def share(wrong: list[float]) -> str:
    right = 100 * (1 - np.asarray(wrong))
    return f"{np.median(right):.1f} ({right.min():.1f} .. {right.max():.1f})"


if __name__ == "__main__":
    main()
