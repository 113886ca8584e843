"""Does the measured growth rate of the gradient agree with theory?

`rnn` without input, ``h <- tanh(g W h)`` with entries of W drawn from N(0, 1/N), for N -> infinity: the state dies
for g < 1 and the rate is ln g; for g > 1 it is chaotic with ``q = g^2 E tanh^2(sqrt(q) z)`` and the rate
``ln(g^2 E sech^4(sqrt(q) z)) / 2`` (Sompolinsky, Crisanti, Sommers 1988). At finite N and g < 1 the rate is,
exactly, ``ln(g rho(W))`` with the spectral radius of the very matrix: "own" in the table, beside the limit.

`lstm` at rest (h = c = 0, where f = sigmoid(b) and i = o = 1/2) is linear: ``c <- (sigmoid(b) + W_g / 4) c``. With
almost no recurrent weights the carousel is alone, ln sigmoid(b). With the orthogonal W_g of its initialisation the
rate is ln(sigmoid(b) + 1/4), but only for b < ln 3: above, the state leaves rest.

The estimator is the least-squares slope of log ||dL/dh_t|| against the number of steps back, for L = sum(h_T): what
`gradient_flow` calls `growth_rate` (checked first), without its products of N x N matrices. One fixed direction,
not the norm of the product: the norm of a non-normal product follows the direction that grows most (2 g at the
first step), a transient that says nothing about the rate, while an arbitrary direction grows by g from the first
step on. What is left of a transient falls as 1/T, hence several T. The state is run to its attractor beforehand.
"""

from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from measure import parser, print_table, save, write

import bptt_jax as bptt

ORACLES = {1.5: 0.06522, 2.0: 0.15472, 3.0: 0.31025, 5.0: 0.53243}
FULL: dict[str, Any] = {
    "gains": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 2.0],
    "biases": [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0],
    "lengths": [200, 500, 2000],
    "rnn_size": 400,
    "lstm_size": 128,
    "seeds": 6,
    "warmup": 1000,
}
QUICK = FULL | {
    "gains": [0.5, 1.0, 2.0],
    "biases": [0.0, 6.0],
    "lengths": [200],
    "rnn_size": 64,
    "lstm_size": 32,
    "seeds": 2,
    "warmup": 100,
}
WEAK = 0.004  # of the recurrent weights of the lstm: sigmoid(6) + WEAK / 4 < 1, so that it stays at rest


def mean_field_rate(g: float) -> float:
    """The rate of the infinite network in nats per step."""
    if g <= 1:
        return float(np.log(g))
    # The trapezoidal rule: sech^4 is so narrow at g = 5 that Gauss-Hermite with 200 nodes is wrong by 2 %.
    z = np.linspace(-12, 12, 20_001)
    w = np.exp(-z * z / 2)
    w /= w.sum()
    low, high = 1e-12, g * g  # q > 0 solves q = g^2 E tanh^2; the right-hand side is concave in q
    for _ in range(200):
        q = (low + high) / 2
        low, high = (q, high) if g * g * w @ np.tanh(np.sqrt(q) * z) ** 2 > q else (low, q)
    return float(np.log(g * g * w @ np.cosh(np.sqrt(q) * z) ** -4.0) / 2)


def check_theory() -> None:
    for g, expected in ORACLES.items():
        if abs(mean_field_rate(g) - expected) > 1e-5:
            raise SystemExit(f"mean field at g = {g}: {mean_field_rate(g)}, expected {expected}")


def loss(states: Any) -> jax.Array:
    return jnp.sum(states.h[-1] if hasattr(states, "h") else states[-1])


def slope(log_norms: np.ndarray) -> float:
    """Least-squares slope against the steps back, h_T itself being step 0."""
    back = np.arange(log_norms.size)
    return float(np.polyfit(back, log_norms[::-1].astype(np.float64), 1)[0])


def check_estimator() -> None:
    """The slope of the adjoints is the `growth_rate` of `gradient_flow`."""
    cell = bptt.rnn(16, gain=1.5)
    arguments = cell.init(jax.random.key(0), 1), jnp.linspace(-1, 1, 16), jnp.zeros((100, 1))
    flow = bptt.gradient_flow(cell.step, *arguments, loss, spectra=False)
    gains, logs = np.append(flow.signal.log_gains, 0), np.asarray(log_norms(cell.step, *arguments))
    if np.max(np.abs(gains[1:] - (logs - logs[-1]))) > 1e-3 or abs(slope(gains) - flow.growth_rate) > 1e-5:
        raise SystemExit("the slope of the adjoints is not the growth_rate of gradient_flow")


# Only the norms come out, so that the compiler drops the parameters' gradient.
log_norms = jax.jit(
    lambda step, params, h, xs: bptt.adjoints(step, params, h, xs, loss).log_norms, static_argnums=0
)


def rates(cell: bptt.Cell, key: jax.Array, lengths: list[int], warmup: int) -> tuple[list[float], Any]:
    """The rate for every length, all from one state on the attractor; and the parameters."""
    k_params, k_state = jax.random.split(key)
    params = cell.init(k_params, 1)
    h0, unravel = bptt.ravel_state(cell.initial_state())
    noise = unravel(jax.random.normal(k_state, h0.shape))
    start = bptt.final_state(cell.step, params, noise, jnp.zeros((warmup, 1)))
    measured = [log_norms(cell.step, params, start, jnp.zeros((t, 1))) for t in lengths]
    return [slope(np.asarray(m)) for m in measured], params


def over_seeds(values: list[list[float]]) -> list[tuple[float, float]]:
    """Mean and standard error for every length."""
    a = np.array(values)
    return list(zip(a.mean(0).tolist(), (a.std(0, ddof=1) / np.sqrt(len(a))).tolist(), strict=True))


def sweep_rnn(s: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for g in s["gains"]:
        cell, measured, exact = bptt.rnn(s["rnn_size"], gain=g), [], []
        for key in jax.random.split(jax.random.key(0), s["seeds"]):
            rate, params = rates(cell, key, s["lengths"], s["warmup"])
            measured.append(rate)
            exact.append(np.log(np.max(np.abs(np.linalg.eigvals(np.asarray(params.recurrent, np.float64))))))
        own = float(np.mean(exact)) if g < 1 else None
        for length, (mean, error) in zip(s["lengths"], over_seeds(measured), strict=True):
            row = {"gain": g, "T": length, "measured": mean, "error": error, "theory": mean_field_rate(g)}
            rows.append(row | {"difference": mean - row["theory"], "own": own})
    return rows


def sweep_lstm(s: dict[str, Any]) -> list[dict[str, Any]]:
    def weak(*args: Any) -> jax.Array:
        return WEAK * jax.nn.initializers.orthogonal()(*args)

    rows = []
    for name, extra, coupling in (("weak", {"recurrent_init": weak}, WEAK / 4), ("orthogonal", {}, 1 / 4)):
        for b in s["biases"]:
            cell = bptt.lstm(s["lstm_size"], forget_bias=b, **extra)
            keys = jax.random.split(jax.random.key(1), s["seeds"])
            measured = [rates(cell, key, s["lengths"], s["warmup"])[0] for key in keys]
            carousel = 1 / (1 + np.exp(-b))
            theory = float(np.log(carousel + coupling)) if carousel + coupling < 1 else None
            for length, (mean, error) in zip(s["lengths"], over_seeds(measured), strict=True):
                row = {"recurrent": name, "bias": b, "T": length, "measured": mean, "error": error}
                difference = None if theory is None else mean - theory
                rows.append(row | {"theory": theory, "difference": difference, "carousel": float(np.log(carousel))})
    return rows


def points(ax: Any, x: str, rows: list[dict[str, Any]], look: tuple[str, str, int], label: str) -> None:
    marker, colour, size = look
    xs, ys, errors = ([row[k] for row in rows] for k in (x, "measured", "error"))
    ax.errorbar(xs, ys, errors, fmt=marker, color=colour, ms=size, capsize=2, lw=1, label=label)


def figure(rnn: list[dict[str, Any]], lstm: list[dict[str, Any]], s: dict[str, Any]) -> Any:
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    g = np.linspace(min(s["gains"]), max(s["gains"]), 200)
    left.plot(g, [mean_field_rate(x) for x in g], "k-", lw=1.2, label="theory, N = ∞")
    for length, look in zip(s["lengths"], (("o", "0.75", 8), ("s", "0.5", 5), ("x", "0.0", 6)), strict=False):
        points(left, "gain", [r for r in rnn if r["T"] == length], look, f"measured, T = {length}")
    left.set(xlabel="recurrent gain g", title=f"rnn, N = {s['rnn_size']}")
    b = np.linspace(min(s["biases"]), max(s["biases"]), 200)
    carousel = 1 / (1 + np.exp(-b))
    below = b < np.log(3)
    right.plot(b, np.log(carousel), "k-", lw=1.2, label=r"theory: $\ln\,\sigma(b)$")
    right.plot(b[below], np.log(carousel[below] + 0.25), "k--", lw=1.2, label=r"theory: $\ln(\sigma(b) + 1/4)$")
    last = [r for r in lstm if r["T"] == s["lengths"][-1]]
    for name, look in (("weak", ("o", "0.5", 6)), ("orthogonal", ("^", "0.0", 6))):
        rows = [r for r in last if r["recurrent"] == name]
        points(right, "bias", rows, look, f"measured, {name} recurrent weights")
    right.set(xlabel="forget-gate bias b", title=f"lstm, N = {s['lstm_size']}, T = {s['lengths'][-1]}")
    for ax in (left, right):
        ax.axhline(0, color="0.8", lw=0.8, zorder=0)
        ax.set_ylabel("growth rate of |dL/dh| backwards (nats per step)")
        ax.legend(loc="lower right", frameon=False)
    return fig


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    check_theory()
    check_estimator()
    rnn = sweep_rnn(s)
    columns = ("T", "measured", "error", "theory", "difference")
    print_table(
        f"rnn, N = {s['rnn_size']}, {s['seeds']} seeds, nats per step",
        ("gain", *columns, "own", "from own"),
        [
            select(r | {"from own": r["own"] and r["measured"] - r["own"]}, "gain", *columns, "own", "from own")
            for r in rnn
        ],
    )
    lstm = sweep_lstm(s)
    print_table(
        f"lstm, N = {s['lstm_size']}, {s['seeds']} seeds, nats per step (no theory where the state leaves rest)",
        ("recurrent", "bias", *columns, "carousel"),
        [select(r, "recurrent", "bias", *columns, "carousel") for r in lstm],
    )
    write(arguments.out / "gradient_flow.png", lambda path: figure(rnn, lstm, s).savefig(path, dpi=130))
    save(arguments.out, "gradient_flow", s, {"rnn": rnn, "lstm": lstm})


def select(row: dict[str, Any], *columns: str) -> list[Any]:
    """Rates with five digits after the point: their differences are small."""
    return [row[c] if c in ("gain", "bias") or not isinstance(row[c], float) else f"{row[c]:.5f}" for c in columns]


if __name__ == "__main__":
    main()
