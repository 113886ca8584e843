"""How long does it take, beside others?"""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call, its result waited for."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def interleaved_medians(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, at_least: float = 2.0
) -> dict[str, float]:
    """Median seconds of each candidate, of `interleaved`."""
    return {name: statistics.median(t) for name, t in interleaved(candidates, repeats, at_least).items()}


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, at_least: float
) -> dict[str, list[float]]:
    """Seconds of each candidate; they take turns, after one call each that does not count.

    The order is drawn anew every round, so that what one leaves behind (spinning threads, a cold cache) hits all of
    them. Short ones are repeated more often than asked, until all together have taken `at_least` so many seconds.
    """
    for run in candidates.values():
        seconds(run)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order, draw = list(candidates), random.Random(0)
    start = time.perf_counter()
    while len(times[order[0]]) < repeats or time.perf_counter() - start < at_least:
        draw.shuffle(order)
        for name in order:
            times[name].append(seconds(candidates[name]))
    return times
