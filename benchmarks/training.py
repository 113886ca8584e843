"""How much faster is training scanned on the device than a Python loop over the same jitted update?

The update is one and the same pure function (`bptt_jax.experiments.loop.make_update`: a fresh batch, the gradient
through time, clipping, Adam): jitted and called from Python, without waiting for a result before the next call
("python") or reading the loss of every update, as a log or a progress bar does ("reading"), or scanned n times
within one program. All end with the same parameters, which is checked first. Aim: never slower, at least 5 times
faster for small networks. For seeds trained side by side the time is that of a seed's update.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from measure import compiled, parser, print_rows, relative_error, save

import bptt_jax as bptt
from bptt_jax.experiments.loop import init_state, make_update
from bptt_jax.experiments.network import network
from bptt_jax.experiments.records import TrainState
from bptt_jax.experiments.tasks import adding
from bptt_jax.experiments.timing import interleaved_medians

CELLS: dict[str, Callable[[int], bptt.Cell]] = {"rnn": bptt.rnn, "gru": bptt.gru, "lstm": bptt.lstm}
# cell, units, T, batch, updates in a repeat
FULL: dict[str, Any] = {
    "cases": [
        ["rnn", 8, 10, 1, 2000],
        ["rnn", 16, 10, 4, 1000],
        ["gru", 16, 20, 4, 500],
        ["rnn", 32, 50, 20, 200],
        ["gru", 32, 50, 20, 100],
        ["lstm", 64, 100, 20, 30],
        ["lstm", 128, 200, 20, 10],
    ],
    "seeds": 4,
    "repeats": 5,
    "rate": 1e-3,
}
QUICK = FULL | {"cases": [["rnn", 8, 10, 1, 1000], ["gru", 16, 20, 4, 100]], "repeats": 3}


def measure(case: list[Any], s: dict[str, Any]) -> dict[str, Any]:
    kind, hidden, length, batch, n = case
    net = network(CELLS[kind](hidden), adding(length))
    optimizer = bptt.with_clipping(optax.adam(s["rate"]), 1.0)
    update = make_update(net, optimizer, batch=batch)
    start = init_state(net, optimizer, 0)
    starts = jax.vmap(partial(init_state, net, optimizer))(jax.numpy.arange(s["seeds"]))

    def scanned(state: TrainState, step: Callable[[TrainState], Any]) -> TrainState:
        return jax.lax.scan(lambda s, _: step(s), state, length=n)[0]

    _, compile_one = compiled(update, start)
    many, compile_many = compiled(partial(scanned, step=update), start)
    side, _ = compiled(partial(scanned, step=jax.vmap(update)), starts)
    jitted = jax.jit(update)  # what a user would call, dispatch and all

    def python() -> TrainState:
        state = start
        for _ in range(n):
            state, _ = jitted(state)
        return state

    def reading() -> TrainState:
        state, losses = start, []
        for _ in range(n):
            state, metrics = jitted(state)
            losses.append(float(metrics.loss))
        return state

    error = relative_error(many(start).params, python().params)
    if error > 1e-3:
        raise SystemExit(f"{case}: scanned and Python loop differ by {error}")
    runs: dict[str, Callable[[], Any]] = {
        "python": python,
        "reading": reading,
        "scanned": partial(many, start),
        "seeds": partial(side, starts),
    }
    times = interleaved_medians(runs, s["repeats"])
    return {
        "cell": kind,
        "N": hidden,
        "T": length,
        "batch": batch,
        "ms_scanned": 1e3 * times["scanned"] / n,
        "python_over_scanned": times["python"] / times["scanned"],
        "reading_over_scanned": times["reading"] / times["scanned"],
        "seeds_over_scanned": times["seeds"] / times["scanned"] / s["seeds"],
        "compile_ratio": compile_many / compile_one,
        "error": error,
    }


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    rows = [measure(case, s) for case in s["cases"]]
    print_rows(
        f"An update in a Python loop over one scanned; {s['seeds']} seeds by vmap, an update of a seed over one "
        f"alone; medians of {s['repeats']} or more by turns",
        rows,
    )
    save(arguments.out, "training", s, rows)


if __name__ == "__main__":
    main()
