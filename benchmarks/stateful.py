"""Does stateful training hold its memory on a stream that does not end?

One stream, characters of real text over and over, read in windows whose states are carried from one to the next.
"peak" is the peak of the resident memory of a fresh process above what it held after a first run of two windows;
everything is compiled anew, and evaluated as always. "first run" is that of this first one above the imports, most of
it the compiler's. Aim for the peak: 100 MB for 1,400,000 samples.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that are started, too

import time
from typing import Any

import optax
from measure import Claim, in_child, parser, peak_above_now, print_claims, print_rows, save

import bptt_jax as bptt
from bptt_jax.experiments.loop import train
from bptt_jax.experiments.network import network
from bptt_jax.experiments.records import Training
from bptt_jax.experiments.tasks import characters

MB = 1e6
FULL: dict[str, Any] = {"samples": [14_000, 140_000, 1_400_000], "hidden": 64, "window": 100, "chunk": 1000}
QUICK = FULL | {"samples": [2000, 20_000], "chunk": 100}
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


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    rows = [{"samples": n} | in_child(stream_peak, n, s["hidden"], s["window"], s["chunk"]) for n in s["samples"]]
    print_rows(f"one stream, gru of {s['hidden']} units, windows of {s['window']} steps", rows)
    case = f"{rows[-1]['samples']} samples"
    claims = [Claim("stateful training", case, "MB on the CPU", rows[-1]["peak_MB"], AIM_MB, True)]
    print_claims(claims)
    save(a.out, "stateful", s, rows, claims)


if __name__ == "__main__":
    main()
