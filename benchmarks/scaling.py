"""What do several devices bring, and are the results the same?

The same work on 1, 2 and 4 devices that one process is made to see, and in two processes of one device each, joined
by `jax.distributed` over loopback, with Gloo's collectives. All of them share the cores of this machine: what shows
is what dividing the work costs, and what one device leaves idle, not what more hardware would bring. Two jobs:
`gradient_flow` of a batch, spread by the sharding of its inputs, and the seeds of a training, spread by ``mesh=``
(a chunk of updates, the evaluation after it included). Before any time, every result is compared with one device's,
relative to its largest entry; of eigenvalues the moduli, for the order of two that are equal is nobody's.

Every setting has processes of its own, and they take turns; times are medians of all turns.
"""

import socket
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from measure import in_child, parser, print_rows, save

import bptt_jax as bptt
from bptt_jax.experiments.loop import train
from bptt_jax.experiments.network import network
from bptt_jax.experiments.tasks import adding
from bptt_jax.experiments.timing import seconds

FULL: dict[str, Any] = {
    "hidden": 32,
    "length": 100,
    "batch": 16,
    "train_hidden": 32,
    "train_length": 50,
    "seeds": 8,
    "chunk": 100,
    "repeats": 3,
    "turns": 2,
}
QUICK: dict[str, Any] = FULL | {
    "hidden": 8,
    "length": 20,
    "batch": 4,
    "train_hidden": 8,
    "train_length": 10,
    "seeds": 4,
    "chunk": 10,
    "repeats": 2,
    "turns": 1,
}
SETTINGS = {"1 device": (1, 1), "2 devices": (2, 1), "4 devices": (4, 1), "2 processes": (1, 2)}
JOBS = ("gradient_flow", "train")
AIM = 1e-5

Results = dict[str, np.ndarray]
Times = dict[str, list[float]]


def work(s: dict[str, Any]) -> tuple[Results, Times]:
    """Results, whole in every process, and seconds of the two jobs, on all devices there are."""
    mesh = Mesh(np.asarray(jax.devices()), ("batch",))
    cell = bptt.gru(s["hidden"])
    params, h0 = cell.init(jax.random.key(0), 3), cell.initial_state()
    xs = np.random.default_rng(0).standard_normal((s["batch"], s["length"], 3)).astype(np.float32)
    along = NamedSharding(mesh, PartitionSpec("batch"))
    spread = jax.make_array_from_callback(xs.shape, along, lambda index: xs[index])

    def flow(x: jax.Array) -> bptt.analysis.GradientFlow:
        return bptt.gradient_flow(cell.step, params, h0, x, lambda states: jnp.mean(jnp.square(states[-1])))

    flows = jax.jit(jax.vmap(flow))
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
    found = jax.tree_util.tree_leaves_with_path(whole(flows(spread)))
    results = {jax.tree_util.keystr(path): np.abs(a) if np.iscomplexobj(a) else np.asarray(a) for path, a in found}
    flow_seconds = [seconds(partial(flows, spread)) for _ in range(s["repeats"])]

    ends: list[float] = []
    done = train(
        network(bptt.gru(s["train_hidden"]), adding(s["train_length"])),
        bptt.with_clipping(optax.sgd(0.05), 1.0),
        updates=s["chunk"] * (1 + s["repeats"]),
        seeds=range(s["seeds"]),
        chunk=s["chunk"],
        mesh=mesh,
        on_record=lambda record: None if "event" in record else ends.append(time.perf_counter()),
    )
    losses = [record["loss"] for record in done.records if "event" not in record]
    results["training loss"] = np.asarray(losses)
    return results, {"gradient_flow": flow_seconds, "train": np.diff(ends).tolist()}


def child(s: dict[str, Any], devices: int, processes: int, number: int, port: int) -> Any:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, number, initialization_timeout=60)
    return work(s)


def deviation(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest, relative to the largest entry, or to 0.1 where all are smaller, as logarithms near zero."""
    got, expected = (np.asarray(a, np.float64) for a in (got, expected))
    scale = np.max(np.abs(expected), where=np.isfinite(expected), initial=0.1)
    with np.errstate(invalid="ignore"):  # the same infinities
        apart = np.where((got == expected) | (np.isnan(got) & np.isnan(expected)), 0, np.abs(got - expected))
    return float(np.max(apart) / scale)


def run(s: dict[str, Any], devices: int, processes: int) -> tuple[Results, Times]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor(processes) as pool:
        jobs = [pool.submit(in_child, child, s, devices, processes, k, port) for k in range(processes)]
        first, *_ = [job.result() for job in jobs]
    return first


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    times: dict[str, dict[str, list[float]]] = {name: {job: [] for job in JOBS} for name in SETTINGS}
    errors: dict[str, dict[str, float]] = {name: dict.fromkeys(JOBS, 0.0) for name in SETTINGS}
    alone: Results = {}
    differ = set()
    for _ in range(s["turns"]):
        for name, (devices, processes) in SETTINGS.items():
            results, found = run(s, devices, processes)
            alone = alone or results
            for key, value in results.items():
                job = "train" if key == "training loss" else "gradient_flow"
                error = deviation(value, alone[key])
                errors[name][job] = max(errors[name][job], error)
                differ |= set() if error <= AIM else {f"{key} on {name}"}
            for job in JOBS:
                times[name][job] += found[job]
    medians = {name: {job: statistics.median(times[name][job]) for job in JOBS} for name in SETTINGS}
    rows: list[dict[str, Any]] = [
        {
            "job": job,
            "on": name,
            "ms": 1e3 * medians[name][job],
            "speed": medians["1 device"][job] / medians[name][job],
            "error": errors[name][job],
        }
        for job in JOBS
        for name in SETTINGS
    ]
    title = "Speed: of one device, all on the same cores; error: relative to the largest entry of a result"
    print_rows(title, rows)
    save(a.out, "scaling", s, {"rows": rows})
    if differ:
        raise SystemExit(f"the results differ: {', '.join(sorted(differ))}")


if __name__ == "__main__":
    main()
