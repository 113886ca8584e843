"""Are the Lyapunov exponents right, are their error bars honest, and what do they cost?

Right: against closed forms (products of Gaussian matrices: Newman 1986; Arnold's cat map; the logistic map; gates
without weights), against mean-field theory (``h <- W tanh h`` with entries of W drawn from N(0, g^2/N), N ->
infinity; Sompolinsky, Crisanti, Sommers 1988), and the Lorenz system by Runge-Kutta steps. "Deviation" is in units
of the standard error. The networks' standard error comes from their scatter; at finite N they are biased low.

Honest: of many independent runs, the share whose interval of two standard errors holds the true value, which is
known exactly, or, of the driven network, from many runs ten times as long. For the logistic map it must be all: its
growth telescopes (log |f'(x)| = ln 2 + u(f(x)) - u(x)), so that the error falls as 1/T and not as 1/sqrt(T). In
float32 its orbits end in 0 or a short cycle; hence float64. "short" shows the limit: runs of 500 steps,
whose batches of 25 are shorter than the 39 steps that the recurrence takes to forget.

Cost: against the QR recursion as one writes it by hand, on the same float32 trajectory, a step that contracts, so
that rounding does not lead it elsewhere: the Jacobian by hand (or, once, by `torch.func.jacrev`), J @ Q, QR at
every step; and, the fair control, QR at the very steps at which ours makes one. Compilation is timed apart. One
thread for OpenBLAS, which is faster for all that call it here; for PyTorch one or its default, whichever is faster.

Segments: all exponents with the steps cut into segments that are worked on side by side, against one piece.

Long: the log norm of products of 100,000 matrices in float32 against float64 NumPy.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # several threads in LAPACK on small matrices: 2-4 times slower

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from gradient_flow import mean_field_rate
from jax.scipy.special import digamma
from measure import Claim, compiled, interleaved_medians, parser, print_claims, print_table, save, write
from measure import seconds as timed

import bptt_jax as bptt

try:
    import torch
except ImportError:
    torch = None

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHORT = 500
FULL: dict[str, Any] = {
    "gains": [0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0],
    "network": {"size": 400, "seeds": 10, "steps": 3000, "warmup": 1000},
    "sizes": [100, 200, 400, 800],
    "gaussian_steps": 20_000,
    "map_steps": 20_000,
    "lorenz_steps": 200_000,
    "honesty": {"runs": 50, "steps": 4000, "repeats": 4, "reference": 1000},
    "cost": {
        "cases": [
            *(("rnn", size, None) for size in (32, 128, 256)),
            ("rnn", 256, 10),
            ("gru", 32, None),
            ("gru", 128, None),
            ("gru, jacrev", 32, None),
        ],
        "steps": 200,
        "repeats": 5,
    },
    "segments": {"sizes": [8, 32], "steps": {"cpu": 20_000, "gpu": 100_000}, "cuts": [16, 256], "repeats": 3},
    "long": {"steps": 100_000, "size": 8},
}
QUICK = FULL | {
    "gains": [0.8, 1.5, 3.0],
    "network": {"size": 200, "seeds": 3, "steps": 600, "warmup": 200},
    "sizes": [],
    "gaussian_steps": 3000,
    "lorenz_steps": 20_000,
    "map_steps": 3000,
    "honesty": {"runs": 50, "steps": SHORT, "repeats": 1, "reference": 50},
    "cost": {"cases": [("rnn", 32, None)], "steps": 100, "repeats": 1},
    "segments": {"sizes": [4], "steps": {"cpu": 1000, "gpu": 1000}, "cuts": [8], "repeats": 1},
    "long": {"steps": 1000, "size": 2},
}
GAUSSIAN, WARMUP = 10, 100
LORENZ_STEP = 0.01
AIM, PARALLEL_AIM = 3.0, 10.0


# Right


def newman(n: int) -> np.ndarray:
    """Exponents of products of n x n matrices with entries N(0, 1/n)."""
    i = jnp.arange(1, n + 1)
    return np.asarray((math.log(2 / n) + digamma((n - i + 1) / 2)) / 2, np.float64)


def multiply(_: None, h: Any, x: Any) -> Any:
    return x @ h


def logistic(_: None, h: Any, x: Any) -> Any:
    return 4 * h * (1 - h)


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


def random_network(gain: float, size: int, n: dict[str, Any]) -> tuple[bptt.LyapunovSpectrum, list[float]]:
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

    def add(name: str, spectrum: bptt.LyapunovSpectrum, theory: Any, *, unit: float = 1) -> None:
        found = np.asarray(spectrum.exponents, np.float64) / unit
        errors = np.asarray(spectrum.standard_errors, np.float64) / unit
        for i, values in enumerate(zip(found, errors, theory, strict=True)):
            rows.append(row_of(f"{name} {i + 1}" if len(found) > 1 else name, *values))

    gaussian = gaussian_run(jax.random.key(1), s["gaussian_steps"])
    add("Gaussian product", gaussian, newman(GAUSSIAN))
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
        "lorenz": {"sum": total, "kaplan_yorke_dimension": flow.kaplan_yorke_dimension},
    }


def float32_orbits(steps: int = 20_000, orbits: int = 100) -> dict[str, float]:
    """What becomes of the logistic map in float32: the share at 0, and the largest cycle of the others."""

    def run(h: Any) -> Any:
        return jax.lax.scan(lambda h, _: (logistic(None, h, None), h), h, None, length=steps)[1]

    last = np.asarray(jax.jit(run)(jax.random.uniform(jax.random.key(1), (orbits,), jnp.float32)))[-steps // 2 :]
    cycles = [len(np.unique(orbit)) for orbit in last.T]
    return {"at_zero": float(np.mean(last[-1] == 0)), "longest_cycle": max(cycles)}


# Honest


def gaussian_run(key: Any, steps: int) -> bptt.LyapunovSpectrum:
    matrices = jax.random.normal(key, (steps + WARMUP, GAUSSIAN, GAUSSIAN)) / math.sqrt(GAUSSIAN)
    return bptt.lyapunov_exponents(multiply, None, jnp.zeros(GAUSSIAN), matrices, warmup=WARMUP)


def logistic_run(start: Any, steps: int) -> bptt.LyapunovSpectrum:
    return bptt.lyapunov_exponents(logistic, None, start[None], length=steps + WARMUP, warmup=WARMUP)


def correlated(key: Any, steps: int, memory: float) -> Any:
    """An autoregressive sequence of unit variance: x_t = memory x_{t-1} + noise."""
    noise = jax.random.normal(key, (steps,)) * math.sqrt(1 - memory**2)
    first = jax.random.normal(jax.random.fold_in(key, 1))
    return jax.lax.scan(lambda x, n: (memory * x + n, memory * x + n), first, noise)[1]


def autoregressive_run(key: Any, steps: int) -> bptt.LyapunovSpectrum:
    """``h <- exp(x_t - 0.1) h``: the exponent is exactly -0.1, and x remembers some 20 steps."""
    xs = correlated(key, steps + WARMUP, 0.95)
    return bptt.lyapunov_exponents(lambda p, h, x: jnp.exp(x - 0.1) * h, None, jnp.ones(1), xs, warmup=WARMUP)


def driven_run(key: Any, steps: int) -> bptt.LyapunovSpectrum:
    """An rnn of four units on slow inputs, of which two exponents."""
    cell = bptt.rnn(4, gain=1.5)
    xs = jax.vmap(lambda k: correlated(k, steps + WARMUP, 0.9), out_axes=1)(jax.random.split(key, 2))
    params = cell.init(jax.random.key(7), 2)
    return bptt.lyapunov_exponents(cell.step, params, cell.initial_state(), xs, num=2, warmup=WARMUP)


def honesty(s: dict[str, Any]) -> list[dict[str, Any]]:
    h = s["honesty"]
    count, steps = h["runs"] * h["repeats"], h["steps"]

    def runs(one: Callable[[Any, int], bptt.LyapunovSpectrum], starts: Any, steps: int) -> Any:
        def brief(start: Any) -> Any:
            spectrum = one(start, steps)
            return spectrum.exponents, spectrum.standard_errors

        return [np.asarray(a, np.float64) for a in jax.jit(jax.vmap(brief))(starts)]

    keys = jax.random.split(jax.random.key(5), count)
    long, _ = runs(driven_run, jax.random.split(jax.random.key(6), h["reference"]), 10 * steps)
    truth = long.mean(axis=0)
    truth_error = long.std(axis=0, ddof=1) / math.sqrt(len(long))
    with jax.enable_x64(True):
        starts = jax.random.uniform(jax.random.key(1), (count,), jnp.float64)
        chaotic = runs(logistic_run, starts, steps)
    cases = [
        ("Gaussian product", runs(gaussian_run, keys, steps), newman(GAUSSIAN), None),
        ("logistic map", chaotic, np.array([math.log(2)]), None),
        ("autoregressive, short", runs(autoregressive_run, keys, SHORT), np.array([-0.1]), None),
        ("driven rnn", runs(driven_run, keys, steps), truth, truth_error),
    ]
    if steps != SHORT:
        cases.insert(2, ("autoregressive", runs(autoregressive_run, keys, steps), np.array([-0.1]), None))
    rows = []
    for name, (found, errors), theory, reference in cases:
        held = np.abs(found - theory) <= 2 * errors
        rows += [
            {
                "case": f"{name} {i + 1}" if found.shape[1] > 1 else name,
                "runs": count,
                "T": SHORT if name.endswith("short") else steps,
                "held": 100 * float(np.mean(held[:, i])),
                "worst_of_50": 100 * float(np.min(held[:, i].reshape(-1, h["runs"]).mean(axis=1))),
                "scatter": float(np.std(found[:, i], ddof=1)),
                "mean_error": float(np.mean(errors[:, i])),
                "reference_error": None if reference is None else float(reference[i]),
            }
            for i in range(found.shape[1])
        ]
    return rows


# Cost


def by_hand_numpy(jacobian: Callable[[Any, Any], Any], h: Any, xs: Any, frame: Any, when: np.ndarray) -> np.ndarray:
    total = np.zeros(frame.shape[1])
    for x, now in zip(xs, when, strict=True):
        h, j = jacobian(h, x)
        frame = j @ frame
        if now:
            frame, r = np.linalg.qr(frame)
            total += np.log(np.abs(np.diagonal(r)))
    return np.sort(total / len(xs))[::-1]


def by_hand_torch(jacobian: Callable[[Any, Any], Any], h: Any, xs: Any, frame: Any, when: Any) -> np.ndarray:
    total = torch.zeros(frame.shape[1])
    for x, now in zip(xs, when, strict=True):
        h, j = jacobian(h, x)
        frame = j @ frame
        if now:
            frame, r = torch.linalg.qr(frame)
            total += torch.log(torch.abs(torch.diagonal(r)))
    return np.sort(total.numpy() / len(xs))[::-1]


def peers(name: str, params: Any, xs: Any, frame: Any, when: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    """The recursions by hand, with QR when told."""

    def forward(lib: Any, p: Any, h: Any, x: Any) -> Any:
        """h_t, in NumPy or PyTorch, and what its Jacobian needs."""
        a = p.input @ x + p.bias
        if name == "rnn":
            return lib.tanh(p.recurrent @ h + a), ()
        size = len(h)
        r_h, z_h, n_h = (p.recurrent[i * size : (i + 1) * size] @ h for i in range(3))
        r = 1 / (1 + lib.exp(-(r_h + a[:size])))
        z = 1 / (1 + lib.exp(-(z_h + a[size : 2 * size])))
        inner = n_h + p.recurrent_bias
        n = lib.tanh(a[2 * size :] + r * inner)
        return (1 - z) * n + z * h, (r, z, n, inner)

    def jacobian(lib: Any, p: Any, h: Any, x: Any) -> Any:
        """h_t and dh_t/dh_{t-1}."""
        new, parts = forward(lib, p, h, x)
        if name == "rnn":
            return new, (1 - new * new)[:, None] * p.recurrent
        r, z, n, inner = parts
        w_r, w_z, w_n = (p.recurrent[i * len(h) : (i + 1) * len(h)] for i in range(3))
        through_n = (1 - z) * (1 - n * n)
        j = (through_n * r)[:, None] * w_n + (through_n * inner * r * (1 - r))[:, None] * w_r
        return new, j + ((h - n) * z * (1 - z))[:, None] * w_z + lib.diag(z)

    found: dict[str, Callable[[], np.ndarray]] = {}
    start = np.zeros(len(frame), np.float32)
    if "jacrev" not in name:
        of_numpy = partial(jacobian, np, jax.tree.map(np.asarray, params))
        found["NumPy"] = partial(by_hand_numpy, of_numpy, start, np.asarray(xs), np.array(frame), when)
    if torch is not None:
        weights = jax.tree.map(lambda a: torch.from_numpy(np.array(a)), params)

        def automatic(h: Any, x: Any) -> Any:
            j, new = torch.func.jacrev(lambda h: (forward(torch, weights, h, x)[0],) * 2, has_aux=True)(h)
            return new, j

        h, inputs, columns = (torch.from_numpy(np.array(a)) for a in (start, xs, frame))
        j = automatic if "jacrev" in name else partial(jacobian, torch, weights)
        found["PyTorch"] = partial(by_hand_torch, j, h, inputs, columns, when)
    return found


def quickest_threads(run: Callable[[], Any]) -> int:
    """One thread for PyTorch, or its default: whichever is faster is set."""
    times = {}
    for threads in {1, os.cpu_count() or 1}:
        torch.set_num_threads(threads)
        run()
        times[threads] = min(timed(run) for _ in range(3))
    best = min(times, key=times.__getitem__)
    torch.set_num_threads(best)
    return best


def cost(name: str, size: int, num: int | None, c: dict[str, Any]) -> dict[str, Any]:
    cell = bptt.rnn(size, gain=0.9) if name == "rnn" else bptt.gru(size)
    params, xs = cell.init(jax.random.key(0), 8), 0.3 * jax.random.normal(jax.random.key(1), (c["steps"], 8))

    def exponents(params: Any, xs: Any) -> bptt.LyapunovSpectrum:
        return bptt.lyapunov_exponents(cell.step, params, cell.initial_state(), xs, num=num)

    ours, compiling = compiled(exponents, params, xs)
    spectrum = ours(params, xs)
    frame = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (size, num or size)))[0]
    always, seldom = np.ones(c["steps"], bool), np.any(np.asarray(spectrum.growth) != 0, axis=1)
    theirs = peers(name, params, xs, frame, always)
    fewer = {f"{k}, seldom": run for k, run in peers(name, params, xs, frame, seldom).items()}
    answers = {k: float(np.max(np.abs(run() - np.asarray(spectrum.exponents)))) for k, run in theirs.items()}
    if max(answers.values(), default=0) > 2e-3:
        raise SystemExit(f"{name} {size}: exponents differ from those by hand by {answers}")
    threads = quickest_threads(theirs["PyTorch"]) if torch is not None else None
    times = interleaved_medians({"ours": lambda: ours(params, xs), **theirs, **fewer}, c["repeats"])
    ratios = {f"{k} / ours": times[k] / times["ours"] if k in times else None
              for k in ("NumPy", "NumPy, seldom", "PyTorch", "PyTorch, seldom")}  # fmt: skip
    return {
        "step": name,
        "D": size,
        "exponents": num or size,
        "QRs": int(seldom.sum()),
        "compiled in s": compiling,
        "us per step": 1e6 * times["ours"] / c["steps"],
        **ratios,
        "difference": f"{max(answers.values(), default=math.nan):.1e}",
        "PyTorch's threads": threads,
    }


def side_by_side(size: int, s: dict[str, Any]) -> list[dict[str, Any]]:
    """All exponents with the steps cut into segments, in parallel over time, against one piece."""
    steps = s["steps"]["cpu" if jax.default_backend() == "cpu" else "gpu"]
    cell = bptt.rnn(size, gain=0.9)
    params, xs = cell.init(jax.random.key(0), 8), 0.3 * jax.random.normal(jax.random.key(1), (steps, 8))

    def exponents(segments: int, params: Any, xs: Any) -> bptt.LyapunovSpectrum:
        return bptt.lyapunov_exponents(
            cell.step, params, cell.initial_state(), xs, warmup=steps // 100, segments=segments
        )

    runs = {n: partial(compiled(partial(exponents, n), params, xs)[0], params, xs) for n in (1, *s["cuts"])}
    whole = runs[1]()
    off = {n: jnp.abs(runs[n]().exponents - whole.exponents) / whole.standard_errors for n in s["cuts"]}
    wrong = {n: float(jnp.max(o)) for n, o in off.items() if not jnp.max(o) < 0.1}
    if wrong:
        raise SystemExit(f"D = {size}: cut into segments the exponents are off by {wrong} standard errors")
    times = interleaved_medians({str(n): run for n, run in runs.items()}, s["repeats"])
    return [
        {
            "D": size,
            "steps": steps,
            "segments": n,
            "one piece / segments": times["1"] / times[str(n)],
            "off, in standard errors": float(jnp.max(off[n])),
        }
        for n in s["cuts"]
    ]


# Long


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
        return p.log_scale + jnp.log(jnp.linalg.norm(p.matrix, 2, axis=(-2, -1)))

    for name, factors in long_factors(steps, size).items():
        expected = by_hand_log_norms(np.asarray(factors, np.float64), marks)
        suffix, prefix = bptt.suffix_products(factors), bptt.prefix_products(factors)
        rows.append(
            {
                "factors": name,
                "log norm": float(expected[0]),
                "product": error(norms(bptt.product(factors)), expected[0]),
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

    def table(title: str, rows: list[dict[str, Any]], *digits: str) -> None:
        keys = [k for k in rows[0] if rows[0][k] != ""]
        cells = [[f"{r[k]:.5f}" if k in digits and r[k] is not None else r[k] for k in keys] for r in rows]
        print_table(title, keys, cells)

    n = s["network"]
    networks = mean_field(s)
    five = ("measured", "error", "theory", "difference", "scatter", "within", "own")
    title = f"h <- W tanh h, {n['seeds']} networks of {n['steps']} steps; scatter: of the networks; within: median "
    table(title + "standard error of one; own: mean log spectral radius", networks, *five)
    known = exact(s)
    table("Known exponents, nats per step (Lorenz: per unit of time)", known["rows"], *five)
    found = known["lorenz"]
    print(f"Lorenz: sum {found['sum']:.4f} (-13.6667), dimension {found['kaplan_yorke_dimension']:.4f} (2.062)")
    orbits = float32_orbits()
    print(f"logistic map in float32, 100 orbits of 20,000 steps: {orbits}")
    held = honesty(s)
    h = s["honesty"]
    table(
        f"Share of runs (%) whose interval of 2 standard errors holds the truth; worst of {h['repeats']} sets of "
        f"{h['runs']} runs",
        held,
        "scatter",
        "mean_error",
        "reference_error",
    )
    costs = [cost(name, size, num, s["cost"]) for name, size, num in s["cost"]["cases"]]
    if torch is None:
        print("\nPyTorch is not installed: its columns are empty")
    table(f"Cost of {s['cost']['steps']} steps, float32; ratios above 1: ours is faster", costs)
    claims = [
        Claim(
            "Lyapunov exponents",
            f"{r['step']} {r['D']}, {r['exponents']} of them",
            f"{k}, QR at every step",
            r[k],
            AIM,
        )
        for r in costs
        for k in ("NumPy / ours", "PyTorch / ours")
        if r[k] is not None
    ]
    cuts = [row for size in s["segments"]["sizes"] for row in side_by_side(size, s["segments"])]
    table("All exponents with the steps cut into segments, float32; above 1: faster than in one piece", cuts)
    if jax.default_backend() != "cpu":
        claims += [
            Claim(
                "Lyapunov exponents",
                f"D = {size}, {cuts[0]['steps']} steps",
                "one piece over segments side by side",
                max(r["one piece / segments"] for r in cuts if r["D"] == size),
                PARALLEL_AIM,
            )
            for size in s["segments"]["sizes"]
        ]
    print_claims(claims)
    products = long_products(**s["long"])
    table(f"Products of {s['long']['steps']} matrices, float32: log norm, and relative errors", products)
    write(arguments.out / "lyapunov.png", lambda path: figure(networks, known["newman"], s).savefig(path, dpi=130))
    results = {"networks": networks, "exact": known, "float32_orbits": orbits, "honesty": held}
    save(
        arguments.out, "lyapunov", s, results | {"cost": costs, "segments": cuts, "long_products": products}, claims
    )


if __name__ == "__main__":
    main()
