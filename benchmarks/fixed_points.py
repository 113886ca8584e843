"""Where does a trained network rest: how many points are found, how exactly, and how long does it take?

A leaky network is trained on the three-bit flip-flop (Sussillo and Barak 2013). From the same starts, states that it
visits, with noise, go `bptt_jax.fixed_points` by Newton and by descent, and what users would take: fixed-point-finder's
method in PyTorch, and BrainPy's `SlowPointFinder` where it is installed. What each has found is judged by one rule, in
float64: points whose speed ``|F(h) - h|`` is below 1e-5, and of those within 1e-2 of each other one.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from measure import Claim, compiled, parser, print_claims, print_rows, save

import bptt_jax as bptt
from bptt_jax.experiments.loop import train
from bptt_jax.experiments.network import network
from bptt_jax.experiments.tasks import flipflop, with_keys
from bptt_jax.experiments.timing import interleaved_medians

FULL: dict[str, Any] = {
    "hidden": 64,
    "updates": 3000,
    "starts": 1024,
    "noise": 0.5,
    "repeats": 3,
    "iterations": 5000,
}
QUICK = FULL | {"hidden": 16, "updates": 60, "starts": 32, "repeats": 1, "iterations": 100}
ALPHA, STILL, APART = 0.2, 1e-5, 1e-2
MODULES = {"fixed-point-finder's method": "torch_fixed_points", "BrainPy": "brainpy_fixed_points"}


def trained(s: Mapping[str, Any]) -> tuple[bptt.Cell, Any, Any, float]:
    """Cell without noise, its trained parameters, states visited, and the share of sequences that are wrong."""
    net = network(bptt.cells.leaky_rnn(s["hidden"], alpha=ALPHA, noise=0.05), with_keys(flipflop(100)))
    done = train(net, bptt.with_clipping(optax.adam(3e-3), 1.0), updates=s["updates"], batch=20, chunk=s["updates"])
    params = jax.tree.map(lambda a: a[0], done.states.params)
    inputs, _ = net.task.sample(jax.random.key(1), 64)
    states = jax.vmap(lambda xs: bptt.unroll(net.cell.step, params.cell, net.cell.initial_state(), xs))(inputs)
    return (
        bptt.cells.leaky_rnn(s["hidden"], alpha=ALPHA),
        params.cell,
        states,
        float(done.records[-1]["validation_error"][0]),
    )


def judged(points: np.ndarray, params: Any) -> tuple[int, float, float]:
    """How many are distinct, and of those that are still the median and the largest speed."""
    w, b = (np.asarray(a, np.float64) for a in (params.recurrent, params.bias))
    points = np.asarray(points, np.float64)
    speeds = np.linalg.norm(ALPHA * (np.tanh(points @ w.T + b) - points), axis=1)
    still = np.flatnonzero(speeds < STILL)
    kept: list[np.ndarray] = []
    for k in still[np.argsort(speeds[still])]:
        if all(np.linalg.norm(points[k] - other) > APART for other in kept):
            kept.append(points[k])
    if not len(still):
        return 0, np.inf, np.inf
    return len(kept), float(np.median(speeds[still])), float(np.max(speeds[still]))


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    cell, params, states, error = trained(s)
    print(f"flip-flop, {s['hidden']} units, {s['updates']} updates: {error:.1%} of sequences wrong")
    starts = bptt.analysis.sample_starts(states, s["starts"], key=jax.random.key(2), noise=s["noise"], axes=2)
    zero = jnp.zeros(3)

    runs: dict[str, Callable[[], Any]] = {}
    compiling: dict[str, float] = {}
    for method in ("newton", "gradient"):

        def search(params: Any, starts: Any, method: Any = method) -> Any:
            return bptt.fixed_points(cell.step, params, starts, zero, method=method).points

        program, compiling[method] = compiled(search, params, starts)
        runs[method] = partial(program, params, starts)
    modules, missing = peers.installed(MODULES)
    for name, module in modules.items():
        runs[name] = (
            module.finder(params, ALPHA, starts)
            if name != "BrainPy"
            else module.finder(lambda h: cell.step(params, h, zero), starts, s["iterations"])
        )
    for name, package in missing.items():
        print(f"{name}: left out, {package} is not installed")

    found = {name: judged(run(), params) for name, run in runs.items()}
    times = interleaved_medians(runs, s["repeats"])
    rows = [
        {
            "method": name,
            "distinct": count,
            "median speed": median,
            "largest speed": largest,
            "seconds": times[name],
            "times newton's": times[name] / times["newton"],
            "compilation": compiling.get(name),
        }
        for name, (count, median, largest) in found.items()
    ]
    print_rows("Fixed points", rows)
    claims = []
    for name in modules:
        case = f"flip-flop, {s['hidden']} units, {s['starts']} starts"
        claims.append(
            Claim("fixed points", case, f"time of {name} over newton's", times[name] / times["newton"], 10.0)
        )
        share = found["newton"][0] / max(1, found[name][0])
        claims.append(Claim("fixed points", case, f"distinct points of newton over {name}'s", share, 1.0))
    print_claims(claims)
    save(a.out, "fixed_points", s | {"wrong": error}, rows, claims)


if __name__ == "__main__":
    main()
