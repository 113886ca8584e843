"""Does stateful training hold its memory on a stream that does not end?

One stream, characters of real text over and over, read in windows whose states are carried from one to the next.
"peak" is the peak of the resident memory of a fresh process above what it held when the first chunk of updates had
ended: what the rest of the stream adds. "first chunk" is that of this one above the imports, most of it the compiler's.
Aim for the peak: 100 MB for 1,400,000 samples.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that are started, too

from typing import Any

import jax
import optax
from measure import Claim, PeakFromNow, in_child, parser, print_claims, print_rows, save

import bptt_jax as bptt
from bptt_jax.experiments.loop import train
from bptt_jax.experiments.network import network
from bptt_jax.experiments.records import Metrics
from bptt_jax.experiments.tasks import characters

MB = 1e6
FULL: dict[str, Any] = {"samples": [20_000, 140_000, 1_400_000], "hidden": 64, "window": 100, "chunk": 100}
QUICK = FULL | {"samples": [2000, 4000], "chunk": 10}
AIM_MB = 100


def stream_peak(samples: int, hidden: int, window: int, chunk: int) -> dict[str, float]:
    """MB above what the process holds after the first chunk, and before it above the imports."""
    task = characters(length=window)._replace(threshold=0.0)  # which nobody meets, so that all is read
    net, optimizer = network(bptt.gru(hidden), task), bptt.with_clipping(optax.adam(1e-3), 1.0)
    first = PeakFromNow()
    compiling: list[int] = []
    rest: list[PeakFromNow] = []

    def after_chunk(metrics: Metrics) -> None:
        if not rest:
            compiling.append(first.bytes)
            rest.append(PeakFromNow())

    updates = samples // window
    done = train(net, optimizer, updates=updates, batch=1, chunk=chunk, window=window, on_chunk=after_chunk)
    jax.block_until_ready(done.states)
    carried = done.states.carried
    assert carried is not None
    assert int(carried.position[0]) == samples
    loss = float(done.records[-1]["loss"][0])
    return {"peak_MB": rest[0].bytes / MB, "first_chunk_MB": compiling[0] / MB, "loss": loss}


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
