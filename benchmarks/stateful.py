"""Does stateful training hold its memory on a stream that does not end, and is a window that is chosen a good one?

Memory: one stream, characters of real text over and over, read in windows whose states are carried from one to the
next. "peak" is the peak of the resident memory of a fresh process above what it held after a first run of two windows;
everything is compiled anew, and evaluated as always. "first run" is that of this first one above the imports, most of
it the compiler's. Aim for the peak: 100 MB for 1,400,000 samples.

Windows: every symbol is wanted again after a lag; streams are read in windows of fixed length and of lengths chosen
from the gradient's measured decay (Aicher et al. 2019), the same number of samples for all. A window that is shorter
than the lag cannot learn it; one that is much longer makes fewer updates.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that are started, too

import time
from contextlib import suppress
from typing import Any

import numpy as np
import optax
from measure import Claim, in_child, parser, peak_above_now, print_claims, print_rows, save

import bptt_jax as bptt
from bptt_jax.experiments.loop import train
from bptt_jax.experiments.network import network
from bptt_jax.experiments.records import Training
from bptt_jax.experiments.tasks import characters, delayed_copy

MB = 1e6
FULL: dict[str, Any] = {
    "memory": {"samples": [14_000, 140_000, 1_400_000], "hidden": 64, "window": 100, "chunk": 1000},
    "windows": {"delay": 5, "hidden": 32, "batch": 10, "samples": 500_000, "rate": 3e-3, "seeds": 2},
    "fixed": [2, 5, 10, 25],
    "bias": [0.9, 0.5],
}
QUICK = FULL | {
    "memory": FULL["memory"] | {"samples": [2000, 20_000], "chunk": 100},
    "windows": FULL["windows"] | {"samples": 20_000},
    "fixed": [5],
    "bias": [0.5],
}
AIM_MB = 100


def stream_peak(samples: int, hidden: int, window: int, chunk: int) -> dict[str, float]:
    """MB above what the process holds after a first run of two windows, and above its start."""
    task = characters(length=window)._replace(threshold=0.0)  # which nobody meets, so that all is read
    net, optimizer = network(bptt.gru(hidden), task), bptt.with_clipping(optax.adam(1e-3), 1.0)

    def run(updates: int) -> Training:
        return train(net, optimizer, updates=updates, batch=1, chunk=min(chunk, updates), window=window)

    compiling = peak_above_now(lambda: run(2).states)
    found: list[Training] = []
    start = time.perf_counter()
    peak = peak_above_now(lambda: found.append(run(samples // window)))
    seconds = time.perf_counter() - start
    (done,) = found
    carried = done.states.carried
    assert carried is not None
    assert int(carried.position[0]) == samples
    loss = float(done.records[-1]["loss"][0])
    return {"peak_MB": peak / MB, "first_run_MB": compiling / MB, "seconds": seconds, "loss": loss}


def measure_memory(samples: list[int], **of_run: int) -> list[dict[str, Any]]:
    return [{"samples": count} | in_child(stream_peak, count, *of_run.values()) for count in samples]


class Enough(Exception):
    """As many samples as there are to be have been read."""


def learn(window: int | str, bias: float, w: dict[str, Any]) -> dict[str, Any]:
    """Training until so many samples have been read, in windows of whatever length."""
    net = network(bptt.gru(w["hidden"]), delayed_copy(w["delay"], episode=20 * w["delay"]))
    steps, start = w["samples"] // w["batch"], time.perf_counter()
    records: list[dict[str, Any]] = []
    read = 0

    def count(record: dict[str, Any]) -> None:
        nonlocal read
        if "event" in record:
            return
        read += record["window"] * (record["updates"] - (records[-1]["updates"] if records else 0))
        records.append(record)
        if read >= steps:
            raise Enough

    with suppress(Enough):
        train(
            net,
            bptt.with_clipping(optax.adam(w["rate"]), 1.0),
            updates=steps,
            batch=w["batch"],
            seeds=range(w["seeds"]),
            chunk=200,
            window=window,  # type: ignore[arg-type]
            bias=bias,
            on_record=count,
        )
    last = records[-1]
    errors = [0.0 if v is None else float(v) for v in last["validation_error"]]  # of one that has learned before
    return {
        "window": window,
        "bias": bias if window == "auto" else None,
        "samples": read * w["batch"],
        "updates": last["updates"],
        "mean_window": read / last["updates"],
        "last_window": last["window"],
        "error": float(np.mean(errors)),
        "solved_at": last["solved_at"],
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    memory = measure_memory(**s["memory"])
    print_rows(f"one stream, gru of {s['memory']['hidden']} units, windows of {s['memory']['window']}", memory)
    longest = memory[-1]
    claims = [
        Claim(
            "stateful training", f"{longest['samples']} samples", "MB on the CPU", longest["peak_MB"], AIM_MB, True
        )
    ]
    print_claims(claims)
    chosen = [(window, 1.0) for window in s["fixed"]] + [("auto", bias) for bias in s["bias"]]
    windows = [in_child(learn, window, bias, s["windows"]) for window, bias in chosen]
    print_rows(f"lag {s['windows']['delay']}, {s['windows']['samples']} samples; share of wrong copies", windows)
    save(a.out, "stateful", s, {"memory": memory, "windows": windows}, claims)


if __name__ == "__main__":
    main()
