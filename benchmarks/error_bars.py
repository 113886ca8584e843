"""Are the error bars of the Lyapunov exponents honest?

Of many independent runs, the share whose interval of two standard errors holds the true value, which is known
exactly, or, of the driven network, from many runs ten times as long. For the logistic map it must be all: its
growth telescopes (log |f'(x)| = ln 2 + u(f(x)) - u(x)), so that the error falls as 1/T and not as 1/sqrt(T). In
float32 its orbits end in 0 or a short cycle; hence float64. "short" shows the limit: runs of 500 steps,
whose batches of 25 are shorter than the 39 steps that the recurrence takes to forget.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lyapunov import WARMUP, gaussian_run, logistic_run, newman
from measure import parser, print_rows, save

import bptt_jax as bptt

SHORT = 500
FULL: dict[str, Any] = {"runs": 50, "steps": 4000, "repeats": 4, "reference": 1000}
QUICK = {"runs": 50, "steps": SHORT, "repeats": 1, "reference": 50}


def correlated(key: Any, steps: int, memory: float) -> Any:
    """An autoregressive sequence of unit variance: x_t = memory x_{t-1} + noise."""
    noise = jax.random.normal(key, (steps,)) * math.sqrt(1 - memory**2)
    first = jax.random.normal(jax.random.fold_in(key, 1))
    return jax.lax.scan(lambda x, n: (memory * x + n, memory * x + n), first, noise)[1]


def autoregressive_run(key: Any, steps: int) -> bptt.analysis.LyapunovSpectrum:
    """``h <- exp(x_t - 0.1) h``: the exponent is exactly -0.1, and x remembers some 20 steps."""
    xs = correlated(key, steps + WARMUP, 0.95)
    return bptt.lyapunov_exponents(lambda p, h, x: jnp.exp(x - 0.1) * h, None, jnp.zeros(1), xs, warmup=WARMUP)


def driven_run(key: Any, steps: int) -> bptt.analysis.LyapunovSpectrum:
    """An rnn of four units on slow inputs, of which two exponents."""
    cell = bptt.rnn(4, gain=1.5)
    xs = jax.vmap(lambda k: correlated(k, steps + WARMUP, 0.9), out_axes=1)(jax.random.split(key, 2))
    params = cell.init(jax.random.key(7), 2)
    return bptt.lyapunov_exponents(cell.step, params, cell.initial_state(), xs, num=2, warmup=WARMUP)


def honesty(s: dict[str, Any]) -> list[dict[str, Any]]:
    count, steps = s["runs"] * s["repeats"], s["steps"]

    def runs(one: Callable[[Any, int], bptt.analysis.LyapunovSpectrum], starts: Any, steps: int) -> Any:
        def brief(start: Any) -> Any:
            spectrum = one(start, steps)
            return spectrum.exponents, spectrum.standard_errors

        return [np.asarray(a, np.float64) for a in jax.jit(jax.vmap(brief))(starts)]

    keys = jax.random.split(jax.random.key(5), count)
    long, _ = runs(driven_run, jax.random.split(jax.random.key(6), s["reference"]), 10 * steps)
    truth = long.mean(axis=0)
    truth_error = long.std(axis=0, ddof=1) / math.sqrt(len(long))
    with jax.enable_x64(True):
        starts = jax.random.uniform(jax.random.key(1), (count,), jnp.float64)
        chaotic = runs(logistic_run, starts, steps)
    cases = [
        ("Gaussian product", runs(gaussian_run, keys, steps), newman(), None),
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
                "worst_of_50": 100 * float(np.min(held[:, i].reshape(-1, s["runs"]).mean(axis=1))),
                "scatter": float(np.std(found[:, i], ddof=1)),
                "mean_error": float(np.mean(errors[:, i])),
                "reference_error": None if reference is None else float(reference[i]),
            }
            for i in range(found.shape[1])
        ]
    return rows


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    held = honesty(s)
    title = (
        f"Share of runs (%) whose interval of 2 standard errors holds the truth; worst of {s['repeats']} sets of "
    )
    print_rows(title + f"{s['runs']} runs", held, "scatter", "mean_error", "reference_error")
    save(arguments.out, "error_bars", s, {"honesty": held})


if __name__ == "__main__":
    main()
