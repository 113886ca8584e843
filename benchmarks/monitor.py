"""What does `bptt_jax.Monitor` cost in a training loop, at its default rate of one probe in 100 updates?

The loop is the user's: a fresh batch, a jitted update (gradient through time, Adam), called from Python without
waiting for a result. The ten updates 95 to 104, of which number 100 is probed, are run with and without the
monitor by turns; that both end with the same parameters is checked first. What they take longer, the median over
the turns, is what the probe costs in the running loop, the wait for the queued updates included: "cost" is that
over 100 updates, and "least" and "most" are its quartiles. "own" is the same from the seconds that the monitor
reports, which begin after that wait. Compilation, once in a run, is apart. Aim: at most 5 %. Dense spectra grow
with the cube of the state (large ones with ``num=``).
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from measure import parser, print_rows, relative_error, save

import bptt_jax as bptt
from bptt_jax.experiments.network import LossArgs, NetworkParams, network
from bptt_jax.experiments.tasks import adding
from bptt_jax.experiments.timing import seconds

CELLS: dict[str, Callable[[int], bptt.Cell]] = {"rnn": bptt.rnn, "gru": bptt.gru, "lstm": bptt.lstm}
PERIOD, UPDATES = 100, range(95, 105)  # the default of `every`, and what is timed
# cell, units, T, batch, num, turns
FULL: dict[str, Any] = {
    "cases": [
        ["gru", 32, 50, 20, None, 101],
        ["gru", 64, 100, 20, None, 51],
        ["lstm", 128, 100, 32, None, 41],
        ["lstm", 128, 400, 32, None, 11],
        ["lstm", 512, 100, 32, 2, 9],
    ],
    "rate": 1e-3,
}
QUICK = FULL | {"cases": [["gru", 32, 50, 20, None, 21], ["gru", 64, 50, 20, None, 11]]}


def measure(case: list[Any], s: dict[str, Any]) -> dict[str, Any]:
    kind, hidden, length, batch, num, turns = case
    net = network(CELLS[kind](hidden), adding(length))
    optimizer = optax.adam(s["rate"])
    params0 = net.init(jax.random.key(0))
    h0 = net.cell.initial_state()
    sample = jax.jit(net.task.sample, static_argnums=1)

    @jax.jit
    def update(params: NetworkParams, opt_state: Any, data: Any) -> Any:
        def mean_loss(params: NetworkParams) -> jax.Array:
            return jnp.mean(jax.vmap(net.loss, (None, 0, 0))(params, *data))

        updates, opt_state = optimizer.update(jax.grad(mean_loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    monitor = bptt.Monitor(
        lambda params, h, x: net.cell.step(params.cell, h, x),
        net.loss_of_states,
        num=num,
        in_axes=(None, 0, LossArgs(None, 0, 0)),  # type: ignore[arg-type]  # axes where arrays are to be
    )
    probes: list[float] = []

    def loop(watched: bool) -> NetworkParams:
        params, opt_state = params0, optimizer.init(params0)
        for i in UPDATES:
            data = sample(jax.random.key(i), batch)
            params, opt_state = update(params, opt_state, data)
            if watched:
                record = monitor(i, params, h0, data.inputs, net.loss_args(params, *data))
                if record is not None:
                    probes.append(record.scalars["bptt/monitor/seconds"])
        return params

    jax.block_until_ready(loop(False))
    start = time.perf_counter()
    data = sample(jax.random.key(1), batch)
    monitor.probe(0, params0, h0, data.inputs, net.loss_args(params0, *data))
    compile_seconds = time.perf_counter() - start
    error = relative_error(loop(True), loop(False))
    if error > 0:
        raise SystemExit(f"{case}: the monitor has changed the parameters by {error}")
    probes.clear()
    plain: list[float] = []
    watched: list[float] = []
    for turn in range(turns):
        for candidate in (False, True) if turn % 2 else (True, False):
            (watched if candidate else plain).append(seconds(lambda c=candidate: loop(c)))  # type: ignore[misc]
    update_seconds = statistics.median(plain) / len(UPDATES)
    longer = [w - p for w, p in zip(watched, plain, strict=True)]

    def share(extra: float) -> float:
        return 100 * extra / (PERIOD * update_seconds)

    least, _, most = statistics.quantiles(longer, n=4)
    return {
        "cell": kind,
        "N": hidden,
        "T": length,
        "batch": batch,
        "num": num,
        "ms an update": 1e3 * update_seconds,
        "cost %": share(statistics.median(longer)),
        "least %": share(least),
        "most %": share(most),
        "own %": share(statistics.median(probes)),
        "compile s": compile_seconds,
    }


def main() -> None:
    arguments = parser(__doc__).parse_args()
    s = QUICK if arguments.quick else FULL
    rows = [measure(case, s) for case in s["cases"]]
    print_rows(
        f"One probe in {PERIOD} updates: cost of the monitor, relative to the same loop without it",
        rows,
    )
    save(arguments.out, "monitor", s, rows)


if __name__ == "__main__":
    main()
