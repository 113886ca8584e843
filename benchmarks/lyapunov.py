"""Are the Lyapunov exponents right?

Against closed forms (products of Gaussian matrices: Newman 1986; Arnold's cat map; the logistic map; gates without
weights), against mean-field theory (``h <- W tanh h`` with entries of W drawn from N(0, g^2/N), N -> infinity;
Sompolinsky, Crisanti, Sommers 1988), and the Lorenz system by Runge-Kutta steps. "Deviation" is in units of the
standard error. The networks' standard error comes from their scatter; at finite N they are biased low.

Long products: the log norm of products of 100,000 matrices in float32 against float64 NumPy.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from gradient_flow import mean_field_rate
from jax.scipy.special import digamma
from measure import parser, print_rows, save, write

import bptt_jax as bptt

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FULL: dict[str, Any] = {
    "gains": [0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0],
    "network": {"size": 400, "seeds": 10, "steps": 3000, "warmup": 1000},
    "sizes": [100, 200, 400, 800],
    "gaussian_steps": 20_000,
    "map_steps": 20_000,
    "lorenz_steps": 200_000,
    "long": {"steps": 100_000, "size": 8},
}
QUICK = FULL | {
    "gains": [0.8, 1.5, 3.0],
    "network": {"size": 200, "seeds": 3, "steps": 600, "warmup": 200},
    "sizes": [],
    "gaussian_steps": 3000,
    "lorenz_steps": 20_000,
    "map_steps": 3000,
    "long": {"steps": 1000, "size": 2},
}
GAUSSIAN, WARMUP = 10, 100
LORENZ_STEP = 0.01


def newman(n: int = GAUSSIAN) -> np.ndarray:
    """Exponents of products of n x n matrices with entries N(0, 1/n)."""
    i = jnp.arange(1, n + 1)
    return np.asarray((math.log(2 / n) + digamma((n - i + 1) / 2)) / 2, np.float64)


def multiply(_: None, h: Any, x: Any) -> Any:
    return x @ h


def logistic(_: None, h: Any, x: Any) -> Any:
    return 4 * h * (1 - h)


def gaussian_run(key: Any, steps: int) -> bptt.analysis.LyapunovSpectrum:
    matrices = jax.random.normal(key, (steps + WARMUP, GAUSSIAN, GAUSSIAN)) / math.sqrt(GAUSSIAN)
    return bptt.lyapunov_exponents(multiply, None, jnp.zeros(GAUSSIAN), matrices, warmup=WARMUP)


def logistic_run(start: Any, steps: int) -> bptt.analysis.LyapunovSpectrum:
    return bptt.lyapunov_exponents(logistic, None, start[None], length=steps + WARMUP, warmup=WARMUP)


def lorenz(_: None, h: Any, x: Any) -> Any:
    """One step of the classical Runge-Kutta scheme."""

    def flow(h: Any) -> Any:
        return jnp.stack([10 * (h[1] - h[0]), h[0] * (28 - h[2]) - h[1], h[0] * h[1] - 8 / 3 * h[2]])

    dt = LORENZ_STEP
    k1 = flow(h)
    k2 = flow(h + dt / 2 * k1)
    k3 = flow(h + dt / 2 * k2)
    return h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + flow(h + dt * k3))


def network(weights: Any, h: Any, x: Any) -> Any:
    return weights @ jnp.tanh(h)


def random_network(gain: float, size: int, n: dict[str, Any]) -> tuple[bptt.analysis.LyapunovSpectrum, list[float]]:
    """The largest exponent of several networks, leaves with an axis of seeds; for g < 1 the spectral radii."""
    found, radii = [], []
    for key in jax.random.split(jax.random.key(0), n["seeds"]):
        k_weights, k_state = jax.random.split(key)
        weights = gain / math.sqrt(size) * jax.random.normal(k_weights, (size, size))
        state = jax.random.normal(k_state, (size,))
        length, warmup = n["steps"] + n["warmup"], n["warmup"]
        found.append(bptt.lyapunov_exponents(network, weights, state, length=length, num=1, warmup=warmup))
        if gain < 1:
            radii.append(float(np.max(np.abs(np.linalg.eigvals(np.asarray(weights, np.float64))))))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found), radii


def mean_field(s: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for gain, size in [(g, s["network"]["size"]) for g in s["gains"]] + [(2.0, size) for size in s["sizes"]]:
        each, radii = random_network(gain, size, s["network"])
        pooled, scatter = each.pooled(), np.std(each.exponents, ddof=1)
        row = row_of("", pooled.exponents[0], pooled.standard_errors[0], mean_field_rate(gain))
        within = float(np.median(each.standard_errors))
        own = float(np.mean(np.log(radii))) if radii else None  # exact, where the state dies
        rows.append({"gain": gain, "N": size} | row | {"scatter": float(scatter), "within": within, "own": own})
    return rows


def row_of(name: str, measured: Any, error: Any, theory: float) -> dict[str, Any]:
    difference = float(measured) - theory if np.isfinite(theory) else 0.0 if measured == theory else math.nan
    # An error of some rounding is no statistics.
    deviation = difference / float(error) if error > 1e-5 else None
    return {
        "case": name,
        "measured": float(measured),
        "error": float(error),
        "theory": float(theory),
        "difference": difference,
        "deviation": deviation,
    }


def exact(s: dict[str, Any]) -> dict[str, Any]:
    """Rows for every exponent with a known value."""
    rows = []

    def add(name: str, spectrum: bptt.analysis.LyapunovSpectrum, theory: Any, *, unit: float = 1) -> None:
        found = np.asarray(spectrum.exponents, np.float64) / unit
        errors = np.asarray(spectrum.standard_errors, np.float64) / unit
        for i, values in enumerate(zip(found, errors, theory, strict=True)):
            rows.append(row_of(f"{name} {i + 1}" if len(found) > 1 else name, *values))

    gaussian = gaussian_run(jax.random.key(1), s["gaussian_steps"])
    add("Gaussian product", gaussian, newman())
    golden = math.log((3 + math.sqrt(5)) / 2)
    cat = jnp.asarray([[2.0, 1.0], [1.0, 1.0]])
    length = s["map_steps"]
    for size, name in ((3, "gru"), (3, "lstm")):
        cell = bptt.gru(size) if name == "gru" else bptt.lstm(size, forget_bias=0.0)
        params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0), 1))
        zeros = bptt.lyapunov_exponents(cell.step, params, cell.initial_state(), jnp.zeros((200, 1)), warmup=50)
        add(f"{name}, zero weights", zeros, [-math.log(2)] * 3 + [-np.inf] * (len(zeros.exponents) - 3))
    add(
        "Arnold's cat",
        bptt.lyapunov_exponents(lambda p, h, x: p @ h, cat, jnp.zeros(2), length=length, warmup=WARMUP),
        (golden, -golden),
    )
    with jax.enable_x64(True):
        add("logistic map", logistic_run(jnp.float64(0.2345), length), [math.log(2)])
        flow = bptt.lyapunov_exponents(lorenz, None, jnp.ones(3), length=s["lorenz_steps"], warmup=5000)
    add("Lorenz", flow, (0.9056, 0.0, -14.572), unit=LORENZ_STEP)
    total = float(np.sum(np.asarray(flow.exponents))) / LORENZ_STEP
    return {
        "rows": rows,
        "newman": [r for r in rows if r["case"].startswith("Gaussian")],
        "lorenz": {"sum": total, "kaplan_yorke_dimension": float(flow.kaplan_yorke_dimension)},
    }


def float32_orbits(steps: int = 20_000, orbits: int = 100) -> dict[str, float]:
    """What becomes of the logistic map in float32: the share at 0, and the largest cycle of the others."""

    def run(h: Any) -> Any:
        return jax.lax.scan(lambda h, _: (logistic(None, h, None), h), h, None, length=steps)[1]

    last = np.asarray(jax.jit(run)(jax.random.uniform(jax.random.key(1), (orbits,), jnp.float32)))[-steps // 2 :]
    cycles = [len(np.unique(orbit)) for orbit in last.T]
    return {"at_zero": float(np.mean(last[-1] == 0)), "longest_cycle": max(cycles)}


def long_factors(steps: int, size: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    turn = np.array([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]])
    halves = np.where(np.arange(steps) % 2, 0.5, 2.0)[:, None, None] * np.eye(2)
    mixed = np.where(np.arange(steps) < steps // 2, 1.1, 0.95)[:, None, None] * np.eye(2)
    factors = {
        "0.9 I": np.broadcast_to(0.9 * np.eye(2), (steps, 2, 2)),
        "1.1 I": np.broadcast_to(1.1 * np.eye(2), (steps, 2, 2)),
        "2 I, I / 2 by turns": halves,
        "1.1 I, then 0.95 I": mixed,
        "rotation, 0.99": np.broadcast_to(0.99 * turn, (steps, 2, 2)),
        "rotation, 1.01": np.broadcast_to(1.01 * turn, (steps, 2, 2)),
        f"Gaussian, {size} x {size}": rng.standard_normal((steps, size, size)) / math.sqrt(size),
    }
    return {name: jnp.asarray(a, jnp.float32) for name, a in factors.items()}


def by_hand_log_norms(factors: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """log ||J_{T-1} ... J_t||_2 at the marked t, in float64 with the logarithm of the scale apart."""
    product, log_scale, found = np.eye(factors.shape[1]), 0.0, np.full(len(factors), np.nan)
    for t in range(len(factors) - 1, -1, -1):
        product = product @ factors[t]
        size = np.max(np.abs(product))
        product, log_scale = product / size, log_scale + math.log(size)
        if marks[t]:
            found[t] = log_scale + math.log(np.linalg.norm(product, 2))
    return found[marks]


def long_products(steps: int, size: int) -> list[dict[str, Any]]:
    rows = []
    marks = np.arange(steps) % max(1, steps // 100) == 0

    def error(got: Any, expected: Any) -> float:
        return float(np.max(np.abs(np.asarray(got, np.float64) - expected) / np.maximum(np.abs(expected), 1)))

    def norms(p: Any) -> Any:
        return p.log_scale + jnp.log(jnp.linalg.norm(p.mantissa, 2, axis=(-2, -1)))

    for name, factors in long_factors(steps, size).items():
        expected = by_hand_log_norms(np.asarray(factors, np.float64), marks)
        suffix, prefix = bptt.linalg.suffix_products(factors), bptt.linalg.prefix_products(factors)
        rows.append(
            {
                "factors": name,
                "log norm": float(expected[0]),
                "product": error(norms(bptt.jacobian_product(factors)), expected[0]),
                "product_log_norms": error(np.asarray(bptt.product_log_norms(factors))[marks], expected),
                "suffix_products": error(norms(jax.tree.map(lambda a: a[marks], suffix)), expected),
                "prefix_products": error(norms(jax.tree.map(lambda a: a[-1], prefix)), expected[0]),
            }
        )
    return rows


def figure(networks: list[dict[str, Any]], spectrum: list[dict[str, Any]], s: dict[str, Any]) -> Any:
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    size = s["network"]["size"]
    rows = [r for r in networks if r["N"] == size][: len(s["gains"])]
    gains = np.linspace(min(s["gains"]), max(s["gains"]), 200)
    left.axhline(0, color="0.85", lw=0.8, zorder=0)
    left.plot(gains, [mean_field_rate(g) for g in gains], "k-", lw=1.2, label="mean-field theory, N = ∞")
    values = [[r[k] for r in rows] for k in ("gain", "measured", "scatter")]
    left.errorbar(*values, fmt="o", color="tab:blue", ms=5, capsize=3, lw=1,
                  label=f"measured, N = {size}; bars: scatter of networks")  # fmt: skip
    left.set(xlabel="gain g", ylabel="largest exponent (nats per step)", title="h ← W tanh h")
    i = np.arange(1, len(spectrum) + 1)
    right.plot(i, [r["theory"] for r in spectrum], "k_", ms=16, mew=1.4, label="Newman's formula")
    right.errorbar(i, [r["measured"] for r in spectrum], [2 * r["error"] for r in spectrum], fmt="o", ms=5,
                   color="tab:blue", capsize=3, lw=1, label="measured; bars: 2 standard errors")  # fmt: skip
    right.set(xlabel="i", ylabel="exponent i (nats per step)", xticks=i)
    right.set_title(f"products of Gaussian {len(i)} x {len(i)} matrices, {s['gaussian_steps']} steps")
    inset = right.inset_axes((0.13, 0.16, 0.5, 0.32))
    inset.axhspan(-2, 2, color="0.93", lw=0)
    inset.axhline(0, color="k", lw=0.8)
    inset.plot(i, [r["deviation"] for r in spectrum], "o", ms=4, color="tab:blue")
    inset.set(xticks=[], ylim=(-4, 4))
    inset.set_title("deviation in standard errors", fontsize="small")
    left.legend(frameon=False, loc="lower right")
    right.legend(frameon=False, loc="upper right")
    return fig


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    five = ("measured", "error", "theory", "difference", "scatter", "within", "own")
    n = s["network"]
    networks = mean_field(s)
    title = f"h <- W tanh h, {n['seeds']} networks of {n['steps']} steps; scatter: of the networks; within: median "
    print_rows(title + "standard error of one; own: mean log spectral radius", networks, *five)
    known = exact(s)
    print_rows("Known exponents, nats per step (Lorenz: per unit of time)", known["rows"], *five)
    found = known["lorenz"]
    print(f"Lorenz: sum {found['sum']:.4f} (-13.6667), dimension {found['kaplan_yorke_dimension']:.4f} (2.062)")
    orbits = float32_orbits()
    print(f"logistic map in float32, 100 orbits of 20,000 steps: {orbits}")
    products = long_products(**s["long"])
    print_rows(f"Products of {s['long']['steps']} matrices, float32: log norm, and relative errors", products)
    write(arguments.out / "lyapunov.png", lambda path: figure(networks, known["newman"], s).savefig(path, dpi=130))
    results = {"networks": networks, "exact": known, "float32_orbits": orbits, "long_products": products}
    save(arguments.out, "lyapunov", s, results)


if __name__ == "__main__":
    main()
