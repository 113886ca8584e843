"""Does memory stay where it should: flat for `gradient_flow`, O(sqrt(T)) for the rematerialised unroll?

(a) `gradient_flow` never holds all Jacobians: aimed at less than 300 MB above the trajectory at D = 256, T = 4000,
    where the Jacobians alone would take 1.05 GB.
(b) the gradient through `final_state` and `unroll`, plain and with ``remat=True``, for growing T: exponents of a
    power law beside the theory, 1 and 1/2; and the time that the recomputation costs, plain and remat by turns.
    What `unroll` returns is O(T) whatever is done, and so is the copy of the inputs that segments of unequal length
    cost: exponents are fitted with and without these.
(c) one whole update of training an lstm with `bptt_jax.experiments.loop` at lengths up to T = 100,000: how much
    memory and time, plain and with ``remat=True``, where both fit.
(d) ``gradient_flow(..., num=4)``, which forms no D x D matrix: at D = 8192, T = 100, where the Jacobians alone
    would take 27 GB, aimed at less than 24 GiB. Log norms of the products of the last 1 and of the last 10
    Jacobians, and the singular values of the last, are compared with ARPACK's (through SciPy, in double precision,
    by products with the weights).
(e) what is asked for at most 4 GiB: `gradient_flow` at T = 1,000,000, D = 64 and at T = 2000, D = 1024, and the
    gradient of a loss on the last state over T = 1,000,000 steps at D = 128 (``remat=True``). The plan, results
    included, is that with the spectra of every step; run it is with those of some steps, which take the same memory
    but for the results.

Two measures. "temp" is what the compiler plans for intermediate results, to the byte. "peak" is the peak of the
resident memory of a fresh process above what it held after the imports, the inputs and a first call on a tiny case;
it includes the compilation, some tens of MB, so small things cannot be seen in it. On a CPU, where both can be had.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that are started, too

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import (
    Claim,
    compiled,
    in_child,
    parser,
    peak_above_now,
    print_claims,
    print_rows,
    relative_error,
    save,
)
from scipy.sparse.linalg import LinearOperator, svds

import bptt_jax as bptt
from bptt_jax.experiments.loop import init_state, make_update
from bptt_jax.experiments.network import network
from bptt_jax.experiments.tasks import adding
from bptt_jax.experiments.timing import interleaved_medians

MB = 1e6
INPUT_SIZE = 8
FULL: dict[str, Any] = {
    "flow": [[64, 4000], [256, 1000], [256, 4000]],
    "stride": 10,
    "lengths": [1000, 4000, 16000, 64000],  # a fixed factor apart, see fit_exponents
    "peaks_from": 1000,
    "hidden": 128,
    "repeats": 5,
    "training": {"lengths": [1000, 10_000, 100_000], "plain_up_to": 100_000, "batch": 8},
    "matrix_free": {"hidden": 8192, "length": 100, "num": 4, "back": [1, 10]},
    "large": {"flow": [[64, 1_000_000, 1000], [1024, 2000, 500]], "gradient": [128, 1_000_000]},
}
QUICK: dict[str, Any] = FULL | {"flow": [[64, 500]], "lengths": [250, 1000, 4000], "peaks_from": 4000, "repeats": 3}
QUICK["training"] = {"lengths": [250, 1000], "plain_up_to": 1000, "batch": 2}
QUICK["matrix_free"] = FULL["matrix_free"] | {"hidden": 256, "length": 40}
QUICK["large"] = {"flow": [[64, 2000, 1000]], "gradient": [128, 10_000]}
AIM_MB = 300
MATRIX_FREE_AIM_MB = 24 * 1024**3 / 1e6
LARGE_AIM_MB = 4 * 1024**3 / 1e6
KINDS = ("final_state", "unroll")


def loss(states: jax.Array) -> jax.Array:
    return jnp.sum(states[-1])


def problem(hidden: int, length: int) -> tuple[bptt.Step, Any, jax.Array, jax.Array]:
    cell = bptt.rnn(hidden)
    xs = jax.random.normal(jax.random.key(1), (length, INPUT_SIZE))
    return cell.step, cell.init(jax.random.key(0), INPUT_SIZE), cell.initial_state(), xs


def flow_temp(hidden: int, length: int) -> int:
    """Bytes of intermediate results, by the compiler's plan, with the spectra of every step."""
    step, *arguments = problem(hidden, length)
    executable, _ = compiled(lambda p, h, x: bptt.gradient_flow(step, p, h, x, loss), *arguments)
    return executable.memory_analysis().temp_size_in_bytes


def flow_peak(hidden: int, length: int, stride: int) -> int:
    bptt.gradient_flow(*problem(8, 8), loss).loss.block_until_ready()
    step, params, h0, xs = problem(hidden, length)
    jax.block_until_ready((params, h0, xs))
    return peak_above_now(lambda: bptt.gradient_flow(step, params, h0, xs, loss, stride=stride))


def measure_flow(hidden: int, length: int, stride: int) -> dict[str, Any]:
    peak, temp = in_child(flow_peak, hidden, length, stride), in_child(flow_temp, hidden, length)
    trajectory = 4 * length * hidden
    return {
        "D": hidden,
        "T": length,
        "trajectory_MB": trajectory / MB,
        "jacobians_MB": trajectory * hidden / MB,
        "temp_MB": temp / MB,
        "peak_MB": peak / MB,
        "peak_above_trajectory_MB": (peak - trajectory) / MB,
    }


def gradient(kind: str, remat: bool, hidden: int, length: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The value and gradient of the sum of the last state, with its arguments."""
    step, *arguments = problem(hidden, length)

    def value(params: Any, h0: jax.Array, xs: jax.Array) -> jax.Array:
        if kind == "final_state":
            return jnp.sum(bptt.final_state(step, params, h0, xs, remat=remat))
        return loss(bptt.unroll(step, params, h0, xs, remat=remat))

    return jax.value_and_grad(value), tuple(arguments)


def unroll_peak(kind: str, remat: bool, hidden: int, length: int) -> int:
    tiny, arguments = gradient(kind, remat, hidden, 8)
    jax.block_until_ready(jax.jit(tiny)(*arguments))
    return peak_above_now(plan(kind, remat, hidden, length)[1])


def plan(kind: str, remat: bool, hidden: int, length: int) -> tuple[float, Callable[[], Any]]:
    """Planned MB of intermediate results of the gradient, and the compiled gradient itself."""
    function, arguments = gradient(kind, remat, hidden, length)
    executable, _ = compiled(function, *arguments)
    return executable.memory_analysis().temp_size_in_bytes / MB, partial(executable, *arguments)


def plans_and_times(kind: str, hidden: int, length: int, repeats: int) -> dict[str, float]:
    """Planned bytes, and the time of remat over plain; values and gradients are compared before."""
    plain_temp, plain = plan(kind, False, hidden, length)
    remat_temp, remat = plan(kind, True, hidden, length)
    error = relative_error(remat(), plain())
    if error > 1e-4:
        raise SystemExit(f"{kind}, T = {length}: remat differs from plain by {error}")
    times = interleaved_medians({"plain": plain, "remat": remat}, repeats)
    ratio = times["remat"] / times["plain"]
    return {"plain_temp_MB": plain_temp, "remat_temp_MB": remat_temp, "time_ratio": ratio, "error": error}


def measure_unroll(s: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        for length in s["lengths"]:
            row = {"function": kind, "T": length, **plans_and_times(kind, s["hidden"], length, s["repeats"])}
            for name, remat in (("plain", False), ("remat", True)):
                wanted = length >= s["peaks_from"]
                peak = in_child(unroll_peak, kind, remat, s["hidden"], length) if wanted else None
                row[f"{name}_peak_MB"] = None if peak is None else peak / MB
            rows.append(row)
    return rows


def update_of(remat: bool, hidden: int, length: int, batch: int) -> tuple[Callable[..., Any], Any]:
    """One update of an lstm that learns to add, and the state that it starts from."""
    net = network(bptt.lstm(hidden), adding(length), remat=remat)
    optimizer = bptt.with_clipping(optax.adam(1e-3), 1.0)
    return make_update(net, optimizer, batch=batch), init_state(net, optimizer, 0)


def update_peak(remat: bool, hidden: int, length: int, batch: int) -> int:
    tiny, start = update_of(remat, hidden, 8, batch)
    jax.block_until_ready(jax.jit(tiny)(start))
    update, start = update_of(remat, hidden, length, batch)
    executable, _ = compiled(update, start)
    return peak_above_now(partial(executable, start))


def measure_training(hidden: int, repeats: int, t: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for length in t["lengths"]:
        row: dict[str, Any] = {"T": length, "batch": t["batch"]}
        runs = {}
        for name, remat in (("plain", False), ("remat", True)):
            update, start = update_of(remat, hidden, length, t["batch"])
            executable, _ = compiled(update, start)
            row[f"{name}_temp_MB"] = executable.memory_analysis().temp_size_in_bytes / MB
            fits = remat or length <= t["plain_up_to"]
            row[f"{name}_peak_MB"] = in_child(update_peak, remat, hidden, length, t["batch"]) / MB if fits else None
            if fits:
                runs[name] = partial(executable, start)
        row["time_ratio"] = row["error"] = None
        if len(runs) == 2:
            row["error"] = relative_error(runs["remat"]()[0].params, runs["plain"]()[0].params)
            times = interleaved_medians(runs, repeats)
            row["time_ratio"] = times["remat"] / times["plain"]
        rows.append(row)
    return rows


def flow_plan(hidden: int, length: int) -> int:
    """Bytes of intermediate and final results, by the compiler's plan, with the spectra of every step."""
    step, *arguments = problem(hidden, length)
    plan = compiled(lambda p, h, x: bptt.gradient_flow(step, p, h, x, loss), *arguments)[0].memory_analysis()
    return plan.temp_size_in_bytes + plan.output_size_in_bytes


def measure_large(large: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for hidden, length, stride in large["flow"]:
        start = time.perf_counter()
        peak = in_child(flow_peak, hidden, length, stride)
        row = {
            "what": "gradient_flow",
            "D": hidden,
            "T": length,
            "plan_MB": in_child(flow_plan, hidden, length) / MB,
        }
        rows.append(row | {"peak_MB": peak / MB, "seconds": time.perf_counter() - start})
    hidden, length = large["gradient"]
    start = time.perf_counter()
    peak = in_child(unroll_peak, "final_state", True, hidden, length)
    row = {"what": "gradient", "D": hidden, "T": length, "plan_MB": plan("final_state", True, hidden, length)[0]}
    return [*rows, row | {"peak_MB": peak / MB, "seconds": time.perf_counter() - start}]


def matrix_free_run(hidden: int, length: int, num: int) -> dict[str, Any]:
    """Peak of memory, seconds, and what is to be compared."""
    jax.block_until_ready(bptt.gradient_flow(*problem(8, 8), loss, num=num))
    step, params, h0, xs = problem(hidden, length)
    jax.block_until_ready((params, h0, xs))
    measure = cache(lambda: bptt.gradient_flow(step, params, h0, xs, loss, num=num))
    start = time.perf_counter()
    peak = peak_above_now(measure)
    found = measure()
    assert found.products is not None
    assert found.spectra is not None
    return {
        "peak": peak,
        "seconds": time.perf_counter() - start,
        "product_log_norms": np.asarray(found.products.log_norms),
        "singular_values": np.asarray(found.spectra.singular_values),
        "verdict": found.verdict,
    }


def reference(hidden: int, length: int, num: int, back: int) -> np.ndarray:
    """The largest singular values of the product of the last `back` Jacobians: double precision, ARPACK."""
    _, params, h0, xs = problem(hidden, length)
    recurrent, into, bias, h, inputs = (np.asarray(a, np.float64) for a in (*params, h0, xs))
    slopes = []
    for x in inputs:
        h = np.tanh(recurrent @ h + into @ x + bias)
        slopes.append(1 - h**2)

    def push(v: np.ndarray) -> np.ndarray:
        for slope in slopes[-back:]:
            v = slope * (recurrent @ v.ravel())
        return v

    def pull(u: np.ndarray) -> np.ndarray:
        for slope in reversed(slopes[-back:]):
            u = (slope * u.ravel()) @ recurrent
        return u

    product = LinearOperator((hidden, hidden), matvec=push, rmatvec=pull, dtype=np.float64)
    values = svds(product, k=num, return_singular_vectors=False, rng=np.random.default_rng(0))
    return np.sort(values)[::-1]


def measure_matrix_free(hidden: int, length: int, num: int, back: list[int]) -> dict[str, Any]:
    run = in_child(matrix_free_run, hidden, length, num)
    checks = {k: reference(hidden, length, num if k == 1 else 1, k) for k in back}
    row = {
        "D": hidden,
        "T": length,
        "num": num,
        "jacobians_MB": 4 * length * hidden**2 / MB,
        "weights_MB": 4 * hidden**2 / MB,
        "peak_MB": run["peak"] / MB,
        "seconds": run["seconds"],
        "verdict": run["verdict"],
    }
    for k, values in checks.items():
        row[f"log_norm_error_{k}"] = abs(float(run["product_log_norms"][-k] - np.log(values[0])))
    row["singular_value_error"] = relative_error(run["singular_values"][-1], checks[1])
    return row


def fit_exponents(rows: list[dict[str, Any]], hidden: int) -> list[dict[str, Any]]:
    """Of temp as it is; and of its increments, where the gradient of the weights (no matter of T) drops out, less
    what is O(T) in any case: the states that `unroll` returns, the copy of the inputs that `remat` makes.
    """
    fits = []
    for kind in KINDS:
        for name, theory in (("plain", 1.0), ("remat", 0.5)):
            at = [row for row in rows if row["function"] == kind]
            lengths = np.array([row["T"] for row in at])
            temp = np.array([row[f"{name}_temp_MB"] for row in at])
            numbers = (hidden if kind == "unroll" else 0) + (INPUT_SIZE if name == "remat" else 0)
            increments = np.diff(temp - 4 * numbers * lengths / MB)
            fit = {"all": exponent(lengths, temp), "rest": exponent(lengths[1:], increments), "theory": theory}
            fits.append({"function": kind, "kind": name, **fit})
    return fits


def exponent(lengths: np.ndarray, sizes: np.ndarray) -> float:
    """Slope in the log-log plane."""
    return float(np.polyfit(np.log(lengths), np.log(sizes), 1)[0])


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    flow = [measure_flow(hidden, length, s["stride"]) for hidden, length in s["flow"]]
    title = f"gradient_flow, rnn; peak with spectra of every {s['stride']}th step (the same chunk of matrices)"
    print_rows(title, flow)
    largest = flow[-1]["peak_above_trajectory_MB"]
    print(f"D = {flow[-1]['D']}, T = {flow[-1]['T']}: {largest:.0f} MB above the trajectory, aim: {AIM_MB}")
    rows = measure_unroll(s)
    title = (
        f"gradient through time, rnn, N = {s['hidden']}; time_ratio: remat / plain, {s['repeats']} or more by turns"
    )
    print_rows(title, rows)
    exponents = fit_exponents(rows, s["hidden"])
    title = "exponents of temp against T: all; rest, without constants, returned states, copied inputs"
    print_rows(title, exponents)
    training = measure_training(s["hidden"], s["repeats"], s["training"])
    title = f"one update of training, lstm, N = {s['hidden']}, Adam; aim for the time ratio: 1.5"
    print_rows(title, training)
    matrix_free = measure_matrix_free(**s["matrix_free"])
    title = f"gradient_flow, rnn, leading values only; aim for the peak: {MATRIX_FREE_AIM_MB:.0f} MB"
    print_rows(title, [matrix_free])
    large = measure_large(s["large"])
    print_rows(f"aim for each: {LARGE_AIM_MB:.0f} MB", large)
    results = {
        "gradient_flow": flow,
        "unroll": rows,
        "exponents": exponents,
        "training": training,
        "matrix_free": matrix_free,
        "large": large,
        "aim_MB": AIM_MB,
        "matrix_free_aim_MB": MATRIX_FREE_AIM_MB,
        "large_aim_MB": LARGE_AIM_MB,
    }
    claims = [
        Claim(
            "memory", f"{r['what']}, D = {r['D']}, T = {r['T']}", "MB on the CPU", r["peak_MB"], LARGE_AIM_MB, True
        )
        for r in large
    ]
    free = f"gradient_flow, num, D = {matrix_free['D']}, T = {matrix_free['T']}"
    claims.append(Claim("memory", free, "MB on the CPU", matrix_free["peak_MB"], MATRIX_FREE_AIM_MB, True))
    print_claims(claims)
    save(a.out, "memory", s, results, claims)


if __name__ == "__main__":
    main()
